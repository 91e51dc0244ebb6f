"""One training step of a TopK SAE: ours beside its peers, on the same work.

    bash benchmarks/peers.sh     # once: each peer an environment of its own
    python -m benchmarks.train_step [--rows=2048 --width=256 --latents=8192 ...]

All start from the same parameters and see the same rows in the same order with
the same learning rate. Each runs in a process of its own with all cores; they
take turns of a few steps, so that what else the machine does falls on all, and
the time of a step is the median over the turns. At the end each one's FVU on
held-out rows is computed here, in float64, and its peak memory is read.
Writes --out=FILE.json.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import numpy as np

HERE = pathlib.Path(__file__).parent
KEEP = {  # glibc gives freed memory back otherwise, and page faults cost much
  'MALLOC_MMAP_THRESHOLD_': '8000000000',
  'MALLOC_TRIM_THRESHOLD_': '16000000000',
  'MALLOC_TOP_PAD_': '500000000',
}
# name -> (environment, module, variant, variables)
CONTENDERS = {
  'ours native': ('', 'ours', 'native', {}),
  'ours native bf16': ('', 'ours', 'native-bfloat16', {}),
  'ours xla': ('', 'ours', 'cpu', {}),
  'ours xla bf16': ('', 'ours', 'cpu-bfloat16', {}),
  'sparsify': ('sparsify', 'sparsify', 'shipped', {}),
  'sparsify tuned': ('sparsify', 'sparsify', 'tuned', KEEP),
  'sparsify autocast': ('sparsify', 'sparsify', 'autocast', KEEP),
  'sae_lens': ('sae_lens', 'sae_lens', 'shipped', {}),
  'dictionary_learning': (
    *('dictionary_learning', 'dictionary_learning', 'shipped'),
    {},
  ),
  'plain torch': ('sparsify', 'plain', '', {}),
}


class Contender:
  """A worker process."""

  def __init__(self, name: str, job: pathlib.Path):
    environment, module, variant, variables = CONTENDERS[name]
    python = sys.executable
    if environment:
      python = str(HERE / '.envs' / environment / 'bin' / 'python')
    self.name = name
    self.seconds: list[float] = []
    self.process = subprocess.Popen(
      [python, str(HERE / 'worker.py'), module, variant, str(job)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env={**os.environ, 'PYTHONPATH': str(HERE.parent), **variables},
      text=True,
    )

  def ask(self, *words) -> dict:
    self.process.stdin.write(' '.join(map(str, words)) + '\n')
    self.process.stdin.flush()
    line = self.process.stdout.readline()
    if not line:
      raise RuntimeError(f'{self.name} ended: see above')
    return json.loads(line)

  def close(self) -> None:
    self.process.stdin.close()
    self.process.wait()


def activations(rng, rows: int, width: int) -> np.ndarray:
  """Rows that an SAE can explain: a few of 4 D directions, a mean, noise."""
  directions = rng.normal(size=(4 * width, width)).astype(np.float32)
  directions /= np.linalg.norm(directions, axis=1, keepdims=True)
  mean = rng.normal(size=width).astype(np.float32)
  x = np.empty((rows, width), np.float32)
  for start in range(0, rows, 4096):
    part = x[start : start + 4096]
    z = np.zeros((len(part), 4 * width), np.float32)
    each = min(24, 4 * width)
    at = (4 * width * rng.random((len(part), each)) ** 2).astype(int)
    np.put_along_axis(z, at, rng.exponential(size=at.shape), 1)
    noise = rng.normal(size=part.shape) * 0.02
    part[:] = z @ directions + mean + noise
  return x


def fvu(params, x: np.ndarray, k: int) -> float:
  """Of held-out rows, in float64."""
  w_enc, b_enc, w_dec, b_dec = (
    params[name].astype(float) for name in ('w_enc', 'b_enc', 'w_dec', 'b_dec')
  )
  x = x.astype(float)
  z = np.maximum((x - b_dec) @ w_enc.T + b_enc, 0)
  at = np.argpartition(-z, k - 1, axis=1)[:, :k]
  kept = np.zeros_like(z)
  np.put_along_axis(kept, at, np.take_along_axis(z, at, 1), 1)
  error = x - kept @ w_dec - b_dec
  return float((error**2).sum() / ((x - x.mean(0)) ** 2).sum())


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rows', type=int, default=2048)
  parser.add_argument('--width', type=int, default=256)
  parser.add_argument('--latents', type=int, default=8192)
  parser.add_argument('--k', type=int, default=32)
  parser.add_argument('--lr', type=float, default=1e-3)
  parser.add_argument('--turns', type=int, default=12)
  parser.add_argument('--steps', type=int, default=10, help='of a turn')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', default='', help='names, with commas between')
  parser.add_argument('--out', type=pathlib.Path)
  args = parser.parse_args()
  names = args.only.split(',') if args.only else list(CONTENDERS)
  missing = {
    environment
    for name in names
    for environment in CONTENDERS[name][:1]
    if environment and not (HERE / '.envs' / environment).exists()
  }
  if missing:
    sys.exit(
      f'no environment for {", ".join(missing)}: run benchmarks/peers.sh'
    )
  with tempfile.TemporaryDirectory() as folder:
    found = _compare(args, names, pathlib.Path(folder))
  _print(found)
  if args.out:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + '\n')


def _compare(args, names: list[str], folder: pathlib.Path) -> dict:
  rng = np.random.default_rng(args.seed)
  x = activations(rng, 24 * args.rows + 4096, args.width)
  held, x = x[-4096:], x[:-4096]
  np.save(folder / 'rows.npy', x)
  bound = args.width**-0.5
  w_enc = rng.uniform(-bound, bound, (args.latents, args.width))
  w_enc = w_enc.astype(np.float32)
  init = {
    'w_enc': w_enc,
    'b_enc': np.zeros(args.latents, np.float32),
    'w_dec': w_enc / np.linalg.norm(w_enc, axis=1, keepdims=True),
    'b_dec': x.mean(0),
  }
  np.savez(folder / 'init.npz', **init)
  job = {name: getattr(args, name) for name in ('rows', 'width', 'latents')}
  job |= {'k': args.k, 'lr': args.lr, 'init': str(folder / 'init.npz')}
  job['rows_file'] = str(folder / 'rows.npy')
  (folder / 'job.json').write_text(json.dumps(job))
  contenders = [Contender(name, folder / 'job.json') for name in names]
  for one in contenders:
    one.ask('steps', 0, 3)  # compiles, and warms up
  for turn in range(args.turns):
    for one in contenders:
      answer = one.ask('steps', 3 + turn * args.steps, args.steps)
      one.seconds.append(answer['seconds'] / args.steps)
    print(
      f'turn {turn + 1}/{args.turns}: '
      + ', '.join(f'{c.name} {1e3 * c.seconds[-1]:.0f} ms' for c in contenders),
      file=sys.stderr,
    )
  results = {}
  for one in contenders:
    path = folder / 'params.npz'
    peak = one.ask('params', path)['peak_mb']
    one.close()
    median = float(np.median(one.seconds))
    results[one.name] = {
      'ms_a_step': 1e3 * median,
      'ms_quartiles': (1e3 * np.quantile(one.seconds, (0.25, 0.75))).tolist(),
      'rows_per_s': args.rows / median,
      'peak_mb': peak,
      'fvu': fvu(np.load(path), held, args.k),
    }
  return {
    'settings': {**job, 'init': None, 'rows_file': None, 'seed': args.seed}
    | {'turns': args.turns, 'steps': args.steps},
    'machine': {'processor': processor(), 'cores': os.cpu_count()},
    'date': time.strftime('%Y-%m-%d'),
    'results': results,
  }


def processor() -> str:
  try:
    text = pathlib.Path('/proc/cpuinfo').read_text()
  except OSError:
    return platform.processor()
  lines = dict(x.split(':', 1) for x in text.splitlines() if ':' in x)
  names = {name.strip(): value.strip() for name, value in lines.items()}
  flags = names.get('flags', '').split()
  wide = [f for f in ('avx2', 'avx512f', 'avx512_bf16') if f in flags]
  family = f'family {names.get("cpu family")} model {names.get("model")}'
  return f'{names.get("model name")}, {family}, {" ".join(wide)}'


def _print(found: dict) -> None:
  results = found['results']
  first = next(iter(results))
  print(found['machine']['processor'], found['settings'])
  print(f'{"":<22}{"ms a step":>10}{"x " + first:>14}{"peak MB":>9}{"FVU":>9}')
  for name, one in results.items():
    ratio = one['ms_a_step'] / results[first]['ms_a_step']
    print(
      f'{name:<22}{one["ms_a_step"]:>10.1f}{ratio:>14.2f}'
      f'{one["peak_mb"]:>9.0f}{one["fvu"]:>9.4f}'
    )


if __name__ == '__main__':
  main()
