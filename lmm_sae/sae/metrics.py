"""How good an SAE is: numbers of a run, and figures by token kind."""

import os
import pathlib
from typing import Any

import numpy as np

from lmm_sae.core import records, tokens
from lmm_sae.core.tokens import Kind
from lmm_sae.sae.model import SparseCode

GROUPS = ('all', 'image', 'text')  # beside the kinds themselves


class Quality:
  """Sums over rows, by token kind, in float64; `table` makes figures of them.

  Args:
    latents: M.
    width: D.
  """

  def __init__(self, latents: int, width: int):
    self._names = [kind.name.lower() for kind in Kind] + list(GROUPS)
    kinds = len(self._names)
    self._rows = np.zeros(kinds, np.int64)
    self._error = np.zeros(kinds)
    self._square = np.zeros(kinds)
    self._sum = np.zeros((kinds, width))
    self._l0 = np.zeros(kinds, np.int64)
    self._fired = np.zeros((kinds, latents), bool)

  def add(
    self,
    x_ND: np.ndarray,
    x_hat_ND: np.ndarray,
    code: SparseCode,
    kind_N: np.ndarray,
    /,
  ) -> None:
    """Counts rows in, with their reconstruction, code and token kinds."""
    x_ND = x_ND.astype(np.float64)
    error_N = np.square(x_ND - x_hat_ND).sum(1)
    square_N = np.square(x_ND).sum(1)
    fired_NK = code.vals_NK > 0
    for at, name in enumerate(self._names):
      of_N = np.isin(kind_N, [int(kind) for kind in tokens.kinds(name)])
      if not of_N.any():
        continue
      self._rows[at] += of_N.sum()
      self._error[at] += error_N[of_N].sum()
      self._square[at] += square_N[of_N].sum()
      self._sum[at] += x_ND[of_N].sum(0)
      self._l0[at] += fired_NK[of_N].sum()
      self._fired[at, code.idx_NK[of_N][fired_NK[of_N]]] = True

  def table(self) -> dict[str, dict[str, Any]]:
    """{kind: {fvu, l0, dead, rows}} of the kinds that have rows.

    fvu: Σ‖x - x̂‖² / Σ‖x - mean‖², the mean over the rows of that kind; None
      where these rows do not vary.
    l0: latents that fire on a row, on average.
    dead: share of the latents that fire on none of these rows.
    `all` is every kind but BOS, `image` and `text` are its parts.
    """
    table = {}
    for at, name in enumerate(self._names):
      rows = int(self._rows[at])
      if not rows:
        continue
      spread = self._square[at] - np.square(self._sum[at]).sum() / rows
      varies = spread > 1e-9 * self._square[at]  # else it is rounding
      table[name] = {
        'fvu': float(self._error[at] / spread) if varies else None,
        'l0': float(self._l0[at] / rows),
        'dead': float(1 - self._fired[at].mean()),
        'rows': rows,
      }
    return table


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
