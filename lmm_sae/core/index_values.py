"""Positive activations in 16 bits, and their quantiles in bounded memory.

Both take what they keep from the bits of a positive float32, whose order is
that of the numbers: 8 bits of exponent, then of the fraction as many as wanted.
"""

from collections.abc import Sequence

import numpy as np

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)  # of the quantiles kept
BINS = 1 << 12  # 16 an octave: the middle of one is within 1/32 of its values
ERROR = 1 / 32  # relative, of a quantile
ROUNDING = 2.0**-9  # relative, of a packed value


def pack(values_N: np.ndarray, /) -> np.ndarray:
  """Positive float32 as uint16: the fraction is rounded to 8 bits."""
  bits_N = np.asarray(values_N, np.float32).view(np.uint32)
  even_N = (bits_N >> 15) & 1
  top = np.uint32(0xFEFF)  # the largest that is finite
  return np.minimum((bits_N + 0x3FFF + even_N) >> 15, top).astype(np.uint16)


def unpack(packed_N: np.ndarray, /) -> np.ndarray:
  """The float32 that `pack` rounded to."""
  return (np.asarray(packed_N).astype(np.uint32) << 15).view(np.float32)


def bins(values_N: np.ndarray, /) -> np.ndarray:
  """The bin of each positive float32, int64; a larger value, no lower bin."""
  bits_N = np.asarray(values_N, np.float32).view(np.uint32)
  return (bits_N >> 19).astype(np.int64)


class Histograms:
  """How many values of each latent fall in each bin; only bins that have any.

  Attributes:
    key: latent * BINS + bin, rising; count: of its values.
  """

  WAIT = 1 << 16  # keys that may wait however few there are

  def __init__(self):
    self.key = self.count = np.zeros(0, np.int64)
    self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

  @property
  def nbytes(self) -> int:
    keys = len(self.key) + sum(len(key) for key, _ in self._waiting)
    return 16 * keys

  def add(self, latent_N: np.ndarray, values_N: np.ndarray) -> None:
    key_N = latent_N.astype(np.int64) * BINS + bins(values_N)
    self.put(*np.unique(key_N, return_counts=True))

  def put(self, key: np.ndarray, count: np.ndarray) -> None:
    """Adds counts, of a histogram that was made elsewhere."""
    self._waiting.append((key, count))
    if sum(len(key) for key, _ in self._waiting) > max(
      self.WAIT, len(self.key)
    ):
      self.settle()

  def settle(self) -> 'Histograms':
    """Adds up what waits; `key` and `count` are complete then."""
    if self._waiting:
      both = [(self.key, self.count), *self._waiting]
      keys = np.concatenate([key for key, _ in both])
      counts = np.concatenate([count for _, count in both])
      self._waiting = []
      order = np.argsort(keys, kind='stable')
      keys = keys[order]
      start = np.flatnonzero(np.diff(keys, prepend=-1))
      self.key = keys[start]
      self.count = (
        np.add.reduceat(counts[order], start) if len(start) else self.count
      )
    return self

  def quantiles(
    self, first: int, latents: int, levels: Sequence[float] = LEVELS
  ) -> np.ndarray:
    """Quantiles of latents `first`, first + 1, ..., float32 [latents, Q].

    The middle of the bin that holds the ceil(level * n)-th smallest value;
    0 where a latent has none.
    """
    self.settle()
    latent = self.key // BINS - first
    total = np.cumsum(self.count)
    n = np.bincount(latent, weights=self.count, minlength=latents)
    before = np.concatenate([[0], np.cumsum(n)])[:-1].astype(np.int64)
    n = n.astype(np.int64)
    found = np.zeros((latents, len(levels)), np.float32)
    for q, level in enumerate(levels):
      rank = np.maximum(np.ceil(level * n), 1).astype(np.int64)
      some = n > 0
      at = np.searchsorted(total, (before + rank)[some])
      bits = (self.key[at] % BINS).astype(np.uint32) << 19 | np.uint32(1 << 18)
      found[some, q] = bits.view(np.float32)
    return found


def draws(seed: int, latent_N: np.ndarray, key_N: np.ndarray) -> np.ndarray:
  """A number in (0, 1) a row that only the seed, latent and key decide."""
  x = np.full(len(latent_N), np.uint64(seed % (1 << 64)))
  for part in (latent_N, key_N):
    x = _mix(x ^ part.astype(np.int64).view(np.uint64))
  return ((x >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
  """splitmix64 (Steele, Lea and Flood, 2014)."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
