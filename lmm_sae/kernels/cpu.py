"""The functions of the family for a CPU, in XLA alone.

encode works on 256 rows at a time, so [N, M] never exists; the others loop over
K, so nothing of size N·K·D does. On one AVX2 core (N=2048, D=192, M=1024, K=8)
spmm takes 0.4 ms against 2.3 ms for a gather of [N, K, D], and spmm_t 1 ms
against 20 ms for a dense matmul.
"""

import jax
import jax.numpy as jnp
from jax import lax

from lmm_sae.kernels import reference
from lmm_sae.kernels.reference import project

__all__ = ['adam', 'encode', 'project', 'sddmm', 'spmm', 'spmm_t']

F32 = jnp.float32
ROWS = 256  # a chunk: its pre-activations stay in the cache up to M ≈ 8k
GROUP = 16  # latents a group of the top-k filter: one AVX-512 register
HALVINGS = 14  # of the way from 0 to a row's largest, for a bound of its k
UNROLL = 4  # steps of a loop over K that XLA may fuse into one pass


def encode(
  x_ND: jax.Array, w_MD: jax.Array, b_M: jax.Array, /, *, k: int
) -> tuple[jax.Array, jax.Array]:
  """The k largest of relu(x wᵀ + b), descending, ties to the lower index."""

  def chunk(x_ND):
    dot_NM = jnp.dot(x_ND, w_MD.T, preferred_element_type=F32)
    return top_k(dot_NM, b_M.astype(F32), k=k)

  rows = x_ND.shape[0]
  if rows <= ROWS:
    return chunk(x_ND)
  whole = rows - rows % ROWS
  parts = lax.map(chunk, x_ND[:whole].reshape(-1, ROWS, x_ND.shape[1]))
  vals_NK, idx_NK = (part.reshape(whole, k) for part in parts)
  if whole == rows:
    return vals_NK, idx_NK
  last_vals_NK, last_idx_NK = chunk(x_ND[whole:])
  return (
    jnp.concatenate([vals_NK, last_vals_NK]),
    jnp.concatenate([idx_NK, last_idx_NK]),
  )


def top_k(
  dot_NM: jax.Array, b_M: jax.Array, /, *, k: int
) -> tuple[jax.Array, jax.Array]:
  """lax.top_k of relu(dot + b), in passes that XLA spreads over all cores.

  XLA's own top_k on a CPU runs on one. Exact, ties included: the k-th largest
  maximum of groups of neighbours is a bound that k elements reach, one a group.
  It is found by halving, nearly, so that a few more than k groups hold what
  reaches it; of these the elements that do are picked out, in the order of
  their index, and ranked by comparing each with each. Where ties, NaN or fewer
  than k positive elements leave more or less than there is room for, lax.top_k
  decides. relu(dot + b) itself is not stored.
  """

  def plain():
    vals_NK, idx_NK = lax.top_k(jnp.maximum(dot_NM + b_M, 0), k)
    return vals_NK, idx_NK

  rows, latents = dot_NM.shape
  if k * GROUP * 4 > latents:  # groups would keep too many of them
    return plain()
  room = k + k // 4 + 8
  spare = -latents % GROUP
  dot_NGg = jnp.pad(dot_NM, ((0, 0), (0, spare))).reshape(rows, -1, GROUP)
  b_Gg = jnp.pad(b_M, (0, spare), constant_values=-jnp.inf).reshape(-1, GROUP)
  top_NG = jnp.maximum((dot_NGg + b_Gg).max(-1), 0)
  least_N1 = _bound(top_NG, k)[:, None]
  group_NR, groups_N1 = _places(top_NG >= least_N1, room)
  kept_NRg = jnp.take_along_axis(dot_NGg, group_NR[..., None], 1)
  kept_NRg = jnp.maximum(kept_NRg + b_Gg[group_NR], 0)
  held_NR1 = (jnp.arange(room) < groups_N1)[..., None]
  kept_NS = jnp.where(held_NR1, kept_NRg, -1).reshape(rows, -1)
  at_NR, found_N1 = _places(kept_NS >= least_N1, room)
  own_NR = jnp.take_along_axis(group_NR, at_NR // GROUP, 1) * GROUP
  own_NR += at_NR % GROUP
  vals_NR = jnp.take_along_axis(kept_NS, at_NR, 1)
  vals_NR = jnp.where(jnp.arange(room) < found_N1, vals_NR, -1)
  fits_N1 = (groups_N1 >= k) & (groups_N1 <= room) & (found_N1 <= room)
  return lax.cond(jnp.all(fits_N1), lambda: _ranked(vals_NR, own_NR, k), plain)


def _bound(a_NS: jax.Array, k: int) -> jax.Array:
  """What k of each row reach and, nearly, no more do; 0 where fewer are > 0."""

  def halve(_, bounds):
    low_N, high_N = bounds
    mid_N = low_N + (high_N - low_N) / 2
    enough_N = jnp.sum(a_NS >= mid_N[:, None], 1, dtype=jnp.int32) >= k
    return jnp.where(enough_N, mid_N, low_N), jnp.where(enough_N, high_N, mid_N)

  start = (jnp.zeros(len(a_NS)), a_NS.max(1))
  return lax.fori_loop(0, HALVINGS, halve, start)[0]


def _places(mask_NS: jax.Array, room: int) -> tuple[jax.Array, jax.Array]:
  """Where the first `room` are true in each row, [N, room], and how many are.

  Each place is sought in two steps, by its block and within it, from counts of
  what is true before: products with a triangle, for want of a fast cumsum.
  """
  rows, size = mask_NS.shape
  block = 1 << (size.bit_length() - 1) // 2
  mask_NBb = jnp.pad(mask_NS, ((0, 0), (0, -size % block)))
  mask_NBb = mask_NBb.reshape(rows, -1, block)
  counts_NB = jnp.sum(mask_NBb, -1, dtype=F32)
  starts_NB = _before(counts_NB)
  slot_R = jnp.arange(room, dtype=F32)
  ends_N1B = (starts_NB + counts_NB)[:, None]
  block_NR = jnp.sum(ends_N1B <= slot_R[:, None], -1, dtype=jnp.int32)
  block_NR = jnp.minimum(block_NR, counts_NB.shape[1] - 1)
  rank_NBb = jnp.where(mask_NBb, _before(mask_NBb.astype(F32)), -1)
  rank_NRb = jnp.take_along_axis(rank_NBb, block_NR[..., None], 1)
  wanted_NR = slot_R - jnp.take_along_axis(starts_NB, block_NR, 1)
  hit_NRb = rank_NRb == wanted_NR[..., None]
  lane_NR = jnp.sum(jnp.where(hit_NRb, jnp.arange(block), 0), -1)
  at_NR = jnp.minimum(block_NR * block + lane_NR, size - 1)
  return at_NR, jnp.sum(counts_NB, 1, keepdims=True)


def _before(a: jax.Array) -> jax.Array:
  """Sums of what stands before in the last axis; whole numbers below 2**24."""
  earlier = jnp.triu(jnp.ones((a.shape[-1],) * 2, F32), 1)
  return jnp.dot(a, earlier, precision='highest')


def _ranked(
  vals_NR: jax.Array, idx_NR: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
  """The k largest, descending; the earlier of equal ones first."""
  one_NR1, other_N1R = vals_NR[:, :, None], vals_NR[:, None]
  earlier_RR = jnp.tri(vals_NR.shape[1], k=-1, dtype=bool)
  first_NRR = (other_N1R > one_NR1) | ((other_N1R == one_NR1) & earlier_RR)
  rank_NR = jnp.sum(first_NRR, -1, dtype=jnp.int32)
  hit_NKR = rank_NR[:, None] == jnp.arange(k)[:, None]
  vals_NK = jnp.sum(jnp.where(hit_NKR, vals_NR[:, None], 0), -1)
  return vals_NK, jnp.sum(jnp.where(hit_NKR, idx_NR[:, None], 0), -1)


def spmm(v_NK: jax.Array, i_NK: jax.Array, w_MD: jax.Array, /) -> jax.Array:
  """y[n] = Σ_k v[n, k] · w[i[n, k]]."""
  rows, k = i_NK.shape

  def add(j, y_ND):
    return y_ND + v_NK[:, j, None].astype(F32) * w_MD[i_NK[:, j]].astype(F32)

  y_ND = jnp.zeros((rows, w_MD.shape[1]), F32)
  return lax.fori_loop(0, k, add, y_ND, unroll=min(k, UNROLL))


def sddmm(x_ND: jax.Array, i_NK: jax.Array, w_MD: jax.Array, /) -> jax.Array:
  """v[n, k] = ⟨x[n], w[i[n, k]]⟩."""
  x_ND = x_ND.astype(F32)

  def one(i_N):
    return jnp.sum(x_ND * w_MD[i_N].astype(F32), -1)

  return lax.map(one, i_NK.T).T


def spmm_t(
  v_NK: jax.Array, i_NK: jax.Array, x_ND: jax.Array, /, *, latents: int
) -> jax.Array:
  """w[m] = Σ over i[n, k] = m of v[n, k] · x[n], for all M = `latents` rows."""
  v_NK, x_ND = v_NK.astype(F32), x_ND.astype(F32)

  def add(j, w_MD):
    return w_MD.at[i_NK[:, j]].add(v_NK[:, j, None] * x_ND)

  w_MD = jnp.zeros((latents, x_ND.shape[1]), F32)
  return lax.fori_loop(0, i_NK.shape[1], add, w_MD)


def adam(
  grad_MD: jax.Array,
  state: tuple[jax.Array, jax.Array, jax.Array],
  scalars: jax.Array,
  /,
  *,
  unit: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Parameters and moments after a step of Adam (see `ops.adam`).

  In three passes that XLA may not join: it would make each result from the old
  moments, so copy them first, and spread each scalar out to [M, D] for the sums
  of the norms. That is 16 ms of a step of 84 (M=8192, D=256, 2048 rows, two
  Zen 5 cores).
  """
  b1, b2, eps = reference.ADAM
  factor, rate, fix1, fix2, good = scalars
  p_MD, m_MD, v_MD = state
  grad_MD = grad_MD * factor
  m_MD, v_MD = lax.optimization_barrier(
    (
      jnp.where(good > 0, (1 - b1) * grad_MD + b1 * m_MD, m_MD),
      jnp.where(good > 0, (1 - b2) * grad_MD**2 + b2 * v_MD, v_MD),
    )
  )
  step_MD = (m_MD / fix1) / (jnp.sqrt(v_MD / fix2) + eps)
  p_MD = jnp.where(good > 0, p_MD - rate * step_MD, p_MD)
  if unit:
    p_MD = lax.optimization_barrier(p_MD)
    p_MD = jnp.where(good > 0, reference.unit_rows(p_MD), p_MD)
  return p_MD, m_MD, v_MD
