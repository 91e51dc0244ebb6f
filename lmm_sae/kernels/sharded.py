"""Latents split over devices: what is exchanged so that they act as one SAE.

Inside shard_map, each device of an axis holds a run of the latents, in order.
It takes the k best of its own with any backend; `select` then finds which of
them are among the k best of all. For that the devices exchange values alone,
[N, k] each: no pre-activations, no indices, no rows of the decoder. The rows
that the local winners decode to are summed with `reduce`.

`reduce` and `spread` are each other's transpose, so that gradients are those of
one device: shard_map without its replication checks cannot know that what
follows a sum is the same everywhere.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def select(
  vals_NK: jax.Array, /, *, k: int | jax.Array, axis: str
) -> jax.Array:
  """The values, with 0 in place of those that are not among the k best of all.

  Args:
    vals_NK: descending in each row; the k best of this device's latents, or all
      of them where they are fewer than k.
    k: of all the devices' latents together; may be traced.
    axis: over which latents are split. Ties go to the lower device and, within
      one, to the earlier value, which is how one device breaks them.
  """
  best_LNK = lax.stop_gradient(lax.all_gather(vals_NK, axis))
  shards, rows, own = best_LNK.shape
  all_NL = jnp.moveaxis(best_LNK, 0, 1).reshape(rows, shards * own)
  if isinstance(k, int):
    least_N1 = lax.top_k(all_NL, k)[0][:, -1:]
  else:
    least_N1 = lax.dynamic_slice_in_dim(
      jnp.sort(all_NL, 1, descending=True), k - 1, 1, 1
    )
  room_N1 = k - jnp.sum(all_NL > least_N1, 1, keepdims=True)
  ties_LN = jnp.sum(best_LNK == least_N1, -1)
  before_LN = jnp.cumsum(ties_LN, 0) - ties_LN
  tied_NK = vals_NK == least_N1
  rank_NK = (
    jnp.cumsum(tied_NK, 1) - 1 + before_LN[lax.axis_index(axis), :, None]
  )
  won_NK = (vals_NK > least_N1) | (tied_NK & (rank_NK < room_N1))
  return jnp.where(won_NK, vals_NK, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def reduce(x: jax.Array, axis: str) -> jax.Array:
  """The sum over the axis, whose gradient every device then holds whole."""
  return lax.psum(x, axis)


reduce.defvjp(
  lambda x, axis: (lax.psum(x, axis), None), lambda axis, _, grad: (grad,)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def spread(x: jax.Array, axis: str) -> jax.Array:
  """x, the same on every device, for uses of which each does a part."""
  del axis
  return x


spread.defvjp(
  lambda x, axis: (x, None), lambda axis, _, grad: (lax.psum(grad, axis),)
)
