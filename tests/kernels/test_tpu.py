"""The TPU kernels, interpreted on a CPU and lowered for a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_sae.kernels import (
  cost,
  ops,
  reference,
  tpu,
  tpu_dense,
  tpu_pallas,
  tpu_topk,
)
from tests.kernels.tpu_cases import cases

N, D, M, K = 11, 21, 700, 5


def inputs(dtype='float32', rows=N, latents=M, k=K):
  """x, w, b and a code with repeated indices; small numbers, so sums are exact
  and many activations tie."""
  rng = np.random.default_rng(0)
  x_ND = jnp.asarray(rng.integers(-2, 3, (rows, D)), dtype)
  w_MD = jnp.asarray(rng.integers(-2, 3, (latents, D)), dtype)
  b_M = jnp.asarray(rng.integers(-9, 2, latents), dtype)
  v_NK = jnp.asarray(rng.integers(-4, 5, (rows, k)), 'float32')
  i_NK = jnp.asarray(rng.integers(latents, size=(rows, k)), 'int32')
  return x_ND, w_MD, b_M, v_NK, i_NK


def assert_same(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('k', [1, K, 130, M])
def test_the_largest_and_lowest_of_ties_are_selected(k, dtype):
  x_ND, w_MD, b_M, *_ = inputs(dtype)
  got = jax.jit(functools.partial(tpu.encode, k=k))(x_ND, w_MD, b_M)
  assert_same(got, reference.encode(x_ND, w_MD, b_M, k=k))


def test_thresholds_bracketed_by_groups_are_those_of_whole_rows():
  """As many latents as make groups bound the threshold, and real numbers."""
  rng = np.random.default_rng(1)
  latents, k = 6000, 37
  assert latents // tpu_topk.TILE_M * tpu_topk.LANES > 2 * k
  x_ND = jnp.asarray(rng.normal(size=(3, D)), 'float32')
  w_MD = jnp.asarray(rng.normal(size=(latents, D)), 'float32')
  b_M = jnp.asarray(rng.normal(size=latents) - 1, 'float32')
  encode = jax.jit(functools.partial(tpu.encode, k=k))
  for scale in (1.0, 1e-30, 1e30):
    got = encode(x_ND * scale, w_MD, b_M * scale)
    want = reference.encode(x_ND * scale, w_MD, b_M * scale, k=k)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)


def test_rows_of_one_value_alone_are_told_apart_by_index():
  w_MD, x_ND = jnp.zeros((M, D)), jnp.ones((2, D))
  encode = jax.jit(functools.partial(tpu.encode, k=K))
  for bias in (-1.0, 0.0, 3.0):
    vals_NK, idx_NK = encode(x_ND, w_MD, jnp.full(M, bias))
    np.testing.assert_array_equal(vals_NK, np.full((2, K), max(bias, 0)))
    np.testing.assert_array_equal(idx_NK, [np.arange(K)] * 2)


def test_chunks_of_rows_join_up(monkeypatch):
  x_ND, w_MD, b_M, *_ = inputs(rows=21)
  monkeypatch.setattr(tpu_topk, 'TILE_N', 8)
  monkeypatch.setattr(tpu, 'CHUNK', 8 * 1024)
  got = tpu.encode(x_ND, w_MD, b_M, k=K)
  assert_same(got, reference.encode(x_ND, w_MD, b_M, k=K))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_products_equal_the_reference(dtype):
  x_ND, w_MD, _, v_NK, i_NK = inputs(dtype)
  for name, args, rest in (
    ('spmm', (v_NK, i_NK, w_MD), {}),
    ('sddmm', (x_ND, i_NK, w_MD), {}),
    ('spmm_t', (v_NK, i_NK, x_ND), {'latents': M}),
  ):
    got, want = (
      jax.jit(functools.partial(getattr(backend, name), **rest))(*args)
      for backend in (tpu, reference)
    )
    assert_same(got, want)


def test_rows_of_more_latents_than_a_buffer_holds_come_in_parts(monkeypatch):
  """Three parts of 128, the last not full."""
  monkeypatch.setattr(tpu_pallas, 'BUFFER', 2 * 128 * 8 * 128 * 4)
  x_ND, w_MD, _, v_NK, i_NK = inputs(k=300, rows=3)
  assert_same(tpu.spmm(v_NK, i_NK, w_MD), reference.spmm(v_NK, i_NK, w_MD))
  assert_same(tpu.sddmm(x_ND, i_NK, w_MD), reference.sddmm(x_ND, i_NK, w_MD))


def test_many_entries_of_few_latents_are_summed_up():
  """Runs of 128 entries that neighbours share, and latents without any."""
  x_ND, _, _, v_NK, i_NK = inputs(rows=40, latents=19, k=7)
  i_NK = jnp.where(i_NK > 9, 3, i_NK)
  got = tpu.spmm_t(v_NK, i_NK, x_ND, latents=19)
  assert_same(got, reference.spmm_t(v_NK, i_NK, x_ND, latents=19))
  assert not np.any(got[10:])


@pytest.mark.parametrize('k', [7, 300])
def test_the_dense_forms_equal_the_reference(monkeypatch, k):
  """Of bfloat16, whose small numbers make exact sums; repeated indices add."""
  chip = cost.Device('slow', 'slow', {'bfloat16': 1e30}, 1.0, 1.0)
  monkeypatch.setattr(tpu, 'device', lambda: chip)
  monkeypatch.setattr(cost, 'choose', lambda *_: cost.Choice('dense', 1, 0))
  monkeypatch.setattr(tpu, 'tpu_pallas', None)  # no sparse form runs
  monkeypatch.setattr(tpu_topk, 'TILE_N', 8)
  monkeypatch.setattr(tpu, 'CHUNK', 8 * 1024)
  monkeypatch.setattr(tpu_dense, 'BLOCKS', 8)
  latents = 2000  # two steps of blocks
  x_ND, w_MD, _, v_NK, i_NK = inputs('bfloat16', latents=latents, k=k)
  for name, args, rest in (
    ('spmm', (v_NK, i_NK, w_MD), {}),
    ('sddmm', (x_ND, i_NK, w_MD), {}),
    ('spmm_t', (v_NK, i_NK, x_ND), {'latents': latents}),
  ):
    got, want = (
      jax.jit(functools.partial(getattr(backend, name), **rest))(*args)
      for backend in (tpu, reference)
    )
    assert_same(got, want)


def test_numbers_of_many_bits_are_picked_as_they_are():
  rng = np.random.default_rng(0)
  z_NM = rng.normal(size=(8, 256)).astype('float32') * 1e9
  i_NK = rng.integers(256, size=(8, 5)).astype('int32')
  z_nBRL = jnp.asarray(z_NM.reshape(1, 8, 2, 128).swapaxes(1, 2))
  got_NK = tpu_dense.pick(z_nBRL, jnp.asarray(i_NK))
  np.testing.assert_array_equal(got_NK, np.take_along_axis(z_NM, i_NK, 1))


def test_the_rule_of_costs_chooses_by_the_chips_of_the_mesh(monkeypatch):
  low = jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16)
  assert tpu.form('spmm', low, 8192, 256, 1024) == 'sparse'  # a CPU
  chip = jax.sharding.AbstractDevice('TPU v5 lite', 1, 'tpu')
  mesh = jax.sharding.AbstractMesh((2,), ('data',), abstract_device=chip)
  with jax.sharding.use_abstract_mesh(mesh):
    assert tpu.device() is cost.DEVICES['v5e']
  for name in ('v4', 'v5e', 'v5p'):
    monkeypatch.setattr(tpu, 'device', lambda n=name: cost.DEVICES[n])
    for product in cost.PRODUCTS:
      assert tpu.form(product, low, 8192, 256, 2**17) == 'sparse'
      assert tpu.form(product, low, 8192, 256, 2**14) == 'dense'
    wide = jax.ShapeDtypeStruct((1, 4096), jnp.float32)
    assert tpu.form('spmm', wide, 8192, 256, 2**14) == 'sparse'


def test_what_is_not_a_number_is_selected_first_and_stays_in_its_row():
  x_ND, w_MD, b_M, *_ = inputs(rows=5)
  x_ND = x_ND.at[1, 2].set(jnp.nan).at[3, 4].set(jnp.inf)
  b_M = b_M.at[650].set(jnp.nan).at[33].set(jnp.inf)
  got = jax.jit(functools.partial(tpu.encode, k=K))(x_ND, w_MD, b_M)
  want = reference.encode(x_ND, w_MD, b_M, k=K)
  assert np.isnan(want[0][0, 0])
  assert np.isinf(want[0][0, 1])
  assert_same(
    [a[jnp.array([0, 2, 4])] for a in got],
    [a[jnp.array([0, 2, 4])] for a in want],
  )
  assert np.isnan(got[0][1]).all()


def test_gradients_equal_the_reference():
  x_ND, w_MD, b_M, *_ = inputs(rows=3, latents=40)

  def loss(args, backend):
    x_ND, w_MD, b_M = args
    code = ops.encode(x_ND, w_MD, b_M, k=K, backend=backend)
    return jnp.sum((ops.spmm(*code, w_MD, backend=backend) - x_ND) ** 2)

  got, want = (
    jax.jit(jax.grad(functools.partial(loss, backend=backend)))(
      (x_ND, w_MD, b_M)
    )
    for backend in ('tpu', 'reference')
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3),
    got,
    want,
  )


def calls(name):
  """pallas_calls of a kernel."""
  return 2 if name.startswith('encode') else 1


@pytest.mark.parametrize('case', cases(), ids=lambda case: case.name)
def test_every_kernel_lowers_for_a_tpu_and_says_what_it_costs(case):
  traced = jax.jit(case.function).trace(*case.args)
  text = traced.lower(lowering_platforms=('tpu',)).as_text()
  count = calls(case.name)
  assert text.count('@tpu_custom_call') == count
  assert text.count('cost_estimate') == count


def test_what_does_not_fit_names_the_flag():
  x_ND = jax.ShapeDtypeStruct((8, 128), 'float32')
  w_MD = jax.ShapeDtypeStruct((2**19, 128), 'float32')
  b_M = jax.ShapeDtypeStruct((2**19,), 'float32')
  with pytest.raises(NotImplementedError, match=r'train\.latent_shards'):
    jax.eval_shape(functools.partial(tpu.encode, k=K), x_ND, w_MD, b_M)
  wide = jax.ShapeDtypeStruct((2**10, 2**17), 'float32')
  code = jax.ShapeDtypeStruct((8, 200), 'int32')
  with pytest.raises(NotImplementedError, match=r'train\.backend=reference'):
    jax.eval_shape(tpu.spmm, code, code, wide)
