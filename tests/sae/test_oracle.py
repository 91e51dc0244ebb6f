"""Whole optimiser steps against float64 NumPy, on one device and on many."""

import dataclasses

import numpy as np
import pytest

from tests.sae import small
from tests.sae.oracle import Oracle
from tests.sae.small import CONFIG, TRAIN, M
from tests.sae.test_trainer import N, begin

STEPS = 5
# A schedule that rises and falls within five steps, each made of two pieces;
# gradients exceed the clip in some steps and not in others.
OPTIONS = dataclasses.replace(TRAIN, steps=6, warmup=2, auxk=0.5, accumulate=2)
MULTI = dataclasses.replace(OPTIONS, multi_topk=0.25)
SMALL = dataclasses.replace(CONFIG, dead_after=40)  # dead in three steps
CASES = {
  'topk': (SMALL, MULTI, 0.8),
  'batchtopk': (
    dataclasses.replace(SMALL, activation='batchtopk', row_k=7),
    OPTIONS,
    0.64,
  ),
  'jumprelu': (
    dataclasses.replace(SMALL, activation='jumprelu', row_k=9, bandwidth=0.3),
    OPTIONS,
    1.0,
  ),
  'matryoshka': (dataclasses.replace(SMALL, prefixes=(3, 7)), OPTIONS, 0.55),
  'both': (
    dataclasses.replace(SMALL, activation='batchtopk', prefixes=(5,)),
    OPTIONS,
    0.55,
  ),
  'falling k': (  # from above 4 k
    dataclasses.replace(SMALL, k=2),
    dataclasses.replace(MULTI, k_from=11, k_steps=3),
    1.0,
  ),
}
SIZES = [(1, 1), (8, 4), (8, 2), (2, 1), (6, 6)]
RARE = ('both', 'falling k')  # what is common is in the others


@pytest.mark.parametrize(
  ('name', 'devices', 'latent'),
  [
    pytest.param(
      name, *size, marks=[pytest.mark.slow] * (i > 1 or name in RARE)
    )
    for name in CASES
    for i, size in enumerate(SIZES)
  ],
)
def test_steps_equal_a_float64_oracle(name, devices, latent):
  config, options, clip = CASES[name]
  options = dataclasses.replace(options, clip=clip)
  for dead in (2, 5):  # AuxK's dense way and its sparse one: k_aux is 3
    idle_M = np.where(np.arange(M) % 7 < dead - 1, 41, 0).astype(np.int32)
    state, step = begin(options, config, devices, latent, idle_M=idle_M)
    oracle = Oracle(config, options, state)
    clipped = []
    for seed in range(STEPS):
      x_ND = small.rows(N, seed)
      want = oracle.step(x_ND)
      state, got = step(state, x_ND)
      clipped.append(want['grad_norm'] > options.clip)
      for term in ('fvu', 'auxk', 'multi', 'grad_norm', 'lr', 'dead', 'l0'):
        np.testing.assert_allclose(
          got[term], want[term], rtol=2e-4, atol=1e-6, err_msg=term
        )
    assert 0 < sum(clipped) < STEPS
    assert oracle.idle_M.max() > 0
    np.testing.assert_array_equal(state.idle_M, oracle.idle_M)
    # Adam's steps are ± lr where a gradient is far above its eps of 1e-8, so
    # the tolerance is a hundredth of the largest lr.
    for field, value in oracle.p.items():
      np.testing.assert_allclose(
        getattr(state.params, field), value, atol=1e-4, err_msg=field
      )


@pytest.mark.parametrize('name', ['topk'])
def test_bfloat16_products_have_the_gradients_of_rounded_factors(name):
  """The oracle rounds what bfloat16 rounds, and keeps sums in float64."""
  config, options, _ = CASES[name]
  options = dataclasses.replace(options, compute='bfloat16', clip=1e3)
  idle_M = np.where(np.arange(M) < 2, 41, 0).astype(np.int32)
  state, step = begin(options, config, idle_M=idle_M)
  oracle = Oracle(config, options, state)
  x_ND = small.rows(N, 3)
  want = oracle.step(x_ND)
  state, got = step(state, x_ND)
  for term in ('fvu', 'auxk', 'multi'):
    np.testing.assert_allclose(got[term], want[term], rtol=1e-3, err_msg=term)
  for field, value in oracle.grads.items():
    found = np.asarray(getattr(state.opt_state.mu, field)) / 0.1
    near = 2**-7 * np.abs(value).max()  # a bfloat16 has 8 bits
    np.testing.assert_allclose(found, value, atol=near, err_msg=field)
