"""Training SAEs other than plain TopK, and from other starts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_sae.sae import exports, model, trainer
from lmm_sae.sae import options as options_lib
from tests.sae import small
from tests.sae.small import CONFIG, TRAIN, K, M
from tests.sae.test_trainer import FULL, N, begin

VARIANTS = {
  'batchtopk': dataclasses.replace(CONFIG, activation='batchtopk'),
  'jumprelu': dataclasses.replace(
    CONFIG, activation='jumprelu', row_k=M, bandwidth=0.3
  ),
  'matryoshka': dataclasses.replace(CONFIG, prefixes=(3, 7)),
  'both': dataclasses.replace(CONFIG, activation='batchtopk', prefixes=(5,)),
}
PLAIN = dataclasses.replace(FULL, multi_topk=0.0)


def trained(options, config=CONFIG, steps=3, **where):
  """The state and metrics after some steps."""
  state, step = begin(options, config, **where)
  for seed in range(steps):
    state, metrics = step(state, small.rows(N, seed))
  return jax.device_get((state, metrics))


def assert_alike(one, many):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    (one[0].params, one[1]),
    (many[0].params, many[1]),
  )
  np.testing.assert_array_equal(one[0].idle_M, many[0].idle_M)


@pytest.mark.parametrize('name', ['batchtopk', 'jumprelu'])
def test_pieces_are_of_the_same_rows_however_many_devices_share(name):
  """What spans the rows of a piece, a threshold or l0, is the same."""
  options = dataclasses.replace(PLAIN, accumulate=2)
  one = trained(options, VARIANTS[name], steps=2)
  assert_alike(one, trained(options, VARIANTS[name], steps=2, devices=2))


def test_many_devices_equal_one_while_k_falls():
  options = dataclasses.replace(PLAIN, k_from=9, k_steps=2)
  assert_alike(trained(options), trained(options, devices=4, latent=2))


def test_k_falls_on_a_line_to_its_value():
  options = dataclasses.replace(TRAIN, k_from=11, k_steps=4)
  ks = [
    int(options_lib.current_k(jnp.asarray(at), options=options, k=K))
    for at in range(7)
  ]
  assert ks == [11, 9, 7, 5, 3, 3, 3]


def test_more_latents_fire_while_k_falls():
  options = dataclasses.replace(PLAIN, k_from=9, k_steps=3)
  state, step = begin(options)
  params = state.params.replace(b_enc_M=jnp.full(M, 9.0))  # all of them can
  state = state.replace(params=params)
  fired = []
  for seed in range(5):
    state, metrics = step(state, small.rows(N, seed))
    fired.append(float(metrics['l0']))
  assert fired == [9, 7, 5, 3, 3]


@pytest.mark.parametrize('name', VARIANTS)
def test_every_variant_learns_and_fires_k_times_a_row(name):
  """Its export, too, which reads one row at a time."""
  config = VARIANTS[name]
  options = dataclasses.replace(PLAIN, steps=400, sparsity=2.0)
  state, step = begin(options, config)
  fvus, l0s = [], []
  for seed in range(400):
    state, metrics = step(state, small.rows(N, seed))
    fvus.append(float(metrics['fvu']))
    l0s.append(float(metrics['l0']))
  assert np.mean(fvus[-40:]) < 0.6 * np.mean(fvus[:10])
  sae = exports.of(config, state)
  x_ND = small.rows(500, seed=7000)
  code = sae.encode(x_ND)
  l0 = np.mean(np.sum(code.vals_NK > 0, 1))
  assert l0 == pytest.approx(K, rel=0.15)
  fvu = np.square(x_ND - sae.decode(code)).sum()
  fvu /= np.square(x_ND - x_ND.mean(0)).sum()
  assert fvu == pytest.approx(np.mean(fvus[-40:]), rel=0.25)


@pytest.mark.parametrize('name', ['batchtopk', 'jumprelu'])
def test_thresholds_stay_where_a_batch_is_not_finite(name):
  state, step = begin(PLAIN, VARIANTS[name])
  state, _ = step(state, small.rows(N, 0))
  before = np.asarray(state.params.theta_M)
  assert (before > 0).any()
  x_ND = small.rows(N, 1)
  x_ND[2, 1] = np.nan
  state, metrics = step(state, x_ND)
  assert metrics['skipped'] == 1
  np.testing.assert_array_equal(state.params.theta_M, before)


def test_training_in_bfloat16_keeps_masters_in_float32():
  options = dataclasses.replace(PLAIN, compute='bfloat16')
  low, full = trained(options, steps=60), trained(PLAIN, steps=60)
  for leaf in jax.tree.leaves((low[0].params, low[0].opt_state.mu)):
    assert leaf.dtype == np.float32
  assert not np.array_equal(low[0].params.w_enc_MD, full[0].params.w_enc_MD)
  # Steps of lr · 1e-2 and less, which bfloat16 would lose, add up.
  assert low[1]['fvu'] == pytest.approx(float(full[1]['fvu']), rel=0.1)


@pytest.mark.parametrize('normalise', [True, False])
def test_training_goes_on_from_an_sae_that_is_given(normalise):
  sae = small.random_sae()
  x_ND = small.rows(200)
  state = trainer.start(CONFIG, x_ND, 0, normalise=normalise, given=sae.params)
  back = exports.of(CONFIG, state)
  norm_M1 = np.linalg.norm(sae.w_dec_MD, axis=1, keepdims=True)
  assert norm_M1.max() > 1.5 * norm_M1.min()
  np.testing.assert_allclose(back.w_dec_MD, sae.w_dec_MD / norm_M1, rtol=1e-5)
  np.testing.assert_allclose(back.b_dec_D, sae.b_dec_D, rtol=1e-5)

  def every(sae):  # of the latents may fire
    z_NM = np.maximum((x_ND - sae.b_dec_D) @ sae.w_enc_MD.T + sae.b_enc_M, 0)
    return z_NM @ sae.w_dec_MD

  np.testing.assert_allclose(every(back), every(sae), rtol=1e-3, atol=1e-4)


def test_a_topk_sae_that_is_given_gets_thresholds_for_jumprelu():
  config = VARIANTS['jumprelu']
  x_ND = small.rows(400)
  sae = small.random_sae()
  state = trainer.start(config, x_ND, 0, normalise=True, given=sae.params)
  theta_M = np.asarray(state.params.theta_M)
  assert (theta_M == theta_M[0]).all()
  assert theta_M[0] > 0
  code = model.fire(
    state.params, model.encode(state.params, x_ND * state.scale, k=M)
  )
  l0 = np.mean(np.sum(np.asarray(code.vals_NK) > 0, 1))
  assert l0 == pytest.approx(K, rel=0.4)


@pytest.mark.parametrize(
  ('changes', 'config', 'message'),
  [
    ({'k_from': 2, 'k_steps': 5}, CONFIG, r'train\.k_from is 2.*3\.\.12'),
    ({'k_from': 8}, CONFIG, r'set both, or none'),
    (
      {'multi_topk': 0.125},
      VARIANTS['batchtopk'],
      r'train\.multi_topk is 0\.125.*it is for topk',
    ),
    ({'compute': 'float16'}, CONFIG, r"train\.compute is 'float16'"),
    ({'sparsity': -1.0}, CONFIG, r'train\.sparsity is -1'),
  ],
)
def test_options_that_exclude_one_another_are_refused(changes, config, message):
  with pytest.raises(ValueError, match=message):
    begin(dataclasses.replace(TRAIN, **changes), config)
