"""A part of the data, counted and captured as `capture` would, to measure by.

`make` is what a worker does of it: it looks at samples without running the
model, which is cheap, or makes their rows and writes them into a store that is
thrown away. Nothing here writes into a workdir.
"""

import dataclasses
import functools
import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lmm_sae.core import forecast, records
from lmm_sae.core.jobs import Job, Task
from lmm_sae.core.sources import SPLITS, Split
from lmm_sae.core.store import ActivationStore, StoreMeta
from lmm_sae.core.tokens import Kind
from lmm_sae.lmm.groups import Capturer
from lmm_sae.lmm.llava import Subject

COUNT, RUN = 'count', 'run'
NEIGHBOURS = 8  # of a source whose rows are cheap to read together

Open = Callable[[Job], Mapping[str, Capturer]]  # by split; kept by the process


@dataclasses.dataclass(frozen=True)
class Draw:
  """Samples of a split that are looked at together."""

  split: str
  samples: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Trial:
  """All that a worker must know.

  Attributes:
    open: the capturers of a process. draws: by number of task.
    folder: of the stores that are thrown away.
    seconds: of counting in a process, once it has the model.
  """

  open: Open
  draws: tuple[Draw, ...]
  folder: str
  seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class Counted:
  """What samples hold; a sample S that is rejected holds nothing.

  Attributes:
    samples: those that there was time for.
    seen_SK, kept_SK: tokens by `Kind`, and those of them that are stored.
    bytes_S: of their records and images, on a disk.
    reasons: of those that are rejected.
    seconds: of reading and tokenising.
    vocab: bytes of the store's vocab.json.
  """

  split: str
  samples: tuple[int, ...]
  seen_SK: np.ndarray
  kept_SK: np.ndarray
  bytes_S: np.ndarray
  reasons: tuple[str, ...]
  seconds: float
  vocab: int


@dataclasses.dataclass(frozen=True)
class Ran:
  """What it took to capture samples.

  Attributes:
    samples: read or rejected; rows: stored.
    begin, end: on `time.monotonic`, which all processes of a machine share.
    pixels, forward, write: seconds of making inputs, of the model, and of
      writing and committing; the first passes beside the others.
  """

  split: str
  samples: int
  rows: int
  begin: float
  end: float
  pixels: float
  forward: float
  write: float


def draw(split: Split, left: Sequence[int], most: int, seed: int) -> np.ndarray:
  """Units of samples without preference: int64 [units, samples of a unit].

  A unit is one sample; of a source that reads in blocks, neighbours.

  Args:
    left: samples of the split that are drawn from, ascending.
    most: samples drawn at most; all are where there are no more.
  """
  left_S = np.asarray(left, np.int64)
  each = 1 if split.source.blocks is None else NEIGHBOURS
  if len(left_S) <= most or len(left_S) < 2 * each:
    return left_S[:, None]
  units = np.arange(len(left_S) // each)
  chosen = np.random.default_rng(seed).permutation(units)[
    : max(1, most // each)
  ]
  return left_S[chosen[:, None] * each + np.arange(each)]


_OPENING = threading.Lock()  # or two threads would load the model, each its own


def make(
  trial: Trial,
  job: Job,
  task: Task,
  stopped: Callable[[], bool] = lambda: False,
) -> Counted | Ran:
  """Does one task of a trial: (count or run, number of the draw).

  Raises:
    ValueError: the model, the data or the store cannot be had.
  """
  what, number = task
  drawn = trial.draws[number]
  with _OPENING:
    capturer = trial.open(job)[drawn.split]
  if what == COUNT:
    return _count(trial, capturer, number, stopped)
  return _run(trial, job, capturer, number, stopped)


@functools.lru_cache(maxsize=1)
def _until(trial: Trial) -> float:
  """When this process stops to count, on `time.monotonic`."""
  return time.monotonic() + trial.seconds


def _count(
  trial: Trial,
  capturer: Capturer,
  number: int,
  stopped: Callable[[], bool],
) -> Counted:
  drawn, until = trial.draws[number], _until(trial)
  files: list[int] = []  # bytes of what a sample keeps beside its record
  if drawn.split != 'train':
    capturer = dataclasses.replace(
      capturer, save=lambda name, data: files.append(forecast.blocks(len(data)))
    )
  samples, reasons = [], []
  seen_SK, kept_SK, bytes_S = [], [], []
  begin = time.monotonic()
  for sample in drawn.samples:
    if time.monotonic() > until and (samples or number >= len(SPLITS)):
      break
    files.clear()
    ready, rejects = capturer.read([sample], stopped)
    samples.append(sample)
    reasons += [reject['reason'] for reject in rejects]
    kinds_T = [each.tokens.kind_T for each in ready]
    seen_SK.append(_by_kind(kinds_T))
    kept_SK.append(
      _by_kind(
        kind_T[each.keep_N] for kind_T, each in zip(kinds_T, ready, strict=True)
      )
    )
    lines = [_line(records.to_json(each.record)) for each in ready]
    lines += [_line({**reject, 'group': 0}) for reject in rejects]
    bytes_S.append(sum(lines) + sum(files))
  seconds = time.monotonic() - begin
  return Counted(
    drawn.split,
    tuple(samples),
    np.array(seen_SK, np.int64).reshape(-1, len(Kind)),
    np.array(kept_SK, np.int64).reshape(-1, len(Kind)),
    np.array(bytes_S, np.int64),
    tuple(reasons),
    seconds,
    len(json.dumps(capturer.subject.vocab(), indent=1)) if not number else 0,
  )


def _by_kind(kinds: Iterable[np.ndarray]) -> np.ndarray:
  return sum(
    (np.bincount(kind_N, minlength=len(Kind)) for kind_N in kinds),
    np.zeros(len(Kind), np.int64),
  )


def _line(value: Any) -> int:
  """Bytes of a JSON line of the store."""
  return len(json.dumps(value, ensure_ascii=False).encode()) + 1


class _Timed:
  """A subject that notes how long its batches and its forwards take."""

  def __init__(self, subject: Subject):
    self._subject = subject
    self.pixels = self.forward = 0.0

  def __getattr__(self, name: str) -> Any:
    return getattr(self._subject, name)

  def batch(self, *args):
    begin = time.monotonic()
    found = self._subject.batch(*args)
    self.pixels += time.monotonic() - begin
    return found

  def rows(self, *args):
    begin = time.monotonic()
    found = self._subject.rows(*args)
    self.forward += time.monotonic() - begin
    return found


def _run(
  trial: Trial,
  job: Job,
  capturer: Capturer,
  number: int,
  stopped: Callable[[], bool],
) -> Ran:
  drawn, timed = trial.draws[number], _Timed(capturer.subject)
  begin = time.monotonic()
  store = _store(trial, job, capturer)
  capturer = dataclasses.replace(
    capturer,
    subject=timed,
    save=None if drawn.split == 'train' else store.keep,
  )
  rows = capturer.rows(drawn.samples, stopped)
  made = time.monotonic()
  store.write_group(
    number, rows.layers, rows.tokens, rows.samples, rows.rejects
  )
  end = time.monotonic()
  return Ran(
    drawn.split,
    len(drawn.samples),
    len(rows.tokens['sample']),
    begin,
    end,
    timed.pixels,
    timed.forward,
    end - made,
  )


def _store(trial: Trial, job: Job, capturer: Capturer) -> ActivationStore:
  """The store of a split that is thrown away; a draw is a group of it."""
  opts, subject, name = job.capture, capturer.subject, capturer.split.name
  meta = StoreMeta(
    split=name,
    model=subject.name,
    fingerprint='trial',
    layers=capturer.layers,
    layer_paths={},
    width=subject.width,
    grid=subject.grid,
    image_backend=subject.image_backend,
    mixed=capturer.mix,
    dtype=opts.store,
  )
  return ActivationStore.create(
    pathlib.Path(trial.folder) / name,
    meta,
    groups=len(trial.draws),
    group_rows=opts.group_rows,
    shard_rows=opts.shard_rows,
    chunk_rows=opts.chunk_rows,
  )
