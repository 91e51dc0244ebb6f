"""Runs the subject once and stores its residual stream, token by token.

lmm-sae capture --config=experiments/tiny.py --workdir=runs/demo

Writes acts/train, acts/a and acts/b (`core.store`). The unit of work, of commit
and of resume is a group of samples: killed and run again, the same command ends
in the same bytes. This process writes; the subject runs in others where it is
small enough for one a core, and here where it is not.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from lmm_sae.core import host, places, progress, sources
from lmm_sae.core.sources import SPLITS, DataConfig, Item, Split
from lmm_sae.core.store import ActivationStore, StoreMeta
from lmm_sae.core.workdir import Workdir
from lmm_sae.lmm import folders

# Weights above this run in one process on all cores: their matrices are large
# enough for threads, and a copy a core would not fit the memory.
SMALL_BYTES = 256 * 2**20
MAX_PROCESSES = 16  # each takes about half a GB for torch alone

Task = tuple[str, int]  # (split, group)


@dataclasses.dataclass(frozen=True)
class CaptureConfig:
  """The `capture` section of a config: see experiments/base.py."""

  batch: int
  group: int
  max_tokens: int
  shard_rows: int
  chunk_rows: int
  mix: bool
  keep: tuple[str, ...]
  keep_halves: tuple[str, ...]
  store: str
  workers: str
  processes: int
  share: str
  ray_address: str
  ray_gpus: float
  ray_cpus: float

  def __post_init__(self):
    for name in ('batch', 'group', 'max_tokens', 'shard_rows', 'chunk_rows'):
      value = getattr(self, name)
      if value < 1:
        raise ValueError(f'capture.{name} is {value}; it must be at least 1')

  @property
  def group_rows(self) -> int:
    """Rows that a group may need, in whole shards."""
    shards = math.ceil(self.group * self.max_tokens / self.shard_rows)
    return shards * self.shard_rows


@dataclasses.dataclass(frozen=True)
class SubjectConfig:
  """The `lmm` section of a config: see experiments/base.py."""

  path: str
  layers: tuple[int, ...]
  device: str
  dtype: str
  threads: int

  def __post_init__(self):
    if not self.layers or len(set(self.layers)) != len(self.layers):
      raise ValueError(
        f'lmm.layers is {self.layers}: name each layer once, and at least one'
      )


@dataclasses.dataclass(frozen=True)
class Job:
  """All that a process needs to make any group."""

  lmm: SubjectConfig
  data: DataConfig
  capture: CaptureConfig
  workdir: Workdir

  @property
  def settings(self) -> dict[str, Any]:
    """The fields that decide what is stored."""
    fields = {
      'lmm': {'dtype': self.lmm.dtype},
      'data': dataclasses.asdict(self.data),
      'capture': dataclasses.asdict(self.capture),
    }
    return json.loads(json.dumps(fields))


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Captures what is not captured yet of every split."""
  job = Job(
    SubjectConfig(**{**config.lmm, 'layers': tuple(config.lmm.layers)}),
    DataConfig(**config.data),
    CaptureConfig(
      **{
        **config.capture,
        'keep': tuple(config.capture.keep),
        'keep_halves': tuple(config.capture.keep_halves),
      }
    ),
    workdir,
  )
  folder = folders.resolve(job.lmm.path)
  fingerprint = folders.fingerprint(folder)
  if _done(job, fingerprint):
    logging.info('capture: %s is complete', workdir.acts_root)
    return
  sizes = {split.name: len(split.rows) for split in open_splits(job.data)}
  small = job.lmm.device == 'cpu' and folders.size(folder) <= SMALL_BYTES
  groups = sum(math.ceil(size / job.capture.group) for size in sizes.values())
  cores = job.lmm.threads or host.cores()
  count = min(cores, groups, MAX_PROCESSES) if small else 1
  with _processes(job, count, threads=1 if small else 0) as (about, make):
    facts = about()
    stores = {
      name: _store(job, name, size, fingerprint, facts)
      for name, size in sizes.items()
    }
    tasks = [
      (name, group)
      for name, store in stores.items()
      for group in range(store.layout.groups)
      if group not in store.committed()
    ]
    done = zip(tasks, make(tasks), strict=True)
    for (name, _), rows in progress.track(
      done, total=len(tasks), what='capture: groups'
    ):
      stores[name].write_group(**vars(rows))
  for store in stores.values():
    store.seal()
    _check_not_empty(store)


def open_splits(data: DataConfig) -> list[Split]:
  """The three splits of the data that a config names."""
  if data.source == 'scenes':
    return [_scenes(name, data) for name in SPLITS]
  source = sources.open_source(data)
  parts = sources.split(source, data)
  return [Split(name, source, parts[name]) for name in SPLITS]


def _store(job, name, size, fingerprint, facts) -> ActivationStore:
  """The store of one split, open for writing."""
  opts = job.capture
  store = ActivationStore.create(
    job.workdir.acts(name),
    StoreMeta(
      split=name,
      fingerprint=fingerprint,
      layers=job.lmm.layers,
      config=job.settings,
      **facts['meta'],
    ),
    groups=math.ceil(size / opts.group),
    group_rows=opts.group_rows,
    shard_rows=opts.shard_rows,
    chunk_rows=opts.chunk_rows,
  )
  places.write_json(store.path / 'vocab.json', facts['vocab'])
  return store


def _done(job: Job, fingerprint: str) -> bool:
  """Whether all splits stand, of this model; nothing is loaded to find out."""
  stores = []
  for name in SPLITS:
    if not (job.workdir.acts(name) / 'meta.json').exists():
      return False
    stores.append(ActivationStore.open(job.workdir.acts(name), partial=True))
  done = all(
    store.complete
    and store.meta.fingerprint == fingerprint
    and store.meta.layers == job.lmm.layers
    and store.meta.config == job.settings
    for store in stores
  )
  for store in stores if done else ():
    _check_not_empty(store)
  return done


def _check_not_empty(store: ActivationStore) -> None:
  rejects = store.rejects()
  if rejects:
    logging.warning(
      'capture: %s: %d samples rejected, see rejects.jsonl; the first: %s: %s',
      store.path,
      len(rejects),
      rejects[0]['source'],
      rejects[0]['reason'],
    )
  if not store.num_rows:
    raise ValueError(
      f'no sample of {store.path} could be read; the first, '
      f'{rejects[0]["source"]}: {rejects[0]["reason"]}'
    )


# The processes that hold the subject.


@contextlib.contextmanager
def _processes(
  job: Job, count: int, threads: int
) -> Iterator[tuple[Callable[[], Any], Callable[[Sequence[Task]], Iterator]]]:
  """(about, make): the subject's facts, and the rows of tasks, in order.

  Args:
    count: processes; 1: this one.
    threads: of torch in each of them; 0: lmm.threads.
  """
  about = functools.partial(_about, job, threads)
  if count == 1:
    yield about, functools.partial(_make, job, threads)
    return
  pool = concurrent.futures.ProcessPoolExecutor(
    count, multiprocessing.get_context('spawn'), _start
  )
  try:
    yield (
      lambda: pool.submit(about).result(),
      functools.partial(pool.map, functools.partial(_make_one, job, threads)),
    )
  except BrokenProcessPool as error:
    raise ValueError(
      'a process of the capture died; if memory is short, lower '
      'capture.batch, or set lmm.threads=1; then run capture again'
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)


def _start() -> None:
  """Makes a process end with its parent, however that ends."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when
  parent = multiprocessing.parent_process()

  def watch() -> None:
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


@functools.cache
def _subject(lmm: SubjectConfig, threads: int):
  """The subject; torch is imported here and not before."""
  from lmm_sae.lmm.llava import Subject

  subject = Subject.load(
    lmm.path, lmm.device, lmm.dtype, threads or lmm.threads
  )
  for layer in lmm.layers:
    subject.layer(layer)  # ValueError if there is none
  return subject


@functools.cache
def _capturer(job: Job, threads: int, name: str):
  from lmm_sae.lmm.groups import Capturer

  (split,) = (each for each in open_splits(job.data) if each.name == name)
  return Capturer(
    subject=_subject(job.lmm, threads),
    split=split,
    layers=job.lmm.layers,
    folder=None if name == 'train' else job.workdir.acts(name),
    batch=job.capture.batch,
    group=job.capture.group,
    max_tokens=job.capture.max_tokens,
  )


def _about(job: Job, threads: int) -> dict[str, Any]:
  """What the store notes of the subject."""
  subject = _subject(job.lmm, threads)
  if job.data.source in ('scenes', 'llava'):
    subject.chat('hello')  # without a chat template no row could be read
  return {
    'meta': {
      'model': subject.name,
      'layer_paths': {str(at): subject.layer_path(at) for at in job.lmm.layers},
      'width': subject.width,
      'grid': subject.grid,
      'image_backend': subject.image_backend,
    },
    'vocab': subject.vocab(),
  }


def _make(job: Job, threads: int, tasks: Sequence[Task]) -> Iterator[Any]:
  """The rows of these groups, in order."""
  for name, group in itertools.groupby(tasks, key=lambda task: task[0]):
    yield from _capturer(job, threads, name).groups([at for _, at in group])


def _make_one(job: Job, threads: int, task: Task) -> Any:
  (rows,) = _make(job, threads, [task])
  return rows


# The scenes, as a source.


@dataclasses.dataclass(frozen=True)
class _Scenes:
  """The scenes of one split, each made when it is asked for."""

  split: str
  seed: int
  count: int

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Item:
    from lmm_sae.scenes import data

    return data.sample(self.split, self.seed, index)

  def name(self, index: int) -> str:
    return f'scene {index}'


def _scenes(name: str, data: DataConfig) -> Split:
  field = 'train' if name == 'train' else 'half'
  count = data.train if name == 'train' else data.half
  if count < 1:
    raise ValueError(f'data.{field} is {count}; it must be at least 1')
  count = min(count, data.limit or count)
  return Split(name, _Scenes(name, data.seed, count), range(count))
