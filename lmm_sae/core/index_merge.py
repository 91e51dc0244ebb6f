"""Merges the parts of an index into the files that `LatentIndex` reads."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from lmm_sae.core import records
from lmm_sae.core.index import IndexMeta
from lmm_sae.core.ragged import Ragged, Strongest, Table
from lmm_sae.core.stats import Z95
from lmm_sae.core.tokens import Kind

KIND_NAMES = [kind.name.lower() for kind in Kind if kind != Kind.PADDING]


def merge(
  path: pathlib.Path,
  parts: Sequence[pathlib.Path],
  meta: IndexMeta,
  keep: tuple[int, int],
  duplicate_S: np.ndarray,
  vocab: Sequence[str],
) -> IndexMeta:
  """Writes the index of all parts; meta.json, which makes it count, last.

  Args:
    meta: its fields `images`, `rows` and `firings` are filled in here.
    keep: exemplars and texts kept a latent.
    vocab: the string of every token id.

  Raises:
    RuntimeError: the postings do not hold every firing that was counted.
  """
  path.mkdir(parents=True, exist_ok=True)
  stats, totals = _stats(parts, meta)
  posted = _write_postings(path, parts, meta, stats['images_fired'])
  counted = sum(int(part['first']) for part in _load(parts))
  if posted != counted:
    raise RuntimeError(
      f'{path}: the postings hold {posted} firings of the base view, but '
      f'{counted} were counted: delete that folder and make the index again'
    )
  _write_exemplars(path, _best(parts, 'images', meta, keep[0]), meta)
  _write_texts(path, _best(parts, 'texts', meta, keep[1]), meta, vocab)
  np.savez(path / 'stats.npz', **stats)
  _save(path, 'duplicate', duplicate_S.astype(np.int32))
  done = dataclasses.replace(meta, **totals)
  records.write_json(path / 'meta.json', records.to_json(done))
  return done


def _stats(
  parts: Sequence[pathlib.Path], meta: IndexMeta
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
  """The statistics of all latents, and the totals of the split."""
  latents = meta.latents
  fired_KM = np.zeros((len(KIND_NAMES), latents), np.int64)
  sums = {
    name: np.zeros(latents) for name in ('sum', 'strength', 'logged', 'images')
  }
  samples_M = np.zeros(latents, np.int64)
  peaks = dict.fromkeys(
    ('peak', 'peak_base', 'peak_image'), np.zeros(latents, np.float32)
  )
  rows = images = 0
  for part in _load(parts):
    fired_KM += part['fired']
    samples_M += part['samples']
    sums['sum'] += part['sum']
    rows += int(part['rows'])
    images += int(part['images'])
    peaks = {name: np.maximum(peaks[name], part[name]) for name in peaks}
    if 'postings.latent' in part:
      latent, mean = part['postings.latent'], part['postings.mean']
      mean = mean.astype(np.float64)
      for name, weight in (
        ('strength', mean),
        ('logged', mean * np.log(mean)),
        ('images', np.ones_like(mean)),
      ):
        sums[name] += np.bincount(latent, weights=weight, minlength=latents)
  fired = dict(zip(KIND_NAMES, fired_KM, strict=True))
  rows_fired = fired_KM.sum(axis=0) - fired['bos']
  stats = {
    'rows_fired': rows_fired,
    'samples_fired': samples_M,
    'images_fired': sums['images'].astype(np.int64),
    **{f'fired_{name}': counts for name, counts in fired.items()},
    'mean': (sums['sum'] / np.maximum(rows_fired, 1)).astype(np.float32),
    **peaks,
    'dead': rows_fired == 0,
    'always_on': _always_on(sums, images, meta.always_on),
  }
  totals = {'images': images, 'rows': rows, 'firings': int(fired_KM.sum())}
  return stats, totals


def _always_on(
  sums: dict[str, np.ndarray], images: int, share: float
) -> np.ndarray:
  """`index.RULE`: fires on most images, and about equally."""
  if not images:
    return np.zeros(len(sums['images']), bool)
  total = np.maximum(sums['strength'], 1e-30)
  entropy = np.log(total) - sums['logged'] / total
  spread = np.where(sums['images'] > 0, np.exp(entropy), 0)
  fewest = np.minimum(sums['images'], spread)
  return _wilson_low(np.minimum(fewest / images, 1), images) > share


def _wilson_low(share: np.ndarray, n: int) -> np.ndarray:
  """The lower end of the 95% Wilson interval of a share of n."""
  shrink = 1 + Z95**2 / n
  centre = share + Z95**2 / (2 * n)
  spread = Z95 * np.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
  return (centre - spread) / shrink


def _write_postings(
  path: pathlib.Path,
  parts: Sequence[pathlib.Path],
  meta: IndexMeta,
  count_M: np.ndarray,
) -> int:
  """Writes the pairs latent-major and sample-major; returns their firings.

  A part's pairs are in order of sample and latent. Each latent's place in the
  file is known beforehand, so one pass puts every pair where it belongs.
  """
  offset = np.concatenate([[0], np.cumsum(count_M)]).astype(np.int64)
  _save(path, 'postings_offset', offset)
  size = int(offset[-1])
  fields = {'sample': np.int32, 'mean': np.float32, 'max': np.float32}
  fields['count'] = np.int32
  by_latent = {
    name: _create(path, f'postings_{name}', size, dtype)
    for name, dtype in fields.items()
  }
  by_sample = {
    'latent': _create(path, 'samples_latent', size, np.int32),
    'mean': _create(path, 'samples_mean', size, np.float32),
  }
  per_sample = np.zeros(meta.samples, np.int64)
  free = offset[:-1].copy()
  done = firings = 0
  for part in _load(parts):
    if 'postings.latent' not in part:
      continue
    latent = part['postings.latent']
    order = np.argsort(latent, kind='stable')
    counts = np.bincount(latent, minlength=meta.latents)
    first = np.cumsum(counts) - counts
    into = np.arange(len(latent)) + (free - first)[latent[order]]
    free += counts
    for name, array in by_latent.items():
      array[into] = part[f'postings.{name}'][order]
    for name, array in by_sample.items():
      array[done : done + len(latent)] = part[f'postings.{name}']
    per_sample += np.bincount(part['postings.sample'], minlength=meta.samples)
    firings += int(part['postings.count'].sum())
    done += len(latent)
  for array in (*by_latent.values(), *by_sample.values()):
    if isinstance(array, np.memmap):
      array.flush()
  _save(
    path,
    'samples_offset',
    np.concatenate([[0], np.cumsum(per_sample)]).astype(np.int64),
  )
  return firings


def _best(
  parts: Sequence[pathlib.Path], name: str, meta: IndexMeta, keep: int
) -> Table | None:
  best = Strongest(meta.latents, keep)
  for part in _load(parts):
    flat = {
      key.removeprefix(f'{name}.'): part[key]
      for key in part.files
      if key.startswith(f'{name}.')
    }
    if flat:
      best.add(Table.from_arrays(flat))
  return best.table()


def _write_exemplars(
  path: pathlib.Path, table: Table | None, meta: IndexMeta
) -> None:
  if table is None:
    table = Table(
      {
        'latent': np.zeros(0, np.int64),
        'sample': np.zeros(0, np.int64),
        'strength': np.zeros(0, np.float32),
        'tiles': np.zeros((0, 2), np.int32),
      },
      {'heat': _no_lists('cell', 'value'), 'tile': _no_lists('cell', 'value')},
    )
  columns = table.columns
  _save(path, 'exemplars_offset', _offsets(columns['latent'], meta.latents))
  _save(path, 'exemplars_sample', columns['sample'].astype(np.int32))
  _save(path, 'exemplars_strength', columns['strength'])
  _save(path, 'exemplars_tiles', columns['tiles'])
  for name, ragged in table.ragged.items():
    _save(path, f'{name}_offset', ragged.offset)
    _save(path, f'{name}_cell', ragged.columns['cell'].astype(np.int32))
    _save(path, f'{name}_value', ragged.columns['value'].astype(np.float32))


def _write_texts(
  path: pathlib.Path,
  table: Table | None,
  meta: IndexMeta,
  vocab: Sequence[str],
) -> None:
  if table is None:
    none = np.zeros(0, np.int64)
    names = ('latent', 'sample', 'position', 'strength', 'at')
    columns = dict.fromkeys(names, none)
    table = Table(columns, {'context': _no_lists('token', 'act')})
  columns, context = table.columns, table.ragged['context']
  _save(path, 'texts_offset', _offsets(columns['latent'], meta.latents))
  for name in ('sample', 'position', 'at'):
    _save(path, f'texts_{name}', columns[name].astype(np.int32))
  _save(path, 'texts_strength', columns['strength'].astype(np.float32))
  _save(path, 'context_offset', context.offset)
  _save(path, 'context_token', context.columns['token'].astype(np.int32))
  _save(path, 'context_act', context.columns['act'].astype(np.float32))
  used = np.unique(context.columns['token']).tolist()
  records.write_json(
    path / 'vocab.json', {str(token): vocab[token] for token in used}
  )


def _no_lists(*names: str) -> Ragged:
  none = np.zeros(0, np.int64)
  return Ragged(np.zeros(1, np.int64), dict.fromkeys(names, none))


def _offsets(latent_N: np.ndarray, latents: int) -> np.ndarray:
  counts = np.bincount(latent_N, minlength=latents)
  return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _load(parts: Sequence[pathlib.Path]):
  for path in parts:
    with np.load(path) as part:
      yield part


def _create(path: pathlib.Path, name: str, size: int, dtype) -> np.ndarray:
  """An array of the index to be filled: on disk, since it may not fit."""
  if not size:  # an empty file cannot be mapped
    _save(path, name, np.zeros(0, dtype))
    return np.zeros(0, dtype)
  return np.lib.format.open_memmap(
    path / f'{name}.npy', mode='w+', dtype=dtype, shape=(size,)
  )


def _save(path: pathlib.Path, name: str, array: np.ndarray) -> None:
  np.save(path / f'{name}.npy', array)
