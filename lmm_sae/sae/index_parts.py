"""Makes the parts of an index: by this process, by several, by several hosts.

parts/plan.json, which whoever comes first writes, says what the index is made
of and where its parts begin. Each part is made by itself, as a folder that is
whole or not there: whoever finds that all stand merges them.
"""

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing import connection

import jax
import numpy as np

from lmm_sae.core import duplicates, index_build, progress
from lmm_sae.core.store import ActivationStore
from lmm_sae.sae import exports
from lmm_sae.sae.index_plan import IndexConfig, Job, Plan, chunks, held

PARTS = 4  # that a further process must have to make, to be worth its start
TOKENS = ('sample', 'position', 'token', 'kind', 'image', 'row', 'col')


def make(job: Job, plan: Plan, sae: exports.Sae) -> None:
  """Makes those parts of this command's share that do not stand."""
  first, of = job.opts.turn()
  mine = [at for at in plan.begins[first::of] if not job.part(at).exists()]
  count = _processes(job.opts, len(mine))
  if count <= 1:
    _work(job, plan, mine, sae)
    return
  context = multiprocessing.get_context('spawn')
  workers = []
  for i in range(count):
    pipe, theirs = context.Pipe(duplex=False)
    worker = context.Process(
      target=_serve, args=(theirs, job, plan, mine[i::count]), daemon=True
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
  pipe: connection.Connection, job: Job, plan: Plan, mine: list[int]
) -> None:
  """A process: makes its parts, and says how it ended."""
  error = None
  try:
    _work(job, plan, mine, job.sae())
  except (ValueError, RuntimeError, OSError, MemoryError) as raised:
    error = raised
  pipe.send(error)
  pipe.close()


def _work(job: Job, plan: Plan, mine: Sequence[int], sae: exports.Sae) -> None:
  if not mine:
    return
  store = ActivationStore.open(job.acts)
  samples = store.samples()
  spans = [store.span(sample) for sample in samples]
  latents, opts = sae.config.latents, job.opts
  shape = job.shape(store, latents)
  duplicate_S = near_duplicates(job, store)
  most = held(latents, opts.memory_mb)
  edges = {start for start, _ in store.ranges}
  floors, seen = {}, set()
  ends = dict(zip(plan.begins, [*plan.begins[1:], len(spans)], strict=True))
  parent = multiprocessing.parent_process()
  for at in progress.track(
    mine, what=f'index {job.layer}/{store.meta.split}: parts'
  ):
    if parent is not None and not parent.is_alive():
      return
    if job.part(at).exists():
      continue
    _raise_floors(job, plan.begins, floors, seen, shape)
    part = index_build.Part(shape, duplicate_S, floors, job.part(at), most)
    for start, stop in chunks(spans[at : ends[at]], plan.rows, edges):
      tokens = store.tokens(start, stop, TOKENS)
      x_ND = store.read(job.layer, start, stop)
      codes = [
        sae.encode(x_ND[i : i + plan.encoded])
        for i in range(0, len(x_ND), plan.encoded)
      ]
      part.add(tokens, *map(np.concatenate, zip(*codes, strict=True)))
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
