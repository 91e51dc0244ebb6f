"""What a process finds out about its run; runs of several are in stages/."""

import os
import types

import pytest

from lmm_sae.core import host
from lmm_sae.sae import hosts
from lmm_sae.sae.hosts import HostsConfig

JAX = {
  'JAX_COORDINATOR_ADDRESS': 'n7:1234',
  'JAX_NUM_PROCESSES': '4',
  'JAX_PROCESS_ID': '3',
}
# What srun sets in the third of three tasks, one on each of three nodes.
SLURM = {
  'SLURM_JOB_ID': '77',
  'SLURM_STEP_NODELIST': 'gpu[07-09]',
  'SLURM_STEP_NUM_NODES': '3',
  'SLURM_STEP_NUM_TASKS': '3',
  'SLURM_STEP_TASKS_PER_NODE': '1(x3)',
  'SLURM_NTASKS': '3',
  'SLURM_PROCID': '2',
  'SLURM_LOCALID': '0',
}


def test_a_process_by_itself_joins_nobody():
  assert hosts._found('auto', {}) is None


def test_jax_variables_name_the_run():
  assert hosts._found('auto', JAX) == {
    'coordinator_address': 'n7:1234',
    'num_processes': 4,
    'process_id': 3,
    'cluster_detection_method': 'deactivate',
  }


def test_jax_variables_come_before_slurm():
  assert hosts._found('auto', SLURM | JAX)['process_id'] == 3


def test_a_run_of_one_process_joins_nobody():
  one = {'JAX_NUM_PROCESSES': '1', 'JAX_PROCESS_ID': '0'}
  assert hosts._found('auto', JAX | one) is None


@pytest.mark.parametrize('missing', list(JAX))
def test_part_of_the_jax_variables_is_refused(missing):
  env = {name: value for name, value in JAX.items() if name != missing}
  with pytest.raises(ValueError, match=rf'{missing} is not: set all three'):
    hosts._found('auto', env)


@pytest.mark.parametrize(
  ('count', 'process'), [('4', '4'), ('4', '-1'), ('four', '0'), ('4', '')]
)
def test_a_process_that_its_run_has_not_is_refused(count, process):
  env = JAX | {'JAX_NUM_PROCESSES': count, 'JAX_PROCESS_ID': process}
  with pytest.raises(ValueError, match=f'{process} of JAX_NUM_PROCESSES'):
    hosts._found('auto', env)


def test_slurm_names_the_run():
  assert hosts._found('auto', SLURM) == {
    'num_processes': 3,
    'process_id': 2,
    'cluster_detection_method': 'slurm',
    'local_device_ids': [],
  }


def test_a_batch_script_outside_srun_is_no_run():
  # sbatch sets these for the script itself, which is no step.
  env = {'SLURM_JOB_ID': '77', 'SLURM_NTASKS': '3', 'SLURM_PROCID': '0'}
  assert hosts._found('auto', env) is None


def test_a_step_of_one_task_joins_nobody():
  one = {'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'}
  assert hosts._found('auto', SLURM | one) is None


@pytest.mark.parametrize(
  ('env', 'every'),
  [
    ({'SLURM_STEP_TASKS_PER_NODE': '1'}, True),
    ({'SLURM_STEP_TASKS_PER_NODE': '1(x12)'}, True),
    ({'SLURM_STEP_TASKS_PER_NODE': '2,1'}, False),
    ({'SLURM_STEP_TASKS_PER_NODE': '11'}, False),
    ({'SLURM_STEP_TASKS_PER_NODE': '8(x2)'}, False),
    ({'JAX_LOCAL_DEVICE_IDS': '0,1'}, False),
  ],
)
def test_a_task_alone_on_its_node_takes_every_gpu_of_it(env, every):
  found = hosts._found('auto', SLURM | env)
  assert found.get('local_device_ids', 'chosen by jax') == (
    [] if every else 'chosen by jax'
  )


@pytest.fixture
def started(monkeypatch):
  """What jax would start its client with, as its own detection says."""
  from jax._src import distributed

  called = {}

  def client(address, process, **_):
    called.update(address=address, process=process)
    return types.SimpleNamespace(connect=lambda: None)

  monkeypatch.setattr(
    distributed._jax, 'get_distributed_runtime_client', client
  )
  devices = []
  monkeypatch.setattr(
    distributed.config, 'update', lambda *words: devices.append(words)
  )

  def start(env):
    for name in list(os.environ):
      if name.startswith(('JAX_C', 'JAX_N', 'JAX_PROC', 'SLURM')):
        monkeypatch.delenv(name)
    for name, value in env.items():
      monkeypatch.setenv(name, value)
    state = distributed.State()
    monkeypatch.setattr(
      state, 'initialize_preemption_sync_manager', lambda: None
    )
    state.initialize(**hosts._found('auto', os.environ))
    return called | {'count': state.num_processes, 'devices': devices}

  return start


def test_jax_understands_what_slurm_says(started):
  assert started(SLURM) == {
    'address': f'gpu07:{65535 - 2**12 + 1 + 77}',
    'process': 2,
    'count': 3,
    'devices': [],  # every one is seen
  }


def test_jax_gives_each_of_several_tasks_a_gpu(started):
  two = {'SLURM_STEP_TASKS_PER_NODE': '2,1', 'SLURM_LOCALID': '1'}
  assert ('jax_cuda_visible_devices', '1') in started(SLURM | two)['devices']


def test_a_tpu_slice_is_left_to_jax():
  assert hosts._found('tpu', {}) == {}


def test_none_joins_nobody_whatever_is_set():
  assert hosts._found('none', JAX | SLURM) is None


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'cluster': 'k8s'}, "hosts.cluster is 'k8s'; it is one of auto, tpu"),
    ({'join_s': 0}, 'hosts.join_s is 0; it must be at least 1'),
    ({'silent_s': -3}, 'hosts.silent_s is -3; it must be at least 1'),
  ],
)
def test_settings_out_of_bounds_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    HostsConfig(**{'cluster': 'auto', 'join_s': 1, 'silent_s': 1} | fields)


def test_an_error_of_a_process_by_itself_is_left_alone(monkeypatch):
  for name in (*JAX, *SLURM):
    monkeypatch.delenv(name, raising=False)
  with pytest.raises(KeyError), hosts.joined(HostsConfig('auto', 1, 1)):
    raise KeyError('x')


@pytest.mark.parametrize(
  ('env', 'first'),
  [
    ({}, True),
    ({'JAX_PROCESS_ID': '0', 'SLURM_PROCID': '5'}, True),
    ({'JAX_PROCESS_ID': '1'}, False),
    ({'SLURM_PROCID': '2'}, False),
    ({'TPU_WORKER_ID': '0'}, True),
    ({'TPU_WORKER_ID': '3'}, False),
  ],
)
def test_the_first_process_writes_the_config(monkeypatch, env, first):
  for name in ('JAX_PROCESS_ID', 'SLURM_PROCID', 'TPU_WORKER_ID'):
    monkeypatch.delenv(name, raising=False)
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  assert host.first() is first
