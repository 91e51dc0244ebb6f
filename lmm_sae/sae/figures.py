"""What the arrays of a checkpoint say of its SAE, in one bounded pass each.

Most is held for the decoder's neighbours: the decoder itself, M x D in float32,
beside one block of its cosines.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmm_sae.core import evaluation, progress
from lmm_sae.core.index import LatentIndex
from lmm_sae.sae import said
from lmm_sae.sae.looking import Look
from lmm_sae.sae.parameters import Parameter
from lmm_sae.sae.stored import Array

BLOCK = 4096  # decoder rows in one product: [4096, 4096] cosines are 64 MB
PAIRS = 10  # nearest neighbours that are named

COSINES = (-1.0, *(at / 10 for at in range(10)), 0.95, 1.0)
RATES = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
IDLE = (0, 1, *(10**power for power in range(3, 10)))


def of(look: Look) -> dict[str, Any]:
  """Figures of a checkpoint or an export, as JSON.

  arrays: {item.name: see `of_array`}.
  rows: {w_enc_MD, w_dec_MD: {min, median, max}} of the norms of latents' rows.
  b_dec_norm: for rows as the store holds them.
  dead: {count, share, latents, dead_after}; null where nothing counts.
  idle: histogram of the rows since each latent fired; null.
  rates: [{source, rows, never, edges, counts}] of the share of rows that a
    latent fires on, by the indexes and the evaluation of the workdir.
  neighbours: {latents, edges, counts, median, max, pairs: [{latents: [two],
    cosine}]} of the
    largest cosine that each decoder row has with another; see `neighbours`.
  Histograms have edges [n + 1] and counts [n]; the last edge is within.
  """
  names = {id(p.array): name for name, p in look.parameters.items()}
  arrays, rows = {}, {}
  for array in look.arrays:
    name = names.get(id(array))
    parameter = look.parameters[name] if name else None
    figures, norm_M = of_array(array, parameter)
    arrays[f'{array.item}.{array.name}' if array.item else array.name] = figures
    if norm_M is not None:
      rows[name] = spread(norm_M)
  decoder, bias = (look.parameters.get(x) for x in ('w_dec_MD', 'b_dec_D'))
  latents = decoder.shape[0] if decoder else 0
  return {
    'arrays': arrays,
    'rows': rows,
    'b_dec_norm': norm(bias.read()) if bias else None,
    'dead': dead(look),
    'idle': _idle(look),
    'rates': list(rates(look.path, latents)),
    'neighbours': neighbours(decoder) if decoder else None,
  }


def of_array(
  array: Array, parameter: Parameter | None = None
) -> tuple[dict[str, Any], np.ndarray | None]:
  """({norm, min, max, nonfinite}, norms of its rows where they are latents').

  Of the values as they are stored; those that are NaN or Inf are counted and
  left out.
  """
  square, low, high, bad = 0.0, np.inf, -np.inf, 0
  wide = parameter is not None and len(parameter.shape) == 2
  norms = []
  for _, block in array.blocks(axis=int(wide and parameter.transposed)):
    block = np.abs(block) if block.dtype.kind == 'c' else block
    x = block.astype(np.float64)
    finite = np.isfinite(x)
    if not finite.all():
      bad += int(x.size - finite.sum())
      x = np.where(finite, x, 0)
    if finite.any():
      low = min(low, float(x.min(where=finite, initial=np.inf)))
      high = max(high, float(x.max(where=finite, initial=-np.inf)))
    square += float(np.vdot(x, x))
    if wide:
      norms.append(np.sqrt(np.einsum('md,md->m', x, x)))
  some = low <= high
  figures = {
    'norm': square**0.5,
    'min': low if some else None,
    'max': high if some else None,
    'nonfinite': bad,
  }
  return figures, np.concatenate(norms) if norms else None


def norm(x: np.ndarray) -> float | None:
  """The length of a vector; None where it has none."""
  length = float(np.linalg.norm(x.astype(np.float64)))
  return length if np.isfinite(length) else None


def spread(x_N: np.ndarray) -> dict[str, float]:
  """The least, the middle and the largest of some values."""
  return {
    'min': float(x_N.min()),
    'median': float(np.median(x_N)),
    'max': float(x_N.max()),
  }


def histogram(x_N: np.ndarray, edges: tuple[float, ...]) -> dict[str, Any]:
  """How many values lie in each bin; what lies outside counts at the edge."""
  inside = np.clip(x_N, edges[0], edges[-1])
  return {
    'edges': list(edges),
    'counts': np.histogram(inside, edges)[0].tolist(),
  }


def dead(look: Look) -> dict[str, Any] | None:
  """How many latents have not fired for `dead_after` rows; None: unknown."""
  idle_M, after = look.idle_M, look.dead_after
  if idle_M is None or after is None:
    return None
  count = int((idle_M > after).sum())
  return {
    'count': count,
    'share': count / len(idle_M),
    'latents': len(idle_M),
    'dead_after': after,
  }


def _idle(look: Look) -> dict[str, Any] | None:
  idle_M = look.idle_M
  return None if idle_M is None else histogram(idle_M, IDLE)


def rates(path: pathlib.Path, latents: int) -> Iterator[dict[str, Any]]:
  """Firing rates that the workdir of a checkpoint knows, see `of`.

  They are of the SAE that was exported, whichever checkpoint is looked at.
  """
  root, layer = said.around(path)
  if root is None:
    return
  for found in sorted((root / 'index' / layer).glob('*')):
    if not (found / 'meta.json').is_file():
      continue
    index = LatentIndex.open(found)
    fired_M = index.stats['rows_fired']
    if len(fired_M) == latents:
      yield {
        'source': str(found.relative_to(root)),
        'rows': index.meta.rows,
        'never': int((fired_M == 0).sum()),
        **histogram(fired_M[fired_M > 0] / max(1, index.meta.rows), RATES),
      }
  measured = said.measured(path)
  firing = measured.get('firing')  # by log10 of the rate
  if not isinstance(firing, dict):
    return
  counts, never = firing.get('latents', []), firing.get('never', 0)
  if counts and sum(counts) + never == latents:
    yield {
      'source': evaluation.FILE,
      'rows': measured.get('rows'),
      'never': never,
      'edges': [10.0**edge for edge in firing['edges']],
      'counts': counts,
    }


def unit(decoder: Parameter) -> tuple[np.ndarray, np.ndarray]:
  """(its rows that have a direction, with unit norm, float32; which they are).

  Rows of zeros, and those that hold NaN or Inf, have none.
  """
  unit_MD = np.zeros(decoder.shape, np.float32)
  kept = []
  for at, block in decoder.blocks():
    norm_N = np.sqrt(np.einsum('md,md->m', block, block, dtype=np.float64))
    some = np.flatnonzero(np.isfinite(norm_N) & (norm_N > 0))
    rows = slice(len(kept), len(kept) + len(some))
    unit_MD[rows] = block[some] / norm_N[some, None]
    kept += (at + some).tolist()
  return unit_MD[: len(kept)], np.array(kept, np.int64)


def neighbours(decoder: Parameter, block: int = BLOCK) -> dict[str, Any] | None:
  """The nearest other decoder row of each latent, by cosine.

  `pairs` are nearest neighbours, of at least one of the two, in falling order;
  `latents` is how many have a direction to compare. None where two have not.
  """
  unit_MD, kept_M = unit(decoder)
  if len(kept_M) < 2:
    return None
  best_M, at_M = nearest(unit_MD, min(block, len(unit_MD)))
  pairs = {}
  for at in np.argsort(-best_M, kind='stable').tolist():
    pair = tuple(sorted((int(kept_M[at]), int(kept_M[at_M[at]]))))
    pairs.setdefault(pair, float(best_M[at]))
    if len(pairs) == PAIRS:
      break
  return {
    'latents': len(kept_M),
    **histogram(best_M, COSINES),
    'median': float(np.median(best_M)),
    'max': float(best_M.max()),
    'pairs': [{'latents': list(x), 'cosine': cos} for x, cos in pairs.items()],
  }


def nearest(unit_MD: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
  """(largest cosine with another row [M], that row [M]), by M²/2 products.

  Of equals the lower index; each block of products is read both ways.
  """
  count = len(unit_MD)
  best_M = np.full(count, -np.inf, np.float32)
  at_M = np.zeros(count, np.int64)
  starts = range(0, count, block)

  def rows(start):
    part = unit_MD[start : start + block]
    return jnp.asarray(np.pad(part, ((0, block - len(part)), (0, 0))))

  def better(start, found):
    part = slice(start, min(start + block, count))
    new, at = (np.asarray(x)[: part.stop - start] for x in found)
    wins = new > best_M[part]
    best_M[part] = np.where(wins, new, best_M[part])
    at_M[part] = np.where(wins, at, at_M[part])

  # Column by column, so that both ways meet lower indices first.
  tasks = [(one, two) for two in starts for one in starts if one <= two]
  left, left_BD = -1, None
  for one, two in progress.track(tasks, what='blocks of cosines'):
    if two != left:
      left, left_BD = two, rows(two)
    along, down = _cosines(rows(one), left_BD, one, two, count)
    if one != two:
      better(two, down)
    better(one, along)
  return best_M, at_M


@jax.jit
def _cosines(one_BD, two_BD, one, two, count):
  """((best, which) of the rows of one, the same of the rows of two)."""
  cos_BB = jnp.dot(one_BD, two_BD.T, precision='highest')
  one_B = one + jnp.arange(len(one_BD))[:, None]
  two_B = two + jnp.arange(len(two_BD))[None]
  other = (one_B != two_B) & (one_B < count) & (two_B < count)
  cos_BB = jnp.where(other, cos_BB, -jnp.inf)
  return (
    (cos_BB.max(1), two + cos_BB.argmax(1)),
    (cos_BB.max(0), one + cos_BB.argmax(0)),
  )


def of_store(look: Look) -> dict[str, Any]:
  """Figures of an activation store: {layer_L: {rows, nonfinite, norm}}.

  nonfinite counts rows with NaN or Inf; norm is {min, median, max} of the
  others' norms.
  """
  found = {}
  for layer in look.store.meta.layers:
    norms, bad = [], 0
    for start, stop in look.store.ranges:
      for at in range(start, stop, BLOCK):
        try:
          x_ND = look.store.read(layer, at, min(at + BLOCK, stop))
        except ValueError as error:
          why = str(error).split(' [')[0][:300]
          raise ValueError(
            f'the store {look.path} is damaged: {why}'
          ) from error
        x_ND = x_ND.astype(np.float64)
        norm_N = np.sqrt(np.einsum('nd,nd->n', x_ND, x_ND))
        bad += int((~np.isfinite(norm_N)).sum())
        norms.append(norm_N[np.isfinite(norm_N)])
    norm_N = np.concatenate(norms) if norms else np.zeros(0)
    found[f'layer_{layer}'] = {
      'rows': look.store.num_rows,
      'nonfinite': bad,
      'norm': spread(norm_N) if len(norm_N) else None,
    }
  return found
