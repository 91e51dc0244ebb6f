"""Files of torch.save are read without pickle: nothing in them is run."""

import io
import os
import pathlib
import pickle
import struct
import subprocess
import zipfile

import numpy as np
import pytest

from lmm_sae.sae import pickles

HEAD = b'\x80\x02'


def archive(path: pathlib.Path, program: bytes, **files: bytes) -> pathlib.Path:
  """A zip as torch.save writes it, around any pickle."""
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as file:
    file.writestr('archive/data.pkl', program)
    for name, held in files.items():
      file.writestr(f'archive/{name}', held)
  return path


class Evil:
  """A pickle of it calls something when it is loaded."""

  def __init__(self, call, *args):
    self.call, self.args = call, args

  def __reduce__(self):
    return self.call, self.args


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize(
  'call',
  [
    lambda trap: Evil(os.system, f'touch {trap}'),
    lambda trap: Evil(subprocess.Popen, ['touch', str(trap)]),
    lambda trap: Evil(eval, f"open('{trap}', 'w').close()"),
    lambda trap: Evil(pathlib.Path.touch, trap),
    lambda trap: {'b_dec': Evil(exec, f"open('{trap}', 'w').close()")},
  ],
)
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, call, protocol):
  trap = tmp_path / 'trap'
  program = pickle.dumps(call(trap), protocol)
  if protocol == 2:  # it does what it says where it is loaded
    made = pickle.loads(program)
    if isinstance(made, subprocess.Popen):
      made.wait()
    assert trap.exists()
    trap.unlink()
  path = archive(tmp_path / 'ae.pt', program)
  with pytest.raises(ValueError, match='nothing of it was run'):
    pickles.find(path, tmp_path)
  assert not trap.exists()


def tensor(
  count=6, shape=(2, 3), strides=(3, 1), offset=0, kind='FloatStorage', key='0'
) -> bytes:
  """The pickle of {'w': tensor}, as torch.save writes it."""
  out = io.BytesIO()
  out.write(HEAD + b'}X\x01\x00\x00\x00w')
  out.write(b'ctorch._utils\n_rebuild_tensor_v2\n((')
  for word in ('storage',):
    out.write(text(word))
  out.write(b'ctorch\n' + kind.encode() + b'\n')
  out.write(text(key) + text('cpu') + number(count) + b'tQ')
  out.write(number(offset))
  for side in (shape, strides):
    out.write(b'(' + b''.join(map(number, side)) + b't')
  out.write(b'\x89ccollections\nOrderedDict\n)RtRs.')
  return out.getvalue()


def text(word: str) -> bytes:
  return b'X' + struct.pack('<I', len(word)) + word.encode()


def number(value: int) -> bytes:
  if -(1 << 31) <= value < 1 << 31:
    return b'J' + struct.pack('<i', value)
  return pickle.dumps(value, 2)[2:-1]


def test_a_tensor_is_read_where_it_lies(tmp_path):
  held = np.arange(8, dtype=np.float32)
  program = tensor(8, offset=1)
  path = archive(tmp_path / 'a', program, **{'data/0': held.tobytes()})
  found = pickles.find(path, tmp_path)['w']
  np.testing.assert_array_equal(found.read(), held[1:7].reshape(2, 3))
  np.testing.assert_array_equal(found.read(1, 2), held[4:7].reshape(1, 3))


def test_a_tensor_that_lies_across_is_read(tmp_path):
  held = np.arange(6, dtype=np.float32)
  program = tensor(shape=(3, 2), strides=(1, 3))
  path = archive(tmp_path / 'a', program, **{'data/0': held.tobytes()})
  found = pickles.find(path, tmp_path)['w']
  np.testing.assert_array_equal(found.read(1, 3), held.reshape(2, 3).T[1:])


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'count': 7}, '7 items of float32 are to lie in 24 bytes'),
    ({'offset': 1}, 'reaches behind its bytes'),
    ({'offset': -1}, 'damaged'),
    ({'shape': (2, 1 << 40)}, 'reaches behind its bytes'),
    ({'shape': (-2, -3)}, 'damaged'),
    ({'shape': (1, 2, 3), 'strides': (6, 3, 1)}, 'a tensor of shape'),
    ({'strides': (0, 0)}, r'save it with \.contiguous'),
    ({'strides': (3,)}, 'a tensor of shape'),
    ({'kind': 'QInt8Storage'}, "asks for 'torch.QInt8Storage'"),
    ({'key': '1'}, 'names bytes that are not there'),
    ({'key': '../../x'}, 'names bytes that are not there'),
  ],
)
def test_a_tensor_that_is_not_in_the_file_is_refused(tmp_path, fields, message):
  program = tensor(**fields)
  path = archive(tmp_path / 'a', program, **{'data/0': bytes(24)})
  with pytest.raises(ValueError, match=message):
    pickles.find(path, tmp_path)


@pytest.mark.parametrize(
  'program',
  [
    b'',
    b'.',
    HEAD,
    HEAD + b'}',
    HEAD + b's.',
    HEAD + b'h\x05.',
    HEAD + b't.',
    HEAD + b'(K\x01u.',
    HEAD + b'}K\x01K\x02s' + b'R.',
    HEAD + b'}X\x01\x00\x00\x00aK\x01sX\x01\x00\x00\x00aK\x02s.',
    HEAD + b'}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u.',
    HEAD + b'K\x01.',
    HEAD + b'}(K\x01K\x02u.',
    HEAD + b'K\x02K\x01b.',
    HEAD + b'\xff.',
  ],
)
def test_a_pickle_that_makes_no_sense_is_refused(tmp_path, program):
  path = archive(tmp_path / 'a', program)
  with pytest.raises(ValueError, match=r'pickle|no dict') as caught:
    pickles.find(path, tmp_path)
  assert str(path) in str(caught.value)


def test_tuples_that_hold_themselves_many_times_do_not_hang(tmp_path):
  # t = ((), ()), t = (t, t), ... 60 times: its text would have 2**60 letters.
  grown = b')' + b'q\x00h\x00\x86' * 60
  for where in (
    HEAD + grown + b'.',
    HEAD + b'}' + grown + b'K\x01s.',
    HEAD + b'(' + text('storage') + grown + text('0') + text('c') + b'K\x06tQ.',
    HEAD + b'(' + text('storage') + text('x') + grown + grown + b'K\x06tQ.',
    HEAD + b'ctorch._utils\n_rebuild_tensor_v2\n' + b'(' + grown * 4 + b'tR.',
  ):
    with pytest.raises(ValueError, match=r'pickle|no dict'):
      pickles.find(archive(tmp_path / 'a', where), tmp_path)


def test_a_zip_that_torch_would_not_write_is_refused(tmp_path):
  path = tmp_path / 'a'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
    file.writestr('archive/data.pkl', tensor())
    file.writestr('archive/data/0', bytes(24))
  with pytest.raises(ValueError, match='is compressed'):
    pickles.find(path, tmp_path)
  archive(path, tensor(), **{'data/0': bytes(24), 'x/data.pkl': b''})
  assert set(pickles.find(path, tmp_path)) == {'w'}
  archive(path, tensor(), **{'data/0': bytes(24), 'byteorder': b'big'})
  with pytest.raises(ValueError, match='not little-endian'):
    pickles.find(path, tmp_path)
  path.write_bytes(b'PK\x03\x04 and no more')
  with pytest.raises(ValueError, match='no zip'):
    pickles.find(path, tmp_path)
