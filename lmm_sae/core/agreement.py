"""How far raters agree, beyond what chance gives.

Ratings are a matrix [units, raters] of values, NaN where a rater did not rate.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lmm_sae.core import stats

TOO_FEW = 'fewer than two raters rated the same cases'


def cohen_kappa(a: Sequence[float], b: Sequence[float], /) -> float | None:
  """(p_o - p_e) / (1 - p_e) of two raters of the same units (Cohen, 1960).

  None where nothing was rated by both, or both gave one and the same value
  throughout: chance alone then agrees as much.
  """
  a_U, b_U = np.asarray(a, np.float64), np.asarray(b, np.float64)
  both_U = ~np.isnan(a_U) & ~np.isnan(b_U)
  a_U, b_U = a_U[both_U], b_U[both_U]
  if not a_U.size:
    return None
  observed = np.mean(a_U == b_U)
  expected = sum(
    np.mean(a_U == value) * np.mean(b_U == value) for value in np.unique(a_U)
  )
  if expected == 1:
    return None
  return float((observed - expected) / (1 - expected))


def krippendorff_alpha(
  ratings_UR: np.ndarray, /, *, ordinal: bool = True
) -> float | None:
  """1 - D_o / D_e for any number of raters and gaps (Krippendorff, 2011).

  Formulas of "Computing Krippendorff's Alpha-Reliability", sections D and E:
  a unit of m values counts each of its ordered pairs with 1 / (m - 1).

  Args:
    ratings_UR: [units, raters], NaN: not rated.
    ordinal: whether values far apart count as more of a disagreement; else
      they are names.

  Returns:
    None where no unit was rated twice, or all values are the same.
  """
  ratings_UR = np.asarray(ratings_UR, np.float64)
  values_V = np.unique(ratings_UR[~np.isnan(ratings_UR)])
  counts_UV = (ratings_UR[:, :, None] == values_V).sum(1).astype(np.float64)
  counts_UV = counts_UV[counts_UV.sum(1) >= 2]
  if not len(counts_UV):
    return None
  each_U = counts_UV.sum(1) - 1
  pairs_VV = (counts_UV / each_U[:, None]).T @ counts_UV
  pairs_VV -= np.diag((counts_UV / each_U[:, None]).sum(0))
  total_V = pairs_VV.sum(1)
  apart_VV = _apart(total_V, ordinal)
  expected = (np.outer(total_V, total_V) * apart_VV).sum()
  if expected == 0:
    return None
  observed = (pairs_VV * apart_VV).sum()
  return float(1 - (total_V.sum() - 1) * observed / expected)


def _apart(total_V: np.ndarray, ordinal: bool) -> np.ndarray:
  """How much two values disagree, by how often each occurs: [V, V]."""
  size = len(total_V)
  if not ordinal:
    return 1.0 - np.eye(size)
  below_V = np.cumsum(total_V) - total_V / 2  # middle of each value's ranks
  return np.square(below_V[:, None] - below_V)


def figure(
  statistic: Callable[[np.ndarray], float | None],
  ratings_UR: np.ndarray,
  seed: int = 0,
  resamples: int = 1000,
) -> dict[str, Any]:
  """The figure of a statistic of ratings, whole units resampled."""
  ratings_UR = ratings_UR[(~np.isnan(ratings_UR)).sum(1) >= 2]
  value = statistic(ratings_UR) if len(ratings_UR) else None
  if value is None:
    return stats.missing(TOO_FEW if not len(ratings_UR) else 'all are the same')
  rng = np.random.default_rng(seed)
  n = len(ratings_UR)
  drawn = [
    statistic(ratings_UR[picks]) for picks in rng.integers(0, n, (resamples, n))
  ]
  found = [one for one in drawn if one is not None] or [value]
  low, high = np.percentile(found, (2.5, 97.5))
  return {'value': value, 'n': n, 'ci': [float(low), float(high)]}
