"""Each kernel on a CPU: checked, then timed beside its rivals.

    python -m benchmarks.kernels [--shapes=2048x256x8192x32,...] [--out=FILE]

A shape is rows x width x latents x k. What a kernel and its rivals give is
compared with the reference first; one that is wrong is not timed. Then they
take turns in this one process, and a time is the median over the turns.

The fraction of the roofline is `kernels.cost`'s least time over the measured
one, with peaks that are measured here first: of a float32 and a bfloat16 matrix
product and of memory. The bound counts every gathered row as read from memory,
so where rows stay in a cache a fraction may be above 1; so may that of `encode`
where it screens with products of bfloat16, since the bound is of float32.
"""

import argparse
import concurrent.futures
import functools
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from benchmarks import machine, worker
from lmm_sae.kernels import cost, native, ops, reference

SHAPES = '2048x256x8192x32,2048x512x16384x32,1024x256x8192x128'
BACKENDS = ('native', 'cpu')
CLOSE = 1e-4  # of the largest value: float32 sums of another order
RATE = 1e-3


def main() -> None:
  args = _arguments()
  found = {**machine.facts(), 'versions': worker.versions()}
  found['settings'] = {'turns': args.turns, 'seed': args.seed}
  device = peaks(args.size)
  found['peaks'] = {'flops': device.flops, 'bytes_per_s': device.bandwidth}
  found['runs'] = []
  rates = (f'{name} {x / 1e9:.0f} GFLOP/s' for name, x in device.flops.items())
  print(found['machine']['processor'], *rates, sep=', ')
  print(f'memory {device.bandwidth / 1e9:.1f} GB/s')
  for text in args.shapes.split(','):
    shape = cost.Shape(*map(int, text.split('x')), dtype='float32')
    run = {name: getattr(shape, name) for name in ('rows', 'width')}
    run |= {'latents': shape.latents, 'k': shape.k, 'kernels': {}}
    work = Work(shape, args.seed)
    for name in KERNELS:
      run['kernels'][name] = _measure(name, work, device, args.turns)
      print(table(text, name, run['kernels'][name]), flush=True)
    found['runs'].append(run)
  if args.out:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + '\n')
  wrong = [
    f'{name} {who} at {run["rows"]}x{run["width"]}x{run["latents"]}x{run["k"]}'
    for run in found['runs']
    for name, kernels in run['kernels'].items()
    for who, one in kernels.items()
    if 'error' in one
  ]
  if wrong:
    sys.exit(f'not as the reference: {", ".join(wrong)}')


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--shapes', default=SHAPES)
  parser.add_argument('--turns', type=int, default=15)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--size', type=int, default=4096, help='of the matrices for the peaks'
  )
  parser.add_argument('--out', type=pathlib.Path, help='a JSON')
  return parser.parse_args()


class Work:
  """Arrays of a shape, and what the reference makes of them."""

  def __init__(self, s: cost.Shape, seed: int):
    rng = np.random.default_rng(seed)

    def normal(*shape):
      return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    self.shape = s
    self.x_ND = normal(s.rows, s.width)
    self.w_MD = normal(s.latents, s.width) / s.width**0.5
    self.b_M = 0.1 * normal(s.latents)
    self.grad_MD = normal(s.latents, s.width)
    self.unit_MD = self.w_MD / jnp.linalg.norm(self.w_MD, axis=1, keepdims=True)
    self.code = jax.jit(functools.partial(reference.encode, k=s.k))(
      self.x_ND, self.w_MD, self.b_M
    )
    self.moments = (jnp.zeros_like(self.w_MD), jnp.ones_like(self.w_MD))


def _spread(v_NK, i_NK, latents: int):
  """The code as a dense [N, M]: what a dense product multiplies with."""
  rows_N1 = jnp.arange(len(i_NK))[:, None]
  return jnp.zeros((len(i_NK), latents)).at[rows_N1, i_NK].add(v_NK)


def _encoders(w: Work) -> dict:
  def approximate(x_ND, w_MD, b_M):
    z_NM = jnp.maximum(x_ND @ w_MD.T + b_M, 0)
    return lax.approx_max_k(z_NM, w.shape.k)

  found = _backends(functools.partial(ops.encode, k=w.shape.k))
  if not native.why_not() and native.screens():
    found['native, no bf16 screen'] = functools.partial(
      native.encode, k=w.shape.k, screen=False
    )
  found['dense + lax.top_k'] = functools.partial(reference.encode, k=w.shape.k)
  found['dense + approx_max_k'] = approximate
  return found


def _decoders(w: Work) -> dict:
  return _backends(ops.spmm) | {
    'gather + einsum': reference.spmm,
    'dense product': lambda v, i, w_MD: _spread(v, i, len(w_MD)) @ w_MD,
  }


def _samplers(w: Work) -> dict:
  del w
  return _backends(ops.sddmm) | {
    'gather + einsum': reference.sddmm,
    'dense product': lambda x, i, w_MD: jnp.take_along_axis(x @ w_MD.T, i, 1),
  }


def _gradients(w: Work) -> dict:
  latents = w.shape.latents
  return _backends(functools.partial(ops.spmm_t, latents=latents)) | {
    'scatter of N·K rows': functools.partial(reference.spmm_t, latents=latents),
    'dense product': lambda v, i, x: _spread(v, i, latents).T @ x,
  }


def _projections(w: Work) -> dict:
  del w
  return _backends(ops.project)


def _optimisers(w: Work) -> dict:
  del w
  count, one = jnp.int32(3), jnp.float32(1)
  b1, b2, eps = reference.ADAM

  def ours(p, m, v, g, backend):
    rest = {'count': count, 'factor': one, 'rate': RATE * one, 'good': one > 0}
    return ops.adam(g, (p, m, v), **rest, unit=True, backend=backend)

  def by_optax(p, m, v, g):
    state = optax.ScaleByAdamState(count - 1, m, v)
    step, state = optax.scale_by_adam(b1, b2, eps).update(g, state)
    p = p - RATE * step
    p = p / jnp.maximum(jnp.linalg.norm(p, axis=1, keepdims=True), 1e-12)
    return p, state.mu, state.nu

  return _backends(ours) | {'optax': by_optax}


def _backends(function) -> dict:
  """The function with each backend that can run here."""
  return {
    name: functools.partial(function, backend=name)
    for name in BACKENDS
    if name != 'native' or not native.why_not()
  }


# name -> (its forms, its arguments, its cost); each adds to its first result
KERNELS = {
  'encode': (_encoders, lambda w: (w.x_ND, w.w_MD, w.b_M), cost.encode),
  'spmm': (_decoders, lambda w: (*w.code, w.w_MD), cost.spmm),
  'sddmm': (_samplers, lambda w: (w.x_ND, w.code[1], w.w_MD), cost.sddmm),
  'spmm_t': (_gradients, lambda w: (*w.code, w.x_ND), cost.spmm_t),
  'project': (_projections, lambda w: (w.grad_MD, w.unit_MD), cost.project),
  'adam': (
    _optimisers,
    lambda w: (w.unit_MD, *w.moments, w.grad_MD),
    cost.adam,
  ),
}


def _truth(name: str, w: Work) -> tuple[np.ndarray, ...]:
  """What the reference gives."""
  forms, arguments, _ = KERNELS[name]
  if name == 'adam':
    function = functools.partial(forms(w)['cpu'].func, backend='reference')
  elif name in ('encode', 'spmm_t'):
    more = {'encode': {'k': w.shape.k}, 'spmm_t': {'latents': w.shape.latents}}
    function = functools.partial(getattr(reference, name), **more[name])
  else:
    function = getattr(reference, name)
  return _arrays(jax.jit(function)(*arguments(w)))


def _arrays(found) -> tuple[np.ndarray, ...]:
  return tuple(map(np.array, jax.tree.leaves(found)))


def _measure(name: str, w: Work, device: cost.Device, turns: int) -> dict:
  forms, arguments, price = KERNELS[name]
  truth = _truth(name, w)
  least = cost.seconds(price(w.shape), device)
  donated = (0, 1, 2) if name == 'adam' else ()
  results, timed = {}, {}
  for who, form in forms(w).items():
    # Adam works in place: each form has arrays of its own, and gives them on.
    given = [jnp.array(x) if donated else x for x in arguments(w)]
    function = jax.jit(form, donate_argnums=donated)
    found = function(*given)
    results[who] = _check(name, _arrays(found), truth, w)
    if 'error' not in results[who]:
      given = [*found, *given[3:]] if donated else given
      timed[who] = (function, given, [])
  for _ in range(turns):
    for function, given, seconds in timed.values():
      start = time.perf_counter()
      found = jax.block_until_ready(function(*given))
      seconds.append(time.perf_counter() - start)
      if donated:
        given[:3] = found
  for who, (_, _, seconds) in timed.items():
    median = float(np.median(seconds))
    quartiles = 1e3 * np.quantile(seconds, (0.25, 0.75))
    results[who] |= {'ms': 1e3 * median, 'ms_quartiles': quartiles.tolist()}
    results[who] |= {'roofline_ms': 1e3 * least, 'fraction': least / median}
  return results


def _check(name: str, found: tuple, truth: tuple, w: Work) -> dict:
  """{} where it is as the reference, or what is wrong."""
  if name != 'encode':
    gaps = [
      np.abs(one - two).max() / np.abs(two).max()
      for one, two in zip(found, truth, strict=True)
    ]
    if max(gaps) < CLOSE:
      return {}
    return {'error': f'differs by {max(gaps):.2g} of the largest value'}
  # Values that differ in the last bit may change places: each value must be
  # that of its index, and the k values those of the reference.
  (vals, idx), (true_vals, true_idx) = found, truth
  same = np.mean(
    [len(np.intersect1d(*pair)) for pair in zip(idx, true_idx, strict=True)]
  )
  own = np.asarray(reference.sddmm(w.x_ND, jnp.asarray(idx), w.w_MD))
  own = np.maximum(own + np.asarray(w.b_M)[idx], 0)
  allowed = CLOSE * true_vals.max()
  if np.abs(own - vals).max() > allowed:
    return {'error': 'values are not those of their indices'}
  recall = same / idx.shape[1]
  worst = np.abs(vals - true_vals).max()
  if worst > allowed and recall > 0.5:
    return {'recall': recall}  # approximate by design: it is told, and timed
  if worst > allowed:
    return {'error': f'values differ by {worst:.2g}'}
  return {}


def peaks(size: int) -> cost.Device:
  """This machine as a device: what its fastest products and copies reach."""
  rng = np.random.default_rng(0)
  a = rng.random((size, size), np.float32)
  times = {'float32': [], 'bfloat16': [], 'numpy': []}
  product = jax.jit(
    functools.partial(jnp.dot, preferred_element_type=jnp.float32)
  )
  given = {name: jnp.asarray(a, name) for name in ('float32', 'bfloat16')}
  for _ in range(5):
    for name, x in given.items():
      times[name].append(_seconds(product, x, x))
    times['numpy'].append(_seconds(np.dot, a, a))
  flops = {name: 2 * size**3 / min(all_s) for name, all_s in times.items()}
  flops['float32'] = max(flops['float32'], flops.pop('numpy'))
  flops['bfloat16'] = max(flops['bfloat16'], flops['float32'])
  flops[cost.VECTOR] = flops['float32']  # the same units of the processor
  return cost.Device(
    *('here', 'cpu', flops, _bandwidth(4 * size * size)),
    memory=0.0,
  )


def _seconds(function, *arguments) -> float:
  start = time.perf_counter()
  jax.block_until_ready(function(*arguments))
  return time.perf_counter() - start


def _bandwidth(count: int) -> float:
  """Bytes/s of copies between arrays far larger than a cache, by all cores."""
  cores = machine.cores()
  source = np.ones((cores, count), np.float32)
  target = np.ones_like(source)
  with concurrent.futures.ThreadPoolExecutor(cores) as pool:
    seconds = [
      _seconds(lambda: list(pool.map(np.copyto, target, source)))
      for _ in range(7)
    ]
  return 2 * source.nbytes / min(seconds)


def table(shape: str, name: str, found: dict) -> str:
  """A kernel's rows."""
  lines = [f'{name} {shape}']
  for who, one in found.items():
    if 'error' in one:
      lines.append(f'  {who:<24} {one["error"]}')
      continue
    recall = f'  recall {one["recall"]:.3f}' if 'recall' in one else ''
    lines.append(
      f'  {who:<24}{one["ms"]:>9.2f} ms{one["fraction"]:>7.2f} of the '
      f'roofline{recall}'
    )
  return '\n'.join(lines)


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')  # whatever else it would find
  main()
