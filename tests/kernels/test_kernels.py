"""Every backend against the reference, in one body."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmm_sae.kernels import cpu, gpu, gpu_pallas, native, ops, reference

N, D, M = 5, 6, 12
TOLERANCE = {'float32': 2e-6, 'bfloat16': 2e-2}

HERE = sorted(ops.BACKENDS.keys() - ({'native'} if native.why_not() else {}))

SLOW = 'tpu'  # as it is interpreted; test_tpu.py has the tests of every day
backends = pytest.mark.parametrize(
  'backend',
  [pytest.param(x, marks=[pytest.mark.slow] * (x == SLOW)) for x in HERE],
)
dtypes = pytest.mark.parametrize('dtype', sorted(TOLERANCE))
ks = pytest.mark.parametrize('k', [1, 3, M])


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  """Pallas kernels for GPUs run on a CPU, step by step."""
  monkeypatch.setattr(gpu_pallas, 'INTERPRET', True)


def inputs(k, dtype='float32', rows=N, width=D, latents=M):
  """x, w, b and a code with repeated indices, all of `dtype`."""
  rng = np.random.default_rng(0)
  x_ND = jnp.asarray(rng.normal(size=(rows, width)), dtype)
  w_MD = jnp.asarray(rng.normal(size=(latents, width)), dtype)
  b_M = jnp.asarray(rng.normal(size=latents), dtype)
  v_NK = jnp.asarray(rng.normal(size=(rows, k)), dtype)
  i_NK = jnp.asarray(rng.integers(latents, size=(rows, k)), 'int32')
  return x_ND, w_MD, b_M, v_NK, i_NK


def assert_close(got, want, dtype):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a, 'float32'),
      np.asarray(b, 'float32'),
      rtol=TOLERANCE[dtype],
      atol=TOLERANCE[dtype],
    ),
    got,
    want,
  )


def dense_code(v_NK, i_NK, latents=M):
  """The code as a matrix [N, M], by plain indexing."""
  rows = jnp.arange(i_NK.shape[0])[:, None]
  return jnp.zeros((i_NK.shape[0], latents)).at[rows, i_NK].add(v_NK)


@backends
@dtypes
@ks
def test_values_equal_the_reference(backend, dtype, k):
  x_ND, w_MD, b_M, v_NK, i_NK = inputs(k, dtype)
  chosen = {'backend': backend}
  vals_NK, idx_NK = ops.encode(x_ND, w_MD, b_M, k=k, **chosen)
  want_vals_NK, want_idx_NK = reference.encode(x_ND, w_MD, b_M, k=k)
  assert_close(vals_NK, want_vals_NK, dtype)
  np.testing.assert_array_equal(idx_NK, want_idx_NK)
  assert_close(
    (
      ops.spmm(v_NK, i_NK, w_MD, **chosen),
      ops.sddmm(x_ND, i_NK, w_MD, **chosen),
      ops.spmm_t(v_NK, i_NK, x_ND, latents=M, **chosen),
    ),
    (
      reference.spmm(v_NK, i_NK, w_MD),
      reference.sddmm(x_ND, i_NK, w_MD),
      reference.spmm_t(v_NK, i_NK, x_ND, latents=M),
    ),
    dtype,
  )


@backends
@dtypes
@ks
def test_results_are_float32_and_gradients_keep_the_dtype(backend, dtype, k):
  x_ND, w_MD, b_M, *_ = inputs(k, dtype)

  def loss(x_ND, w_MD, b_M):
    v_NK, i_NK = ops.encode(x_ND, w_MD, b_M, k=k, backend=backend)
    assert v_NK.dtype == jnp.float32
    assert i_NK.dtype == jnp.int32
    y_ND = ops.spmm(v_NK, i_NK, w_MD, backend=backend)
    assert y_ND.dtype == jnp.float32
    return jnp.sum(y_ND)

  grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x_ND, w_MD, b_M)
  assert {grad.dtype.name for grad in grads} == {dtype}


@backends
@ks
def test_gradients_equal_those_of_a_dense_formulation(backend, k):
  x_ND, w_MD, b_M, v_NK, i_NK = inputs(k)
  rng = np.random.default_rng(1)
  to_ND = jnp.asarray(rng.normal(size=(N, D)), 'float32')
  to_NK = jnp.asarray(rng.normal(size=(N, k)), 'float32')
  to_MD = jnp.asarray(rng.normal(size=(M, D)), 'float32')
  chosen = {'backend': backend}

  def dense_encode(x_ND, w_MD, b_M):
    z_NM = jax.nn.relu(x_ND @ w_MD.T + b_M)
    top_N1 = jnp.sort(z_NM, -1)[:, -k][:, None]
    return z_NM * (z_NM >= top_N1)

  pairs = [
    (
      lambda x, w, b: (
        dense_code(*ops.encode(x, w, b, k=k, **chosen)) @ to_MD * to_ND
      ),
      lambda x, w, b: dense_encode(x, w, b) @ to_MD * to_ND,
      (x_ND, w_MD, b_M),
    ),
    (
      lambda v, w: ops.spmm(v, i_NK, w, **chosen) * to_ND,
      lambda v, w: dense_code(v, i_NK) @ w * to_ND,
      (v_NK, w_MD),
    ),
    (
      lambda x, w: ops.sddmm(x, i_NK, w, **chosen) * to_NK,
      lambda x, w: jnp.take_along_axis(x @ w.T, i_NK, 1) * to_NK,
      (x_ND, w_MD),
    ),
    (
      lambda v, x: ops.spmm_t(v, i_NK, x, latents=M, **chosen) * to_MD,
      lambda v, x: dense_code(v, i_NK).T @ x * to_MD,
      (v_NK, x_ND),
    ),
  ]
  for sparse, dense, primals in pairs:
    every = tuple(range(len(primals)))
    got = jax.jit(jax.grad(lambda *a, f=sparse: jnp.sum(f(*a)), every))(
      *primals
    )
    want = jax.jit(jax.grad(lambda *a, f=dense: jnp.sum(f(*a)), every))(
      *primals
    )
    assert_close(got, want, 'float32')
    assert max(float(jnp.abs(grad).max()) for grad in want) > 0.1


@backends
@pytest.mark.parametrize(
  ('rows', 'width', 'latents', 'k'),
  [
    *((0, D, M, 3), (1, 1, 1, 1), (1, D, 1, 1), (3, 1, 17, 2)),
    *((2, 5, 1037, 1), (3, 7, 1037, 40), (2, 130, 137, 137)),
  ],
)
def test_odd_shapes_equal_the_reference(backend, rows, width, latents, k):
  """No row, one of a thing, and more of it than whole blocks hold."""
  x_ND, w_MD, b_M, v_NK, i_NK = inputs(k, 'float32', rows, width, latents)
  vals_NK, idx_NK = ops.encode(x_ND, w_MD, b_M, k=k, backend=backend)
  want_vals_NK, want_idx_NK = reference.encode(x_ND, w_MD, b_M, k=k)
  np.testing.assert_allclose(vals_NK, want_vals_NK, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(idx_NK, want_idx_NK)
  for name, one, two, *rest in (
    ('spmm', v_NK, i_NK, w_MD),
    ('sddmm', x_ND, i_NK, w_MD),
    ('spmm_t', v_NK, i_NK, x_ND),
  ):
    more = {'latents': latents} if name == 'spmm_t' else {}
    got = getattr(ops, name)(one, two, *rest, **more, backend=backend)
    want = getattr(reference, name)(one, two, *rest, **more)
    np.testing.assert_allclose(
      got, want, rtol=1e-5, atol=2e-5, err_msg=f'{name} {rows}'
    )


@backends
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_is_told_and_stays_in_its_row(backend, bad):
  """So that a training step sees it, and an index of other rows does not."""
  x_ND, w_MD, b_M, *_ = inputs(3, rows=N, width=8, latents=70)
  x_ND = x_ND.at[2, 5].set(bad)
  got = ops.encode(x_ND, w_MD, b_M, k=3, backend=backend)
  want = reference.encode(x_ND, w_MD, b_M, k=3)
  assert np.isfinite(want[0]).all(1).sum() == N - 1
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  np.testing.assert_array_equal(got[1], want[1])


@backends
def test_ties_go_to_the_lower_index(backend):
  w_MD = jnp.ones((M, D))
  _, idx_NK = ops.encode(
    jnp.ones((N, D)), w_MD, jnp.zeros(M), k=3, backend=backend
  )
  np.testing.assert_array_equal(idx_NK, np.tile([0, 1, 2], (N, 1)))


@backends
def test_rows_with_too_few_positives_are_filled_with_zeros(backend):
  b_M = jnp.full(M, -1.0).at[7].set(2.0)
  vals_NK, idx_NK = ops.encode(
    jnp.zeros((N, D)), jnp.ones((M, D)), b_M, k=3, backend=backend
  )
  np.testing.assert_array_equal(vals_NK, np.tile([2.0, 0, 0], (N, 1)))
  np.testing.assert_array_equal(idx_NK, np.tile([7, 0, 1], (N, 1)))


@backends
def test_no_gradient_flows_through_a_latent_that_did_not_fire(backend):
  b_M = jnp.full(M, -1.0).at[7].set(2.0)

  def total(b_M):
    x_ND, w_MD = jnp.zeros((N, D)), jnp.ones((M, D))
    return jnp.sum(ops.encode(x_ND, w_MD, b_M, k=3, backend=backend)[0])

  want_M = np.zeros(M)
  want_M[7] = N
  np.testing.assert_array_equal(jax.grad(total)(b_M), want_M)


@pytest.mark.parametrize('latents', [512, 517, 1031])
@pytest.mark.parametrize('k', [1, 7])
@pytest.mark.parametrize('spread', [6, 500, 10**6])
@pytest.mark.parametrize('share', [0.03, 1])
def test_the_group_filter_is_exact(latents, k, spread, share):
  """With ties everywhere, which it leaves to lax.top_k, some, and hardly any.

  Where few are not 0, groups of different maxima hold equal values.
  """
  rng = np.random.default_rng(2)
  some_NM = rng.random((40, latents)) < share
  dot_NM = some_NM * rng.integers(-spread, spread, some_NM.shape)
  dot_NM = dot_NM.astype('float32')
  b_M = rng.integers(-3, 3, size=latents) * np.float32(share == 1)
  assert k * cpu.GROUP * 4 <= latents  # the filter runs
  want = jax.lax.top_k(jnp.maximum(dot_NM + b_M, 0), k)
  got = cpu.top_k(jnp.asarray(dot_NM), jnp.asarray(b_M), k=k)
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_the_group_filter_leaves_odd_rows_to_xla(bad):
  rng = np.random.default_rng(3)
  dot_NM = rng.normal(size=(5, 448)).astype('float32')
  dot_NM[2, 30] = dot_NM[3, 7:400] = bad
  want = jax.lax.top_k(jnp.maximum(dot_NM, 0), 7)
  got = cpu.top_k(jnp.asarray(dot_NM), jnp.zeros(448), k=7)
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize('rows', [cpu.ROWS, cpu.ROWS + 3, 2 * cpu.ROWS])
def test_chunks_of_rows_join_up(rows):
  x_ND, w_MD, b_M, *_ = inputs(3, rows=rows, latents=130)
  vals_NK, idx_NK = ops.encode(x_ND, w_MD, b_M, k=3, backend='cpu')
  want_vals_NK, want_idx_NK = reference.encode(x_ND, w_MD, b_M, k=3)
  assert_close(vals_NK, want_vals_NK, 'float32')
  np.testing.assert_array_equal(idx_NK, want_idx_NK)


def test_the_cpu_backend_holds_no_array_of_rows_by_latents():
  rows, latents, k = 4 * cpu.ROWS, 768, 8
  x_ND, w_MD, b_M, *_ = inputs(k, rows=rows, width=32, latents=latents)

  def loss(x_ND, w_MD, b_M):
    code = ops.encode(x_ND, w_MD, b_M, k=k, backend='cpu')
    return jnp.sum(ops.spmm(*code, w_MD, backend='cpu') ** 2)

  text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x_ND, w_MD, b_M).as_text()
  assert f'{rows}x{latents}' not in text
  assert f'{rows}x{k}x32' not in text
  assert f'{cpu.ROWS}x{latents}' in text


def test_auto_on_a_cpu_is_native_where_that_can_be_built(monkeypatch):
  monkeypatch.setattr(native, 'why_not', lambda: '')
  assert ops.backend_name('auto') == 'native'
  monkeypatch.setattr(native, 'why_not', lambda: 'no compiler')
  assert ops.backend_name('auto') == 'cpu'


def test_auto_on_a_gpu_is_gpu_where_that_can_run(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(gpu, 'why_not', lambda: '')
  assert ops.backend_name('auto') == 'gpu'
  monkeypatch.setattr(gpu, 'why_not', lambda: 'it is old')
  assert ops.backend_name('auto') == 'reference'


def test_an_unknown_backend_names_the_flag():
  x_ND, w_MD, b_M, *_ = inputs(3)
  with pytest.raises(NotImplementedError, match=r'--config\.train\.backend='):
    ops.encode(x_ND, w_MD, b_M, k=3, backend='abacus')


@pytest.mark.parametrize('k', [0, M + 1])
def test_k_out_of_bounds_is_refused(k):
  x_ND, w_MD, b_M, *_ = inputs(3)
  with pytest.raises(ValueError, match=f'k is {k}'):
    ops.encode(x_ND, w_MD, b_M, k=k)


def test_a_width_that_does_not_agree_is_refused():
  x_ND, w_MD, b_M, *_ = inputs(3)
  with pytest.raises(ValueError, match='x_ND has shape'):
    ops.encode(x_ND[:, :4], w_MD, b_M, k=3)


@backends
def test_projection_leaves_nothing_along_the_rows(backend):
  rng = np.random.default_rng(0)
  g_MD, w_MD = rng.normal(size=(2, 150, 37)).astype('f')
  w_MD /= np.linalg.norm(w_MD, axis=1, keepdims=True)
  got_MD, squares_M = jax.jit(lambda g, w: ops.project(g, w, backend=backend))(
    g_MD, w_MD
  )
  np.testing.assert_allclose((got_MD * w_MD).sum(1), 0, atol=1e-5)
  want_MD = g_MD - (g_MD * w_MD).sum(1, keepdims=True) * w_MD
  np.testing.assert_allclose(got_MD, want_MD, atol=1e-5)
  np.testing.assert_allclose(squares_M, (want_MD**2).sum(1), rtol=1e-5)


@backends
@pytest.mark.parametrize('shape', [(150, 37), (11,)])
def test_adam_is_that_of_optax(backend, shape):
  rng = np.random.default_rng(0)
  p, *grads = rng.normal(size=(4, *shape)).astype('f')
  optimiser = optax.adam(0.01)
  want, held = p, optimiser.init(p)
  state = (p, np.zeros(shape, 'f'), np.zeros(shape, 'f'))
  step = jax.jit(
    lambda grad, state, count, good: ops.adam(
      grad,
      state,
      count=count,
      factor=jnp.float32(0.5),
      rate=jnp.float32(0.01),
      good=good,
      backend=backend,
    )
  )
  for count, grad in enumerate(grads, 1):
    updates, held = optimiser.update(grad * 0.5, held)
    want = optax.apply_updates(want, updates)
    state = step(grad, state, jnp.int32(count), jnp.bool(True))
    kept = step(grad * np.nan, state, jnp.int32(count), jnp.bool(False))
    jax.tree.map(np.testing.assert_array_equal, kept, state)
  np.testing.assert_allclose(state[0], want, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(state[1], held[0].mu, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(state[2], held[0].nu, rtol=1e-5, atol=1e-6)


@backends
def test_adam_brings_rows_to_unit_norm(backend):
  rng = np.random.default_rng(0)
  state = tuple(rng.random(size=(3, 70, 21)).astype('f'))
  new_MD, *_ = ops.adam(
    state[1],
    state,
    count=jnp.int32(3),
    factor=jnp.float32(1),
    rate=jnp.float32(0.1),
    good=jnp.bool(True),
    unit=True,
    backend=backend,
  )
  np.testing.assert_allclose(np.linalg.norm(new_MD, axis=1), 1, rtol=1e-5)
