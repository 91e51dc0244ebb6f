"""Workers of a Ray cluster: one actor each, on any of its hosts.

A cluster that is named, or that this process has joined already, is used and
left as it was; without one, a cluster of this machine is started and ended.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from absl import logging

from lmm_sae.core import host
from lmm_sae.core.jobs import DEPTH, CaptureConfig, Task
from lmm_sae.core.workers import LostError, Make, Outcome, attempt

ATTEMPTS = 3  # of a group; a cluster loses hosts
HEARD_S = 10.0  # within which a cluster must take a connection


@contextlib.contextmanager
def cluster(config: CaptureConfig) -> Iterator[Any]:
  """The module `ray`, connected.

  Raises:
    ValueError: the package is absent, or the cluster cannot be reached.
  """
  os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
  try:
    import ray
  except ImportError as error:
    raise ValueError(
      'capture.workers=ray needs the package `ray`: '
      "pip install 'lmm_sae[ray]', or set capture.workers=local"
    ) from error
  if ray.is_initialized():
    yield ray
    return
  address = config.ray_address or os.environ.get('RAY_ADDRESS', '')
  _check_heard(address)
  options = {'num_cpus': host.cores()} if not address else {}
  try:
    ray.init(
      address=address or 'local',
      include_dashboard=None if address else False,
      log_to_driver=False,
      logging_level='error',
      **options,
    )
  except (ConnectionError, RuntimeError, ValueError) as error:
    raise ValueError(
      f'the Ray cluster {address or "of this machine"} cannot be reached: '
      f'{error}'
    ) from error
  try:
    yield ray
  finally:
    ray.shutdown()


def _check_heard(address: str) -> None:
  """Refuses host:port where nobody listens; Ray would wait for minutes."""
  name, _, port = address.removeprefix('ray://').rpartition(':')
  if not (name and port.isdigit()):
    return  # auto, or none
  try:
    socket.create_connection((name, int(port)), HEARD_S).close()
  except (OSError, OverflowError) as error:
    raise ValueError(
      f'no Ray cluster listens at {address} (capture.ray_address or '
      f'RAY_ADDRESS): {error}'
    ) from error


def fitting(ray: Any, config: CaptureConfig) -> int:
  """How many workers the cluster's hosts have place for.

  Raises:
    ValueError: none.
  """
  hosts = [each['Resources'] for each in ray.nodes() if each['Alive']]
  wants = {'CPU': config.ray_cpus, 'GPU': config.ray_gpus}
  wants = {name: count for name, count in wants.items() if count}
  found = sum(
    int(min(each.get(name, 0) / count for name, count in wants.items()))
    for each in hosts
  )
  if not found:
    raise ValueError(
      f'no host of the Ray cluster has {wants}, what one worker takes '
      f'(capture.ray_cpus, capture.ray_gpus): {len(hosts)} hosts'
    )
  return found


class RayWorker:
  """Does tasks in an actor, `DEPTH` of them at once."""

  lasts = False
  depth = DEPTH

  def __init__(self, ray: Any, config: CaptureConfig, make: Make):
    self._ray = ray
    kind = ray.remote(
      num_cpus=config.ray_cpus,
      num_gpus=config.ray_gpus,
      max_concurrency=DEPTH,
      max_restarts=0,  # `workers.run` starts another
      max_task_retries=0,
    )(_Actor)
    self._actor = kind.remote(make)

  def ready(self) -> Future:
    return self._future(self._actor.ready.remote())

  def submit(self, task: Task) -> 'Future[Outcome]':
    return self._future(self._actor.make.remote(task))

  def stop(self) -> None:
    self._ray.kill(self._actor)

  def _future(self, reference: Any) -> Future:
    """The reference as a future that fails with LostError alone."""
    given, future = reference.future(), Future()

    def done(given: Future) -> None:
      error = given.exception()
      if error is None:
        future.set_result(given.result())
      else:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        logging.debug('capture: a Ray worker: %s', error)
        future.set_exception(LostError(f'its Ray worker died ({reason[0]})'))

    given.add_done_callback(done)
    return future


class _Actor:
  """What runs on the host."""

  def __init__(self, make: Make):
    self._make = make

  def ready(self) -> None:
    pass

  def make(self, task: Task) -> Outcome:
    return attempt(self._make, task, lambda: False)
