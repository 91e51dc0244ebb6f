"""Builds the parts of an index: the codes of whole samples in, a folder out.

The samples are cut into parts. `Part.add` takes the codes of some samples,
`Part.save` writes a finished part, `index_merge.merge` makes the index of all
parts. A part depends on its own samples only, and the merge on the parts in
order: who made which part, and how often the work was broken off, leaves no
trace. What other parts keep may be told to a part (`floors`): it then leaves
out exemplars that they outdo, which the merge would throw away.

Memory: a part adds up its statistics, LATENT_BYTES a latent. Its postings,
histograms and exemplars go to disk as a run once they hold more than they may;
runs are of whole samples, in order; where they end leaves no trace either.
"""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np

from lmm_sae.core import index_values
from lmm_sae.core.index_pool import (
  Firings,
  Pooled,
  context_keys,
  look_up,
  pool,
  tile_grids,
)
from lmm_sae.core.ragged import Ragged, Strongest, Table
from lmm_sae.core.tokens import IMAGE, TEXT, Kind

KINDS = len(Kind) - 1  # padding is never stored
VIEWS = {'base': (Kind.BASE,), 'tile': (Kind.TILE,), 'text': TEXT}
DRAWN = 4  # candidates a latent for each exemplar of the seeded sample
MOST = (1 << 16) - 1  # tokens of one view that a posting can count
LATENT_BYTES = 400


@dataclasses.dataclass(frozen=True)
class Shape:
  """What every part of one index has in common.

  Attributes:
    latents: M; grid: (rows, cols) of the base view.
    exemplars, texts: kept a latent; context: tokens on either side of a text.
    threshold: least activation that is a firing.
    spread: exemplars a latent drawn over its quantiles, by `seed`.
  """

  latents: int
  grid: tuple[int, int]
  exemplars: int
  texts: int
  context: int
  threshold: float
  spread: int = 10
  seed: int = 0

  def __post_init__(self):
    for name in ('exemplars', 'texts', 'spread'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'index: {name} is {getattr(self, name)}; it must be at least 1 a '
          'latent'
        )
    if self.context < 0:
      raise ValueError(f'index: context {self.context} is negative')
    if not self.threshold > 0:
      raise ValueError(f'index: threshold {self.threshold} is not above 0')

  def keeps(self) -> dict[str, int]:
    """Rows a latent that a part keeps of each of its tables."""
    return {
      'images': self.exemplars,
      'drawn': DRAWN * self.spread,
      'texts': self.texts,
      'text_drawn': DRAWN * self.spread,
    }


class Part:
  """The index of some samples, in the making.

  `duplicate_S` names for each sample the first image that its own nearly is;
  nearly equal images count as one exemplar, the one that fires most.
  """

  def __init__(
    self,
    shape: Shape,
    duplicate_S: np.ndarray,
    floors: dict[str, np.ndarray] | None = None,
    path: pathlib.Path | None = None,
    most: int = 0,
  ):
    """A part that holds nothing yet.

    Args:
      floors: [M] by table: below them other parts keep their full number.
      path: where it will be saved; with it, what exceeds `most` bytes is
        written there as a run. Without it, all is held until `save`.
    """
    self.shape = shape
    self._duplicate_S = duplicate_S
    few = len(duplicate_S) <= 1 << 16
    self._sample_dtype = np.uint16 if few else np.int32
    latents = shape.latents
    self._fired_KM = np.zeros((KINDS, latents), np.int64)
    self._sum_M = np.zeros(latents, np.float64)
    self._samples_M = np.zeros(latents, np.int64)
    self._peaks = {
      name: np.zeros(latents, np.float32)
      for name in ('peak', 'peak_base', 'peak_image')
    }
    self._counted = {name: np.zeros(latents, np.int64) for name in VIEWS}
    self._rows = 0
    self._images: list[np.ndarray] = []
    self._floors = dict(floors or {})
    self._path, self._most, self._runs = path, most, 0
    self._begin()

  def _begin(self) -> None:
    """Begins a run: nothing is held, what the others keep is known."""
    latents = self.shape.latents
    self._histograms = index_values.Histograms()
    self._postings = {name: [] for name in VIEWS}
    self._tables = {
      name: Strongest(latents, keep, self._floors.get(name))
      for name, keep in self.shape.keeps().items()
    }

  def add(
    self, tokens: dict[str, np.ndarray], vals_NK: np.ndarray, idx_NK: np.ndarray
  ) -> None:
    """Adds the rows of whole samples, in order, none added before.

    Args:
      tokens: the store's fields sample, position, token, kind, image, row and
        col, [N].
      vals_NK, idx_NK: the code of each row.
    """
    tokens = {name: field.astype(np.int64) for name, field in tokens.items()}
    row, slot = np.nonzero(vals_NK >= self.shape.threshold)
    fired = Firings(
      row,
      idx_NK[row, slot].astype(np.int64),
      vals_NK[row, slot].astype(np.float32),
    )
    self._rows += len(vals_NK)
    self._count(tokens, fired)
    self._add_images(tokens, fired)
    self._add_texts(tokens, fired)
    if self._path is not None and self._held() > self._most:
      self._write_run(self._path)

  def save(self, path: pathlib.Path) -> None:
    """Writes the part as a whole or not at all."""
    self._write_run(path)
    unfinished = _unfinished(path)
    flat = {
      'fired': self._fired_KM,
      'sum': self._sum_M,
      'samples': self._samples_M,
      'rows': np.array(self._rows),
      'images': np.concatenate([np.zeros(0, np.int64), *self._images]),
      **self._peaks,
      **{f'counted.{view}': each for view, each in self._counted.items()},
      **{f'floor.{name}': each for name, each in self._floors.items()},
    }
    for name in flat:
      _write(unfinished, name, flat[name])
    try:
      unfinished.rename(path)
    except OSError:
      if not path.is_dir():
        raise
      shutil.rmtree(unfinished)  # another command was faster

  def _held(self) -> int:
    """Bytes of what a run would write."""
    postings = sum(
      array.nbytes
      for view in self._postings.values()
      for posting in view
      for array in posting.values()
    )
    tables = sum(table.nbytes for table in self._tables.values())
    return postings + tables + self._histograms.nbytes

  def _write_run(self, path: pathlib.Path) -> None:
    unfinished = _unfinished(path)
    if not self._runs:
      shutil.rmtree(unfinished, ignore_errors=True)
    (run := unfinished / f'run{self._runs:05d}').mkdir(parents=True)
    self._runs += 1
    histograms = self._histograms.settle()
    # Of 131,072 latents, keys and counts are a sixth of a run as int64.
    few = self.shape.latents * index_values.BINS <= 1 << 32
    key_dtype = np.uint32 if few else np.int64
    _write(run, 'histogram.key', histograms.key.astype(key_dtype))
    _write(run, 'histogram.count', histograms.count.astype(np.uint32))
    for view in VIEWS:
      for name, array in self._by_latent(view).items():
        _write(run, f'{view}.{name}', array)
    for name, strongest in self._tables.items():
      self._floors[name] = np.maximum(
        strongest.floor_M, self._floors.get(name, 0)
      )
      table = strongest.table()
      if table is not None:
        counts = np.bincount(
          table.columns['latent'], minlength=self.shape.latents
        )
        _write(run, f'{name}.counts', counts.astype(np.uint32))
        for key, array in table.arrays().items():
          _write(run, f'{name}.{key}', array)
    self._begin()

  def _by_latent(self, view: str) -> dict[str, np.ndarray]:
    """The postings of a view, in order of latent and then of sample."""
    fields = ('latent', 'sample', 'mean', 'max', 'count')
    postings = self._postings.pop(view)
    flat = {
      name: np.concatenate(
        [np.zeros(0, np.uint16), *(posting[name] for posting in postings)]
      )
      for name in fields
    }
    latent = flat.pop('latent')
    order = np.argsort(latent, kind='stable')
    counts = np.bincount(latent, minlength=self.shape.latents)
    counts = counts.astype(np.uint32)
    sorted_ = {name: array[order] for name, array in flat.items()}
    return {'counts': counts} | sorted_

  def _count(self, tokens: dict[str, np.ndarray], fired: Firings) -> None:
    latents = self.shape.latents
    kind = tokens['kind'][fired.row]
    self._fired_KM += np.bincount(
      kind * latents + fired.latent, minlength=KINDS * latents
    ).reshape(KINDS, latents)
    meant = fired.take(kind != Kind.BOS)
    self._histograms.add(meant.latent, meant.value)
    self._sum_M += np.bincount(
      meant.latent, weights=meant.value, minlength=latents
    )
    pairs = np.sort(tokens['sample'][meant.row] * latents + meant.latent)
    new = np.diff(pairs, prepend=-1) != 0
    self._samples_M += np.bincount(pairs[new] % latents, minlength=latents)
    for name, kinds in (
      ('peak', TEXT + IMAGE),
      ('peak_base', (Kind.BASE,)),
      ('peak_image', IMAGE),
    ):
      some = fired.take(np.isin(kind, kinds))
      np.maximum.at(self._peaks[name], some.latent, some.value)
    other = np.isin(kind, IMAGE) & (tokens['image'][fired.row] > 0)
    for name, kinds in VIEWS.items():
      self._counted[name] += np.bincount(
        fired.latent[np.isin(kind, kinds) & ~other], minlength=latents
      )

  def _post(
    self, view: str, tokens: dict[str, np.ndarray], pooled: Pooled
  ) -> np.ndarray:
    """Adds the postings of a view; returns their mean, float32."""
    here = tokens['sample'][np.isin(tokens['kind'], VIEWS[view])]
    samples, sizes = np.unique(here, return_counts=True)
    if not len(pooled.pair):
      return np.zeros(0, np.float32)
    if sizes.max() > MOST:
      raise ValueError(
        f'sample {samples[sizes.argmax()]} has {sizes.max()} tokens of its '
        f'{view} view; a posting counts up to {MOST}'
      )
    sample = pooled.pair // self.shape.latents
    size = sizes[np.searchsorted(samples, sample)]
    mean = (pooled.total / size).astype(np.float32)
    self._postings[view].append(
      {
        'latent': (pooled.pair % self.shape.latents).astype(np.int32),
        'sample': sample.astype(self._sample_dtype),
        'mean': index_values.pack(mean),
        'max': index_values.pack(pooled.most),
        'count': pooled.count.astype(np.uint16),
      }
    )
    return mean

  def _add_images(self, tokens: dict[str, np.ndarray], fired: Firings) -> None:
    """Postings and exemplars: the base view, pooled; tiles beside it.

    Of a sample's first image: a map is of one picture.
    """
    latents = self.shape.latents
    other = tokens['image'] > 0
    tokens = tokens | {'kind': np.where(other, Kind.PADDING, tokens['kind'])}
    kind, sample = tokens['kind'], tokens['sample']
    self._images.append(np.unique(sample[kind == Kind.BASE]))
    grids = tile_grids(tokens)
    cell = tokens['row'] * self.shape.grid[1] + tokens['col']
    base = pool(tokens, fired, cell, VIEWS['base'], latents)
    width = grids[sample - sample.min(), 1]
    cell = tokens['row'] * width + tokens['col']
    tile = pool(tokens, fired, cell, VIEWS['tile'], latents)
    self._post('tile', tokens, tile)
    mean = self._post('base', tokens, base)
    if not len(base.pair):
      return
    columns = {
      'sample': base.pair // latents,
      'latent': base.pair % latents,
      'value': mean,
    }
    columns['key'] = self._duplicate_S[columns['sample']]
    columns['order'] = columns['sample']
    columns = {
      name: column if name == 'value' else column.astype(np.int32)
      for name, column in columns.items()
    }
    columns['tiles'] = grids[columns['sample'] - sample.min()]
    for name in ('images', 'drawn'):
      columns['strength'] = self._strength(name, columns)
      rows = self._tables[name].worth(columns)
      lists = {
        'heat': base.lists(base.pair[rows]),
        'tile': tile.lists(base.pair[rows]),
      }
      kept = {name: column[rows] for name, column in columns.items()}
      self._tables[name].add(Table(kept, lists))

  def _strength(self, name: str, columns: dict[str, np.ndarray]) -> np.ndarray:
    """What a table keeps most of: what fires most, or what the seed draws."""
    if name.endswith('drawn'):
      return index_values.draws(
        self.shape.seed, columns['latent'], columns['key']
      )
    return columns['value'].astype(np.float64)

  def _add_texts(self, tokens: dict[str, np.ndarray], fired: Firings) -> None:
    """Postings of the text, and its exemplars with the text around them."""
    latents, reach = self.shape.latents, self.shape.context
    is_text = np.isin(tokens['kind'], TEXT)
    at = np.cumsum(is_text) - 1  # place of a row among the text rows
    self._post('text', tokens, pool(tokens, fired, at, TEXT, latents))
    text = {name: field[is_text] for name, field in tokens.items()}
    some = fired.take(is_text[fired.row])
    place = at[some.row]
    if not len(place):
      return
    begin = np.searchsorted(text['sample'], text['sample'])
    end = np.searchsorted(text['sample'], text['sample'], side='right')
    columns = {
      'latent': some.latent,
      'value': some.value,
      'key': context_keys(text['token'], begin, reach)[place],
      'order': (text['sample'][place] << 32) + text['position'][place],
      'sample': text['sample'][place],
      'position': text['position'][place],
      'place': place,
    }
    acts = at[some.row] * latents + some.latent, some.value
    for name in ('texts', 'text_drawn'):
      columns['strength'] = self._strength(name, columns)
      rows = self._tables[name].worth(columns)
      kept = {name: column[rows] for name, column in columns.items()}
      place = kept.pop('place')
      start = np.maximum(place - reach, begin[place])
      count = np.minimum(place + reach + 1, end[place]) - start
      kept['at'] = place - start
      around = Ragged.cut(
        {'place': np.arange(len(text['token'])), 'token': text['token']},
        start,
        count,
      )
      wanted = np.repeat(kept['latent'], count)
      context = {
        'token': around.columns['token'].astype(np.int32),
        'act': look_up(*acts, around.columns['place'] * latents + wanted),
      }
      self._tables[name].add(
        Table(kept, {'context': Ragged(around.offset, context)})
      )


def runs(parts: Sequence[pathlib.Path]) -> list[pathlib.Path]:
  """The runs of some parts, in order of their samples."""
  return [run for part in parts for run in sorted(part.glob('run*'))]


def _unfinished(path: pathlib.Path) -> pathlib.Path:
  """By process: two commands may make one part; both make the same."""
  return path.with_name(f'{path.name}.{os.getpid()}.unfinished')


def _write(folder: pathlib.Path, name: str, array: np.ndarray) -> None:
  with (folder / f'{name}.npy').open('wb') as file:
    np.save(file, array)
    file.flush()
    os.fsync(file.fileno())
