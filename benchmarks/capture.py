"""The capture stage beside the model alone, on the same samples.

    python -m benchmarks.capture [--cases=scenes1,scenes2,anyres] --out=FILE

Ours is the command itself, `lmm-sae capture`, to committed groups: samples read
and tokenised, images processed, the forward stopped after the last hooked
layer, rows mixed, written, synced and committed. A rival
(`benchmarks.capture_rival`) is the image processor and the same forward over
the same batches, with as many processes and threads, from images in memory,
keeping nothing.

All are started, run until some groups are done (libraries are loaded then, and
files are in the page cache), and are stopped (SIGSTOP). Then they take turns of
some groups; who has its turn is alone on the machine. What ours left to be
written is synced within its turn. A rate is all samples over all seconds of the
turns; a share is ours over that of a rival.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks import machine, random_llava, worker

ROOT = pathlib.Path(__file__).parents[1]
LOOK_S = 0.004  # between two looks at what is done
LOST_S = 240.0  # within which a group must be done
RIVALS = ('plain', 'tuned')
TICKS = os.sysconf('SC_CLK_TCK')


@dataclasses.dataclass(frozen=True)
class Case:
  """What is captured, by whom.

  Attributes:
    does: for people.
    processes, threads: of ours, and of a rival; threads of each.
    group, batch: samples of them. turn: groups of a turn.
    distinct: groups whose images a rival holds; then they come again.
    layers: hooked.
    width, depth: D and decoder layers of the random model; 0: the packaged one.
    tokens: of its vocabulary. A model whose weights are large runs in one
      process on all cores, a small one in a process a core.
    view: its side in pixels; scale: of the pictures.
  """

  does: str
  processes: int
  threads: int
  group: int
  batch: int
  turn: int
  distinct: int
  layers: tuple[int, ...]
  width: int = 0
  depth: int = 0
  tokens: int = 0
  view: int = random_llava.VIEW
  scale: float = 1.0


CASES = {
  'scenes1': Case(
    'the packaged small model on scenes, 1 process of 1 thread',
    *(1, 1, 64, 8, 4, 16),
    layers=(1,),
  ),
  'scenes2': Case(
    'the packaged small model on scenes, 2 processes of 1 thread',
    *(2, 1, 64, 8, 8, 16),
    layers=(1,),
  ),
  'anyres': Case(
    'random LLaVA-NeXT, 336 px, AnyRes, on JPEGs; 1 process of 2 threads',
    *(1, 2, 8, 4, 2, 3),
    layers=(3,),
    width=512,
    depth=8,
    tokens=150_000,
  ),
}


class Contender:
  """Processes that do one group after another, stopped but for their turns."""

  def __init__(
    self, name: str, commands: list[list[str]], done: pathlib.Path, threads: int
  ):
    self.name = name
    self.seconds: list[float] = []
    self.groups: list[int] = []
    self.cpu: list[float] = []
    self._done = done
    self._log = tempfile.TemporaryFile('w+')  # noqa: SIM115 - see close
    variables = {
      'PYTHONPATH': str(ROOT),
      'OMP_NUM_THREADS': str(threads),
      'TOKENIZERS_PARALLELISM': 'false',
      'HF_HUB_OFFLINE': '1',
    }
    self._started = [
      subprocess.Popen(
        command,
        env={**os.environ, **variables},
        stdout=self._log,
        stderr=self._log,
        start_new_session=True,
      )
      for command in commands
    ]

  def warm(self, groups: int) -> None:
    """Lets so many groups be done, and stops it."""
    self._wait(groups)
    self._signal(signal.SIGSTOP)

  def turn(self, groups: int) -> None:
    before, cpu = self.done(), self._cpu()
    start = time.perf_counter()
    self._signal(signal.SIGCONT)
    self._wait(before + groups)
    self._signal(signal.SIGSTOP)
    os.sync()
    self.seconds.append(time.perf_counter() - start)
    self.groups.append(self.done() - before)
    self.cpu.append(self._cpu() - cpu)

  def done(self) -> int:
    """Groups that are done: files of their own, or lines of the manifest."""
    groups, manifest = self._done / 'groups', self._done / 'manifest.jsonl'
    count = len(list(groups.glob('*.json'))) if groups.is_dir() else 0
    lines = manifest.read_bytes().count(b'\n') if manifest.is_file() else 0
    return count + lines

  def close(self) -> None:
    self._signal(signal.SIGKILL)
    for process in self._started:
      process.wait()
    self._log.close()

  def _wait(self, groups: int) -> None:
    """Waits until so many groups are done.

    Raises:
      RuntimeError: it ended before, or nothing was done for long.
    """
    last, found = time.monotonic(), 0
    while (done := self.done()) < groups:
      if done > found:
        last, found = time.monotonic(), done
      ended = any(process.poll() is not None for process in self._started)
      if ended or time.monotonic() - last > LOST_S:
        self._log.seek(0)
        raise RuntimeError(
          f'{self.name} did {done} groups and then '
          f'{"ended" if ended else "nothing"}: {self._log.read()[-2000:]}'
        )
      time.sleep(LOOK_S)

  def _signal(self, which: int) -> None:
    for process in self._started:
      if process.poll() is None:
        os.killpg(process.pid, which)

  def _cpu(self) -> float:
    """Seconds of processor time that its processes took."""
    sessions = {process.pid for process in self._started}
    ticks = 0
    for stat in pathlib.Path('/proc').glob('[0-9]*/stat'):
      try:
        fields = stat.read_text().rpartition(')')[2].split()
      except (FileNotFoundError, ProcessLookupError):  # it has ended
        continue
      if int(fields[3]) in sessions:
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def main() -> None:
  args = _arguments()
  # Contenders that are stopped would stay for ever.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit('ended from outside'))
  found = {**machine.facts(), 'versions': worker.versions(), 'runs': []}
  for name in args.cases.split(','):
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
      run = compare(CASES[name], pathlib.Path(folder), args.turns)
    found['runs'].append({'case': name, **run})
    print(table(run), flush=True)
  machine.save(found, args.out)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--cases', default=','.join(CASES))
  parser.add_argument('--turns', type=int, default=5)
  parser.add_argument('--folder', help='on the disk that is written')
  parser.add_argument('--out', type=pathlib.Path, help='a JSON')
  return parser.parse_args()


def compare(case: Case, folder: pathlib.Path, turns: int) -> dict:
  """One case: its settings, and what each contender did."""
  overrides = _overrides(case, folder)
  contenders: list[Contender] = []
  try:
    for name in ('ours', *RIVALS):
      contenders.append(_start(name, case, folder / name, overrides))
      contenders[-1].warm(2 * case.processes)
    for turn in range(turns):
      for one in contenders[:: -1 if turn % 2 else 1]:
        one.turn(case.turn)
        print(
          f'turn {turn + 1}/{turns}: {one.name} {one.seconds[-1]:.2f} s',
          file=sys.stderr,
        )
  finally:
    for one in contenders:
      one.close()
  results = {one.name: _result(one, case) for one in contenders}
  ours = results['ours']['samples_per_s']
  settings = {**dataclasses.asdict(case), 'turns': turns}
  return {
    'settings': settings,
    'results': results,
    'share_of': {
      name: ours / results[name]['samples_per_s'] for name in RIVALS
    },
  }


def _overrides(case: Case, folder: pathlib.Path) -> list[str]:
  """Fields of the config, and the model and data that they name."""
  groups = 10_000 if not case.width else 1000
  fields = {
    'lmm.layers': f'({",".join(map(str, case.layers))},)',
    'lmm.threads': case.threads,
    'capture.group': case.group,
    'capture.batch': case.batch,
    'capture.processes': case.processes,
    'data.train': groups * case.group,
    'data.half': 1,
  }
  if case.width:
    model = random_llava.make(
      folder / 'model', case.width, case.depth, case.view, case.tokens
    )
    data = random_llava.pictures(
      folder / 'data', 24, groups * case.group, case.scale
    )
    fields |= {'lmm.path': model, 'data.source': 'llava', 'data.path': data}
    fields |= {'capture.max_tokens': 4096, 'data.heldout': 0.01}
  return [f'--config.{name}={value}' for name, value in fields.items()]


def _start(
  name: str, case: Case, folder: pathlib.Path, overrides: list[str]
) -> Contender:
  config = str(ROOT / 'experiments' / 'tiny.py')
  if name == 'ours':
    words = ['-m', 'lmm_sae', 'capture', f'--config={config}']
    words += [f'--workdir={folder}', *overrides]
    done = folder / 'acts' / 'train'
    return Contender(name, [[sys.executable, *words]], done, case.threads)
  job = {
    'way': name,
    'config': config,
    'overrides': overrides,
    'folder': str(folder),
    'processes': case.processes,
    'distinct': case.distinct,
  }
  module = [sys.executable, '-m', 'benchmarks.capture_rival']
  commands = [
    [*module, json.dumps({**job, 'index': index})]
    for index in range(case.processes)
  ]
  return Contender(name, commands, folder, case.threads)


def _result(one: Contender, case: Case) -> dict:
  rates = [
    case.group * groups / seconds
    for groups, seconds in zip(one.groups, one.seconds, strict=True)
  ]
  samples = case.group * sum(one.groups)
  return {
    'samples_per_s': samples / sum(one.seconds),
    'quartiles': np.quantile(rates, (0.25, 0.75)).tolist(),
    'cpu_ms_a_sample': 1e3 * sum(one.cpu) / samples,
    'seconds': one.seconds,
    'groups': one.groups,
  }


def table(run: dict) -> str:
  """In words, a line a contender."""
  lines = [
    run['settings']['does'],
    f'  {"":<8}{"samples/s":>10}{"CPU ms a sample":>17}',
  ]
  for name, one in run['results'].items():
    lines.append(
      f'  {name:<8}{one["samples_per_s"]:>10.2f}{one["cpu_ms_a_sample"]:>17.1f}'
    )
  shares = (f'{run["share_of"][name]:.1%} of {name}' for name in RIVALS)
  lines.append(f'  ours is {" and ".join(shares)}')
  return '\n'.join(lines)


if __name__ == '__main__':
  main()
