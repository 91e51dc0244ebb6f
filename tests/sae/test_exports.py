import json
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmm_sae.sae import exports
from lmm_sae.sae.exports import Sae
from lmm_sae.sae.model import SaeConfig, SparseCode
from tests.sae import small
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
  assert names == ['saelens', 'sparsify']


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


def test_reading_an_sae_imports_no_torch():
  assert 'lmm_sae.sae.exports' in sys.modules
  imported = {
    name for name in vars(exports) if name in ('torch', 'transformers')
  }
  assert not imported
