"""`lmm-sae convert` with a hub: up with one run's SAE, down into another's."""

import subprocess
import sys

import pytest

from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import exports
from lmm_sae.stages import convert
from tests.sae import fake_hub, small
from tests.sae.small import LAYER


@pytest.fixture
def server():
  with fake_hub.serve() as server:
    yield server


def command(server, tmp_path, workdir, *fields, **environment):
  """The finished process of `lmm-sae convert` with fields of its section."""
  words = [f'--config.convert.{field}' for field in fields]
  return subprocess.run(
    [
      *(sys.executable, '-m', 'lmm_sae', 'convert', f'--workdir={workdir}'),
      *('--config=experiments/base.py', f'--config.lmm.layers=({LAYER},)'),
      *words,
    ],
    capture_output=True,
    text=True,
    check=False,
    env=server.environment(tmp_path / 'home', **environment),
  )


def test_an_sae_goes_up_to_the_hub_and_down_into_another_run(server, tmp_path):
  sae = small.random_sae()
  exports.write(sae, tmp_path / 'mine')
  done = command(
    server,
    tmp_path,
    tmp_path / 'one',
    f'source={tmp_path / "mine"}',
    'upload=owner/name',
  )
  assert done.returncode == 0, done.stderr
  assert f'{server.url}/owner/name' in done.stderr
  card = server.repos['owner/name']['README.md'].decode()
  assert 'library_name: lmm_sae' in card
  done = command(
    server, tmp_path, tmp_path / 'two', 'source=owner/name:saelens@main'
  )
  assert done.returncode == 0, done.stderr
  back = exports.load(Workdir.of(tmp_path / 'two').export(LAYER))
  assert (back.w_enc_MD == sae.w_enc_MD).all()
  assert back.config.layer == LAYER


@pytest.mark.parametrize(
  ('field', 'environment', 'message'),
  [
    ('source=owner/missing', {}, 'neither a path here nor a repository'),
    ('source=owner/name', {'HF_HUB_OFFLINE': '1'}, 'the hub is not reached'),
    ('source=owner/name', {}, 'holds no SAE'),
  ],
)
def test_what_cannot_be_fetched_ends_with_2_and_writes_nothing(
  server, tmp_path, field, environment, message
):
  server.put('owner/name', {'config.json': b'{}'})
  workdir = tmp_path / 'run'
  done = command(server, tmp_path, workdir, field, **environment)
  assert done.returncode == 2
  assert message in done.stderr
  assert 'Traceback' not in done.stderr
  assert not Workdir.of(workdir).export(LAYER).exists()


def test_one_layer_is_uploaded_at_a_time(tmp_path, config):
  config.lmm.layers = (1, 4)
  config.convert.upload = 'owner/name'
  with pytest.raises(ValueError, match=r'convert\.layer is -1'):
    convert.run(config, Workdir.of(tmp_path))
