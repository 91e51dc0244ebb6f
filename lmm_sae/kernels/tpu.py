"""The functions of the family in Pallas for the TensorCore of a TPU."""

import jax
import jax.numpy as jnp
from jax import lax

from lmm_sae.kernels import tpu_topk
from lmm_sae.kernels.reference import adam, project
from lmm_sae.kernels.tpu_pallas import (
  LANES,
  ROWS,
  padded,
  sddmm,
  spmm,
  spmm_t,
  up,
)

__all__ = ['adam', 'encode', 'project', 'sddmm', 'spmm', 'spmm_t']

F32 = jnp.float32
MOST_LATENTS = 2**17  # 8 rows of activations, twice: half the VMEM of a v4
CHUNK = 2**27  # activations that exist at a time: 512 MB


def encode(
  x_ND: jax.Array, w_MD: jax.Array, b_M: jax.Array, /, *, k: int
) -> tuple[jax.Array, jax.Array]:
  """The k largest of relu(x wᵀ + b), descending, ties to the lower index.

  Raises:
    NotImplementedError: more latents than a row of which fits in VMEM.
  """
  latents = len(w_MD)
  if latents > MOST_LATENTS:
    raise NotImplementedError(
      f'the kernel backend tpu takes up to {MOST_LATENTS} latents on a chip, '
      f'not {latents}: split them with --config.train.latent_shards, or use '
      '--config.train.backend=reference'
    )
  w_MD = padded(w_MD, (ROWS * LANES, LANES))
  b_M = padded(b_M.astype(F32), (ROWS * LANES,))

  def some(x_ND):
    return tpu_topk.select(*tpu_topk.activations(x_ND, w_MD, b_M), k=k)

  return _by_rows(some, len(w_MD), padded(x_ND, (1, LANES)))


def _by_rows(function, latents: int, *arrays: jax.Array):
  """function(*arrays), so many rows at a time that [rows, M] is bounded."""
  rows = len(arrays[0])
  most = max(CHUNK // latents // tpu_topk.TILE_N, 1) * tpu_topk.TILE_N
  chunks = -(-rows // most)
  chunk = -(-rows // chunks)
  chunk = up(chunk, tpu_topk.TILE_N if chunk > tpu_topk.TILE_N else ROWS)
  arrays = [padded(a, (chunk,) + (1,) * (a.ndim - 1)) for a in arrays]
  if len(arrays[0]) == chunk:
    found = function(*arrays)
  else:
    parts = tuple(a.reshape(-1, chunk, *a.shape[1:]) for a in arrays)
    found = lax.map(lambda args: function(*args), parts)
    found = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found)
  return jax.tree.map(lambda a: a[:rows], found)
