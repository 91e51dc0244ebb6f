import json

import jax.numpy as jnp
import numpy as np
import pytest

from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import exports, trainer
from lmm_sae.sae.checkpoint import Checkpoints, Note
from lmm_sae.stages import convert
from tests.sae import small
from tests.sae.small import CONFIG, LAYER


@pytest.fixture
def workdir(tmp_path) -> Workdir:
  """A workdir with a checkpoint of step 5 and no export."""
  workdir = Workdir.of(tmp_path / 'run')
  state = trainer.start(CONFIG, small.rows(50), 0, normalise=True)
  settings = {'sae': dict(vars(CONFIG)), 'seed': 0}
  with Checkpoints(workdir.sae(LAYER), keep=1) as checkpoints:
    checkpoints.save(state, Note(5, settings), jnp.zeros((1, 2), jnp.int32))
  return workdir


@pytest.fixture
def foreign(tmp_path):
  """The sparsify half of an SAE that was trained elsewhere."""
  sae = small.random_sae(seed=1)
  exports.write(sae, tmp_path / 'foreign')
  return tmp_path / 'foreign' / 'sparsify', sae


def test_the_last_checkpoint_is_exported(workdir, config):
  convert.run(small.run_config(config), workdir)
  sae = exports.load(workdir.export(LAYER))
  with Checkpoints(workdir.sae(LAYER)) as checkpoints:
    state = checkpoints.restore(CONFIG, 5)
  want = trainer.export_params(state)
  np.testing.assert_array_equal(sae.w_enc_MD, want.w_enc_MD)
  np.testing.assert_array_equal(sae.b_dec_D, want.b_dec_D)
  assert sae.config == CONFIG
  cfg = json.loads((workdir.export(LAYER) / 'sparsify/cfg.json').read_text())
  assert cfg['step'] == 5


def test_a_foreign_sae_becomes_the_export_of_its_layer(
  tmp_path, config, foreign
):
  source, sae = foreign
  workdir = Workdir.of(tmp_path / 'new')
  convert.run(small.run_config(config, convert__source=str(source)), workdir)
  got = exports.load(workdir.export(LAYER))
  np.testing.assert_array_equal(got.w_dec_MD, sae.w_dec_MD)
  assert got.config.layer == LAYER


def test_an_import_does_not_overwrite_a_trained_sae(workdir, config, foreign):
  settings = small.run_config(config, convert__source=str(foreign[0]))
  with pytest.raises(ValueError, match='import into another workdir'):
    convert.run(settings, workdir)
  assert not workdir.export(LAYER).exists()


def test_an_import_must_fit_the_rows(tmp_path, config, foreign, monkeypatch):
  monkeypatch.setattr(small, 'D', 5)
  small.write_store(tmp_path / 'new' / 'acts' / 'train', samples=4)
  settings = small.run_config(config, convert__source=str(foreign[0]))
  with pytest.raises(ValueError, match=r'width 6.*rows of width 5'):
    convert.run(settings, Workdir.of(tmp_path / 'new'))


def test_an_import_needs_to_know_its_layer(tmp_path, config, foreign):
  settings = small.run_config(
    config, convert__source=str(foreign[0]), lmm__layers=(4, 6)
  )
  with pytest.raises(ValueError, match=r'convert\.layer is -1'):
    convert.run(settings, Workdir.of(tmp_path / 'new'))
  settings.convert.layer = 6
  convert.run(settings, Workdir.of(tmp_path / 'new'))
  assert exports.load(tmp_path / 'new/sae/6').config.layer == 6


def test_without_a_checkpoint_there_is_nothing_to_export(tmp_path, config):
  with pytest.raises(ValueError, match='run `lmm-sae train`'):
    convert.run(small.run_config(config), Workdir.of(tmp_path))
