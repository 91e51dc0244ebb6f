"""Tasks shared out among workers that may die.

  for task, result in workers.run(tasks, start, count=2):
    ...

A worker takes `depth` tasks at once, so that it reads the next while it works
on this one. A task whose worker died, or that failed for a reason that may
pass, is done again, alone in its worker, so that it is known which task it was
that failed. What a task refuses (ValueError) ends the run.
"""

import collections
import concurrent.futures
import dataclasses
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from absl import logging

from lmm_sae.core import wording
from lmm_sae.core.jobs import Task

# make(task, stopped) -> result; stopped() says that nobody waits for it.
Make = Callable[[Task, Callable[[], bool]], Any]


class LostError(Exception):
  """The worker is gone, and with it what it was doing."""


class StoppedError(Exception):
  """Nobody waits for this task any more."""


class RefusedError(Exception):
  """Neither this task nor another can be done now; the text says why."""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a task ended, in words that can be sent.

  Attributes:
    result: of a task that was done.
    refused: why it cannot be done, here or anywhere.
    failed: why it was not done; another time it may.
    broken: the traceback of an error that nobody expected.
  """

  result: Any = None
  refused: str = ''
  failed: str = ''
  broken: str = ''


class Worker(Protocol):
  """Something that does tasks.

  Attributes:
    lasts: whether it is as good as new after a task that failed; a process is
      not, since an error of its CUDA device leaves nothing to go on with.
    depth: how many tasks it takes at once.
  """

  lasts: bool
  depth: int

  def ready(self) -> Future:
    """Done when it can take tasks."""

  def submit(self, task: Task) -> 'Future[Outcome]':
    """Does a task; the future fails with LostError where the worker dies."""

  def stop(self) -> None:
    """Ends it, and what it is doing; it may be dead already."""


def attempt(make: Make, task: Task, stopped: Callable[[], bool]) -> Outcome:
  """Does a task, in whatever worker."""
  try:
    return Outcome(result=make(task, stopped))
  except StoppedError:
    return Outcome(failed='stopped')
  except (
    ValueError,
    NotImplementedError,
    ImportError,
    ConnectionError,
    RefusedError,
  ) as error:
    logging.debug('%s', traceback.format_exc())
    return Outcome(refused=wording.of(error) or 'no reason was given')
  except (
    OSError,
    RuntimeError,
    MemoryError,
  ) as error:  # it may go another time
    logging.debug('%s', traceback.format_exc())
    return Outcome(failed=f'{type(error).__name__}: {wording.of(error)}')
  except Exception:  # noqa: BLE001 - raised again by `run`, in one process
    return Outcome(broken=traceback.format_exc())


def run(
  tasks: Sequence[Task],
  start: Callable[[int], Worker],
  count: int,
  attempts: int = 3,
) -> Iterator[tuple[Task, Any]]:
  """Does all tasks: (task, result) of each, in the order in which they end.

  Args:
    tasks: handed out in this order.
    start: starts worker 0 <= i < count, also in the place of a lost one.
    attempts: how often a task may fail.

  Raises:
    ValueError: a task refuses, or failed too often.
    RuntimeError: an error that nobody expected, with its traceback.
  """
  crew = _Crew(start, min(count, len(tasks)))
  todo, again = collections.deque(tasks), collections.deque()
  failures: collections.Counter = collections.Counter()
  try:
    while todo or again or crew.busy:
      crew.hand_out(todo, again)
      for worker, task, outcome in crew.wait():
        if outcome.refused:
          raise ValueError(outcome.refused)
        if outcome.broken:
          raise RuntimeError(f'{name(task)}:\n{outcome.broken}')
        if not outcome.failed:
          yield task, outcome.result
          continue
        failures[task] += 1
        logging.warning(
          'capture: %s failed (%d of %d times): %s',
          name(task),
          failures[task],
          attempts,
          outcome.failed,
        )
        if failures[task] >= attempts:
          raise ValueError(
            f'{name(task)} failed {attempts} times, the last time: '
            f'{outcome.failed}. If memory is short, lower capture.batch or '
            'capture.group, or run fewer processes; then run capture again, '
            'it does the rest'
          )
        again.append(task)
        todo.extendleft(crew.replace(worker))
  finally:
    crew.stop()


def name(task: Task) -> str:
  """What people call it."""
  split, group = task
  return f'group {group} of {split}'


class _Crew:
  """The workers, and what each of them is doing."""

  def __init__(self, start: Callable[[int], Worker], count: int):
    self._start = start
    self._workers: list[Worker] = []
    self._ready: dict[Future, Worker] = {}  # what is waited for
    self.busy: dict[Future, tuple[Worker, Task]] = {}
    self._alone: list[Worker] = []  # that do a task again
    try:
      for at in range(count):
        self._workers.append(start(at))
        self._ready[self._workers[at].ready()] = self._workers[at]
    except BaseException:
      self.stop()
      raise

  def hand_out(self, todo: collections.deque, again: collections.deque) -> None:
    """Gives every worker what it may have now."""
    deepest = max((worker.depth for worker in self._workers), default=0)
    for depth in range(deepest):  # all get one before any gets two
      for worker in self._workers:
        if worker in self._alone or worker in self._ready.values():
          continue
        if depth >= worker.depth:
          continue
        load = sum(worker is at for at, _ in self.busy.values())
        if load == depth and again:
          if not load:
            self._alone.append(worker)
            self._submit(worker, again.popleft())
        elif load == depth and todo:
          self._submit(worker, todo.popleft())

  def _submit(self, worker: Worker, task: Task) -> None:
    self.busy[worker.submit(task)] = worker, task

  def wait(self) -> Iterator[tuple[Worker, Task, Outcome]]:
    """Waits until something has ended, and says what."""
    done, _ = concurrent.futures.wait(
      [*self.busy, *self._ready],
      return_when=concurrent.futures.FIRST_COMPLETED,
    )
    for future in done:
      if future in self._ready:
        del self._ready[future]  # if it failed, so will its tasks
      elif future in self.busy:  # else its worker was replaced meanwhile
        worker, task = self.busy.pop(future)
        if worker in self._alone:
          self._alone.remove(worker)
        try:
          outcome = future.result()
        except LostError as error:
          outcome = Outcome(failed=str(error))
          # What died with it may have killed it: that has failed, too.
          for other in self._doing(worker):
            yield worker, other, outcome
        yield worker, task, outcome

  def _doing(self, worker: Worker) -> list[Task]:
    """What a worker was doing, which is forgotten."""
    futures = [f for f, (at, _) in self.busy.items() if at is worker]
    return [self.busy.pop(future)[1] for future in futures]

  def replace(self, worker: Worker) -> list[Task]:
    """A new worker for one whose task failed, and what the old one leaves."""
    if worker.lasts or worker not in self._workers:
      return []
    left = self._doing(worker)
    for future in [f for f, at in self._ready.items() if at is worker]:
      del self._ready[future]
    worker.stop()
    at = self._workers.index(worker)
    self._workers[at] = self._start(at)
    self._ready[self._workers[at].ready()] = self._workers[at]
    return left

  def stop(self) -> None:
    """Ends all of them."""
    for worker in self._workers:
      worker.stop()
