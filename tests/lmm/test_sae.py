"""The Torch SAE against its formula in numpy, and its reader."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lmm_sae.lmm import sae as saes
from lmm_sae.lmm.sae import Sae
from tests.lmm.conftest import random_sae

N, D, M, K = 7, 6, 12, 3


def dense(sae: Sae, x_ND: np.ndarray) -> np.ndarray:
  """Activations [N, M], by the formula, TopK by a stable sort."""
  w_enc_MD, b_enc_M, _, b_dec_D = (
    t.numpy() for t in (sae.w_enc_MD, sae.b_enc_M, sae.w_dec_MD, sae.b_dec_D)
  )
  act_NM = np.maximum((x_ND - b_dec_D) @ w_enc_MD.T + b_enc_M, 0)
  order_NM = np.argsort(-act_NM, 1, kind='stable')
  np.put_along_axis(act_NM, order_NM[:, sae.k :], 0, 1)
  return act_NM


def spread(code: saes.Code, latents: int) -> np.ndarray:
  """A code as dense activations [N, M]."""
  act_NM = torch.zeros(len(code.vals_NK), latents)
  return act_NM.scatter_add(1, code.idx_NK, code.vals_NK).numpy()


@pytest.fixture
def x_ND() -> np.ndarray:
  return np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)


@pytest.mark.parametrize('k', [1, K, M])
def test_encode_and_decode_follow_the_formula(x_ND, k):
  sae = random_sae(M, D, k)
  code = sae.encode(torch.from_numpy(x_ND))
  assert code.vals_NK.shape == (N, k)
  act_NM = dense(sae, x_ND)
  np.testing.assert_allclose(spread(code, M), act_NM, atol=1e-6)
  assert (np.diff(code.vals_NK.numpy(), axis=1) <= 0).all()
  want_ND = act_NM @ sae.w_dec_MD.numpy() + sae.b_dec_D.numpy()
  np.testing.assert_allclose(sae.decode(code), want_ND, atol=1e-5)


def test_what_is_not_above_its_threshold_does_not_fire(x_ND):
  sae = random_sae(M, D, 5)
  theta_M = torch.linspace(0.1, 1.2, M)
  want_NM = dense(sae, x_ND)
  fewer_NM = np.where(want_NM > theta_M.numpy(), want_NM, 0)
  assert 0 < (fewer_NM > 0).sum() < (want_NM > 0).sum()
  jumps = dataclasses.replace(sae, theta_M=theta_M)
  code = jumps.encode(torch.from_numpy(x_ND))
  np.testing.assert_allclose(spread(code, M), fewer_NM, atol=1e-6)


def test_ties_go_to_the_lower_index():
  eye = torch.eye(D)
  zero_D = torch.zeros(D)
  sae = Sae(eye, zero_D, eye, zero_D, 2)
  x_ND = torch.tensor(
    [[1.0, 3, 3, 3, 0, 3], [2, 2, 2, 2, 2, 2], [0, 0, 0, 0, 5, 0]]
  )
  code = sae.encode(x_ND)
  assert code.idx_NK[:2].tolist() == [[1, 2], [0, 1]]
  assert code.vals_NK.tolist() == [[3, 3], [2, 2], [5, 0]]
  assert code.idx_NK[2, 0] == 4


def test_rows_are_encoded_in_chunks_to_the_same_result(x_ND, monkeypatch):
  sae = random_sae(M, D, K)
  whole = sae.encode(torch.from_numpy(x_ND))
  monkeypatch.setattr(saes, '_PRE_ACTIVATIONS', 2 * M)
  parts = sae.encode(torch.from_numpy(x_ND))
  assert torch.equal(whole.idx_NK, parts.idx_NK)
  torch.testing.assert_close(whole.vals_NK, parts.vals_NK)


def test_no_rows_have_no_code():
  sae = random_sae(M, D, K)
  code = sae.encode(torch.zeros(0, D))
  assert code.vals_NK.shape == (0, K)
  assert sae.decode(code).shape == (0, D)


def test_half_precision_rows_are_encoded_in_float32(x_ND):
  sae = random_sae(M, D, K)
  x_ND = torch.from_numpy(x_ND).bfloat16()
  half, full = sae.encode(x_ND), sae.encode(x_ND.float())
  assert torch.equal(half.vals_NK, full.vals_NK)


def write(folder, sae: Sae, **changes):
  folder.mkdir()
  (folder / 'cfg.json').write_text(json.dumps({'k': sae.k, 'd_in': D}))
  tensors = {
    'encoder.weight': sae.w_enc_MD,
    'encoder.bias': sae.b_enc_M,
    'W_dec': sae.w_dec_MD,
    'b_dec': sae.b_dec_D,
  } | changes
  save_file(
    {k: v for k, v in tensors.items() if v is not None},
    folder / 'sae.safetensors',
  )
  return folder


def test_a_folder_in_sparsify_layout_is_read(tmp_path, x_ND):
  sae = random_sae(M, D, K)
  half = sae.w_dec_MD.bfloat16()
  got = saes.load(write(tmp_path / 'sae', sae, W_dec=half))
  assert (got.latents, got.width, got.k) == (M, D, K)
  assert torch.equal(got.w_dec_MD, half.float())
  assert torch.equal(got.w_enc_MD, sae.w_enc_MD)


def test_thresholds_are_read(tmp_path, x_ND):
  sae = random_sae(M, D, K)
  theta_M = torch.linspace(0.1, 1.2, M)
  folder = write(tmp_path / 'sae', sae, threshold=theta_M)
  assert torch.equal(saes.load(folder).theta_M, theta_M)
  with pytest.raises(ValueError, match=r'threshold \(13,\)'):
    saes.load(write(tmp_path / 'wide', sae, threshold=torch.zeros(M + 1)))
  folder = write(tmp_path / 'none', sae)
  (folder / 'cfg.json').write_text('{"k": 3, "activation": "jumprelu"}')
  with pytest.raises(ValueError, match='a jumprelu SAE has a threshold'):
    saes.load(folder)


def test_what_is_no_sae_is_refused(tmp_path):
  sae = random_sae(M, D, K)
  with pytest.raises(ValueError, match='no cfg'):
    saes.load(tmp_path)
  with pytest.raises(ValueError, match='lacks W_dec'):
    saes.load(write(tmp_path / 'a', sae, W_dec=None))
  with pytest.raises(ValueError, match='encoder'):
    saes.load(write(tmp_path / 'b', sae, b_dec=torch.zeros(D + 1)))
  folder = write(tmp_path / 'c', sae)
  (folder / 'cfg.json').write_text('{"k": 13}')
  with pytest.raises(ValueError, match='k 13 of 12'):
    saes.load(folder)
