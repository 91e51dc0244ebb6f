"""Arrays on disk that are looked at before any of them is read.

An `Array` knows its shape, dtype, bytes and how it was split; its values are
read a few rows at a time, when they are asked for. `tensors` lists those of a
safetensors file; those of an orbax checkpoint are in `sae.orbax_files`.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes  # noqa: F401 - makes numpy know bfloat16 by name
import numpy as np

BLOCK = 1 << 22  # elements in one piece of `blocks`: 16 MB of float32

_HEADER = 100_000_000  # bytes; a longer header of safetensors is no header
_DTYPES = {
  'F64': 'float64',
  'F32': 'float32',
  'F16': 'float16',
  'BF16': 'bfloat16',
  'F8_E4M3': 'float8_e4m3fn',
  'F8_E5M2': 'float8_e5m2',
  'I64': 'int64',
  'I32': 'int32',
  'I16': 'int16',
  'I8': 'int8',
  'U64': 'uint64',
  'U32': 'uint32',
  'U16': 'uint16',
  'U8': 'uint8',
  'BOOL': 'bool',
}


@dataclasses.dataclass(frozen=True)
class Array:
  """One array on disk.

  Attributes:
    name: dotted.
    shape, dtype: of the whole array; dtype by numpy's name.
    stored: bytes on disk, which compression may have made fewer than `nbytes`.
    open: gives what is indexed for values: a tensorstore or a memory map.
    item: the part of a checkpoint that it belongs to; '' for all others.
    chunks: shape of what is read at once; () where any part is as good.
    sharding: how it lay on devices, see `orbax_files.sharding`; None: unknown.
  """

  name: str
  shape: tuple[int, ...]
  dtype: str
  stored: int
  open: Callable[[], Any]
  item: str = ''
  chunks: tuple[int, ...] = ()
  sharding: dict[str, Any] | None = None

  @property
  def nbytes(self) -> int:
    """Bytes of the values in memory."""
    return math.prod(self.shape) * np.dtype(self.dtype).itemsize

  def read(self) -> np.ndarray:
    """All of it; for small arrays.

    Raises:
      ValueError: what stands on disk cannot be decoded.
    """
    return np.asarray(self.open())

  def blocks(
    self, elements: int = BLOCK, axis: int = 0
  ) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of pieces, in order; a single value is one row.

    A chunk is decoded once, whatever its size: that is the most that is held.

    Args:
      elements: in a piece, about.
      axis: which of two axes the rows are on; 1: the pieces are transposed.
    """
    if not self.shape:
      yield 0, self.read()[None]
      return
    rows = self.shape[axis]
    each = max(1, elements * rows // max(1, math.prod(self.shape)))
    chunk = self.chunks[axis] if self.chunks else 1
    span = chunk * max(1, each // max(1, chunk))
    stored = self.open()
    for at in range(0, rows, span):
      of = slice(at, min(at + span, rows))
      part = np.asarray(stored[:, of]).T if axis else np.asarray(stored[of])
      for inner in range(0, len(part), each):
        yield at + inner, part[inner : inner + each]

  def facts(self) -> dict[str, Any]:
    """What is known of it, in JSON."""
    return {
      'name': self.name,
      'item': self.item,
      'shape': list(self.shape),
      'dtype': self.dtype,
      'bytes': self.nbytes,
      'stored_bytes': self.stored,
      'chunks': list(self.chunks),
      'sharding': self.sharding,
    }


def tensors(file: pathlib.Path) -> list[Array]:
  """The tensors of a safetensors file; only its header is read.

  Raises:
    ValueError: it is no such file, it is cut, or its tensors overlap.
  """
  size = file.stat().st_size
  with file.open('rb') as opened:
    length = int.from_bytes(opened.read(8), 'little')
    if size < 8 or not 2 <= length <= min(_HEADER, size - 8):
      raise ValueError(f'{file} is damaged: it has no header of safetensors')
    text = opened.read(length)
  try:
    header = json.loads(text)
    header.pop('__metadata__', None)
    found = [
      (name, said['dtype'], *_counts(said['shape'], said['data_offsets']))
      for name, said in header.items()
    ]
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(
      f'{file} is damaged: its header cannot be read ({error})'
    ) from error
  arrays, end = [], 0
  for name, kind, shape, start, stop in sorted(found, key=lambda x: x[3:]):
    if not isinstance(kind, str) or kind not in _DTYPES:
      raise ValueError(f'{file}: {name} has the dtype {kind}, which is unknown')
    array = _mapped(file, name, _DTYPES[kind], shape, 8 + length + start)
    if start != end or stop - start != array.nbytes:
      raise ValueError(
        f'{file} is damaged: {name} of {list(shape)} {kind} cannot stand at '
        f'bytes {start} to {stop}'
      )
    end = stop
    arrays.append(array)
  if size != 8 + length + end:
    raise ValueError(
      f'{file} is damaged: it has {size} bytes, its header says '
      f'{8 + length + end}'
    )
  return arrays


def _counts(shape, offsets) -> tuple[tuple[int, ...], int, int]:
  counts = [*shape, *offsets]
  if not all(type(x) is int and x >= 0 for x in counts) or len(offsets) != 2:
    raise ValueError(f'{shape} at {offsets}')
  return tuple(shape), *offsets


def _mapped(file, name, dtype, shape, offset) -> Array:
  def mapped():
    count = math.prod(shape)
    if not count:
      return np.zeros(shape, dtype)
    flat = np.memmap(file, np.uint8, 'r', offset, (count * item,))
    return flat.view(dtype).reshape(shape)

  item = np.dtype(dtype).itemsize
  return Array(name, shape, dtype, math.prod(shape) * item, mapped)


def damaged(path: pathlib.Path, why: Any) -> ValueError:
  """The error of a checkpoint that lacks something."""
  text = str(why).split(' [')[0]
  if 'PERMISSION_DENIED' in text:
    return ValueError(f'{path} cannot be read: permission denied')
  return ValueError(f'the checkpoint {path} is damaged: {text[:300]}')


def read_json(file: pathlib.Path) -> Any:
  """What a JSON file says.

  Raises:
    ValueError: it is not JSON; OSError: it cannot be read.
  """
  try:
    return json.loads(file.read_bytes())
  except ValueError as error:
    raise ValueError(f'{file} is damaged: it is not JSON ({error})') from error


def disk(path: str | os.PathLike) -> int:
  """Bytes of a file, or of all files below a folder.

  Those that a run removes meanwhile are not counted.
  """
  path = pathlib.Path(path)
  total = 0
  for file in [path] if path.is_file() else path.rglob('*'):
    with contextlib.suppress(FileNotFoundError):
      total += file.stat().st_size if file.is_file() else 0
  return total
