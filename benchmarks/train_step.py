"""One training step of a TopK SAE: ours beside its peers, on the same work.

    bash benchmarks/peers.sh     # once: each peer an environment of its own
    python -m benchmarks.train_step [--rows=2048 --width=256 --latents=8192 ...]
    python -m benchmarks.train_step --sweep --out=FILE.json    # and FILE.svg

All start from the same parameters and see the same rows in the same order with
the same learning rate. Each runs in a process of its own with all cores; they
take turns of a few steps, so that what else the machine does falls on all, and
the time of a step is the median over the turns. At the end each one's FVU on
held-out rows is computed here, in float64, and its peak memory is read. With
`--alone` one runs after the other, so that only one holds memory.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from benchmarks import machine, plot, work

HERE = pathlib.Path(__file__).parent
WARM = 3  # steps before any is timed: they compile, and make the moments
BLOCKS = 24  # batches at most, which then come again
KEEP = {  # glibc gives freed memory back otherwise, and page faults cost much
  'MALLOC_MMAP_THRESHOLD_': '8000000000',
  'MALLOC_TRIM_THRESHOLD_': '16000000000',
  'MALLOC_TOP_PAD_': '500000000',
}
CPU = {'JAX_PLATFORMS': 'cpu'}  # whatever else jax would find
# name -> (environment, module, variant, variables)
CONTENDERS = {
  'ours native': ('', 'ours', 'native', CPU),
  'ours xla': ('', 'ours', 'cpu', CPU),
  'sparsify': ('sparsify', 'sparsify', 'shipped', {}),
  'sparsify tuned': ('sparsify', 'sparsify', 'tuned', KEEP),
  'sparsify autocast': ('sparsify', 'sparsify', 'tuned-autocast', KEEP),
  'sparsify compiled': (
    *('sparsify', 'sparsify', 'tuned-autocast-compile'),
    KEEP,
  ),
  'sae_lens': ('sae_lens', 'sae_lens', 'shipped', {}),
  'dictionary_learning': (
    *('dictionary_learning', 'dictionary_learning', 'shipped'),
    {},
  ),
  'paper recipe': ('sparsify', 'plain', 'shipped', {}),
  'paper recipe tuned': ('sparsify', 'plain', 'tuned', KEEP),
}
MORE = {  # only where --only names them: each is slower than one above
  'ours native bf16': ('', 'ours', 'native-bfloat16', CPU),
  'ours xla bf16': ('', 'ours', 'cpu-bfloat16', CPU),
  'sparsify float32 compiled': (
    *('sparsify', 'sparsify', 'tuned-compile'),
    KEEP,
  ),
  'sae_lens sparse': ('sae_lens', 'sae_lens', 'sparse', {}),
}
SIZES = ({'width': 256, 'latents': 8192}, {'width': 512, 'latents': 16_384})
SWEEP_ROWS = (64, 256, 1024, 2048, 8192)
SWEEP_K = (32, 64, 128, 256)


class Contender:
  """A worker process."""

  def __init__(self, name: str, job: pathlib.Path):
    environment, module, variant, variables = (CONTENDERS | MORE)[name]
    python = sys.executable
    if environment:
      python = str(HERE / '.envs' / environment / 'bin' / 'python')
    self.name = name
    self.seconds: list[float] = []  # a step, by turn
    worker = [python, '-P', str(HERE / 'worker.py')]  # not beside kernels.py,
    self.process = subprocess.Popen(  # which transformers would import
      [*worker, module, variant, str(job)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env={**os.environ, 'PYTHONPATH': str(HERE.parent), **variables},
      text=True,
    )

  def ask(self, *words) -> dict:
    """Its answer.

    Raises:
      RuntimeError: it ended; what it said of that stands on stderr.
    """
    try:
      self.process.stdin.write(' '.join(map(str, words)) + '\n')
      self.process.stdin.flush()
    except BrokenPipeError:
      line = ''
    else:
      line = self.process.stdout.readline()
    if not line:
      self.process.communicate()
      raise RuntimeError(f'{self.name} ended: see above')
    return json.loads(line)

  def turn(self, first: int, count: int) -> None:
    answer = self.ask('steps', first, count)
    self.seconds.append(answer['seconds'] / count)

  def close(self) -> None:
    self.process.communicate()


def main() -> None:
  args = _arguments()
  names = args.only.split(',') if args.only else list(CONTENDERS)
  _require(names)
  sizes = [{name: getattr(args, name) for name in ('width', 'latents')}]
  points = [(args.rows, args.k)]
  if args.sweep:
    sizes = SIZES
    points = [(rows, args.k) for rows in SWEEP_ROWS]
    points += [(args.rows, k) for k in SWEEP_K]
  found = {**machine.facts(), 'runs': []}
  for size in sizes:
    for rows, k in dict.fromkeys(points):
      with tempfile.TemporaryDirectory() as folder:
        job = {**size, 'rows': rows, 'k': k, 'lr': args.lr}
        run = compare(job, names, pathlib.Path(folder), args)
      found['runs'].append(run)
      print(found['machine']['processor'], run['settings'])
      print(table(run['results']), flush=True)
      if args.out:  # at once: a sweep takes long
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + '\n')
  if args.out and args.sweep:
    plot.write(args.out.with_suffix('.svg'), panels(found['runs'], args))


def _arguments() -> argparse.Namespace:
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
  parser.add_argument(
    '--only',
    default='',
    help=f'names, with commas between; also {", ".join(MORE)}',
  )
  parser.add_argument('--alone', action='store_true', help='not in turns')
  parser.add_argument(
    '--sweep',
    action='store_true',
    help=f'rows {SWEEP_ROWS} at --k and k {SWEEP_K} at --rows, at two sizes',
  )
  parser.add_argument('--out', type=pathlib.Path, help='a JSON')
  return parser.parse_args()


def _require(names: list[str]) -> None:
  """Ends the program where a contender is unknown or not installed."""
  known = CONTENDERS | MORE
  unknown = [name for name in names if name not in known]
  if unknown:
    sys.exit(
      f'--only names {", ".join(unknown)}; it may name {", ".join(known)}'
    )
  missing = {
    known[name][0]
    for name in names
    if known[name][0] and not (HERE / '.envs' / known[name][0]).exists()
  }
  if missing:
    sys.exit(
      f'no environment for {", ".join(missing)}: run benchmarks/peers.sh'
    )


def compare(
  job: dict, names: list[str], folder: pathlib.Path, args: argparse.Namespace
) -> dict:
  """One run: its settings, and each contender's results."""
  blocks = min(BLOCKS, WARM + args.turns * args.steps)
  sizes = {name: job[name] for name in ('rows', 'width', 'latents')}
  held = work.write(folder, args.seed, blocks=blocks, **sizes)
  path = folder / 'job.json'
  files = {'init': str(folder), 'rows_file': str(folder / 'rows.bin')}
  path.write_text(json.dumps({**job, **files, 'blocks': blocks}))
  results = {}
  for group in [[name] for name in names] if args.alone else [names]:
    contenders = [Contender(name, path) for name in group]
    for one in contenders:
      one.ask('steps', 0, WARM)
    for turn in range(args.turns):
      for one in contenders:
        one.turn(WARM + turn * args.steps, args.steps)
      last = (f'{c.name} {1e3 * c.seconds[-1]:.0f} ms' for c in contenders)
      print(f'turn {turn + 1}/{args.turns}: {", ".join(last)}', file=sys.stderr)
    for one in contenders:
      found = _result(one, job, held, folder / 'params.npz')
      results[one.name] = found
      print(f'{one.name}: {found["peak_mb"]:.0f} MB', file=sys.stderr)
  settings = {**job, 'seed': args.seed, 'turns': args.turns}
  settings |= {'steps': args.steps, 'alone': args.alone}
  settings['tokens'] = job['rows'] * (WARM + args.turns * args.steps)
  return {'settings': settings, 'results': results}


def _result(
  one: Contender, job: dict, held: np.ndarray, path: pathlib.Path
) -> dict:
  memory = one.ask('memory')  # before the parameters are copied
  one.ask('params', path)
  result = {'versions': one.ask('info'), **memory}
  one.close()
  median = float(np.median(one.seconds))
  with np.load(path) as params:
    result['fvu'] = work.fvu(params, held, job['k'])
  return result | {
    'ms_a_step': 1e3 * median,
    'ms_quartiles': (1e3 * np.quantile(one.seconds, (0.25, 0.75))).tolist(),
    'tokens_per_s': job['rows'] / median,
  }


def table(results: dict) -> str:
  """In words, a line a contender."""
  first = next(iter(results))
  lines = [
    f'{"":<27}{"ms a step":>10}{"x " + first:>16}{"tokens/s":>10}'
    f'{"peak MB":>9}{"FVU":>9}'
  ]
  for name, one in results.items():
    ratio = one['ms_a_step'] / results[first]['ms_a_step']
    lines.append(
      f'{name:<27}{one["ms_a_step"]:>10.1f}{ratio:>16.2f}'
      f'{one["tokens_per_s"]:>10.0f}{one["peak_mb"]:>9.0f}{one["fvu"]:>9.4f}'
    )
  return '\n'.join(lines)


def panels(runs: list[dict], args: argparse.Namespace) -> list[plot.Panel]:
  """Tokens a second over rows and over k, at each size."""
  found = []
  sizes = dict.fromkeys(
    (run['settings']['width'], run['settings']['latents']) for run in runs
  )
  for width, latents in sizes:
    for axis, other, label in (
      ('rows', 'k', 'rows a step'),
      ('k', 'rows', 'k, latents a row'),
    ):
      fixed = {'width': width, 'latents': latents, other: getattr(args, other)}
      lines: dict[str, list] = {}
      for run in runs:
        if fixed.items() <= run['settings'].items():
          for name, one in run['results'].items():
            point = (run['settings'][axis], one['tokens_per_s'])
            lines.setdefault(name, []).append(point)
      title = f'D={width}, M={latents}, {other}={fixed[other]}'
      found.append(plot.Panel(title, label, 'tokens/s', lines))
  return found


if __name__ == '__main__':
  main()
