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

from lmm_sae.core import sources, wording
from lmm_sae.core.jobs import Job
from lmm_sae.core.sources import SPLITS, Split
from lmm_sae.lmm import needs
from lmm_sae.lmm.measured import measured
from lmm_sae.lmm.needs import Lack
from lmm_sae.lmm.telling import Guess, Here, Tools, guessed, memory

WIDE = 79  # columns of a line


def tell(job: Job, guess: Guess, tools: Tools) -> list[str]:
  """The forecast, a topic a line; the last line is the verdict."""
  lines, lacks = [], needs.packages(job)
  if job.capture.workers == 'ray':  # no cluster is started for a forecast
    alone = dataclasses.replace(job.capture, workers='local', processes=1)
    lines = [('workers', 'capture.workers=ray: measured by one worker, here')]
    job = dataclasses.replace(job, capture=alone)
  here = look(job, guess, tools, lacks)
  if lacks:
    told = guessed(job, guess, here)
  else:
    told = measured(job, guess, tools, here, lacks)
  lines += told.lines
  lines += memory(job, here, told, lacks)
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


def look(job: Job, guess: Guess, tools: Tools, lacks: list[Lack]) -> Here:
  """Looks for everything; what is missing is added to `lacks`."""
  folder, missing = needs.weights(job.lmm.path)
  lacks += missing
  device, missing = needs.device(job)
  lacks += missing
  splits, missing = open_splits(job, tools)
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
    with tools.crew(job, folder, groups, None) as (_, workers, _):
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


def open_splits(
  job: Job, tools: Tools
) -> tuple[list[Split] | None, list[Lack]]:
  """(the splits, what is missing); nothing is downloaded."""
  data = job.data
  away = not os.path.exists(os.path.expanduser(data.path))
  if data.source == 'hub' and data.path and away and not data.stream:
    error = f'{data.path} is not on this machine; capture would download it'
    return None, [needs.data(job, error)]
  try:
    return tools.open_splits(data), []
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
