"""How one checkpoint differs from another, array by array."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from lmm_sae.sae import figures, said
from lmm_sae.sae.looking import Look
from lmm_sae.sae.stored import BLOCK

ALIKE = 0.9  # decoder rows with a smaller cosine point elsewhere


def between(new: Look, old: Look) -> dict[str, Any]:
  """What changed from `old` to `new`, as JSON.

  path: of the old one.
  settings: {added, removed: {name: value}, changed: {name: [old, new]}}; of
    unlike layouts those of `said.sae` that both say.
  arrays: {added, removed: [name], reshaped: {name: [old, new]}} as
    'shape dtype'; {changes: {name: {max_abs, relative, nonfinite}}}: the
    largest change of a value, ‖new - old‖ / ‖old‖ (null where old is 0), and
    the values that are not finite in either, which the others leave out.
    By the names on disk if both have one layout; else those of the SAE's arrays
    are compared, for rows as the store holds them (`by`: name, parameter).
  decoder: {min, median, max, edges, counts, elsewhere} of the cosines between
    decoder rows of one index; null where there are not two of one shape.
  latents: {died, woke} by the idle counters; null where one has none.
  """
  one, two = ((x.facts['kind'], x.facts.get('layout')) for x in (new, old))
  by = 'name'
  if one != two and new.parameters and old.parameters:
    by = 'parameter'
  now, then = (_arrays(x) if by == 'name' else x.parameters for x in (new, old))
  shared = [name for name in now if name in then]
  alike = [name for name in shared if now[name].shape == then[name].shape]
  return {
    'path': str(old.path),
    'settings': _settings(new, old, by),
    'arrays': {
      'by': by,
      'added': [name for name in now if name not in then],
      'removed': [name for name in then if name not in now],
      'reshaped': {
        name: [_what(then[name]), _what(now[name])]
        for name in shared
        if _what(then[name]) != _what(now[name])
      },
      'changes': {name: _change(now[name], then[name]) for name in alike},
    },
    'decoder': _decoder(new, old),
    'latents': _latents(new, old),
  }


def _arrays(look):
  return {f'{x.item}.{x.name}' if x.item else x.name: x for x in look.arrays}


def _what(array) -> str:
  shape = ' x '.join(map(str, array.shape)) or 'one'
  return f'{shape} {array.dtype}' if hasattr(array, 'dtype') else shape


def _settings(new: Look, old: Look, by: str) -> dict[str, Any]:
  if by == 'name':
    now, then = (dict(_flat(x.facts['settings'] or {})) for x in (new, old))
  else:
    now, then = (said.sae(x.facts['settings'] or {}) for x in (new, old))
    both = now.keys() & then.keys()
    now, then = ({key: x[key] for key in both} for x in (now, then))
  return {
    'added': {name: now[name] for name in now if name not in then},
    'removed': {name: then[name] for name in then if name not in now},
    'changed': {
      name: [then[name], now[name]]
      for name in now
      if name in then and now[name] != then[name]
    },
  }


def _flat(settings: dict, prefix: str = '') -> Iterator[tuple[str, Any]]:
  for name, value in settings.items():
    if isinstance(value, dict) and value:
      yield from _flat(value, f'{prefix}{name}.')
    else:
      yield prefix + name, value


def paired(new, old) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Rows of two arrays of one shape, piece by piece, however they are cut."""
  others = old.blocks(BLOCK)
  _, rest = next(others, (0, np.zeros(0)))
  for _, block in new.blocks(BLOCK):
    while len(block):
      if not len(rest):
        _, rest = next(others)
      count = min(len(block), len(rest))
      yield block[:count], rest[:count]
      block, rest = block[count:], rest[count:]


def _change(new, old) -> dict[str, Any]:
  most, gap, base, bad = 0.0, 0.0, 0.0, 0
  for now, then in paired(new, old):
    now, then = now.astype(np.float64), then.astype(np.float64)
    finite = np.isfinite(now) & np.isfinite(then)
    bad += int(finite.size - finite.sum())
    change = np.where(finite, now, 0) - np.where(finite, then, 0)
    most = max(most, float(np.abs(change).max(initial=0)))
    gap += float(np.vdot(change, change))
    then = np.where(finite, then, 0)
    base += float(np.vdot(then, then))
  return {
    'max_abs': most,
    'relative': (gap / base) ** 0.5 if base else None,
    'nonfinite': bad,
  }


def _decoder(new, old) -> dict[str, Any] | None:
  pair = [x.parameters.get('w_dec_MD') for x in (new, old)]
  if None in pair or pair[0].shape != pair[1].shape:
    return None
  found = []
  for now, then in paired(*pair):
    dot, now_M, then_M = (
      np.einsum('md,md->m', *pair, dtype=np.float64)
      for pair in ((now, then), (now, now), (then, then))
    )
    length_M = np.sqrt(now_M * then_M)
    found.append(dot / np.where(length_M > 0, length_M, 1))
  cos_M = np.nan_to_num(np.concatenate(found))
  return {
    **figures.spread(cos_M),
    **figures.histogram(cos_M, figures.COSINES),
    'elsewhere': int((cos_M < ALIKE).sum()),
  }


def _latents(new, old) -> dict[str, Any] | None:
  counts = [(x.idle_M, x.dead_after) for x in (new, old)]
  if any(x is None for pair in counts for x in pair):
    return None
  now_M, then_M = (idle_M > after for idle_M, after in counts)
  if len(now_M) != len(then_M):
    return None
  return {
    'died': int((now_M & ~then_M).sum()),
    'woke': int((then_M & ~now_M).sum()),
  }
