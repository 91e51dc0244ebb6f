"""Every TPU kernel with its inputs, for what lowers or compiles them.

    for name, function, args in cases():
      jax.jit(function).trace(*args).lower(lowering_platforms=('tpu',))

Arguments are shapes and dtypes alone; a compiler also wants to be told on which
device of a topology they lie.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from lmm_sae.kernels import tpu, tpu_dense

SHAPES = {  # N, D, M, K of one chip
  'odd': (13, 24, 300, 5),
  'one active': (40, 200, 1000, 1),
  'paper': (4096, 4096, 131_072, 256),
  'paper, an eighth of the latents': (4096, 4096, 16_384, 256),
  'paper, k=32': (2048, 4096, 131_072, 32),
}
DTYPES = ('float32', 'bfloat16')


class Case(NamedTuple):
  """One kernel at one shape."""

  name: str
  function: Callable
  args: tuple[jax.ShapeDtypeStruct, ...]


def cases(shapes: dict[str, tuple[int, int, int, int]] = SHAPES) -> list[Case]:
  """Each kernel at each shape (N, D, M, K) in each dtype."""
  return [
    Case(f'{kernel}, {shape}, {dtype}', function, args)
    for shape, sizes in shapes.items()
    for dtype in DTYPES
    for kernel, (function, args) in _kernels(*sizes, dtype).items()
  ]


def _kernels(n, d, m, k, dtype):
  def array(*axes, dtype=dtype):
    return jax.ShapeDtypeStruct(axes, dtype)

  x_ND, w_MD, b_M = array(n, d), array(m, d), array(m, dtype='float32')
  v_NK, i_NK = array(n, k, dtype='float32'), array(n, k, dtype='int32')
  return {
    'encode': (functools.partial(tpu.encode, k=k), (x_ND, w_MD, b_M)),
    'spmm': (tpu.spmm, (v_NK, i_NK, w_MD)),
    'sddmm': (tpu.sddmm, (x_ND, i_NK, w_MD)),
    'spmm_t': (functools.partial(tpu.spmm_t, latents=m), (v_NK, i_NK, x_ND)),
    **(_dense(n, m, k) if dtype == 'bfloat16' else {}),
  }


def _dense(n, m, k):
  """What the dense forms have beside encode's product, a chunk of rows each."""
  n, blocks = min(-(-n // 8) * 8, 1024), -(-m // 1024) * 8
  v_NK, i_NK = (jax.ShapeDtypeStruct((n, k), t) for t in ('float32', 'int32'))
  z_nBRL = jax.ShapeDtypeStruct((n // 8, blocks, 8, 128), 'float32')
  spread = functools.partial(tpu_dense.spread, latents=blocks * 128)
  return {
    'spread': (spread, (v_NK, i_NK)),
    'pick': (tpu_dense.pick, (z_nBRL, i_NK)),
  }
