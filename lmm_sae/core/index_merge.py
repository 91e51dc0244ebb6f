"""Merges the parts of an index into the files that `LatentIndex` reads.

Some latents at a time, as many as the memory bound allows: no step holds all
postings or all heat maps.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from lmm_sae.core import index_files as files
from lmm_sae.core import index_values, records
from lmm_sae.core.index import FORMAT_VERSION, VIEWS, IndexMeta
from lmm_sae.core.index_build import DRAWN
from lmm_sae.core.index_build import runs as runs_of
from lmm_sae.core.index_tables import Writer
from lmm_sae.core.stats import Z95
from lmm_sae.core.tokens import Kind

KIND_NAMES = [kind.name.lower() for kind in Kind if kind != Kind.PADDING]
POSTING_BYTES = 64  # of memory, as long as its latent is merged
MB = 1 << 20


def merge(
  path: pathlib.Path,
  parts: Sequence[pathlib.Path],
  meta: IndexMeta,
  keep: tuple[int, int],
  duplicate_S: np.ndarray,
  vocab: Sequence[str],
  spread: int = 10,
  memory_mb: int = 2048,
) -> IndexMeta:
  """Writes the index of all parts; meta.json, which makes it count, last.

  Args:
    parts: folders that `Part.save` made, in order of their samples.
    meta: its fields `images`, `rows` and `firings` are filled in here.
    keep: exemplars and texts kept a latent.
    vocab: the string of every token id.
    spread: exemplars a latent of the seeded sample.
    memory_mb: held at a time, about.

  Raises:
    RuntimeError: the postings do not hold every firing that was counted.
  """
  path.mkdir(parents=True, exist_ok=True)
  most = memory_mb * MB // 2
  stats, totals = _stats(parts, meta)
  images = np.sort(np.concatenate([files.load(p, 'images') for p in parts]))
  files.save(path, 'images', images.astype(np.int32))
  totals['images'] = len(images)
  pieces = runs_of(parts)
  for view in VIEWS:
    counted_M = sum(files.load(part, f'counted.{view}') for part in parts)
    sums = _write_postings(path, pieces, view, counted_M, meta, most)
    if view == 'base':
      stats['images_fired'] = sums['images'].astype(np.int64)
      stats['always_on'] = _always_on(sums, len(images), meta.always_on)
  _write_samples(path, pieces, meta)
  stats['quantiles'] = _quantiles(pieces, meta, most, stats)
  write = Writer(path, pieces, meta.latents, most)
  write.images('images', 'exemplars', '', keep[0])
  write.images('drawn', 'spread', 'spread_', DRAWN * spread, spread)
  write.texts('texts', 'texts', '', keep[1])
  write.texts('text_drawn', 'text_spread', 'spread_', DRAWN * spread, spread)
  used = sorted(write.tokens)
  records.write_json(
    path / 'vocab.json', {str(token): vocab[token] for token in used}
  )
  np.savez(path / 'stats.npz', **stats)
  files.save(path, 'duplicate', duplicate_S.astype(np.int32))
  done = dataclasses.replace(
    meta,
    levels=index_values.LEVELS,
    format_version=FORMAT_VERSION,
    **totals,
  )
  records.write_json(path / 'meta.json', records.to_json(done))
  return done


def _stats(
  parts: Sequence[pathlib.Path], meta: IndexMeta
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
  """The statistics of all latents that parts add up, and the totals."""
  latents = meta.latents
  fired_KM = np.zeros((len(KIND_NAMES), latents), np.int64)
  sum_M, samples_M = np.zeros(latents), np.zeros(latents, np.int64)
  peaks = {
    name: np.zeros(latents, np.float32)
    for name in ('peak', 'peak_base', 'peak_image')
  }
  rows = 0
  for part in parts:
    fired_KM += files.load(part, 'fired')
    samples_M += files.load(part, 'samples')
    sum_M += files.load(part, 'sum')
    rows += int(files.load(part, 'rows'))
    for name, peak_M in peaks.items():
      np.maximum(peak_M, files.load(part, name), out=peak_M)
  fired = dict(zip(KIND_NAMES, fired_KM, strict=True))
  rows_fired = fired_KM.sum(axis=0) - fired['bos']
  stats = {
    'rows_fired': rows_fired,
    'samples_fired': samples_M,
    **{f'fired_{name}': counts for name, counts in fired.items()},
    'mean': (sum_M / np.maximum(rows_fired, 1)).astype(np.float32),
    **peaks,
    'dead': rows_fired == 0,
  }
  return stats, {'rows': rows, 'firings': int(fired_KM.sum())}


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
  runs: Sequence[pathlib.Path],
  view: str,
  counted_M: np.ndarray,
  meta: IndexMeta,
  most: int,
) -> dict[str, np.ndarray]:
  """Writes a view's postings by latent; returns sums over each latent's.

  Raises:
    RuntimeError: a latent's postings do not hold every firing counted.
  """
  count_M = np.zeros(meta.latents, np.int64)
  for run in runs:
    count_M += files.load(run, f'{view}.counts')
  sums = {
    name: np.zeros(meta.latents)
    for name in ('strength', 'logged', 'images', 'firings')
  }
  files.save(path, f'postings_{view}_offset', files.offsets(count_M))
  dtype = index_of(meta.samples)
  fields = {'sample': dtype} | dict.fromkeys(('mean', 'max', 'count'), 'u2')
  out = {
    name: files.Growing(path, f'postings_{view}_{name}', of)
    for name, of in fields.items()
  }
  at = [0] * len(runs)
  # A run's counts are read with each range, too.
  for first, stop in files.ranges(count_M * POSTING_BYTES + 64, most):
    latent, pieces = [], {name: [] for name in fields}
    for i, run in enumerate(runs):
      counts = files.cut(run, f'{view}.counts', first, stop)
      end = at[i] + int(counts.sum())
      latent.append(np.repeat(np.arange(stop - first, dtype=np.int32), counts))
      for name in fields:
        pieces[name].append(files.cut(run, f'{view}.{name}', at[i], end))
      at[i] = end
    latent = np.concatenate(latent)
    order = np.argsort(latent, kind='stable')
    latent = latent[order]
    joined = {n: np.concatenate(p)[order] for n, p in pieces.items()}
    for name, array in joined.items():
      out[name].add(array)
    mean = index_values.unpack(joined['mean']).astype(np.float64)
    for name, weight in (
      ('strength', mean),
      ('logged', mean * np.log(mean)),
      ('images', np.ones_like(mean)),
      ('firings', joined['count']),
    ):
      sums[name][first:stop] = np.bincount(
        latent, weights=weight, minlength=stop - first
      )
  for array in out.values():
    array.close()
  wrong = np.flatnonzero(sums['firings'] != counted_M)
  if len(wrong):
    raise RuntimeError(
      f'{path}: the postings of latent {wrong[0]} hold '
      f'{int(sums["firings"][wrong[0]])} firings of the {view} view, but '
      f'{counted_M[wrong[0]]} were counted ({len(wrong)} latents are wrong): '
      'delete that folder and make the index again'
    )
  return sums


def _write_samples(
  path: pathlib.Path, runs: Sequence[pathlib.Path], meta: IndexMeta
) -> None:
  """Writes the base view's pairs by sample: a run holds its samples whole."""
  per_sample = np.zeros(meta.samples, np.int64)
  out = {
    'latent': files.Growing(path, 'samples_latent', index_of(meta.latents)),
    'mean': files.Growing(path, 'samples_mean', 'u2'),
  }
  for run in runs:
    sample = files.load(run, 'base.sample')
    order = np.argsort(sample, kind='stable')
    counts = files.load(run, 'base.counts')
    latent = np.repeat(np.arange(meta.latents, dtype=np.int32), counts)
    out['latent'].add(latent[order])
    out['mean'].add(files.load(run, 'base.mean')[order])
    per_sample += np.bincount(sample, minlength=meta.samples)
  for array in out.values():
    array.close()
  files.save(path, 'samples_offset', files.offsets(per_sample))


def _quantiles(
  runs: Sequence[pathlib.Path],
  meta: IndexMeta,
  most: int,
  stats: dict[str, np.ndarray],
) -> np.ndarray:
  """Quantiles of the activations over firing rows, float32 [M, Q]."""
  found = []
  bytes_M = np.minimum(stats['rows_fired'], index_values.BINS) * 64 + 64
  for first, stop in files.ranges(bytes_M, most):
    histograms = index_values.Histograms()
    for run in runs:
      key = files.load(run, 'histogram.key')
      low, high = np.searchsorted(
        key, np.array([first, stop]) * index_values.BINS
      )
      histograms.put(
        key[low:high], files.cut(run, 'histogram.count', low, high)
      )
    found.append(histograms.quantiles(first, stop - first))
  found = np.concatenate(found)
  return np.minimum(found, stats['peak'][:, None])


def index_of(size: int) -> str:
  """The dtype that holds 0 to size - 1 on disk."""
  return 'u2' if size <= 1 << 16 else 'i4'
