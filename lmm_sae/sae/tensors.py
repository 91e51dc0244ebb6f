"""Tensors that stay in their file, read and written a few rows at a time.

The matrices of an SAE are 2 GB each at M = 131,072 and D = 4096: what reads and
writes them asks for the latents that it needs. Nothing of a file is believed: a
header says where each tensor lies, and every number in it is checked first.
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import stat
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from lmm_sae.core.wire import DTYPES

INDEX = '.index.json'  # beside a file that is split into several

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER = 16 << 20  # bytes; a header of four tensors has 400
_JSON = 4 << 20
_RANK = 8
_COLUMNS = 512  # read together where rows lie across


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in a file, of one or two axes to its readers.

  Attributes:
    path: the file.
    dtype: of the file.
    shape: the axes.
    start: its first byte.
    across: its two axes lie in the file the other way round.
  """

  path: pathlib.Path
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int
  across: bool = False

  @property
  def T(self) -> 'Tensor':
    """The matrix with its axes exchanged; nothing is read."""
    return dataclasses.replace(
      self, shape=self.shape[::-1], across=not self.across
    )

  def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows start..stop of the first axis, in the dtype of the file.

    Raises:
      ValueError: the file ends before they do.
      OSError: it cannot be read.
    """
    if not self.shape:
      return self._take(self.start, 1)[0]
    stop = self.shape[0] if stop is None else stop
    width = math.prod(self.shape[1:])
    size = self.dtype.itemsize
    if not self.across:
      at = self.start + start * width * size
      flat = self._take(at, (stop - start) * width)
      return flat.reshape(stop - start, *self.shape[1:])
    rows = np.empty((stop - start, width), self.dtype)
    for left in range(0, width, _COLUMNS):
      columns = [
        self._take(
          self.start + (column * self.shape[0] + start) * size, stop - start
        )
        for column in range(left, min(left + _COLUMNS, width))
      ]
      rows[:, left : left + _COLUMNS] = np.stack(columns, 1)
    return rows

  def _take(self, at: int, count: int) -> np.ndarray:
    found = np.empty(count, self.dtype)
    view, done = memoryview(found.view(np.uint8)), 0
    with open(self.path, 'rb', buffering=0) as file:
      while done < len(view):
        # A read takes 2 GB at most, whatever is asked for.
        got = os.preadv(
          file.fileno(), [view[done : done + (1 << 30)]], at + done
        )
        if not got:
          raise ValueError(f'{self.path} ends within a tensor: it is truncated')
        done += got
    return found


def plain_file(path: pathlib.Path, root: pathlib.Path) -> pathlib.Path:
  """The path, where a file stands that does not lead out of `root`.

  A download cache keeps links to its own `blobs` folder; those are followed.

  Raises:
    ValueError: it leads out, or is no file.
  """
  real, home = path.resolve(), root.resolve()
  homes = [home]
  for parent in (home, *home.parents):
    if parent.name == 'snapshots':
      homes.append(parent.parent / 'blobs')
  if not any(real.is_relative_to(place) for place in homes):
    raise ValueError(f'{path} leads to {real}, out of {root}: it is not read')
  if not real.exists() or not stat.S_ISREG(real.stat().st_mode):
    raise ValueError(f'{path} is missing, or no file')
  return path


def read_json(path: pathlib.Path, root: pathlib.Path) -> dict[str, Any]:
  """The object of a JSON file.

  Raises:
    ValueError: it leads out of `root`, is too long, or is no such object.
  """
  size = plain_file(path, root).stat().st_size
  if size > _JSON:
    raise ValueError(f'{path} has {size} bytes; at most {_JSON} are read')
  return parse(path.read_bytes(), path)


def parse(text: bytes, where: Any) -> dict[str, Any]:
  """A JSON object with each key once, finite numbers and UTF-8 text.

  Raises:
    ValueError: it is not that; the message begins with `where`.
  """

  def once(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
      keys = [key for key, _ in pairs]
      twice = next(key for key in keys if keys.count(key) > 1)
      raise ValueError(f'the key {twice[:80]!r} stands there twice')
    return found

  def refuse(word):
    raise ValueError(f'{word} is no number')

  try:
    found = json.loads(
      text.decode(), object_pairs_hook=once, parse_constant=refuse
    )
  except RecursionError as error:
    raise ValueError(f'{where} is nested too deeply') from error
  except ValueError as error:  # of decode and of json, too
    raise ValueError(f'{where} is no JSON that is read: {error}') from error
  if not isinstance(found, dict):
    raise ValueError(f'{where} holds no JSON object')
  return found


def find(path: pathlib.Path, root: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of a safetensors file, or of those that its index names.

  Raises:
    ValueError: a file is damaged or leads out of `root`.
  """
  if path.exists() or path.is_symlink():
    return header(path, root)
  index = path.with_name(path.name + INDEX)
  places = read_json(index, root).get('weight_map')
  if not isinstance(places, dict) or not places:
    raise ValueError(f'{index} has no weight_map of names and files')
  files = {}
  for name, file in places.items():
    if (
      not isinstance(file, str)
      or file != os.path.basename(file)
      or file in ('', '.', '..')
      or not file.isprintable()
    ):
      raise ValueError(f'{index}: {name} is in {file!r}, which is no file name')
    files.setdefault(file, []).append(name)
  found = {}
  for file, names in files.items():
    there = header(index.with_name(file), root)
    if missing := [name for name in names if name not in there]:
      raise ValueError(f'{index}: {file} has no {", ".join(missing)}')
    found |= {name: there[name] for name in names}
  return found


def header(path: pathlib.Path, root: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of one safetensors file, none of them read.

  Raises:
    ValueError: the header is damaged: dtypes, shapes, bounds, gaps, overlaps.
  """
  size = plain_file(path, root).stat().st_size
  with open(path, 'rb') as file:
    length = file.read(8)
    if len(length) < 8:
      raise ValueError(f'{path} of {size} bytes is no safetensors file')
    (count,) = struct.unpack('<Q', length)
    if not 2 <= count <= min(_HEADER, size - 8):
      raise ValueError(
        f'{path} has {size} bytes and says that its header has {count}, of '
        f'which at most {_HEADER} are read: it is truncated, or no safetensors'
      )
    table = parse(file.read(count), f'the header of {path}')
  table.pop('__metadata__', None)
  body = 8 + count
  found, spans = {}, []
  for name, entry in table.items():
    where = f'{path}: tensor {name[:80]!r}'
    dtype, shape, (start, stop) = _entry(entry, where)
    if stop > size - body:
      raise ValueError(
        f'{where} ends at byte {stop} of {size - body}: the file is truncated'
      )
    found[name] = Tensor(path, dtype, shape, body + start)
    spans.append((start, stop, name))
  at = 0
  for start, stop, name in sorted(spans):
    if start != at:
      what = 'overlaps another' if start < at else 'leaves a gap before it'
      raise ValueError(f'{path}: tensor {name[:80]!r} {what}')
    at = stop
  if at != size - body:
    raise ValueError(f'{path}: {size - body - at} bytes belong to no tensor')
  return found


def _entry(entry: Any, where: str):
  """dtype, shape and byte range of one tensor."""
  if not isinstance(entry, dict) or set(entry) != {
    'dtype',
    'shape',
    'data_offsets',
  }:
    raise ValueError(f'{where} has no dtype, shape and data_offsets alone')
  dtype, shape, span = (
    entry[key] for key in ('dtype', 'shape', 'data_offsets')
  )
  if not isinstance(dtype, str) or dtype not in DTYPES:
    raise ValueError(f'{where} is of dtype {str(dtype)[:40]!r}, not known here')
  for what, numbers in (('shape', shape), ('data_offsets', span)):
    if not isinstance(numbers, list) or not all(
      type(x) is int and 0 <= x < 1 << 62 for x in numbers
    ):
      raise ValueError(f'{where}: {what} is {str(numbers)[:80]}')
  if len(span) != 2 or len(shape) > _RANK:
    raise ValueError(f'{where}: {len(shape)} axes, {len(span)} offsets')
  size = math.prod(shape) * DTYPES[dtype].itemsize
  if span[1] - span[0] != size:
    raise ValueError(
      f'{where}: {dtype} {shape} takes {size} bytes, not {span[1] - span[0]}'
    )
  return DTYPES[dtype], tuple(shape), span


class Writer:
  """A safetensors file that is filled in any order.

  Args:
    path: the file, which must not exist.
    shapes: {name: (dtype, shape)}, in the order of the file.
  """

  def __init__(
    self,
    path: pathlib.Path,
    shapes: dict[str, tuple[np.dtype, tuple[int, ...]]],
  ):
    sizes = [
      math.prod(shape) * np.dtype(dtype).itemsize
      for dtype, shape in shapes.values()
    ]
    ends = list(itertools.accumulate(sizes))
    table = {
      name: {
        'dtype': _NAMES[np.dtype(dtype)],
        'shape': list(shape),
        'data_offsets': [end - size, end],
      }
      for (name, (dtype, shape)), size, end in zip(
        shapes.items(), sizes, ends, strict=True
      )
    }
    text = json.dumps({'__metadata__': {'format': 'pt'}} | table).encode()
    text += b' ' * (-len(text) % 8)
    self._places = {
      name: (
        np.dtype(dtype),
        shape,
        8 + len(text) + table[name]['data_offsets'][0],
      )
      for name, (dtype, shape) in shapes.items()
    }
    self._file = open(path, 'xb', buffering=0)  # noqa: SIM115
    self._put(struct.pack('<Q', len(text)) + text, 0)
    self._file.truncate(8 + len(text) + sum(sizes))

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, *_) -> None:
    self._file.close()

  def rows(self, name: str, start: int, values: np.ndarray) -> None:
    """Writes rows start, start + 1, ... of a tensor."""
    dtype, shape, at = self._places[name]
    width = math.prod(shape[1:])
    self._put(
      np.ascontiguousarray(values, dtype), at + start * width * dtype.itemsize
    )

  def columns(self, name: str, start: int, values: np.ndarray) -> None:
    """Writes columns start, start + 1, ... of a matrix, given as its rows."""
    dtype, (_, width), at = self._places[name]
    for left in range(0, values.shape[1], _COLUMNS):
      part = np.ascontiguousarray(values[:, left : left + _COLUMNS].T, dtype)
      for row, line in enumerate(part, start=left):
        self._put(line, at + (row * width + start) * dtype.itemsize)

  def _put(self, values: Any, at: int) -> None:
    if isinstance(values, np.ndarray):
      values = values.reshape(-1).view(np.uint8)
    view, done = memoryview(values), 0
    while done < len(view):
      done += os.pwrite(
        self._file.fileno(), view[done : done + (1 << 30)], at + done
      )


def pieces(rows: int, width: int) -> Iterator[tuple[int, int]]:
  """Runs of rows of 64 MB in float32, or one row where it is wider."""
  step = max(1, (16 << 20) // max(width, 1))
  for start in range(0, rows, step):
    yield start, min(start + step, rows)
