"""Indexing codes beside the paper's method, in tokens/s and memory.

    python -m benchmarks.index --out=FILE.json
    python -m benchmarks.index --latents=131072 --k=256 --samples=64

The same synthetic codes (`codes.py`) for all, from files; what each way does
stands in `index_rivals.py`. Each run is a process of its own with one thread,
and they take turns. Time is from the first code to files that answer.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np

from benchmarks import machine, worker
from benchmarks.codes import TEXT_VOCAB, Codes
from benchmarks.index_rivals import FIELDS, WAYS

RIVALS = tuple(name for name in WAYS if name != 'ours')
ROOT = pathlib.Path(__file__).parents[1]
THREADS = ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')


def main() -> None:
  args = _arguments()
  found = {**machine.facts(), 'versions': worker.versions(), 'runs': []}
  for latents in map(int, args.latents.split(',')):
    for k in map(int, args.k.split(',')):
      codes = Codes(latents, k, args.drawn, args.side, 0, args.text, args.seed)
      with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = compare(codes, args, pathlib.Path(folder))
      found['runs'].append(run)
      print(table(run), flush=True)
      machine.save(found, args.out)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--latents', default='16384,131072', help='M')
  parser.add_argument('--k', default='256,32')
  parser.add_argument('--samples', type=int, default=128)
  parser.add_argument('--drawn', type=int, default=16, help='of k, a sample')
  parser.add_argument('--side', type=int, default=24, help='of the base view')
  parser.add_argument('--text', type=int, default=24, help='tokens a sample')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--turns', type=int, default=3)
  parser.add_argument('--only', default='', help='ways, as ours,tuned')
  parser.add_argument('--rows', type=int, default=4096, help='of ours, a time')
  parser.add_argument('--part_samples', type=int, default=256, help='of ours')
  parser.add_argument('--memory_mb', type=int, default=2048, help='of ours')
  parser.add_argument('--folder', default=tempfile.gettempdir())
  parser.add_argument('--out', type=pathlib.Path, help='a JSON')
  return parser.parse_args()


def compare(
  codes: Codes, args: argparse.Namespace, folder: pathlib.Path
) -> dict:
  """All ways on the same codes, in turns."""
  job = {
    **dataclasses.asdict(codes),
    'tokens': codes.tokens,
    'samples': args.samples,
    'vocab': TEXT_VOCAB,
    'codes': str(folder / 'codes'),
    'rows': args.rows,
    'part_samples': args.part_samples,
    'memory_mb': args.memory_mb,
  }
  write(codes, args.samples, folder / 'codes')
  (folder / 'job.json').write_text(json.dumps(job))
  names = args.only.split(',') if args.only else list(WAYS)
  turns = {name: [] for name in names}
  for turn in range(args.turns):
    for name in names if turn % 2 == 0 else names[::-1]:
      turns[name].append(one(name, folder / 'job.json', folder / 'made'))
      shutil.rmtree(folder / 'made')
  del job['codes']
  rows = args.samples * codes.tokens
  results = {name: _result(each, rows) for name, each in turns.items()}
  return {'settings': job | {'turns': args.turns}, 'results': results}


def write(codes: Codes, samples: int, folder: pathlib.Path) -> None:
  """The codes of all samples as flat files, a few samples at a time."""
  folder.mkdir(parents=True)
  for sample in range(samples):
    tokens, vals_NK, idx_NK = codes.sample(sample)
    flat = {name: tokens[name].astype(np.int32) for name in FIELDS}
    flat |= {'vals': vals_NK, 'idx': idx_NK.astype(np.int32)}
    for name, array in flat.items():
      with (folder / name).open('ab') as file:
        array.tofile(file)


def one(name: str, job: pathlib.Path, folder: pathlib.Path) -> dict:
  """A run of one way; what it says of itself."""
  done = subprocess.run(
    [sys.executable, '-m', 'benchmarks.index_rivals', name, job, folder],
    cwd=ROOT,
    env=os.environ | dict.fromkeys(THREADS, '1'),
    stdout=subprocess.PIPE,
    text=True,
  )
  if done.returncode:
    raise RuntimeError(f'{name} ended with {done.returncode}: see above')
  return json.loads(done.stdout)


def _result(turns: list[dict], rows: int) -> dict:
  seconds = [turn['seconds'] for turn in turns]
  return {
    'tokens_per_s': rows / float(np.median(seconds)),
    'peak_mb': max(turn['peak_mb'] for turn in turns),
    'start_mb': min(turn['start_mb'] for turn in turns),
    'own_mb': max(turn['peak_mb'] - turn['start_mb'] for turn in turns),
    'disk_mb': turns[0]['bytes'] / 1e6,
    'seconds': seconds,
  }


def table(run: dict) -> str:
  """In words, a line a way."""
  settings, results = run['settings'], run['results']
  lines = [
    f'M={settings["latents"]} k={settings["k"]}: {settings["samples"]} images '
    f'of {settings["tokens"]} tokens',
    f'  {"":<6}{"tokens/s":>10}{"peak MB":>9}{"own MB":>8}{"disk MB":>9}',
  ]
  for name, way in results.items():
    lines.append(
      f'  {name:<6}{way["tokens_per_s"]:>10,.0f}{way["peak_mb"]:>9,.0f}'
      f'{way["own_mb"]:>8,.0f}{way["disk_mb"]:>9,.0f}'
    )
  for name in RIVALS:
    if {'ours', name} <= set(results):
      us, it = results['ours'], results[name]
      lines.append(
        f'  ours is {us["tokens_per_s"] / it["tokens_per_s"]:.2f} times as '
        f'fast as {name}, in 1/{it["peak_mb"] / us["peak_mb"]:.1f} of its '
        f'peak (own: 1/{it["own_mb"] / max(us["own_mb"], 0.1):.1f})'
      )
  return '\n'.join(lines)


if __name__ == '__main__':
  main()
