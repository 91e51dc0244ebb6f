import functools
import os
import threading

import pytest

from lmm_sae.core import local_workers, workers
from tests.core import makers

TASKS = [('train', at) for at in range(5)] + [('b', 0)]
WANTED = {(split, at): 2 * at for split, at in TASKS}


def thread(make):
  return lambda _: local_workers.Thread(make)


def process(make):
  return lambda _: local_workers.Process(make)


def results(start, count=2, tasks=tuple(TASKS), attempts=2):
  done = list(workers.run(tasks, start, count, attempts))
  assert len(done) == len({task for task, _ in done})
  return dict(done)


def doubled(found):
  return {task: result[1] for task, result in found.items()}


@pytest.mark.parametrize('count', [1, 3])
def test_threads_do_every_task_once(count):
  assert doubled(results(thread(makers.double), count)) == WANTED


def test_processes_share_the_tasks():
  found = results(process(makers.double))
  assert doubled(found) == WANTED
  assert os.getpid() not in {result[2] for result in found.values()}
  assert len({result[2] for result in found.values()}) == 2


def test_a_worker_has_two_tasks_in_hand():
  barrier = threading.Barrier(2)  # nobody passes it alone
  found = results(thread(functools.partial(makers.overlaps, barrier)), 1)
  assert doubled(found) == WANTED


def test_no_tasks_start_no_worker():
  assert list(workers.run([], None, 3)) == []


def test_what_a_dead_process_did_is_done_again(tmp_path):
  # What dies beside another has failed, too: 4 may be unlucky twice.
  found = results(process(makers.dying(tmp_path, {1, 4})), attempts=3)
  assert doubled(found) == WANTED


def test_a_group_that_kills_every_process_is_named(tmp_path):
  with pytest.raises(
    ValueError, match=r'group 3 of train failed 2 times.*SIGKILL.*batch'
  ):
    results(process(makers.dying(tmp_path, {3}, times=9)))


def test_of_two_in_a_dead_process_the_guilty_one_is_named(tmp_path):
  """Group 1 and its neighbour are lost together, then each is done alone."""
  with pytest.raises(ValueError, match='group 1 of train failed 3 times'):
    results(process(makers.dying(tmp_path, {1}, times=9)), 1, attempts=3)


@pytest.mark.parametrize('start', [thread, process])
def test_what_a_task_refuses_stops_the_run_at_once(start):
  make = functools.partial(makers.fails, ValueError('no such model'), 2)
  with pytest.raises(ValueError, match=r'^no such model$'):
    results(start(make))


@pytest.mark.parametrize('start', [thread, process])
def test_what_may_pass_is_tried_again_and_then_told(start):
  make = functools.partial(makers.fails, RuntimeError('CUDA out of memory'), 0)
  with pytest.raises(
    ValueError,
    match=r'group 0 of (train|b) failed 2 times.*RuntimeError: CUDA out of',
  ):
    results(start(make))


def test_a_network_that_is_gone_stops_the_run_with_its_own_words():
  make = functools.partial(makers.fails, ConnectionError('hub: refused'), 3)
  with pytest.raises(ValueError, match='hub: refused'):
    results(process(make))


def test_an_error_of_ours_comes_with_its_traceback():
  make = functools.partial(makers.fails, TypeError('no index'), 3)
  with pytest.raises(RuntimeError, match=r'(?s)Traceback.*makers.py.*no index'):
    results(process(make))


def test_an_end_stops_what_is_under_way():
  begun = []
  ready = threading.Event()

  def ends(task, stopped):
    ready.wait(60)
    raise ValueError('enough')

  def start(at):
    waits = functools.partial(makers.waits, begun, ready, 4)
    return local_workers.Thread(waits if at else ends)

  with pytest.raises(ValueError, match='enough'):
    list(workers.run(TASKS, start, 3))
  assert ready.is_set()
  assert begun == []
