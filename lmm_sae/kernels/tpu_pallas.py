"""Sparse products by copies of rows, and what all TPU kernels are called by.

spmm     the k rows of w that a row needs are copied from HBM while those of the
sddmm    row before are summed up.
spmm_t   entries are sorted by latent (in XLA), so that each program sums up the
         rows of x for up to 64 neighbouring latents and writes them once.

The scalar core starts the copies one by one, so it must spend little on each:
loops are unrolled, nothing checks bounds, and one wait serves all copies of a
row.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

F32, I32 = jnp.float32, jnp.int32
LANES = 128
ROWS = 8  # sublanes of float32
GATHER_ROWS = 32  # rows of a program of spmm and sddmm
TILE_BYTES = 2**20  # of the sums of a program of spmm_t
MOST_TILE = 64  # latents that they are of
BUFFER = 8 * 2**20  # of the 16 MB of VMEM of a v4, for gathered rows
UNROLL = 8  # copies that are started, or rows that are summed, in a turn


def spmm(v_NK: jax.Array, i_NK: jax.Array, w_MD: jax.Array, /) -> jax.Array:
  """y[n] = Σ_k v[n, k] · w[i[n, k]]."""
  rows = len(i_NK)

  def compute(row, start, v, out, rows_Kcl):
    def add(j, sums):
      return sums + v[row, start + j] * rows_Kcl[j].astype(F32)

    @pl.when(start == 0)
    def _():
      out[row] = jnp.zeros(columns, F32)

    out[row] = _loop(rows_Kcl.shape[0], add, out[row])

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
  _fits(2 * min(k, LANES), row_bytes)
  part = k if k <= part else part // LANES * LANES
  tile = min(GATHER_ROWS, up(rows, ROWS))
  i_NK = padded(i_NK, (tile, part))
  if space == pltpu.SMEM:
    other = padded(other, (tile, part))
  else:
    other = padded(other, (tile,) + (1,) * (other.ndim - 1))
  parts = i_NK.shape[1] // part
  out_row = out_row or i_NK.shape[1:]

  def kernel(i, own, w, out, buffer, done):
    def start(at):
      """Starts the copies of the at-th part of the tile."""
      slot, row, first = _place(at)

      def one(j, _):
        source = w.at[i[row, first + j]]
        pltpu.make_async_copy(source, buffer.at[slot, j], done.at[slot]).start()

      _loop(part, one, None)

    def each(at, _):
      @pl.when(at + 1 < tile * parts)
      def _():
        start(at + 1)

      slot, row, first = _place(at)
      whole = buffer.at[slot]  # as many bytes as all of its copies
      pltpu.make_async_copy(whole, whole, done.at[slot]).wait()
      compute(row, first, own, out, whole)

    def _place(at):
      if parts == 1:
        return at & 1, at, 0
      return at & 1, lax.div(at, parts), lax.rem(at, parts) * part

    start(0)
    lax.fori_loop(0, tile * parts, each, None)

  rest = (0,) * len(out_row)
  own_rest = (0,) * (other.ndim - 1)
  return call(
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
    semantics=('parallel',),
    name=name,
  )


def spmm_t(
  v_NK: jax.Array, i_NK: jax.Array, x_ND: jax.Array, /, *, latents: int
) -> jax.Array:
  """w[m] = Σ over i[n, k] = m of v[n, k] · x[n], for all M = `latents` rows."""
  k, width = i_NK.shape[1], x_ND.shape[1]
  x_Ncl = _lanes(x_ND, x_ND.dtype.itemsize)
  columns = x_Ncl.shape[1:]
  row_bytes = columns[0] * LANES * x_Ncl.dtype.itemsize
  _fits(2 * LANES, row_bytes)
  tile = max(TILE_BYTES // (4 * columns[0] * LANES) // ROWS, 1) * ROWS
  tile = min(tile, MOST_TILE, up(latents, ROWS))
  tiles = -(-latents // tile)
  latent_E, at_E = lax.sort(
    (i_NK.reshape(-1), jnp.arange(i_NK.size, dtype=I32)),
    num_keys=1,
    is_stable=False,  # half the time to compile
  )
  edges = jnp.arange(tiles + 1, dtype=I32) * tile
  starts = jnp.searchsorted(latent_E, edges).astype(I32)

  def runs(a_E):  # whole runs of 128, any of which can be copied
    return padded(a_E, (LANES,)).reshape(-1, 1, LANES)

  entries = (
    runs(at_E // k),
    runs(latent_E),
    runs(v_NK.reshape(-1)[at_E].astype(F32)),
  )

  def kernel(starts, rows, owners, values, x, out, *scratch):
    rows_s, owners_s, values_s, buffer, sums, listed, done = scratch
    tile_at = pl.program_id(0)
    first, last = starts[tile_at], starts[tile_at + 1]
    begin, end = lax.div(first, LANES), lax.div(last + LANES - 1, LANES)
    sums[...] = jnp.zeros_like(sums)

    def turns(at):
      """Which of a run's groups of UNROLL entries hold some of this tile's."""
      low = jnp.maximum(first - at * LANES, 0)
      high = jnp.minimum(last - at * LANES, LANES)
      return lax.div(low, UNROLL), lax.div(high + UNROLL - 1, UNROLL)

    def start(at):
      """Starts the copies of the rows that a run names."""
      slot = at & 1
      lists = [
        pltpu.make_async_copy(source.at[at], to.at[slot], listed.at[j])
        for j, (source, to) in enumerate(
          ((rows, rows_s), (owners, owners_s), (values, values_s))
        )
      ]
      for copy in lists:
        copy.start()
      for copy in lists:
        copy.wait()

      def turn(group, _):
        for e in range(UNROLL):
          e += group * UNROLL
          pltpu.make_async_copy(
            x.at[rows_s[slot, 0, e]], buffer.at[slot, e], done.at[slot]
          ).start()

      lax.fori_loop(*turns(at), turn, None)

    def run(at, _):
      slot = at & 1

      @pl.when(at + 1 < end)
      def _():
        start(at + 1)

      def wait(group, _):
        part = buffer.at[slot, pl.ds(group * UNROLL, UNROLL)]
        pltpu.make_async_copy(part, part, done.at[slot]).wait()

      def add(group, _):
        for e in range(UNROLL):
          e += group * UNROLL
          own = owners_s[slot, 0, e] - tile_at * tile
          ours = (own >= 0) & (own < tile)
          value = jnp.where(ours, values_s[slot, 0, e], 0)
          own = jnp.where(ours, own, 0)
          sums[own] += value * buffer[slot, e].astype(F32)

      lax.fori_loop(*turns(at), wait, None)
      lax.fori_loop(*turns(at), add, None)

    @pl.when(last > first)
    def _():
      start(begin)
      lax.fori_loop(begin, end, run, None)

    for part in range(tile // ROWS):  # as XLA lays out [M, D]
      for m in range(ROWS):
        out[part, :, m] = sums[part * ROWS + m]

  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  w_mcRl = call(
    kernel,
    (starts, *entries, x_Ncl),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(tiles,),
      in_specs=[anywhere] * 4,
      out_specs=pl.BlockSpec(
        (tile // ROWS, columns[0], ROWS, LANES), lambda m, *_: (m, 0, 0, 0)
      ),
      scratch_shapes=[
        pltpu.SMEM((2, 1, LANES), I32),
        pltpu.SMEM((2, 1, LANES), I32),
        pltpu.SMEM((2, 1, LANES), F32),
        pltpu.VMEM((2, LANES, *columns), x_Ncl.dtype),
        pltpu.VMEM((tile, *columns), F32),
        pltpu.SemaphoreType.DMA((3,)),
        pltpu.SemaphoreType.DMA((2,)),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct(
      (tiles * tile // ROWS, columns[0], ROWS, LANES), F32
    ),
    cost=(
      2 * i_NK.size * columns[0] * LANES,
      i_NK.size * (row_bytes + 12) + 4 * latents * columns[0] * LANES,
    ),
    semantics=('parallel',),
    name='spmm_t',
  )
  w_MD = jnp.swapaxes(w_mcRl, 1, 2).reshape(tiles * tile, -1)
  return w_MD[:latents, :width]


def _fits(rows: int, row_bytes: int) -> None:
  if rows * row_bytes > BUFFER:
    raise NotImplementedError(
      f'the kernel backend tpu has no room for {rows} rows of {row_bytes} '
      'bytes in VMEM: use --config.train.compute=bfloat16 or '
      '--config.train.backend=reference'
    )


def _loop(count: int, body, state):
  """fori_loop over so many, several in a turn."""
  turn = math.gcd(count, UNROLL)

  def several(at, state):
    for j in range(turn):
      state = body(at * turn + j, state)
    return state

  return lax.fori_loop(0, count // turn, several, state)


def call(kernel, args, *, cost, semantics, memory=None, **spec):
  """A pallas_call that says what it costs; interpreted on a CPU.

  Args:
    kernel: of refs.
    args: arrays.
    cost: FLOPs and bytes.
    semantics: of each dimension of the grid; those that are parallel are shared
      by the two cores of a v4 and v5p.
    memory: bytes of VMEM, where more are needed than the compiler grants.
    **spec: of the pallas_call.
  """
  flops, moved = cost
  estimate = pl.CostEstimate(
    flops=flops, transcendentals=0, bytes_accessed=moved
  )
  params = pltpu.CompilerParams(
    dimension_semantics=semantics,
    vmem_limit_bytes=memory,
    disable_bounds_checks=True,  # indices are in bounds: see ops
  )

  def run(*args, interpret):
    return pl.pallas_call(
      kernel,
      cost_estimate=estimate,
      compiler_params=params,
      interpret=interpret,
      **spec,
    )(*args)

  return lax.platform_dependent(
    *args,
    cpu=functools.partial(run, interpret=True),
    tpu=functools.partial(run, interpret=False),
  )


def _lanes(a_ND: jax.Array, size: int) -> jax.Array:
  """Rows as whole tiles of 128 lanes, [N, D / 128, 128], filled up with 0.

  A tile is of as many sublanes as numbers of `size` bytes have.
  """
  sublanes = 32 // size
  a_ND = padded(a_ND, (1, sublanes * LANES))
  return a_ND.reshape(len(a_ND), -1, LANES)


def padded(array: jax.Array, multiples: tuple[int, ...]) -> jax.Array:
  """The array with zeros behind it, up to multiples in each dimension."""
  spare = [
    (0, -size % multiple)
    for size, multiple in zip(array.shape, multiples, strict=True)
  ]
  return jnp.pad(array, spare) if any(after for _, after in spare) else array


def up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


def divisor(size: int, most: int, multiple: int) -> int:
  """The largest multiple that divides `size` and is at most `most`."""
  return max(
    part
    for part in range(multiple, min(most, size) + 1, multiple)
    if size % part == 0
  )
