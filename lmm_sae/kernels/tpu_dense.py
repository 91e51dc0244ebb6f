"""A code as a matrix and back, for dense products on the TensorCore of a TPU.

XLA would scatter and gather these numbers one by one. Here they go through the
matrix unit: latent m is lane m % 128 of block m // 128, and a row of the code,
[M / 128, 128], is the product of two one-hot matrices over the k: of blocks,
with the values, and of lanes. That is M·k products a row, D / k times fewer
than the dense product itself.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lmm_sae.kernels.tpu_pallas import LANES, ROWS, call, divisor, padded, up

F32, I32, BF16 = jnp.float32, jnp.int32, jnp.bfloat16
SLOTS = 256  # of the k at once
BLOCKS = 256  # of the latents at once


def spread(v_NK: jax.Array, i_NK: jax.Array, /, *, latents: int) -> jax.Array:
  """The code as a matrix [N, M], bfloat16; N of 8, M of 128 a multiple."""
  blocks, steps, v_NK, i_NK, slots = _sizes(latents, i_NK, v_NK.astype(F32))
  rows, width = i_NK.shape
  step = blocks // steps

  def kernel(v, i, out, sums):
    sums[...] = jnp.zeros_like(sums)

    def add(at, _):
      row, part, first, to = _place(at, width // slots, slots, steps, step)
      here = (pl.ds(row, 1), to)
      of_block_BK, of_lane_LK = _hot(i[here], first, step)
      values_BK = jnp.where(of_block_BK, v[here], 0.0).astype(BF16)
      lanes_LK = jnp.where(of_lane_LK, 1.0, 0.0).astype(BF16)
      own = pl.ds(part * step * ROWS + row, step, stride=ROWS)
      sums[own] += _dot(values_BK, lanes_LK, 1, 1)

    lax.fori_loop(0, ROWS * (width // slots) * steps, add, None)
    out[...] = sums[...].astype(BF16)

  tiles_XL = call(
    kernel,
    (v_NK, i_NK),
    grid=(rows // ROWS,),
    in_specs=[pl.BlockSpec((ROWS, width), lambda n: (n, 0))] * 2,
    out_specs=pl.BlockSpec((blocks * ROWS, LANES), lambda n: (n, 0)),
    out_shape=jax.ShapeDtypeStruct((rows * blocks, LANES), BF16),
    scratch_shapes=[pltpu.VMEM((blocks * ROWS, LANES), F32)],
    cost=(
      2 * rows * latents * width,
      rows * (8 * width + 2 * latents),
    ),
    semantics=('parallel',),
    name='spread',
  )
  return matrix(tiles_XL.reshape(-1, blocks, ROWS, LANES))


def pick(z_nBRL: jax.Array, i_NK: jax.Array, /) -> jax.Array:
  """z[n, i[n, k]] of a matrix in tiles, [N / 8, M / 128, 8, 128] of float32."""
  k, latents = i_NK.shape[1], z_nBRL.shape[1] * LANES
  blocks, steps, i_NK, slots = _sizes(latents, i_NK)
  rows, width = i_NK.shape
  step = blocks // steps

  def kernel(z, i, out):
    out[...] = jnp.zeros_like(out)

    def add(at, _):
      row, part, first, to = _place(at, width // slots, slots, steps, step)
      here = (pl.ds(row, 1), to)
      of_block_BK, of_lane_LK = _hot(i[here], first, step)
      blocks_BK = jnp.where(of_block_BK, 1.0, 0.0).astype(BF16)
      rest_BL = z[pl.ds(part * step * ROWS + row, step, stride=ROWS)]
      found_LK = jnp.zeros(of_lane_LK.shape, F32)
      for _ in range(3):  # pieces of bfloat16, which are float32 together
        piece_BL = rest_BL.astype(BF16)
        rest_BL -= piece_BL.astype(F32)
        found_LK += _dot(piece_BL, blocks_BK, 0, 0)
      found_LK = jnp.where(of_lane_LK, found_LK, 0.0)
      out[here] += jnp.sum(found_LK, 0, keepdims=True)

    lax.fori_loop(0, ROWS * (width // slots) * steps, add, None)

  v_NK = call(
    kernel,
    (z_nBRL.reshape(-1, LANES), i_NK),
    grid=(rows // ROWS,),
    in_specs=[
      pl.BlockSpec((blocks * ROWS, LANES), lambda n: (n, 0)),
      pl.BlockSpec((ROWS, width), lambda n: (n, 0)),
    ],
    out_specs=pl.BlockSpec((ROWS, width), lambda n: (n, 0)),
    out_shape=jax.ShapeDtypeStruct((rows, width), F32),
    cost=(
      6 * rows * latents * width,
      rows * (8 * width + 4 * latents),
    ),
    semantics=('parallel',),
    name='pick',
  )
  return v_NK[:, :k]


def matrix(z_nBRL: jax.Array, /) -> jax.Array:
  """[N, M] of its tiles; in the memory of a TPU they are the same."""
  parts, blocks = z_nBRL.shape[:2]
  return jnp.swapaxes(z_nBRL, 1, 2).reshape(parts * ROWS, blocks * LANES)


def _sizes(latents, i_NK, *arrays):
  """Blocks, in how many steps; the arrays, i_NK last, filled up; slots."""
  blocks = latents // LANES
  steps = blocks // divisor(blocks, BLOCKS, ROWS) if blocks > BLOCKS else 1
  slots = min(SLOTS, up(i_NK.shape[1], LANES))
  return blocks, steps, *(padded(a, (1, slots)) for a in (*arrays, i_NK)), slots


def _place(at, turns, slots, steps, step):
  """Row, step, its first block, and lanes of the slots, of the at-th turn."""
  row, rest = lax.div(at, turns * steps), lax.rem(at, turns * steps)
  turn, part = lax.div(rest, steps), lax.rem(rest, steps)
  to = pl.ds(pl.multiple_of(turn * slots, slots), slots)
  return row, part, part * step, to


def _hot(i_1K, first, step):
  """Which block, of `step` from `first`, and which lane each latent is."""
  slots = i_1K.shape[1]
  block_BK = lax.broadcasted_iota(I32, (step, slots), 0) + first
  lane_LK = lax.broadcasted_iota(I32, (LANES, slots), 0)
  bits = jnp.full_like(i_1K, 7)
  return (
    block_BK == lax.shift_right_logical(i_1K, bits),
    lane_LK == (i_1K & (LANES - 1)),
  )


def _dot(a, b, of_a, of_b):
  """A product over one dimension of each."""
  return lax.dot_general(
    a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=F32
  )
