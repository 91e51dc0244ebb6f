"""Runs the subject once and stores its residual stream, token by token.

lmm-sae capture --config=experiments/tiny.py --workdir=runs/demo

Writes acts/train, acts/a and acts/b (`core.store`). The unit of work, of commit
and of resume is a group of samples: killed and run again, the same command ends
in the same bytes. Whoever makes a group writes and commits it: a thread of this
process, a process a core where the model is small or a process a GPU, an actor
of a Ray cluster, or another command with another `capture.share`.
"""

import contextlib
import dataclasses
import functools
import os
import socket
import threading
import time
import zlib
from collections.abc import Callable

from absl import logging
from ml_collections import ConfigDict

from lmm_sae.core import (
  captured,
  host,
  jobs,
  places,
  progress,
  sources,
  workers,
)
from lmm_sae.core.jobs import CaptureConfig, Job, SubjectConfig, Task
from lmm_sae.core.sources import SPLITS, DataConfig, Item, Split
from lmm_sae.core.store import ActivationStore, StoreMeta
from lmm_sae.core.workdir import Workdir
from lmm_sae.lmm import crew, folders
from lmm_sae.lmm import dry_run as dry_run_lib
from lmm_sae.lmm.dry_run_lines import Guess, Stage


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Captures what is not captured yet of every split."""
  job = job_of(config, workdir)
  folder = folders.resolve(job.lmm.path)
  fingerprint = folders.fingerprint(folder)
  stores = captured.found(job, fingerprint)
  if len(stores) == len(SPLITS) and all(s.complete for s in stores.values()):
    logging.info('capture: %s is complete', workdir.acts_root)
    if any(map(captured.lacks_vocab, stores.values())):
      _opened(job)
    captured.finish(job, fingerprint)
    return
  tasks = _tasks(job, stores)
  _warn_of_memory(job)
  begin, seen = time.monotonic(), 0

  def rate() -> str:
    return f'{seen / (time.monotonic() - begin):.4g} tokens/s'

  with crew.crew(job, folder, len(tasks), make_group) as (
    start,
    count,
    attempts,
  ):
    done = workers.run(tasks, start, count, attempts)
    with contextlib.closing(done):
      for _, more in progress.track(
        done, total=len(tasks), what='capture: groups', note=rate
      ):
        seen += more
  logging.info(
    'capture: %d tokens of %d groups in %s, %s',
    seen,
    len(tasks),
    progress.clock(time.monotonic() - begin),
    rate(),
  )
  captured.finish(job, fingerprint)


def dry_run(config: ConfigDict, workdir: Workdir) -> None:
  """Prints what a capture lacks and would take: see `lmm.dry_run`."""
  plan = config.plan
  lines = dry_run_lib.tell(
    job_of(config, workdir),
    Guess(plan.samples, plan.tokens, plan.width, plan.trial, plan.devices),
    Stage(open_splits, _capturers),
  )
  print('\n'.join(lines))


def job_of(config: ConfigDict, workdir: Workdir) -> Job:
  """The sections of a config that a capture follows, checked."""
  return Job(
    SubjectConfig(**config.lmm),
    DataConfig(**config.data),
    CaptureConfig(**config.capture),
    workdir,
  )


def open_splits(data: DataConfig) -> list[Split]:
  """The three splits of the data that a config names."""
  if data.source == 'scenes':
    return [_scenes(name, data) for name in SPLITS]
  source = sources.open_source(data)
  parts = sources.split(source, data)
  return [Split(name, source, parts[name]) for name in SPLITS]


def _tasks(job: Job, stores: dict[str, ActivationStore]) -> list[Task]:
  """The groups that this command is to make, and nobody has made.

  Two commands that do the same begin at different places, and each leaves out
  what the other has committed when it comes there.
  """
  tasks = [
    (name, group)
    for split in open_splits(job.data)
    for name, group in job.tasks(split.name, len(split.rows))
    if name not in stores or group not in stores[name].committed()
  ]
  own = f'{socket.gethostname()} {os.getpid()}'.encode()
  first = zlib.crc32(own) % max(1, len(tasks))
  return tasks[first:] + tasks[:first]


def _warn_of_memory(job: Job) -> None:
  width = host.language_model(job.lmm.path).get('hidden_size', 0)
  size = job.capture.buffer_bytes(width, len(job.lmm.layers))
  if size > jobs.memory() / 2:
    logging.warning(
      'capture: two groups of %d samples, each of capture.max_tokens=%d, are '
      '%.1f GB of rows in a process; this machine has %.1f GB. If samples are '
      'that long, lower capture.group',
      job.capture.group,
      job.capture.max_tokens,
      size / 1e9,
      jobs.memory() / 1e9,
    )


# What every worker does.


def make_group(
  job: Job, task: Task, stopped: Callable[[], bool] = lambda: False
) -> int:
  """Makes a group and commits it, unless somebody has: its tokens, or 0.

  Raises:
    ValueError: the model, the data or the store cannot be had.
  """
  name, group = task
  with _OPENING:
    here = _opened(job)
  store, capturer = here.stores[name], here.capturers[name]
  with here.writing:
    store.refresh()
    if group in store.committed():
      return 0
  size, count = job.capture.group, len(capturer.split.rows)
  samples = range(group * size, min((group + 1) * size, count))
  rows = capturer.rows(samples, stopped)
  with here.writing:
    store.write_group(
      group, rows.layers, rows.tokens, rows.samples, rows.rejects
    )
  return rows.seen


@dataclasses.dataclass(frozen=True)
class _Opened:
  """The subject, the data and the stores, as one process has them open."""

  stores: dict[str, ActivationStore]
  capturers: dict  # of groups.Capturer, by split
  writing: threading.Lock = dataclasses.field(default_factory=threading.Lock)


_OPENING = threading.Lock()  # or two threads would load the model, each its own


@functools.lru_cache(maxsize=1)
def _opened(job: Job) -> _Opened:
  found = _capturers(job)
  stores = {
    name: _store(job, each.subject, each.split) for name, each in found.items()
  }
  return _Opened(
    stores,
    {
      name: dataclasses.replace(
        each, save=None if name == 'train' else stores[name].keep
      )
      for name, each in found.items()
    },
  )


@functools.lru_cache(maxsize=1)
def _capturers(job: Job) -> dict:
  """The `groups.Capturer` of each split, which keep no images."""
  subject, turn = load_subject(job), threading.Lock()
  return {
    split.name: dataclasses.replace(capturer(job, subject, split), turn=turn)
    for split in open_splits(job.data)
  }


def load_subject(job: Job):
  """The subject; torch is imported here and not before."""
  from lmm_sae.lmm.llava import Subject

  lmm = job.lmm
  if lmm.device == 'cpu':
    host.keep_freed_memory()
  subject = Subject.load(lmm.path, lmm.device, lmm.dtype, lmm.threads)
  for layer in lmm.layers:
    subject.layer(layer)  # ValueError if there is none
  if job.data.source in ('scenes', 'llava') and job.data.template == 'chat':
    subject.chat('hello')  # without a chat template no row could be read
  return subject


def capturer(job: Job, subject, split: Split):
  """The `groups.Capturer` of a split, which keeps no images."""
  from lmm_sae.lmm.groups import Capturer

  return Capturer(
    subject=subject,
    split=split,
    layers=job.lmm.layers,
    choice=job.capture.choice(split.name),
    seed=job.data.seed,
    mix=job.capture.mixed(split.name),
    template=job.data.template,
    save=None,
    batch=job.capture.batch,
    max_tokens=job.capture.max_tokens,
  )


def _store(job: Job, subject, split: Split) -> ActivationStore:
  """The store of one split, open for writing."""
  opts, name = job.capture, split.name
  store = ActivationStore.create(
    job.workdir.acts(name),
    StoreMeta(
      split=name,
      model=subject.name,
      fingerprint=folders.fingerprint(folders.resolve(job.lmm.path)),
      layers=job.lmm.layers,
      layer_paths={str(at): subject.layer_path(at) for at in job.lmm.layers},
      width=subject.width,
      grid=subject.grid,
      image_backend=subject.image_backend,
      mixed=opts.mixed(name),
      dtype=opts.store,
      config={**job.settings, captured.CONTENT: split.source.content},
    ),
    groups=job.groups(len(split.rows)),
    group_rows=opts.group_rows,
    shard_rows=opts.shard_rows,
    chunk_rows=opts.chunk_rows,
  )
  if not (store.path / 'vocab.json').exists():
    places.write_json(store.path / 'vocab.json', subject.vocab())
  return store


# The scenes, as a source.


@dataclasses.dataclass(frozen=True)
class _Scenes:
  """The scenes of one split, each made when it is asked for."""

  split: str
  seed: int
  count: int
  blocks: None = None  # any order is as good
  content: str = 'scenes'  # which follow from what the command says

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Item:
    from lmm_sae.scenes import data

    return data.sample(self.split, self.seed, index)

  def name(self, index: int) -> str:
    return f'scene {index}'


def _scenes(name: str, data: DataConfig) -> Split:
  count = data.train if name == 'train' else data.half
  count = min(count, data.limit or count)
  return Split(name, _Scenes(name, data.seed, count), range(count))
