"""Workers of this machine: threads of this process, or a process each."""

import contextlib
import multiprocessing
import os
import signal
import threading
from concurrent.futures import Future
from multiprocessing import connection

from lmm_sae.core.jobs import DEPTH, Task
from lmm_sae.core.workers import LostError, Make, Outcome, attempt, name

GRACE_S = 60.0  # within which a thread must see that it is stopped


class Thread:
  """Does tasks in threads of this process."""

  lasts = True

  def __init__(self, make: Make, depth: int = DEPTH):
    self.depth = depth
    self._make = make
    self._stopped = threading.Event()
    self._threads: list[threading.Thread] = []

  def ready(self) -> Future:
    future: Future = Future()
    future.set_result(None)
    return future

  def submit(self, task: Task) -> 'Future[Outcome]':
    future: Future = Future()

    def work() -> None:
      future.set_result(attempt(self._make, task, self._stopped.is_set))

    # A daemon: Ctrl-C must not wait for a forward of a large model.
    thread = threading.Thread(target=work, name=name(task), daemon=True)
    self._threads = [each for each in self._threads if each.is_alive()]
    self._threads.append(thread)
    thread.start()
    return future

  def stop(self) -> None:
    self._stopped.set()
    for thread in self._threads:
      thread.join(GRACE_S)


class Process:
  """Does tasks in a process of its own, which ends with this one."""

  lasts = False

  def __init__(self, make: Make, depth: int = DEPTH):
    self.depth = depth
    context = multiprocessing.get_context('spawn')
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(
      target=_serve, args=(theirs, make), daemon=True
    )
    self._process.start()
    theirs.close()
    self._lock = threading.Lock()
    self._futures: dict[Task, Future] = {}
    self._lost = ''
    threading.Thread(target=self._listen, daemon=True).start()

  def ready(self) -> Future:
    future: Future = Future()
    future.set_result(None)  # what is sent waits in the pipe
    return future

  def submit(self, task: Task) -> 'Future[Outcome]':
    future: Future = Future()
    with self._lock:
      self._futures[task] = future
    with contextlib.suppress(OSError):  # it is dead: `_listen` will see it
      self._pipe.send(task)
    if self._lost:
      self._fail()
    return future

  def _listen(self) -> None:
    while True:
      try:
        task, outcome = self._pipe.recv()
      except (EOFError, OSError):
        break
      with self._lock:
        future = self._futures.pop(task)
      future.set_result(outcome)
    self._process.join()
    self._lost = f'its process died ({_ending(self._process.exitcode)})'
    self._fail()

  def _fail(self) -> None:
    with self._lock:
      left, self._futures = self._futures, {}
    for future in left.values():
      future.set_exception(LostError(self._lost))

  def stop(self) -> None:
    # A kill at any moment is harmless: what is not committed is not there.
    self._process.kill()
    self._process.join()


def _ending(code: int | None) -> str:
  if code is None or code >= 0:
    return f'exit code {code}'
  name = signal.Signals(-code).name
  hint = ': if not by hand, memory ran out' if -code == signal.SIGKILL else ''
  return f'{name}{hint}'


def _serve(pipe: connection.Connection, make: Make) -> None:
  """What a process does: a thread for each task, until nobody asks."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when
  sending = threading.Lock()

  def work(task: Task) -> None:
    outcome = attempt(make, task, lambda: False)
    with sending, contextlib.suppress(OSError):
      pipe.send((task, outcome))

  while True:
    try:
      task = pipe.recv()
    except (EOFError, OSError):  # the parent is gone, however it ended
      os._exit(1)
    threading.Thread(target=work, args=(task,), daemon=True).start()
