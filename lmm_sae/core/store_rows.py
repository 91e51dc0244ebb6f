"""How the rows of a layer are kept: bfloat16, or int8 with a scale a row.

An int8 row is rint(x / s) with s = max |x| / 127, so that no element is wrong
by more than s / 2. Reading gives bfloat16 whichever it was.
"""

import dataclasses
from collections.abc import Iterator

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = ('bfloat16', 'int8')
STEPS = 127
PIECE = 2**18  # elements that are worked on at a time


def to_int8(x_ND: np.ndarray, /) -> tuple[np.ndarray, np.ndarray]:
  """(int8 [N, D], float32 scale [N]); a row of zeros has the scale 0.

  Raises:
    ValueError: a row holds NaN or Inf.
  """
  codes_ND = np.empty(x_ND.shape, np.int8)
  scale_N = np.empty(len(x_ND), np.float32)
  for at in _pieces(x_ND):
    x = x_ND[at].astype(np.float32)
    top = np.maximum(x.max(1, initial=0), -x.min(1, initial=0))
    if not np.isfinite(top).all():
      row = at.start + int(np.flatnonzero(~np.isfinite(top))[0])
      raise ValueError(
        f'row {row} holds NaN or Inf, which int8 cannot keep: set '
        'capture.store=bfloat16, or lmm.dtype=float32'
      )
    scale_N[at] = top / np.float32(STEPS)
    x /= np.where(scale_N[at] > 0, scale_N[at], 1)[:, None]
    np.rint(x, out=x)
    codes_ND[at] = np.clip(x, -STEPS, STEPS, out=x)
  return codes_ND, scale_N


def from_int8(codes_ND: np.ndarray, scale_N: np.ndarray, /) -> np.ndarray:
  """The rows, bfloat16 [N, D]."""
  x_ND = np.empty(codes_ND.shape, BFLOAT16)
  for at in _pieces(codes_ND):
    x = np.multiply(codes_ND[at], scale_N[at, None], dtype=np.float32)
    x_ND[at] = x.astype(BFLOAT16)
  return x_ND


@dataclasses.dataclass(eq=False)
class Spread:
  """What keeping rows as int8 costs, and what is in them; they add up.

  Attributes:
    error: sum of |x - read(x)|^2 over the rows.
    square, sum_D: sums of |x|^2 and of x; count: rows.
  """

  error: float = 0.0
  square: float = 0.0
  sum_D: np.ndarray | float = 0.0
  count: int = 0

  @classmethod
  def of(
    cls,
    x_ND: np.ndarray,
    codes_ND: np.ndarray,
    scale_N: np.ndarray,
    kept_N: np.ndarray,
  ) -> 'Spread':
    """Of the rows that are kept."""
    total = cls()
    for at in _pieces(x_ND):
      keep = kept_N[at]
      x = x_ND[at].astype(np.float32)[keep]
      off = x - from_int8(codes_ND[at], scale_N[at]).astype(np.float32)[keep]
      part = cls(
        float(np.square(off).sum(dtype=np.float64)),
        float(np.square(x).sum(dtype=np.float64)),
        x.sum(0, dtype=np.float64),
        int(keep.sum()),
      )
      total.add(part)
    return total

  def add(self, other: 'Spread') -> None:
    self.error += other.error
    self.square += other.square
    self.sum_D = self.sum_D + other.sum_D
    self.count += other.count

  def sums(self) -> dict[str, float]:
    """{error, variance}: the sum of |x - mean|^2, the mean being the rows'."""
    if not self.count:
      return {'error': 0.0, 'variance': 0.0}
    about = float(np.sum(np.square(self.sum_D))) / self.count
    return {'error': self.error, 'variance': max(self.square - about, 0.0)}


def _pieces(x_ND: np.ndarray, /) -> Iterator[slice]:
  step = max(PIECE // max(x_ND.shape[1], 1), 1)
  for start in range(0, len(x_ND), step):
    yield slice(start, min(start + step, len(x_ND)))
