"""Which of several servers is asked next, and how long it is waited for."""

import collections
import threading
import time

LONGEST_PAUSE_S = 30.0  # between two attempts, of our own accord
GONE_S = 10.0  # for which a server that does not listen, or hangs, is last


class Turns:
  """Of `count` servers; may be shared by threads.

  `backoff_s`: the pause before one is asked the same again; doubled each time.
  """

  def __init__(self, count: int, backoff_s: float):
    self._backoff_s = backoff_s
    self._lock = threading.Lock()
    self._rest_until = [0.0] * count
    self._last_until = [0.0] * count

  def choose(
    self, turn: int, tries: collections.Counter[int]
  ) -> tuple[int, float]:
    """(place, pause in s) of the next attempt of a request.

    The one that is waited for least, that was tried least; then they take
    turns. One that said nothing of late counts as a wait of GONE_S.
    """
    now = time.monotonic()
    with self._lock:
      ranked = []
      count = len(self._rest_until)
      for i in range(count):
        pause_s = 0.0
        if tries[i]:
          pause_s = self._backoff_s * 2 ** min(tries[i] - 1, 30)
          # not all at once: threads that failed together come apart
          pause_s = min(pause_s, LONGEST_PAUSE_S) * (1 + (turn % 64) / 128)
        pause_s = max(pause_s, self._rest_until[i] - now)
        cost_s = pause_s + GONE_S * (now < self._last_until[i])
        ranked.append((cost_s, tries[i], (i - turn) % count, i, pause_s))
    *_, place, pause_s = min(ranked)
    return place, pause_s

  def rest_s(self, place: int) -> float:
    """Seconds for which a server asked to be left alone, from now."""
    return max(0.0, self._rest_until[place] - time.monotonic())

  def failed(self, place: int, rest_s: float, hangs: bool) -> None:
    """Takes a server's wish for rest, or that it said nothing."""
    now = time.monotonic()
    with self._lock:
      self._rest_until[place] = max(self._rest_until[place], now + rest_s)
      if hangs:
        self._last_until[place] = now + GONE_S
