"""Sparse products over the K active latents of a row, with their gradients.

    encode(x, w, b; k) -> v, i    the k largest of relu(x wᵀ + b)
    spmm  (v, i, w)    -> y       y[n] = Σ_k v[n, k] · w[i[n, k]]
    sddmm (x, i, w)    -> v       v[n, k] = ⟨x[n], w[i[n, k]]⟩
    spmm_t(v, i, x)    -> w       w[m] = Σ over i[n, k] = m of v[n, k] · x[n]

The family is closed under differentiation, so the gradients are written once,
here, and serve every backend:

    encode  dx = spmm(dv, i, w), dw = spmm_t(dv, i, x)   dv = 0 where v = 0
    spmm    dv = sddmm(dy, i, w), dw = spmm_t(v, i, dy)
    sddmm   dx = spmm(dv, i, w), dw = spmm_t(dv, i, x)
    spmm_t  dv = sddmm(x, i, dw), dx = spmm(v, i, dw)

Beside them stand `project` and `adam`, what an optimiser step does to the rows
of a matrix; they have no gradients.

Inputs are float32 or bfloat16; products accumulate in float32 and results are
float32. Indices are int32 in [0, M) and may repeat within a row.

Backends: `reference` runs anywhere and is the specification; `cpu` is the one
for a CPU in XLA alone, `native` the faster one in C++, for which a compiler is
needed; `gpu` is for NVIDIA GPUs, `tpu` for the TensorCore of TPUs. `auto` is
`native` where JAX runs on a CPU and it can be built, `cpu` on other CPUs, `gpu`
on an NVIDIA GPU that it can use, `tpu` on a TPU, `reference` on everything
else: the choice is made by machine alone, never by shape, and a shape that a
backend cannot do raises NotImplementedError. `lmm-sae doctor` tells which it is
and why.
"""

import functools
import types

import jax
import jax.numpy as jnp

from lmm_sae.kernels import cpu, gpu, native, reference, tpu

BACKENDS: dict[str, types.ModuleType] = {
  'reference': reference,
  'cpu': cpu,
  'native': native,
  'gpu': gpu,
  'tpu': tpu,
}


def backend_name(backend: str) -> str:
  """The backend that `backend` stands for on this machine.

  Raises:
    NotImplementedError: there is no such backend.
  """
  if backend == 'auto':
    if jax.default_backend() == 'cpu':
      return 'cpu' if native.why_not() else 'native'
    if jax.default_backend() == 'tpu':
      return 'tpu'
    return 'reference' if gpu.why_not() else 'gpu'
  if backend not in BACKENDS:
    raise NotImplementedError(
      f'kernel backend {backend!r} is not there: use '
      f'--config.train.backend={" or ".join(("auto", *BACKENDS))}'
    )
  return backend


def encode(
  x_ND: jax.Array,
  w_MD: jax.Array,
  b_M: jax.Array,
  /,
  *,
  k: int,
  backend: str = 'auto',
) -> tuple[jax.Array, jax.Array]:
  """The k largest of relu(x wᵀ + b): values [N, K] descending, indices [N, K].

  Ties go to the lower index; where fewer than k are positive, the rest of the
  row is zeros of the lowest indices, through which no gradient flows.

  Raises:
    ValueError: shapes do not agree, or k is not in 1..M.
  """
  x_ND, w_MD, b_M = map(jnp.asarray, (x_ND, w_MD, b_M))
  latents, width = w_MD.shape
  _agree('x_ND', x_ND, (x_ND.shape[0], width))
  _agree('b_M', b_M, (latents,))
  if not 1 <= k <= latents:
    raise ValueError(f'k is {k}; it must be in 1..{latents}, the latents')
  return _encode(x_ND, w_MD, b_M, k, backend_name(backend))


def spmm(
  v_NK: jax.Array,
  i_NK: jax.Array,
  w_MD: jax.Array,
  /,
  *,
  backend: str = 'auto',
) -> jax.Array:
  """y[n] = Σ_k v[n, k] · w[i[n, k]], float32 [N, D]."""
  v_NK, i_NK, w_MD = map(jnp.asarray, (v_NK, i_NK, w_MD))
  _agree('v_NK', v_NK, i_NK.shape)
  return _spmm(v_NK, i_NK, w_MD, backend_name(backend))


def sddmm(
  x_ND: jax.Array,
  i_NK: jax.Array,
  w_MD: jax.Array,
  /,
  *,
  backend: str = 'auto',
) -> jax.Array:
  """v[n, k] = ⟨x[n], w[i[n, k]]⟩, float32 [N, K]."""
  x_ND, i_NK, w_MD = map(jnp.asarray, (x_ND, i_NK, w_MD))
  _agree('x_ND', x_ND, (i_NK.shape[0], w_MD.shape[1]))
  return _sddmm(x_ND, i_NK, w_MD, backend_name(backend))


def spmm_t(
  v_NK: jax.Array,
  i_NK: jax.Array,
  x_ND: jax.Array,
  /,
  *,
  latents: int,
  backend: str = 'auto',
) -> jax.Array:
  """w[m] = Σ over i[n, k] = m of v[n, k] · x[n], float32 [M, D]."""
  v_NK, i_NK, x_ND = map(jnp.asarray, (v_NK, i_NK, x_ND))
  _agree('v_NK', v_NK, i_NK.shape)
  _agree('x_ND', x_ND, (i_NK.shape[0], x_ND.shape[1]))
  return _spmm_t(v_NK, i_NK, x_ND, latents, backend_name(backend))


def project(
  grad_MD: jax.Array, w_MD: jax.Array, /, *, backend: str = 'auto'
) -> tuple[jax.Array, jax.Array]:
  """What a gradient would change beside the norm of w's rows, which are unit.

  Returns:
    The gradient without its part along each row, and each row's sum of squares.
  """
  return BACKENDS[backend_name(backend)].project(grad_MD, w_MD)


def adam(
  grad_MD: jax.Array,
  state: tuple[jax.Array, jax.Array, jax.Array],
  /,
  *,
  count: jax.Array,
  factor: jax.Array,
  rate: jax.Array,
  good: jax.Array,
  unit: bool = False,
  backend: str = 'auto',
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """One step of Adam (Kingma and Ba, arXiv 1412.6980), as optax makes it.

  Args:
    grad_MD: the gradient, also of one dimension.
    state: parameters, first moment, second moment, of one shape and float32.
    count: steps done with this one, from 1.
    factor: what the gradient is multiplied by first.
    rate: the learning rate.
    good: where false, nothing is changed.
    unit: whether rows of the parameters are brought to unit norm.
    backend: of the kernels; the native one has no use for one dimension.
  """
  b1, b2, _ = reference.ADAM
  count = count.astype(jnp.float32)
  scalars = jnp.stack(
    [factor, rate, 1 - b1**count, 1 - b2**count, good.astype(jnp.float32)]
  )
  name = backend_name(backend) if grad_MD.ndim == 2 else 'reference'
  return BACKENDS[name].adam(grad_MD, state, scalars, unit=unit)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _encode(x_ND, w_MD, b_M, k, name):
  return _module(name, len(x_ND)).encode(x_ND, w_MD, b_M, k=k)


def _encode_fwd(x_ND, w_MD, b_M, k, name):
  vals_NK, idx_NK = _encode(x_ND, w_MD, b_M, k, name)
  return (vals_NK, idx_NK), (x_ND, w_MD, b_M, vals_NK > 0, idx_NK)


def _encode_bwd(k, name, saved, grads):
  del k
  x_ND, w_MD, b_M, fired_NK, i_NK = saved
  dv_NK = jnp.where(fired_NK, grads[0], 0)
  dx_ND = _spmm(dv_NK, i_NK, w_MD, name)
  dw_MD = _spmm_t(dv_NK, i_NK, x_ND, w_MD.shape[0], name)
  if name == 'gpu':  # a scatter there adds in no fixed order
    ones_N1 = jnp.ones((len(x_ND), 1))
    db_M = _spmm_t(dv_NK, i_NK, ones_N1, len(b_M), name)[:, 0]
  else:
    db_M = jnp.zeros(b_M.shape, jnp.float32).at[i_NK].add(dv_NK)
  return _like(dx_ND, x_ND), _like(dw_MD, w_MD), _like(db_M, b_M)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spmm(v_NK, i_NK, w_MD, name):
  return _module(name, len(i_NK)).spmm(v_NK, i_NK, w_MD)


def _spmm_fwd(v_NK, i_NK, w_MD, name):
  return _spmm(v_NK, i_NK, w_MD, name), (v_NK, i_NK, w_MD)


def _spmm_bwd(name, saved, dy_ND):
  v_NK, i_NK, w_MD = saved
  dv_NK = _sddmm(dy_ND, i_NK, w_MD, name)
  dw_MD = _spmm_t(v_NK, i_NK, dy_ND, w_MD.shape[0], name)
  return _like(dv_NK, v_NK), None, _like(dw_MD, w_MD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sddmm(x_ND, i_NK, w_MD, name):
  return _module(name, len(i_NK)).sddmm(x_ND, i_NK, w_MD)


def _sddmm_fwd(x_ND, i_NK, w_MD, name):
  return _sddmm(x_ND, i_NK, w_MD, name), (x_ND, i_NK, w_MD)


def _sddmm_bwd(name, saved, dv_NK):
  x_ND, i_NK, w_MD = saved
  dx_ND = _spmm(dv_NK, i_NK, w_MD, name)
  dw_MD = _spmm_t(dv_NK, i_NK, x_ND, w_MD.shape[0], name)
  return _like(dx_ND, x_ND), None, _like(dw_MD, w_MD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _spmm_t(v_NK, i_NK, x_ND, latents, name):
  return _module(name, len(i_NK)).spmm_t(v_NK, i_NK, x_ND, latents=latents)


def _spmm_t_fwd(v_NK, i_NK, x_ND, latents, name):
  return _spmm_t(v_NK, i_NK, x_ND, latents, name), (v_NK, i_NK, x_ND)


def _spmm_t_bwd(latents, name, saved, dw_MD):
  del latents
  v_NK, i_NK, x_ND = saved
  dv_NK = _sddmm(x_ND, i_NK, dw_MD, name)
  dx_ND = _spmm(v_NK, i_NK, dw_MD, name)
  return _like(dv_NK, v_NK), None, _like(dx_ND, x_ND)


_encode.defvjp(_encode_fwd, _encode_bwd)
_spmm.defvjp(_spmm_fwd, _spmm_bwd)
_sddmm.defvjp(_sddmm_fwd, _sddmm_bwd)
_spmm_t.defvjp(_spmm_t_fwd, _spmm_t_bwd)


def _module(name: str, rows: int) -> types.ModuleType:
  """What computes; without a row there is nothing to choose."""
  return BACKENDS[name] if rows else reference


def _like(grad: jax.Array, primal: jax.Array) -> jax.Array:
  """A gradient in the dtype of what it belongs to."""
  return grad.astype(primal.dtype)


def _agree(name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
  if array.shape != shape:
    raise ValueError(f'{name} has shape {array.shape}; it must be {shape}')
