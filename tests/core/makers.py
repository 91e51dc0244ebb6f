"""What workers are given to do in tests: importable, so that it can be sent."""

import functools
import os
import pathlib
import signal
import threading


def double(task, stopped):
  del stopped
  return task[0], 2 * task[1], os.getpid()


def once(folder: pathlib.Path, name: str) -> bool:
  """Whether nobody has asked this before, in any process."""
  try:
    (folder / name).touch(exist_ok=False)
  except FileExistsError:
    return False
  return True


def dies(folder, groups, times, task, stopped):
  """Is killed at the first so many tries of some groups."""
  split, group = task
  tries = range(times) if group in groups else ()
  if any(once(folder, f'{split}-{group}-{at}') for at in tries):
    os.kill(os.getpid(), signal.SIGKILL)
  return double(task, stopped)


def dying(folder, groups, times=1):
  return functools.partial(dies, folder, groups, times)


def fails(error, bad, task, stopped):
  """Raises an error at one group."""
  if task[1] == bad:
    raise error
  return double(task, stopped)


def overlaps(barrier, task, stopped):
  """Returns only where two tasks are done at once."""
  barrier.wait(60)
  return double(task, stopped)


def waits(begun, ready, count, task, stopped):
  """Works until it is stopped; `ready` says that so many do."""
  begun.append(task)
  if len(begun) == count:
    ready.set()
  while not stopped():
    threading.Event().wait(0.001)
  begun.remove(task)
