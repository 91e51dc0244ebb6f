"""Means, shares and correlations with 95% intervals, as the summary has them.

A figure is a dict {value, n, ci}: ci is [low, high], or None where an interval
would say nothing; a figure that cannot be had is {value: None, reason}.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Z95 = 1.959964  # two-sided 95% point of the normal distribution


def mean_ci(
  values: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = 1000
) -> tuple[float, float, float]:
  """The mean, and the 95% percentile bootstrap of it, as (mean, low, high).

  Raises:
    ValueError: no values.
  """
  values_N = np.asarray(values, np.float64)
  if values_N.size == 0:
    raise ValueError('mean_ci: no values; a mean needs at least one')
  rng = np.random.default_rng(seed)
  n = values_N.size
  step = max(1, 2**20 // n)  # resamples at a time: memory stays small
  means = np.concatenate(
    [
      values_N[rng.integers(0, n, (min(step, resamples - done), n))].mean(1)
      for done in range(0, resamples, step)
    ]
  )
  low, high = np.percentile(means, (2.5, 97.5))
  return float(values_N.mean()), float(low), float(high)


def proportion(hits: int, n: int) -> tuple[float, float, float]:
  """A share and its 95% Wilson interval, as (share, low, high).

  Raises:
    ValueError: n is not positive, or hits is not within 0..n.
  """
  if n <= 0 or not 0 <= hits <= n:
    raise ValueError(f'proportion: {hits} hits of {n} is no share')
  share = hits / n
  shrink = 1 + Z95**2 / n
  centre = (share + Z95**2 / (2 * n)) / shrink
  spread = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
  low, high = centre - spread / shrink, centre + spread / shrink
  return share, max(0.0, low), min(1.0, high)


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
  """Pearson's r; None where fewer than 3 pairs, or a side is constant."""
  x_N, y_N = np.asarray(x, np.float64), np.asarray(y, np.float64)
  if x_N.size < 3 or np.ptp(x_N) == 0 or np.ptp(y_N) == 0:
    return None
  return float(np.corrcoef(x_N, y_N)[0, 1])


def correlation_figure(
  groups: Sequence[Sequence[tuple[float, float]]],
  reason: str,
  seed: int = 0,
  resamples: int = 1000,
) -> dict[str, Any]:
  """Pearson's r of the pairs of all groups pooled; whole groups resampled.

  `mean` is the mean of the groups' own correlations, `n` counts pairs,
  `groups` the groups.
  """
  groups = [np.asarray(group, np.float64) for group in groups if len(group)]
  pairs_N2 = np.concatenate(groups) if groups else np.zeros((0, 2))
  value = correlation(*pairs_N2.T)
  if value is None:
    return missing(reason, mean=None, groups=len(groups))
  rng = np.random.default_rng(seed)
  draws = [
    correlation(*np.concatenate([groups[i] for i in picks]).T)
    for picks in rng.integers(0, len(groups), (resamples, len(groups)))
  ]
  low, high = np.percentile([r for r in draws if r is not None], (2.5, 97.5))
  own = [
    r for r in (correlation(*group.T) for group in groups) if r is not None
  ]
  return {
    'value': value,
    'n': len(pairs_N2),
    'ci': [float(low), float(high)],
    'mean': float(np.mean(own)) if own else None,
    'groups': len(groups),
  }


def pooled_figure(
  sums_SC: np.ndarray,
  figure: Callable[[np.ndarray], np.ndarray],
  reason: str,
  seed: int = 0,
  resamples: int = 1000,
) -> dict[str, Any]:
  """A figure of sums over samples, whole samples resampled; `n` counts them.

  Args:
    sums_SC: C sums of each sample.
    figure: of sums [R, C] the figure [R]; NaN where it is not defined.
    reason: why there is none, where it is not defined.
  """
  with np.errstate(divide='ignore', invalid='ignore'):
    value = figure(sums_SC.sum(0)[None])[0] if len(sums_SC) else np.nan
    if not np.isfinite(value):
      return missing(reason)
    rng = np.random.default_rng(seed)
    n = len(sums_SC)
    counts_RS = rng.multinomial(n, np.full(n, 1 / n), resamples)
    drawn_R = figure(counts_RS @ sums_SC)
  drawn_R = drawn_R[np.isfinite(drawn_R)]
  low, high = (
    np.percentile(drawn_R, (2.5, 97.5)) if len(drawn_R) else (value,) * 2
  )
  return {'value': float(value), 'n': n, 'ci': [float(low), float(high)]}


def mean_figure(
  values: Sequence[float] | np.ndarray, reason: str, **more: Any
) -> dict[str, Any]:
  """The figure of a mean; without values, the reason there is none."""
  if len(values) == 0:
    return missing(reason, **more)
  value, low, high = mean_ci(values)
  return {'value': value, 'n': len(values), 'ci': [low, high], **more}


def share_figure(
  hits: Sequence[bool] | np.ndarray, reason: str, **more: Any
) -> dict[str, Any]:
  """The figure of a share; without cases, the reason there is none."""
  if len(hits) == 0:
    return missing(reason, **more)
  value, low, high = proportion(int(np.sum(hits)), len(hits))
  return {'value': value, 'n': len(hits), 'ci': [low, high], **more}


def missing(reason: str, **more: Any) -> dict[str, Any]:
  """The figure that this run cannot give, with the reason."""
  return {'value': None, 'n': 0, 'ci': None, 'reason': reason, **more}
