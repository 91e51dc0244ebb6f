"""The sparse autoencoder: configuration, parameters, encoder and decoder.

    z = A(relu(W_enc (x - b_dec) + b_enc))        x̂ = W_decᵀ z + b_dec

A leaves few latents on each row. With `topk` the k largest, after Gao et al.,
"Scaling and evaluating sparse autoencoders", arXiv 2406.04093, as trained in
arXiv 2411.14982; with `batchtopk` and `jumprelu` those above a threshold, of
which k is the number a row on average (see `sae.activations`). Everything is a
pure function of the parameters; the sparse products are those of `kernels.ops`.
"""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from lmm_sae.kernels import ops, reference, sharded

ACTIVATIONS = ('topk', 'batchtopk', 'jumprelu')


@dataclasses.dataclass(frozen=True)
class SaeConfig:
  """What decides the shape and the meaning of an SAE.

  Attributes:
    layer: 0-based decoder layer whose output it reads.
    width: D, of that output.
    latents: M.
    k: latents that may fire on one row; on average, unless A is `topk`.
    dead_after: rows without firing after which a latent is dead.
    aux: dead latents that may answer for one row in AuxK; 0: D / 2.
    activation: A, one of ACTIVATIONS.
    row_k: latents that may fire on one row where k is an average; 0: 4 k.
    prefixes: Matryoshka: the first so many latents are an SAE too; ascending,
      each below M; () for none.
    bandwidth: of JumpReLU's gradient, in root mean square lengths of a row.

  Raises:
    ValueError: a field is out of bounds.
  """

  layer: int
  width: int
  latents: int
  k: int
  dead_after: int = 10_000_000
  aux: int = 0
  activation: str = 'topk'
  row_k: int = 0
  prefixes: tuple[int, ...] = ()
  bandwidth: float = 0.01

  def __post_init__(self):
    object.__setattr__(self, 'prefixes', tuple(self.prefixes))  # JSON: a list
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
    if self.activation not in ACTIVATIONS:
      raise ValueError(
        f'sae.activation is {self.activation!r}; it is one of '
        f'{", ".join(ACTIVATIONS)}'
      )
    if self.row_k and not self.k <= self.row_k <= self.latents:
      raise ValueError(
        f'sae.row_k is {self.row_k}; it must be in {self.k}..{self.latents} '
        '(sae.k to sae.latents), or 0'
      )
    if self.activation == 'topk' and self.row_k not in (0, self.k):
      raise ValueError(
        f'sae.row_k is {self.row_k}, but with sae.activation=topk every row '
        f'has sae.k={self.k}: set it to 0'
      )
    steps = zip(
      (0, *self.prefixes), (*self.prefixes, self.latents), strict=True
    )
    if any(one >= two for one, two in steps):
      raise ValueError(
        f'sae.prefixes is {self.prefixes}; they must ascend, within '
        f'1..{self.latents - 1} (sae.latents - 1)'
      )
    if not self.bandwidth > 0:
      raise ValueError(f'sae.bandwidth is {self.bandwidth}; it must be above 0')

  @property
  def k_aux(self) -> int:
    """Dead latents that may answer for one row; Gao et al. take D / 2."""
    return min(self.aux or max(self.width // 2, 1), self.latents)

  @property
  def most(self) -> int:
    """K: latents that can fire on one row, the columns of its code."""
    if self.activation == 'topk':
      return self.k
    return self.row_k or min(4 * self.k, self.latents)


@flax.struct.dataclass
class Params:
  """The arrays of an SAE.

  Attributes:
    w_enc_MD: encoder rows.
    b_enc_M: their biases.
    w_dec_MD: decoder rows, of unit norm.
    b_dec_D: what x̂ starts from, and what x is read against.
    theta_M: activation above which a latent fires; 0 with TopK.
  """

  w_enc_MD: jax.Array
  b_enc_M: jax.Array
  w_dec_MD: jax.Array
  b_dec_D: jax.Array
  theta_M: jax.Array


class SparseCode(NamedTuple):
  """The latents that fire on each row: values, descending, and indices.

  A row on which fewer than K fire is filled up with values of 0.
  """

  vals_NK: jax.Array
  idx_NK: jax.Array


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
    theta_M=jnp.zeros(config.latents),
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
  """The k latents that fire most on each row, whatever their thresholds.

  Products are of the dtype of W_enc. With `axis`, over which latents are split,
  each device holds those of the k that are its own, by its own indices; its
  other values are 0.
  """
  b_dec_D = sharded.spread(params.b_dec_D, axis) if axis else params.b_dec_D
  b_M = _bias(params.b_enc_M, lax.stop_gradient(params.w_enc_MD), b_dec_D)
  return top(params, x_ND, b_M, k, backend, axis)


@jax.custom_vjp
def _bias(b_enc_M, w_enc_MD, b_dec_D):
  """b_enc, with the gradient of b_dec that W (x - b_dec) + b_enc has.

  So it takes a product with one vector, not a pass over the rows.
  """
  del w_enc_MD, b_dec_D
  return b_enc_M


def _bias_bwd(w_enc_MD, grad_M):
  along_D = jnp.dot(
    grad_M.astype(w_enc_MD.dtype), w_enc_MD, preferred_element_type=jnp.float32
  )
  return grad_M, None, -along_D


_bias.defvjp(lambda b_enc_M, w_enc_MD, b_dec_D: (b_enc_M, w_enc_MD), _bias_bwd)


def top(
  params: Params,
  x_ND: jax.Array,
  b_M: jax.Array,
  k: int,
  backend: str,
  axis: str,
) -> SparseCode:
  """The k largest of relu(W (x - b_dec) + b): see `encode`.

  b_dec has no gradient here; rows are centred before they are rounded.
  """
  own = min(k, len(b_M))
  x_ND = x_ND - lax.stop_gradient(params.b_dec_D)
  x_ND = x_ND.astype(params.w_enc_MD.dtype)
  code = ops.encode(x_ND, params.w_enc_MD, b_M, k=own, backend=backend)
  return select(SparseCode(*code), k, axis)


def select(code: SparseCode, k: int, axis: str) -> SparseCode:
  """The k best of a code, which is sorted; over the axis where there is one."""
  code = SparseCode(code.vals_NK[:, :k], code.idx_NK[:, :k])
  if not axis:
    return code
  return code._replace(vals_NK=sharded.select(code.vals_NK, k=k, axis=axis))


def fire(params: Params, code: SparseCode, /) -> SparseCode:
  """The code with 0 for what is not above its latent's threshold."""
  above_NK = code.vals_NK > params.theta_M[code.idx_NK]
  return code._replace(vals_NK=jnp.where(above_NK, code.vals_NK, 0))


def decode(
  params: Params, code: SparseCode, /, *, backend: str = 'auto', axis: str = ''
) -> jax.Array:
  """The rows x̂ that a code stands for."""
  return product(params, code, backend, axis) + params.b_dec_D


def product(
  params: Params, code: SparseCode, backend: str, axis: str
) -> jax.Array:
  """W_decᵀ z, float32 [N, D]."""
  y_ND = ops.spmm(*code, params.w_dec_MD, backend=backend)
  return sharded.reduce(y_ND, axis) if axis else y_ND


def normalise(params: Params) -> Params:
  """The parameters with rows of W_dec of unit norm."""
  return params.replace(w_dec_MD=reference.unit_rows(params.w_dec_MD))


def fold(params: Params) -> Params:
  """The same SAE with decoder rows of unit norm: z takes their norm over.

  Each latent adds to x̂ what it did. Which of them fire is the same, too, where
  thresholds decide; k largest are now those of the largest part of x̂.
  """
  norm_M = jnp.linalg.norm(params.w_dec_MD, axis=-1)
  norm_M = jnp.where(norm_M > 1e-12, norm_M, 1)
  return params.replace(
    w_enc_MD=params.w_enc_MD * norm_M[:, None],
    b_enc_M=params.b_enc_M * norm_M,
    w_dec_MD=params.w_dec_MD / norm_M[:, None],
    theta_M=params.theta_M * norm_M,
  )


def rescale(params: Params, scale: jax.Array) -> Params:
  """The same SAE for rows that are `scale` times as long.

  z and x̂ become `scale` times as large: only biases and thresholds change.
  """
  return params.replace(
    b_enc_M=params.b_enc_M * scale,
    b_dec_D=params.b_dec_D * scale,
    theta_M=params.theta_M * scale,
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
