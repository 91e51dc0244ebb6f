import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_sae.sae import activations, model
from lmm_sae.sae.model import SparseCode
from tests.sae import small
from tests.sae.small import CONFIG, M
from tests.sae.test_model import N, random_params


def code_of(rows_NK) -> SparseCode:
  vals_NK = jnp.asarray(rows_NK, jnp.float32)
  columns = jnp.arange(vals_NK.shape[1])
  return SparseCode(vals_NK, jnp.broadcast_to(columns, vals_NK.shape))


def batchtopk(code, k):
  return activations.batchtopk(code, k, (), 1)


def test_batchtopk_shares_the_places_out_over_the_rows():
  code, least = batchtopk(
    code_of([[9, 8, 7, 1], [6, 2, 1, 0], [3, 2, 1, 0]]), 2
  )
  np.testing.assert_array_equal(
    code.vals_NK, [[9, 8, 7, 0], [6, 2, 0, 0], [3, 2, 0, 0]]
  )  # six places, and what ties with the sixth
  assert least == 2


def test_batchtopk_keeps_exactly_as_many_as_there_are_places():
  rng = np.random.default_rng(0)
  vals_NK = -np.sort(-rng.exponential(size=(31, 13)), 1)
  for k in (1, 3, 7, 13):
    code, least = batchtopk(code_of(vals_NK), k)
    want = np.sort(vals_NK.astype(np.float32), None)[-31 * k]
    assert least == want
    assert np.sum(np.asarray(code.vals_NK) > 0) == 31 * k


def test_batchtopk_of_rows_that_hardly_fire_keeps_all_of_them():
  vals_NK = [[5.0, 0, 0], [0, 0, 0]]
  code, least = batchtopk(code_of(vals_NK), 2)
  np.testing.assert_array_equal(code.vals_NK, vals_NK)
  assert least == 0


def test_what_batchtopk_keeps_has_its_gradient_and_the_rest_none():
  vals_NK = jnp.asarray([[4.0, 3, 1], [2, 1, 0.5]])

  def total(vals_NK):
    return jnp.sum(batchtopk(code_of(vals_NK), 1)[0].vals_NK ** 2)

  np.testing.assert_array_equal(
    jax.grad(total)(vals_NK), [[8, 6, 0], [0, 0, 0]]
  )


def test_a_k_that_changes_cuts_a_code_off_as_a_number_does():
  code = model.encode(random_params(), jnp.asarray(small.rows(N)), k=7)
  for k in (1, 4, 7):
    fewer = jax.jit(lambda k: activations.fewer(code, k, ''))(k)
    np.testing.assert_array_equal(fewer.vals_NK[:, :k], code.vals_NK[:, :k])
    np.testing.assert_array_equal(fewer.vals_NK[:, k:], 0)


Z = jnp.asarray([0.0, 0.90, 0.96, 1.0, 1.04, 1.2])
THETA, WIDTH = 1.0, 0.1
NEAR = np.asarray([0, 0, 1, 1, 1, 0])  # within WIDTH / 2 of the threshold


def test_the_jump_lets_through_what_is_above_the_threshold():
  np.testing.assert_allclose(
    activations.jump(Z, THETA, WIDTH), [0, 0, 0, 0, 1.04, 1.2]
  )
  np.testing.assert_array_equal(
    activations.step(Z, THETA, WIDTH), [0, 0, 0, 0, 1, 1]
  )


def test_the_jump_has_the_gradients_of_the_paper():
  theta = jnp.full(Z.shape, THETA)

  def pull(f):
    return jax.vjp(lambda z, theta: f(z, theta, WIDTH), Z, theta)[1]

  up = jnp.arange(1.0, 7)
  dz, dtheta = pull(activations.jump)(up)
  np.testing.assert_allclose(dz, [0, 0, 0, 0, 5, 6])
  np.testing.assert_allclose(dtheta, -THETA / WIDTH * NEAR * up, rtol=1e-6)
  dz, dtheta = pull(activations.step)(up)
  np.testing.assert_array_equal(dz, 0)
  np.testing.assert_allclose(dtheta, -1 / WIDTH * NEAR * up, rtol=1e-6)


def test_a_latent_that_is_off_moves_no_threshold():
  grad = jax.grad(lambda theta: activations.step(0.0, theta, WIDTH))
  assert grad(0.01) == 0


def test_each_latent_has_a_threshold_of_its_own():
  theta_M = jnp.linspace(0, 5, M)
  params = random_params().replace(theta_M=theta_M)
  code = model.encode(params, jnp.asarray(small.rows(N)), k=M)
  fired, count = activations.jumprelu(params, code, 0.1)
  want_NK = np.asarray(code.vals_NK) > np.asarray(theta_M)[code.idx_NK]
  np.testing.assert_array_equal(np.asarray(fired.vals_NK) > 0, want_NK)
  assert count == want_NK.sum()
  assert 0 < want_NK.sum() < (np.asarray(code.vals_NK) > 0).sum()
  np.testing.assert_array_equal(model.fire(params, code).vals_NK, fired.vals_NK)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'activation': 'relu'}, r"sae\.activation is 'relu'; it is one of topk"),
    ({'row_k': 5}, r'sae\.row_k is 5.*every row'),
    ({'activation': 'batchtopk', 'row_k': 2}, r'sae\.row_k is 2.*3\.\.12'),
    ({'prefixes': (4, 4)}, r'sae\.prefixes is \(4, 4\); they must ascend'),
    ({'prefixes': (4, M)}, r'sae\.prefixes'),
    ({'prefixes': (0, 4)}, r'sae\.prefixes'),
    ({'activation': 'jumprelu', 'bandwidth': 0.0}, r'sae\.bandwidth is 0'),
  ],
)
def test_a_variant_out_of_bounds_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **changes)
