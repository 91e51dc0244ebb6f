"""Training that goes on from an SAE that is there already."""

import shutil

import numpy as np
import pytest

from experiments import base
from lmm_sae.core import records
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import exports
from lmm_sae.stages import train
from tests.sae import small
from tests.sae.small import LAYER


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Workdir:
  """A finished run of 60 steps; read it, do not change it."""
  root = tmp_path_factory.mktemp('trained')
  small.write_store(root / 'acts' / 'train')
  workdir = Workdir.of(root)
  config = base.get_config()
  train.run(
    small.run_config(config, train__steps=60, train__save_every=60), workdir
  )
  return workdir


@pytest.fixture
def workdir(tmp_path) -> Workdir:
  small.write_store(tmp_path / 'acts' / 'train')
  return Workdir.of(tmp_path)


def fvus(workdir):
  return [x['fvu'] for x in records.read_lines(workdir.file('metrics.jsonl'))]


@pytest.mark.parametrize('layout', ['', '/sparsify', '/saelens'])
def test_training_goes_on_where_the_other_sae_stood(
  workdir, trained, config, layout
):
  config = small.run_config(config, train__lr=1e-9)
  config.train.init = f'{trained.root}/sae/{{layer}}/export{layout}'
  train.run(config, workdir)
  assert np.mean(fvus(workdir)) < 1.1 * np.mean(fvus(trained)[-20:])
  one, two = (exports.load(run.export(LAYER)) for run in (trained, workdir))
  np.testing.assert_allclose(one.w_enc_MD, two.w_enc_MD, atol=1e-6)
  np.testing.assert_allclose(one.b_dec_D, two.b_dec_D, atol=1e-5)


def test_another_activation_may_go_on_from_a_topk_sae(workdir, trained, config):
  config = small.run_config(config, sae__activation='batchtopk')
  config.train.init = str(trained.export(LAYER))
  train.run(config, workdir)
  sae = exports.load(workdir.export(LAYER))
  assert (sae.theta_M > 0).all()
  assert np.mean(fvus(workdir)) < 1.2 * np.mean(fvus(trained)[-20:])


def test_a_run_resumes_without_the_sae_it_began_from(
  workdir, trained, config, tmp_path
):
  shutil.copytree(trained.export(LAYER), tmp_path / 'first')
  config = small.run_config(config)
  config.train.init = str(tmp_path / 'first')
  train.run(config, workdir)
  before = exports.load(workdir.export(LAYER))
  shutil.rmtree(tmp_path / 'first')
  shutil.rmtree(workdir.sae(LAYER) / '20')
  train.run(config, workdir)
  after = exports.load(workdir.export(LAYER))
  np.testing.assert_array_equal(before.w_dec_MD, after.w_dec_MD)


@pytest.mark.parametrize(
  ('init', 'latents', 'message'),
  [
    ('nowhere', small.M, 'nowhere holds no SAE'),
    ('', 24, r'train\.init=.*12 latents.*sae\.latents is 24'),
  ],
)
def test_an_sae_that_does_not_fit_is_refused_before_any_work(
  workdir, trained, config, init, latents, message
):
  config = small.run_config(config, sae__latents=latents)
  config.train.init = init or str(trained.export(LAYER))
  with pytest.raises(ValueError, match=message):
    train.run(config, workdir)
  assert not (workdir.root / 'sae').exists()
