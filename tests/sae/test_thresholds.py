"""SAEs of other activations than TopK, on disk and off it."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmm_sae.sae import exports
from tests.sae import small
from tests.sae.small import CONFIG, K, M

CONFIGS = {
  'batchtopk': dataclasses.replace(CONFIG, activation='batchtopk', row_k=7),
  'jumprelu': dataclasses.replace(
    CONFIG, activation='jumprelu', row_k=9, prefixes=(2, 5)
  ),
}


@pytest.fixture(params=CONFIGS)
def sae(request) -> exports.Sae:
  return small.random_sae(CONFIGS[request.param])


@pytest.mark.parametrize('at', ['sparsify', 'saelens'])
def test_thresholds_come_back_from_either_layout(tmp_path, sae, at):
  exports.write(sae, tmp_path / 'export')
  back = exports.load(tmp_path / 'export' / at)
  np.testing.assert_array_equal(back.theta_M, sae.theta_M)
  for field in ('activation', 'k', 'most', 'prefixes', 'latents', 'width'):
    assert getattr(back.config, field) == getattr(sae.config, field)
  x_ND = small.rows(40)
  for one, two in zip(back.encode(x_ND), sae.encode(x_ND), strict=True):
    np.testing.assert_array_equal(one, two)


def test_latents_fire_above_their_threshold_as_the_formula_says(sae):
  x_ND = small.rows(40)
  code = sae.encode(x_ND)
  assert code.vals_NK.shape == (40, sae.config.most)
  z_NM = np.maximum((x_ND - sae.b_dec_D) @ sae.w_enc_MD.T + sae.b_enc_M, 0)
  order_NM = np.argsort(-z_NM, 1, kind='stable')
  np.put_along_axis(z_NM, order_NM[:, sae.config.most :], 0, 1)
  z_NM[z_NM <= sae.theta_M] = 0
  got_NM = np.zeros((40, M), np.float32)
  np.put_along_axis(got_NM, code.idx_NK, code.vals_NK, 1)
  np.testing.assert_allclose(got_NM, z_NM, atol=1e-5)
  assert len({np.count_nonzero(row) for row in got_NM}) > 1


def test_saelens_sees_a_jumprelu_sae(tmp_path, sae):
  exports.write(sae, tmp_path)
  cfg = json.loads((tmp_path / 'saelens' / 'cfg.json').read_text())
  assert cfg['architecture'] == 'jumprelu'
  tensors = load_file(tmp_path / 'saelens' / 'sae_weights.safetensors')
  np.testing.assert_array_equal(tensors['threshold'], sae.theta_M)


def test_an_sae_of_this_kind_without_thresholds_is_refused(tmp_path, sae):
  exports.write(sae, tmp_path)
  path = tmp_path / 'sparsify' / 'sae.safetensors'
  tensors = load_file(path)
  del tensors['threshold']
  save_file(tensors, path)
  with pytest.raises(ValueError, match='lacks threshold'):
    exports.load(tmp_path)


def test_a_topk_sae_is_exported_without_thresholds(tmp_path):
  exports.write(small.random_sae(), tmp_path)
  tensors = load_file(tmp_path / 'sparsify' / 'sae.safetensors')
  assert 'threshold' not in tensors
  back = exports.load(tmp_path)
  assert back.config.most == K
  np.testing.assert_array_equal(back.theta_M, 0)
