"""What lets few latents fire in training, beside plain TopK.

Each takes the largest activations of every row, which is what the kernels give,
and says which of them fire. Where A is a threshold, a row on which more than
`SaeConfig.most` are above it loses the least of them; the metric `full` is the
share of such rows, and a larger sae.row_k lowers it.

After training, `batchtopk` and `jumprelu` are one function of a row alone:
those fire that are above theta_M (`model.fire`).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from lmm_sae.kernels import sharded
from lmm_sae.sae.model import Params, SparseCode

INFINITY_BITS = 0x7F800000  # of float32; finite values lie below


def fewer(code: SparseCode, k: jax.Array, axis: str) -> SparseCode:
  """The k largest of each row, where k changes from step to step.

  Args:
    code: the largest of each row, at least k of them.
    k: traced; a number would be cut off with `model.select`.
    axis: over which latents are split, '' where they are not.
  """
  vals_NK = code.vals_NK
  if axis:
    return code._replace(vals_NK=sharded.select(vals_NK, k=k, axis=axis))
  kept_K = jnp.arange(vals_NK.shape[1]) < k
  return code._replace(vals_NK=jnp.where(kept_K, vals_NK, 0))


def batchtopk(
  code: SparseCode, k: int | jax.Array, axes: tuple[str, ...], devices: int
) -> tuple[SparseCode, jax.Array]:
  """The N k largest of all N rows together, and the least of them.

  After Bussmann, Leask and Nanda, "BatchTopK sparse autoencoders", arXiv
  2412.06410: k is an average, a row that is hard to explain may have more. The
  rows are those of every device; of values that tie with the least all stay.

  Args:
    code: the largest of each row; values are not negative.
    k: on average; may be traced.
    axes: of the mesh, over which rows and latents are split.
    devices: over which rows are.
  """
  vals_NK = lax.stop_gradient(code.vals_NK)
  bits_NK = lax.bitcast_convert_type(vals_NK, jnp.int32)  # in the same order
  wanted = jnp.int32(len(vals_NK) * devices * k)

  def many(bits):
    count = jnp.sum(bits_NK >= bits, dtype=jnp.int32)
    return (lax.psum(count, axes) if axes else count) >= wanted

  def halve(_, bounds):
    low, high = bounds  # many(low), not many(high)
    middle = low + (high - low) // 2
    enough = many(middle)
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  bounds = (jnp.int32(0), jnp.int32(INFINITY_BITS))
  low, _ = lax.fori_loop(0, 31, halve, bounds)
  least = lax.bitcast_convert_type(low, jnp.float32)
  kept_NK = vals_NK >= least
  return code._replace(vals_NK=jnp.where(kept_NK, code.vals_NK, 0)), least


def jumprelu(
  params: Params, code: SparseCode, width: jax.Array | float
) -> tuple[SparseCode, jax.Array]:
  """What is above its latent's own threshold; how many fire, summed over rows.

  After Rajamanoharan et al., "Jumping ahead: improving reconstruction fidelity
  with JumpReLU sparse autoencoders", arXiv 2407.14435. Neither the jump nor the
  count has a gradient; both are given that of a step smeared over `width`
  about the threshold, which is what trains it (equations 11 and 12 there).

  Args:
    params: whose theta_M is trained.
    code: the largest of each row.
    width: ε, in units of an activation.
  """
  theta_NK = params.theta_M[code.idx_NK]
  vals_NK = jump(code.vals_NK, theta_NK, width)
  return code._replace(vals_NK=vals_NK), jnp.sum(
    step(code.vals_NK, theta_NK, width)
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump(z: jax.Array, theta: jax.Array, width: float) -> jax.Array:
  """z where it is above theta, else 0."""
  del width
  return jnp.where(z > theta, z, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def step(z: jax.Array, theta: jax.Array, width: float) -> jax.Array:
  """1 where z is above theta, else 0."""
  del width
  return jnp.where(z > theta, 1.0, 0.0)


def _near(z, theta, width):
  """The smeared step's slope: 1 / width within width / 2 of the threshold.

  A latent that relu has switched off is near nothing.
  """
  return jnp.where((z > 0) & (jnp.abs(z - theta) < width / 2), 1 / width, 0)


jump.defvjp(
  lambda z, theta, width: (jump(z, theta, width), (z, theta)),
  lambda width, saved, grad: (
    jnp.where(saved[0] > saved[1], grad, 0),
    -saved[1] * _near(*saved, width) * grad,
  ),
)
step.defvjp(
  lambda z, theta, width: (step(z, theta, width), (z, theta)),
  lambda width, saved, grad: (
    jnp.zeros_like(saved[0]),
    -_near(*saved, width) * grad,
  ),
)
