"""An export, read by the client that Neuronpedia publishes (PyPI neuronpedia).

bash launch/check_parity.sh
"""

import json
import pathlib
import subprocess

import pytest

from lmm_sae.core.index import LatentIndex
from lmm_sae.core.records import Explanation, read
from lmm_sae.sae import exports
from lmm_sae.sae.model import SaeConfig
from lmm_sae.stages import convert
from tests.sae import small
from tests.stages import fake_run

pytestmark = pytest.mark.peers

HERE = pathlib.Path(__file__).parent
PYTHON = HERE.parents[1] / 'benchmarks/.envs/neuronpedia/bin/python'
M = 64


def test_its_client_reads_every_activation_and_explanation(tmp_path):
  config, workdir = fake_run.make(tmp_path, M, 12)
  sae = small.random_sae(SaeConfig(fake_run.LAYER, 6, M, fake_run.K))
  exports.write(sae, workdir.export(fake_run.LAYER))
  config.lmm.layers = (fake_run.LAYER,)
  config.convert.to = 'neuronpedia'
  convert.run(config, workdir)
  [folder] = (workdir.file('neuronpedia') / 'small').iterdir()
  assert PYTHON.exists(), f'{PYTHON} is missing: bash launch/check_parity.sh'
  done = subprocess.run(
    [PYTHON, HERE / 'read_neuronpedia.py', folder],
    capture_output=True,
    text=True,
    timeout=200,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  said = json.loads(done.stdout)
  index = LatentIndex.open(workdir.index(fake_run.LAYER, 'b'))
  found = [index.texts(m) + index.exemplars(m) for m in range(M)]
  explained = [
    one
    for one in read(Explanation, workdir.file('explanations.jsonl'))
    if one.outcome == 'explained'
  ]
  assert said['activations'] == sum(map(len, found))
  assert said['explanations'] == len(explained)
  for latent, feature in enumerate(said['upload']):
    assert feature['index'] == latent
    assert len(feature['activations']) == len(found[latent])
    labels = [one.label for one in explained if one.latent == latent]
    assert [one['text'] for one in feature['explanations']] == labels
