"""A small mixed world whose index is known by brute force."""

import dataclasses

import numpy as np

from lmm_sae.core import index_build, index_merge
from lmm_sae.core.index import IndexMeta, LatentIndex
from lmm_sae.core.tokens import IMAGE, Kind

M, K, GRID, SAMPLES = 12, 3, (2, 3), 11
VOCAB = [f'<{i}>' for i in range(7)]
SHAPE = index_build.Shape(
  latents=M,
  grid=GRID,
  exemplars=4,
  texts=3,
  context=2,
  threshold=1e-5,
  spread=2,
  seed=5,
)
META = IndexMeta(
  layer=1,
  split='b',
  latents=M,
  k=K,
  samples=SAMPLES,
  images=0,
  grid=GRID,
  rows=0,
  firings=0,
  threshold=SHAPE.threshold,
  always_on=0.5,
  source='test',
)


@dataclasses.dataclass
class World:
  """Every sample's tokens and codes, and the near-duplicates among them."""

  tokens: list[dict[str, np.ndarray]]
  vals: list[np.ndarray]
  idx: list[np.ndarray]
  duplicate_S: np.ndarray

  def dense(self, s: int) -> np.ndarray:
    """Activations of a sample, [T, M]."""
    acts = np.zeros((len(self.vals[s]), M), np.float32)
    np.put_along_axis(acts, self.idx[s], self.vals[s], axis=1)
    return np.where(acts >= SHAPE.threshold, acts, 0)

  def rows_of(self, s: int, *kinds: Kind) -> np.ndarray:
    return np.flatnonzero(np.isin(self.tokens[s]['kind'], kinds))

  def first_rows_of(self, s: int, kind: Kind) -> np.ndarray:
    """Those of the first image alone."""
    rows = self.rows_of(s, kind)
    return rows[self.tokens[s]['image'][rows] == 0]


def make_world(seed: int) -> World:
  """Samples with and without image and tiles; coarse values, so ties abound."""
  rng = np.random.default_rng(seed)
  tokens, vals, idx = [], [], []
  for s in range(SAMPLES):
    tiles = [(0, 0), (4, 3), (2, 6)][s % 3]
    places = [(Kind.BOS, -1, -1), (Kind.TEMPLATE, -1, -1)]
    if s != 4:
      places += [(Kind.BASE, r, c) for r in range(2) for c in range(3)]
      places += [
        (Kind.TILE, r, c) for r in range(tiles[0]) for c in range(tiles[1])
      ]
      places += [(Kind.NEWLINE, -1, -1)] * (s % 2)
    first = len(places)
    if s % 4 == 3:  # a second image
      places += [(Kind.BASE, r, c) for r in range(2) for c in range(3)]
      places += [(Kind.TILE, r, 7) for r in range(9)]
    second = len(places)
    places += [(Kind.QUESTION, -1, -1)] * 3 + [(Kind.ANSWER, -1, -1)] * 2
    kind, row, col = (np.array(column) for column in zip(*places, strict=True))
    count = len(places)
    tokens.append(
      {
        'sample': np.full(count, s, np.int32),
        'position': np.arange(count, dtype=np.int32),
        'token': rng.integers(0, len(VOCAB), count, np.int32),
        'kind': kind.astype(np.uint8),
        'row': row.astype(np.int16),
        'col': col.astype(np.int16),
        'image': np.where(
          np.isin(kind, IMAGE),
          (np.arange(count) >= first) & (np.arange(count) < second),
          -1,
        ).astype(np.int16),
      }
    )
    values = rng.integers(0, 6, (count, K)).astype(np.float32) / 4
    vals.append(-np.sort(-values, axis=1))
    live = [rng.permutation(M - 1)[:K] for _ in range(count)]  # M - 1 is dead
    idx.append(np.array(live, np.int32))
  duplicate_S = np.arange(SAMPLES)
  duplicate_S[7] = 2
  duplicate_S[9] = 2
  return World(tokens, vals, idx, duplicate_S)


def build(
  world: World,
  path,
  cuts: tuple[int, ...],
  chunk: int = 2,
  order=None,
  memory_mb: int = 64,
):
  """An index of parts that begin at `cuts`, fed `chunk` samples at a time.

  With `order` the parts are made in that order, each told what those before it
  keep.
  """
  stops = dict(zip(cuts, [*cuts[1:], SAMPLES], strict=True))
  floors = None
  for i in order or range(len(cuts)):
    at, stop = cuts[i], stops[cuts[i]]
    part = index_build.Part(SHAPE, world.duplicate_S, floors)
    for first in range(at, stop, chunk):
      some = range(first, min(first + chunk, stop))
      part.add(
        {
          name: np.concatenate([world.tokens[s][name] for s in some])
          for name in world.tokens[0]
        },
        np.concatenate([world.vals[s] for s in some]),
        np.concatenate([world.idx[s] for s in some]),
      )
    folder = path / 'parts' / f'{at}'
    part.save(folder)
    if order:
      found = {n: np.load(folder / f'floor.{n}.npy') for n in SHAPE.keeps()}
      floors = {
        n: np.maximum(found[n], (floors or found)[n]) for n in SHAPE.keeps()
      }
  parts = [path / 'parts' / f'{at}' for at in cuts]
  index_merge.merge(
    path,
    parts,
    META,
    (SHAPE.exemplars, SHAPE.texts),
    world.duplicate_S,
    VOCAB,
    SHAPE.spread,
    memory_mb,
  )
  return LatentIndex.open(path)


def rounded(values) -> np.ndarray:
  """float32 whose fraction has 8 bits, ties to even."""
  fraction, exponent = np.frexp(np.asarray(values, np.float64))
  return np.ldexp(np.rint(fraction * 512) / 512, exponent).astype(np.float32)


def pooled(world: World, s: int) -> np.ndarray:
  """Mean over the base view, [M]; zero without image."""
  acts = world.dense(s)[world.first_rows_of(s, Kind.BASE)].astype(np.float64)
  return (acts.sum(0) / max(len(acts), 1)).astype(np.float32)
