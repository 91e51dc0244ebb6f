"""The GPU backend on a CPU: its selection, its forms, and its lowering.

What every backend has in common is in test_kernels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lmm_sae.kernels import cost, gpu, gpu_pallas, gpu_topk, ops, reference

N, D, M, K = 5, 7, 3001, 33


@pytest.fixture
def interpreted(monkeypatch):
  monkeypatch.setattr(gpu_pallas, 'INTERPRET', True)
  monkeypatch.setattr(gpu_topk, 'LEAST_GROUPS', 256)  # 12 latents a group


def rows(kind: str) -> np.ndarray:
  """Pre-activations [N, M] that are hard to select from, each in its way."""
  rng = np.random.default_rng(0)
  z_NM = rng.normal(size=(N, M)).astype('f')
  in_few_groups_M = np.arange(M) % 256 < 6
  return {
    'random': z_NM,
    'descending': -np.sort(-np.abs(z_NM), 1),
    'integers': rng.integers(0, 4, (N, M)).astype('f'),
    'constant': np.ones_like(z_NM),
    'negative': -np.abs(z_NM),
    'sparse': np.where(rng.random((N, M)) < 0.003, np.abs(z_NM), -1),
    'crowded': np.where(in_few_groups_M, np.abs(z_NM) + 5, z_NM),
    'tied and crowded': np.where(in_few_groups_M, 7, z_NM),
    'all above': np.where(np.arange(M) < 2 * K + 50, np.abs(z_NM) + 5, z_NM),
  }[kind].astype('f')


KINDS = (
  *('random', 'descending', 'integers', 'constant', 'negative', 'sparse'),
  *('crowded', 'tied and crowded', 'all above'),
)


@pytest.mark.usefixtures('interpreted')
@pytest.mark.parametrize('k', [1, 7, K])
def test_the_selection_is_that_of_lax(k):
  z_NM = np.concatenate([rows(kind) for kind in KINDS])
  b_M = np.random.default_rng(1).integers(-1, 2, M).astype('f')
  got = jax.jit(functools.partial(gpu_topk.top_k, k=k))(z_NM, b_M)
  want = jax.lax.top_k(jnp.maximum(z_NM + b_M, 0), k)
  jax.tree.map(np.testing.assert_array_equal, tuple(got), tuple(want))


@pytest.mark.usefixtures('interpreted')
@pytest.mark.parametrize('kind', ['crowded', 'constant', 'random'])
def test_rows_whose_bound_leaves_too_many_are_among_the_tested(kind):
  z_NM = rows(kind)
  room, groups = gpu_topk.room(7), gpu_topk.groups(7)
  padded_NM = np.pad(z_NM, ((0, 0), (0, -M % groups)), constant_values=-1)
  maxima_NG = padded_NM.reshape(N, -1, groups).max(1)
  bound_N1 = np.sort(maxima_NG, 1)[:, -7:][:, :1]
  over = ((z_NM >= bound_N1).sum(1) > room).all()
  assert over == (kind != 'random')


@pytest.mark.usefixtures('interpreted')
def test_what_is_not_a_number_is_selected_first():
  z_NM = rows('random')
  z_NM[2, 1234] = np.nan
  z_NM[3, 17] = np.inf
  z_NM[4, 5] = np.array(-1, 'i').view('f')  # all bits
  vals_NK, idx_NK = gpu_topk.top_k(jnp.asarray(z_NM), jnp.zeros(M), k=K)
  np.testing.assert_array_equal(idx_NK[2:, 0], [1234, 17, 5])
  np.testing.assert_array_equal(
    np.isnan(vals_NK[:, 0]), [False, False, True, False, True]
  )


@pytest.mark.usefixtures('interpreted')
def test_a_k_that_no_program_holds_names_the_flag():
  k = gpu_topk.MOST + 1
  pre = jax.ShapeDtypeStruct((1, 4 * gpu_topk.room(k)), jnp.float32)
  b_M = jax.ShapeDtypeStruct(pre.shape[1:], jnp.float32)
  with pytest.raises(NotImplementedError, match=r'train\.backend=reference'):
    jax.eval_shape(functools.partial(gpu_topk.top_k, k=k), pre, b_M)


@pytest.mark.usefixtures('interpreted')
def test_rows_too_wide_for_a_program_name_the_flag():
  w_MD = jax.ShapeDtypeStruct((2, gpu_pallas.WIDEST + 1), jnp.float32)
  with pytest.raises(NotImplementedError, match=r'train\.backend=reference'):
    jax.eval_shape(gpu.project, w_MD, w_MD)


def test_a_machine_without_a_gpu_is_refused_with_the_reason():
  with pytest.raises(NotImplementedError, match=r'no NVIDIA GPU.*backend=auto'):
    ops.spmm(
      np.ones((N, 2), 'f'),
      np.zeros((N, 2), 'i'),
      np.ones((9, D), 'f'),
      backend='gpu',
    )


@pytest.mark.usefixtures('interpreted')
def test_chunks_of_rows_join_up(monkeypatch):
  rng = np.random.default_rng(0)
  x_ND, w_MD = rng.normal(size=(N, D)), rng.normal(size=(M, D))
  x_ND, w_MD = jnp.asarray(x_ND, 'float32'), jnp.asarray(w_MD, 'float32')
  b_M = jnp.asarray(rng.normal(size=M), 'float32')
  monkeypatch.setattr(gpu, 'CHUNK_BYTES', 4 * M * 2)  # two rows
  text = jax.jit(functools.partial(gpu.encode, k=K)).lower(x_ND, w_MD, b_M)
  assert f'{N}x{M}' not in text.as_text()
  got = gpu.encode(x_ND, w_MD, b_M, k=K)
  want = reference.encode(x_ND, w_MD, b_M, k=K)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
  np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.usefixtures('interpreted')
def test_the_dense_forms_equal_the_reference(monkeypatch):
  device = cost.Device('slow', 'slow', {'bfloat16': 1e18}, 1.0, 1.0)
  monkeypatch.setattr(gpu, 'device', lambda: device)
  monkeypatch.setattr(gpu, 'CHUNK_BYTES', 4 * 12 * 2)
  monkeypatch.setattr(gpu_pallas, 'call', None)  # no sparse form runs
  rng = np.random.default_rng(0)
  k, latents = 9, 12
  x_ND = jnp.asarray(rng.normal(size=(N, D)), 'bfloat16')
  w_MD = jnp.asarray(rng.normal(size=(latents, D)), 'bfloat16')
  v_NK = jnp.asarray(rng.normal(size=(N, k)), 'bfloat16')
  i_NK = jnp.asarray(
    [rng.permutation(latents)[:k] for _ in range(N)], jnp.int32
  )
  for name, got, want in (
    ('spmm', gpu.spmm(v_NK, i_NK, w_MD), reference.spmm(v_NK, i_NK, w_MD)),
    ('sddmm', gpu.sddmm(x_ND, i_NK, w_MD), reference.sddmm(x_ND, i_NK, w_MD)),
    (
      'spmm_t',
      gpu.spmm_t(v_NK, i_NK, x_ND, latents=latents),
      reference.spmm_t(v_NK, i_NK, x_ND, latents=latents),
    ),
  ):
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-5, err_msg=name)


def test_float32_and_unknown_devices_gather(monkeypatch):
  h100 = cost.DEVICES['h100']
  few = jax.ShapeDtypeStruct((512, 64), jnp.bfloat16)
  monkeypatch.setattr(gpu, 'device', lambda: h100)
  assert gpu.form('spmm', few, 8192, 128, 512) == 'dense'
  wide = jax.ShapeDtypeStruct((512, 64), jnp.float32)
  assert gpu.form('spmm', wide, 8192, 128, 512) == 'sparse'
  monkeypatch.setattr(gpu, 'device', lambda: None)
  assert gpu.form('spmm', few, 8192, 128, 512) == 'sparse'


def shape(*axes, dtype='float32'):
  return jax.ShapeDtypeStruct(axes, dtype)


def lowered(function, *args) -> str:
  """The program that a GPU would be given; jax 0.11 asks which GPU."""
  device = AbstractDevice('NVIDIA H200', 132, 'gpu')
  mesh = AbstractMesh(
    (1,), ('one',), (AxisType.Explicit,), abstract_device=device
  )
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(function).trace(*args)
    return traced.lower(lowering_platforms=('cuda',)).as_text()


def kernels(n, d, m, k, dtype):
  """Every Pallas kernel with its inputs: name -> (function, arguments)."""
  code = (shape(n, k), shape(n, k, dtype='int32'))
  w_MD, x_ND = shape(m, d, dtype=dtype), shape(n, d, dtype=dtype)
  big = shape(m, d)
  return {
    'survivors': (
      functools.partial(gpu_topk.survivors, k=k),
      (shape(min(n, 2048), m), shape(m)),
    ),
    'spmm': (gpu_pallas.spmm, (*code, w_MD)),
    'sddmm': (gpu_pallas.sddmm, (x_ND, code[1], w_MD)),
    'spmm_t': (
      functools.partial(gpu_pallas.spmm_t, latents=m),
      (*code, x_ND),
    ),
    'project': (gpu_pallas.project, (big, big)),
    'adam': (
      functools.partial(gpu_pallas.adam, unit=True),
      (big, (big, big, big), shape(5)),
    ),
  }


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
  'shapes',
  [(5, 7, 3001, 33), (8192, 4096, 131_072, 256), (64, 4096, 131_072, 2048)],
  ids=['odd', 'paper', 'auxk'],
)
def test_every_kernel_lowers_for_cuda(shapes, dtype):
  for name, (function, args) in kernels(*shapes, dtype).items():
    text = lowered(function, *args)
    assert text.count('xla.gpu.triton') == 1, name


def test_the_papers_encode_and_gradients_lower_within_bounded_memory(
  monkeypatch,
):
  monkeypatch.setattr(gpu, 'why_not', lambda: '')
  monkeypatch.setattr(gpu, 'device', lambda: cost.DEVICES['h200'])
  n, d, m, k = 8192, 4096, 131_072, 256

  def loss(w_MD, b_M, x_ND):
    code = ops.encode(x_ND, w_MD, b_M, k=k, backend='gpu')
    return jnp.sum(ops.spmm(*code, w_MD, backend='gpu') ** 2)

  text = lowered(
    jax.grad(loss, (0, 1)),
    *(shape(m, d, dtype='bfloat16'), shape(m)),
    shape(n, d, dtype='bfloat16'),
  )
  assert f'{n}x{m}' not in text
  assert f'{n}x{k}x{d}' not in text
  assert f'{gpu.CHUNK_BYTES // 4 // m}x{m}' in text


@pytest.mark.gpu
def test_a_gpu_selects_what_lax_selects():
  z_NM = np.concatenate([rows(kind) for kind in KINDS])
  got = jax.jit(functools.partial(gpu_topk.top_k, k=K))(z_NM, jnp.zeros(M))
  want = jax.lax.top_k(jnp.maximum(z_NM, 0), K)
  jax.tree.map(np.testing.assert_array_equal, tuple(got), tuple(want))
