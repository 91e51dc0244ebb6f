import threading

import pytest

from lmm_sae.core.prefetch import prefetch


def test_items_come_in_order():
  assert list(prefetch(iter(range(50)), 3)) == list(range(50))
  assert list(prefetch([], 3)) == []


def test_what_the_items_raise_comes_in_its_place():
  def items():
    yield 1
    raise KeyError('gone')

  found = prefetch(items(), 2)
  assert next(found) == 1
  with pytest.raises(KeyError, match='gone'):
    next(found)


def test_no_more_than_depth_are_made_ahead():
  made = []
  full = threading.Event()

  def items():
    for at in range(9):
      made.append(at)
      if at == 4:  # 1 taken, 2 in the queue, 1 waiting to get in: 3 is the last
        full.set()
      yield at

  found = prefetch(items(), 2)
  assert next(found) == 0
  assert not full.wait(0.3)
  assert made == [0, 1, 2, 3]
  found.close()


def test_closing_ends_the_thread():
  found = prefetch(iter(range(10**9)), 2)
  next(found)
  found.close()
  assert 'prefetch' not in {thread.name for thread in threading.enumerate()}
