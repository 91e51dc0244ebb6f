"""A training step as `lmm_sae.sae.trainer` makes it, of lmm_sae.kernels alone.

So it runs where flax, optax and orbax are not. Parameters, gradients and
moments are float32, products bfloat16.
"""

import functools

import jax
import jax.numpy as jnp

from lmm_sae.kernels import cost, ops

F32, BF16 = jnp.float32, jnp.bfloat16
RATE = 7e-5


def draw(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
  """Normal numbers, made on the device."""
  made = jax.jit(lambda key: jax.random.normal(key, shape, F32).astype(dtype))
  return made(jax.random.key(seed))


class Step:
  """The state, a batch, and the step."""

  def __init__(self, s: cost.Shape):
    w_MD = draw(0, (s.latents, s.width), 'float32') * s.width**-0.5
    norm_M1 = jnp.linalg.norm(w_MD, axis=1, keepdims=True)
    params = {
      'w_enc': w_MD,
      'b_enc': jnp.zeros(s.latents),
      'w_dec': w_MD / norm_M1,
      'b_dec': jnp.zeros(s.width),
    }
    moments = [jax.tree.map(jnp.zeros_like, params) for _ in range(2)]
    self.state = (jnp.int32(0), params, *moments)
    self.x_ND = draw(1, (s.rows, s.width), 'float32')
    step = functools.partial(_step, k=s.k)
    self.run = jax.jit(step, donate_argnums=0)

  def take(self) -> float:
    """One step; the FVU before it, which is there when all of it is."""
    self.state, fvu = self.run(self.state, self.x_ND)
    jax.block_until_ready(self.state)
    return float(fvu)


def _step(state, x_ND, *, k):
  count, params, first, second = state
  low_enc_MD = params['w_enc'].astype(BF16)
  centred_ND = (x_ND - params['b_dec']).astype(BF16)
  variance = jnp.sum((x_ND - jnp.mean(x_ND, 0)) ** 2)

  def loss(params):
    code = ops.encode(
      *(centred_ND, params['w_enc'].astype(BF16), params['b_enc']),
      k=k,
      backend='gpu',
    )
    y_ND = ops.spmm(*code, params['w_dec'].astype(BF16), backend='gpu')
    return jnp.sum((x_ND - y_ND - params['b_dec']) ** 2) / variance

  fvu, grads = jax.value_and_grad(loss)(params)
  # What b_dec does through the encoder: a product with one vector.
  grads['b_dec'] -= (grads['b_enc'].astype(BF16) @ low_enc_MD).astype(F32)
  grads['w_dec'], squares_M = ops.project(
    grads['w_dec'], params['w_dec'], backend='gpu'
  )
  squares = sum(
    jnp.sum(grads[name] ** 2) for name in ('w_enc', 'b_enc', 'b_dec')
  )
  norm = jnp.sqrt(squares + jnp.sum(squares_M))
  new = {
    name: ops.adam(
      grads[name],
      (params[name], first[name], second[name]),
      count=count + 1,
      factor=jnp.minimum(1.0, 1 / norm),
      rate=jnp.float32(RATE),
      good=jnp.isfinite(norm),
      unit=name == 'w_dec',
      backend='gpu',
    )
    for name in params
  }
  parts = ({name: x[i] for name, x in new.items()} for i in range(3))
  return (count + 1, *parts), fvu
