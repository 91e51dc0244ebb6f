"""How good an SAE is: numbers of a run, and figures by token kind.

Rows may lie far from 0 (a first token is often a thousand times as long as
the others), so nothing here is a difference of large sums: what varies is
summed about a mean, in float64, and means are merged.
"""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from lmm_sae.core import records, tokens
from lmm_sae.core.tokens import Kind
from lmm_sae.sae.model import SparseCode

GROUPS = ('all', 'image', 'text')  # beside the kinds themselves
NAMES = (*(kind.name.lower() for kind in Kind), *GROUPS)
# Of the histogram of log10 firing rates: four bins a decade, from 1e-8 to 1.
RATE_EDGES = np.linspace(-8, 0, 33)


@dataclasses.dataclass(frozen=True)
class Moments:
  """Count, mean and Σ‖x - mean‖² of rows, all in float64."""

  rows: int
  mean_D: np.ndarray
  spread: float

  @classmethod
  def of(cls, x_ND: np.ndarray, /) -> 'Moments':
    """Of some rows; the mean is taken about the first of them."""
    if not len(x_ND):
      return cls(0, np.zeros(x_ND.shape[1]), 0.0)
    x_ND = x_ND.astype(np.float64)
    mean_D = x_ND[0] + (x_ND - x_ND[0]).mean(0)
    return cls(len(x_ND), mean_D, float(np.square(x_ND - mean_D).sum()))

  def __add__(self, other: 'Moments') -> 'Moments':
    """Of the rows of both (Chan, Golub and LeVeque 1983)."""
    rows = self.rows + other.rows
    if not rows:
      return self
    apart_D = other.mean_D - self.mean_D
    share = other.rows / rows
    between = np.square(apart_D).sum() * self.rows * share
    return Moments(
      rows,
      self.mean_D + share * apart_D,
      float(self.spread + other.spread + between),
    )


class Rows:
  """Mean and spread of rows by token kind: the first of two passes."""

  def __init__(self, width: int):
    self._kinds = {kind: Moments.of(np.zeros((0, width))) for kind in Kind}

  def add(self, x_ND: np.ndarray, kind_N: np.ndarray, /) -> None:
    """Counts rows in."""
    for kind in Kind:
      self._kinds[kind] += Moments.of(x_ND[kind_N == kind])

  def of(self, *names: str) -> Moments:
    """Of the rows of these kinds, or of `all`, `image`, `text`."""
    first, *rest = {kind for name in names for kind in tokens.kinds(name)}
    return sum((self._kinds[kind] for kind in rest), self._kinds[first])


class Quality:
  """Sums over rows and reconstructions by token kind; `table` has figures.

  Args:
    latents: M.
    rows: has seen every row that `add` will get.
  """

  _SUMS = ('error', 'dot', 'norm', 'cosine', 'directed', 'ratio', 'long', 'l0')

  def __init__(self, latents: int, rows: Rows):
    self._rows = rows
    width = len(rows.of('all').mean_D)
    self._sums = {kind: dict.fromkeys(self._SUMS, 0.0) for kind in Kind}
    self._error = {kind: Moments.of(np.zeros((0, width))) for kind in Kind}
    self._fired = {kind: np.zeros(latents, np.int64) for kind in Kind}
    self._mean = {name: rows.of(name).mean_D for name in NAMES}
    self._parts = dict.fromkeys(NAMES, (0.0, 0))  # Σ ‖x - x̂‖²/‖x - mean‖², n

  def add(
    self,
    x_ND: np.ndarray,
    x_hat_ND: np.ndarray,
    code: SparseCode,
    kind_N: np.ndarray,
    /,
  ) -> None:
    """Counts rows in, with their reconstruction, code and token kinds."""
    fired_NK = code.vals_NK > 0
    for kind in Kind:
      of_N = kind_N == kind
      if not of_N.any():
        continue
      x_nD = x_ND[of_N].astype(np.float64)
      x_hat_nD = x_hat_ND[of_N].astype(np.float64)
      error_n = np.square(x_nD - x_hat_nD).sum(1)
      self._error[kind] += Moments.of(x_nD - x_hat_nD)
      _count(self._sums[kind], x_nD, x_hat_nD, error_n)
      self._sums[kind]['l0'] += fired_NK[of_N].sum()
      latents = code.idx_NK[of_N][fired_NK[of_N]]
      self._fired[kind] += np.bincount(
        latents, minlength=len(self._fired[kind])
      )
      for name in NAMES:
        if kind in tokens.kinds(name):
          self._parts[name] = _part(
            self._parts[name], error_n, x_nD - self._mean[name]
          )

  def fired(self, *names: str) -> np.ndarray:
    """Rows [M] of these kinds on which each latent fires."""
    kinds = {kind for name in names for kind in tokens.kinds(name)}
    return sum(self._fired[kind] for kind in kinds)

  def table(self) -> dict[str, dict[str, Any]]:
    """{kind: figures} of the kinds that have rows; None where not defined.

    With e = x - x̂, sums over the rows of a kind, and the mean of them all:

    fvu: Σ‖e‖² / Σ‖x - mean‖².
    explained_variance: 1 - fvu; SAELens 6.54 `explained_variance`.
    explained_variance_rows: mean over rows of 1 - ‖e‖² / ‖x - mean‖², rows at
      the mean left out; SAELens `explained_variance_legacy`, whose mean is that
      of a batch.
    explained_variance_centred: 1 - Σ_d var(e_d) / Σ_d var(x_d), which forgives
      a constant error; `frac_variance_explained` of dictionary_learning, there
      averaged over batches.
    mse: mean over rows of ‖e‖², summed over coordinates, as in SAELens.
    cosine: mean over rows of cos(x, x̂).
    shrinkage: Σ‖x̂‖² / Σ⟨x, x̂⟩, the relative reconstruction bias γ of eq. 10
      in arXiv 2404.16014; below 1 the SAE shrinks what it reads (Wright and
      Sharkey 2024). The same in SAELens and dictionary_learning.
    norm_ratio: mean over rows of ‖x̂‖ / ‖x‖; `l2_ratio` of both.
    l0: latents that fire on a row, on average.
    dead: share of the latents that fire on none of these rows.
    rows: how many.
    firing: {edges, latents, never}: how many latents fire on a share of the
      rows whose log10 lies between two edges (the first bin takes what is
      below, too), and how many never do.

    `all` is every kind but BOS, `image` and `text` are its parts.

    Raises:
      ValueError: a reconstruction is not finite.
    """
    return {
      name: self._figures(name) for name in NAMES if self._rows.of(name).rows
    }

  def _figures(self, name: str) -> dict[str, Any]:
    kinds, seen = tokens.kinds(name), self._rows.of(name)
    total = {
      key: sum(self._sums[kind][key] for kind in kinds) for key in self._SUMS
    }
    if not np.isfinite(total['error']):
      raise ValueError(
        f'what the SAE makes of {name} rows is not finite: its weights hold '
        'NaN or Inf, or overflow'
      )
    first, *rest = kinds
    error = sum((self._error[kind] for kind in rest), self._error[first])
    fvu = _ratio(total['error'], seen.spread)
    left = _ratio(error.spread, seen.spread)
    part, parts = self._parts[name]
    fired_M = self.fired(name)
    return {
      'fvu': fvu,
      'explained_variance': None if fvu is None else 1 - fvu,
      'explained_variance_rows': 1 - part / parts if parts else None,
      'explained_variance_centred': None if left is None else 1 - left,
      'mse': float(total['error'] / seen.rows),
      'cosine': _ratio(total['cosine'], total['directed']),
      'shrinkage': _ratio(total['norm'], total['dot']),
      'norm_ratio': _ratio(total['ratio'], total['long']),
      'l0': float(total['l0'] / seen.rows),
      'dead': float((fired_M == 0).mean()),
      'rows': seen.rows,
      'firing': firing(fired_M, seen.rows),
    }


def _count(sums, x_ND, x_hat_ND, error_N) -> None:
  """Adds what these rows are to the sums of their kind."""
  dot_N = (x_ND * x_hat_ND).sum(1)
  norm_N = np.sqrt(np.square(x_ND).sum(1))
  norm_hat_N = np.sqrt(np.square(x_hat_ND).sum(1))
  long_N = norm_N > 0
  both_N = long_N & (norm_hat_N > 0)
  sums['error'] += error_N.sum()
  sums['dot'] += dot_N.sum()
  sums['norm'] += np.square(norm_hat_N).sum()
  sums['cosine'] += (
    dot_N[both_N] / (norm_N[both_N] * norm_hat_N[both_N])
  ).sum()
  sums['directed'] += both_N.sum()
  sums['ratio'] += (norm_hat_N[long_N] / norm_N[long_N]).sum()
  sums['long'] += long_N.sum()


def _part(before, error_N, centred_ND) -> tuple[float, int]:
  """Sum and count of ‖e‖² / ‖x - mean‖², rows at the mean left out."""
  square_N = np.square(centred_ND).sum(1)
  off_N = square_N > 0
  share = float((error_N[off_N] / square_N[off_N]).sum())
  return before[0] + share, before[1] + int(off_N.sum())


def _ratio(over: float, under: float) -> float | None:
  return float(over / under) if under else None


def firing(fired_M: np.ndarray, rows: int) -> dict[str, Any]:
  """The histogram of log10 firing rates; see `Quality.table`."""
  rate_m = np.log10(fired_M[fired_M > 0] / rows)
  counts, _ = np.histogram(np.maximum(rate_m, RATE_EDGES[0]), RATE_EDGES)
  return {
    'edges': RATE_EDGES.tolist(),
    'latents': counts.tolist(),
    'never': int((fired_M == 0).sum()),
  }


def cut(path: str | os.PathLike, layer: int, step: int) -> None:
  """Drops the lines of a layer's steps after `step` from metrics.jsonl.

  A resumed run does those steps again.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return
  lines = records.read_lines(path)
  kept = [x for x in lines if x['layer'] != layer or x['step'] <= step]
  part = path.with_name(path.name + '.part')
  part.unlink(missing_ok=True)
  with records.Appender(part) as out:
    for line in kept:
      out.add(line)
  part.replace(path)
