import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_sae.sae import model
from lmm_sae.sae.model import SaeConfig
from tests.sae import small
from tests.sae.small import CONFIG, D, M

N = 5


def random_params(seed=0) -> model.Params:
  rng = np.random.default_rng(seed)
  return model.normalise(
    model.Params(
      w_enc_MD=jnp.asarray(rng.normal(size=(M, D)), 'float32'),
      b_enc_M=jnp.asarray(rng.normal(size=M), 'float32'),
      w_dec_MD=jnp.asarray(rng.normal(size=(M, D)), 'float32'),
      b_dec_D=jnp.asarray(rng.normal(size=D), 'float32'),
      theta_M=jnp.zeros(M),
    )
  )


def oracle(params, x_ND, k, among_M=None, minus=0.0):
  """(z_NM, x̂_ND) of a dense TopK SAE in float64; x̂ less `minus` b_dec."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x_ND = np.asarray(x_ND, np.float64)
  pre_NM = (x_ND - p.b_dec_D) @ p.w_enc_MD.T + p.b_enc_M
  z_NM = np.maximum(pre_NM, 0)
  if among_M is not None:
    z_NM = np.where(among_M, z_NM, 0)
  order_NM = np.argsort(-z_NM, axis=1, kind='stable')
  np.put_along_axis(z_NM, order_NM[:, k:], 0, 1)
  return z_NM, z_NM @ p.w_dec_MD + (1 - minus) * p.b_dec_D


@pytest.fixture
def x_ND():
  return jnp.asarray(small.rows(N))


@pytest.mark.parametrize('backend', ['reference', 'cpu'])
def test_a_row_is_coded_and_decoded_as_the_formula_says(x_ND, backend):
  params = random_params()
  code = model.encode(params, x_ND, k=3, backend=backend)
  want_NM, want_ND = oracle(params, x_ND, 3)
  got_NM = np.zeros((N, M))
  np.put_along_axis(got_NM, np.asarray(code.idx_NK), code.vals_NK, 1)
  np.testing.assert_allclose(got_NM, want_NM, atol=1e-5)
  got_ND = model.decode(params, code, backend=backend)
  np.testing.assert_allclose(got_ND, want_ND, atol=1e-5)


def test_decoder_rows_are_brought_to_unit_norm():
  params = model.normalise(
    random_params().replace(w_dec_MD=jnp.full((M, D), 3.0))
  )
  np.testing.assert_allclose(
    np.linalg.norm(params.w_dec_MD, axis=1), 1, rtol=1e-6
  )


def test_a_rescaled_sae_does_the_same_to_longer_rows(x_ND):
  params = random_params()
  longer = model.rescale(params, 7.0)
  code = model.encode(params, x_ND, k=3)
  longer_code = model.encode(longer, 7 * x_ND, k=3)
  np.testing.assert_array_equal(longer_code.idx_NK, code.idx_NK)
  np.testing.assert_allclose(
    longer_code.vals_NK, 7 * code.vals_NK, rtol=1e-5, atol=1e-5
  )
  np.testing.assert_allclose(
    model.decode(longer, longer_code),
    7 * model.decode(params, code),
    rtol=1e-5,
    atol=1e-5,
  )


def test_the_encoder_starts_as_torch_linear_and_the_decoder_as_its_copy():
  params = model.init(CONFIG, jnp.arange(6.0), jax.random.key(0))
  assert np.abs(params.w_enc_MD).max() <= D**-0.5
  norm_M1 = np.linalg.norm(params.w_enc_MD, axis=1)[:, None]
  np.testing.assert_allclose(
    params.w_dec_MD, params.w_enc_MD / norm_M1, rtol=1e-6
  )
  np.testing.assert_array_equal(params.b_enc_M, 0)
  np.testing.assert_array_equal(params.b_dec_D, np.arange(6))


def test_the_geometric_median_does_not_follow_an_outlier():
  x_ND = np.zeros((9, 2), np.float32)
  x_ND[:8] = [
    [1, 2],
    [-1, 2],
    [1, -2],
    [-1, -2],
    [0, 1],
    [0, -1],
    [1, 0],
    [-1, 0],
  ]
  x_ND[8] = [1e4, 0]
  median_D = model.geometric_median(jnp.asarray(x_ND))
  assert np.abs(median_D).max() < 0.5
  assert x_ND.mean(0)[0] > 1000


def test_the_geometric_median_minimises_the_summed_distance():
  x_ND = small.rows(41)

  def distance(at_D):
    return np.linalg.norm(x_ND - at_D, axis=1).sum()

  median_D = np.asarray(model.geometric_median(jnp.asarray(x_ND)))
  for shift_D in 0.01 * np.concatenate([np.eye(D), -np.eye(D)]):
    assert distance(median_D) < distance(median_D + shift_D)


def test_the_geometric_median_of_equal_rows_is_that_row():
  row_D = jnp.arange(6.0)
  np.testing.assert_allclose(
    model.geometric_median(jnp.tile(row_D, (4, 1))), row_D, atol=1e-6
  )


@pytest.mark.parametrize(
  ('field', 'value'),
  [('k', 0), ('k', M + 1), ('latents', 0), ('dead_after', 0)],
)
def test_a_config_out_of_bounds_is_refused(field, value):
  with pytest.raises(ValueError, match=rf'sae\.{field} is {value}'):
    dataclasses.replace(CONFIG, **{field: value})


def test_few_latents_may_all_answer_in_auxk():
  assert SaeConfig(layer=0, width=100, latents=7, k=1).k_aux == 7
