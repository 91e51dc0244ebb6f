"""All functions in plain jnp: the specification every backend must meet.

Nothing here is careful with memory: encode holds [N, M] and the others hold
[N, K, D]. Products accumulate in float32, whatever the inputs are, and results
are float32.
"""

import jax
import jax.numpy as jnp
from jax import lax

F32 = jnp.float32
ADAM = (0.9, 0.999, 1e-8)  # b1, b2, eps


def encode(
  x_ND: jax.Array, w_MD: jax.Array, b_M: jax.Array, /, *, k: int
) -> tuple[jax.Array, jax.Array]:
  """The k largest of relu(x wᵀ + b), descending, ties to the lower index."""
  pre_NM = jnp.dot(x_ND, w_MD.T, preferred_element_type=F32) + b_M.astype(F32)
  vals_NK, idx_NK = lax.top_k(jnp.maximum(pre_NM, 0), k)
  return vals_NK, idx_NK


def spmm(v_NK: jax.Array, i_NK: jax.Array, w_MD: jax.Array, /) -> jax.Array:
  """y[n] = Σ_k v[n, k] · w[i[n, k]]."""
  return jnp.einsum(
    'nk,nkd->nd', v_NK.astype(F32), w_MD[i_NK].astype(F32), precision='highest'
  )


def sddmm(x_ND: jax.Array, i_NK: jax.Array, w_MD: jax.Array, /) -> jax.Array:
  """v[n, k] = ⟨x[n], w[i[n, k]]⟩."""
  return jnp.einsum(
    'nd,nkd->nk', x_ND.astype(F32), w_MD[i_NK].astype(F32), precision='highest'
  )


def spmm_t(
  v_NK: jax.Array, i_NK: jax.Array, x_ND: jax.Array, /, *, latents: int
) -> jax.Array:
  """w[m] = Σ over i[n, k] = m of v[n, k] · x[n], for all M = `latents` rows."""
  w_MD = jnp.zeros((latents, x_ND.shape[1]), F32)
  return w_MD.at[i_NK].add(
    v_NK.astype(F32)[..., None] * x_ND.astype(F32)[:, None]
  )


def project(
  grad_MD: jax.Array, w_MD: jax.Array, /
) -> tuple[jax.Array, jax.Array]:
  """The gradient without its part along each row of w; sums of its squares."""
  along_M = jnp.sum(grad_MD * w_MD, -1)
  grad_MD = grad_MD - along_M[:, None] * w_MD
  return grad_MD, jnp.sum(grad_MD**2, -1)


def adam(
  grad_MD: jax.Array,
  state: tuple[jax.Array, jax.Array, jax.Array],
  scalars: jax.Array,
  /,
  *,
  unit: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Parameters and moments after a step of Adam (see `ops.adam`)."""
  b1, b2, eps = ADAM
  factor, rate, fix1, fix2, good = scalars
  p_MD, m_MD, v_MD = state
  grad_MD = grad_MD * factor
  first_MD = (1 - b1) * grad_MD + b1 * m_MD
  second_MD = (1 - b2) * grad_MD**2 + b2 * v_MD
  step_MD = (first_MD / fix1) / (jnp.sqrt(second_MD / fix2) + eps)
  new_MD = p_MD - rate * step_MD
  if unit:
    new_MD = unit_rows(new_MD)
  new = (new_MD, first_MD, second_MD)
  return jax.tree.map(
    lambda new, old: jnp.where(good > 0, new, old), new, state
  )


def unit_rows(w_MD: jax.Array, /) -> jax.Array:
  """The rows of unit norm."""
  norm_M1 = jnp.linalg.norm(w_MD, axis=-1, keepdims=True)
  return w_MD / jnp.maximum(norm_M1, 1e-12)
