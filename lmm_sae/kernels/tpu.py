"""The functions of the family in Pallas for the TensorCore of a TPU.

What a TensorCore has no instructions for decides the design: there is no sort,
scatter or cumsum, and rows of HBM are gathered by copies that the scalar core
starts one by one.

encode   `_pre` computes relu(x wᵀ + b) tile by tile and keeps, beside it, the
         maxima of groups of latents. `_thresholds` then finds the k-th largest
         activation of each row by bisection on its bits, which keep the order
         of floats that are not negative. The k-th largest maximum of a group
         bounds it from below, so few passes are left, and all are over VMEM.
         The k survivors are picked out block by block in XLA (`_pick`), with
         ties to the lower index, and sorted, k instead of M numbers.
spmm     the k rows of w that a row needs are copied from HBM while those of the
sddmm    row before are summed up.
spmm_t   entries are sorted by latent (in XLA), so that each program sums up the
         rows of x for 8 neighbouring latents and writes them once.

The SparseCore could start the gathers of the last three without the scalar
core; no kernel here uses it. None of these has run on a TPU: they are compiled
for v4, v5e and v5p (`launch/check_tpu.sh`) and tested as Pallas interprets
them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lmm_sae.kernels.reference import adam, project

__all__ = ['adam', 'encode', 'project', 'sddmm', 'spmm', 'spmm_t']

F32, I32 = jnp.float32, jnp.int32
LANES = 128
TILE_N, TILE_M = 512, 1024  # of the product: 341 FLOP a byte of bfloat16
TILE_D = 1024  # bytes of a row of x or w that are multiplied at a time
ROWS = 8  # sublanes of float32: rows whose thresholds are found at once
SCAN = 4096  # lanes of a pass at a time
MOST_LATENTS = 2**18  # 8 rows of activations take half the VMEM of a v4
CHUNK = 2**27  # activations that exist at a time: 512 MB
ROUGH = 12  # halvings of the bracket over the maxima of groups
GATHER_ROWS = 32  # rows of a program of spmm and sddmm
TILE_L = 8  # latents of a program of spmm_t
BUFFER = 8 * 2**20  # of the 16 MB of VMEM that a program has, for gathered rows
INFINITY_BITS = 0x7F800000


def encode(
  x_ND: jax.Array, w_MD: jax.Array, b_M: jax.Array, /, *, k: int
) -> tuple[jax.Array, jax.Array]:
  """The k largest of relu(x wᵀ + b), descending, ties to the lower index.

  Raises:
    NotImplementedError: more latents than a row of which fits in VMEM.
  """
  rows, latents = len(x_ND), len(w_MD)
  if latents > MOST_LATENTS:
    raise NotImplementedError(
      f'the kernel backend tpu takes up to {MOST_LATENTS} latents on a chip, '
      f'not {latents}: split them with --config.train.latent_shards, or use '
      '--config.train.backend=reference'
    )
  x_ND, w_MD = (_padded(a, (1, LANES)) for a in (x_ND, w_MD))
  tile_m = min(TILE_M, _up(latents, LANES))
  w_MD = _padded(w_MD, (tile_m, 1))
  b_M = _padded(b_M.astype(F32), (tile_m,))
  most = CHUNK // max(len(w_MD), k * LANES)
  chunk = min(_up(rows, min(rows, TILE_N)), max(most // TILE_N, 1) * TILE_N)
  chunk = _up(chunk, ROWS)
  x_ND = _padded(x_ND, (chunk, 1))

  def some(x_ND):
    z_NM, max_NG = _pre(x_ND, w_MD, b_M, tile_m)
    return _pick(z_NM, _thresholds(z_NM, max_NG, k), k)

  if len(x_ND) == chunk:
    vals_NK, idx_NK = some(x_ND)
  else:
    parts = lax.map(some, x_ND.reshape(-1, chunk, x_ND.shape[1]))
    vals_NK, idx_NK = (part.reshape(-1, k) for part in parts)
  return vals_NK[:rows], idx_NK[:rows]


def _pre(x_ND, w_MD, b_M, tile_m):
  """relu(x wᵀ + b) [N, M] and the maxima of groups, [N, 128 M / tile_m].

  A group is what stands in one lane of a tile.
  """
  (rows, width), latents = x_ND.shape, len(w_MD)
  tile_n = _divisor(rows, TILE_N, ROWS)
  tile_d = _divisor(width, TILE_D // x_ND.dtype.itemsize, LANES)
  precision = None if x_ND.dtype == jnp.bfloat16 else lax.Precision.HIGHEST

  def kernel(x, w, b, z, top, sums):
    at = pl.program_id(2)

    @pl.when(at == 0)
    def _():
      sums[...] = jnp.zeros_like(sums)

    sums[...] += lax.dot_general(
      x[...],
      w[...],
      (((1,), (1,)), ((), ())),
      precision=precision,
      preferred_element_type=F32,
    )

    @pl.when(at == pl.num_programs(2) - 1)
    def _():
      act = jnp.maximum(sums[...] + b[...], 0)
      z[...] = act
      best = act[:, :LANES]
      for start in range(LANES, tile_m, LANES):
        best = jnp.maximum(best, act[:, start : start + LANES])
      top[...] = best

  size = x_ND.dtype.itemsize
  tiles = latents // tile_m
  return _call(
    kernel,
    (x_ND, w_MD, b_M[None]),
    grid=(rows // tile_n, tiles, width // tile_d),
    in_specs=[
      pl.BlockSpec((tile_n, tile_d), lambda n, m, d: (n, d)),
      pl.BlockSpec((tile_m, tile_d), lambda n, m, d: (m, d)),
      pl.BlockSpec((1, tile_m), lambda n, m, d: (0, m)),
    ],
    out_specs=[
      pl.BlockSpec((tile_n, tile_m), lambda n, m, d: (n, m)),
      pl.BlockSpec((tile_n, LANES), lambda n, m, d: (n, m)),
    ],
    out_shape=[
      jax.ShapeDtypeStruct((rows, latents), F32),
      jax.ShapeDtypeStruct((rows, tiles * LANES), F32),
    ],
    scratch_shapes=[pltpu.VMEM((tile_n, tile_m), F32)],
    cost=(
      2 * rows * latents * width,
      size * width * (rows * tiles + latents * (rows // tile_n))
      + 4 * rows * latents,
    ),
    name='encode_pre',
  )


def _thresholds(z_NM, max_NG, k):
  """Bits t [N, 1] with count(z > t) <= k <= count(z >= t), in each row.

  The first is an equality wherever a bisection came across it.
  """
  rows, latents = z_NM.shape
  groups = max_NG.shape[1]

  def kernel(z, top, out):
    def count(ref, size, least):
      """How many in each row are at least `least` [8, 1]."""
      step = _divisor(size, SCAN, LANES)

      def add(at, sums):
        part = ref[:, pl.ds(pl.multiple_of(at * step, step), step)]
        more = (lax.bitcast_convert_type(part, I32) >= least).astype(I32)
        for start in range(0, step, LANES):
          sums += more[:, start : start + LANES]
        return sums

      zeros = jnp.zeros((ROWS, LANES), I32)
      sums = lax.fori_loop(0, size // step, add, zeros)
      return jnp.sum(sums.astype(F32), 1, keepdims=True).astype(I32)

    def middle(low, high):
      return low + lax.div(high - low, jnp.full_like(low, 2))

    low = jnp.zeros((ROWS, 1), I32)
    high = jnp.full((ROWS, 1), INFINITY_BITS, I32)

    def rough(_, bounds):
      low, high = bounds
      mid = middle(low, high)
      enough = count(top, groups, mid) >= k
      return jnp.where(enough, mid, low), jnp.where(enough, high, mid)

    if groups > 2 * k:  # k groups hold k elements as large as their maxima
      low, _ = lax.fori_loop(0, ROUGH, rough, (low, high))

    def halve(state):
      low, high, _ = state
      mid = middle(low, high)
      found = count(z, latents, mid)
      exact = found == k  # then what is above mid - 1 are the k
      more, fewer = found > k, found < k
      low = jnp.where(exact, mid - 1, jnp.where(more, mid, low))
      high = jnp.where(exact, mid, jnp.where(fewer, mid, high))
      return low, high, left(low, high)

    def left(low, high):
      return jnp.max((high - low).astype(F32)) > 1

    low, _, _ = lax.while_loop(
      lambda state: state[2], halve, (low, high, left(low, high))
    )
    out[...] = jnp.broadcast_to(low, (ROWS, LANES))

  passes = 12  # over a row, about
  out_NL = _call(
    kernel,
    (z_NM, max_NG),
    grid=(rows // ROWS,),
    in_specs=[
      pl.BlockSpec((ROWS, latents), lambda n: (n, 0)),
      pl.BlockSpec((ROWS, groups), lambda n: (n, 0)),
    ],
    out_specs=pl.BlockSpec((ROWS, LANES), lambda n: (n, 0)),
    out_shape=jax.ShapeDtypeStruct((rows, LANES), I32),
    cost=(2 * passes * rows * latents, 4 * rows * (latents + groups)),
    name='encode_thresholds',
  )
  return out_NL[:, :1]


def _pick(z_NM, bits_N1, k):
  """The k elements of each row that are above its threshold, or lowest at it.

  Where a slot of the k finds its element is said by counts of blocks of 128
  latents; of each slot's block, one element is taken.
  """
  rows = len(z_NM)
  z_NBL = z_NM.reshape(rows, -1, LANES)
  bits_N11 = bits_N1[..., None]

  def counted(mask):
    return jnp.sum(mask, -1, dtype=I32)

  own = lax.bitcast_convert_type(z_NBL, I32)
  above_NB, at_NB = counted(own > bits_N11), counted(own == bits_N11)
  room_N1 = k - jnp.sum(above_NB, 1, keepdims=True)
  ties_NB = jnp.clip(room_N1 - (jnp.cumsum(at_NB, 1) - at_NB), 0, at_NB)
  ends_NB = jnp.cumsum(above_NB + ties_NB, 1)
  slot_K = jnp.arange(k, dtype=I32)
  block_NK = counted(ends_NB[:, None] <= slot_K[:, None])

  def of_block(a_NB):
    return jnp.take_along_axis(a_NB, block_NK, 1)

  rank_NK = slot_K - of_block(ends_NB - above_NB - ties_NB)
  z_NKL = jnp.take_along_axis(z_NBL, block_NK[..., None], 1)
  own = lax.bitcast_convert_type(z_NKL, I32)
  tied = own == bits_N11
  kept = (own > bits_N11) | (
    tied & (_before(tied) < of_block(ties_NB)[..., None])
  )
  hit = kept & (_before(kept) == rank_NK[..., None])
  vals_NK = jnp.sum(jnp.where(hit, z_NKL, 0), -1)
  lane_NK = jnp.sum(jnp.where(hit, jnp.arange(LANES), 0), -1, dtype=I32)
  idx_NK = block_NK * LANES + lane_NK
  least_NK, idx_NK = lax.sort((-vals_NK, idx_NK), num_keys=1, is_stable=True)
  return -least_NK, idx_NK


def _before(mask):
  """How many are true in earlier lanes; a product, for want of a cumsum."""
  earlier = jnp.triu(jnp.ones((LANES, LANES), jnp.bfloat16), 1)
  found = jnp.dot(
    mask.astype(jnp.bfloat16), earlier, preferred_element_type=F32
  )
  return found.astype(I32)


def spmm(v_NK: jax.Array, i_NK: jax.Array, w_MD: jax.Array, /) -> jax.Array:
  """y[n] = Σ_k v[n, k] · w[i[n, k]]."""
  rows = len(i_NK)

  def compute(row, start, v, out, rows_Kcl):
    def add(j, sums):
      return sums + v[row, start + j] * rows_Kcl[j].astype(F32)

    @pl.when(start == 0)
    def _():
      out[row] = jnp.zeros(columns, F32)

    out[row] = lax.fori_loop(0, rows_Kcl.shape[0], add, out[row])

  w_Mcl = _lanes(w_MD, w_MD.dtype.itemsize)
  columns = w_Mcl.shape[1:]
  y_Ncl = _gathered(
    'spmm', compute, i_NK, v_NK.astype(F32), pltpu.SMEM, w_Mcl, columns
  )
  return y_Ncl.reshape(len(y_Ncl), -1)[:rows, : w_MD.shape[1]]


def sddmm(x_ND: jax.Array, i_NK: jax.Array, w_MD: jax.Array, /) -> jax.Array:
  """v[n, k] = ⟨x[n], w[i[n, k]]⟩."""
  rows, k = i_NK.shape

  def compute(row, start, x, out, rows_Kcl):
    parts_KL = jnp.sum(rows_Kcl[...].astype(F32) * x[row], 1)
    part = pl.ds(start, rows_Kcl.shape[0])
    out[pl.ds(row, 1), part] = lax.dot_general(
      jnp.ones((1, LANES), F32),
      parts_KL,
      (((1,), (1,)), ((), ())),
      precision=lax.Precision.HIGHEST,
      preferred_element_type=F32,
    )

  size = w_MD.dtype.itemsize
  x_Ncl = _lanes(x_ND.astype(F32), size)
  v_NK = _gathered(
    'sddmm', compute, i_NK, x_Ncl, pltpu.VMEM, _lanes(w_MD, size), None
  )
  return v_NK[:rows, :k]


def _gathered(name, compute, i_NK, other, space, w_Mcl, out_row):
  """Runs `compute` for each row, with rows of w that it names in VMEM.

  Args:
    name: of the kernel.
    compute: (row, first of its k, ref of other, ref of out, rows of w).
    i_NK: which rows of w.
    other: an array with a leading N, and the memory that it goes to.
    w_Mcl: rows as [c, 128]; whole tiles, so that any one can be copied.
    out_row: shape of a row of the result; None: its k.
  """
  rows, k = i_NK.shape
  columns = w_Mcl.shape[1:]
  row_bytes = columns[0] * LANES * w_Mcl.dtype.itemsize
  part = BUFFER // (2 * row_bytes)  # of the k, that are there at a time
  if part < min(k, LANES):
    raise NotImplementedError(
      f'the kernel backend tpu has no room for 2 x {min(k, LANES)} rows of '
      f'{row_bytes} bytes in VMEM: use --config.train.compute=bfloat16 or '
      '--config.train.backend=reference'
    )
  part = k if k <= part else part // LANES * LANES
  tile = min(GATHER_ROWS, _up(rows, ROWS))
  i_NK = _padded(i_NK, (tile, part))
  if space == pltpu.SMEM:
    other = _padded(other, (tile, part))
  else:
    other = _padded(other, (tile,) + (1,) * (other.ndim - 1))
  parts = i_NK.shape[1] // part
  out_row = out_row or i_NK.shape[1:]

  def kernel(i, own, w, out, buffer, done):
    def copies(at, act):
      """Starts, or waits for, the copies of the at-th part of the tile."""
      slot, row, start = lax.rem(at, 2), lax.div(at, parts), lax.rem(at, parts)

      def one(j, _):
        source = w.at[i[row, start * part + j]]
        act(pltpu.make_async_copy(source, buffer.at[slot, j], done.at[slot]))

      lax.fori_loop(0, part, one, None)
      return slot, row, start * part

    def each(at, _):
      @pl.when(at + 1 < tile * parts)
      def _():
        copies(at + 1, lambda copy: copy.start())

      slot, row, start = copies(at, lambda copy: copy.wait())
      compute(row, start, own, out, buffer.at[slot])

    copies(0, lambda copy: copy.start())
    lax.fori_loop(0, tile * parts, each, None)

  rest = (0,) * len(out_row)
  own_rest = (0,) * (other.ndim - 1)
  return _call(
    kernel,
    (i_NK, other, w_Mcl),
    grid=(len(i_NK) // tile,),
    in_specs=[
      pl.BlockSpec(
        (tile, i_NK.shape[1]), lambda n: (n, 0), memory_space=pltpu.SMEM
      ),
      pl.BlockSpec(
        (tile, *other.shape[1:]), lambda n: (n, *own_rest), memory_space=space
      ),
      pl.BlockSpec(memory_space=pl.ANY),
    ],
    out_specs=pl.BlockSpec((tile, *out_row), lambda n: (n, *rest)),
    out_shape=jax.ShapeDtypeStruct((len(i_NK), *out_row), F32),
    scratch_shapes=[
      pltpu.VMEM((2, part, *columns), w_Mcl.dtype),
      pltpu.SemaphoreType.DMA((2,)),
    ],
    cost=(
      2 * rows * k * columns[0] * LANES,
      rows * (k * (row_bytes + 8) + 4 * columns[0] * LANES),
    ),
    name=name,
  )


def spmm_t(
  v_NK: jax.Array, i_NK: jax.Array, x_ND: jax.Array, /, *, latents: int
) -> jax.Array:
  """w[m] = Σ over i[n, k] = m of v[n, k] · x[n], for all M = `latents` rows."""
  k = i_NK.shape[1]
  x_Ncl = _lanes(x_ND, x_ND.dtype.itemsize)
  columns = x_Ncl.shape[1:]
  tiles = -(-latents // TILE_L)
  latent_E, at_E = lax.sort(
    (i_NK.reshape(-1), jnp.arange(i_NK.size, dtype=I32)), num_keys=1
  )
  edges = jnp.arange(tiles + 1, dtype=I32) * TILE_L
  starts = jnp.searchsorted(latent_E, edges).astype(I32)

  def runs(a_E):  # whole runs of 128, any of which can be copied
    return _padded(a_E, (LANES,)).reshape(-1, 1, LANES)

  entries = (
    runs(at_E // k),
    runs(latent_E),
    runs(v_NK.reshape(-1)[at_E].astype(F32)),
  )

  def kernel(starts, rows, owners, values, x, out, *scratch):
    rows_s, owners_s, values_s, buffer, listed, done = scratch
    tile = pl.program_id(0)
    first, last = starts[tile], starts[tile + 1]
    out[...] = jnp.zeros_like(out)

    def run(at, _):
      copies = [
        pltpu.make_async_copy(source.at[at], target, listed.at[j])
        for j, (source, target) in enumerate(
          ((rows, rows_s), (owners, owners_s), (values, values_s))
        )
      ]
      for copy in copies:
        copy.start()
      for copy in copies:
        copy.wait()
      low = jnp.maximum(first - at * LANES, 0)
      high = jnp.minimum(last - at * LANES, LANES)

      def fetch(e):
        return pltpu.make_async_copy(
          x.at[rows_s[0, e]], buffer.at[e], done.at[e]
        )

      def add(e, _):
        fetch(e).wait()
        own = owners_s[0, e] - tile * TILE_L
        out[own] += values_s[0, e] * buffer[e].astype(F32)

      lax.fori_loop(low, high, lambda e, _: fetch(e).start(), None)
      lax.fori_loop(low, high, add, None)

    lax.fori_loop(
      lax.div(first, LANES), lax.div(last + LANES - 1, LANES), run, None
    )

  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  bytes_x = columns[0] * LANES * x_Ncl.dtype.itemsize
  w_Mcl = _call(
    kernel,
    (starts, *entries, x_Ncl),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(tiles,),
      in_specs=[anywhere] * 4,
      out_specs=pl.BlockSpec((TILE_L, *columns), lambda m, *_: (m, 0, 0)),
      scratch_shapes=[
        pltpu.SMEM((1, LANES), I32),
        pltpu.SMEM((1, LANES), I32),
        pltpu.SMEM((1, LANES), F32),
        pltpu.VMEM((LANES, *columns), x_Ncl.dtype),
        pltpu.SemaphoreType.DMA((3,)),
        pltpu.SemaphoreType.DMA((LANES,)),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct((tiles * TILE_L, *columns), F32),
    cost=(
      2 * i_NK.size * columns[0] * LANES,
      i_NK.size * (bytes_x + 12) + 4 * latents * columns[0] * LANES,
    ),
    name='spmm_t',
  )
  return w_Mcl.reshape(len(w_Mcl), -1)[:latents, : x_ND.shape[1]]


def _call(kernel, args, *, cost, **spec):
  """A pallas_call that says what it costs; interpreted on a CPU."""
  flops, moved = cost
  estimate = pl.CostEstimate(
    flops=flops, transcendentals=0, bytes_accessed=moved
  )

  def call(*args, interpret):
    return pl.pallas_call(
      kernel, cost_estimate=estimate, interpret=interpret, **spec
    )(*args)

  return lax.platform_dependent(
    *args,
    cpu=functools.partial(call, interpret=True),
    tpu=functools.partial(call, interpret=False),
  )


def _lanes(a_ND: jax.Array, size: int) -> jax.Array:
  """Rows as whole tiles of 128 lanes, [N, D / 128, 128], filled up with 0.

  A tile is of as many sublanes as numbers of `size` bytes have.
  """
  sublanes = 32 // size
  a_ND = _padded(a_ND, (1, sublanes * LANES))
  return a_ND.reshape(len(a_ND), -1, LANES)


def _padded(array: jax.Array, multiples: tuple[int, ...]) -> jax.Array:
  """The array with zeros behind it, up to multiples in each dimension."""
  spare = [
    (0, -size % multiple)
    for size, multiple in zip(array.shape, multiples, strict=True)
  ]
  return jnp.pad(array, spare) if any(after for _, after in spare) else array


def _up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


def _divisor(size: int, most: int, multiple: int) -> int:
  """The largest multiple that divides `size` and is at most `most`."""
  return max(
    part
    for part in range(multiple, min(most, size) + 1, multiple)
    if size % part == 0
  )
