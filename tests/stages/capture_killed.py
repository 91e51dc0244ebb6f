"""Captures that are killed, each at another moment, in processes of their own.

python -m tests.stages.capture_killed CONFIG FOLDER

Makes FOLDER/MOMENT for each of MOMENTS; FOLDER/shared, where two of three
shares were made at once; and FOLDER/twice, where two commands did the same.
Torch is imported once, and the processes are forked from this one before
anything has started a thread.
"""

import functools
import json
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable

from ml_collections import ConfigDict

from lmm_sae.core import places
from lmm_sae.core.workdir import Workdir
from lmm_sae.lmm import groups, llava
from lmm_sae.stages import capture

# {moment: (class, method, words in its argument, at which call, after it?)}
MOMENTS = {
  'beginning': (places.Place, 'write', 'a/meta.json', 1, False),
  'reading': (groups.Capturer, '_ready', '', 9, False),
  'forward': (llava.Subject, 'rows', '', 3, False),
  'shards': (places.Place, 'write', 'train/layer_2/c/', 2, True),
  'before-commit': (places.Place, 'write', 'train/groups/', 2, False),
  'after-commit': (places.Place, 'write', 'a/groups/', 1, True),
  'sealing': (places.Place, 'write', 'train/manifest.jsonl', 1, False),
  'sealed': (places.Place, 'write', 'train/manifest.jsonl', 1, True),
  'cleaning': (places.Place, 'delete_below', 'a/groups', 1, False),
}


def kill() -> None:
  """Ends this process on the spot."""
  os.kill(os.getpid(), signal.SIGKILL)


def ray_kill() -> None:
  """Ends the Ray actor that this process is."""
  import ray

  ray.kill(ray.get_runtime_context().current_actor)
  threading.Event().wait()


def die_at(
  owner: type,
  method: str,
  words: str,
  left: int,
  after: bool,
  kill: Callable[[], None] = kill,
):
  """Has this process killed at that call."""
  call, lock = getattr(owner, method), threading.Lock()

  @functools.wraps(call)
  def counted(self, *args, **kwargs):
    nonlocal left
    with lock:
      left -= not words or words in str(self)
      dies = left == 0
    if dies and not after:
      kill()
    result = call(self, *args, **kwargs)
    if dies:
      kill()
    return result

  setattr(owner, method, counted)


def die_in_turn(folder: str, moments, job, task, stopped) -> int:
  """`capture.make_group`; of the processes that call it, the first is killed
  at the first of the moments, the second at the second, and so on.

  Args:
    folder: where each leaves a file.
    moments: (name, how) of each, how being `kill` or `ray_kill`.
  """
  if not _TURNS:
    for number, (moment, how) in enumerate(moments):
      try:
        (pathlib.Path(folder) / f'{number}').touch(exist_ok=False)
      except FileExistsError:
        continue
      die_at(*MOMENTS[moment], how)
      break
    _TURNS.append(folder)
  return capture.make_group(job, task, stopped)


_TURNS: list[str] = []  # of this process: not empty once it had its turn


def fork(work: Callable[[], None]) -> int:
  """A process that does it; its number."""
  child = os.fork()
  if not child:
    code = 1
    try:
      work()
      code = 0
    finally:
      os._exit(code)
  return child


def ending(child: int) -> int:
  return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(config: str, workdir: pathlib.Path, moment: str = '', share: str = ''):
  """One command."""
  if moment:
    die_at(*MOMENTS[moment])
  settings = ConfigDict(json.loads(config))
  settings.capture.share = share
  capture.run(settings, Workdir.of(workdir))


def main(config: str, folder: str) -> str:
  """What did not end as it should."""
  make = functools.partial(functools.partial, run, config)
  root = pathlib.Path(folder)
  wrong = []
  for moment in MOMENTS:
    code = ending(fork(make(root / moment, moment)))
    if code != -signal.SIGKILL:
      wrong.append(f'{moment} was not killed: {code}')
  for name, shares in (('shared', ('0/3', '1/3')), ('twice', ('', ''))):
    children = [fork(make(root / name, share=share)) for share in shares]
    codes = [ending(child) for child in children]
    if any(codes):
      wrong.append(f'{name}: {codes}')
  return '\n'.join(wrong)


if __name__ == '__main__':
  sys.exit(main(*sys.argv[1:]) or 0)
