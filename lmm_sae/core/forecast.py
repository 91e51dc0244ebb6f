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


@dataclasses.dataclass(frozen=True)
class Part:
  """What is expected of the samples of a split that are left.

  Attributes:
    samples: how many are left; counted: how many were looked at.
    seen, kept: tokens, and rows that are stored, by the name of their kind.
    rejected: samples; reasons: of those that were found.
    rows: that are stored. bytes: that they take on a disk.
    read_s: seconds to read and tokenise a sample.
  """

  samples: int
  counted: int
  seen: Mapping[str, Expected]
  kept: Mapping[str, Expected]
  rejected: Expected
  reasons: tuple[str, ...]
  rows: Expected
  bytes: Expected
  read_s: float


@dataclasses.dataclass(frozen=True)
class Pace:
  """How fast samples of the train split were captured.

  Attributes:
    workers: that captured at once. samples: all of theirs.
    chunk: samples in a task, which a group of more stands for.
    sample_s: seconds a sample, of all workers together.
    pixels_s, forward_s, write_s: seconds a sample in one worker; what makes the
      pixels runs beside the model.
  """

  workers: int
  samples: int
  chunk: int
  sample_s: float
  pixels_s: float
  forward_s: float
  write_s: float


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


def row_bytes(width: int, layers: int, dtype: str = 'bfloat16') -> int:
  """Bytes of a row: of every layer, and of the token arrays.

  Args:
    width: D. layers: how many. dtype: of the rows, bfloat16 or int8.
  """
  fields = grid.fields(range(layers), width, dtype)
  return sum(_bytes(*field) for field in fields.values())


def _bytes(dtype: str, columns: int) -> int:
  return np.dtype(dtype).itemsize * (columns or 1)


TOKEN_BYTES = row_bytes(1, 0)


def shard_bytes(
  rows: int, row: int, shard_rows: int, chunk_rows: int
) -> list[int]:
  """Bytes of the files that hold a group of so many rows of an array.

  A shard is a file: its chunks, of which the last is stored whole, and where
  each of them stands.

  Args:
    row: bytes of a row of that array.
  """
  index = PLACE * (shard_rows // chunk_rows) + CHECKSUM
  chunks = [
    -(-min(rows - start, shard_rows) // chunk_rows)
    for start in range(0, rows, shard_rows)
  ]
  return [each * (chunk_rows * row + CHECKSUM) + index for each in chunks]


def group_bytes(
  rows: int,
  fields: Mapping[str, tuple[str, int]],
  shard_rows: int,
  chunk_rows: int,
) -> int:
  """Bytes that a group of so many rows takes on a disk, with its folders.

  Args:
    fields: of the store, as `grid.fields` gives them.
  """
  total = 0
  for dtype, columns in fields.values():
    files = shard_bytes(rows, _bytes(dtype, columns), shard_rows, chunk_rows)
    total += sum(map(blocks, files))
    total += BLOCK * len(files) * bool(columns)  # a folder a shard
  return total


def fixed_bytes(fields: Mapping[str, tuple[str, int]], vocab: int) -> int:
  """Bytes of a store without rows: of its settings, folders and vocab.json."""
  # Of an array: two folders and zarr.json; of the store: its folder, that of
  # its images or groups, meta.json, and half a block of each list of samples.
  return BLOCK * (3 * len(fields) + 5) + blocks(vocab)


def blocks(count: int) -> int:
  """Bytes that a file of so many takes on a disk."""
  return -(-count // BLOCK) * BLOCK


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
