"""Merges what the parts keep of exemplars: the strongest, and a seeded sample.

The sample of a latent: of all that fires it, DRAWN * spread are drawn by hash
(of seed, latent and picture or text), sorted by strength and cut into `spread`
groups of about equal size; the one that the hash prefers stands for its group.
Where no more fire it than are drawn, the groups are its exact quantiles.
"""

import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lmm_sae.core import index_files as files
from lmm_sae.core import index_values
from lmm_sae.core.ragged import Ragged, Table, join, strongest

COPIES = 4  # of a row are held as its latent is merged
ROW_BYTES = 160  # of a row beside its lists
CELL_BYTES = 12


def spread_over(columns: dict[str, np.ndarray], groups: int) -> np.ndarray:
  """Rows: of each latent one from each group by value, weakest first.

  Also sets columns['quantile'] to the middle of each row's rank, 0 to 1.
  """
  latent = columns['latent']
  rows = np.lexsort((columns['order'], columns['value'], latent))
  _, start, n = np.unique(latent[rows], return_index=True, return_counts=True)
  rank = np.arange(len(rows)) - np.repeat(start, n)
  n = np.repeat(n, n)
  columns['quantile'] = np.zeros(len(rows), np.float32)
  columns['quantile'][rows] = (rank + 0.5) / n
  group = rank * np.minimum(groups, n) // n
  # The hash decides within a group; the first of each is taken.
  by = np.lexsort((-columns['strength'][rows], group, latent[rows]))
  new = np.ones(len(rows), bool)
  new[1:] = (np.diff(latent[rows][by]) != 0) | (np.diff(group[by]) != 0)
  return rows[by[new]]


class Writer:
  """Writes the tables of an index; `tokens`: ids that its contexts hold."""

  def __init__(
    self,
    path: pathlib.Path,
    runs: Sequence[pathlib.Path],
    latents: int,
    most: int,
  ):
    self.path = path
    self.runs = runs
    self.latents = latents
    self.most = most
    self.tokens: set[int] = set()

  def images(
    self, table: str, name: str, lists: str, keep: int, groups: int = 0
  ) -> None:
    """Writes a table of images as `name`_*, its maps as `lists`heat_* ..."""
    self._write(
      table,
      {
        f'{name}_sample': ('sample', 'i4', ()),
        f'{name}_strength': ('value', 'f4', ()),
        f'{name}_tiles': ('tiles', 'i4', (2,)),
        f'{name}_quantile': ('quantile', 'f4', ()),
      },
      {
        f'{lists}heat': ('heat', {'cell': 'i4', 'value': 'f4'}),
        f'{lists}tile': ('tile', {'cell': 'i4', 'value': 'f4'}),
      },
      f'{name}_offset',
      keep,
      groups,
      self._of_postings if groups else None,
    )

  def texts(
    self, table: str, name: str, lists: str, keep: int, groups: int = 0
  ) -> None:
    """Writes a table of texts as `name`_*, their contexts `lists`context_*."""
    self._write(
      table,
      {
        f'{name}_sample': ('sample', 'i4', ()),
        f'{name}_position': ('position', 'i4', ()),
        f'{name}_at': ('at', 'i4', ()),
        f'{name}_strength': ('value', 'f4', ()),
        f'{name}_quantile': ('quantile', 'f4', ()),
      },
      {f'{lists}context': ('context', {'token': 'i4', 'act': 'f4'})},
      f'{name}_offset',
      keep,
      groups,
      None,
    )

  def _write(
    self,
    table: str,
    columns: dict[str, tuple],
    lists: dict[str, tuple],
    offset: str,
    keep: int,
    groups: int,
    measure: Callable[[int, int, dict[str, np.ndarray]], None] | None,
  ) -> None:
    out = {
      name: files.Growing(self.path, name, dtype, each)
      for name, (_, dtype, each) in columns.items()
    }
    for name, (_, inner) in lists.items():
      out[f'{name}_offset'] = files.Growing(self.path, f'{name}_offset', 'i8')
      out[f'{name}_offset'].add(np.zeros(1, np.int64))
      for each, dtype in inner.items():
        key = f'{name}_{each}'
        out[key] = files.Growing(self.path, key, dtype)
    ends = dict.fromkeys(lists, 0)
    count_M = np.zeros(self.latents, np.int64)
    for first, stop, rows in self._ranges(table, measure is not None):
      best = rows.take(strongest(rows.columns, keep))
      fields = best.columns
      if groups:
        chosen = spread_over(fields, groups)
        best = best.take(chosen)
        fields = best.columns
        if measure is not None:
          measure(first, stop, fields)
      else:
        fields['quantile'] = np.full(len(best), np.nan, np.float32)
      count_M += np.bincount(fields['latent'], minlength=self.latents)
      for name, (field, _, _) in columns.items():
        out[name].add(fields[field])
      for name, (field, inner) in lists.items():
        ragged = best.ragged[field]
        out[f'{name}_offset'].add(ragged.offset[1:] + ends[name])
        ends[name] += int(ragged.offset[-1])
        for each in inner:
          out[f'{name}_{each}'].add(ragged.columns[each])
        if 'token' in inner:
          self.tokens.update(np.unique(ragged.columns['token']).tolist())
    for array in out.values():
      array.close()
    files.save(self.path, offset, files.offsets(count_M))

  def _ranges(
    self, table: str, posted: bool
  ) -> Iterator[tuple[int, int, Table]]:
    """(first, stop, rows of all runs) of some latents at a time."""
    runs = [p for p in self.runs if (p / f'{table}.counts.npy').exists()]
    if not runs:
      return
    names = [
      file.name.removesuffix('.npy').split('.')
      for file in sorted(runs[0].glob(f'{table}.*.npy'))
    ]
    bytes_M = np.full(self.latents, 64.0)
    for run in runs:
      counts = files.load(run, f'{table}.counts')
      latent = np.repeat(np.arange(self.latents), counts)
      bytes_M += counts * (ROW_BYTES * COPIES)
      for name in names:
        if name[1] == 'ragged' and len(name) == 3:
          cells = np.diff(files.load(run, '.'.join(name)))
          bytes_M += np.bincount(
            latent, weights=cells * CELL_BYTES * COPIES, minlength=self.latents
          )
    if posted:
      bytes_M += np.diff(files.load(self.path, 'postings_base_offset')) * 48
    at = [0] * len(runs)
    for first, stop in files.ranges(bytes_M, self.most):
      tables = []
      for i, run in enumerate(runs):
        end = at[i] + int(files.cut(run, f'{table}.counts', first, stop).sum())
        tables.append(_cut(run, table, names, at[i], end))
        at[i] = end
      rows = join(tables)
      if len(rows):
        yield first, stop, rows

  def _of_postings(
    self, first: int, stop: int, fields: dict[str, np.ndarray]
  ) -> None:
    """Sets `quantile` to the place among all postings, 0 to 1."""
    offset = files.cut(self.path, 'postings_base_offset', first, stop + 1)
    mean = files.cut(self.path, 'postings_base_mean', offset[0], offset[-1])
    n = np.diff(offset)
    key = np.repeat(np.arange(stop - first), n) << 16 | mean
    key.sort()
    latent = fields['latent'].astype(np.int64) - first
    own = latent << 16 | index_values.pack(fields['value'])
    low = np.searchsorted(key, own) - (offset[latent] - offset[0])
    high = np.searchsorted(key, own, 'right') - (offset[latent] - offset[0])
    fields['quantile'] = ((low + high) / 2 / n[latent]).astype(np.float32)


def _cut(
  run: pathlib.Path, table: str, names: list[list[str]], start: int, stop: int
) -> Table:
  """Rows start to stop of a run's table."""
  columns, ragged = {}, {}
  for name in names:
    if name[1] == 'column':
      columns[name[2]] = files.cut(run, '.'.join(name), start, stop)
    elif name[1] == 'ragged' and len(name) == 3:
      offset = files.cut(run, '.'.join(name), start, stop + 1)
      inner = [n for n in names if len(n) == 4 and n[2] == name[2]]
      ragged[name[2]] = Ragged(
        offset - offset[0],
        {
          n[3]: files.cut(run, '.'.join(n), int(offset[0]), int(offset[-1]))
          for n in inner
        },
      )
  return Table(columns, ragged)
