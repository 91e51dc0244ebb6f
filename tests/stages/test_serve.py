"""`lmm-sae serve` as a process: it comes up, answers and goes down."""

import errno
import json
import signal
import socket
import subprocess
import sys

import pytest
from PIL import Image
from safetensors.torch import save_file

from lmm_sae.core import config as configs
from lmm_sae.core.records import Edit
from lmm_sae.core.remote import GenerateRow, SubjectClient
from lmm_sae.core.workdir import Workdir
from lmm_sae.stages import serve
from tests.lmm import tiny_llava
from tests.lmm.conftest import random_sae

LAYER = 1
IMAGE = Image.new('RGB', (40, 30), 'red')


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return tiny_llava.make(tmp_path_factory.mktemp('serve') / 'tiny')


def save_sae(folder):
  sae = random_sae(40, tiny_llava.WIDTH, 5)
  folder.mkdir(parents=True)
  (folder / 'cfg.json').write_text(json.dumps({'k': sae.k}))
  tensors = {
    'encoder.weight': sae.w_enc_MD,
    'encoder.bias': sae.b_enc_M,
    'W_dec': sae.w_dec_MD,
    'b_dec': sae.b_dec_D,
  }
  save_file(tensors, folder / 'sae.safetensors')


def test_a_server_comes_up_answers_and_goes_down(config, tmp_path, model):
  config.lmm.path, config.lmm.layers = str(model), (LAYER, 2)
  configs.save(config, Workdir.of(tmp_path))
  save_sae(tmp_path / 'sae' / str(LAYER) / 'export' / 'sparsify')
  process = subprocess.Popen(
    [
      *(sys.executable, '-m', 'lmm_sae', 'serve'),
      f'--config={tmp_path}/config.json',
      f'--workdir={tmp_path}',
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  with process:
    try:
      line = process.stdout.readline()
      assert line.startswith('serving on http://127.0.0.1:')
      with SubjectClient(line.split()[-1]) as client:
        assert client.info()['saes'] == {LAYER: {'latents': 40, 'k': 5}}
        row = GenerateRow(0, 'what?', (Edit(3, 5.0),), LAYER)
        assert len(client.generate([row], [IMAGE], 3)) == 1
    finally:
      process.send_signal(signal.SIGTERM)
      _, said = process.communicate(timeout=30)
  assert process.returncode in (0, -signal.SIGTERM)
  assert 'no SAE of layer 2' in said
  assert 'Traceback' not in said


@pytest.mark.parametrize(
  ('field', 'value', 'says'),
  [
    ('server.host', '0.0.0.0', 'server.token'),
    ('lmm.layers', (3,), 'change lmm.layers'),
    ('lmm.path', '/nowhere', 'lmm.path'),
    ('score.clip_path', '/nowhere', 'no model folder'),
    ('score.grounder', 'sam', "'sam'"),
  ],
)
def test_what_cannot_be_served_is_said_at_once(
  config, tmp_path, model, field, value, says
):
  config.lmm.path = str(model)
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=says):
    serve.run(config, Workdir.of(tmp_path))


def test_a_model_of_other_positions_is_refused_before_it_is_loaded(
  config, tmp_path
):
  folder = tiny_llava.family(tmp_path / 'qwen', 'qwen2_5_vl')
  (folder / 'model.safetensors').unlink()
  config.lmm.path = str(folder)
  with pytest.raises(ValueError, match=r'a Qwen2\.5-VL, which can be captured'):
    serve.run(config, Workdir.of(tmp_path / 'run'))


def test_a_port_that_is_taken_is_named(config, tmp_path):
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    taken.listen()
    config.server.port = taken.getsockname()[1]
    with pytest.raises(OSError, match=str(config.server.port)) as caught:
      serve.run(config, Workdir.of(tmp_path))
  assert caught.value.errno == errno.EADDRINUSE
