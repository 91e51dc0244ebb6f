"""The exact top-k of relu(x wᵀ + b) for the TensorCore of a TPU.

There is no sort, scatter or cumsum on a TensorCore, and a lane cannot be looked
up by its number, so all of it is done by comparing, counting and multiplying.

`activations` computes relu(x wᵀ + b) tile by tile and keeps, beside it, the
maxima of groups of latents. `select` holds the activations of 8 rows in VMEM
and finds the k-th largest of each row by bisection on its bits, which keep the
order of floats that are not negative. The k-th largest maximum of a group
bounds it from below, so few passes are left. Then counts of blocks of 128
latents say in which block each of the k slots finds its element; a product with
a one-hot matrix fetches these blocks for all slots at once, byte by byte, which
is exact in bfloat16, and a second count finds the lane. XLA sorts the k.

NaN counts as the largest number, as it does for lax.top_k.

For 131,072 latents and k = 256 the compiler schedules some 63,000 bundles for 8
rows on a v5e, with 12 halvings: 5.2 µs a row at 1.5 GHz, which is about what
the product takes there (5.4 µs at its peak). It is a count, not a measurement.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lmm_sae.kernels.tpu_pallas import (
  LANES,
  ROWS,
  call,
  divisor,
  up,
)

F32, I32, BF16 = jnp.float32, jnp.int32, jnp.bfloat16
TILE_N, TILE_M = 512, 1024  # of the product: 341 FLOP a byte of bfloat16
TILE_D = 1024  # bytes of a row of x or w that are multiplied at a time
SCAN = 32  # blocks of a pass at a time
ROUGH = 12  # halvings of the bracket over the maxima of groups
SLOTS = 256  # of the k that are filled at once
FETCH = 256  # blocks that they are looked for in at once
PASSES = 12  # over a row, about
NO_NUMBER = 0x7FFFFFFF  # the largest bits of a float


def activations(
  x_ND: jax.Array, w_MD: jax.Array, b_M: jax.Array | None, /
) -> tuple[jax.Array, jax.Array]:
  """x wᵀ in tiles, [N / 8, M / 128, 8, 128], which is how XLA lays out [N, M].

  With a b_M it is relu(x wᵀ + b). Beside it, maxima of groups, [N, G]: a group
  is what stands in one lane of a tile. N is a multiple of 8, M and D of 128.
  """
  (rows, width), latents = x_ND.shape, len(w_MD)
  tile_n = divisor(rows, TILE_N, ROWS)
  tile_m = divisor(latents, TILE_M, LANES)
  tile_d = divisor(width, TILE_D // x_ND.dtype.itemsize, LANES)
  precision = None if x_ND.dtype == BF16 else lax.Precision.HIGHEST
  plain = b_M is None
  b_M = jnp.zeros(latents) if plain else b_M

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
      act = sums[...]
      if not plain:  # abs: of -0 and of NaN
        act = jnp.abs(jnp.maximum(act + b[...], 0))
      best = act[:, :LANES]
      for block in range(tile_m // LANES):
        part = act[:, block * LANES : (block + 1) * LANES]
        z[:, block] = part.reshape(tile_n // ROWS, ROWS, LANES)
        best = jnp.maximum(best, part)
      top[...] = best

  size = x_ND.dtype.itemsize
  tiles = latents // tile_m
  return call(
    kernel,
    (x_ND, w_MD, b_M[None]),
    grid=(rows // tile_n, tiles, width // tile_d),
    in_specs=[
      pl.BlockSpec((tile_n, tile_d), lambda n, m, d: (n, d)),
      pl.BlockSpec((tile_m, tile_d), lambda n, m, d: (m, d)),
      pl.BlockSpec((1, tile_m), lambda n, m, d: (0, m)),
    ],
    out_specs=[
      pl.BlockSpec(
        (tile_n // ROWS, tile_m // LANES, ROWS, LANES),
        lambda n, m, d: (n, m, 0, 0),
      ),
      pl.BlockSpec((tile_n, LANES), lambda n, m, d: (n, m)),
    ],
    out_shape=[
      jax.ShapeDtypeStruct((rows // ROWS, latents // LANES, ROWS, LANES), F32),
      jax.ShapeDtypeStruct((rows, tiles * LANES), F32),
    ],
    scratch_shapes=[pltpu.VMEM((tile_n, tile_m), F32)],
    cost=(
      2 * rows * latents * width,
      size * width * (rows * tiles + latents * (rows // tile_n))
      + 4 * rows * latents,
    ),
    semantics=('parallel', 'parallel', 'arbitrary'),
    name='activations',
  )


def select(
  z_nBRL: jax.Array, max_NG: jax.Array, /, *, k: int
) -> tuple[jax.Array, jax.Array]:
  """The k largest of each row of `activations`, descending, and where."""
  parts, blocks = z_nBRL.shape[:2]
  rows, latents, groups = parts * ROWS, blocks * LANES, max_NG.shape[1]
  slots = min(SLOTS, up(k, LANES))
  width = up(k, slots)

  def kernel(z, top, bits, idx, low, above, tied, start, end):
    for ref in (above, tied):
      ref[...] = jnp.zeros_like(ref)
    low[...] = jnp.broadcast_to(_threshold(z, top, k), (ROWS, LANES))

    step, lanes = _blocks(blocks)

    def counted(at, _):
      row, part = lax.div(at, blocks // step), lax.rem(at, blocks // step)
      own_BL = _row(z, row, part * step, step)
      least_1L = low[pl.ds(row, 1)]
      to = (pl.ds(row, 1), lanes(part))
      above[to] = _counts(own_BL > least_1L)
      tied[to] = _counts(own_BL == least_1L)

    lax.fori_loop(0, ROWS * blocks // step, counted, None)
    room_R1 = k - jnp.sum(above[...], 1, keepdims=True)
    before_RB = _sums(tied[...]) - tied[...]
    tied[...] = jnp.clip(room_R1 - before_RB, 0, tied[...])
    taken_RB = above[...] + tied[...]
    start[...] = _sums(taken_RB) - taken_RB
    end[...] = start[...] + taken_RB

    def filled(at, _):
      row, part = lax.div(at, width // slots), lax.rem(at, width // slots)
      _fill(z, low, start, end, tied, row, part * slots, slots, bits, idx)

    lax.fori_loop(0, ROWS * width // slots, filled, None)

  bits_NK, idx_NK = call(
    kernel,
    (z_nBRL.reshape(-1, LANES), max_NG),
    grid=(parts,),
    in_specs=[
      pl.BlockSpec((blocks * ROWS, LANES), lambda n: (n, 0)),
      pl.BlockSpec((ROWS, groups), lambda n: (n, 0)),
    ],
    out_specs=[pl.BlockSpec((ROWS, width), lambda n: (n, 0))] * 2,
    out_shape=[jax.ShapeDtypeStruct((rows, width), I32)] * 2,
    scratch_shapes=[
      pltpu.VMEM((ROWS, LANES), I32),
      *[pltpu.VMEM((ROWS, up(blocks, LANES)), F32)] * 4,
    ],
    cost=(
      rows * latents * (2 * PASSES + 8 * width),
      4 * rows * (latents + groups + 2 * width),
    ),
    semantics=('parallel',),
    name='select',
  )
  less_NK, idx_NK = lax.sort(
    (-bits_NK[:, :k], idx_NK[:, :k]), num_keys=2, is_stable=False
  )
  return lax.bitcast_convert_type(-less_NK, F32), idx_NK


def _threshold(z, top, k):
  """Bits t [8, 1] with count(z > t) <= k <= count(z >= t), in each row.

  The first is an equality wherever the bisection came across it. It ends
  whatever the bits are: the interval is halved.
  """
  blocks, groups = z.shape[0] // ROWS, top.shape[1]

  def count(size, part, least):
    """How many of each row are at least `least` [8, 1]."""

    def add(at, sums):
      return sums + (lax.bitcast_convert_type(part(at), I32) >= least)

    step = divisor(size, SCAN, 1)

    def several(at, sums):
      for j in range(step):
        sums = add(at * step + j, sums)
      return sums

    zeros = jnp.zeros((ROWS, LANES), I32)
    sums = lax.fori_loop(0, size // step, several, zeros)
    return jnp.sum(sums.astype(F32), 1, keepdims=True).astype(I32)

  def of_blocks(at):
    return z[pl.ds(pl.multiple_of(at * ROWS, ROWS), ROWS)]

  def of_groups(at):
    return top[:, pl.ds(pl.multiple_of(at * LANES, LANES), LANES)]

  def middle(low, high):
    return low + lax.shift_right_logical(high - low, jnp.ones_like(low))

  low = jnp.zeros((ROWS, 1), I32)
  high = jnp.full((ROWS, 1), NO_NUMBER, I32)

  def rough(_, bounds):
    low, high = bounds
    mid = middle(low, high)
    enough = count(groups // LANES, of_groups, mid) >= k
    return jnp.where(enough, mid, low), jnp.where(enough, high, mid)

  if groups > 2 * k:  # k groups hold k elements as large as their maxima
    low, _ = lax.fori_loop(0, ROUGH, rough, (low, high))

  def halve(state):
    low, high, _ = state
    mid = middle(low, high)
    found = count(blocks, of_blocks, mid)
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
  return low


def _fill(z, low, start, end, tied, row, first, slots, bits, idx):
  """Writes what stands in some slots of a row: bits, and which latent's.

  Args:
    z, low: activations; bits of the threshold.
    start, end: which slots are of which block.
    tied: how many of a block's are at the threshold.
    row: of the 8.
    first, slots: that are filled.
    bits, idx: the results.
  """
  blocks = z.shape[0] // ROWS
  row_1 = pl.ds(row, 1)
  step, lanes = _blocks(blocks)
  slot_K1 = lax.broadcasted_iota(I32, (slots, 1), 0) + first

  def fetch(at, sums):
    """Adds what some of the blocks, which have their slots, say."""
    own_BL = _row(z, row, at * step, step)
    bytes_BX = jnp.concatenate(
      [_byte(own_BL, part).astype(BF16) for part in range(4)], 1
    )
    start_1B, end_1B = start[row_1, lanes(at)], end[row_1, lanes(at)]
    slot = slot_K1.astype(F32)
    block_KB = _one((start_1B <= slot) & (slot < end_1B))
    block_1B = lax.broadcasted_iota(I32, (1, step), 1) + at * step
    start_1I = start_1B.astype(I32)
    about_RB = _rows(
      [_byte(start_1I, part) for part in range(3)]
      + [tied[row_1, lanes(at)]]
      + [_byte(block_1B, part) for part in range(2)]
    )
    return (
      sums[0] + _dot(block_KB, bytes_BX, 1, 0),
      sums[1] + _dot(block_KB, about_RB, 1, 1),
      sums[2] + _dot(about_RB, block_KB, 1, 1),
    )

  zeros = tuple(
    jnp.zeros(shape, F32)
    for shape in ((slots, 4 * LANES), (slots, ROWS), (ROWS, slots))
  )
  found_KX, about_KR, about_RK = lax.fori_loop(0, blocks // step, fetch, zeros)
  found_KX, about_RK = found_KX.astype(I32), about_RK.astype(I32)
  own_KL = _joined([found_KX[:, p * LANES : (p + 1) * LANES] for p in range(4)])
  start_K1 = _joined([about_KR[:, p : p + 1].astype(I32) for p in range(3)])
  rank_K1 = (slot_K1 - start_K1).astype(F32)
  least_1L = low[row_1]
  earlier_LL = _one(
    lax.broadcasted_iota(I32, (LANES, LANES), 0)
    < lax.broadcasted_iota(I32, (LANES, LANES), 1)
  )
  tied_KL = own_KL == least_1L
  before_KL = _dot(_one(tied_KL), earlier_LL, 1, 0)
  kept_KL = (own_KL > least_1L) | (tied_KL & (before_KL < about_KR[:, 3:4]))
  before_KL = _dot(_one(kept_KL), earlier_LL, 1, 0)
  hit_KL = kept_KL & (before_KL == rank_K1)

  def sums(number_KL):  # over lanes, as a row [1, K]
    hit = jnp.where(hit_KL, number_KL, 0.0).astype(BF16)
    return _dot(jnp.ones((ROWS, LANES), BF16), hit, 1, 1)[:1].astype(I32)

  to = pl.ds(pl.multiple_of(first, slots), slots)
  bits[row_1, to] = _joined([sums(_byte(own_KL, p)) for p in range(4)])
  lane_KL = lax.broadcasted_iota(I32, (slots, LANES), 1).astype(F32)
  block_1K = _joined([about_RK[4:5], about_RK[5:6]])
  idx[row_1, to] = block_1K * LANES + sums(lane_KL)


def _blocks(blocks):
  """How many blocks to look at at once, and the lanes of the at-th so many."""
  if blocks % LANES:
    return blocks, lambda at: slice(0, blocks)
  step = divisor(blocks, FETCH, LANES)
  return step, lambda at: pl.ds(pl.multiple_of(at * step, step), step)


def _row(z, row, first, blocks):
  """The bits of one of 8 rows in some blocks, [B, 128]: every 8th sublane."""
  own_BL = z[pl.ds(first * ROWS + row, blocks, stride=ROWS)]
  return lax.bitcast_convert_type(own_BL, I32)


def _rows(numbers):
  """Up to 8 rows of numbers [1, B] as a matrix [8, B]."""
  at_RB = lax.broadcasted_iota(I32, (ROWS, numbers[0].shape[1]), 0)
  found_RB = jnp.zeros(at_RB.shape, F32)
  for at, number_1B in enumerate(numbers):
    found_RB = jnp.where(at_RB == at, number_1B, found_RB)
  return found_RB.astype(BF16)


def _one(mask):
  return jnp.where(mask, 1.0, 0.0).astype(BF16)


def _byte(number, part):
  """The part-th byte of an int32, from the lowest, as float32."""
  shift = jnp.full_like(number, 8 * part)
  return (lax.shift_right_logical(number, shift) & 255).astype(F32)


def _joined(parts):
  """The int32 of these bytes."""
  return sum(part << (8 * p) for p, part in enumerate(parts))


def _dot(a, b, of_a, of_b):
  """A product over one dimension of each; small numbers are exact."""
  return lax.dot_general(
    a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=F32
  )


def _counts(mask_BL):
  """How many lanes of each block are true, as a row [1, B]."""
  return _dot(jnp.ones((ROWS, LANES), BF16), _one(mask_BL), 1, 1)[:1]


def _sums(number_RB):
  """Sums up to each block."""
  size = number_RB.shape[1]
  at_RB = lax.broadcasted_iota(I32, number_RB.shape, 1)
  step = 1
  while step < size:
    moved_RB = pltpu.roll(number_RB, step, 1)
    number_RB += jnp.where(at_RB >= step, moved_RB, 0)
    step *= 2
  return number_RB
