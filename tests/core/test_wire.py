"""The wire format: arrays come back, torn and foreign bodies are refused."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from lmm_sae.core import wire

ARRAYS = {
  'bytes': np.arange(5, dtype=np.uint8),
  'x': np.arange(6, dtype=np.float32).reshape(3, 2),
  'half': np.array([[1.5], [-2.0]], ml_dtypes.bfloat16),
  'mask': np.array([True, False, True]),
  'none': np.zeros((0, 4), np.int16),
  'scalar': np.array(7, np.int64),
}


def test_arrays_and_header_come_back_as_they_were():
  header = {'rows': [{'image': None, 'prompt': 'wie heißt das? 猫'}], 'n': 2}
  got_header, got = wire.unpack(wire.pack(header, ARRAYS))
  assert got_header == header
  assert got.keys() == ARRAYS.keys()
  for name, array in ARRAYS.items():
    assert got[name].dtype == array.dtype
    assert got[name].flags.writeable
    assert got[name].flags.aligned
    np.testing.assert_array_equal(got[name], array)


def test_a_transposed_array_comes_back_in_its_own_order():
  x_ND = np.arange(6, dtype=np.float32).reshape(3, 2).T
  _, got = wire.unpack(wire.pack({}, {'x': x_ND}))
  np.testing.assert_array_equal(got['x'], x_ND)


def test_any_safetensors_reader_opens_a_body():
  numpy_knows = {k: v for k, v in ARRAYS.items() if k != 'half'}
  got = safetensors.numpy.load(wire.pack({'a': 1}, numpy_knows))
  for name, array in numpy_knows.items():
    np.testing.assert_array_equal(got[name], array)


def body(table, data=b''):
  text = json.dumps(table).encode()
  return struct.pack('<Q', len(text)) + text + data


META = {'__metadata__': {'format_version': '1', 'header': '{}'}}


def entry(dtype, shape, offsets):
  return {
    **META,
    'x': {'dtype': dtype, 'shape': shape, 'data_offsets': offsets},
  }


@pytest.mark.parametrize(
  ('bad', 'says'),
  [
    (b'', 'no safetensors header'),
    (b'1234567', 'no safetensors header'),
    (struct.pack('<Q', 2**60) + b'{}', 'claims'),
    (struct.pack('<Q', 2) + b'[]', 'not a JSON object'),
    (struct.pack('<Q', 2) + b'{,', 'not JSON'),
    (struct.pack('<Q', 3) + b'\xff\xfe{', 'not JSON'),
    (body({}), 'no header'),
    (body({'__metadata__': {'header': '{}'}}), 'format_version'),
    (
      body({'__metadata__': {'format_version': '1', 'header': '{"a": NaN}'}}),
      'NaN',
    ),
    (body(entry('F32', [2], [0, 8]), b'1234'), 'does not fit'),
    (body(entry('F32', [2], [0, 4]), b'1234'), 'does not fit'),
    (body(entry('F32', [-1], [4, 0]), b'1234'), 'does not fit'),
    (body(entry('F32', [True], [0, 4]), b'1234'), 'does not fit'),
    (body(entry('F32', [2**62, 4], [0, 0])), 'does not fit'),
    (body(entry('U8', [2], [-2, 0]), b'1234'), 'does not fit'),
    (body(entry('C64', [1], [0, 8]), bytes(8)), 'bad entry'),
    (body({**META, 'x': [1, 2]}), 'bad entry'),
  ],
)
def test_a_body_that_is_torn_or_foreign_is_refused(bad, says):
  with pytest.raises(ValueError, match=says):
    wire.unpack(bad)


def test_every_torn_end_of_a_body_is_refused():
  whole = wire.pack({'a': 1}, {'x': np.ones(3, np.float32)})
  for stop in range(len(whole)):
    with pytest.raises(ValueError, match=r'header|fit'):
      wire.unpack(whole[:stop])


def test_what_safetensors_lacks_is_refused():
  with pytest.raises(ValueError, match='complex128'):
    wire.pack({}, {'x': np.zeros(2, np.complex128)})
  with pytest.raises(ValueError, match='JSON'):
    wire.pack({'value': float('nan')}, {})


def test_images_travel_without_loss():
  pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
  got = wire.picture(wire.png(Image.fromarray(pixels)))
  np.testing.assert_array_equal(np.asarray(got), pixels)


def test_what_is_no_png_or_too_large_is_refused():
  with pytest.raises(ValueError, match='no PNG'):
    wire.picture(np.frombuffer(b'GIF89a nothing', np.uint8))
  whole = wire.png(Image.new('RGB', (30, 20)))
  with pytest.raises(ValueError, match='no PNG'):
    wire.picture(whole[:40])
  with pytest.raises(ValueError, match='30 x 20'):
    wire.picture(whole, max_pixels=599)
  with pytest.raises(ValueError, match='uint8'):
    wire.picture(np.zeros(3, np.float32))
