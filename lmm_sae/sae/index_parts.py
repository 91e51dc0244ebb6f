"""Makes the parts of an index: by this process, by several, by several hosts.

parts/plan.json, which whoever comes first writes, says what the index is made
of and where its parts begin. Each part is made by itself, as a folder that is
whole or not there: whoever finds that all stand merges them.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import re
from collections.abc import Collection, Iterator, Sequence
from multiprocessing import connection

import jax
import numpy as np
from absl import logging

from lmm_sae.core import duplicates, index_build, progress, records
from lmm_sae.core.index import FORMAT_VERSION
from lmm_sae.core.places import Place
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import exports, share
from lmm_sae.sae import mesh as mesh_lib

PART_SAMPLES = 256  # of a part: so much is lost when work is broken off
PARTS = 4  # that a further process must have to make, to be worth its start
CHUNK_BYTES = 800  # a firing, while a chunk is added
COPIES = 3  # of what a part holds, while it is sorted
MB = 1 << 20
TOKENS = ('sample', 'position', 'token', 'kind', 'image', 'row', 'col')


@dataclasses.dataclass(frozen=True)
class IndexConfig:
  """The section `index` of the config; its fields are explained there."""

  splits: tuple[str, ...]
  rows: int
  exemplars: int
  text_exemplars: int
  context: int
  threshold: float
  always_on: float
  spread: int = 10
  seed: int = 0
  memory_mb: int = 2048
  processes: int = 0
  share: str = ''
  dictionaries: tuple[str, ...] = ()
  latent: int = -1
  sample: int = -1

  def __post_init__(self):
    if self.rows < 1:
      raise ValueError(f'index.rows is {self.rows}; it must be at least 1')
    if not 0 < self.always_on <= 1:
      raise ValueError(
        f'index.always_on is {self.always_on}; it is a share: above 0, up to 1'
      )
    if self.memory_mb < 1 or self.processes < 0:
      raise ValueError(
        f'index.memory_mb is {self.memory_mb} and index.processes '
        f'{self.processes}; they must be at least 1 and 0'
      )
    unknown = [d for d in self.dictionaries if d not in records.DICTIONARIES]
    if unknown:
      raise ValueError(
        f'index.dictionaries holds {unknown[0]!r}; there are '
        f'{", ".join(records.DICTIONARIES)}'
      )
    self.turn()

  def turn(self) -> tuple[int, int]:
    """(i, n): this command makes parts i, i + n, ...

    Raises:
      ValueError: `share` is no i/n with 0 <= i < n.
    """
    if not self.share:
      return 0, 1
    found = re.fullmatch(r'(\d+)/(\d+)', self.share)
    if not found or int(found[1]) >= int(found[2]):
      raise ValueError(
        f'index.share is {self.share!r}; of n commands they are 0/n to '
        'n-1/n, as 0/2 and 1/2'
      )
    return int(found[1]), int(found[2])

  def settings(self) -> dict:
    """What decides the index, whoever makes it and in whatever memory."""
    names = ('exemplars', 'text_exemplars', 'context', 'threshold',
             'always_on', 'spread', 'seed')  # fmt: skip
    return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class Job:
  """One index to build; it travels to other processes.

  Attributes:
    path: of the index; acts: of the split's store.
    dictionary: '' is the SAE; seed: of an untrained one.
  """

  path: pathlib.Path
  acts: Place
  workdir: Workdir
  layer: int
  dictionary: str
  opts: IndexConfig
  seed: int = 0

  def sae(self) -> exports.Sae:
    """The SAE, its rows shared by all devices of this process."""
    devices = jax.local_devices()
    mesh = mesh_lib.make(0, found=devices) if len(devices) > 1 else None
    if not self.dictionary:
      found = self.workdir.require(self.workdir.export(self.layer), 'train')
      return exports.load(found, mesh=mesh)
    from lmm_sae.sae import dictionaries

    return dictionaries.load(
      self.workdir, self.layer, self.dictionary, self.seed, mesh
    )

  def part(self, at: int) -> pathlib.Path:
    return self.path / 'parts' / f'{at:08d}'

  def shape(self, store: ActivationStore, latents: int) -> index_build.Shape:
    return index_build.Shape(
      latents=latents,
      grid=store.meta.grid,
      exemplars=self.opts.exemplars,
      texts=self.opts.text_exemplars,
      context=self.opts.context,
      threshold=self.opts.threshold,
      spread=self.opts.spread,
      seed=self.opts.seed,
    )


def source(store: ActivationStore, opts: IndexConfig, sae: exports.Sae) -> str:
  """What an index is made of, as a short text; equal text, equal index."""
  rest = hashlib.blake2b(digest_size=6)
  meta = records.to_json(store.meta) | {
    'samples': len(store.samples()),
    'rows': store.num_rows,
    'index': opts.settings() | {'format': FORMAT_VERSION},
  }
  rest.update(json.dumps(meta, sort_keys=True).encode())
  return f'sae {share.firing(sae)}, store and settings {rest.hexdigest()}'


def chunk_rows(
  spans: Sequence[tuple[int, int]], latents: int, k: int, memory_mb: int
) -> int:
  """How many rows may be added at a time: they take half of the memory.

  Raises:
    ValueError: the largest sample has more.
  """
  rows = _free(latents, memory_mb) // 2 // (k * CHUNK_BYTES)
  least = max(stop - start for start, stop in spans)
  if rows < least:
    needs = 2 * least * k * CHUNK_BYTES + latents * index_build.LATENT_BYTES
    raise ValueError(
      f'index.memory_mb is {memory_mb}, but a sample of {least} tokens with '
      f'{k} of {latents} latents each needs {needs // MB + 1}: set it to that '
      'at least'
    )
  return rows


def _free(latents: int, memory_mb: int) -> int:
  return max(memory_mb * MB - latents * index_build.LATENT_BYTES, 0)


def plan(job: Job, made_of: str, begins: list[int]) -> list[int]:
  """Where the parts begin: as whoever came first has written.

  Raises:
    ValueError: parts of something else stand there.
  """
  note = job.path / 'parts' / 'plan.json'
  if not note.exists():
    own = note.with_name(f'plan.{os.getpid()}.json')
    records.write_json(own, {'source': made_of, 'begins': begins})
    try:
      os.link(own, note)  # unlike a renamed one it replaces none
    except FileExistsError:
      logging.info('index: another command has planned %s', job.path)
    own.unlink()
  found = json.loads(note.read_text())
  if found['source'] != made_of:
    raise ValueError(
      f'{job.path} was made of other activations, another SAE or other '
      f'settings ({found["source"]}, now {made_of}): delete that folder to '
      'make it again'
    )
  return found['begins']


def make(job: Job, begins: list[int], sae: exports.Sae) -> None:
  """Makes those parts of this command's share that do not stand."""
  first, of = job.opts.turn()
  mine = [at for at in begins[first::of] if not job.part(at).exists()]
  count = _processes(job.opts, len(mine))
  if count <= 1:
    _work(job, begins, mine, sae)
    return
  context = multiprocessing.get_context('spawn')
  workers = []
  for i in range(count):
    pipe, theirs = context.Pipe(duplex=False)
    worker = context.Process(
      target=_serve, args=(theirs, job, begins, mine[i::count]), daemon=True
    )
    worker.start()
    theirs.close()
    workers.append((worker, pipe))
  try:
    waiting = {pipe: worker for worker, pipe in workers}
    while waiting:
      for pipe in connection.wait(list(waiting)):
        worker = waiting.pop(pipe)
        try:
          error = pipe.recv()
        except EOFError:
          worker.join()
          error = RuntimeError(
            f'a process that made parts of {job.path} ended with '
            f'{worker.exitcode}: run the same command again, with less '
            'index.memory_mb or fewer index.processes if memory ran out'
          )
        if error is not None:
          raise error
  finally:
    for worker, _ in workers:
      worker.terminate()
      worker.join()


def _processes(opts: IndexConfig, parts: int) -> int:
  """How many processes make so many parts."""
  if jax.default_backend() != 'cpu':
    if opts.processes > 1:
      raise ValueError(
        f'index.processes is {opts.processes}, but one process drives all '
        f'{jax.default_backend()} devices of a host: set it to 1'
      )
    return 1
  if opts.processes:
    return min(opts.processes, parts)
  return min(len(os.sched_getaffinity(0)), parts // PARTS)


def _serve(
  pipe: connection.Connection, job: Job, begins: list[int], mine: list[int]
) -> None:
  """A process: makes its parts, and says how it ended."""
  error = None
  try:
    _work(job, begins, mine, job.sae())
  except (ValueError, RuntimeError, OSError, MemoryError) as raised:
    error = raised
  pipe.send(error)
  pipe.close()


def _work(
  job: Job, begins: list[int], mine: Sequence[int], sae: exports.Sae
) -> None:
  if not mine:
    return
  store = ActivationStore.open(job.acts)
  samples = store.samples()
  spans = [store.span(sample) for sample in samples]
  latents, opts = sae.config.latents, job.opts
  shape = job.shape(store, latents)
  duplicate_S = near_duplicates(job, store)
  rows = chunk_rows(spans, latents, sae.config.most, opts.memory_mb)
  most = _free(latents, opts.memory_mb) // 2 // COPIES
  edges = {start for start, _ in store.ranges}
  floors, seen = {}, set()
  ends = dict(zip(begins, [*begins[1:], len(spans)], strict=True))
  parent = multiprocessing.parent_process()
  for at in progress.track(
    mine, what=f'index {job.layer}/{store.meta.split}: parts'
  ):
    if parent is not None and not parent.is_alive():
      return
    if job.part(at).exists():
      continue
    _raise_floors(job, begins, floors, seen, shape)
    part = index_build.Part(shape, duplicate_S, floors, job.part(at), most)
    for start, stop in chunks(
      spans[at : ends[at]], min(opts.rows, rows), edges
    ):
      tokens = store.tokens(start, stop, TOKENS)
      part.add(tokens, *sae.encode(store.read(job.layer, start, stop)))
    part.save(job.part(at))


def _raise_floors(
  job: Job,
  begins: Sequence[int],
  floors: dict[str, np.ndarray],
  seen: set[int],
  shape: index_build.Shape,
) -> None:
  """Takes over what the parts that stand by now keep."""
  for at in set(begins) - seen:
    part = job.part(at)
    if not part.exists():
      continue
    seen.add(at)
    for name in shape.keeps():
      floor_M = np.load(part / f'floor.{name}.npy')
      floors[name] = np.maximum(floors.get(name, floor_M), floor_M)


def near_duplicates(job: Job, store: ActivationStore) -> np.ndarray:
  """`duplicates.firsts` of the split; kept among the parts."""
  file = job.path / 'parts' / 'duplicate.npy'
  if not file.exists():
    own = file.with_name(f'duplicate.{os.getpid()}.npy')
    np.save(own, _duplicates(store, store.samples()[-1].sample + 1))
    own.replace(file)
  return np.load(file)


def _duplicates(store: ActivationStore, size: int) -> np.ndarray:
  """For each sample, the first one whose image is nearly the same."""
  duplicate_S = np.arange(size)
  samples, thumbnails = [], []
  for sample in store.samples():
    if sample.image:
      samples.append(sample.sample)
      thumbnails.append(duplicates.thumbnail(store.image(sample.sample)))
  if samples:
    places = np.array(samples)
    duplicate_S[places] = places[duplicates.firsts(thumbnails)]
  return duplicate_S


def chunks(
  spans: Sequence[tuple[int, int]], rows: int, edges: Collection[int] = ()
) -> Iterator[tuple[int, int]]:
  """(start, stop) of runs of whole, adjoining samples, about `rows` long.

  None goes over an edge, where another group of the store begins.
  """
  start = stop = spans[0][0]
  for first, last in spans:
    full = stop > start and last - start > rows
    if first != stop or full or first in edges:
      if stop > start:
        yield start, stop
      start = first
    stop = last
  if stop > start:
    yield start, stop
