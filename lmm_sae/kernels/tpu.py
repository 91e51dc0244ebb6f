"""The functions of the family for the TensorCore of a TPU, by Pallas and XLA.

encode is a product tile by tile and an exact selection (`tpu_topk`), a chunk of
rows at a time. A product over K latents a row copies K rows from HBM
(`tpu_pallas`) or, where the rule of `cost` says that this is faster on the chip
and the inputs are bfloat16, is a dense product of XLA with the code spread out
by the matrix unit (`tpu_dense`), in bfloat16 too. On v4, v5e and v5p rows of
the paper's decoder are copied where a chip holds all latents, and multiplied
where eight chips share them. float32 is always copied, since a pass of bfloat16
would round it, as is everything on a chip that is not in `cost.DEVICES`.

The SparseCore is not used. It could start the copies, which takes the scalar
core some 8 bundles of instructions a row of 8 KiB, as the compiler schedules
them: 6 ns at the 1.5 GHz of a v5e, while the copy itself takes 10 ns of its
bandwidth, and the sum 4 more. So these products would be at most 1.4 times as
fast, and only where they are not dense; a v5e has no SparseCore that Pallas
knows of, and there is none here to test on.

None of this has run on a TPU. The kernels are compiled for v4, v5e and v5p
(`launch/check_tpu.sh`), and tested as Pallas interprets them.
"""

import jax
import jax.numpy as jnp
from jax import lax

from lmm_sae.kernels import cost, tpu_dense, tpu_pallas, tpu_topk
from lmm_sae.kernels.reference import adam, project
from lmm_sae.kernels.tpu_pallas import LANES, ROWS, padded, up

__all__ = ['adam', 'encode', 'project', 'sddmm', 'spmm', 'spmm_t']

F32, BF16 = jnp.float32, jnp.bfloat16
MOST_LATENTS = 2**17  # 8 rows of activations, twice: half the VMEM of a v4
CHUNK = 2**27  # activations that exist at a time: 512 MB


def device() -> cost.Device | None:
  """What the rule reckons with: the mesh's chips where there is a mesh."""
  chip = jax.sharding.get_abstract_mesh().abstract_device
  return cost.find(chip.device_kind if chip else jax.devices()[0].device_kind)


def form(name: str, low: jax.Array, rows: int, k: int, latents: int) -> str:
  """sparse or dense; `low` is the matrix whose rows are copied."""
  chip = device()
  if low.dtype != BF16 or chip is None or latents > MOST_LATENTS:
    return 'sparse'
  shape = cost.Shape(rows, low.shape[1], latents, k)
  return cost.choose(name, chip, shape).form


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
  w_MD = _whole(w_MD)
  b_M = padded(b_M.astype(F32), (ROWS * LANES,))

  def chunk(x_ND):
    return tpu_topk.select(*tpu_topk.activations(x_ND, w_MD, b_M), k=k)

  return _by_rows(chunk, len(w_MD), padded(x_ND, (1, LANES)))


def spmm(v_NK: jax.Array, i_NK: jax.Array, w_MD: jax.Array, /) -> jax.Array:
  """y[n] = Σ_k v[n, k] · w[i[n, k]]."""
  if form('spmm', w_MD, *i_NK.shape, len(w_MD)) == 'sparse':
    return tpu_pallas.spmm(v_NK, i_NK, w_MD)
  width, w_MD = w_MD.shape[1], _whole(w_MD)

  def chunk(v_NK, i_NK):
    code_NM = tpu_dense.spread(v_NK, i_NK, latents=len(w_MD))
    return jnp.dot(code_NM, w_MD, preferred_element_type=F32)

  return _by_rows(chunk, len(w_MD), v_NK, i_NK)[:, :width]


def sddmm(x_ND: jax.Array, i_NK: jax.Array, w_MD: jax.Array, /) -> jax.Array:
  """v[n, k] = ⟨x[n], w[i[n, k]]⟩."""
  if form('sddmm', w_MD, *i_NK.shape, len(w_MD)) == 'sparse':
    return tpu_pallas.sddmm(x_ND, i_NK, w_MD)
  w_MD = _whole(w_MD)

  def chunk(x_ND, i_NK):
    z_nBRL, _ = tpu_topk.activations(x_ND, w_MD, None)
    return tpu_dense.pick(z_nBRL, i_NK)

  x_ND = padded(x_ND.astype(BF16), (1, LANES))
  return _by_rows(chunk, len(w_MD), x_ND, i_NK)


def spmm_t(
  v_NK: jax.Array, i_NK: jax.Array, x_ND: jax.Array, /, *, latents: int
) -> jax.Array:
  """w[m] = Σ over i[n, k] = m of v[n, k] · x[n], for all M = `latents` rows."""
  if form('spmm_t', x_ND, *i_NK.shape, latents) == 'sparse':
    return tpu_pallas.spmm_t(v_NK, i_NK, x_ND, latents=latents)
  most = up(latents, ROWS * LANES)
  v_CNK, i_CNK, x_CND = _chunks(most, v_NK.astype(F32), i_NK, x_ND)

  def add(w_MD, part):
    v_NK, i_NK, x_ND = part
    code_NM = tpu_dense.spread(v_NK, i_NK, latents=most)
    more_MD = lax.dot_general(
      code_NM, x_ND, (((0,), (0,)), ((), ())), preferred_element_type=F32
    )
    return w_MD + more_MD, None

  w_MD = jnp.zeros((most, x_ND.shape[1]), F32)
  w_MD, _ = lax.scan(add, w_MD, (v_CNK, i_CNK, x_CND))
  return w_MD[:latents]


def _whole(w_MD: jax.Array) -> jax.Array:
  """w with zeros behind it, for kernels that take whole tiles."""
  return padded(w_MD, (ROWS * LANES, LANES))


def _chunks(latents: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """The arrays with rows in chunks, so that [rows, M] of one is bounded."""
  rows, tile = len(arrays[0]), tpu_topk.TILE_N
  most = max(CHUNK // latents // tile, 1) * tile
  chunk = -(-rows // -(-rows // most))
  chunk = up(chunk, tile if chunk > tile else ROWS)
  arrays = (padded(a, (chunk,) + (1,) * (a.ndim - 1)) for a in arrays)
  return tuple(a.reshape(-1, chunk, *a.shape[1:]) for a in arrays)


def _by_rows(function, latents: int, *arrays: jax.Array):
  """function(*arrays), a chunk of rows at a time."""
  parts = _chunks(latents, *arrays)
  if len(parts[0]) == 1:
    found = function(*(part[0] for part in parts))
  else:
    found = lax.map(lambda args: function(*args), parts)
    found = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found)
  return jax.tree.map(lambda a: a[: len(arrays[0])], found)
