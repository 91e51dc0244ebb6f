"""Who makes the groups: threads here, processes, or actors of a Ray cluster."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from lmm_sae.core import host, local_workers, ray_workers, workers
from lmm_sae.core.jobs import DEPTH, Job, Task
from lmm_sae.lmm import folders

# Weights above this run in one process on all cores: their matrices are large
# enough for threads, and a copy a core would not fit the memory.
SMALL_BYTES = 256 * 2**20
MAX_PROCESSES = 16  # each takes about half a GB for torch alone
ATTEMPTS = 2  # of a group on this machine

# work(job, task, stopped): what a worker does.
Work = Callable[[Job, Task, Callable[[], bool]], Any]


@contextlib.contextmanager
def crew(
  job: Job, folder: pathlib.Path, tasks: int, work: Work
) -> Iterator[tuple[Callable[[int], workers.Worker], int, int]]:
  """(start, count, attempts), as `workers.run` takes them.

  Args:
    folder: of the model.
    tasks: how many there are.
    work: what a worker does of a job.
  """
  is_small = small(job, folder)
  opts, cores = job.capture, job.lmm.threads or host.cores()
  if opts.workers == 'ray' and tasks:
    _check_ray(job)
    with ray_workers.cluster(opts) as ray:
      count = opts.processes or ray_workers.fitting(ray, opts)
      threads = job.lmm.threads or max(1, int(opts.ray_cpus))
      make = _maker(job, work, threads=1 if is_small else threads)
      yield (
        lambda _: ray_workers.RayWorker(ray, opts, make),
        count,
        ray_workers.ATTEMPTS,
      )
    return
  gpus = _gpus() if job.lmm.device == 'cuda' else 0
  usual = min(cores, MAX_PROCESSES) if is_small else max(1, gpus)
  count = min(opts.processes or usual, tasks)
  threads = 1 if is_small else job.lmm.threads or max(1, cores // max(1, count))
  # Where every core is busy and waits for nothing, two at once only disturb.
  busy = is_small and count >= host.cores() and not _waits(job)

  def start(at: int) -> workers.Worker:
    device = f'cuda:{at % gpus}' if gpus > 1 else job.lmm.device
    make = _maker(job, work, threads, device)
    kind = local_workers.Process if count > 1 else local_workers.Thread
    return kind(make, depth=1 if busy else DEPTH)

  yield start, count, ATTEMPTS


def small(job: Job, folder: pathlib.Path) -> bool:
  """Whether each core has a copy of the model of that folder."""
  return job.lmm.device == 'cpu' and folders.size(folder) <= SMALL_BYTES


def _waits(job: Job) -> bool:
  """Whether reading or writing a group waits for a disk or a network."""
  return job.data.source != 'scenes' or not job.workdir.acts('train').local


def _maker(
  job: Job, work: Work, threads: int, device: str = ''
) -> workers.Make:
  """`work` of a process that has so many threads, and that device."""
  lmm = dataclasses.replace(
    job.lmm, threads=threads, device=device or job.lmm.device
  )
  return functools.partial(work, dataclasses.replace(job, lmm=lmm))


def _check_ray(job: Job) -> None:
  wants_gpu = job.lmm.device != 'cpu'
  if wants_gpu != bool(job.capture.ray_gpus):
    raise ValueError(
      f'lmm.device is {job.lmm.device!r} and capture.ray_gpus '
      f'{job.capture.ray_gpus}: Ray hides the GPUs from workers that take '
      'none, and those that take some must use them'
    )


def _gpus() -> int:
  import torch

  return torch.cuda.device_count()
