"""Arrays and a JSON header as one body of bytes, in the safetensors layout.

Any safetensors reader opens what `pack` makes; the header stands as one JSON
string in `__metadata__`. bfloat16 travels as it is, which the numpy reader of
safetensors itself cannot do. Images travel as PNG bytes, never as paths.
"""

import io
import json
import struct
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from PIL import Image

from lmm_sae.core.tokens import ARRAYS, TokenMap

FORMAT_VERSION = 1

DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'I64': np.dtype(np.int64),
  'I32': np.dtype(np.int32),
  'I16': np.dtype(np.int16),
  'I8': np.dtype(np.int8),
  'U64': np.dtype(np.uint64),
  'U32': np.dtype(np.uint32),
  'U16': np.dtype(np.uint16),
  'U8': np.dtype(np.uint8),
  'BOOL': np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_META = '__metadata__'


def pack(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
  """The header and the arrays as bytes.

  Wide dtypes come first, so that every array lies on a multiple of its item.

  Raises:
    ValueError: a dtype that safetensors lacks, or a header with NaN in it.
  """
  table: dict[str, Any] = {
    _META: {
      'format_version': str(FORMAT_VERSION),
      'header': json.dumps(header, ensure_ascii=False, allow_nan=False),
    }
  }
  buffers, end = [], 0
  ordered = sorted(
    arrays.items(), key=lambda kv: (-kv[1].dtype.itemsize, kv[0])
  )
  for name, array in ordered:
    if name == _META or array.dtype not in _NAMES:
      raise ValueError(f'array {name!r} of {array.dtype} cannot be packed')
    buffers.append(np.ascontiguousarray(array).tobytes())
    start, end = end, end + array.nbytes
    table[name] = {
      'dtype': _NAMES[array.dtype],
      'shape': list(array.shape),
      'data_offsets': [start, end],
    }
  text = json.dumps(table, ensure_ascii=False).encode()
  text += b' ' * (-len(text) % 8)
  return b''.join([struct.pack('<Q', len(text)), text, *buffers])


def unpack(body: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The header and the arrays of a body made by `pack`; the arrays are ours.

  Raises:
    ValueError: the body is torn, is not of this layout or version, or has NaN
      in its header.
  """
  if len(body) < 8:
    raise ValueError(f'the body of {len(body)} bytes has no safetensors header')
  (length,) = struct.unpack_from('<Q', body)
  if length > len(body) - 8:
    raise ValueError(
      f'the safetensors header claims {length} of {len(body)} bytes'
    )
  table = _object(bytes(body[8 : 8 + length]), 'the safetensors header')
  meta = table.pop(_META, None)
  if not isinstance(meta, dict) or not isinstance(meta.get('header'), str):
    raise ValueError(f'the body has no header in {_META}')
  if meta.get('format_version') != str(FORMAT_VERSION):
    raise ValueError(
      f'the body has format_version {meta.get("format_version")!r}, this '
      f'reader knows {FORMAT_VERSION}'
    )
  data = np.frombuffer(bytearray(memoryview(body)[8 + length :]), np.uint8)
  arrays = {name: _array(name, entry, data) for name, entry in table.items()}
  return _object(meta['header'].encode(), 'the header'), arrays


def _array(name: str, entry: Any, data: np.ndarray) -> np.ndarray:
  """One array of the table, a view of `data`."""
  try:
    dtype, shape = DTYPES[entry['dtype']], entry['shape']
    start, end = entry['data_offsets']
    whole = all(type(n) is int and n >= 0 for n in (start, end, *shape))
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f'array {name!r} has a bad entry: {entry}') from error
  size = dtype.itemsize
  for n in shape if whole else ():
    size *= n
  if not whole or end - start != size or end > data.size:
    raise ValueError(f'array {name!r} does not fit its bytes: {entry}')
  return data[start:end].view(dtype).reshape(shape)


def _object(text: bytes, what: str) -> dict[str, Any]:
  """A JSON object without NaN and infinities."""

  def refuse(constant: str):
    raise ValueError(f'{constant} is not JSON')

  try:
    value = json.loads(text.decode(), parse_constant=refuse)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{what} is not JSON: {error}') from error
  if not isinstance(value, dict):
    raise ValueError(f'{what} is not a JSON object')
  return value


def png(image: Image.Image) -> np.ndarray:
  """An image as the bytes of an RGB PNG, uint8 [bytes]."""
  out = io.BytesIO()
  image.convert('RGB').save(out, 'PNG', compress_level=1)
  return np.frombuffer(out.getvalue(), np.uint8)


def picture(data: np.ndarray, max_pixels: int = 2**26) -> Image.Image:
  """The RGB image in the bytes of a PNG.

  Raises:
    ValueError: they are no PNG, or one of more than `max_pixels`.
  """
  if data.dtype != np.uint8 or data.ndim != 1:
    raise ValueError(
      f'image bytes are {data.dtype} {data.shape}, not uint8 [n]'
    )
  try:
    image = Image.open(io.BytesIO(data.tobytes()), formats=['PNG'])
    if image.width * image.height > max_pixels:
      raise ValueError(
        f'the image has {image.width} x {image.height} pixels, the limit is '
        f'{max_pixels} in all: send a smaller one'
      )
    return image.convert('RGB')
  except (OSError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(f'the image bytes are no PNG: {error}') from error


def token_arrays(token_map: TokenMap, key: str) -> dict[str, np.ndarray]:
  """A token map as named arrays of a body, its grid aside."""
  return {f'{name}_{key}': getattr(token_map, name) for name in ARRAYS}


def token_map(
  arrays: dict[str, np.ndarray], key: str, grid: Sequence[int]
) -> TokenMap:
  """The map of `token_arrays`."""
  fields = {name: arrays[f'{name}_{key}'] for name in ARRAYS}
  return TokenMap(grid=(grid[0], grid[1]), **fields)
