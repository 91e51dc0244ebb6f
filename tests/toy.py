"""A toy run whose every activation, mask and label is known by hand.

Pictures of 16 x 16 px on a 4 x 4 grid hold a red and a blue rectangle of whole
patches; some are striped. The residual IS the activations (the SAE is the
identity on its first M channels), so that what a latent means is set here:

  0 red, where it is         3 the word `red` in the question
  1 blue, and faintly red    4 every token, always alike
  2 every second patch of a  5 striped
    lonely box's background  6 nothing
"""

import dataclasses
import pathlib

import ml_dtypes
import numpy as np
from PIL import Image

from lmm_sae.core import records
from lmm_sae.core.store import ActivationStore, StoreMeta
from lmm_sae.core.tokens import Kind
from lmm_sae.core.workdir import Workdir

LAYER, M, D, K, GRID, PATCH = 2, 7, 9, 4, (4, 4), 4
VOCAB = ['<s>', 'USER:', '<image>', ' is', ' the', ' red', '?', ' yes']
RED, BLUE, STRIPED, BACKGROUND = 'red', 'blue', 'striped', 'background'
COLOURS = {RED: (220, 30, 30), BLUE: (30, 30, 220)}


@dataclasses.dataclass(frozen=True)
class Box:
  """A rectangle of patches: rows and columns from (r0, c0) up to (r1, c1)."""

  colour: str
  r0: int
  c0: int
  r1: int
  c1: int
  striped: bool = False


def boxes(seed: int) -> tuple[Box, ...]:
  """A red box on the left, a blue one on the right; one of them is missing
  from two pictures in three."""
  rng = np.random.default_rng(seed)
  made = []
  for colour, left in ((RED, 0), (BLUE, 2)):
    r0, height = rng.integers(0, 2), rng.integers(1, 4)
    width = rng.integers(1, 3)
    made.append(
      Box(
        colour, r0, left, min(r0 + height, 4), left + width, rng.random() < 0.5
      )
    )
  return tuple(made) if seed % 3 == 2 else (made[seed % 3],)


def picture(
  things: tuple[Box, ...], seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Pixels and region ids of a picture."""
  rng = np.random.default_rng([1, seed])
  side = GRID[0] * PATCH
  pixels = np.full((side, side, 3), rng.integers(90, 170), np.uint8)
  regions = np.zeros((side, side), np.uint8)
  for i, box in enumerate(things):
    at = np.s_[box.r0 * PATCH : box.r1 * PATCH, box.c0 * PATCH : box.c1 * PATCH]
    pixels[at] = COLOURS[box.colour]
    if box.striped:
      pixels[at][::2] = 255
    regions[at] = i + 1
  return pixels, regions


def activations(things: tuple[Box, ...]) -> tuple[dict, np.ndarray]:
  """Token fields and activations [T, M] of a picture's sample."""
  grid = [(r, c) for r in range(GRID[0]) for c in range(GRID[1])]
  kinds = [Kind.BOS, Kind.TEMPLATE, *[Kind.BASE] * 16, *[Kind.TILE] * 16]
  kinds += [Kind.QUESTION] * 4 + [Kind.ANSWER]
  places = [(-1, -1)] * 2 + grid + grid + [(-1, -1)] * 5
  words = [0, 1] + [2] * 32 + [3, 4, 5, 6, 7]
  acts = np.zeros((len(kinds), M), np.float32)
  for t, (kind, (r, c)) in enumerate(zip(kinds, places, strict=True)):
    acts[t, 4] = 0.5
    if kind not in (Kind.BASE, Kind.TILE):
      acts[t, 3] = 3.0 * (words[t] == 5)
      continue
    inside = [
      box for box in things if box.r0 <= r < box.r1 and box.c0 <= c < box.c1
    ]
    for box in inside:
      acts[t, 0] = 2.0 * (box.colour == RED)
      acts[t, 1] = 4.0 if box.colour == BLUE else 0.25
      acts[t, 5] = 1.0 * box.striped
    if not inside and (r + c) % 2 and len(things) == 1:
      acts[t, 2] = 1.5
  row, col = np.array(places).T
  return {
    'position': np.arange(len(kinds)),
    'token': np.array(words),
    'kind': np.array([int(kind) for kind in kinds]),
    'row': row,
    'col': col,
    'image': np.zeros(len(kinds)),
    'box': np.zeros((len(kinds), 4)),
  }, acts


def make_store(
  path: pathlib.Path,
  split: str,
  seeds: range,
  truth: bool = True,
  group: int = 4,
) -> ActivationStore:
  """A complete store of the pictures of those seeds."""
  groups = -(-len(seeds) // group)
  meta = StoreMeta(
    split=split,
    model='toy',
    fingerprint='f00',
    layers=(LAYER,),
    layer_paths={str(LAYER): f'model.layers.{LAYER}'},
    width=D,
    grid=GRID,
    image_backend='pil',
  )
  rows = group * 40
  store = ActivationStore.create(path, meta, groups, rows, rows, 40)
  records.write_json(path / 'vocab.json', VOCAB)
  path = pathlib.Path(path)
  (path / 'images').mkdir(exist_ok=True)
  for g in range(groups):
    tokens, acts, samples = [], [], []
    for s in range(g * group, min((g + 1) * group, len(seeds))):
      things = boxes(seeds[s])
      pixels, regions = picture(things, seeds[s])
      name = f'images/{s:06d}'
      Image.fromarray(pixels).save(path / f'{name}.png')
      Image.fromarray(regions).save(path / f'{name}.regions.png')
      fields, acts_TM = activations(things)
      tokens.append({'sample': np.full(len(acts_TM), s), **fields})
      start = sum(len(a) for a in acts)
      acts.append(acts_TM)
      concepts = {'0': [BACKGROUND]}
      for i, box in enumerate(things):
        texture = [STRIPED] if box.striped else []
        concepts[str(i + 1)] = [box.colour, *texture]
      samples.append(
        records.Sample(
          sample=s,
          group=g,
          source=f'scene {seeds[s]}',
          image=f'{name}.png',
          width=16,
          height=16,
          prompt='USER:<image> is the red?',
          turns=(),
          start=start,
          stop=start + len(acts_TM),
          truth={'regions': f'{name}.regions.png', 'concepts': concepts}
          if truth
          else None,
        )
      )
    x_ND = np.zeros((sum(map(len, acts)), D), ml_dtypes.bfloat16)
    x_ND[:, :M] = np.concatenate(acts)
    store.write_group(
      g,
      {LAYER: x_ND},
      {k: np.concatenate([t[k] for t in tokens]) for k in tokens[0]},
      samples,
      [],
    )
  return store


def make_sae(path: pathlib.Path) -> None:
  """Exports the SAE that reads the activations off the residual."""
  from lmm_sae.sae import exports, model

  eye_MD = np.eye(M, D, dtype=np.float32)
  config = model.SaeConfig(layer=LAYER, width=D, latents=M, k=K)
  zero_M, zero_D = np.zeros(M, np.float32), np.zeros(D, np.float32)
  exports.write(
    exports.Sae(config, eye_MD, zero_M, eye_MD, zero_D, zero_M), path
  )


def make_workdir(root: pathlib.Path, samples: int = 12, **store):
  """A workdir whose capture and train are done: splits a and b, the SAE."""
  workdir = Workdir.of(root)
  make_store(workdir.acts('a'), 'a', range(samples), **store)
  make_store(workdir.acts('b'), 'b', range(samples, 2 * samples), **store)
  make_sae(workdir.export(LAYER))
  return workdir
