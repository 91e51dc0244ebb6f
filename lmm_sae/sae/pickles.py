"""The tensors of a file of `torch.save`, without torch and without pickle.

Such a file is a zip of raw tensors and of a pickle that says how they make a
dict. A pickle is a program: its reader can be told to call anything. Here its
instructions are read one by one and nothing is called; those that a dict of
tensors does not need, or any name but those of `_STORAGES` and `_KNOWN`, are
refused. So no torch is loaded, the tensors stay in the file until they are
asked for, and there is no pickle reader whose list of names could be evaded.
"""

import math
import pathlib
import pickletools
import struct
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from lmm_sae.sae import tensors
from lmm_sae.sae.tensors import Tensor

_STORAGES = {
  'torch DoubleStorage': np.dtype(np.float64),
  'torch FloatStorage': np.dtype(np.float32),
  'torch HalfStorage': np.dtype(np.float16),
  'torch BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
  'torch LongStorage': np.dtype(np.int64),
  'torch IntStorage': np.dtype(np.int32),
  'torch ShortStorage': np.dtype(np.int16),
  'torch CharStorage': np.dtype(np.int8),
  'torch ByteStorage': np.dtype(np.uint8),
  'torch BoolStorage': np.dtype(np.bool_),
}
_DICT = 'collections OrderedDict'
_TENSOR = 'torch._utils _rebuild_tensor_v2'
_PARAMETER = 'torch._utils _rebuild_parameter'
_KNOWN = {*_STORAGES, _DICT, _TENSOR, _PARAMETER}

_PICKLE = 1 << 20  # bytes; one of ten tensors has 1000
_ENTRIES = 10_000

# What zipfile raises of a damaged file.
_ZIP = (
  zipfile.BadZipFile,
  EOFError,
  NotImplementedError,
  OverflowError,
  UnicodeError,
  struct.error,
)


class _Name(str):
  """A name that the pickle imports; never looked up."""


class _Mark:
  """Where a tuple or a run of items begins on the stack."""


_MARK = _Mark()


def find(path: pathlib.Path, root: pathlib.Path) -> dict[str, Tensor | Any]:
  """{name: tensor, or a plain number} of a file of `torch.save`.

  Raises:
    ValueError: it is damaged, or its pickle asks for more than tensors.
  """
  size = tensors.plain_file(path, root).stat().st_size
  if not zipfile.is_zipfile(path):
    raise ValueError(
      f'{path} is no zip: a file of torch.save since version 1.6 is one; save '
      'it anew with torch, or as safetensors'
    )
  try:
    with zipfile.ZipFile(path) as archive, open(path, 'rb') as file:
      entries = _entries(archive, path)
      inner = [name for name in entries if name.split('/')[1:] == ['data.pkl']]
      if len(inner) != 1:
        raise ValueError(f'{path} has {len(inner)} data.pkl, not one')
      prefix = inner[0].removesuffix('data.pkl')
      spans = {
        name.removeprefix(prefix): _span(entry, file, size, path)
        for name, entry in entries.items()
        if name.startswith(prefix)
      }
      start, count = spans['data.pkl']
      if count > _PICKLE:
        raise ValueError(f'{path}: its pickle has {count} bytes')
      program = _bytes(file, start, count)
      order = spans.get('byteorder')
      if order and _bytes(file, order[0], min(order[1], 9)) != b'little':
        raise ValueError(f'{path} is not little-endian')
  except _ZIP as error:
    raise ValueError(f'{path} is a damaged zip: {error}') from error
  try:
    found = _run(program, path, spans)
  except (IndexError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(
      f'{path}: its pickle is damaged ({type(error).__name__} {error})'
    ) from error
  if not isinstance(found, dict) or not all(
    isinstance(name, str) for name in found
  ):
    raise ValueError(f'{path} holds no dict of tensors by name')
  return found


def _entries(archive: zipfile.ZipFile, path) -> dict[str, zipfile.ZipInfo]:
  listed = archive.infolist()
  entries = {entry.filename: entry for entry in listed}
  if len(entries) < len(listed):
    raise ValueError(f'{path}: a name stands in its zip twice')
  if len(entries) > _ENTRIES:
    raise ValueError(f'{path}: its zip has {len(entries)} entries')
  return entries


def _bytes(file, start: int, count: int) -> bytes:
  file.seek(start)
  return file.read(count)


def _span(entry: zipfile.ZipInfo, file, size: int, path) -> tuple[int, int]:
  """Where the bytes of an entry lie: (start, count)."""
  where = f'{path}: {entry.filename[:80]!r}'
  if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
    raise ValueError(f'{where} is compressed, which torch.save does not do')
  if not 0 <= entry.header_offset < size:
    raise ValueError(f'{where} lies outside the file')
  local = _bytes(file, entry.header_offset, 30)
  if len(local) < 30 or local[:4] != b'PK\x03\x04':
    raise ValueError(f'{where} has no header: the file is damaged')
  start = entry.header_offset + 30 + sum(struct.unpack('<HH', local[26:30]))
  if start + entry.file_size > size:
    raise ValueError(f'{where} ends behind the file: it is truncated')
  return start, entry.file_size


def _run(program: bytes, path, spans: dict[str, tuple[int, int]]) -> Any:
  """What the pickle leaves, made of dicts, tuples, numbers and tensors."""
  stack: list[Any] = []
  memo: dict[int, Any] = {}

  def items() -> list[Any]:
    at = len(stack) - 1
    while stack[at] is not _MARK:  # an IndexError where there is none
      at -= 1
    found = stack[at + 1 :]
    del stack[at:]
    return found

  def pop(count: int) -> list[Any]:
    if count > len(stack):
      raise IndexError('an empty stack')
    found = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return found

  try:
    steps = list(pickletools.genops(program))
  except (ValueError, IndexError, struct.error) as error:
    raise ValueError(f'{path}: its pickle is damaged ({error})') from error
  for op, arg, _ in steps:
    match op.name:
      case 'PROTO' | 'FRAME':
        pass
      case 'STOP':
        return pop(1)[0]
      case 'MARK':
        stack.append(_MARK)
      case 'EMPTY_DICT':
        stack.append({})
      case 'EMPTY_LIST':
        stack.append([])
      case 'EMPTY_TUPLE':
        stack.append(())
      case 'NONE':
        stack.append(None)
      case 'NEWTRUE' | 'NEWFALSE':
        stack.append(op.name == 'NEWTRUE')
      case (
        'BININT' | 'BININT1' | 'BININT2' | 'LONG1' | 'BINFLOAT' | 'BINUNICODE'
      ) | 'SHORT_BINUNICODE':
        stack.append(arg)
      case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
        stack.append(tuple(pop(int(op.name[-1]))))
      case 'TUPLE':
        stack.append(tuple(items()))
      case 'APPEND':
        (value,) = pop(1)
        _a(list, stack[-1]).append(value)
      case 'APPENDS':
        values = items()
        _a(list, stack[-1]).extend(values)
      case 'SETITEM':
        key, value = pop(2)
        _set(stack[-1], key, value)
      case 'SETITEMS':
        values = items()
        if len(values) % 2:
          raise IndexError('a key without a value')
        for key, value in zip(values[::2], values[1::2], strict=True):
          _set(stack[-1], key, value)
      case 'BINPUT' | 'LONG_BINPUT':
        memo[arg] = stack[-1]
      case 'MEMOIZE':
        memo[len(memo)] = stack[-1]
      case 'BINGET' | 'LONG_BINGET':
        stack.append(memo[arg])
      case 'GLOBAL':
        stack.append(_name(arg, path))
      case 'STACK_GLOBAL':
        stack.append(_name(' '.join(pop(2)), path))
      case 'BINPERSID':
        stack.append(_storage(pop(1)[0], path, spans))
      case 'REDUCE':
        stack.append(_made(*pop(2), path))
      case 'BUILD':  # what a dict of torch says of its versions
        pop(1)
        _a(dict, stack[-1])
      case _:
        raise ValueError(
          f'{path}: its pickle has the instruction {op.name}, which a dict of '
          'tensors does not need: nothing of it was run'
        )
  raise ValueError(f'{path}: its pickle has no end')


def _a(kind: type, value: Any) -> Any:
  if not isinstance(value, kind):
    raise TypeError(f'a {type(value).__name__} for a {kind.__name__}')
  return value


def _set(found: Any, key: Any, value: Any) -> None:
  if not isinstance(key, str | int):
    raise TypeError(f'a {type(key).__name__} as a key')
  if key in _a(dict, found):
    raise KeyError(f'{str(key)[:80]} stands there twice')
  found[key] = value


def _name(name: str, path) -> _Name:
  if name not in _KNOWN:
    called = name.replace(' ', '.')[:80]
    raise ValueError(
      f'{path}: its pickle asks for {called!r}, which is no part of a dict of '
      'tensors: nothing of it was run'
    )
  return _Name(name)


def _storage(said: Any, path, spans) -> '_Storage':
  """(dtype, first byte, items) of the raw bytes that a tensor is a view of."""
  if not isinstance(said, tuple) or len(said) != 5:
    raise TypeError('a storage that is none')
  kind, dtype, key, _, count = said
  # Types first: text and hash of nested tuples can be endless.
  span = spans.get('data/' + _a(str, key))
  if (
    not isinstance(dtype, _Name)
    or kind != 'storage'
    or dtype not in _STORAGES
    or span is None
  ):
    raise ValueError(f'{path}: its pickle names bytes that are not there')
  start, size = span
  dtype = _STORAGES[dtype]
  if type(count) is not int or count * dtype.itemsize != size:
    raise ValueError(
      f'{path}: {count} items of {dtype} are to lie in {size} bytes'
    )
  return _Storage(dtype, start, count)


class _Storage(tuple):
  def __new__(cls, *parts):
    return super().__new__(cls, parts)


def _made(name: Any, args: Any, path) -> Any:
  """What `name(*args)` stands for."""
  if not isinstance(name, _Name) or not isinstance(args, tuple):
    raise TypeError('a call of no name')
  if name == _DICT and not args:
    return {}
  if name == _PARAMETER:
    return _a(Tensor, args[0])
  if name != _TENSOR:
    raise TypeError(f'a call of {name}')
  if len(args) < 4:
    raise TypeError('a tensor without its shape')
  storage, offset, shape, strides = args[:4]
  dtype, start, count = _a(_Storage, storage)
  numbers = [offset, *_a(tuple, shape), *_a(tuple, strides)]
  if not all(type(x) is int and 0 <= x < 1 << 62 for x in numbers):
    raise TypeError('a shape that is none')
  if len(shape) > 2 or len(strides) != len(shape):
    raise ValueError(f'{path}: a tensor of shape {str(shape)[:80]}')
  if offset + math.prod(shape) > count:
    raise ValueError(f'{path}: a tensor reaches behind its bytes')
  tensor = Tensor(path, dtype, shape, start + offset * dtype.itemsize)
  if _close(shape, strides):
    return tensor
  if len(shape) == 2 and _close(shape[::-1], strides[::-1]):
    return Tensor(path, dtype, shape, tensor.start, across=True)
  raise ValueError(
    f'{path}: a tensor of shape {shape} has strides {strides}: save it with '
    '.contiguous()'
  )


def _close(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
  """Whether the items lie one after another, the last axis fastest."""
  want = 1
  for side, stride in zip(shape[::-1], strides[::-1], strict=True):
    if side != 1 and stride != want:
      return False
    want *= side
  return True
