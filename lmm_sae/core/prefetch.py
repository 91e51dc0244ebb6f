"""The next items of a slow iterator, made ready while this one is used."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar('T')

_POLL_S = 0.1  # how soon the thread notices that nobody listens any more


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
  """The same items in the same order, at most `depth` of them made ahead.

  They are made in one thread. What it raises is raised here, in its place; it
  ends when the iterator is closed.
  """
  ready: queue.Queue = queue.Queue(maxsize=depth)
  closed = threading.Event()

  def put(entry) -> bool:
    while not closed.is_set():
      try:
        ready.put(entry, timeout=_POLL_S)
        return True
      except queue.Full:
        continue
    return False

  def fill() -> None:
    try:
      for item in items:
        if not put((item, None)):
          return
      put((None, StopIteration()))
    except BaseException as error:  # noqa: BLE001 - raised again by the reader
      put((None, error))

  thread = threading.Thread(target=fill, name='prefetch', daemon=True)
  thread.start()
  try:
    while True:
      item, error = ready.get()
      if isinstance(error, StopIteration):
        return
      if error is not None:
        raise error
      yield item
  finally:
    closed.set()
    thread.join()
