"""The functions of the family for an NVIDIA GPU, by Pallas and XLA.

encode is a product by XLA, float32 pre-activations of a chunk of rows at a
time, and the exact selection of `gpu_topk` on them. A product over K latents a
row is a gather (`gpu_pallas`) or, where the rule of `cost` says that this is
faster on the device and the inputs are bfloat16, a dense product with the code
spread out, in bfloat16 too; float32 is always a gather, since TF32 would round
it. A device that is not in `cost.DEVICES` gathers.

Held against the reference in interpret mode and lowered for CUDA by the tests;
`benchmarks/gpu.sh` checks and times it on a GPU.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from lmm_sae.kernels import cost, gpu_pallas, gpu_topk

F32 = jnp.float32
CHUNK_BYTES = 2**30  # of [rows, M] at a time


def why_not() -> str:
  """Why this backend cannot run here; '' where it can."""
  if gpu_pallas.INTERPRET:
    return ''
  platform = jax.default_backend()
  if platform not in ('gpu', 'cuda'):
    return f'there is no NVIDIA GPU: jax runs on {platform}'
  device = jax.devices()[0]
  if not device.device_kind.startswith(('NVIDIA', 'Tesla', 'GeForce')):
    return f'{device.device_kind} is not made by NVIDIA'
  if float(device.compute_capability) < 8:
    return (
      f'{device.device_kind} has compute capability '
      f'{device.compute_capability}; the kernels need 8.0'
    )
  return ''


@functools.cache
def device() -> cost.Device | None:
  """What the rule reckons with here."""
  return cost.find(jax.devices()[0].device_kind)


def form(name: str, low: jax.Array, rows: int, k: int, latents: int) -> str:
  """sparse or dense; `low` is the matrix whose rows are gathered."""
  if low.dtype != jnp.bfloat16 or device() is None:
    return 'sparse'
  shape = cost.Shape(rows, low.shape[1], latents, k)
  return cost.choose(name, device(), shape).form


def encode(
  x_ND: jax.Array, w_MD: jax.Array, b_M: jax.Array, /, *, k: int
) -> tuple[jax.Array, jax.Array]:
  """The k largest of relu(x wᵀ + b), descending, ties to the lower index."""
  _require()

  def chunk(x_ND):
    pre_NM = jnp.dot(x_ND, w_MD.T, preferred_element_type=F32)
    return gpu_topk.top_k(pre_NM, b_M.astype(F32), k=k)

  return _by_rows(chunk, len(w_MD), x_ND)


def spmm(v_NK: jax.Array, i_NK: jax.Array, w_MD: jax.Array, /) -> jax.Array:
  """y[n] = Σ_k v[n, k] · w[i[n, k]]."""
  _require()
  if form('spmm', w_MD, *i_NK.shape, len(w_MD)) == 'sparse':
    return gpu_pallas.spmm(v_NK, i_NK, w_MD)

  def chunk(v_NK, i_NK):
    code_NM = spread(v_NK, i_NK, len(w_MD), w_MD.dtype)
    return jnp.dot(code_NM, w_MD, preferred_element_type=F32)

  return _by_rows(chunk, len(w_MD), v_NK, i_NK)


def sddmm(x_ND: jax.Array, i_NK: jax.Array, w_MD: jax.Array, /) -> jax.Array:
  """v[n, k] = ⟨x[n], w[i[n, k]]⟩."""
  _require()
  if form('sddmm', w_MD, *i_NK.shape, len(w_MD)) == 'sparse':
    return gpu_pallas.sddmm(x_ND, i_NK, w_MD)

  def chunk(x_ND, i_NK):
    low_ND = x_ND.astype(w_MD.dtype)
    all_NM = jnp.dot(low_ND, w_MD.T, preferred_element_type=F32)
    return jnp.take_along_axis(all_NM, i_NK, 1)

  return _by_rows(chunk, len(w_MD), x_ND, i_NK)


def spmm_t(
  v_NK: jax.Array, i_NK: jax.Array, x_ND: jax.Array, /, *, latents: int
) -> jax.Array:
  """w[m] = Σ over i[n, k] = m of v[n, k] · x[n], for all M = `latents` rows."""
  _require()
  if form('spmm_t', x_ND, *i_NK.shape, latents) == 'sparse':
    return gpu_pallas.spmm_t(v_NK, i_NK, x_ND, latents=latents)
  rows = _chunk(latents)
  w_MD = jnp.zeros((latents, x_ND.shape[1]), F32)
  for at in range(0, len(x_ND), rows):
    part = slice(at, at + rows)
    code_NM = spread(v_NK[part], i_NK[part], latents, x_ND.dtype)
    w_MD += jnp.dot(code_NM.T, x_ND[part], preferred_element_type=F32)
  return w_MD


def project(
  grad_MD: jax.Array, w_MD: jax.Array, /
) -> tuple[jax.Array, jax.Array]:
  """The gradient without its part along each row of w; sums of its squares."""
  _require()
  return gpu_pallas.project(grad_MD, w_MD)


def adam(
  grad_MD: jax.Array,
  state: tuple[jax.Array, jax.Array, jax.Array],
  scalars: jax.Array,
  /,
  *,
  unit: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Parameters and moments after a step of Adam; in place where XLA allows."""
  _require()
  return gpu_pallas.adam(grad_MD, state, scalars, unit=unit)


def spread(
  v_NK: jax.Array, i_NK: jax.Array, latents: int, dtype: jnp.dtype, /
) -> jax.Array:
  """The code as a matrix [N, M]."""
  rows_N1 = jnp.arange(len(i_NK))[:, None]
  code_NM = jnp.zeros((len(i_NK), latents), dtype)
  return code_NM.at[rows_N1, i_NK].add(v_NK.astype(dtype))


def _chunk(latents: int) -> int:
  """Rows at a time."""
  return max(1, CHUNK_BYTES // (4 * latents))


def _by_rows(function, latents: int, *arrays: jax.Array):
  """function(*arrays), a chunk of rows at a time."""
  total, rows = len(arrays[0]), _chunk(latents)
  if total <= rows:
    return function(*arrays)
  whole = total - total % rows
  parts = [x[:whole].reshape(-1, rows, *x.shape[1:]) for x in arrays]
  found = lax.map(lambda xs: function(*xs), tuple(parts))
  found = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), found)
  if whole == total:
    return found
  last = function(*(x[whole:] for x in arrays))
  return jax.tree.map(lambda *xs: jnp.concatenate(xs), found, last)


def _require() -> None:
  if why_not():
    raise NotImplementedError(
      f'the gpu kernels cannot run here ({why_not()}): use '
      '--config.train.backend=auto'
    )
