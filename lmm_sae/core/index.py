"""Reads what fires a latent: counts, postings, exemplars, contexts.

The folder index/<layer>/<split>/ answers two questions without a pass over the
activations: which samples fire this latent (latent-major postings), and which
latents does this sample fire (the same pairs, sample-major). Files are plain
.npy arrays, mapped and not loaded, so both cost milliseconds whatever the size.

    index = LatentIndex.open(workdir.index(layer, 'b'))
    for exemplar in index.exemplars(17):
      exemplar.sample, exemplar.strength, exemplar.heat_HW

A firing is an activation of at least `threshold` (the paper's 1e-5) after TopK.
BOS fires what no image and no text means, so it is in `fired_bos` alone.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib

import numpy as np

from lmm_sae.core import index_values

FORMAT_VERSION = 2
VIEWS = ('base', 'tile', 'text')

RULE = (
  'always_on: min(images that the latent fires on, exp(entropy of its pooled '
  'mean over images)) / images, at the lower end of its 95% Wilson interval, '
  'is above `always_on`: it fires on most images, and about equally'
)


@dataclasses.dataclass(frozen=True)
class ImageExemplar:
  """An image that fires a latent.

  Attributes:
    sample: of acts/<split>.
    strength: mean activation over the base view's tokens, > 0.
    heat_HW: float32 activation on the base view's grid; 0 where it is silent.
    tiles_HW: the same on the grid of the AnyRes tiles; None without tiles.
    quantile: the place of its strength among all images that fire the latent,
      0 to 1; NaN for the strongest ones.
  """

  sample: int
  strength: float
  heat_HW: np.ndarray
  tiles_HW: np.ndarray | None
  quantile: float = math.nan


@dataclasses.dataclass(frozen=True)
class TextExemplar:
  """A text token that fires a latent, amid its neighbours.

  Attributes:
    sample, position: the token that fires, in acts/<split>.
    strength: its activation.
    tokens: the text around it, token by token; image tokens are left out.
    acts: the latent's activation on each of them.
    at: which of them is the token that fires.
    quantile: the place of its strength among the texts drawn for this latent,
      0 to 1; NaN for the strongest ones.
  """

  sample: int
  position: int
  strength: float
  tokens: list[str]
  acts: list[float]
  at: int
  quantile: float = math.nan


@dataclasses.dataclass(frozen=True)
class IndexMeta:
  """What an index was made of; the file meta.json, written last.

  Attributes:
    latents: M; samples: one above the highest sample of the split, S; images:
      samples with a base view.
    grid: (rows, cols) of the base view.
    rows: rows encoded, BOS included; firings: of all of them, every kind.
    threshold, always_on: as configured; rule: what `always_on` means.
    source: what it was made from (store, SAE); another source, another index.
    levels: of stats['quantiles'].
  """

  layer: int
  split: str
  latents: int
  k: int
  samples: int
  images: int
  grid: tuple[int, int]
  rows: int
  firings: int
  threshold: float
  always_on: float
  source: str
  rule: str = RULE
  levels: tuple[float, ...] = ()
  format_version: int = FORMAT_VERSION


class LatentIndex:
  """An index on disk, read only.

  Attributes:
    meta: what it was made of.
    stats: arrays [M]: rows_fired, samples_fired (any token but BOS),
      images_fired (base view), fired_<kind> for each token kind, peak and mean
      (over firing rows; BOS out), peak_base, peak_image (base view, tiles and
      newlines), dead (fires on nothing but perhaps BOS), always_on (meta.rule);
      and quantiles [M, Q] at meta.levels, over firing rows, BOS out, each
      within index_values.ERROR of the exact one.
    duplicate_S: the first sample whose image is nearly this one's; itself where
      there is none. Of such images only the strongest is an exemplar.
  """

  def __init__(self, path: pathlib.Path, meta: IndexMeta):
    self.path = path
    self.meta = meta
    with np.load(path / 'stats.npz') as stats:
      self.stats = {name: stats[name] for name in stats.files}
    self.duplicate_S = self._array('duplicate')

  @classmethod
  def open(cls, path: str | os.PathLike) -> 'LatentIndex':
    """Opens a finished index.

    Raises:
      ValueError: there is none, or its format is another one.
    """
    path = pathlib.Path(path)
    meta = read_meta(path)
    if meta is None:
      raise ValueError(
        f'{path} holds no finished index: run `lmm-sae index` with this '
        'workdir first'
      )
    return cls(path, meta)

  @property
  def num_latents(self) -> int:
    return self.meta.latents

  @property
  def num_samples(self) -> int:
    return self.meta.samples

  def postings(
    self, latent: int, view: str = 'base'
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The samples that fire a latent: (sample_S, mean_S, max_S, count_S).

    In order of sample. Mean and max are over all tokens of that view of the
    sample (base, tile: of its first image; text: all but BOS), count is of
    those that fire. Mean and max are rounded to 1 part in 512.

    Raises:
      ValueError: no such latent or view.
    """
    if view not in VIEWS:
      raise ValueError(f'view {view!r} is none of {", ".join(VIEWS)}')
    part = self._range(
      f'postings_{view}_offset', latent, self.num_latents, 'latent'
    )
    sample, mean, most, count = (
      self._array(f'postings_{view}_{name}')[part]
      for name in ('sample', 'mean', 'max', 'count')
    )
    return (
      sample.astype(np.int32),
      index_values.unpack(mean),
      index_values.unpack(most),
      count.astype(np.int32),
    )

  def sample(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """The latents that a sample's base view fires: (latent_M, mean_M).

    In order of latent; the mean is rounded as in `postings`.
    """
    part = self._range('samples_offset', sample, self.num_samples, 'sample')
    return (
      self._array('samples_latent')[part].astype(np.int32),
      index_values.unpack(self._array('samples_mean')[part]),
    )

  def exemplars(self, latent: int) -> list[ImageExemplar]:
    """The images that fire a latent most, strongest first; none is silent."""
    part = self._range('exemplars_offset', latent, self.num_latents, 'latent')
    return [self._exemplar(i) for i in range(part.start, part.stop)]

  def spread(self, latent: int) -> list[ImageExemplar]:
    """Images drawn by seed over the quantiles of their strength, weakest first.

    See `index_tables`; of near-duplicates one at most.
    """
    part = self._range('spread_offset', latent, self.num_latents, 'latent')
    where = range(part.start, part.stop)
    return [self._exemplar(i, 'spread', 'spread_') for i in where]

  def texts(self, latent: int) -> list[TextExemplar]:
    """The text tokens that fire a latent most, strongest first.

    No two with the same text up to and including the token.
    """
    part = self._range('texts_offset', latent, self.num_latents, 'latent')
    return [self._text(i) for i in range(part.start, part.stop)]

  def text_spread(self, latent: int) -> list[TextExemplar]:
    """Text tokens drawn by seed over the quantiles of activation."""
    part = self._range('text_spread_offset', latent, self.num_latents, 'latent')
    where = range(part.start, part.stop)
    return [self._text(i, 'text_spread', 'spread_') for i in where]

  def silent(
    self, latent: int, count: int, rng: np.random.Generator
  ) -> list[int]:
    """At most `count` samples whose image does not fire a latent at all.

    Neither its base view nor its tiles do, nor those of a near-duplicate; text
    does not count. No two of them are near-duplicates.
    """
    fires = np.concatenate(
      [self.postings(latent, view)[0] for view in ('base', 'tile')]
    )
    images = np.asarray(self._array('images'))
    lit = np.isin(self.duplicate_S[images], self.duplicate_S[fires])
    images = images[~lit]
    _, first = np.unique(self.duplicate_S[images], return_index=True)
    images = images[np.sort(first)]
    chosen = rng.choice(images, min(count, len(images)), replace=False)
    return [int(sample) for sample in chosen]

  def _exemplar(
    self, i: int, table: str = 'exemplars', lists: str = ''
  ) -> ImageExemplar:
    rows, cols = (int(n) for n in self._array(f'{table}_tiles')[i])
    tiles = (rows, cols)
    return ImageExemplar(
      sample=int(self._array(f'{table}_sample')[i]),
      strength=float(self._array(f'{table}_strength')[i]),
      heat_HW=self._dense(f'{lists}heat', i, self.meta.grid),
      tiles_HW=self._dense(f'{lists}tile', i, tiles) if rows * cols else None,
      quantile=float(self._array(f'{table}_quantile')[i]),
    )

  def _dense(self, name: str, i: int, grid: tuple[int, int]) -> np.ndarray:
    start, stop = self._array(f'{name}_offset')[i : i + 2]
    heat_P = np.zeros(grid[0] * grid[1], np.float32)
    cells = self._array(f'{name}_cell')[start:stop]
    heat_P[cells] = self._array(f'{name}_value')[start:stop]
    return heat_P.reshape(grid)

  def _text(
    self, i: int, table: str = 'texts', lists: str = ''
  ) -> TextExemplar:
    start, stop = self._array(f'{lists}context_offset')[i : i + 2]
    ids = self._array(f'{lists}context_token')[start:stop]
    acts = self._array(f'{lists}context_act')[start:stop]
    return TextExemplar(
      sample=int(self._array(f'{table}_sample')[i]),
      position=int(self._array(f'{table}_position')[i]),
      strength=float(self._array(f'{table}_strength')[i]),
      tokens=[self._vocab[str(token)] for token in ids],
      acts=[float(v) for v in acts],
      at=int(self._array(f'{table}_at')[i]),
      quantile=float(self._array(f'{table}_quantile')[i]),
    )

  def _range(self, name: str, i: int, stop: int, what: str) -> slice:
    if not 0 <= i < stop:
      raise ValueError(f'{what} {i} is not in this index: 0 to {stop - 1} are')
    start, stop = self._array(name)[i : i + 2]
    return slice(int(start), int(stop))

  @functools.cached_property
  def _vocab(self) -> dict[str, str]:
    return json.loads((self.path / 'vocab.json').read_text())

  @functools.cached_property
  def _arrays(self) -> dict[str, np.ndarray]:
    return {}

  def _array(self, name: str) -> np.ndarray:
    if name not in self._arrays:
      file = self.path / f'{name}.npy'
      mode = 'r' if file.stat().st_size > 1 << 20 else None  # empty: no map
      self._arrays[name] = np.load(file, mmap_mode=mode)
    return self._arrays[name]


def read_meta(path: pathlib.Path) -> IndexMeta | None:
  """The meta.json of an index; None where no finished index stands.

  Raises:
    ValueError: its format_version is another one than ours.
  """
  file = path / 'meta.json'
  if not file.exists():
    return None
  fields = json.loads(file.read_text())
  if fields.get('format_version') != FORMAT_VERSION:
    raise ValueError(
      f'{path} has index format {fields.get("format_version")}; this version '
      f'reads {FORMAT_VERSION}: delete that folder and make the index again'
    )
  for name in ('grid', 'levels'):
    fields[name] = tuple(fields[name])
  return IndexMeta(**fields)
