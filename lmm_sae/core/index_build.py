"""Builds an index: the codes of whole samples in, the files of an index out.

The samples are cut into parts. `Part.add` takes the codes of some samples,
`Part.save` writes a finished part, `merge` makes the index of all parts. A
part depends on its own samples only, and the merge on the parts in order: who
made which part, and how often the work was broken off, leaves no trace.

Memory: a part holds its postings and what it keeps of exemplars; the merge
holds what is kept of exemplars, and writes postings through mapped files.
"""

import dataclasses
import os
import pathlib

import numpy as np

from lmm_sae.core.ragged import Ragged, Strongest, Table
from lmm_sae.core.tokens import IMAGE, TEXT, Kind

KINDS = len(Kind) - 1  # padding is never stored


@dataclasses.dataclass(frozen=True)
class Shape:
  """What every part of one index has in common.

  Attributes:
    latents: M; grid: (rows, cols) of the base view.
    exemplars, texts: kept a latent; context: tokens on either side of a text.
    threshold: least activation that is a firing.
  """

  latents: int
  grid: tuple[int, int]
  exemplars: int
  texts: int
  context: int
  threshold: float

  def __post_init__(self):
    for name in ('exemplars', 'texts'):
      if getattr(self, name) < 1:
        raise ValueError(f'index: {name} must be at least 1 a latent')
    if self.context < 0:
      raise ValueError(f'index: context {self.context} is negative')
    if not self.threshold > 0:
      raise ValueError(f'index: threshold {self.threshold} is not above 0')


@dataclasses.dataclass(frozen=True)
class Firings:
  """Every firing of some rows, one entry each: which row, latent and value."""

  row: np.ndarray
  latent: np.ndarray
  value: np.ndarray

  def take(self, chosen: np.ndarray) -> 'Firings':
    return Firings(self.row[chosen], self.latent[chosen], self.value[chosen])


class Part:
  """The index of some samples, in the making.

  `duplicate_S` names for each sample the first image that its own nearly is;
  nearly equal images count as one exemplar, the one that fires most.
  """

  def __init__(self, shape: Shape, duplicate_S: np.ndarray):
    self.shape = shape
    self._duplicate_S = duplicate_S
    latents = shape.latents
    self._fired_KM = np.zeros((KINDS, latents), np.int64)
    self._sum_M = np.zeros(latents, np.float64)
    self._samples_M = np.zeros(latents, np.int64)
    self._peaks = {
      name: np.zeros(latents, np.float32)
      for name in ('peak', 'peak_base', 'peak_image')
    }
    self._rows = self._images = self._first = 0
    self._postings: list[dict[str, np.ndarray]] = []
    self._exemplars = Strongest(latents, shape.exemplars)
    self._texts = Strongest(latents, shape.texts)

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

  def save(self, path: pathlib.Path) -> None:
    """Writes the part as a whole or not at all."""
    flat = {
      'fired': self._fired_KM,
      'sum': self._sum_M,
      'samples': self._samples_M,
      'rows': np.int64(self._rows),
      'images': np.int64(self._images),
      'first': np.int64(self._first),  # firings on first images' base views
      **self._peaks,
    }
    for name in self._postings[0] if self._postings else ():
      flat[f'postings.{name}'] = np.concatenate(
        [posting[name] for posting in self._postings]
      )
    for name, top in (('images', self._exemplars), ('texts', self._texts)):
      table = top.table()
      if table is not None:
        flat |= {f'{name}.{k}': array for k, array in table.arrays().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix('.unfinished')
    with unfinished.open('wb') as file:
      np.savez(file, **flat)
      file.flush()
      os.fsync(file.fileno())
    unfinished.replace(path)

  def _count(self, tokens: dict[str, np.ndarray], fired: Firings) -> None:
    latents = self.shape.latents
    kind = tokens['kind'][fired.row]
    self._fired_KM += np.bincount(
      kind * latents + fired.latent, minlength=KINDS * latents
    ).reshape(KINDS, latents)
    meant = fired.take(kind != Kind.BOS)
    self._sum_M += np.bincount(
      meant.latent, weights=meant.value, minlength=latents
    )
    pairs = np.unique(tokens['sample'][meant.row] * latents + meant.latent)
    self._samples_M += np.bincount(pairs % latents, minlength=latents)
    for name, kinds in (
      ('peak', TEXT + IMAGE),
      ('peak_base', (Kind.BASE,)),
      ('peak_image', IMAGE),
    ):
      some = fired.take(np.isin(kind, kinds))
      np.maximum.at(self._peaks[name], some.latent, some.value)

  def _add_images(self, tokens: dict[str, np.ndarray], fired: Firings) -> None:
    """Postings and exemplars: the base view, pooled; tiles beside it.

    Of a sample's first image: a map is of one picture.
    """
    latents = self.shape.latents
    other = tokens['image'] > 0
    tokens = tokens | {'kind': np.where(other, Kind.PADDING, tokens['kind'])}
    self._first += int((tokens['kind'][fired.row] == Kind.BASE).sum())
    kind, sample = tokens['kind'], tokens['sample']
    images, sizes = np.unique(sample[kind == Kind.BASE], return_counts=True)
    self._images += len(images)
    grids = _tile_grids(tokens)
    cell = tokens['row'] * self.shape.grid[1] + tokens['col']
    base = _pool(tokens, fired, cell, Kind.BASE, latents)
    if not len(base.pair):
      return
    columns = {'sample': base.pair // latents, 'latent': base.pair % latents}
    size = sizes[np.searchsorted(images, columns['sample'])]
    columns['strength'] = (base.total / size).astype(np.float32)
    self._postings.append(
      {
        'sample': columns['sample'].astype(np.int32),
        'latent': columns['latent'].astype(np.int32),
        'mean': columns['strength'],
        'max': base.most,
        'count': base.count.astype(np.int32),
      }
    )
    columns['key'] = self._duplicate_S[columns['sample']]
    columns['order'] = columns['sample']
    columns['tiles'] = grids[columns['sample'] - sample.min()]
    rows = self._exemplars.worth(columns)
    width = grids[sample - sample.min(), 1]
    cell = tokens['row'] * width + tokens['col']
    tile = _pool(tokens, fired, cell, Kind.TILE, latents)
    self._exemplars.add(
      Table(
        {name: column[rows] for name, column in columns.items()},
        {
          'heat': base.lists(base.pair[rows]),
          'tile': tile.lists(base.pair[rows]),
        },
      )
    )

  def _add_texts(self, tokens: dict[str, np.ndarray], fired: Firings) -> None:
    """Text exemplars, each with the text tokens around it."""
    latents, reach = self.shape.latents, self.shape.context
    is_text = np.isin(tokens['kind'], TEXT)
    at = np.cumsum(is_text) - 1  # place of a row among the text rows
    text = {name: field[is_text] for name, field in tokens.items()}
    some = fired.take(is_text[fired.row])
    place = at[some.row]
    if not len(place):
      return
    begin = np.searchsorted(text['sample'], text['sample'])
    end = np.searchsorted(text['sample'], text['sample'], side='right')
    columns = {
      'latent': some.latent,
      'strength': some.value,
      'key': _context_keys(text['token'], begin, reach)[place],
      'order': (text['sample'][place] << 32) + text['position'][place],
      'sample': text['sample'][place],
      'position': text['position'][place],
    }
    rows = self._texts.worth(columns)
    columns = {name: column[rows] for name, column in columns.items()}
    place = place[rows]
    start = np.maximum(place - reach, begin[place])
    count = np.minimum(place + reach + 1, end[place]) - start
    columns['at'] = place - start
    around = Ragged.cut(
      {'place': np.arange(len(text['token'])), 'token': text['token']},
      start,
      count,
    )
    wanted = np.repeat(columns['latent'], count)
    acts = _look_up(
      at[some.row] * latents + some.latent,
      some.value,
      around.columns['place'] * latents + wanted,
    )
    context = Ragged(
      around.offset,
      {'token': around.columns['token'].astype(np.int32), 'act': acts},
    )
    self._texts.add(Table(columns, {'context': context}))


@dataclasses.dataclass(frozen=True)
class Pooled:
  """The firings of one token kind, pooled by sample and latent.

  `pair` = sample * M + latent, rising; total, most and count are over its
  firings, which stand in `cells` from `start`.
  """

  pair: np.ndarray
  start: np.ndarray
  count: np.ndarray
  total: np.ndarray
  most: np.ndarray
  cells: dict[str, np.ndarray]

  def lists(self, wanted: np.ndarray) -> Ragged:
    """{cell, value} of each wanted pair; no list where it does not fire."""
    if not len(self.pair):
      nowhere = np.zeros(len(wanted), np.int64)
      return Ragged.cut(self.cells, nowhere, nowhere)
    place = np.minimum(np.searchsorted(self.pair, wanted), len(self.pair) - 1)
    count = np.where(self.pair[place] == wanted, self.count[place], 0)
    return Ragged.cut(self.cells, self.start[place], count)


def _pool(
  tokens: dict[str, np.ndarray],
  fired: Firings,
  cell: np.ndarray,
  kind: Kind,
  latents: int,
) -> Pooled:
  some = fired.take(tokens['kind'][fired.row] == kind)
  pair = tokens['sample'][some.row] * latents + some.latent
  order = np.lexsort((cell[some.row], pair))
  pair, value = pair[order], some.value[order]
  start = np.flatnonzero(np.diff(pair, prepend=-1))
  cells = {'cell': cell[some.row][order].astype(np.int32), 'value': value}
  if not len(pair):
    empty = np.zeros(0, np.int64)
    return Pooled(empty, empty, empty, empty, empty, cells)
  return Pooled(
    pair[start],
    start,
    np.diff(start, append=len(pair)),
    np.add.reduceat(value.astype(np.float64), start),
    np.maximum.reduceat(value, start),
    cells,
  )


def _tile_grids(tokens: dict[str, np.ndarray]) -> np.ndarray:
  """(rows, cols) of the tiles' grid, [S, 2] from the lowest sample on."""
  sample, tile = tokens['sample'], tokens['kind'] == Kind.TILE
  low = sample.min()
  grids = np.zeros((sample.max() - low + 1, 2), np.int32)
  for axis, name in enumerate(('row', 'col')):
    np.maximum.at(
      grids[:, axis],
      sample[tile] - low,
      tokens[name][tile].astype(np.int32) + 1,
    )
  return grids


def _context_keys(
  token_T: np.ndarray, begin_T: np.ndarray, reach: int
) -> np.ndarray:
  """A 64-bit hash of each token and up to `reach` tokens before it."""
  place = np.arange(len(token_T))
  key = np.zeros(len(token_T), np.uint64)
  for back in range(reach, -1, -1):
    before = place - back
    inside = before >= begin_T
    token = np.where(inside, token_T[np.maximum(before, 0)] + 1, 0)
    key = (key ^ token.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    key ^= key >> np.uint64(29)
  return key.view(np.int64)


def _look_up(
  keys: np.ndarray, values: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
  """The value of each wanted key, 0 where it is not among the keys."""
  order = np.argsort(keys)
  place = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
  found = keys[order[place]] == wanted
  return np.where(found, values[order[place]], 0).astype(np.float32)
