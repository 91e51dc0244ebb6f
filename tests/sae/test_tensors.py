"""Safetensors files read and written piece by piece; damaged ones refused."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmm_sae.sae import tensors

GOOD = {'a': {'dtype': 'F32', 'shape': [2, 3], 'data_offsets': [0, 24]}}


def put(path, table, body: bytes = b'\0' * 24, count: int | None = None):
  text = table if isinstance(table, bytes) else json.dumps(table).encode()
  count = len(text) if count is None else count
  path.write_bytes(struct.pack('<Q', count) + text + body)
  return path


@pytest.mark.parametrize(
  'dtype', [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int32]
)
def test_what_is_written_in_pieces_is_read_by_the_library(tmp_path, dtype):
  whole = np.arange(7 * 5).reshape(7, 5).astype(dtype)
  path = tmp_path / 'x'
  shapes = {'wide': (dtype, (7, 5)), 'turned': (dtype, (5, 7))}
  with tensors.Writer(path, shapes) as file:
    for start, stop in ((4, 7), (0, 1), (1, 4)):
      file.rows('wide', start, whole[start:stop])
      file.columns('turned', start, whole[start:stop])
  back = load_file(path)
  np.testing.assert_array_equal(back['wide'], whole)
  np.testing.assert_array_equal(back['turned'], whole.T)
  found = tensors.find(path, tmp_path)
  assert found['wide'].dtype == np.dtype(dtype)
  np.testing.assert_array_equal(found['wide'].read(2, 6), whole[2:6])
  np.testing.assert_array_equal(found['turned'].T.read(2, 6), whole[2:6])
  np.testing.assert_array_equal(found['turned'].T.T.read(), whole.T)


def test_what_the_library_writes_is_read(tmp_path):
  held = {
    'm': np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32),
    'one': np.array(3.5),
    'none': np.zeros((0, 4), np.float16),
  }
  save_file(held, tmp_path / 'x', metadata={'format': 'pt'})
  found = tensors.find(tmp_path / 'x', tmp_path)
  assert set(found) == set(held)
  for name, array in held.items():
    np.testing.assert_array_equal(found[name].read(), array)


def test_many_columns_are_turned_in_runs(tmp_path, monkeypatch):
  monkeypatch.setattr(tensors, '_COLUMNS', 3)
  whole = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
  with tensors.Writer(tmp_path / 'x', {'t': (np.float32, (8, 4))}) as file:
    file.columns('t', 0, whole[:3])
    file.columns('t', 3, whole[3:])
  tensor = tensors.find(tmp_path / 'x', tmp_path)['t']
  np.testing.assert_array_equal(tensor.read(), whole.T)
  np.testing.assert_array_equal(tensor.T.read(1, 3), whole[1:3])


def changed(**fields):
  return {'a': GOOD['a'] | fields}


@pytest.mark.parametrize(
  ('table', 'message'),
  [
    (changed(dtype='F31'), "dtype 'F31', not known"),
    (changed(dtype=3), "dtype '3', not known"),
    (changed(shape=[2, 4]), r'takes 32 bytes, not 24'),
    (changed(shape=[2, -3]), r'shape is \[2, -3\]'),
    (changed(shape=[2, 1.5]), r'shape is \[2, 1\.5\]'),
    (changed(shape=[2, True]), r'shape is \[2, True\]'),
    (changed(shape='23'), 'shape is 23'),
    (changed(shape=[1] * 9 + [6]), '10 axes'),
    (changed(shape=[1 << 70]), 'shape is'),
    (changed(data_offsets=[-24, 0]), r'data_offsets is \[-24, 0\]'),
    (changed(data_offsets=[24, 0]), 'takes 24 bytes, not -24'),
    (changed(data_offsets=[8, 32]), 'ends at byte 32 of 24.*truncated'),
    (changed(data_offsets=[0]), '1 offsets'),
    (changed(more=1), 'dtype, shape and data_offsets alone'),
    ({'a': 3}, 'dtype, shape and data_offsets alone'),
    ({}, '24 bytes belong to no tensor'),
    (
      {
        'a': {'dtype': 'U8', 'shape': [20], 'data_offsets': [0, 20]},
        'b': {'dtype': 'U8', 'shape': [8], 'data_offsets': [16, 24]},
      },
      "tensor 'b' overlaps another",
    ),
    (
      {
        'a': {'dtype': 'U8', 'shape': [8], 'data_offsets': [0, 8]},
        'b': {'dtype': 'U8', 'shape': [8], 'data_offsets': [16, 24]},
      },
      "tensor 'b' leaves a gap",
    ),
    (b'{"a": 1, "a": 2}', "key 'a' stands there twice"),
    (b'\xff\xfe', 'no JSON'),
    (b'[1]', 'holds no JSON object'),
  ],
)
def test_a_damaged_header_is_refused(tmp_path, table, message):
  path = put(tmp_path / 'x', table)
  with pytest.raises(ValueError, match=message):
    tensors.find(path, tmp_path)


@pytest.mark.parametrize('count', [0, 1, 10_000, 1 << 31, (1 << 64) - 1])
def test_a_header_of_another_length_is_refused(tmp_path, count):
  path = put(tmp_path / 'x', GOOD, count=count)
  with pytest.raises(ValueError, match=f'its header has {count}'):
    tensors.find(path, tmp_path)


def test_a_huge_header_is_not_read(tmp_path):
  path = tmp_path / 'x'
  with open(path, 'wb') as file:
    file.write(struct.pack('<Q', 1 << 30))
    file.truncate((1 << 30) + 100)  # sparse
  with pytest.raises(ValueError, match='at most 16777216 are read'):
    tensors.find(path, tmp_path)


@pytest.mark.parametrize('left', [0, 5, 8, 20, 80, 95])
def test_a_truncated_file_is_refused(tmp_path, left):
  save_file({'a': np.ones((2, 3), np.float32)}, tmp_path / 'x')
  held = (tmp_path / 'x').read_bytes()
  assert len(held) > left
  (tmp_path / 'x').write_bytes(held[:left])
  with pytest.raises(ValueError, match=r'truncated|no safetensors'):
    tensors.find(tmp_path / 'x', tmp_path)


def test_a_file_that_shrinks_after_its_header_is_refused(tmp_path):
  save_file({'a': np.ones((2, 3), np.float32)}, tmp_path / 'x')
  tensor = tensors.find(tmp_path / 'x', tmp_path)['a']
  os.truncate(tmp_path / 'x', tensor.start + 4)
  with pytest.raises(ValueError, match='ends within a tensor'):
    tensor.read()


def test_what_is_no_file_is_refused(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  (tmp_path / 'dir').mkdir()
  for name in ('pipe', 'dir'):
    with pytest.raises(ValueError, match='no file'):
      tensors.find(tmp_path / name, tmp_path)


@pytest.mark.parametrize(
  'file',
  ['/etc/passwd', '../x', 'a/b', '.', '..', 'a\0', '', 7, None, 'missing'],
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path, file):
  index = {'weight_map': {'a': file}}
  (tmp_path / f'x{tensors.INDEX}').write_text(json.dumps(index))
  with pytest.raises(ValueError, match=r'x\.index.*no file name|is missing'):
    tensors.find(tmp_path / 'x', tmp_path)


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path):
  put(tmp_path / 'y', GOOD)
  index = {'weight_map': {'a': 'y', 'b': 'y'}}
  (tmp_path / f'x{tensors.INDEX}').write_text(json.dumps(index))
  with pytest.raises(ValueError, match='y has no b'):
    tensors.find(tmp_path / 'x', tmp_path)
