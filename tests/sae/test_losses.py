import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_sae.sae.losses import Batch, Weights
from lmm_sae.sae.losses import losses as losses_of
from tests.sae import small
from tests.sae.small import CONFIG, M
from tests.sae.test_model import N, oracle, random_params


def whole(x_ND) -> Batch:
  return Batch(jnp.sum((x_ND - jnp.mean(x_ND, 0)) ** 2), len(x_ND))


def losses(params, x_ND, dead_M, config=CONFIG, batch=None, **weights):
  return losses_of(
    params,
    x_ND,
    dead_M,
    batch or whole(x_ND),
    config=config,
    weights=Weights(**weights),
  )


@pytest.fixture
def x_ND():
  return jnp.asarray(small.rows(N))


def test_the_losses_are_those_of_a_dense_oracle(x_ND):
  params = random_params()
  dead_M = np.arange(M) % 2 == 0
  got, _ = losses(params, x_ND, jnp.asarray(dead_M), auxk=0.5, multi_topk=0.25)
  x = np.asarray(x_ND, np.float64)
  variance = np.square(x - x.mean(0)).sum()
  error_ND = x - oracle(params, x_ND, 3)[1]
  fvu = np.square(error_ND).sum() / variance
  e_hat_ND = oracle(params, x_ND, CONFIG.k_aux, dead_M, minus=1.0)[1]
  auxk = np.square(error_ND - e_hat_ND).sum() / variance
  multi = np.square(x - oracle(params, x_ND, 12)[1]).sum() / variance
  np.testing.assert_allclose(got.fvu, fvu, rtol=1e-5)
  np.testing.assert_allclose(got.auxk, auxk, rtol=1e-5)
  np.testing.assert_allclose(got.multi, multi, rtol=1e-5)
  np.testing.assert_allclose(
    got.total, fvu + 0.5 * auxk + 0.25 * multi, rtol=1e-5
  )


@pytest.mark.parametrize('dead', [1, 3, 4, 11])
def test_auxk_lets_the_strongest_dead_latents_answer(x_ND, dead):
  assert CONFIG.k_aux == 3  # 1 and 3 take the dense way, 4 and 11 the sparse
  params = random_params(seed=1)
  dead_M = np.arange(M) < dead
  got, _ = losses(params, x_ND, jnp.asarray(dead_M), auxk=1.0)
  x = np.asarray(x_ND, np.float64)
  error_ND = x - oracle(params, x_ND, 3)[1]
  e_hat_ND = oracle(params, x_ND, 3, dead_M, minus=1.0)[1]
  want = np.square(error_ND - e_hat_ND).sum() / np.square(x - x.mean(0)).sum()
  np.testing.assert_allclose(got.auxk, want, rtol=1e-5)


def test_auxk_is_nothing_while_all_latents_live(x_ND):
  got, _ = losses(random_params(), x_ND, jnp.zeros(M, bool), auxk=1.0)
  assert got.auxk == 0


@pytest.mark.parametrize('dead', [2, 7])
def test_auxk_teaches_dead_latents_the_error_with_its_own_sign(x_ND, dead):
  params = random_params()
  dead_M = jnp.arange(M) < dead

  def auxk(params):
    return losses(params, x_ND, dead_M, auxk=1.0)[0].auxk

  grads = jax.grad(auxk)(params)
  # Along the descent direction each dead row turns TOWARDS Σ z e.
  _, x_hat_ND = oracle(params, x_ND, CONFIG.k)
  error_ND = np.asarray(x_ND) - x_hat_ND
  z_NM, e_hat_ND = oracle(params, x_ND, 3, np.asarray(dead_M), minus=1.0)
  x = np.asarray(x_ND)
  want_MD = -2 * z_NM.T @ (error_ND - e_hat_ND)
  want_MD /= np.square(x - x.mean(0)).sum()
  np.testing.assert_allclose(grads.w_dec_MD, want_MD, atol=1e-5)
  assert np.abs(want_MD).max() > 0.01
  less = auxk(jax.tree.map(lambda p, g: p - 0.01 * g, params, grads))
  assert less < auxk(params)


@pytest.mark.parametrize('dead', [2, 7])
def test_auxk_leaves_the_living_latents_and_the_bias_alone(x_ND, dead):
  dead_M = jnp.arange(M) < dead

  def auxk(params):
    return losses(params, x_ND, dead_M, auxk=1.0)[0].auxk

  grads = jax.grad(auxk)(random_params())
  for grad in (grads.w_enc_MD, grads.b_enc_M, grads.w_dec_MD):
    assert np.abs(grad[:dead]).max() > 0
    np.testing.assert_array_equal(grad[dead:], 0)
  np.testing.assert_array_equal(grads.b_dec_D, 0)


def test_losses_of_shares_add_up_to_those_of_the_batch(x_ND):
  params = random_params()
  dead_M = jnp.arange(M) < 2
  weights = {'auxk': 1.0, 'multi_topk': 1.0}
  full, _ = losses(params, x_ND, dead_M, **weights)
  batch = whole(x_ND)
  one, _ = losses(params, x_ND[:2], dead_M, batch=batch, **weights)
  two, _ = losses(params, x_ND[2:], dead_M, batch=batch, **weights)
  np.testing.assert_allclose(np.add(one, two), full, rtol=1e-5)


BATCHTOPK = dataclasses.replace(CONFIG, activation='batchtopk')
MATRYOSHKA = dataclasses.replace(CONFIG, prefixes=(2, 5))
JUMPRELU = dataclasses.replace(CONFIG, activation='jumprelu', bandwidth=0.9)
ALIVE_M = jnp.zeros(M, bool)


def dense(params, x_ND, kept_NM, prefixes=()):
  """The fvu, its mean over prefixes, by dense products; JAX differentiates."""
  pre_NM = (x_ND - params.b_dec_D) @ params.w_enc_MD.T + params.b_enc_M
  z_NM = jnp.where(kept_NM, jnp.maximum(pre_NM, 0), 0)
  variance = whole(x_ND).variance
  fvus = []
  for edge in (*prefixes, M):
    x_hat_ND = z_NM[:, :edge] @ params.w_dec_MD[:edge] + params.b_dec_D
    fvus.append(jnp.sum((x_ND - x_hat_ND) ** 2) / variance)
  return sum(fvus) / len(fvus)


def assert_close(one, two):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    one,
    two,
  )


def kept_by(params, x_ND, config):
  """Which latents fire on which rows, in float64."""
  z_NM = oracle(params, x_ND, config.most)[0]
  if config.activation == 'topk':
    return z_NM > 0
  if config.activation == 'jumprelu':
    return z_NM > np.asarray(params.theta_M, np.float64)
  return z_NM >= np.sort(z_NM, None)[-len(x_ND) * config.k]


@pytest.mark.parametrize('config', [BATCHTOPK, MATRYOSHKA])
def test_a_variant_has_the_loss_and_gradients_of_a_dense_one(x_ND, config):
  params = random_params()
  kept_NM = kept_by(params, x_ND, config)
  got, grads = jax.value_and_grad(
    lambda p: losses(p, x_ND, ALIVE_M, config)[0].total
  )(params)
  want, want_grads = jax.value_and_grad(dense)(
    params, x_ND, kept_NM, config.prefixes
  )
  assert_close(got, want)
  assert_close(grads, want_grads)
  terms, code = losses(params, x_ND, ALIVE_M, config)
  assert terms.l0 * N == kept_NM.sum() == np.sum(np.asarray(code.vals_NK) > 0)
  assert terms.l0 == pytest.approx(config.k)


def test_every_prefix_must_explain_the_rows_alone(x_ND):
  terms, _ = losses(random_params(), x_ND, ALIVE_M, MATRYOSHKA)
  assert terms.nested == terms.total
  assert terms.nested != pytest.approx(float(terms.fvu), rel=0.01)
  plain, _ = losses(random_params(), x_ND, ALIVE_M)
  assert plain.fvu == pytest.approx(float(terms.fvu), rel=1e-5)


def test_jumprelu_has_the_loss_and_gradients_of_a_dense_one(x_ND):
  params = random_params()
  theta_M = np.random.default_rng(4).uniform(0.5, 3, M).astype(np.float32)
  params = params.replace(theta_M=jnp.asarray(theta_M))
  config = dataclasses.replace(JUMPRELU, row_k=M)
  kept_NM = kept_by(params, x_ND, config)
  (got, terms), grads = jax.value_and_grad(
    lambda p: (
      (terms := losses(p, x_ND, ALIVE_M, config, sparsity=0.5)[0]).total,
      terms,
    ),
    has_aux=True,
  )(params)
  fvu, want = jax.value_and_grad(dense)(params, x_ND, kept_NM)
  l0 = kept_NM.sum() / N
  assert l0 != config.k
  assert_close(terms.l0, l0)
  assert_close(got, fvu + 0.5 * (l0 / config.k - 1) ** 2)
  assert_close(grads.replace(theta_M=None), want.replace(theta_M=None))
  # Equations 11 and 12 of the paper, with a box of width ε about a threshold.
  z_NM = oracle(params, x_ND, M)[0]
  width = config.bandwidth * config.width**0.5
  near_NM = (z_NM > 0) & (np.abs(z_NM - theta_M) < width / 2)
  z_NM = np.where(kept_NM, z_NM, 0)
  x = np.asarray(x_ND, np.float64)
  slip_ND = x - z_NM @ np.asarray(params.w_dec_MD) - np.asarray(params.b_dec_D)
  pull_NM = -2 * slip_ND @ np.asarray(params.w_dec_MD).T / whole(x_ND).variance
  want_M = -(theta_M / width) * np.sum(near_NM * pull_NM, 0)
  count_M = -np.sum(near_NM, 0) / width
  want_M += 0.5 * 2 * (l0 / config.k - 1) / config.k * count_M / N
  assert near_NM.any(0).sum() >= 3
  assert_close(grads.theta_M, want_M)


def test_a_row_full_of_latents_is_counted(x_ND):
  config = dataclasses.replace(JUMPRELU, row_k=5)
  params = random_params().replace(theta_M=jnp.full(M, 1.0))
  above_N = np.sum(oracle(params, x_ND, M)[0] > 1, 1)
  terms, code = losses(params, x_ND, ALIVE_M, config)
  assert 0 < np.mean(above_N >= 5) < 1
  assert terms.full == pytest.approx(np.mean(above_N >= 5))
  assert code.vals_NK.shape == (N, 5)


def test_products_in_bfloat16_leave_parameters_in_float32(x_ND):
  params = random_params()

  def total(params, dtype):
    batch = whole(x_ND)
    return losses_of(params, x_ND, ALIVE_M, batch, config=CONFIG, dtype=dtype)[
      0
    ].total

  low, low_grads = jax.value_and_grad(total)(params, jnp.bfloat16)
  full, grads = jax.value_and_grad(total)(params, jnp.float32)
  assert low != full
  assert low == pytest.approx(float(full), rel=0.02)
  for a, b in zip(
    jax.tree.leaves(low_grads), jax.tree.leaves(grads), strict=True
  ):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, atol=0.03 * (np.abs(b).max() + 1e-6))
