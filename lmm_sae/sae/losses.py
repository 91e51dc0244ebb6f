"""What an SAE is trained to make small.

    total = fvu + weights · (auxk, multi, sparsity)
    fvu = Σ‖x - x̂‖² / Σ‖x - mean‖²         sums over the whole batch

so that every row weighs the same. With prefixes, the fvu of the total is the
mean over them and the whole (Matryoshka).
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lmm_sae.kernels import sharded
from lmm_sae.sae import activations, model
from lmm_sae.sae.model import Params, SaeConfig, SparseCode


class Losses(NamedTuple):
  """Terms of the loss, the loss, and what the code was like.

  Attributes:
    fvu: of x̂; nested: its mean over the prefixes and the whole.
    auxk, multi, sparsity: see `Weights`.
    total: the loss.
    l0: latents that fire on a row, on average.
    full: share of the rows that have all latents that they can have.
    theta: the least activation that fires, of `batchtopk`.
  """

  fvu: jax.Array
  nested: jax.Array
  auxk: jax.Array
  multi: jax.Array
  sparsity: jax.Array
  total: jax.Array
  l0: jax.Array
  full: jax.Array
  theta: jax.Array


@dataclasses.dataclass(frozen=True)
class Weights:
  """What the terms weigh beside the fvu; 0 leaves one out.

  Attributes:
    auxk: the error of the dead latents' prediction of x - x̂, in units of the
      fvu (arXiv 2406.04093, section A.2).
    multi_topk: the fvu at 4 k (the same, section 5.3); `topk` only.
    sparsity: (l0 / k - 1)², which holds `jumprelu` to k latents a row on
      average (arXiv 2407.14435, appendix on a target for L0).
  """

  auxk: float = 0.0
  multi_topk: float = 0.0
  sparsity: float = 0.0


class Batch(NamedTuple):
  """The batch that the rows at hand are a share of.

  With it given, the losses of the shares add up to those of the batch, and so
  do their gradients. What spans rows, BatchTopK's threshold and JumpReLU's l0,
  is of the rows at hand, on all devices: of a piece, where a step has several.

  Attributes:
    variance: Σ‖x - mean‖² of all of it.
    rows: of all of it.
    axis: of the devices over which its rows are split, '' where they are not.
    devices: how many these are.
  """

  variance: jax.Array
  rows: int
  axis: str = ''
  devices: int = 1


def losses(
  params: Params,
  x_ND: jax.Array,
  dead_M: jax.Array,
  batch: Batch,
  /,
  *,
  config: SaeConfig,
  weights: Weights = Weights(),
  k: int | jax.Array = 0,
  wide: int = 0,
  dtype: jnp.dtype = jnp.float32,
  backend: str = 'auto',
  axis: str = '',
) -> tuple[Losses, SparseCode]:
  """The losses of rows, or of one device's share of them, and their code.

  Args:
    params: of the SAE.
    x_ND: rows, float32.
    dead_M: which latents are dead.
    batch: that the rows are a share of.
    config: of the SAE.
    weights: of the terms.
    k: latents a row, where it is not config.k; may be traced, then `wide` is
      its bound.
    wide: latents that `topk` takes first; 0: config.k.
    dtype: of the products with W_enc and W_dec; sums are float32.
    backend: of the kernels.
    axis: of the devices over which latents are split, '' where they are not.
      Every device of it has the whole losses, and its own latents' code.
  """
  where = {'backend': backend, 'axis': axis}
  k = k if wide else config.k
  low = params.replace(
    w_enc_MD=params.w_enc_MD.astype(dtype),
    w_dec_MD=params.w_dec_MD.astype(dtype),
  )
  most = max(wide, config.most)
  four = min(4 * config.k, config.latents)
  if weights.multi_topk:
    most = max(most, four)
  every = model.encode(low, x_ND, k=most, **where)
  code, sparsity, theta = _fire(low, every, most, batch, config, k, axis)
  error_ND, nested = _nested(low, x_ND, code, config.prefixes, **where)
  fvu = jnp.sum(error_ND**2) / batch.variance
  nested = nested / batch.variance
  aux = multi = jnp.zeros(())
  if weights.auxk:
    aux = _auxk(low, x_ND, error_ND, dead_M, config.k_aux, **where)
    aux = aux / batch.variance
  if weights.multi_topk:
    wider = every if most == four else model.select(every, four, axis)
    wide_ND = model.decode(low, wider, **where)
    multi = jnp.sum((x_ND - wide_ND) ** 2) / batch.variance
  total = nested + weights.auxk * aux + weights.multi_topk * multi
  total = total + weights.sparsity * sparsity
  fired_N = jnp.sum(code.vals_NK > 0, 1)
  if axis:
    fired_N = lax.psum(fired_N, axis)
  return Losses(
    fvu=fvu,
    nested=nested,
    auxk=aux,
    multi=multi,
    sparsity=sparsity,
    total=total,
    l0=jnp.sum(fired_N) / batch.rows,
    full=jnp.sum(fired_N >= config.most) / batch.rows,
    theta=theta * len(x_ND) / batch.rows,
  ), code


def _fire(params, every, most, batch, config, k, axis):
  """(code, sparsity, theta): what A makes of the largest activations."""
  none = jnp.zeros(())
  devices = batch.devices
  axes = tuple(name for name in (batch.axis, axis) if name)
  if config.activation == 'topk':
    if isinstance(k, int):
      code = every if k == most else model.select(every, k, axis)
    else:
      code = activations.fewer(every, k, axis)
    return code, none, none
  if config.activation == 'batchtopk':
    code, theta = activations.batchtopk(every, k, axes, devices)
    return code, none, theta
  width = config.bandwidth * config.width**0.5
  code, count = activations.jumprelu(params, every, width)
  share = len(every.vals_NK) / batch.rows
  rows = len(every.vals_NK) * devices
  l0 = lax.stop_gradient(lax.psum(count, axes) if axes else count) / rows
  # The value is of all devices, the gradient of this one's latents and rows.
  slope = 2 * (l0 / k - 1) / k * count / batch.rows
  value = (l0 / k - 1) ** 2 * share
  return code, slope + lax.stop_gradient(value - slope), none


def _nested(params, x_ND, code, prefixes, backend, axis):
  """(x - x̂, Σ‖error‖² averaged over the prefixes and the whole).

  After Bussmann, Nabeshima, Karvonen and Nanda, "Learning multi-level features
  with Matryoshka sparse autoencoders", arXiv 2503.17547: A sees all latents,
  and the first ones must explain the rows without the later ones.
  """
  where = {'backend': backend, 'axis': axis}
  if not prefixes:
    error_ND = x_ND - model.decode(params, code, **where)
    return error_ND, jnp.sum(error_ND**2)
  idx_NK = code.idx_NK
  if axis:
    idx_NK = idx_NK + lax.axis_index(axis) * len(params.b_enc_M)
  error_ND = x_ND - params.b_dec_D
  squares = []
  edges = (0, *prefixes, jnp.iinfo(jnp.int32).max)
  for low, high in itertools.pairwise(edges):
    own_NK = jnp.where((idx_NK >= low) & (idx_NK < high), code.vals_NK, 0)
    part = code._replace(vals_NK=own_NK)
    error_ND = error_ND - model.product(params, part, **where)
    squares.append(jnp.sum(error_ND**2))
  return error_ND, sum(squares) / len(squares)


def _auxk(params, x_ND, error_ND, dead_M, k_aux, backend, axis) -> jax.Array:
  """Σ‖e - ê‖²: the k_aux dead latents strongest on a row predict its error e.

  e = x - x̂ is a constant here, and so is b_dec: x̂ holds it already, so ê has
  none. Only dead latents get a gradient. As long as no more than k_aux are
  dead, all of them answer, and a dense product over those alone is enough.
  """
  e_ND = lax.stop_gradient(error_ND)
  b_M = params.b_enc_M

  def all_alive():
    return jnp.zeros(())

  def few_dead():
    size = min(k_aux, len(dead_M))
    (at_A,) = jnp.nonzero(dead_M, size=size, fill_value=0)
    used_A = jnp.arange(size) < jnp.sum(dead_M)
    low = params.w_enc_MD.dtype
    centred_ND = x_ND - lax.stop_gradient(params.b_dec_D)
    pre_NA = b_M[at_A] + jnp.dot(
      centred_ND.astype(low),
      params.w_enc_MD[at_A].T,
      preferred_element_type=jnp.float32,
    )
    z_NA = jnp.where(used_A, jnp.maximum(pre_NA, 0), 0)
    e_hat_ND = jnp.dot(
      z_NA.astype(low),
      params.w_dec_MD[at_A],
      preferred_element_type=jnp.float32,
    )
    if axis:
      e_hat_ND = sharded.reduce(e_hat_ND, axis)
    return jnp.sum((e_ND - e_hat_ND) ** 2)

  def many_dead():
    masked_M = jnp.where(dead_M, b_M, -jnp.inf)  # the living cannot win
    code = model.top(params, x_ND, masked_M, k_aux, backend, axis)
    e_hat_ND = model.product(params, code, backend, axis)
    return jnp.sum((e_ND - e_hat_ND) ** 2)

  count = jnp.sum(dead_M)
  if axis:
    count = lax.psum(count, axis)
  case = jnp.int32(count > 0) + jnp.int32(count > k_aux)
  return lax.switch(case, (all_alive, few_dead, many_dead))
