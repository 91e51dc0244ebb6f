"""How far two SAEs found the same latents: matched decoder directions.

Each latent of the smaller SAE is matched with one of the other, so that the sum
of the cosines is largest (the Hungarian method), as in Paulo and Belrose,
arXiv 2501.16615. Above HUNGARIAN latents, where that takes too long, only pairs
that are each other's nearest are matched; the rest count as unmatched.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from lmm_sae.core import progress

HUNGARIAN = 4096  # latents; 5 s on one Zen 4 core, and it grows with the cube
SAME = 0.7  # cosine above which two latents are taken for one
BLOCK = 1024  # latents compared with all others at a time


def match(
  a_MD: np.ndarray, b_MD: np.ndarray, /
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(indices into a, indices into b, cosines) of the matched pairs."""
  a_MD, b_MD = _unit(a_MD), _unit(b_MD)
  if max(len(a_MD), len(b_MD)) > HUNGARIAN:
    return _mutual(a_MD, b_MD)
  cosine_MM = a_MD @ b_MD.T
  left, right = optimize.linear_sum_assignment(cosine_MM, maximize=True)
  return left, right, cosine_MM[left, right]


def stability(
  a_MD: np.ndarray, b_MD: np.ndarray, /, seed: int = 0
) -> dict[str, Any]:
  """How alike the decoders are, beside random directions.

  Returns:
    method: hungarian or mutual_nearest.
    latents: of the smaller SAE.
    pairs: latents that were matched.
    mean: of the cosines of the pairs; None where there are none.
    share: of the smaller SAE's latents, with a partner of cosine above SAME.
    random: mean and share with random directions in the place of `b_MD`.
  """
  random_MD = np.random.default_rng(seed).normal(size=b_MD.shape)
  large = max(len(a_MD), len(b_MD)) > HUNGARIAN
  return {
    'method': 'mutual_nearest' if large else 'hungarian',
    'latents': min(len(a_MD), len(b_MD)),
    **_alike(a_MD, b_MD),
    'random': _alike(a_MD, random_MD),
  }


def _alike(a_MD: np.ndarray, b_MD: np.ndarray) -> dict[str, Any]:
  latents = min(len(a_MD), len(b_MD))
  if not latents:
    return {'pairs': 0, 'mean': None, 'share': None}
  _, _, cosine_L = match(a_MD, b_MD)
  return {
    'pairs': len(cosine_L),
    'mean': float(cosine_L.mean()) if len(cosine_L) else None,
    'share': float((cosine_L > SAME).sum() / latents),
  }


def _unit(w_MD: np.ndarray) -> np.ndarray:
  """The rows at length 1; rows of zeros stay."""
  w_MD = w_MD.astype(np.float32)
  norm_M1 = np.sqrt(np.square(w_MD).sum(1, keepdims=True))
  return w_MD / np.where(norm_M1 > 0, norm_M1, 1)


@jax.jit
def _best(a_ND, b_MD):
  """For each row the nearest other, and for each other the nearest row."""
  cosine_NM = jnp.matmul(a_ND, b_MD.T, precision=jax.lax.Precision.HIGHEST)
  return (
    *(cosine_NM.max(1), cosine_NM.argmax(1)),
    *(cosine_NM.max(0), cosine_NM.argmax(0)),
  )


def _mutual(a_MD: np.ndarray, b_MD: np.ndarray):
  """The pairs that are each other's nearest; no [M, M] is made."""
  top_M = np.full(len(b_MD), -np.inf, np.float32)
  back_M = np.zeros(len(b_MD), np.int64)
  cosine_M = np.zeros(len(a_MD), np.float32)
  there_M = np.zeros(len(a_MD), np.int64)
  b = jnp.asarray(b_MD)
  blocks = range(0, len(a_MD), BLOCK)
  for start in progress.track(blocks, what='blocks of latents'):
    part = slice(start, start + BLOCK)
    cosine_M[part], there_M[part], best_M, at_M = map(
      np.asarray, _best(a_MD[part], b)
    )
    better_M = best_M > top_M  # of equals the lower latent stays
    top_M[better_M] = best_M[better_M]
    back_M[better_M] = start + at_M[better_M]
  left = np.flatnonzero(back_M[there_M] == np.arange(len(a_MD)))
  return left, there_M[left], cosine_M[left]
