"""How far a loop has come: a bar on a terminal, log lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from absl import logging
from tqdm import tqdm

T = TypeVar('T')

EVERY_S = 10.0  # seconds between two log lines


def track(
  iterable: Iterable[T],
  total: int | None = None,
  what: str = '',
  note: Callable[[], str] = lambda: '',
) -> Iterator[T]:
  """The items of `iterable`, with rate and time left shown on the way.

  Args:
    iterable: what is looped over.
    total: how many items it has; its length where it has one.
    what: what the items are, for people: 'groups', 'latents'.
    note: what else to say of it.
  """
  if total is None and hasattr(iterable, '__len__'):
    total = len(iterable)
  if sys.stderr.isatty():
    with tqdm(iterable, total=total, desc=what, dynamic_ncols=True) as bar:
      for item in bar:
        yield item
        bar.set_postfix_str(note(), refresh=False)
    return
  begin = shown = time.monotonic()
  done = 0
  for done, item in enumerate(iterable, start=1):
    yield item
    now = time.monotonic()
    if now - shown >= EVERY_S:
      shown = now
      logging.info('%s', line(what, done, total, now - begin, note()))
  if done:
    gone = time.monotonic() - begin
    logging.info('%s', line(what, done, total, gone, note()))


def line(
  what: str, done: int, total: int | None, seconds: float, note: str = ''
) -> str:
  """One line of progress: count, share, rate, and time gone and left."""
  rate = done / max(seconds, 1e-9)
  count = f'{done}' if total is None else f'{done}/{total}'
  text = f'{what or "items"} {count}, {rate:.3g}/s, {clock(seconds)} gone'
  if total is not None and done < total:
    text += f', {clock((total - done) / rate)} left'
  return f'{text}, {note}' if note else text


def clock(seconds: float) -> str:
  """Seconds as 1:02:03 or 2:03."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}:{minutes:02}:{rest:02}'
  return f'{minutes}:{rest:02}'
