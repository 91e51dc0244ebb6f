"""One contender in a process of its own, told over stdin what to do.

    python benchmarks/worker.py NAME VARIANT JOB.json

Lines in: `steps FIRST COUNT`, `params PATH`, end of file. Lines out: one JSON
object each, {seconds} or {peak_mb}.
"""

import importlib
import json
import pathlib
import resource
import sys
import time

import numpy as np


def main() -> None:
  name, variant, path = sys.argv[1:]
  out, sys.stdout = sys.stdout, sys.stderr  # peers print as they please
  job = json.loads(pathlib.Path(path).read_text())
  x = np.load(job['rows_file'], mmap_mode='r')
  made = importlib.import_module(f'contenders.{name}').Contender(job, variant)
  rows, blocks = job['rows'], len(x) // job['rows']
  for line in sys.stdin:
    what, *rest = line.split()
    if what == 'steps':
      first, count = map(int, rest)
      batches = [
        np.array(x[(t % blocks) * rows :][:rows])
        for t in range(first, first + count)
      ]
      start = time.perf_counter()
      for batch in batches:
        made.step(batch)
      made.wait()
      answer = {'seconds': time.perf_counter() - start}
    elif what == 'params':
      np.savez(rest[0], **made.params())
      peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
      answer = {'peak_mb': peak / 1024}
    else:
      raise ValueError(f'{what!r} is no command')
    out.write(json.dumps(answer) + '\n')
    out.flush()


if __name__ == '__main__':
  main()
