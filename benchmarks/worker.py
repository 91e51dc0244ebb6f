"""One contender in a process of its own, told over stdin what to do.

    PYTHONPATH=. python -P benchmarks/worker.py MODULE VARIANT JOB.json

A line in is a command, a line out its answer in JSON:

    info                versions of what it runs on
    steps FIRST COUNT   {seconds} of so many steps, from batch FIRST on
    memory              {peak_mb, made_mb, start_mb}
    params PATH         {}; the parameters are in PATH, an npz

Memory is the most that was resident since the process began, in MB; `made` is
that before the first step, `start` what its libraries alone take. First
parameters are copied from files that are mapped and then let go, and batches
are read one turn at a time: neither stays beside what the contender holds.
"""

import importlib
import importlib.metadata
import json
import pathlib
import platform
import resource
import sys
import time

import numpy as np

PARAMS = ('w_enc', 'b_enc', 'w_dec', 'b_dec')
PACKAGES = (
  *('numpy', 'jax', 'jaxlib', 'torch', 'eai-sparsify', 'sae-lens'),
  'dictionary-learning',
)


def main() -> None:
  name, variant, path = sys.argv[1:]
  out, sys.stdout = sys.stdout, sys.stderr  # peers print as they please
  job = json.loads(pathlib.Path(path).read_text())
  module = importlib.import_module(f'benchmarks.contenders.{name}')
  memory = {'start_mb': peak_mb()}
  init = {
    part: np.load(f'{job["init"]}/{part}.npy', mmap_mode='c') for part in PARAMS
  }
  made = module.Contender(job, variant, init)
  del init
  memory['made_mb'] = peak_mb()
  for line in sys.stdin:
    what, *rest = line.split()
    if what == 'info':
      answer = versions()
    elif what == 'steps':
      answer = {'seconds': _steps(made, job, *map(int, rest))}
    elif what == 'memory':
      answer = {'peak_mb': peak_mb(), **memory}
    elif what == 'params':
      np.savez(rest[0], **made.params())
      answer = {}
    else:
      raise ValueError(f'{what!r} is no command')
    out.write(json.dumps(answer) + '\n')
    out.flush()


def _steps(made, job: dict, first: int, count: int) -> float:
  size = job['rows'] * job['width']
  batches = [
    np.fromfile(
      job['rows_file'],
      np.float32,
      size,
      offset=4 * size * (t % job['blocks']),
    ).reshape(job['rows'], job['width'])
    for t in range(first, first + count)
  ]
  start = time.perf_counter()
  for batch in batches:
    made.step(batch)
  made.wait()
  return time.perf_counter() - start


def peak_mb() -> float:
  """The most of this program that was resident.

  Where there is /proc it is read there: what getrusage tells begins with what
  the process that started this one held.
  """
  try:
    lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  except OSError:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  found = [line.split()[1] for line in lines if line.startswith('VmHWM')]
  return int(found[0]) / 1024


def versions() -> dict[str, str]:
  found = {'python': platform.python_version()}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


if __name__ == '__main__':
  main()
