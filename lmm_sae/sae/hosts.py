"""Several processes that train as one.

    with hosts.joined(options):      # before any other use of jax
      hosts.agree(config)
      ...

Each process runs the same command. Which of how many it is, and where process 0
listens, comes from JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and
JAX_PROCESS_ID, from SLURM inside srun, or from a TPU pod. All of them hold the
same mesh, read the same workdir and take the same decisions; process 0 alone
writes logs, exports and the config, checkpoints are written by all.

Where one ends before its time the others end too, with another exit code than 0
and a message: at once where its connections break, within `silent_s` where it
merely falls silent. Nothing is repaired on the way: the same command in every
process goes on from the last checkpoint.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
LINGER_S = 3.0  # process 0 ends last: its end cuts the others' words short
PATIENCE_S = 30  # jax's own deadline comes later, since it aborts the process


@dataclasses.dataclass(frozen=True)
class HostsConfig:
  """The section `hosts` of the config; every field is explained there.

  Raises:
    ValueError: a field is out of bounds.
  """

  cluster: str
  join_s: int
  silent_s: int

  def __post_init__(self):
    if self.cluster not in ('auto', 'tpu', 'none'):
      raise ValueError(
        f'hosts.cluster is {self.cluster!r}; it is one of auto, tpu, none'
      )
    for field in ('join_s', 'silent_s'):
      if getattr(self, field) < 1:
        raise ValueError(
          f'hosts.{field} is {getattr(self, field)}; it must be at least 1'
        )


def first() -> bool:
  """Whether this is the process that writes what one process writes."""
  return jax.process_index() == 0


@contextlib.contextmanager
def joined(options: HostsConfig) -> Iterator[None]:
  """Meets the other processes of the run, where there are some.

  A process that fails among several ends at once, with exit code 2: the ways
  out that jax knows wait for the others, and then abort.

  Raises:
    ValueError: the environment names only part of what is needed.
  """
  found = _found(options.cluster, os.environ)
  if found is None:
    yield
    return
  try:
    _join(options, found)
    yield
    jax.distributed.shutdown()
  except BaseException as error:  # noqa: BLE001 - the process ends with it
    _end(error, last=found.get('process_id', 0) == 0)


def _found(cluster: str, env) -> dict[str, Any] | None:
  """What jax must be told of the run; None where this process is alone."""
  if cluster == 'none':
    return None
  if cluster == 'tpu':
    return {}
  named = [name for name in VARIABLES if name in env]
  if named:
    missing = [name for name in VARIABLES if name not in env]
    if missing:
      raise ValueError(
        f'{", ".join(named)} is set, {", ".join(missing)} is not: set all '
        'three in every process of the run, or none'
      )
    address, count, process = (env[name] for name in VARIABLES)
    if not (
      count.isdigit() and process.isdigit() and int(process) < int(count)
    ):
      raise ValueError(
        f'JAX_PROCESS_ID is {process} of JAX_NUM_PROCESSES {count}: processes '
        'are counted from 0'
      )
    return _several(
      int(count),
      coordinator_address=address,
      process_id=int(process),
      cluster_detection_method='deactivate',
    )
  if 'SLURM_STEP_NUM_TASKS' in env and 'SLURM_PROCID' in env:
    return _several(
      int(env['SLURM_STEP_NUM_TASKS']),
      process_id=int(env['SLURM_PROCID']),
      cluster_detection_method='slurm',
      **_devices(env),
    )
  return None


def _devices(env) -> dict[str, Any]:
  """Which GPUs of its node a task of SLURM takes, where jax must be told.

  jax gives the task of local number i the GPU i. An empty list is every GPU
  that the task sees: right where it is the only one on its node.
  """
  alone = re.fullmatch(
    r'1(\(x\d+\))?', env.get('SLURM_STEP_TASKS_PER_NODE', '')
  )
  if alone and 'JAX_LOCAL_DEVICE_IDS' not in env:
    return {'local_device_ids': []}
  return {}


def _several(count: int, **rest: Any) -> dict[str, Any] | None:
  return {'num_processes': count, **rest} if count > 1 else None


def _join(options: HostsConfig, found: dict[str, Any]) -> None:
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # Else SIGTERM, by which schedulers end a process, would be held back.
  jax.config.update('jax_enable_preemption_service', False)
  deadline = threading.Timer(options.join_s, _missed, (options, found))
  deadline.daemon = True
  deadline.start()
  try:
    jax.distributed.initialize(
      initialization_timeout=options.join_s + PATIENCE_S,
      heartbeat_timeout_seconds=options.silent_s,
      shutdown_timeout_seconds=options.silent_s,
      **found,
    )
  except ValueError as error:
    if found:
      raise
    raise ValueError(
      f'hosts.cluster is {options.cluster}, but jax finds no TPU slice here '
      f'({error}): set it to auto or none'
    ) from error
  finally:
    deadline.cancel()
  if not first():
    logging.set_verbosity(logging.WARNING)
  logging.info(
    'process 0 of %d, %d of %d devices',
    jax.process_count(),
    jax.local_device_count(),
    jax.device_count(),
  )


def _missed(options: HostsConfig, found: dict[str, Any]) -> None:
  """Ends this process, since it waited for the others in vain."""
  count = found.get('num_processes', 'the')
  where = found.get('coordinator_address', 'process 0, see SLURM or the slice')
  error = ValueError(
    f'not all of {count} processes met at {where} within hosts.join_s='
    f'{options.join_s} seconds: see the logs of the others, whether their '
    'machines reach that address, or raise hosts.join_s'
  )
  _end(error, last=False)


def _end(error: BaseException, *, last: bool) -> None:
  """Says what went wrong and ends this process."""
  text = f'{type(error).__name__}: {error}'
  if isinstance(error, ValueError | NotImplementedError | OSError):
    text = str(error)
  if isinstance(error, jax.errors.JaxRuntimeError) or 'Gloo' in text:
    text = (
      'another process of this run has ended or cannot be reached: see its '
      'log. The same command in every process goes on from the last checkpoint '
      f'({text.splitlines()[0]})'
    )
  elif not isinstance(error, ValueError | NotImplementedError | OSError):
    logging.error('what follows ended this process', exc_info=error)
  sys.stderr.write(f'lmm-sae: {text}\n')
  sys.stderr.flush()
  logging.flush()
  if last:
    time.sleep(LINGER_S)
  os._exit(130 if isinstance(error, KeyboardInterrupt) else 2)


def agree(fields: dict[str, Any]) -> None:
  """Refuses to go on where the processes were told different things.

  Args:
    fields: JSON values by name, each of which must be the same everywhere.

  Raises:
    ValueError: naming the fields that are not.
  """
  if jax.process_count() == 1:
    return
  names = sorted(fields)
  if _differ([_digest(names)]):
    raise ValueError(
      'the processes of this run have configs with different fields: they run '
      'different versions of this program'
    )
  differ = _differ([_digest(fields[name]) for name in names])
  if differ:
    mine = '; '.join(f'{names[at]} is {fields[names[at]]!r}' for at in differ)
    raise ValueError(
      f'the processes of this run were not told the same: {mine} in process '
      f'{jax.process_index()}, but not in every other; give all of them one '
      'config and one set of flags'
    )


def same_folder(path: pathlib.Path) -> None:
  """Refuses a workdir that not every process sees.

  Raises:
    ValueError: it is on a disk of one machine.
  """
  if jax.process_count() == 1:
    return
  number = np.random.default_rng().integers(2**31, dtype=np.int32)
  mark = path / f'.together-{told(number)}'
  if first():
    mark.touch()
  meet('marked')
  seen = mark.exists()
  everywhere = not _differ([seen])
  if first():
    mark.unlink()
  if not everywhere:
    raise ValueError(
      f'{path} is not one folder for all {jax.process_count()} processes: name '
      'a --workdir on a file system that they share'
    )


def told(value: int) -> int:
  """What process 0 says."""
  if jax.process_count() == 1:
    return int(value)
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def meet(what: str) -> None:
  """Waits until every process is there."""
  multihost_utils.sync_global_devices(what)


def fetch(tree: Any) -> Any:
  """The arrays of a tree whole in numpy, one after another; all must call."""

  def get(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable or x.is_fully_replicated:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(get, tree)


def _digest(value: Any) -> int:
  return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _differ(numbers: list[int]) -> list[int]:
  """At which places the processes have different numbers."""
  all_PN = multihost_utils.process_allgather(np.array(numbers, np.uint32))
  return np.flatnonzero((all_PN != all_PN[0]).any(0)).tolist()
