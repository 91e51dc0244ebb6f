"""Tables whose rows may end in a list, and the strongest rows of each latent.

What the index keeps a latent is of no fixed length: the patches that an image
lights, the tokens about a word. Such a column is a `Ragged`: the lists laid end
to end, and where each begins.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


def spans(start_N: np.ndarray, count_N: np.ndarray) -> np.ndarray:
  """The indices start, start + 1, ... of each span, laid end to end."""
  before_N = np.cumsum(count_N) - count_N
  return np.arange(count_N.sum()) + np.repeat(start_N - before_N, count_N)


@dataclasses.dataclass(frozen=True)
class Ragged:
  """One list a row: row n has columns[name][offset[n] : offset[n + 1]]."""

  offset: np.ndarray
  columns: dict[str, np.ndarray]

  @classmethod
  def cut(cls, columns, start_N: np.ndarray, count_N: np.ndarray) -> 'Ragged':
    """The lists that stand at start_N, count_N long, in long `columns`."""
    at = spans(start_N, count_N)
    offset = np.concatenate([[0], np.cumsum(count_N)]).astype(np.int64)
    return cls(offset, {name: column[at] for name, column in columns.items()})

  def take(self, rows_N: np.ndarray) -> 'Ragged':
    start_N, stop_N = self.offset[rows_N], self.offset[rows_N + 1]
    return Ragged.cut(self.columns, start_N, stop_N - start_N)


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of a latent: plain columns, all of one length, and ragged ones.

  The columns `latent`, `strength`, `key` and `order` decide which rows are
  kept: of rows with one latent and one key only the strongest, and of equally
  strong rows the one of the lower `order`.
  """

  columns: dict[str, np.ndarray]
  ragged: dict[str, Ragged]

  def __len__(self) -> int:
    return len(self.columns['latent'])

  def take(self, rows_N: np.ndarray) -> 'Table':
    return Table(
      {name: column[rows_N] for name, column in self.columns.items()},
      {name: ragged.take(rows_N) for name, ragged in self.ragged.items()},
    )

  @property
  def nbytes(self) -> int:
    arrays = list(self.columns.values())
    for ragged in self.ragged.values():
      arrays += [ragged.offset, *ragged.columns.values()]
    return sum(array.nbytes for array in arrays)

  def arrays(self) -> dict[str, np.ndarray]:
    """Everything as flat arrays, for a file; `from_arrays` reads them back."""
    flat = {f'column.{name}': column for name, column in self.columns.items()}
    for name, ragged in self.ragged.items():
      flat[f'ragged.{name}'] = ragged.offset
      for inner, column in ragged.columns.items():
        flat[f'ragged.{name}.{inner}'] = column
    return flat

  @classmethod
  def from_arrays(cls, flat: dict[str, np.ndarray]) -> 'Table':
    parts = {tuple(name.split('.')): flat[name] for name in flat}
    ragged = {
      path[1]: Ragged(
        offset,
        {p[2]: a for p, a in parts.items() if len(p) == 3 and p[1] == path[1]},
      )
      for path, offset in parts.items()
      if path[0] == 'ragged' and len(path) == 2
    }
    return cls({p[1]: a for p, a in parts.items() if p[0] == 'column'}, ragged)


def join(tables: Sequence[Table]) -> Table:
  """The rows of several tables, one after the other."""
  first = tables[0]
  columns = {
    name: np.concatenate([table.columns[name] for table in tables])
    for name in first.columns
  }
  ragged = {}
  for name in first.ragged:
    parts = [table.ragged[name] for table in tables]
    counts = np.concatenate([np.diff(part.offset) for part in parts])
    ragged[name] = Ragged(
      np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
      {
        inner: np.concatenate([part.columns[inner] for part in parts])
        for inner in parts[0].columns
      },
    )
  return Table(columns, ragged)


def strongest(columns: dict[str, np.ndarray], keep: int) -> np.ndarray:
  """The rows worth keeping, by latent and then by falling strength.

  At most `keep` a latent, no two of a latent with the same key.
  """
  latent, key = columns['latent'], columns['key']
  rows = np.lexsort((columns['order'], -columns['strength'], latent))
  by_key = np.lexsort((np.arange(len(rows)), key[rows], latent[rows]))
  new = np.ones(len(rows), bool)
  new[1:] = (np.diff(latent[rows][by_key]) != 0) | (
    np.diff(key[rows][by_key]) != 0
  )
  rows = rows[np.sort(by_key[new])]
  counts = np.unique(latent[rows], return_counts=True)[1]
  rank = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
  return rows[rank < keep]


class Strongest:
  """Keeps the strongest rows of each latent out of all that are added.

  Rows wait until as many wait as are kept, so that sorting stays cheap and
  memory at twice what is kept. A row need not be added at all unless it is
  stronger than the weakest of a latent that has its full number.
  """

  WAIT = 1 << 16  # rows that may wait however few are kept

  def __init__(
    self, latents: int, keep: int, floor_M: np.ndarray | None = None
  ):
    """Of rows weaker than `floor_M` it is known that they will not be kept."""
    self.keep = keep
    self._floor_M = np.zeros(latents, np.float64)
    if floor_M is not None:  # as strong is strong enough: `order` decides
      self._floor_M = np.nextafter(floor_M.astype(np.float64), -np.inf)
    self._kept: Table | None = None
    self._waiting: list[Table] = []

  def worth(self, columns: dict[str, np.ndarray]) -> np.ndarray:
    """Which of these rows to add: the others would not be kept."""
    rows = np.flatnonzero(
      columns['strength'] > self._floor_M[columns['latent']]
    )
    if len(rows):
      counts = np.bincount(columns['latent'][rows])
      if counts.max() <= self.keep:  # all may be kept: no need to sort
        return rows
    above = {name: column[rows] for name, column in columns.items()}
    return rows[strongest(above, self.keep)]

  def add(self, table: Table) -> None:
    """Adds rows; of equally strong ones the earlier added is kept."""
    self._waiting.append(table)
    kept = 0 if self._kept is None else len(self._kept)
    if sum(map(len, self._waiting)) > max(self.WAIT, kept):
      self._settle()

  def table(self) -> Table | None:
    """What is kept, by latent, then by falling strength; None: nothing was."""
    self._settle()
    return self._kept

  @property
  def nbytes(self) -> int:
    """Of all rows that are held, kept or waiting."""
    kept = [] if self._kept is None else [self._kept]
    return sum(table.nbytes for table in kept + self._waiting)

  @property
  def floor_M(self) -> np.ndarray:
    """A strength below which no row will be kept, whatever else is added."""
    self._settle()
    return self._floor_M

  def _settle(self) -> None:
    if self._waiting:
      tables = ([] if self._kept is None else [self._kept]) + self._waiting
      both = join(tables)
      self._kept = both.take(strongest(both.columns, self.keep))
      self._waiting = []
      latent = self._kept.columns['latent']
      counts = np.bincount(latent, minlength=len(self._floor_M))
      last = np.cumsum(counts) - 1
      full = counts == self.keep
      self._floor_M[full] = self._kept.columns['strength'][last[full]]
