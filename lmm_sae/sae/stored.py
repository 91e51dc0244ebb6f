"""Arrays on disk that are looked at before any of them is read.

An `Array` knows its shape, dtype, bytes and how it was split; its values are
read a few rows at a time, when they are asked for. `sae.orbax_files` lists the
arrays of a checkpoint; `sae.tensors` and `sae.pickles` those of other files.
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

from lmm_sae.sae.tensors import Tensor

BLOCK = 1 << 22  # elements in one piece of `blocks`: 16 MB of float32


@dataclasses.dataclass(frozen=True)
class Array:
  """One array on disk.

  Attributes:
    name: dotted.
    shape, dtype: of the whole array; dtype by numpy's name.
    stored: bytes on disk, which compression may have made fewer than `nbytes`.
    open: gives what is indexed for values: [rows], or [:, columns].
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


def of_tensor(name: str, tensor: Tensor) -> Array:
  """A tensor of another program's file."""
  size = math.prod(tensor.shape) * tensor.dtype.itemsize
  return Array(
    name, tensor.shape, tensor.dtype.name, size, lambda: _Rows(tensor)
  )


class _Rows:
  """A tensor that is indexed like a matrix, by rows or by columns alone."""

  def __init__(self, tensor: Tensor):
    self._tensor = tensor

  def __getitem__(self, part: slice | tuple[slice, slice]) -> np.ndarray:
    if isinstance(part, slice):
      return self._tensor.read(part.start, part.stop)
    return self._tensor.T.read(part[1].start, part[1].stop).T

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del dtype, copy
    return np.asarray(self._tensor.read())


def damaged(path: pathlib.Path, why: Any) -> ValueError:
  """The error of a checkpoint that lacks something."""
  text = str(why).split(' [')[0]
  if 'PERMISSION_DENIED' in text:
    return ValueError(f'{path} cannot be read: permission denied')
  return ValueError(f'the checkpoint {path} is damaged: {text[:300]}')


def read_json(file: pathlib.Path) -> Any:
  """What a JSON file says.

  Raises:
    ValueError: it is not JSON that can be read; OSError: it cannot be had.
  """
  try:
    return json.loads(file.read_bytes())
  except RecursionError as error:
    raise ValueError(f'{file} is damaged: it is nested too deeply') from error
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
