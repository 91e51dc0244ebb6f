"""The TopK sparse autoencoder: configuration, parameters, losses.

    z = TopK(relu(W_enc (x - b_dec) + b_enc))        x̂ = W_decᵀ z + b_dec

after Gao et al., "Scaling and evaluating sparse autoencoders", arXiv
2406.04093, as trained in arXiv 2411.14982. Everything is a pure function of the
parameters; the sparse products are those of `kernels.ops`.
"""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from lmm_sae.kernels import ops, sharded


@dataclasses.dataclass(frozen=True)
class SaeConfig:
  """What decides the shape and the meaning of an SAE.

  Attributes:
    layer: 0-based decoder layer whose output it reads.
    width: D, of that output.
    latents: M.
    k: latents that may fire on one row.
    dead_after: rows without firing after which a latent is dead.
    aux: dead latents that may answer for one row in AuxK; 0: D / 2.

  Raises:
    ValueError: a field is out of bounds.
  """

  layer: int
  width: int
  latents: int
  k: int
  dead_after: int = 10_000_000
  aux: int = 0

  def __post_init__(self):
    if self.latents < 1:
      raise ValueError(f'sae.latents is {self.latents}; it must be at least 1')
    if not 1 <= self.k <= self.latents:
      raise ValueError(
        f'sae.k is {self.k}; it must be in 1..{self.latents} (sae.latents)'
      )
    if self.dead_after < 1:
      raise ValueError(
        f'sae.dead_after is {self.dead_after}; it must be at least 1 row'
      )
    if self.aux < 0:
      raise ValueError(f'sae.aux is {self.aux}; it must be at least 0')

  @property
  def k_aux(self) -> int:
    """Dead latents that may answer for one row; Gao et al. take D / 2."""
    return min(self.aux or max(self.width // 2, 1), self.latents)


@flax.struct.dataclass
class Params:
  """W_enc [M, D], b_enc [M], W_dec [M, D] with rows of unit norm, b_dec [D]."""

  w_enc_MD: jax.Array
  b_enc_M: jax.Array
  w_dec_MD: jax.Array
  b_dec_D: jax.Array


class SparseCode(NamedTuple):
  """The latents that fire on each row: values, descending, and indices.

  A row on which fewer than K fire is filled up with values of 0.
  """

  vals_NK: jax.Array
  idx_NK: jax.Array


class Losses(NamedTuple):
  """Terms of the loss, and the loss: fvu + weights · (auxk, multi)."""

  fvu: jax.Array
  auxk: jax.Array
  multi: jax.Array
  total: jax.Array


def init(config: SaeConfig, b_dec_D: jax.Array, key: jax.Array) -> Params:
  """Encoder rows as torch's Linear draws them, W_dec their normalised copy."""
  bound = config.width**-0.5
  shape = (config.latents, config.width)
  w_enc_MD = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
  params = Params(
    w_enc_MD=w_enc_MD,
    b_enc_M=jnp.zeros(config.latents),
    w_dec_MD=w_enc_MD,
    b_dec_D=jnp.asarray(b_dec_D, jnp.float32),
  )
  return normalise(params)


def encode(
  params: Params,
  x_ND: jax.Array,
  /,
  *,
  k: int,
  backend: str = 'auto',
  axis: str = '',
) -> SparseCode:
  """The k latents that fire most on each row.

  With `axis`, over which latents are split, each device holds those of the k
  that are its own, by its own indices; its other values are 0.
  """
  # W (x - b_dec) + b_enc = W x + (b_enc - W b_dec): the gradient of b_dec then
  # comes from that of the bias, without a pass over the rows.
  b_dec_D = sharded.spread(params.b_dec_D, axis) if axis else params.b_dec_D
  b_M = params.b_enc_M - params.w_enc_MD @ b_dec_D
  return _top(params, x_ND, b_M, k, backend, axis)


def _top(params, x_ND, b_M, k, backend, axis) -> SparseCode:
  own = min(k, len(b_M))
  code = ops.encode(x_ND, params.w_enc_MD, b_M, k=own, backend=backend)
  return _select(SparseCode(*code), k, axis)


def _select(code: SparseCode, k: int, axis: str) -> SparseCode:
  """The k best of a code, which is sorted; over the axis where there is one."""
  code = SparseCode(code.vals_NK[:, :k], code.idx_NK[:, :k])
  if not axis:
    return code
  return code._replace(vals_NK=sharded.select(code.vals_NK, k=k, axis=axis))


def decode(
  params: Params, code: SparseCode, /, *, backend: str = 'auto', axis: str = ''
) -> jax.Array:
  """The rows x̂ that a code stands for."""
  return _product(params, code, backend, axis) + params.b_dec_D


def _product(params, code, backend, axis) -> jax.Array:
  y_ND = ops.spmm(*code, params.w_dec_MD, backend=backend)
  return sharded.reduce(y_ND, axis) if axis else y_ND


def losses(
  params: Params,
  x_ND: jax.Array,
  dead_M: jax.Array,
  variance: jax.Array,
  /,
  *,
  config: SaeConfig,
  auxk: float = 0.0,
  multi_topk: float = 0.0,
  backend: str = 'auto',
  axis: str = '',
) -> tuple[Losses, SparseCode]:
  """The losses of a batch and its code.

  fvu = Σ‖x - x̂‖² / variance, sums over the whole batch, so that every row
  weighs the same; `auxk` weighs the error of the dead latents' prediction of
  x - x̂, in the same unit; `multi_topk` weighs the fvu at 4 k.

  Args:
    params: of the SAE.
    x_ND: rows, or one device's share of them.
    dead_M: which latents are dead.
    variance: Σ‖x - mean‖² of the whole batch. With it given, the losses of the
      shares add up to those of the batch, and so do their gradients.
    config: of the SAE.
    auxk: weight of AuxK; 0 leaves it out.
    multi_topk: weight of the fvu at 4 k; 0 leaves it out.
    backend: of the kernels.
    axis: of the devices over which latents are split, '' where they are not.
      Every device of it has the whole losses, and its own latents' code.
  """
  k, wide = config.k, min(4 * config.k, config.latents)
  where = {'backend': backend, 'axis': axis}
  full = encode(params, x_ND, k=wide if multi_topk else k, **where)
  code = _select(full, k, axis) if multi_topk else full
  error_ND = x_ND - decode(params, code, **where)
  fvu = jnp.sum(error_ND**2) / variance
  aux = multi = jnp.zeros(())
  if auxk:
    aux = _auxk(params, x_ND, error_ND, dead_M, config.k_aux, **where)
    aux = aux / variance
  if multi_topk:
    wide_ND = decode(params, full, **where)
    multi = jnp.sum((x_ND - wide_ND) ** 2) / variance
  total = fvu + auxk * aux + multi_topk * multi
  return Losses(fvu, aux, multi, total), code


def _auxk(params, x_ND, error_ND, dead_M, k_aux, backend, axis) -> jax.Array:
  """Σ‖e - ê‖²: the k_aux dead latents strongest on a row predict its error e.

  e = x - x̂ is a constant here, and so is b_dec: x̂ holds it already, so ê has
  none. Only dead latents get a gradient. As long as no more than k_aux are
  dead, all of them answer, and a dense product over those alone is enough.
  """
  e_ND = lax.stop_gradient(error_ND)
  b_dec_D = lax.stop_gradient(params.b_dec_D)
  b_M = params.b_enc_M - params.w_enc_MD @ b_dec_D

  def all_alive():
    return jnp.zeros(())

  def few_dead():
    size = min(k_aux, len(dead_M))
    (at_A,) = jnp.nonzero(dead_M, size=size, fill_value=0)
    used_A = jnp.arange(size) < jnp.sum(dead_M)
    pre_NA = x_ND @ params.w_enc_MD[at_A].T + b_M[at_A]
    z_NA = jnp.where(used_A, jnp.maximum(pre_NA, 0), 0)
    e_hat_ND = z_NA @ params.w_dec_MD[at_A]
    if axis:
      e_hat_ND = sharded.reduce(e_hat_ND, axis)
    return jnp.sum((e_ND - e_hat_ND) ** 2)

  def many_dead():
    masked_M = jnp.where(dead_M, b_M, -jnp.inf)  # the living cannot win
    code = _top(params, x_ND, masked_M, k_aux, backend, axis)
    e_hat_ND = _product(params, code, backend, axis)
    return jnp.sum((e_ND - e_hat_ND) ** 2)

  count = jnp.sum(dead_M)
  if axis:
    count = lax.psum(count, axis)
  case = jnp.int32(count > 0) + jnp.int32(count > k_aux)
  return lax.switch(case, (all_alive, few_dead, many_dead))


def normalise(params: Params) -> Params:
  """The parameters with rows of W_dec of unit norm."""
  norm_M = jnp.linalg.norm(params.w_dec_MD, axis=-1)
  unit_MD = params.w_dec_MD / jnp.maximum(norm_M, 1e-12)[:, None]
  return params.replace(w_dec_MD=unit_MD)


def rescale(params: Params, scale: jax.Array) -> Params:
  """The same SAE for rows that are `scale` times as long.

  z and x̂ become `scale` times as large: only the biases change.
  """
  return params.replace(
    b_enc_M=params.b_enc_M * scale, b_dec_D=params.b_dec_D * scale
  )


@jax.jit
def geometric_median(x_ND: jax.Array, /) -> jax.Array:
  """The point with the least summed distance to the rows (Weiszfeld, [D])."""
  x_ND = x_ND.astype(jnp.float32)

  def move(state):
    at_D, _, turn = state
    gap_N = jnp.linalg.norm(x_ND - at_D, axis=-1)
    weight_N = 1 / jnp.maximum(gap_N, 1e-6 * jnp.mean(gap_N) + 1e-30)
    next_D = weight_N @ x_ND / jnp.sum(weight_N)
    moved = jnp.linalg.norm(next_D - at_D) / (jnp.mean(gap_N) + 1e-30)
    return next_D, moved, turn + 1

  start = (jnp.mean(x_ND, 0), jnp.inf, 0)
  return lax.while_loop(
    lambda state: (state[1] > 1e-5) & (state[2] < 100), move, start
  )[0]
