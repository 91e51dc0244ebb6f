"""The jax process of `gpu.py`: a check, a kernel or some steps for a line."""

import dataclasses
import functools
import json
import statistics
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from gpu_step import Step, draw
from jax import lax

from lmm_sae.kernels import cost, cpu, gpu, gpu_pallas, gpu_topk, ops, reference

F32, BF16 = jnp.float32, jnp.bfloat16
REPEATS = 7
FAILURES = (  # XLA's and torch's, memory's too, are RuntimeErrors
  *(RuntimeError, TypeError, ValueError, KeyError, AttributeError),
  *(AssertionError, ImportError, ArithmeticError),
)


def main() -> None:
  job = json.loads(sys.argv[1])
  out, sys.stdout = sys.stdout, sys.stderr
  gpu_pallas.INTERPRET = job['tiny']
  bench = Bench(job)
  for line in sys.stdin:
    what, *rest = line.strip().split(maxsplit=1)
    try:
      answer = getattr(bench, what)(*rest)
    except FAILURES as error:  # whatever one does, the rest is done
      traceback.print_exc()
      answer = {'error': f'{type(error).__name__}: {error}'[:600]}
    out.write(json.dumps(answer) + '\n')
    out.flush()


class Bench:
  """What can be asked for: each method answers one line."""

  def __init__(self, job: dict):
    self.job = job
    self.shape = cost.Shape(
      job['rows'], job['width'], job['latents'], job['k'], 'bfloat16'
    )

  def info(self) -> dict:
    """The device, its measured peaks, and what can be asked for.

    Raises:
      RuntimeError: the kernels cannot run here.
    """
    if gpu.why_not():
      raise RuntimeError(gpu.why_not())
    kind = jax.devices()[0].device_kind
    self.devices = {'measured': measured(self.job['tiny'])}
    if cost.find(kind):
      self.devices['data_sheet'] = cost.find(kind)
    s = self.shape
    return {
      'device': kind,
      'versions': {'jax': jax.__version__, 'numpy': np.__version__},
      'peaks': {
        name: {'flops': x.flops, 'bandwidth': x.bandwidth}
        for name, x in self.devices.items()
      },
      'step_roofline_ms': {
        name: 1e3
        * cost.total_seconds(
          cost.train_step(s.rows, s.width, s.latents, s.k, device=x), x
        )
        for name, x in self.devices.items()
      },
      'checks': list(CHECKS),
      'kernels': list(kernels(s)),
    }

  def checks(self, name: str) -> dict:
    return CHECKS[name](self.job['tiny'])

  def kernels(self, name: str) -> dict:
    """Milliseconds of one kernel or rival, and its fraction of the roofline."""
    function, arguments, one = kernels(self.shape)[name]
    ms = timed(jax.jit(function), *arguments())
    return {
      'ms': ms,
      'fraction': {
        by: 1e3 * cost.seconds(one, x) / ms for by, x in self.devices.items()
      },
    }

  def start(self) -> dict:
    """Makes the state and compiles the step."""
    self.step = Step(self.shape)
    self.step.take()
    return {'fvu': self.step.take()}

  def steps(self, count: str) -> dict:
    found = []
    for _ in range(int(count)):
      start = time.perf_counter()
      fvu = self.step.take()
      found.append(1e3 * (time.perf_counter() - start))
    return {'ms': found, 'fvu': fvu}


def timed(function, *args) -> float:
  """Milliseconds a call: the median of REPEATS, after two that warm up."""
  for _ in range(2):
    jax.block_until_ready(function(*args))
  found = []
  for _ in range(REPEATS):
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    found.append(time.perf_counter() - start)
  return 1e3 * statistics.median(found)


def measured(tiny: bool) -> cost.Device:
  """Peaks of a product of large matrices, and of a copy."""
  n = 256 if tiny else 8192
  flops = {}
  for dtype in ('bfloat16', 'float32'):
    a, b = (draw(i, (n, n), dtype) for i in range(2))
    ms = timed(jax.jit(lambda a, b: jnp.dot(a, b)), a, b)
    flops[dtype] = 2 * n**3 / ms * 1e3
  long = draw(2, (n * n * 4,), 'float32')
  ms = timed(jax.jit(lambda x: x + 1), long)
  return cost.Device('measured', '', flops, 8 * long.size / ms * 1e3, 0.0)


def kernels(s: cost.Shape) -> dict:
  """name -> (function, its arguments, its cost): each kernel and its rivals."""

  def code():
    rng = np.random.default_rng(0)
    first_N1 = rng.integers(0, s.latents, (s.rows, 1))
    # Distinct in a row, spread over the latents: an odd stride.
    stride = max(s.latents // s.k - 1, 1) | 1
    i_NK = (first_N1 + stride * np.arange(s.k)) % s.latents
    return draw(3, (s.rows, s.k), 'float32'), jnp.asarray(i_NK, jnp.int32)

  x = functools.partial(draw, 4, (s.rows, s.width), s.dtype)
  w = functools.partial(draw, 5, (s.latents, s.width), s.dtype)
  b = functools.partial(draw, 6, (s.latents,), 'float32')
  big = functools.partial(draw, 7, (s.latents, s.width), 'float32')
  chunk = min(s.rows, gpu.CHUNK_BYTES // (4 * s.latents))
  part = dataclasses.replace(s, rows=chunk)
  pre = functools.partial(draw, 8, (chunk, s.latents), 'float32')
  selection = cost.Cost('', 0, 4 * chunk * s.latents + 8 * chunk * s.k)
  encode_args = lambda: (x(), w(), b())  # noqa: E731
  spmm_args = lambda: (*code(), w())  # noqa: E731
  sddmm_args = lambda: (x(), code()[1], w())  # noqa: E731
  spmm_t_args = lambda: (*code(), x())  # noqa: E731
  scalars = jnp.asarray([1.0, 1e-4, 0.1, 0.001, 1.0])
  adam_args = lambda: (big(), (w().astype(F32), big(), big() ** 2), scalars)  # noqa: E731

  def dense(function):
    """The function as the rule has it where dense is always faster."""

    def run(*args):
      kept, gpu.form = gpu.form, lambda *_: 'dense'
      try:
        return function(*args)
      finally:
        gpu.form = kept

    return run

  def columns(function, size):
    def run(*args):
      kept, gpu_pallas.COLUMNS = gpu_pallas.COLUMNS, size
      try:
        return function(*args)
      finally:
        gpu_pallas.COLUMNS = kept

    return run

  def rival(select):
    """An encode that selects with `select`, a chunk of rows at a time."""

    def run(x_ND, w_MD, b_M):
      def some(x_ND):
        pre_NM = jnp.dot(x_ND, w_MD.T, preferred_element_type=F32) + b_M
        return select(jnp.maximum(pre_NM, 0))

      return lax.map(some, x_ND.reshape(-1, chunk, s.width))

    return run

  approx = functools.partial(lax.approx_max_k, k=s.k)
  exact = functools.partial(lax.top_k, k=s.k)
  t = functools.partial(gpu_pallas.spmm_t, latents=s.latents)
  return {
    'encode': (
      functools.partial(gpu.encode, k=s.k),
      *(encode_args, cost.encode(s)),
    ),
    'encode, product alone': (
      lambda x, w: rival(lambda z: jnp.max(z, 1))(x, w, jnp.zeros(s.latents)),
      *(lambda: (x(), w()), cost.encode(s)),
    ),
    'selection of a chunk': (
      functools.partial(gpu_topk.top_k, k=s.k),
      *(lambda: (pre(), b()), selection),
    ),
    'its two passes': (
      functools.partial(gpu_topk.survivors, k=s.k),
      *(lambda: (pre(), b()), selection),
    ),
    'lax.top_k of a chunk': (exact, lambda: (pre(),), selection),
    'approx_max_k of a chunk': (approx, lambda: (pre(),), selection),
    'spmm': (gpu_pallas.spmm, spmm_args, cost.spmm(s)),
    'sddmm': (gpu_pallas.sddmm, sddmm_args, cost.sddmm(s)),
    'spmm_t': (t, spmm_t_args, cost.spmm_t(s)),
    'its sort': (
      lambda v, i: gpu_pallas.by_latent(v, i, s.latents),
      *(code, cost.Cost('', 0, cost.SORT_PASSES * 8 * s.rows * s.k)),
    ),
    'project': (gpu_pallas.project, lambda: (big(), big()), cost.project(s)),
    'adam': (
      functools.partial(gpu_pallas.adam, unit=True),
      *(adam_args, cost.adam(s)),
    ),
    'spmm, dense': (dense(gpu.spmm), spmm_args, cost.spmm(s, 'dense')),
    'sddmm, dense': (dense(gpu.sddmm), sddmm_args, cost.sddmm(s, 'dense')),
    'spmm_t, dense': (
      dense(functools.partial(gpu.spmm_t, latents=s.latents)),
      *(spmm_t_args, cost.spmm_t(s, 'dense')),
    ),
    'project, XLA': (
      reference.project,
      *(lambda: (big(), big()), cost.project(s)),
    ),
    'adam, XLA': (
      functools.partial(reference.adam, unit=True),
      *(adam_args, cost.adam(s)),
    ),
    **{
      f'{name}, {size} columns': (columns(function, size), args, one)
      for size in (256, 1024, 2048)
      for name, function, args, one in (
        ('spmm', gpu_pallas.spmm, spmm_args, cost.spmm(s)),
        ('sddmm', gpu_pallas.sddmm, sddmm_args, cost.sddmm(s)),
        ('spmm_t', t, spmm_t_args, cost.spmm_t(s)),
      )
    },
    'spmm, XLA loop': (cpu.spmm, spmm_args, cost.spmm(s)),
    'sddmm, XLA loop': (cpu.sddmm, sddmm_args, cost.sddmm(s)),
    'encode, lax.top_k': (rival(exact), encode_args, cost.encode(part)),
    'spmm_t, XLA loop': (
      functools.partial(cpu.spmm_t, latents=s.latents),
      *(spmm_t_args, cost.spmm_t(s)),
    ),
  }


def check_family(dtype: str, tiny: bool) -> dict:
  """All functions and gradients against the reference, in norm."""
  n, d, m, k = (5, 7, 40, 3) if tiny else (509, 500, 8191, 61)
  x_ND, w_MD = draw(0, (n, d), dtype), draw(1, (m, d), dtype)
  b_M, to_ND = draw(2, (m,), 'float32'), draw(3, (n, d), 'float32')

  def run(backend):
    def loss(x_ND, w_MD, b_M):
      code = ops.encode(x_ND, w_MD, b_M, k=k, backend=backend)
      y_ND = ops.spmm(*code, w_MD, backend=backend)
      return jnp.sum(y_ND * to_ND), (*code, y_ND)

    grad = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    return grad(x_ND, w_MD, b_M)

  (got, (_, i_NK, _)), (want, (_, j_NK, _)) = run('gpu'), run('reference')
  same = float(jnp.mean(i_NK == j_NK))
  errors = [apart(a, b) for a, b in zip(got, want, strict=True)]
  most = 1e-2 if dtype == 'bfloat16' or not tiny else 1e-5  # TF32 products
  passed = same > 0.99 and max(errors) < most
  return {'passed': passed, 'same_indices': same, 'errors': errors}


def check_selection(tiny: bool) -> dict:
  """Rows that are hard to select from, exactly as lax.top_k has them."""
  m, k = (3001, 33) if tiny else (131_072, 256)
  rng = np.random.default_rng(0)
  z_M = rng.normal(size=m).astype('f')
  near_M = np.arange(m) % gpu_topk.groups(k) < k // 2
  z_NM = np.stack(
    [z_M, np.sort(np.abs(z_M)), -np.sort(-np.abs(z_M)), np.ones_like(z_M)]
    + [rng.integers(0, n, m).astype('f') for n in (2, 50, 5000)]
    + [np.where(near_M, np.abs(z_M) + 5, z_M), np.where(near_M, 7, z_M)]
    + [np.where(rng.random(m) < 1e-3, np.abs(z_M), -1)]
  ).astype('f')
  got = jax.jit(functools.partial(gpu_topk.top_k, k=k))(z_NM, jnp.zeros(m))
  want = lax.top_k(jnp.maximum(z_NM, 0), k)
  same = [np.all(np.equal(a, b)) for a, b in zip(got, want, strict=True)]
  return {'passed': bool(all(same))}


def check_products(dtype: str, tiny: bool) -> dict:
  """Each product alone, against float64 on the host, repeats included."""
  n, d, m, k = (5, 7, 12, 4) if tiny else (1000, 1000, 5000, 60)
  rng = np.random.default_rng(0)
  x_ND, w_MD = draw(0, (n, d), dtype), draw(1, (m, d), dtype)
  v_NK, i_NK = draw(2, (n, k), 'float32'), rng.integers(m, size=(n, k))
  i_NK = jnp.asarray(np.where(rng.random((n, k)) < 0.2, 0, i_NK), 'int32')
  x, w, v = (np.asarray(a, np.float64) for a in (x_ND, w_MD, v_NK))
  i = np.asarray(i_NK)
  code = np.zeros((n, m))
  np.add.at(code, (np.arange(n)[:, None], i), v)
  errors = [
    apart(gpu_pallas.spmm(v_NK, i_NK, w_MD), code @ w),
    apart(
      gpu_pallas.sddmm(x_ND, i_NK, w_MD), np.take_along_axis(x @ w.T, i, 1)
    ),
    apart(gpu_pallas.spmm_t(v_NK, i_NK, x_ND, latents=m), code.T @ x),
  ]
  return {'passed': max(errors) < 1e-5, 'errors': errors}


def check_rows(tiny: bool) -> dict:
  """project and adam against the reference."""
  m, d = (12, 7) if tiny else (3000, 4096)
  grad_MD, w_MD = (draw(i, (m, d), 'float32') for i in range(2))
  w_MD /= jnp.linalg.norm(w_MD, axis=1, keepdims=True)
  state = (w_MD, draw(2, (m, d), 'float32'), draw(3, (m, d), 'float32') ** 2)
  scalars = jnp.asarray([0.5, 1e-2, 0.1, 0.001, 1.0])
  errors = [
    apart(a, b)
    for got, want in (
      (gpu.project(grad_MD, w_MD), reference.project(grad_MD, w_MD)),
      (
        gpu.adam(grad_MD, state, scalars, unit=True),
        reference.adam(grad_MD, state, scalars, unit=True),
      ),
    )
    for a, b in zip(got, want, strict=True)
  ]
  return {'passed': max(errors) < 1e-5, 'errors': errors}


def apart(got, want) -> float:
  """‖got - want‖ / ‖want‖; infinite where something is not finite."""
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  found = np.linalg.norm(got - want) / np.linalg.norm(want)
  return float(found) if np.isfinite(found) else 1e30


CHECKS = {
  'selection': check_selection,
  'products_float32': functools.partial(check_products, 'float32'),
  'products_bfloat16': functools.partial(check_products, 'bfloat16'),
  'project_and_adam': check_rows,
  'family_float32': functools.partial(check_family, 'float32'),
  'family_bfloat16': functools.partial(check_family, 'bfloat16'),
}


if __name__ == '__main__':
  main()
