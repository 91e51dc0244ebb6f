"""What a capture lacks on this machine, and what it would take.

lmm-sae capture --dry_run --config=FILE [--workdir=DIR]

Where the model and the data are here, a seeded part of what is left is counted
and captured by the capture's own workers; where they are not, what the config
and the model's config.json say is told. Nothing is written into the workdir or
the store.

The command ends with 0 whatever it finds: it was asked for a forecast, and it
gave one. Its last line begins with `capture can start` or `capture cannot
start`, for whoever reads it in a script. A config that capture would refuse is
refused here, too, with 2.
"""

import dataclasses
import os
import textwrap

import numpy as np
from absl import logging

from lmm_sae.core import captured, sources, wording
from lmm_sae.core.jobs import Job
from lmm_sae.core.sources import SPLITS, Split
from lmm_sae.core.store import ActivationStore
from lmm_sae.lmm import crew, folders, needs
from lmm_sae.lmm import dry_run_lines as lines_of
from lmm_sae.lmm.dry_run_lines import Guess, Here, Stage, Told
from lmm_sae.lmm.needs import Lack

WIDE = 79  # columns of a line


def tell(job: Job, guess: Guess, stage: Stage) -> list[str]:
  """The forecast, a topic a line; the last line is the verdict."""
  lines, lacks = [], needs.packages(job)
  if job.capture.workers == 'ray':  # no cluster is started for a forecast
    alone = dataclasses.replace(job.capture, workers='local', processes=1)
    lines = [('workers', 'capture.workers=ray: measured by one worker, here')]
    job = dataclasses.replace(job, capture=alone)
  here = look(job, guess, stage, lacks)
  if lacks:
    told = lines_of.guessed(job, guess, here)
  else:
    told = measured(job, guess, stage, here, lacks)
  lines += told.lines
  lines += lines_of.memory(job, here, told, lacks)
  if told.bytes is None:
    lines.append(('disk', 'what is to be written is not known'))
  else:
    room, missing = needs.disk(job.workdir.acts_root, told.bytes)
    lacks += missing
    lines.append(('disk', room))
  for lack in lacks:
    lines.append(('missing', f'{lack.what}: {lack.why}'))
    lines += [('', f'  {word}') for word in lack.mend]
  if lacks:
    words = ', '.join(dict.fromkeys(lack.what for lack in lacks))
    verdict = f'capture cannot start here; missing: {words}'
  elif told.bytes == 0:
    verdict = 'capture is complete: there is nothing to do'
  else:
    verdict = 'capture can start: nothing is missing'
  return [
    *(line for name, text in lines for line in wrapped(name, text)),
    verdict,
  ]


def wrapped(name: str, text: str) -> list[str]:
  """A topic's text in lines; what is indented is to be copied: not broken."""
  room = WIDE - len(f'{name:<12} ')
  lines = [text]
  if not text.startswith(' '):
    lines = textwrap.wrap(
      text, room, break_on_hyphens=False, break_long_words=False
    )
  return [
    f'{"" if at else name:<12} {line}'.rstrip() for at, line in enumerate(lines)
  ]


def look(job: Job, guess: Guess, stage: Stage, lacks: list[Lack]) -> Here:
  """Looks for everything; what is missing is added to `lacks`."""
  folder, missing = needs.weights(job.lmm.path)
  lacks += missing
  device, missing = needs.device(job)
  lacks += missing
  splits, missing = open_splits(job, stage)
  lacks += missing
  samples = guessed_samples(job, guess)
  if splits is not None:
    samples = {split.name: len(split.rows) for split in splits}
  count, workers = None, 1
  if folder is not None:
    try:
      count = needs.parameters(folder)
    except ValueError as error:
      lacks.append(Lack('weights', str(error), ()))
  if not lacks and samples:
    groups = sum(job.groups(size) for size in samples.values())
    with crew.crew(job, folder, groups, None) as (_, workers, _):
      pass
  return Here(
    folder,
    (needs.width(folder) if folder else 0) or guess.width,
    None if count is None else count * needs.ITEM_BYTES[job.lmm.dtype],
    device,
    splits,
    samples,
    workers,
  )


def measured(
  job: Job, guess: Guess, stage: Stage, here: Here, lacks: list[Lack]
) -> Told:
  """What a part of the data says, counted and captured here."""
  try:
    stores = captured.found(job, folders.fingerprint(here.folder))
  except (ValueError, OSError) as error:
    lacks.append(Lack('store', wording.of(error), ('--config.acts=OTHER',)))
    return lines_of.guessed(job, guess, here)
  for split in here.splits:
    place, why = job.workdir.acts(split.name), ''
    if split.name not in stores and (place / 'meta.json').exists():
      why = f'{place} was captured with other settings, or of another model'
    elif split.name in stores and captured.changed(stores[split.name], split):
      why = f'{place} was captured of data that have changed since'
    if why:
      lacks.append(Lack('store', why, ('another --workdir, or delete it',)))
  left = {split.name: _left(job, split, stores) for split in here.splits}
  owed = [split for split in here.splits if len(left[split.name])]
  lines = [
    (
      'samples',
      f'{sum(here.samples.values()):,}: {lines_of.by_split(here.samples)}',
    )
  ]
  for name, store in stores.items():
    kinds = ', '.join(
      f'{kind} {n:,}' for kind, n in captured.kinds(store).items()
    )
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
    lines.append(('left', f'samples of {lines_of.by_split(counts)}'))

  from lmm_sae.lmm import estimate  # with torch, which `look` has found

  trials = estimate.Trials(job, here.folder, stage.capturers)
  logging.info('capture: measuring; this takes a minute or two at most')
  try:
    parts = estimate.count(trials, owed, left, stores, here.width)
    first = owed[0]
    if not parts[first.name].rows.total:
      raise ValueError(
        f'no row would be stored of {parts[first.name].counted} samples of '
        f'{first.name}; the first reason: '
        f'{[*parts[first.name].reasons, "capture.keep"][0]}'
      )
    pace = estimate.pace(
      trials, first, left[first.name], guess.trial, here.workers
    )
  except (ValueError, OSError, NotImplementedError) as error:
    lacks.append(Lack('model or data', wording.of(error), ()))
    return lines_of.guessed(job, guess, here)
  sizes = {name: part.bytes for name, part in parts.items()}
  rows = {name: part.rows for name, part in parts.items()}
  lines += lines_of.tokens(parts)
  lines += lines_of.rejects(parts)
  lines += lines_of.store(job, here.width, rows, sizes)
  lines += lines_of.time(job, guess, here, parts, pace, first.name)
  groups = {name: job.groups(part.samples) for name, part in parts.items()}
  mean = max(rows[name].total / groups[name] for name in parts)
  return Told(lines, sum(each.total for each in sizes.values()), mean)


def _left(
  job: Job, split: Split, stores: dict[str, ActivationStore]
) -> np.ndarray:
  """The samples of the groups that nobody has committed, ascending."""
  samples = np.arange(len(split.rows))
  if split.name not in stores:
    return samples
  done = np.array(sorted(stores[split.name].committed()), np.int64)
  return samples[~np.isin(samples // job.capture.group, done)]


def open_splits(
  job: Job, stage: Stage
) -> tuple[list[Split] | None, list[Lack]]:
  """(the splits, what is missing); nothing is downloaded."""
  data = job.data
  away = not os.path.exists(os.path.expanduser(data.path))
  if data.source == 'hub' and data.path and away and not data.stream:
    error = f'{data.path} is not on this machine; capture would download it'
    return None, [needs.data(job, error)]
  try:
    return stage.open_splits(data), []
  except (ValueError, ImportError, OSError) as error:
    return None, [needs.data(job, wording.of(error))]


class _Rows:
  """A source of which nothing but its length is known."""

  blocks = None

  def __init__(self, count: int):
    self._count = count

  def __len__(self) -> int:
    return self._count


def guessed_samples(job: Job, guess: Guess) -> dict[str, int]:
  """Samples of each split of a source that is not here; {}: not known."""
  count = guess.samples
  if job.data.limit:
    count = min(job.data.limit, count or job.data.limit)
  if count < len(SPLITS):
    return {}
  parts = sources.split(_Rows(count), job.data)
  return {name: len(rows) for name, rows in parts.items()}
