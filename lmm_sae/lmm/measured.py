"""A forecast of a capture in words, as a part of the data says."""

import collections
import functools
from collections.abc import Mapping

import numpy as np
from absl import logging

from lmm_sae.core import captured, wording
from lmm_sae.core.forecast import Expected, span
from lmm_sae.core.jobs import Job
from lmm_sae.core.sources import SPLITS, Split
from lmm_sae.core.store import ActivationStore
from lmm_sae.lmm import folders
from lmm_sae.lmm.needs import Lack
from lmm_sae.lmm.telling import (
  Guess,
  Here,
  Line,
  Pace,
  Part,
  Told,
  Tools,
  by_split,
  guessed,
  number,
  store_lines,
  summed,
)


def measured(
  job: Job, guess: Guess, tools: Tools, here: Here, lacks: list[Lack]
) -> Told:
  """What a part of the data says, counted and captured here."""
  try:
    stores = captured.found(job, folders.fingerprint(here.folder))
  except (ValueError, OSError) as error:
    lacks.append(Lack('store', wording.of(error), ('--config.acts=OTHER',)))
    return guessed(job, guess, here)
  for name in SPLITS:
    place = job.workdir.acts(name)
    if name not in stores and (place / 'meta.json').exists():
      why = f'{place} was captured with other settings, or of another model'
      lacks.append(Lack('store', why, ('another --workdir, or delete it',)))
  left = {split.name: _left(job, split, stores) for split in here.splits}
  owed = [split for split in here.splits if len(left[split.name])]
  lines = [
    ('samples', f'{sum(here.samples.values()):,}: {by_split(here.samples)}')
  ]
  for name, store in stores.items():
    kinds = ', '.join(f'{kind} {n:,}' for kind, n in _kinds(store).items())
    lines.append(
      (
        'captured',
        f'{name}: {len(store.committed())} of {store.layout.groups} groups, '
        f'{store.num_rows:,} rows ({kinds})',
      )
    )
  if not owed:
    return Told([*lines, ('', 'nothing is left to be done')], 0.0, 0.0)
  if stores:
    counts = {name: len(each) for name, each in left.items()}
    lines.append(('left', f'samples of {by_split(counts)}'))

  from lmm_sae.lmm import measuring  # with torch, which `look` has found

  crew = functools.partial(tools.crew, job, here.folder)
  logging.info('capture: measuring; this takes a minute or two at most')
  try:
    parts = measuring.count(
      job, owed, left, stores, here.width, tools.capturers, crew
    )
    first = owed[0]
    if not parts[first.name].rows.total:
      raise ValueError(
        f'no row would be stored of {parts[first.name].counted} samples of '
        f'{first.name}; the first reason: '
        f'{[*parts[first.name].reasons, "capture.keep"][0]}'
      )
    pace = measuring.pace(
      job,
      first,
      left[first.name],
      guess.trial,
      tools.small(job, here.folder),
      here.workers,
      tools.capturers,
      crew,
    )
  except (ValueError, OSError, NotImplementedError) as error:
    lacks.append(Lack('model or data', wording.of(error), ()))
    return guessed(job, guess, here)
  sizes = {name: part.bytes for name, part in parts.items()}
  rows = {name: part.rows for name, part in parts.items()}
  lines += token_lines(parts)
  lines += reject_lines(parts)
  lines += store_lines(job, here.width, rows, sizes)
  lines += time_lines(job, guess, here, parts, pace, first.name)
  groups = {name: job.groups(part.samples) for name, part in parts.items()}
  mean = max(rows[name].total / groups[name] for name in parts)
  return Told(lines, sum(each.total for each in sizes.values()), mean)


def _left(job: Job, split: Split, stores) -> np.ndarray:
  """The samples of the groups that nobody has committed, ascending."""
  samples = np.arange(len(split.rows))
  if split.name not in stores:
    return samples
  done = np.array(sorted(stores[split.name].committed()), np.int64)
  return samples[~np.isin(samples // job.capture.group, done)]


def _kinds(store: ActivationStore) -> dict[str, int]:
  kinds: collections.Counter = collections.Counter()
  for line in store.manifest:
    kinds.update(line['kinds'])
  return dict(kinds)


def token_lines(parts: Mapping[str, Part]) -> list[Line]:
  """Tokens by kind: what the model sees of them, and what is stored."""
  looked = {name: part.counted for name, part in parts.items()}
  seen = {name: summed(part.seen) for name, part in parts.items()}
  samples = sum(part.samples for part in parts.values())
  total = functools.reduce(Expected.__add__, seen.values())
  lines = [
    (
      'tokens',
      f'{number(total)}, {total.total / samples:,.1f} a sample; counted: '
      f'{by_split(looked)} samples',
    )
  ]
  for name, part in parts.items():
    lines.append(('', f'{name:<10}{"tokens":>20}{"rows kept":>20}'))
    for kind, seen_ in part.seen.items():
      kept = part.kept.get(kind, Expected(0.0))
      lines.append(('', f'  {kind:<8}{number(seen_):>20}{number(kept):>20}'))
  return lines


def reject_lines(parts: Mapping[str, Part]) -> list[Line]:
  """Samples that cannot be captured, and why."""
  reasons = [reason for part in parts.values() for reason in part.reasons]
  counted = sum(part.counted for part in parts.values())
  if not reasons:
    return [('rejects', f'none of the {counted:,} samples counted')]
  expected = summed({name: part.rejected for name, part in parts.items()})
  return [
    ('rejects', f'{number(expected)}; {len(reasons)} of {counted:,} counted:'),
    *(('', f'  {reason}') for reason in captured.common(reasons)),
  ]


def time_lines(
  job: Job,
  guess: Guess,
  here: Here,
  parts: Mapping[str, Part],
  pace: Pace,
  first: str,
) -> list[Line]:
  """A group, and all that is left of this command's share."""
  group, (_, shares) = job.capture.group, job.capture.part
  seconds = 0.0
  for part in parts.values():
    more = max(0.0, part.read_s - parts[first].read_s)  # images that are kept
    seconds += part.samples * (pace.sample_s + more / pace.workers)
  threads = f'{pace.workers} process{"es" if pace.workers > 1 else ""}'
  one = pace.workers * pace.sample_s
  lines = [
    (
      'a group',
      f'{group * one:.3g} s in one of {threads}: reading '
      f'{group * parts[first].read_s:.3g}, pixels {group * pace.pixels_s:.3g}, '
      f'forward {group * pace.forward_s:.3g}, '
      f'writing {group * pace.write_s:.3g} s (some at the same time)',
    ),
    (
      '',
      f'measured on {pace.samples:,} samples of {first}, {pace.chunk} at '
      'a time',
    ),
    ('hours', f'{span(seconds / shares)} on this machine, by {threads}'),
  ]
  if shares > 1:
    lines.append(('', f'for capture.share={job.capture.share}, all like it'))
  if guess.devices > 1:
    alike = seconds * pace.workers / guess.devices
    lines.append(
      ('', f'{span(alike)} on plan.devices={guess.devices} like one of these')
    )
  return lines
