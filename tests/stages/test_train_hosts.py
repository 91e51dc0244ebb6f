"""Training on several processes, which meet over loopback.

Where the mesh is the same, two processes end with the same bits as one: a sum
over two devices does not depend on which of them begins. Over four devices gloo
adds in another order than XLA does within a process, which is rounding alone:
`CLOSE` bounds what it grows to in 20 steps of Adam.
"""

import pathlib
import re
import shutil
import signal
import time

import numpy as np
import pytest

from lmm_sae.core import records
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import checkpoint, exports
from lmm_sae.stages import train
from tests import processes
from tests.sae import small_config
from tests.sae.small import LAYER

CLOSE = {'rtol': 0, 'atol': 1e-4}  # weights are of about 1


@pytest.fixture
def words(acts):
  """The words of a training of 20 steps in a workdir, all devices sharing."""
  return lambda path, *more: [
    'train',
    '--config=tests/sae/small_config.py',
    f'--workdir={path}',
    f'--config.acts={acts}',
    '--config.train.devices=0',
    *more,
  ]


LATENT = '--config.train.latent_shards=2'


@pytest.fixture(scope='module')
def two(tmp_path_factory, acts, cache) -> pathlib.Path:
  """The workdir of two processes with two devices each; do not change it."""
  path = tmp_path_factory.mktemp('two')
  argv = words.__wrapped__(acts)(path, LATENT)
  done = processes.together(2, argv, devices=2, cache=cache)
  assert [x.code for x in done] == [0, 0], done
  return path


def alone(path: pathlib.Path, acts: pathlib.Path, **changes) -> Workdir:
  """Trains in this process, which has 8 devices."""
  workdir = Workdir.of(path, str(acts))
  config = small_config.get_config()
  for field, value in changes.items():
    config.train[field] = value
  train.run(config, workdir)
  return workdir


def files(path):
  """{name: bytes} of the export in a workdir."""
  export = Workdir.of(path).export(LAYER)
  return {
    str(p.relative_to(export)): p.read_bytes()
    for p in export.rglob('*')
    if p.is_file()
  }


def assert_close(path, other):
  one, two = (exports.load(Workdir.of(x).export(LAYER)) for x in (path, other))
  for name in ('w_enc_MD', 'b_enc_M', 'w_dec_MD', 'b_dec_D'):
    np.testing.assert_allclose(getattr(one, name), getattr(two, name), **CLOSE)


def test_two_processes_end_with_the_bits_of_one(two, acts, tmp_path):
  alone(tmp_path, acts, devices=4, latent_shards=2)
  assert files(two) == files(tmp_path)


def test_process_0_alone_writes_what_one_process_writes(two):
  lines = records.read_lines(two / 'metrics.jsonl')
  assert [line['step'] for line in lines] == list(range(1, 21))
  assert sorted(path.name for path in two.iterdir()) == [
    'config.json',
    'metrics.jsonl',
    'sae',
  ]
  assert checkpoint.steps(Workdir.of(two).sae(LAYER)) == [15, 20]


# One whose partner died: where that broke a connection it says so and ends,
# where it was about to connect, jax aborts it after hosts.silent_s.
ENDED = (2, -signal.SIGABRT)


@pytest.mark.parametrize(
  ('die', 'codes'),
  [
    ({1: 'step:13'}, [ENDED, -signal.SIGKILL]),
    pytest.param(
      {0: 'step:13', 1: 'step:13'},
      [-signal.SIGKILL, -signal.SIGKILL],
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {0: 'save:10:4', 1: 'save:10:4'},
      [-signal.SIGKILL, -signal.SIGKILL],
      marks=pytest.mark.slow,
    ),
  ],
  ids=['one', 'all', 'all in a save'],
)
def test_a_run_goes_on_after_processes_were_killed(
  two, words, cache, tmp_path, die, codes
):
  argv = words(tmp_path, LATENT, '--config.hosts.silent_s=20')
  done = processes.together(2, argv, die=die, devices=2, cache=cache)
  for one, code in zip(done, codes, strict=True):
    assert one.code in ENDED if code is ENDED else one.code == code, done
  if done[0].code == 2:
    assert 'lmm-sae: another process of this run has ended' in done[0].err
    assert 'goes on from the last checkpoint' in done[0].err
  assert not Workdir.of(tmp_path).export(LAYER).exists()
  argv = words(tmp_path, LATENT)
  done = processes.together(2, argv, devices=2, cache=cache)
  assert [x.code for x in done] == [0, 0], done
  assert files(tmp_path) == files(two)


@pytest.fixture
def half(two, tmp_path) -> pathlib.Path:
  """A copy of the run of two processes, as it stood after step 15."""
  path = tmp_path / 'half'
  shutil.copytree(two, path)
  shutil.rmtree(Workdir.of(path).export(LAYER))
  shutil.rmtree(Workdir.of(path).sae(LAYER) / '20')
  return path


def test_one_process_goes_on_where_two_were(half, two, acts):
  alone(half, acts, devices=4, latent_shards=2)
  assert files(half) == files(two)


@pytest.mark.parametrize(('devices', 'latent_shards'), [(1, 1), (2, 1), (4, 4)])
def test_another_mesh_goes_on_where_two_processes_were(
  half, two, acts, devices, latent_shards
):
  alone(half, acts, devices=devices, latent_shards=latent_shards)
  assert_close(half, two)


def test_processes_that_were_told_different_things_are_refused(
  words, cache, tmp_path
):
  done = processes.together(
    2, words(tmp_path), own={1: ['--config.train.lr=0.02']}, cache=cache
  )
  assert [x.code for x in done] == [2, 2], done
  assert 'not told the same: train.lr is 0.01 in process 0' in done[0].err
  assert 'not told the same: train.lr is 0.02 in process 1' in done[1].err
  assert not (tmp_path / 'sae').exists()


def test_a_workdir_that_is_not_shared_is_refused(words, cache, tmp_path):
  own = {1: [f'--workdir={tmp_path / "other"}']}
  done = processes.together(2, words(tmp_path / 'one'), own=own, cache=cache)
  assert [x.code for x in done] == [2, 2], done
  for each in done:
    assert 'is not one folder for all 2 processes' in each.err
  assert not (tmp_path / 'one' / 'sae').exists()


@pytest.mark.slow
@pytest.mark.parametrize('latent_shards', [1, 2, 4])
def test_four_processes_end_as_one(words, acts, cache, tmp_path, latent_shards):
  argv = words(
    tmp_path / 'four', f'--config.train.latent_shards={latent_shards}'
  )
  done = processes.together(4, argv, cache=cache)
  assert [x.code for x in done] == [0] * 4, done
  alone(tmp_path / 'one', acts, devices=4, latent_shards=latent_shards)
  assert_close(tmp_path / 'four', tmp_path / 'one')


@pytest.mark.slow
def test_four_processes_go_on_where_two_were(half, two, words, cache):
  done = processes.together(4, words(half, LATENT), cache=cache)
  assert [x.code for x in done] == [0] * 4, done
  assert_close(half, two)


@pytest.mark.slow
def test_process_0_does_not_die_alone(two, words, cache, tmp_path):
  argv = words(tmp_path, LATENT)
  done = processes.together(2, argv, die={0: 'step:13'}, devices=2, cache=cache)
  assert done[0].code == -signal.SIGKILL
  # Whichever notices first, our loop or jax's own watch, ends the process.
  assert done[1].code in (2, -signal.SIGABRT), done
  assert re.search(
    'another process of this run has ended|another task died', done[1].err
  )
  done = processes.together(2, argv, devices=2, cache=cache)
  assert [x.code for x in done] == [0, 0], done
  assert files(tmp_path) == files(two)


@pytest.mark.slow
def test_a_process_that_falls_silent_ends_the_others(words, cache, tmp_path):
  began = time.monotonic()
  done = processes.together(
    2,
    words(tmp_path, LATENT, '--config.hosts.silent_s=10'),
    die={1: 'freeze:13'},
    devices=2,
    cache=cache,
    until=0,
  )
  assert done[0].code in (2, -signal.SIGABRT), done
  assert re.search('unhealthy|has ended or cannot be reached', done[0].err)
  assert time.monotonic() - began < 60  # start-up is most of it


def test_a_run_that_lacks_a_process_ends(words, cache, tmp_path):
  done = processes.run(
    words(tmp_path, '--config.hosts.join_s=1'),
    rank=1,
    of=(2, processes.free_port()),
    cache=cache,
  )
  assert done.code == 2
  assert 'not all of 2 processes met at 127.0.0.1:' in done.err
  assert 'within hosts.join_s=1 seconds' in done.err
  assert not (tmp_path / 'sae').exists()


def test_a_machine_without_a_tpu_is_no_host_of_a_slice(
  words, cache, tmp_path, monkeypatch
):
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')  # else jax asks the network
  argv = words(tmp_path, '--config.hosts.cluster=tpu')
  done = processes.run(argv, cache=cache)
  assert done.code == 2, done.err
  assert 'hosts.cluster is tpu, but jax finds no TPU slice here' in done.err
