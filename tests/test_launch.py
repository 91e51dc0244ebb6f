"""The launch scripts, with stand-ins for the tools that they call.

`srun`, `scontrol`, `gcloud` and `curl` write down how they were called; what
reaches `lmm-sae` is given to its own command line, which knows every field.
"""

import math
import os
import pathlib
import shlex
import signal
import subprocess

import pytest
import yaml

from lmm_sae import cli
from lmm_sae.core import jobs

CONFIG = 'tests/sae/small_config.py'
SCRIPTS = ('.sh', '.sbatch')


@pytest.fixture
def tools(tmp_path, monkeypatch):
  """Puts a stand-in for a tool on the PATH."""
  folder = tmp_path / 'bin'
  folder.mkdir()
  monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')

  def put(name: str, script: str) -> None:
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\n{script}\n')
    path.chmod(0o755)

  return put


def recorder(path: pathlib.Path) -> str:
  """A script that writes down its words, one a line."""
  return f'printf "%s\\0" "$@" > {path}'


def recorded(path: pathlib.Path) -> list[str]:
  return path.read_text().split('\0')[:-1]


def launch(root, script: str, *words: str, **env: str):
  return subprocess.run(
    ['bash', str(root / 'launch' / script), *words],
    cwd=root,
    env=os.environ | env,
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
  )


def taken(words: list[str], capsys) -> str:
  """What `lmm-sae WORDS --dry_run` says: every field exists, with its type."""
  assert cli.main([*words, '--dry_run']) == 0, capsys.readouterr().err
  return capsys.readouterr().out


def test_every_script_is_bash(root):
  scripts = [x for x in (root / 'launch').iterdir() if x.suffix in SCRIPTS]
  assert {'slurm.sbatch', 'check_transformers.sh'} <= {x.name for x in scripts}
  for script in scripts:
    subprocess.run(['bash', '-n', script], check=True)


@pytest.fixture
def slurm(root):
  """sbatch, as far as the script sees it."""

  def run(*words: str, nodes: int = 1):
    return launch(
      root,
      'slurm.sbatch',
      *words,
      SLURM_SUBMIT_DIR=str(root),
      SLURM_JOB_ID='77',
      SLURM_JOB_NUM_NODES=str(nodes),
      SLURM_CPUS_PER_TASK='16',
    )

  return run


@pytest.mark.parametrize(('nodes', 'devices'), [(1, 1), (4, 0)])
def test_slurm_runs_train_on_every_node(
  root, tools, slurm, tmp_path, capsys, monkeypatch, nodes, devices
):
  tools('srun', recorder(tmp_path / 'srun'))
  done = slurm(
    'train', CONFIG, 'a folder', '--config.train.lr=0.5', nodes=nodes
  )
  assert done.returncode == 0, done.stderr
  words = recorded(tmp_path / 'srun')
  program = words.index('.venv/bin/lmm-sae')
  assert words[:program] == ['--kill-on-bad-exit=1', '--cpus-per-task=16']
  monkeypatch.chdir(root)
  said = taken(words[program + 1 :], capsys)
  assert f'train in {root}/a folder' in said
  assert f'--config.train.devices={devices}' in said
  assert '--config.train.lr=0.5' in said


def test_slurm_refuses_other_stages_on_several_nodes(slurm, tools, tmp_path):
  tools('srun', recorder(tmp_path / 'srun'))
  done = slurm('index', CONFIG, 'w', nodes=2)
  assert done.returncode == 2
  assert 'index runs on one node, not 2' in done.stderr
  assert not (tmp_path / 'srun').exists()


def test_slurm_fails_with_the_code_of_the_step(slurm, tools):
  tools('srun', 'exit 7')
  assert slurm('train', CONFIG, 'w').returncode == 7


def test_slurm_queues_a_job_again_that_has_no_time_left(slurm, tools, tmp_path):
  tools('scontrol', recorder(tmp_path / 'scontrol'))
  tools(
    'srun',
    f'kill -USR1 $PPID; until [[ -s {tmp_path}/scontrol ]]; do :; done\n'
    f'touch {tmp_path}/ended',
  )
  done = slurm('train', CONFIG, 'w')
  assert done.returncode == 0, done.stderr
  assert recorded(tmp_path / 'scontrol') == ['requeue', '77']
  assert (tmp_path / 'ended').exists()  # it was waited for after the signal


@pytest.fixture
def array(root, tools, tmp_path):
  """sbatch --array, as far as one job of it sees it."""
  tools('srun', recorder(tmp_path / 'srun'))

  def run(number: int, of: str, count: int, *words: str, **env: str):
    return launch(
      root,
      'slurm.sbatch',
      *words,
      SLURM_SUBMIT_DIR=str(root),
      SLURM_JOB_ID=f'{90 + number}',
      SLURM_ARRAY_JOB_ID='90',
      SLURM_ARRAY_TASK_ID=str(number),
      SLURM_ARRAY_TASK_MAX=of,
      SLURM_ARRAY_TASK_COUNT=str(count),
      **env,
    )

  return run


def test_each_job_of_an_array_captures_its_share(
  root, array, tmp_path, capsys, monkeypatch
):
  words = ('capture', CONFIG, 'w', '--config.capture.batch=3')
  monkeypatch.chdir(root)
  for number in (0, 15):
    done = array(number, '15', 16, *words)
    assert done.returncode == 0, done.stderr
    called = recorded(tmp_path / 'srun')
    given = called[called.index('.venv/bin/lmm-sae') + 1 :]
    assert given[-2:] == [
      f'--config.capture.share={number}/16',
      '--config.capture.batch=3',
    ]
    values = cli.resolve(CONFIG, given[3:])
    share = jobs.CaptureConfig(**values.capture).part
    assert share == (number, 16)


def test_a_part_of_an_array_is_told_how_many_shares_there_are(array, tmp_path):
  words = ('capture', CONFIG, 'w')
  done = array(3, '7', 2, *words)
  assert done.returncode == 2
  assert 'SHARES=N+1' in done.stderr
  assert not (tmp_path / 'srun').exists()
  done = array(3, '7', 2, *words, SHARES='16')
  assert done.returncode == 0, done.stderr
  assert '--config.capture.share=3/16' in recorded(tmp_path / 'srun')


def test_slurm_refuses_an_array_of_another_stage(array, tmp_path):
  done = array(0, '1', 2, 'index', CONFIG, 'w')
  assert done.returncode == 2
  assert 'index is not shared among the jobs of an array' in done.stderr
  assert not (tmp_path / 'srun').exists()


def test_slurm_asks_for_what_the_script_relies_on(root):
  lines = (root / 'launch' / 'slurm.sbatch').read_text().splitlines()
  asked = [x.split()[1] for x in lines if x.startswith('#SBATCH')]
  assert {'--ntasks-per-node=1', '--requeue', '--open-mode=append'} <= {*asked}
  (warned,) = (x for x in asked if x.startswith('--signal='))
  assert hasattr(signal, f'SIG{warned.split(":")[1].split("@")[0]}')
  # sbatch stops reading them at the first command.
  first = next(x for x in lines if x and not x.startswith('#'))
  assert lines.index(first) > max(
    at for at, x in enumerate(lines) if x.startswith('#SBATCH')
  )


@pytest.fixture
def remote(root, tools, tmp_path):
  """What a host of a TPU slice runs when tpu_pod.sh is called."""
  home = tmp_path / 'home'
  program = home / 'lmm_sae' / '.venv' / 'bin' / 'lmm-sae'
  program.parent.mkdir(parents=True)
  program.write_text(f'#!/usr/bin/env bash\n{recorder(tmp_path / "program")}\n')
  program.chmod(0o755)
  tools('gcloud', recorder(tmp_path / 'gcloud'))

  def run(*words: str, host: int = 0):
    done = launch(root, 'tpu_pod.sh', *words, NAME='my-tpu', ZONE='z')
    assert done.returncode == 0, done.stderr
    called = recorded(tmp_path / 'gcloud')
    tools('curl', f'echo {host}')
    (command,) = (x for x in called if x.startswith('--command='))
    subprocess.run(
      ['sh', '-c', command.partition('=')[2]], cwd=home, check=True
    )
    return called, recorded(tmp_path / 'program')

  return run


@pytest.mark.parametrize(
  ('host', 'record'), [(0, '--record'), (3, '--norecord')]
)
def test_tpu_pod_runs_train_on_every_host(
  root, remote, capsys, monkeypatch, host, record
):
  called, words = remote(
    'train', CONFIG, '/nfs/a run', "--config.train.init=it's", host=host
  )
  assert called[:5] == ['compute', 'tpus', 'tpu-vm', 'ssh', 'my-tpu']
  assert called[5:7] == ['--zone=z', '--worker=all']
  assert words[-1] == record
  monkeypatch.chdir(root)
  said = taken(words, capsys)
  assert 'train in /nfs/a run' in said
  assert "--config.hosts.cluster='tpu'" in said
  assert '--config.train.devices=0' in said
  assert '--config.train.init="it\'s"' in said


def test_tpu_pod_runs_other_stages_on_one_host(root, remote):
  called, words = remote('index', CONFIG, '/nfs/run')
  assert '--worker=0' in called
  assert words == [
    'index', f'--config={CONFIG}', '--workdir=/nfs/run', '--record',
  ]  # fmt: skip


def test_tpu_pod_says_how_it_is_used(root):
  done = launch(root, 'tpu_pod.sh', 'train', NAME='my-tpu', ZONE='z')
  assert done.returncode == 2
  assert 'launch/tpu_pod.sh setup' in done.stderr
  assert 'set -euo' not in done.stderr


def test_the_jobset_has_a_pod_for_every_host_and_takes_all_chips(root, capsys):
  jobset = yaml.safe_load((root / 'launch' / 'jobset.yaml').read_text())
  (replicated,) = jobset['spec']['replicatedJobs']
  job = replicated['template']['spec']
  pod = job['template']['spec']
  (container,) = pod['containers']
  topology = pod['nodeSelector']['cloud.google.com/gke-tpu-topology']
  chips = math.prod(int(side) for side in topology.split('x'))
  hosts = chips // container['resources']['limits']['google.com/tpu']
  assert job['parallelism'] == job['completions'] == hosts > 1
  assert (job['backoffLimit'], pod['restartPolicy']) == (0, 'Never')
  assert jobset['spec']['network']['enableDNSHostnames'] is True
  assert {x['name'] for x in container['volumeMounts']} == {
    x['name'] for x in pod['volumes']
  }
  program, *words = shlex.split(
    shlex.join(container['command'] + container['args']).replace(
      '=CONFIG', f'={root}/{CONFIG}'
    )
  )
  assert program == 'lmm-sae'
  said = taken(words, capsys)
  assert "--config.hosts.cluster='tpu'" in said
  assert '--config.train.devices=0' in said
