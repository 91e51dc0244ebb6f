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
