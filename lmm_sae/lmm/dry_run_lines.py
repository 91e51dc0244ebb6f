"""The lines that a dry run of capture prints: (topic, text) pairs."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from lmm_sae.core import captured, forecast
from lmm_sae.core.forecast import Expected, Pace, Part, size, span
from lmm_sae.core.jobs import DEPTH, Job
from lmm_sae.core.sources import SPLITS, DataConfig, Split
from lmm_sae.core.tokens import Kind
from lmm_sae.lmm import needs
from lmm_sae.lmm.needs import Lack

Line = tuple[str, str]  # (topic, or '' for more of it; text)


@dataclasses.dataclass(frozen=True)
class Guess:
  """What the `plan` section says: used where nothing is here to measure.

  Attributes:
    samples, tokens, width: of the source, of a sample, D; 0: not known.
    trial: samples that are captured to measure by.
    devices: that will share the work, each like what is measured here.
  """

  samples: int
  tokens: int
  width: int
  trial: int
  devices: int


@dataclasses.dataclass(frozen=True)
class Stage:
  """How the capture stage opens things.

  Attributes:
    open_splits: the splits of a data section.
    capturers: those of a process, by split.
  """

  open_splits: Callable[[DataConfig], list[Split]]
  capturers: Callable[[Job], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Here:
  """What was found without running anything.

  Attributes:
    folder: of the model, if it has a config.json. width: D; 0: not known.
    splits: of the data; None: it is not here.
    samples: of each split; {}: not known. workers: processes of a run.
  """

  folder: pathlib.Path | None
  width: int
  weights: int | None
  device: needs.Device
  splits: list[Split] | None
  samples: Mapping[str, int]
  workers: int


@dataclasses.dataclass(frozen=True)
class Told:
  """A forecast.

  Attributes:
    bytes: that are still to be written; None: not known.
    group_rows: of a group, on average; None: not known.
  """

  lines: list[Line]
  bytes: float | None
  group_rows: float | None


def guessed(job: Job, guess: Guess, here: Here) -> Told:
  """What is known where something is missing."""
  opts, samples = job.capture, here.samples
  each = guess.tokens or opts.max_tokens
  about = 'plan.tokens' if guess.tokens else 'at most: capture.max_tokens'
  lines = [('', 'not measured, since something is missing (see below):')]
  if not samples:
    lines.append(('samples', 'not known: --config.plan.samples=N guesses them'))
  else:
    total = sum(samples.values())
    source = 'of the data' if here.splits is not None else 'by plan.samples'
    lines += [
      ('samples', f'{total:,} {source}: {by_split(samples)}'),
      ('tokens', f'{total * each:,} ({each:,} a sample, {about})'),
      ('', 'by kind: known once the model and the data are here'),
    ]
  rows = {}
  for name, count in samples.items():
    share = max(opts.choice(name).shares)
    rows[name] = Expected(count * each * share)
  exact = all(
    opts.choice(name).shares[kind] == 1
    for name in SPLITS
    for kind in Kind
    if kind != Kind.PADDING
  )
  most = 'all tokens' if exact else 'at most, the shares of kinds being unknown'
  keep = f'capture.keep={opts.keep}, keep_halves={opts.keep_halves}'
  lines.append(('rows kept', f'{most}; {keep}'))
  bytes_ = None
  if not here.width:
    lines.append(('store', 'not known: guess the width, --config.plan.width=D'))
  elif rows:
    one = forecast.row_bytes(here.width, len(job.lmm.layers), opts.store)
    sizes = {name: each.times(one) for name, each in rows.items()}
    bytes_ = sum(each.total for each in sizes.values())
    lines += store(job, here.width, rows, sizes)
  lines.append(
    ('hours', 'measured where the model and the data are, on a few samples')
  )
  mean = guess.tokens and opts.group * each * max(opts.choice('train').shares)
  return Told(lines, bytes_, mean or None)


def store(
  job: Job,
  width: int,
  rows: Mapping[str, Expected],
  sizes: Mapping[str, Expected],
) -> list[Line]:
  """The store: rows and bytes of each split, and of all."""
  layers = ', '.join(map(str, job.lmm.layers))
  one = forecast.row_bytes(width, len(job.lmm.layers), job.capture.store)
  lines = [
    (
      'store',
      f'{_size(summed(sizes))}, {number(summed(rows))} rows of {one:,} bytes',
    ),
    (
      '',
      f'D={width}, {job.capture.store}, layers {layers}, '
      f'{forecast.TOKEN_BYTES} bytes of token arrays a row',
    ),
  ]
  lines += [
    ('', f'{name:<6} {_size(sizes[name])}, {number(rows[name])} rows')
    for name in sizes
  ]
  return lines


def tokens(parts: Mapping[str, Part]) -> list[Line]:
  """Tokens by kind: what the model sees of them, and what is stored."""
  looked = {name: part.counted for name, part in parts.items()}
  seen = {name: summed(part.seen) for name, part in parts.items()}
  samples = sum(part.samples for part in parts.values())
  total = summed(seen)
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


def rejects(parts: Mapping[str, Part]) -> list[Line]:
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


def time(
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


def memory(job: Job, here: Here, told: Told, lacks: list[Lack]) -> list[Line]:
  """What the weights and the groups in work take; too much is a lack."""
  lines, cpu = [], here.device.name.startswith('CPU')
  weights = here.weights or 0
  where = f'on {here.device.name}, with {size(here.device.memory)}'
  if here.weights is None:
    lines.append(('weights', f'not known without its config.json; {where}'))
  else:
    copies = f', {here.workers} copies' if here.workers > 1 else ''
    lines.append(
      ('weights', f'{size(weights)} as {job.lmm.dtype}{copies}, {where}')
    )
  rows = 0
  if here.width:
    row = here.width * len(job.lmm.layers) * 2
    most = job.capture.buffer_bytes(here.width, len(job.lmm.layers))
    if told.group_rows is not None:
      rows = math.ceil(DEPTH * told.group_rows * row)
    about = f'about {size(rows)}, ' if rows else ''
    lines += [
      (
        'groups',
        f'{about}at most {size(most)} of memory in each of {here.workers} '
        f'processes: {DEPTH} groups of {job.capture.group} samples',
      )
    ]
  needed = here.workers * (weights + rows) if cpu else weights
  lacks += needs.memory(needed, here.device)
  return lines


def by_split(counts: Mapping[str, int]) -> str:
  return ', '.join(f'{name} {count:,}' for name, count in counts.items())


def summed(each: Mapping[str, Expected]) -> Expected:
  return functools.reduce(Expected.__add__, each.values(), Expected(0.0))


def number(about: Expected) -> str:
  """A count, with how far it may be off."""
  if not about.spread:
    return f'{about.total:,.0f}'
  return f'{about.total:,.0f} ± {about.spread:,.0f}'


def _size(about: Expected) -> str:
  return f'{size(about.total)}' + (
    f' ± {size(about.spread)}' if about.spread else ''
  )
