import dataclasses
import json
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmm_sae.sae import exports, layouts, mesh, probe
from lmm_sae.sae.exports import Sae
from lmm_sae.sae.model import SaeConfig, SparseCode
from tests.sae import foreign_files, small
from tests.sae.small import D, K, M

N = 5


@pytest.fixture
def sae() -> Sae:
  return small.random_sae()


def assert_equal(one: Sae, two: Sae, **tolerance):
  for name in ('w_enc_MD', 'b_enc_M', 'w_dec_MD', 'b_dec_D', 'theta_M'):
    np.testing.assert_allclose(
      getattr(one, name), getattr(two, name), **(tolerance or {'rtol': 0})
    )


@pytest.mark.parametrize(
  'at', ['export', 'export/sparsify', 'export/saelens', '.']
)
def test_an_export_comes_back_from_either_layout(tmp_path, sae, at):
  exports.write(sae, tmp_path / 'export', step=9)
  back = exports.load(tmp_path / at)
  assert_equal(back, sae)
  assert (back.config.layer, back.config.k) == (small.LAYER, K)


def test_an_export_replaces_the_one_before(tmp_path, sae):
  exports.write(sae, tmp_path / 'export', step=1)
  (tmp_path / 'export' / 'old').write_text('x')
  exports.write(sae, tmp_path / 'export', step=2)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['export']
  names = sorted(p.name for p in (tmp_path / 'export').iterdir())
  assert names == ['README.md', 'saelens', 'sparsify']


def contents(path):
  """{file: bytes} of a folder."""
  return {
    file.relative_to(path): file.read_bytes()
    for file in sorted(path.rglob('*'))
    if file.is_file()
  }


@pytest.mark.parametrize('there', [True, False])
@pytest.mark.parametrize('error', [OSError(28, 'No space left'), KeyError('x')])
def test_an_export_that_fails_leaves_the_one_before(
  tmp_path, sae, monkeypatch, there, error
):
  path = tmp_path / 'sae' / '4' / 'export'
  if there:
    exports.write(sae, path)
  before = contents(tmp_path)

  def fail(*_):
    raise error

  monkeypatch.setattr(probe, 'write', fail)  # the tensors are written by then
  with pytest.raises(type(error)):
    exports.write(small.random_sae(seed=1), path)
  assert contents(tmp_path) == before
  assert bool(list(tmp_path.iterdir())) == there


def test_an_export_whose_last_rename_fails_leaves_the_one_before(
  tmp_path, sae, monkeypatch
):
  exports.write(sae, tmp_path / 'export')
  before = contents(tmp_path)
  rename = pathlib.Path.rename

  def fail(path, target):
    if path.name == 'export.part':
      raise OSError('no')
    return rename(path, target)

  monkeypatch.setattr(pathlib.Path, 'rename', fail)
  with pytest.raises(OSError, match='no'):
    exports.write(small.random_sae(seed=1), tmp_path / 'export')
  assert contents(tmp_path) == before


def test_an_export_killed_between_its_renames_comes_back(tmp_path, sae):
  exports.write(sae, tmp_path / 'export')
  (tmp_path / 'export').rename(tmp_path / 'export.old')
  with pytest.raises(ValueError, match='not finite'):
    exports.write(broken(tmp_path), tmp_path / 'export')
  assert_equal(exports.load(tmp_path / 'export'), sae)
  assert not (tmp_path / 'export.old').exists()


def broken(tmp_path):
  """A source whose decoder is not finite, which is seen when it is read."""
  sae = small.random_sae()
  sae.w_dec_MD[-1, -1] = np.inf
  return layouts.find(foreign_files.sparsify(tmp_path / 'broken', sae))


@pytest.mark.parametrize('stored', [np.float16, ml_dtypes.bfloat16])
def test_a_copy_keeps_the_dtype_and_unknown_settings(tmp_path, sae, stored):
  cfg = {'their': {'own': [1, None, 'é']}, 'normalize_decoder': False}
  folder = foreign_files.sparsify(tmp_path / 'layers.3', sae, stored, **cfg)
  exports.write(layouts.find(folder), tmp_path / 'export')
  for name, tensor in load_file(folder / 'sae.safetensors').items():
    got = load_file(tmp_path / 'export/sparsify/sae.safetensors')[name]
    assert got.dtype == tensor.dtype == np.dtype(stored)
    np.testing.assert_array_equal(got, tensor)
  got = json.loads((tmp_path / 'export/sparsify/cfg.json').read_text())
  assert got['their'] == cfg['their']
  assert got['normalize_decoder'] is False
  assert got['layer'] == 3
  assert_equal(
    exports.load(tmp_path / 'export/saelens'), exports.load(folder), rtol=0
  )


def test_a_copy_keeps_what_saelens_says_of_the_model(tmp_path, sae):
  folder = foreign_files.saelens(tmp_path / 'a', sae, l1_coefficient=5)
  exports.write(layouts.find(folder), tmp_path / 'export')
  got = json.loads((tmp_path / 'export/saelens/cfg.json').read_text())
  assert got['l1_coefficient'] == 5
  assert got['metadata']['model_name'] == 'm'
  got = json.loads((tmp_path / 'export/sparsify/cfg.json').read_text())
  assert got['source_cfg']['l1_coefficient'] == 5
  again = tmp_path / 'again'
  exports.write(layouts.find(tmp_path / 'export'), again)
  assert json.loads((again / 'sparsify/cfg.json').read_text()) == got


def test_the_sparsify_layout_is_the_published_one(tmp_path, sae):
  exports.write(sae, tmp_path)
  tensors = load_file(tmp_path / 'sparsify' / 'sae.safetensors')
  assert {name: t.shape for name, t in tensors.items()} == {
    'encoder.weight': (M, D),
    'encoder.bias': (M,),
    'W_dec': (M, D),
    'b_dec': (D,),
  }
  cfg = json.loads((tmp_path / 'sparsify' / 'cfg.json').read_text())
  assert (cfg['d_in'], cfg['num_latents'], cfg['k']) == (D, M, K)


def test_the_saelens_layout_says_what_its_reader_needs(tmp_path, sae):
  exports.write(sae, tmp_path)
  tensors = load_file(tmp_path / 'saelens' / 'sae_weights.safetensors')
  np.testing.assert_array_equal(tensors['W_enc'], sae.w_enc_MD.T)
  cfg = json.loads((tmp_path / 'saelens' / 'cfg.json').read_text())
  assert cfg['architecture'] == 'topk'
  assert cfg['apply_b_dec_to_input'] is True
  assert int(cfg['metadata']['sae_lens_version'].split('.')[0]) >= 6


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16])
def test_the_sae_of_another_program_is_read(tmp_path, sae, dtype):
  folder = tmp_path / 'model.layers.24'
  folder.mkdir()
  tensors = {
    'encoder.weight': sae.w_enc_MD.astype(dtype),
    'encoder.bias': sae.b_enc_M.astype(dtype),
    'W_dec': sae.w_dec_MD.astype(dtype),
    'b_dec': sae.b_dec_D.astype(dtype),
  }
  save_file(tensors, folder / 'sae.safetensors')
  cfg = {'expansion_factor': 2, 'num_latents': M, 'k': K, 'd_in': D}
  (folder / 'cfg.json').write_text(json.dumps(cfg))
  back = exports.load(folder, layer=24)
  assert back.config == SaeConfig(layer=24, width=D, latents=M, k=K)
  assert back.w_enc_MD.dtype == np.float32
  assert_equal(back, sae, rtol=0.01)


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('skip_connection', True, 'skip_connection'),
    ('activation', 'groupmax', 'groupmax'),
    ('format_version', 7, 'format_version 7'),
    ('k', M + 1, 'sae.k is 13'),
  ],
)
def test_an_sae_that_cannot_be_read_is_refused(
  tmp_path, sae, field, value, message
):
  exports.write(sae, tmp_path)
  path = tmp_path / 'sparsify' / 'cfg.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
  with pytest.raises(ValueError, match=message):
    exports.load(tmp_path)


def test_a_folder_without_an_sae_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r'holds no SAE.*check the path'):
    exports.load(tmp_path / 'nothing')
  (tmp_path / '5').mkdir()
  with pytest.raises(ValueError, match=r'holds no SAE.*lmm-sae train'):
    exports.load(tmp_path)


def test_tensors_that_do_not_agree_are_refused(tmp_path, sae):
  exports.write(sae, tmp_path)
  path = tmp_path / 'sparsify' / 'sae.safetensors'
  tensors = load_file(path)
  save_file(tensors | {'b_dec': np.zeros(D + 1, np.float32)}, path)
  with pytest.raises(ValueError, match='b_dec_D has shape'):
    exports.load(tmp_path)


@pytest.mark.parametrize('rows', [0, 1, N])
def test_rows_are_coded_in_numpy_as_the_formula_says(sae, rows):
  x_ND = small.rows(N)[:rows]
  code = sae.encode(x_ND)
  assert isinstance(code.vals_NK, np.ndarray)
  assert code.vals_NK.shape == code.idx_NK.shape == (rows, K)
  z_NM = np.maximum((x_ND - sae.b_dec_D) @ sae.w_enc_MD.T + sae.b_enc_M, 0)
  order_NK = np.argsort(-z_NM, axis=1, kind='stable')[:, :K]
  np.testing.assert_array_equal(code.idx_NK, order_NK)
  np.testing.assert_allclose(
    code.vals_NK, np.take_along_axis(z_NM, order_NK, 1), rtol=1e-4, atol=1e-5
  )
  want_ND = (
    np.einsum('nk,nkd->nd', code.vals_NK, sae.w_dec_MD[code.idx_NK])
    + sae.b_dec_D
  )
  np.testing.assert_allclose(sae.decode(code), want_ND, rtol=1e-5, atol=1e-5)


def test_rows_are_coded_alike_however_many_come(sae, monkeypatch):
  x_ND = small.rows(21)
  whole = sae.encode(x_ND)
  monkeypatch.setattr(exports, '_ROWS', 8)
  pieces = sae.encode(x_ND.astype(ml_dtypes.bfloat16).astype(np.float32))
  assert pieces.idx_NK.shape == whole.idx_NK.shape
  again = sae.encode(x_ND)
  np.testing.assert_array_equal(again.idx_NK, whole.idx_NK)
  np.testing.assert_allclose(again.vals_NK, whole.vals_NK, rtol=1e-5)


def test_rows_of_another_width_are_refused(sae):
  with pytest.raises(ValueError, match=r'reads \[N, 6\]'):
    sae.encode(np.zeros((2, D + 1), np.float32))


def test_a_code_that_does_not_fire_decodes_to_the_bias(sae):
  code = SparseCode(np.zeros((2, K), np.float32), np.zeros((2, K), np.int32))
  np.testing.assert_array_equal(sae.decode(code), np.tile(sae.b_dec_D, (2, 1)))


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float64', 'int32'])
def test_rows_of_any_number_are_coded(sae, dtype):
  x_ND = (4 * small.rows(N)).astype(dtype)
  code = sae.encode(x_ND)
  want = sae.encode(x_ND.astype(np.float32))
  np.testing.assert_array_equal(code.idx_NK, want.idx_NK)
  assert code.vals_NK.dtype == sae.decode(code).dtype == np.float32


@pytest.mark.parametrize('dtype', ['complex64', 'U3', 'object', 'bool'])
def test_rows_that_are_no_numbers_are_refused(sae, dtype):
  with pytest.raises(ValueError, match='reads real numbers'):
    sae.encode(np.zeros((2, D)).astype(dtype))


@pytest.mark.parametrize('sides', [(1, 4), (2, 2), (4, 1), (3, 2)])
@pytest.mark.parametrize('kind', ['topk', 'batchtopk'])
def test_an_sae_on_a_mesh_does_what_it_does_in_memory(tmp_path, sides, kind):
  config = dataclasses.replace(
    small.CONFIG, activation=kind, row_k=5 if kind == 'batchtopk' else 0
  )
  sae = small.random_sae(config)
  exports.write(sae, tmp_path)
  data, latent = sides
  wide = mesh.make(data * latent, latent)
  spread = exports.load(tmp_path, mesh=wide)
  rows = {shard.data.shape[0] for shard in spread.w_enc_MD.addressable_shards}
  assert rows == {M // latent}
  assert_equal(spread, sae)
  x_ND = small.rows(21)
  one, two = sae.encode(x_ND), spread.encode(x_ND)
  assert isinstance(two.vals_NK, np.ndarray)
  fired_NK = one.vals_NK > 0
  np.testing.assert_array_equal(two.vals_NK > 0, fired_NK)
  np.testing.assert_array_equal(two.idx_NK[fired_NK], one.idx_NK[fired_NK])
  np.testing.assert_allclose(two.vals_NK, one.vals_NK, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
    spread.decode(two), sae.decode(one), rtol=1e-5, atol=1e-5
  )


def test_each_device_reads_its_own_latents_alone(tmp_path, sae):
  folder = foreign_files.sparsify(tmp_path / 'a', sae)
  found, asked = layouts.find(folder), []

  def read(name, start, stop):
    asked.append((name, start, stop))
    return found.read(name, start, stop)

  source = dataclasses.replace(found, read=read)
  exports.take(source, mesh.make(3, 3))
  runs = {(0, 4), (4, 8), (8, 12)}
  for name in ('w_enc_MD', 'w_dec_MD', 'b_enc_M', 'theta_M'):
    assert {at[1:] for at in asked if at[0] == name} == runs


def test_latents_that_devices_cannot_share_are_refused(tmp_path, sae):
  exports.write(sae, tmp_path)
  with pytest.raises(ValueError, match='12 latents cannot be split over 5'):
    exports.load(tmp_path, mesh=mesh.make(5, 5))


def test_rows_that_fire_all_they_may_are_told_of(monkeypatch, caplog):
  monkeypatch.setattr(exports, 'MOST', 5)
  config = dataclasses.replace(small.CONFIG, activation='jumprelu', row_k=5)
  sae = dataclasses.replace(
    small.random_sae(config), b_enc_M=np.full(M, 100, np.float32)
  )
  with caplog.at_level('WARNING', logger='absl'):
    sae.encode(small.rows(7))
  assert '7 of 7 rows fire 5 latents or more' in caplog.text


_API = """
import sys
import numpy as np
from lmm_sae.sae import checkpoint
sae = checkpoint.load(sys.argv[1])
code = sae.encode(np.ones((3, sae.config.width), np.float16))
assert type(code.vals_NK) is type(sae.decode(code)) is np.ndarray
assert not {'torch', 'transformers'} & set(sys.modules)
"""


def test_an_sae_is_used_without_torch(tmp_path, sae, root):
  exports.write(sae, tmp_path / 'export')
  subprocess.run(
    [sys.executable, '-c', _API, tmp_path / 'export'], check=True, cwd=root
  )


@pytest.mark.parametrize('bad', [np.nan, -np.inf, 1e300])
def test_rows_that_are_not_finite_are_refused(bad):
  sae = small.random_sae()
  x_ND = np.zeros((3, sae.config.width))
  x_ND[1, 2] = bad
  with pytest.raises(ValueError, match='rows hold NaN or Inf'):
    sae.encode(x_ND)
