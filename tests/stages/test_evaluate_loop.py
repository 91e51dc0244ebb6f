"""evaluate against a real server of a tiny model, over rows it captured."""

import json

import numpy as np
import pytest
from PIL import Image

from lmm_sae.core.workdir import Workdir
from lmm_sae.lmm import sae as torch_saes
from lmm_sae.lmm.llava import Subject
from lmm_sae.lmm.service import Service
from lmm_sae.sae import exports
from lmm_sae.sae.model import SaeConfig
from lmm_sae.stages import capture, evaluate
from tests.lmm import tiny_llava
from tests.lmm.serving import running
from tests.sae import small

LAYER, D = 1, tiny_llava.WIDTH


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return tiny_llava.make(tmp_path_factory.mktemp('lmm') / 'tiny')


@pytest.fixture
def run(model, tmp_path, config):
  """(workdir, config) with the captured halves of 24 conversations."""
  rng = np.random.default_rng(0)
  rows = []
  for i in range(24):
    row = {
      'id': str(i),
      'conversations': [
        {'from': 'human', 'value': 'what colour has the mat?'},
        {'from': 'gpt', 'value': ('red', 'happy, and blue', 'no')[i % 3]},
      ],
    }
    if i % 4:
      pixels = rng.integers(0, 256, (28 + i, 30, 3), np.uint8)
      Image.fromarray(pixels).save(tmp_path / f'{i}.png')
      row['image'] = f'{i}.png'
    rows.append(row)
  (tmp_path / 'data.json').write_text(json.dumps(rows))
  config.lmm.path, config.lmm.layers, config.lmm.threads = (
    str(model),
    (LAYER,),
    1,
  )
  config.data.source, config.data.path = 'llava', str(tmp_path / 'data.json')
  config.data.heldout = 0.6
  workdir = Workdir.of(tmp_path / 'run')
  capture.run(config, workdir)
  config.evaluate.batch = 3
  return workdir, config


def evaluated(run, model):
  """evaluation.json, made with a server of the workdir's export."""
  workdir, config = run
  subject = Subject.load(model, threads=1)
  sae = torch_saes.load(workdir.export(LAYER) / 'sparsify')
  with running(Service(subject, {LAYER: sae})) as config.server.url:
    evaluate.run(config, workdir)
  return json.loads(workdir.file('evaluation.json').read_text())


def identity() -> exports.Sae:
  """2 D latents, e_d and -e_d: each row is the sum of what fires."""
  both = np.concatenate([np.eye(D), -np.eye(D)]).astype(np.float32)
  zeros = np.zeros(2 * D, np.float32)
  config = SaeConfig(layer=LAYER, width=D, latents=2 * D, k=2 * D)
  return exports.Sae(config, both, zeros, both, zeros[:D], zeros)


def test_an_sae_that_is_the_identity_recovers_all(run, model):
  exports.write(identity(), run[0].export(LAYER))
  found = evaluated(run, model)
  assert found[str(LAYER)]['all']['fvu'] == 0
  assert found[str(LAYER)]['all']['shrinkage'] == 1
  kinds = found['loss'][str(LAYER)]['kinds']
  assert {'template', 'question', 'answer', 'base', 'all'} <= set(kinds)
  for kind, row in kinds.items():
    assert row['kl']['sae'] == 0, kind
    assert row['kl_recovered']['zero']['value'] == 1
    if row['ce'] is None:
      continue
    assert row['ce']['sae'] == row['ce']['clean']
    for figure in row['ce_recovered'].values():
      assert figure['value'] in (1, None), kind
  assert kinds['all']['ce_recovered']['zero']['value'] == 1


def test_both_ways_into_the_loop_agree(run, model, tmp_path):
  """The SAE in Torch reads what the model carries, another what was stored."""
  sae_config = SaeConfig(layer=LAYER, width=D, latents=40, k=5)
  workdir, config = run
  exports.write(small.random_sae(sae_config), workdir.export(LAYER))
  config.evaluate.others = (str(workdir.export(LAYER) / 'saelens'),)
  found = evaluated(run, model)
  own, other = found['compared'][str(LAYER)]['saes']
  assert own['loss']['samples'] == other['loss']['samples'] > 3
  for kind, row in own['loss']['kinds'].items():
    twin = other['loss']['kinds'][kind]
    assert twin['kl']['sae'] == pytest.approx(row['kl']['sae'], rel=0.05)
    assert row['kl']['error'] < 1e-6 < row['kl']['sae']
    if row['ce'] is None:
      assert kind in ('base', 'tile', 'newline', 'image')
      continue
    assert row['ce']['error'] == pytest.approx(row['ce']['clean'], abs=1e-5)
    assert twin['ce']['sae'] == pytest.approx(row['ce']['sae'], rel=0.05)
    for name in ('clean', 'zero', 'mean'):
      assert twin['ce'][name] == row['ce'][name]
  assert own['kinds'] == other['kinds']


def test_images_without_text_leave_a_reason(model, tmp_path, config):
  """A folder of images: nothing but placeholders follows BOS."""
  rng = np.random.default_rng(0)
  folder = tmp_path / 'images'
  folder.mkdir()
  for i in range(6):
    pixels = rng.integers(0, 256, (30, 28 + i, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f'{i}.png')
  config.lmm.path, config.lmm.layers, config.lmm.threads = (
    str(model),
    (LAYER,),
    1,
  )
  config.data.source, config.data.path = 'images', str(folder)
  workdir = Workdir.of(tmp_path / 'run')
  capture.run(config, workdir)
  exports.write(identity(), workdir.export(LAYER))
  row = evaluated((workdir, config), model)['loss'][str(LAYER)]['kinds']['all']
  assert row['ce'] is None
  assert 'no text token' in row['ce_recovered']['zero']['reason']
  assert row['kl']['sae'] == 0
  assert row['kl']['zero'] > 0
  assert row['tokens'] > 16
