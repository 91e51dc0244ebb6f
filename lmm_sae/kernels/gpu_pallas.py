"""The sparse products and the optimiser's passes as Pallas kernels for Triton.

Each program gathers rows by pointer, sums in registers in a fixed order and
writes its result once: no atomics, so that a step repeats bit for bit. It holds
COLUMNS columns of D, and the programs of one run of columns are neighbours: of
x, 8192 rows of them are 8 MiB, which the L2 cache of an A100 or later holds, so
that spmm_t gathers from there.

A plain pallas_call goes to Mosaic GPU, which has no gather by pointer;
`CompilerParams` sends these to Triton. jax 0.11 calls that deprecated and still
has it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from lmm_sae.kernels import reference

F32 = jnp.float32
COLUMNS = 512  # of a program: 2 warps of 8 numbers a thread
INTERPRET = False  # tests set it: Pallas then runs on a CPU


def call(kernel, out, *args, grid, warps, flops=0, moved=0, aliases=None):
  """One pallas_call whose kernel sees whole arrays, by pointer."""
  space = pl.BlockSpec(memory_space=pl.ANY)
  return pl.pallas_call(
    kernel,
    out_shape=out,
    grid=grid,
    in_specs=[space] * len(args),
    out_specs=jax.tree.map(lambda _: space, out),
    input_output_aliases=aliases or {},
    compiler_params=triton.CompilerParams(num_warps=warps, num_stages=2),
    cost_estimate=pl.CostEstimate(
      flops=int(flops), bytes_accessed=int(moved), transcendentals=0
    ),
    interpret=INTERPRET,
  )(*args)


def block(width: int) -> int:
  """Columns of a program: a power of two, as Triton wants."""
  return min(COLUMNS, max(16, pl.next_power_of_2(width)))


def unroll(k: int) -> int:
  """Steps over K whose loads are in flight together: a divisor of K."""
  return next(n for n in (8, 4, 2, 1) if k % n == 0)


def f32(*shape: int) -> jax.ShapeDtypeStruct:
  """A result."""
  return jax.ShapeDtypeStruct(shape, F32)


def _columns(at: int, size: int, width: int):
  """Columns of program `at` of the grid's second axis; which are there."""
  cols_D = pl.program_id(at) * size + lax.iota(jnp.int32, size)
  return cols_D, cols_D < width


def _row(ref, row, cols_D, inside_D):
  """Columns of a row, float32; 0 where there are none."""
  part_D = triton.load(ref.at[row, cols_D], mask=inside_D, other=0)
  return part_D.astype(F32)


def spmm(v_NK: jax.Array, i_NK: jax.Array, w_MD: jax.Array, /) -> jax.Array:
  """y[n] = Σ_k v[n, k] · w[i[n, k]]."""
  rows, k = i_NK.shape
  width, size, step = w_MD.shape[1], block(w_MD.shape[1]), unroll(i_NK.shape[1])

  def kernel(v_ref, i_ref, w_ref, y_ref):
    row = pl.program_id(0)
    cols_D, inside_D = _columns(1, size, width)

    def add(j, y_D):
      for one in range(step):
        at = j * step + one
        w_D = _row(w_ref, i_ref[row, at], cols_D, inside_D)
        y_D += v_ref[row, at].astype(F32) * w_D
      return y_D

    y_D = lax.fori_loop(0, k // step, add, jnp.zeros(size, F32))
    triton.store(y_ref.at[row, cols_D], y_D, mask=inside_D)

  return call(
    kernel,
    f32(rows, width),
    *(v_NK, i_NK, w_MD),
    grid=(rows, pl.cdiv(width, size)),
    warps=_warps(size),
    flops=2 * rows * k * width,
    moved=rows * k * (8 + width * w_MD.dtype.itemsize) + 4 * rows * width,
  )


def sddmm(x_ND: jax.Array, i_NK: jax.Array, w_MD: jax.Array, /) -> jax.Array:
  """v[n, k] = ⟨x[n], w[i[n, k]]⟩."""
  rows, k = i_NK.shape
  width, size, step = w_MD.shape[1], block(w_MD.shape[1]), unroll(k)

  def kernel(x_ref, i_ref, w_ref, v_ref):
    first, row = pl.program_id(0) * step, pl.program_id(1)
    latents = [i_ref[row, first + one] for one in range(step)]

    def add(j, sums):
      cols_D = j * size + lax.iota(jnp.int32, size)
      inside_D = cols_D < width
      x_D = _row(x_ref, row, cols_D, inside_D)
      return tuple(
        sum_D + x_D * _row(w_ref, latent, cols_D, inside_D)
        for sum_D, latent in zip(sums, latents, strict=True)
      )

    zeros = (jnp.zeros(size, F32),) * step
    sums = lax.fori_loop(0, pl.cdiv(width, size), add, zeros)
    for one, sum_D in enumerate(sums):
      triton.store(v_ref.at[row, first + one], jnp.sum(sum_D))

  return call(
    kernel,
    f32(rows, k),
    *(x_ND, i_NK, w_MD),
    grid=(k // step, rows),
    warps=_warps(size),
    flops=2 * rows * k * width,
    moved=rows * k * (8 + width * w_MD.dtype.itemsize)
    + x_ND.dtype.itemsize * rows * width,
  )


def spmm_t(
  v_NK: jax.Array, i_NK: jax.Array, x_ND: jax.Array, /, *, latents: int
) -> jax.Array:
  """w[m] = Σ over i[n, k] = m of v[n, k] · x[n], rows in their order.

  The code is sorted by latent first; a program sums the rows of one latent.
  """
  rows, k = i_NK.shape
  width, size, step = x_ND.shape[1], block(x_ND.shape[1]), 4
  v_P, row_P, start_M = by_latent(v_NK, i_NK, latents)
  last = rows * k - 1

  def kernel(v_ref, row_ref, start_ref, x_ref, w_ref):
    latent = pl.program_id(0)
    cols_D, inside_D = _columns(1, size, width)
    first, end = start_ref[latent], start_ref[latent + 1]

    def add(j, w_D):
      for one in range(step):
        at = first + j * step + one
        near = jnp.minimum(at, last)
        x_D = _row(x_ref, row_ref[near], cols_D, inside_D)
        w_D += jnp.where(at < end, v_ref[near] * x_D, 0)
      return w_D

    turns = (end - first + step - 1) // step
    w_D = lax.fori_loop(0, turns, add, jnp.zeros(size, F32))
    triton.store(w_ref.at[latent, cols_D], w_D, mask=inside_D)

  return call(
    kernel,
    f32(latents, width),
    *(v_P, row_P, start_M, x_ND),
    grid=(latents, pl.cdiv(width, size)),
    warps=_warps(size),
    flops=2 * rows * k * width,
    moved=rows * k * (8 + width * x_ND.dtype.itemsize) + 4 * latents * width,
  )


def by_latent(
  v_NK: jax.Array, i_NK: jax.Array, latents: int, /
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The code sorted by latent: values, rows, and where each latent begins.

  Within a latent, in the order of the rows. The last has one more than M.
  """
  k = i_NK.shape[1]
  at_P = lax.iota(jnp.int32, i_NK.size)
  i_P, at_P = lax.sort((i_NK.reshape(-1), at_P), num_keys=1, is_stable=True)
  bounds_M = jnp.arange(latents + 1, dtype=jnp.int32)
  start_M = jnp.searchsorted(i_P, bounds_M).astype(jnp.int32)
  return v_NK.reshape(-1)[at_P].astype(F32), at_P // k, start_M


def project(
  grad_MD: jax.Array, w_MD: jax.Array, /
) -> tuple[jax.Array, jax.Array]:
  """The gradient without its part along each row of w; sums of its squares."""
  latents, width = w_MD.shape
  size = _whole(width)

  def kernel(grad_ref, w_ref, out_ref, squares_ref):
    row = pl.program_id(0)
    cols_D, inside_D = _columns(1, size, width)
    grad_D = _row(grad_ref, row, cols_D, inside_D)
    w_D = _row(w_ref, row, cols_D, inside_D)
    grad_D -= jnp.sum(grad_D * w_D) * w_D
    triton.store(out_ref.at[row, cols_D], grad_D, mask=inside_D)
    triton.store(squares_ref.at[row], jnp.sum(grad_D * grad_D))

  return call(
    kernel,
    (f32(latents, width), f32(latents)),
    *(grad_MD, w_MD),
    grid=(latents, 1),
    warps=_warps(size),
    flops=6 * latents * width,
    moved=12 * latents * width,
  )


def adam(
  grad_MD: jax.Array,
  state: tuple[jax.Array, jax.Array, jax.Array],
  scalars: jax.Array,
  /,
  *,
  unit: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Parameters and moments after a step of Adam, in place."""
  b1, b2, eps = reference.ADAM
  latents, width = grad_MD.shape
  size = _whole(width)

  def kernel(grad_ref, scalars_ref, p_ref, m_ref, v_ref, *outs):
    row = pl.program_id(0)
    cols_D, inside_D = _columns(1, size, width)
    refs = (grad_ref, p_ref, m_ref, v_ref)
    grad_D, *old = (_row(ref, row, cols_D, inside_D) for ref in refs)
    factor, rate, fix1, fix2, good = (scalars_ref[i] for i in range(5))
    p_D, m_D, v_D = old
    grad_D *= factor
    first_D = (1 - b1) * grad_D + b1 * m_D
    second_D = (1 - b2) * grad_D * grad_D + b2 * v_D
    step_D = (first_D / fix1) / (jnp.sqrt(second_D / fix2) + eps)
    new_D = p_D - rate * step_D
    if unit:
      norm = jnp.sqrt(jnp.sum(new_D * new_D))
      new_D = new_D / jnp.maximum(norm, 1e-12)
    new = (new_D, first_D, second_D)
    for ref, one_D, old_D in zip(outs, new, old, strict=True):
      kept_D = jnp.where(good > 0, one_D, old_D)
      triton.store(ref.at[row, cols_D], kept_D, mask=inside_D)

  return call(
    kernel,
    tuple(f32(latents, width) for _ in state),
    *(grad_MD, scalars, *state),
    grid=(latents, 1),
    warps=_warps(size),
    flops=14 * latents * width,
    moved=28 * latents * width,
    aliases={2: 0, 3: 1, 4: 2},
  )


WIDEST = 16_384  # of a row that a program holds in registers


def _whole(width: int) -> int:
  """Columns of a program that holds a whole row."""
  if width > WIDEST:
    raise NotImplementedError(
      f'the gpu kernels hold whole rows of W, at most {WIDEST} wide; this one '
      f'is {width}: use --config.train.backend=reference'
    )
  return max(16, pl.next_power_of_2(width))


def _warps(size: int) -> int:
  """Of a program of `size` columns: 8 to 32 numbers a thread."""
  return max(1, min(16, size // 256))
