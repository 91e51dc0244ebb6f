"""Arrays of an index on disk, read by the slice and written by the piece.

Not mapped: the pages of a mapped file count as memory of who touches them.
"""

import pathlib
from collections.abc import Iterator, Sequence

import numpy as np


def load(folder: pathlib.Path, name: str) -> np.ndarray:
  return np.load(folder / f'{name}.npy')


def cut(folder: pathlib.Path, name: str, start: int, stop: int) -> np.ndarray:
  """Rows start to stop of an array; no more of it is read."""
  with (folder / f'{name}.npy').open('rb') as file:
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    each = int(np.prod(shape[1:], dtype=np.int64))
    file.seek((start * each) * dtype.itemsize, 1)
    flat = np.fromfile(file, dtype, (stop - start) * each)
  return flat.reshape(stop - start, *shape[1:])


def save(folder: pathlib.Path, name: str, array: np.ndarray) -> None:
  np.save(folder / f'{name}.npy', array)


class Growing:
  """An array written piece by piece; the file of `np.save` of the whole.

  Its header is written twice: numpy leaves room in it for a longer first axis.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    name: str,
    dtype: np.typing.DTypeLike,
    each: tuple[int, ...] = (),
  ):
    self.dtype = np.dtype(dtype)
    self._each, self._rows = each, 0
    self._file = (folder / f'{name}.npy').open('wb')
    self._header()

  def _header(self) -> None:
    self._file.seek(0)
    np.lib.format.write_array_header_1_0(
      self._file,
      {
        'descr': np.lib.format.dtype_to_descr(self.dtype),
        'fortran_order': False,
        'shape': (self._rows, *self._each),
      },
    )

  def add(self, array: np.ndarray) -> None:
    self._rows += len(array)
    self._file.write(np.ascontiguousarray(array, self.dtype).tobytes())

  def close(self) -> None:
    self._header()
    self._file.close()


def ranges(bytes_M: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
  """(first, stop) of latents that together hold at most so many bytes.

  A latent that alone holds more has a range of its own.
  """
  total = np.concatenate([[0], np.cumsum(bytes_M, dtype=np.float64)])
  first = 0
  while first < len(bytes_M):
    stop = int(np.searchsorted(total, total[first] + most, side='right')) - 1
    stop = min(max(stop, first + 1), len(bytes_M))
    yield first, stop
    first = stop


def offsets(counts: np.ndarray | Sequence[int]) -> np.ndarray:
  """Where each of so many long lists begins, and the last one ends."""
  return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
