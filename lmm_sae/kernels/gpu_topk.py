"""The k largest of long rows on a GPU, exactly, in two passes over them.

A program takes a row. Column m belongs to group m mod G; the first pass keeps
the G maxima in registers, and the k-th largest of these, found by bisection on
the bits of the floats, is a bound from below: k maxima are k distinct columns.
The second pass writes down what reaches the bound, in the order of the columns.
With G = 8 k that is about 1.06 k numbers on rows in random order, of which the
k largest are then sorted out. A row with more than `room` of them, as many ties
or an unlucky order make it, is bisected on whole passes until the bound leaves
few enough; if ties alone are too many, the first of them are kept.

Bits of floats that are not negative are in the floats' order, as int32; NaN,
without its sign, is above all of them, as lax.top_k has it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from lmm_sae.kernels import gpu_pallas

MOST = 4096  # of k: twice as many maxima are in registers
LEAST_GROUPS = 1024
MOST_GROUPS = 8192
SIGN = 0x7FFFFFFF  # every bit but the sign
NAN = 0x7FC00000  # what every larger one becomes: a GPU makes 0x7FFFFFFF


def groups(k: int) -> int:
  """G, a power of two, at least 2 k."""
  return min(max(LEAST_GROUPS, pl.next_power_of_2(8 * k)), MOST_GROUPS)


def room(k: int) -> int:
  """Columns of a row that the second pass may write down."""
  return max(16, pl.next_power_of_2(2 * k))


def top_k(
  pre_NM: jax.Array, b_M: jax.Array, /, *, k: int
) -> tuple[jax.Array, jax.Array]:
  """lax.top_k of relu(pre + b), float32.

  Raises:
    NotImplementedError: k is above MOST and not close to M.
  """
  latents = pre_NM.shape[1]
  if latents <= room(k):
    vals_NK, idx_NK = lax.top_k(jnp.maximum(pre_NM + b_M, 0), k)
    return vals_NK, idx_NK
  if k > MOST:
    raise NotImplementedError(
      f'the gpu kernels take at most {MOST} of more than {room(k) - 1} '
      f'latents; this is k={k} of {latents}: use '
      '--config.train.backend=reference'
    )
  near_NC, column_NC = survivors(pre_NM, b_M, k=k)
  vals_NK, at_NK = lax.top_k(near_NC, k)  # of equals, the lower column is first
  return vals_NK, jnp.take_along_axis(column_NC, at_NK, 1)


def survivors(
  pre_NM: jax.Array, b_M: jax.Array, /, *, k: int
) -> tuple[jax.Array, jax.Array]:
  """What may be among the k largest of each row: values and columns, C = room.

  By ascending column; values of -1 fill a row up.
  """
  rows, latents = pre_NM.shape
  size, most = groups(k), room(k)
  kernel = functools.partial(
    _kernel, latents=latents, k=k, size=size, most=most
  )
  out = (
    jax.ShapeDtypeStruct((rows, most), jnp.float32),
    jax.ShapeDtypeStruct((rows, most), jnp.int32),
  )
  return gpu_pallas.call(
    kernel,
    out,
    *(pre_NM, b_M),
    grid=(rows,),
    warps=max(1, min(16, size // 256)),
    flops=6 * rows * latents,
    moved=8 * rows * (latents + most),
  )


def _kernel(pre_ref, b_ref, vals_ref, idx_ref, *, latents, k, size, most):
  row = pl.program_id(0)
  turns = pl.cdiv(latents, size)
  lanes_G = lax.iota(jnp.int32, size)

  def bits(j):
    at_G = j * size + lanes_G
    inside_G = at_G < latents
    z_G = triton.load(pre_ref.at[row, at_G], mask=inside_G, other=0)
    z_G += triton.load(b_ref.at[at_G], mask=inside_G, other=0)
    z_G = jnp.where(z_G <= 0, 0.0, z_G)  # relu that keeps NaN, and no -0
    bits_G = lax.bitcast_convert_type(z_G, jnp.int32) & SIGN
    return jnp.where(inside_G, jnp.minimum(bits_G, NAN), -1), at_G

  def largest(j, most_G):
    return jnp.maximum(most_G, bits(j)[0])

  def write(bound, ties):
    """Writes what is above the bound and so many that equal it; counts both."""

    def some(j, before):
      above, equal = before
      bits_G, at_G = bits(j)
      above_G, equal_G = bits_G > bound, bits_G == bound
      both_G = above_G.astype(jnp.int32) + (equal_G.astype(jnp.int32) << 16)
      both = jnp.sum(both_G)
      both_G = lax.cumsum(both_G)  # counts are below 2^14: one scan does
      equals_G = equal + (both_G >> 16)
      to_G = above + (both_G & 0xFFFF) + jnp.minimum(equals_G, ties) - 1
      kept_G = above_G | (equal_G & (equals_G <= ties))
      kept_G &= to_G < most
      # Interpreted, a masked store writes the old value back: not over a new.
      to_G = jnp.where(kept_G, to_G, most + lanes_G)
      vals_G = lax.bitcast_convert_type(bits_G, jnp.float32)
      triton.store(vals_ref.at[row, to_G], vals_G, mask=kept_G)
      triton.store(idx_ref.at[row, to_G], at_G, mask=kept_G)
      return above + (both & 0xFFFF), equal + (both >> 16)

    return lax.fori_loop(0, turns, some, (jnp.int32(0), jnp.int32(0)))

  def fill(count):
    lanes_C = lax.iota(jnp.int32, most)
    left_C = lanes_C >= count
    none_C = jnp.full(most, -1.0, jnp.float32)
    triton.store(vals_ref.at[row, lanes_C], none_C, mask=left_C)
    zeros_C = jnp.zeros(most, jnp.int32)
    triton.store(idx_ref.at[row, lanes_C], zeros_C, mask=left_C)

  def count(bound):
    return lax.fori_loop(
      0,
      turns,
      lambda j, sum_: sum_ + jnp.sum((bits(j)[0] >= bound).astype(jnp.int32)),
      jnp.int32(0),
    )

  most_G = lax.fori_loop(0, turns, largest, jnp.full(size, -1, jnp.int32))
  top = jnp.max(most_G)
  bound = _kth(most_G, top, k)
  above, equal = write(bound, jnp.int32(most))
  fill(above + equal)

  @pl.when(above + equal > most)
  def _():
    def open_(state):
      low, high, found = state
      return (found > most) & (high - low > 1)

    def halve(state):
      low, high, found = state
      middle = low + (high - low) // 2
      there = count(middle)
      enough = there >= k
      return (
        jnp.where(enough, middle, low),
        jnp.where(enough, high, middle),
        jnp.where(enough, there, found),
      )

    low, _, found = lax.while_loop(
      open_, halve, (bound, top + 1, above + equal)
    )
    # With too many ties at the bound, fewer than k are above it.
    ties = jnp.where(found > most, most - count(low + 1), most)
    above_, equal_ = write(low, ties)
    fill(above_ + jnp.minimum(equal_, ties))


def _kth(bits_G, top, k):
  """The k-th largest, by bisection in registers."""

  def halve(_, bounds):
    low, high = bounds  # at least k reach low, fewer than k reach high
    middle = low + (high - low) // 2
    enough = jnp.sum((bits_G >= middle).astype(jnp.int32)) >= k
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  return lax.fori_loop(0, 31, halve, (jnp.int32(0), top + 1))[0]
