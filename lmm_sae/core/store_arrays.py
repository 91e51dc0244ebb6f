"""The arrays of a store, as files: read with a name for what is wrong, written.

See `core.grid` for how they lie.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
import tensorstore as ts

from lmm_sae.core import grid, places
from lmm_sae.core.grid import Layout
from lmm_sae.core.place_errors import FAILURES, explained
from lmm_sae.core.places import Place
from lmm_sae.core.store_commits import MEND

DAMAGE = re.compile(
  r'DATA_LOSS|FAILED_PRECONDITION|OUT_OF_RANGE|is missing|byte range'
)


class DamagedShard(ValueError):
  """A shard that is missing or cannot be decoded; `why` is which of them."""

  def __init__(self, file: Place, why: str):
    super().__init__(f'{file} is {why}: {MEND}')
    self.why = why


class Arrays:
  """The arrays of the store at a place.

  Attributes:
    fields: {name: (dtype, columns; 0 is a plain vector)}.
  """

  def __init__(
    self, path: Place, fields: dict[str, tuple[str, int]], layout: Layout
  ):
    self.fields = fields
    self._path = path
    self._layout = layout
    self._open: dict[str, ts.TensorStore] = {}

  def make(self) -> None:
    """Writes the metadata of the arrays that have none."""
    for name, field in self.fields.items():
      grid.open_array(self._path / name, *field, self._layout, create=True)

  def begin(
    self, names: Sequence[str], start: int, stop: int
  ) -> Callable[[], list[np.ndarray]]:
    """Begins to read rows of arrays, and gives what ends it."""
    futures = [self.open(name)[start:stop].read() for name in names]

    def end() -> list[np.ndarray]:
      found = []
      for name, future in zip(names, futures, strict=True):
        try:
          found.append(future.result())
        except FAILURES as error:
          raise self._damaged(name, start, stop, error) from error
      return found

    return end

  def _damaged(self, name, start, stop, error) -> ValueError:
    """What is wrong with the rows of an array that could not be read."""
    rows = self._layout.shard_rows
    if DAMAGE.search(str(error)):
      for shard in range(start // rows, -(-stop // rows)):
        first, last = max(start, shard * rows), min(stop, (shard + 1) * rows)
        try:
          self.open(name)[first:last].read().result()
        except FAILURES as again:
          file = self.file(name, shard)
          if not file.exists():
            return DamagedShard(file, 'missing')
          why = str(again).rsplit(': ', 1)[-1]
          return DamagedShard(file, f'damaged ({why[:120]})')
    return explained(error, str(self._path / name))

  def open(self, name: str) -> ts.TensorStore:
    if name not in self._open:
      self._open[name] = grid.open_array(
        self._path / name, *self.fields[name], self._layout
      )
    return self._open[name]

  def file(self, name: str, shard: int) -> Place:
    """The file of a shard."""
    return self._path / grid.shard_key(name, self.fields[name][1], shard)

  def write(self, name: str, shard: int, rows: np.ndarray) -> int:
    """Writes a shard that begins with these rows; gives its bytes."""
    encoder = grid.Encoder(*self.fields[name], self._layout)
    return self.file(name, shard).write(encoder.pieces(rows))

  def delete(self, group: int, count: int = 0) -> None:
    """Removes the shards of a group past its first `count` rows."""
    layout = self._layout
    each = layout.group_rows // layout.shard_rows
    first = group * each + -(-count // layout.shard_rows)
    places.delete_all(
      self.file(name, shard)
      for shard in range(first, (group + 1) * each)
      for name in self.fields
    )
