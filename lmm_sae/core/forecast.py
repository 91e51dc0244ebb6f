"""How large a store becomes, before it is made.

Bytes follow from rows; rows follow from a sample of the data, with a spread.
`capture --dry_run` and `plan` count with this one arithmetic.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from lmm_sae.core import grid

BLOCK = 4096  # bytes in which a file system gives space to a file
CHECKSUM = 4  # bytes after a chunk, and after the index of a shard
PLACE = 16  # bytes of a chunk's place in that index
DEVIATIONS = 1.96  # of a mean: 95 times of 100 the truth lies within


@dataclasses.dataclass(frozen=True)
class Expected:
  """A total that a part was counted of; the truth lies within `spread` of it.

  `spread` is 0 where all was counted, and infinite where one thing was.
  """

  total: float
  spread: float = 0.0

  def __add__(self, other: 'Expected') -> 'Expected':
    """The sum of two that know nothing of one another."""
    return Expected(
      self.total + other.total, math.hypot(self.spread, other.spread)
    )

  def times(self, factor: float) -> 'Expected':
    return Expected(self.total * factor, self.spread * factor)


def expect(counted: Sequence[float], of: int) -> Expected:
  """What `of` things hold, by those of them that were counted.

  Args:
    counted: what each of some holds, drawn without preference; not empty where
      `of` is not 0.
    of: how many there are.
  """
  count = len(counted)
  if not of:
    return Expected(0.0)
  values = np.asarray(counted, np.float64)
  if count >= of:
    return Expected(float(values.sum()) * of / count)
  if count == 1:
    return Expected(float(values[0]) * of, math.inf)
  # Without replacement: the more is counted, the less is left to chance.
  error = values.std(ddof=1) / math.sqrt(count) * math.sqrt(1 - count / of)
  return Expected(float(values.mean()) * of, float(DEVIATIONS * error * of))


def array_bytes(
  width: int, layers: Sequence[int], dtype: str
) -> dict[str, int]:
  """{name: bytes a row} of every array of a store.

  Args:
    width: D. layers: hooked. dtype: of the rows, bfloat16 or int8.
  """
  return {
    name: np.dtype(kind).itemsize * (columns or 1)
    for name, (kind, columns) in grid.fields(layers, width, dtype).items()
  }


def row_bytes(width: int, layers: int, dtype: str = 'bfloat16') -> int:
  """Bytes of a row: of every layer, and of the token arrays."""
  return sum(array_bytes(width, range(layers), dtype).values())


TOKEN_BYTES = row_bytes(1, 0)


def group_bytes(
  rows: int,
  arrays: Mapping[str, int],
  shard_rows: int,
  chunk_rows: int,
  block: int = BLOCK,
) -> int:
  """Bytes that a group of so many rows takes on a disk, to the block.

  A shard is a file: its chunks, of which the last is stored whole, and where
  each of them stands.
  """
  index = PLACE * (shard_rows // chunk_rows) + CHECKSUM
  total = 0
  for start in range(0, rows, shard_rows):
    chunks = -(-min(rows - start, shard_rows) // chunk_rows)
    for each in arrays.values():
      file = chunks * (chunk_rows * each + CHECKSUM) + index
      total += -(-file // block) * block
  return total


def size(count: float) -> str:
  """Bytes in the unit that people read."""
  for unit in ('B', 'KiB', 'MiB', 'GiB'):
    if count < 1024:
      return f'{count:.3g} {unit}'
    count /= 1024
  return f'{count:.3g} TiB'


def span(seconds: float) -> str:
  """In the unit that people read, seconds to days."""
  for unit, length in (('s', 60), ('min', 60), ('h', 48)):
    if seconds < length:
      return f'{seconds:.3g} {unit}'
    seconds /= 60
  return f'{seconds * 60 / 24:.3g} days'
