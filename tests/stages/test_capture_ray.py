"""Capture on a Ray cluster of this machine, whose actors are killed."""

import functools
import os
import subprocess
import sys

import pytest

from experiments import base
from lmm_sae.core import jobs, ray_workers, workers
from lmm_sae.core.workdir import Workdir
from lmm_sae.stages import capture
from tests import conftest, processes
from tests.core import makers
from tests.lmm import tiny_llava
from tests.stages import capture_killed, captures

TASKS = [('train', at) for at in range(5)]
WANTED = {task: 2 * task[1] for task in TASKS}


@pytest.fixture(scope='module')
def opts():
  return jobs.CaptureConfig(
    **{**base.get_config().capture, 'workers': 'ray', 'processes': 2}
  )


@pytest.fixture(scope='module')
def ray(opts):
  with pytest.MonkeyPatch.context() as patch:
    patch.delenv('RAY_ADDRESS', raising=False)
    patch.setattr(ray_workers.host, 'cores', lambda: 2)
    with ray_workers.cluster(opts) as ray:
      yield ray
  assert not ray.is_initialized()


def run(ray, opts, make):
  done = workers.run(TASKS, lambda _: ray_workers.RayWorker(ray, opts, make), 2)
  return {task: result[1] for task, result in done}


def test_actors_share_the_tasks_and_the_dead_are_replaced(ray, opts, tmp_path):
  assert run(ray, opts, makers.dying(tmp_path, {1, 3})) == WANTED


def test_a_group_that_fails_three_times_stops_the_run(ray, opts, tmp_path):
  with pytest.raises(
    ValueError, match=r'group 1 of train failed 3 times.*Ray worker died'
  ):
    run(ray, opts, makers.dying(tmp_path, {1}, times=9))


@pytest.mark.parametrize('error', [ValueError, ConnectionError])
def test_what_a_group_refuses_stops_the_run_in_its_own_words(ray, opts, error):
  make = functools.partial(makers.fails, error('no way to the hub'), 2)
  with pytest.raises(ValueError, match='no way to the hub'):
    run(ray, opts, make)


def test_nothing_is_left_of_a_run_that_stopped(ray, opts):
  """The cluster lives, and has place for as many workers as before."""
  run(ray, opts, makers.double)
  assert ray.is_initialized()
  assert ray_workers.fitting(ray, opts) == 2
  assert run(ray, opts, makers.double) == WANTED


def test_workers_that_fit_nowhere_are_refused(ray, opts):
  for field in ('ray_gpus', 'ray_cpus'):
    large = {**vars(opts), field: 64.0}
    with pytest.raises(ValueError, match=r'no host of the Ray cluster has'):
      ray_workers.fitting(ray, jobs.CaptureConfig(**large))


def test_a_cluster_that_is_named_is_joined_and_left_alone(ray, opts):
  code = (
    'from experiments import base\n'
    'from lmm_sae.core import jobs, ray_workers, workers\n'
    'from tests.core import makers\n'
    'opts = jobs.CaptureConfig(**base.get_config().capture)\n'
    'with ray_workers.cluster(opts) as ray:\n'
    '  assert len(ray.nodes()) == 1\n'
    '  assert ray_workers.fitting(ray, opts) == 2\n'
    '  start = lambda _: ray_workers.RayWorker(ray, opts, makers.double)\n'
    "  done = list(workers.run([('a', at) for at in range(3)], start, 1))\n"
    '  assert sorted(result[1] for _, result in done) == [0, 2, 4]\n'
    'assert not ray.is_initialized()\n'
  )
  address = ray.get_runtime_context().gcs_address
  done = subprocess.run(
    [sys.executable, '-c', code],
    env=os.environ | {'RAY_ADDRESS': address},
    cwd=conftest.ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert run(ray, opts, makers.double) == WANTED


def test_a_capture_whose_actors_are_killed_has_the_bytes_of_one_without_ray(
  ray, tmp_path, monkeypatch
):
  config = captures.config_of(
    tiny_llava.make(tmp_path / 'tiny'), captures.make_data(tmp_path)
  )
  config.capture.mix = True
  capture.run(config, Workdir.of(tmp_path / 'inline'))
  (tmp_path / 'died').mkdir()
  moments = [
    ('before-commit', capture_killed.kill),
    ('forward', capture_killed.ray_kill),
  ]
  dies = functools.partial(
    capture_killed.die_in_turn, str(tmp_path / 'died'), moments
  )
  monkeypatch.setattr(capture, 'make_group', dies)
  config.capture.workers = 'ray'
  config.capture.processes = 1
  capture.run(config, Workdir.of(tmp_path / 'ray'))
  assert len(list((tmp_path / 'died').iterdir())) == 2
  inline, shared = (
    captures.digest(Workdir.of(tmp_path / name)) for name in ('inline', 'ray')
  )
  assert inline == shared


def test_devices_and_what_ray_gives_must_agree(tmp_path):
  for device, gpus in (('cpu', 1.0), ('cuda', 0.0)):
    config = captures.config_of(
      tiny_llava.make(tmp_path / device), captures.make_data(tmp_path)
    )
    config.capture.workers = 'ray'
    config.capture.ray_gpus = gpus
    config.lmm.device = device
    with pytest.raises(ValueError, match='Ray hides the GPUs'):
      capture.run(config, Workdir.of(tmp_path / 'run'))


def test_without_the_package_the_extra_is_named(opts, monkeypatch):
  monkeypatch.setitem(sys.modules, 'ray', None)
  with (
    pytest.raises(ValueError, match=r'lmm_sae\[ray\]'),
    ray_workers.cluster(opts),
  ):
    pass


@pytest.mark.parametrize('port', [None, 99999])
def test_an_address_at_which_nobody_listens_is_refused_at_once(
  opts, monkeypatch, port
):
  """Ray itself would try for minutes."""
  address = f'127.0.0.1:{port or processes.free_port()}'
  monkeypatch.setenv('RAY_ADDRESS', address)
  monkeypatch.setattr('ray.is_initialized', lambda: False)
  with (
    pytest.raises(ValueError, match=f'no Ray cluster listens at {address}'),
    ray_workers.cluster(opts),
  ):
    pass
