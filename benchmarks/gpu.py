"""The GPU kernels on an NVIDIA GPU: checked, then timed beside their rivals.

    bash benchmarks/gpu.sh [--out=FILE.json] [--budget=460]

jax and torch have a process each, which do one item at a time, as they are told
over stdin. An item that fails or hangs is an error in the JSON and the rest is
done; what the budget leaves no time for is named there too. A step of ours
takes turns with each of torch's on the same GPU. Fractions of the roofline are
those of `lmm_sae.kernels.cost`, with the data sheet's peaks and with peaks
measured here. `--tiny` interprets the kernels on a CPU: it proves the script,
and its times say nothing.
"""

import argparse
import json
import os
import pathlib
import select
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
PAPER = {'rows': 8192, 'width': 4096, 'latents': 131_072, 'k': 256}
TINY = {'rows': 24, 'width': 16, 'latents': 300, 'k': 8}
VARIANTS = ('shipped', 'tuned', 'dense')
TARGET = 0.6  # of the step's roofline, on an H200
FIRST_S = 150.0  # an item may take: compilation included


class Worker:
  """A process that answers each line with one line of JSON."""

  def __init__(self, name: str, job: dict, *arguments: str):
    # Both processes share one GPU: neither may take its memory beforehand.
    environment = os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
    if job['tiny']:
      environment |= {'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': ''}
    self.process = subprocess.Popen(
      [sys.executable, str(HERE / name), json.dumps(job), *arguments],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env=environment,
    )

  def ask(self, *words: str, within_s: float = FIRST_S) -> dict:
    """The answer; {'error': why} where there is none in time."""
    try:
      self.process.stdin.write((' '.join(words) + '\n').encode())
      self.process.stdin.flush()
    except BrokenPipeError:
      return {'error': 'the process had ended: see its messages'}
    ready, *_ = select.select([self.process.stdout], [], [], within_s)
    if not ready:
      self.process.kill()
      self.process.wait()
      return {'error': f'no answer in {within_s:.0f} s: killed'}
    line = self.process.stdout.readline()
    if not line:
      self.process.wait()
    return json.loads(line) if line else {'error': 'the process ended'}

  def close(self) -> None:
    self.process.stdin.close()
    try:
      self.process.wait(20)
    except subprocess.TimeoutExpired:
      self.process.kill()


def main() -> None:
  args = _arguments()
  started = time.monotonic()

  def left() -> float:
    return args.budget - (time.monotonic() - started)

  job = {name: getattr(args, name) for name in PAPER} | {'tiny': args.tiny}
  worker = Worker('gpu_jax.py', job)
  found = {'date': time.strftime('%Y-%m-%d'), 'settings': job}
  found['jax'] = worker.ask('info')
  if 'error' in found['jax']:
    sys.exit(f'jax cannot use a GPU here: {found["jax"]["error"]}')
  for what in ('checks', 'kernels'):
    found[what] = {}
    for name in found['jax'].pop(what):
      if left() < 0.45 * args.budget and what == 'kernels':
        found[what][name] = {'error': 'skipped: no time left for it'}
        continue
      answer = worker.ask(what, name, within_s=min(FIRST_S, max(left(), 1)))
      found[what][name] = answer
      _say(f'{what} {name}', answer)
      if worker.process.poll() is not None:  # it hung, or brought jax down
        worker = Worker('gpu_jax.py', job)
        worker.ask('info')
  worker.close()
  worker = Worker('gpu_jax.py', job)  # whose memory holds a step alone
  found['steps'] = _steps(worker, job, left, args)
  worker.close()
  found['verdict'] = _verdict(found)
  found['seconds'] = time.monotonic() - started
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.write_text(json.dumps(found, indent=1) + '\n')
  print(json.dumps(found['verdict'], indent=1))
  sys.exit(0 if found['verdict']['every_check_passed'] else 1)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--tiny', action='store_true', help='on a CPU')
  parser.add_argument('--budget', type=float, default=460, help='seconds')
  parser.add_argument('--turns', type=int, default=3)
  parser.add_argument('--steps', type=int, default=5, help='of a turn')
  parser.add_argument(
    '--out', type=pathlib.Path, default=pathlib.Path('runs/gpu.json')
  )
  for name in PAPER:
    parser.add_argument(f'--{name}', type=int)
  args = parser.parse_args()
  for name, value in (TINY if args.tiny else PAPER).items():
    if getattr(args, name) is None:
      setattr(args, name, value)
  return args


def _steps(worker: Worker, job: dict, left, args) -> dict:
  """A training step of ours in turns with torch's, one variant at a time."""
  steps = {'ours': worker.ask('start') | {'ms': []}}
  _say('ours', steps['ours'])
  for i, variant in enumerate(VARIANTS):
    share = max(left() / (len(VARIANTS) - i), 0)
    if share < 15:
      steps[variant] = {'error': 'skipped: no time left for it'}
      continue
    until = left() - share
    peer = Worker('gpu_torch.py', job, variant)
    steps[variant] = peer.ask('start', within_s=share) | {'ms': []}
    for _ in range(args.turns):
      if left() < until or 'error' in steps[variant]:
        break
      for name, one in (('ours', worker), (variant, peer)):
        if 'error' not in steps[name]:
          answer = one.ask('steps', str(args.steps), within_s=max(left(), 1))
          steps[name]['ms'] += answer.pop('ms', [])
          steps[name] |= answer
    peer.close()
    _say(variant, steps[variant])
  for name, one in steps.items():
    if one.get('ms'):
      one['median_ms'] = sorted(one['ms'])[len(one['ms']) // 2]
    elif 'error' not in one:
      one['error'] = f'{name} was never timed'
  return steps


def _verdict(found: dict) -> dict:
  checks, steps = found['checks'], found['steps']
  ours = steps['ours'].get('median_ms')
  verdict = {
    'every_check_passed': all(x.get('passed', False) for x in checks.values()),
    'failed': [n for n, x in checks.items() if not x.get('passed', False)],
    'errors': [
      f'{part} {name}: {x["error"]}'
      for part in ('checks', 'kernels', 'steps')
      for name, x in found[part].items()
      if 'error' in x
    ],
    'step_ms': {n: x.get('median_ms') for n, x in steps.items()},
    'target_fraction': TARGET,
  }
  for by, roofline in found['jax']['step_roofline_ms'].items():
    verdict[f'fraction_by_{by}'] = roofline / ours if ours else None
  return verdict


def _say(name: str, answer: dict) -> None:
  print(f'{name}: {json.dumps(answer)[:300]}', file=sys.stderr)


if __name__ == '__main__':
  main()
