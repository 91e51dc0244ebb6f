"""Which tokens are stored, and in which order: drawn by hashing, not in turn.

  choice = Choice.parse(('all', 'bos', 'text:0.5'), 'capture.keep')
  at_N = choice.keep(seed, 'train', sample, kind_T)

What is drawn for a token follows from its seed, split, sample and position
alone, so it does not matter in which batch, group or process it is drawn, nor
which numpy draws it.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from lmm_sae.core import tokens
from lmm_sae.core.sources import SPLITS
from lmm_sae.core.tokens import Kind

KEEP, MIX = 1, 2  # what is drawn for a token; the two know nothing of another


@dataclasses.dataclass(frozen=True)
class Choice:
  """The share of the tokens of each kind that is stored.

  Attributes:
    shares: by `Kind`, 0 (none) to 1 (all); PADDING is always 0.
  """

  shares: tuple[float, ...]

  @classmethod
  def parse(cls, entries: Sequence[str], field: str) -> 'Choice':
    """What entries such as `image` and `answer:0.5` mean together.

    The more special entry wins, wherever it stands: a kind over `text` and
    `image`, these over `all`. Of a share, each token is stored or not with that
    probability, by itself; a smaller share stores a part of a larger one.

    Args:
      entries: `kind` or `kind:share`, 0 < share <= 1; kind as in
        `tokens.kinds`.
      field: what to call them.

    Raises:
      ValueError: an entry is none, names what another names, or there is none.
    """
    if isinstance(entries, str):
      entries = (entries,)
    if not entries:
      raise ValueError(
        f'{field} is empty: nothing would be stored; name token kinds, such as '
        "('all', 'bos')"
      )
    found = {}
    for entry in entries:
      name, share = _entry(entry, field)
      if name in found:
        raise ValueError(f'{field} names {name!r} twice: {tuple(entries)}')
      found[name] = share
    shares = [0.0] * len(Kind)
    # The fewer kinds a name means, the more special it is.
    for name in sorted(found, key=lambda name: -len(tokens.kinds(name))):
      for kind in tokens.kinds(name):
        shares[kind] = found[name]
    return cls(tuple(shares))

  def keep(
    self, seed: int, split: str, sample: int, kind_T: np.ndarray, /
  ) -> np.ndarray:
    """The positions of a sample's tokens that are stored: int64, ascending."""
    share_T = np.array(self.shares)[kind_T]
    if not ((share_T > 0) & (share_T < 1)).any():
      return np.flatnonzero(share_T)
    position_T = np.arange(len(kind_T))
    sample_T = np.full(len(kind_T), sample)
    return np.flatnonzero(
      unit(draws(KEEP, seed, split, sample_T, position_T)) < share_T
    )


def mixed(
  seed: int, split: str, sample_N: np.ndarray, position_N: np.ndarray, /
) -> np.ndarray:
  """The order in which the rows of a group are stored: int64 [N].

  Stored row i is the row `mixed[i]` of those given. Which of two rows comes
  first depends on nothing but the two.
  """
  draws_N = draws(MIX, seed, split, sample_N, position_N)
  return np.lexsort((position_N, sample_N, draws_N))


def draws(
  what: int,
  seed: int,
  split: str,
  sample_N: np.ndarray,
  position_N: np.ndarray,
  /,
) -> np.ndarray:
  """A number drawn for each token: uint64 [N], evenly over all 64 bits."""
  key = np.zeros(len(sample_N), np.uint64)
  for part in (what, SPLITS.index(split), seed % 2**64, sample_N, position_N):
    # An odd constant, so that a part of 0 does not leave the key as it is.
    part_N = np.atleast_1d(part).astype(np.uint64)
    key = _scramble(key ^ (part_N + np.uint64(0x9E3779B97F4A7C15)))
  return key


def unit(draws_N: np.ndarray, /) -> np.ndarray:
  """The numbers in [0, 1) that draws stand for: float64 [N]."""
  return (draws_N >> np.uint64(11)) * 2.0**-53


def _scramble(x_N: np.ndarray, /) -> np.ndarray:
  """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014); wraps around."""
  x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x_N ^ (x_N >> np.uint64(31))


def _entry(entry: str, field: str) -> tuple[str, float]:
  """(kind or group, share) of one entry."""
  if not isinstance(entry, str):
    raise ValueError(f'{field}: {entry!r} is no token kind')
  name, colon, text = entry.partition(':')
  try:
    kinds = tokens.kinds(name)
  except ValueError as error:
    raise ValueError(f'{field}: {error}') from error
  if Kind.PADDING in kinds:
    raise ValueError(f'{field}: padding is never stored')
  if not colon:
    return name, 1.0
  try:
    share = float(text)
  except ValueError:
    share = math.nan
  if not 0 < share <= 1:
    raise ValueError(
      f'{field}: {entry!r} has the share {text!r}; it must be above 0 and at '
      'most 1 (a kind that is not named is not stored)'
    )
  return name, share
