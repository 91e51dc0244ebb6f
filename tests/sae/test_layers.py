"""Several layers' SAEs in one run."""

import copy

import numpy as np

from lmm_sae.core import records
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import checkpoint, exports
from lmm_sae.stages import train
from tests.sae import small
from tests.sae.small import LAYER

LAYERS = (LAYER, LAYER + 2)


def test_saes_of_two_layers_are_those_of_a_run_each(tmp_path, config):
  config = small.run_config(config, train__steps=6, lmm__layers=LAYERS)
  small.write_store(tmp_path / 'acts' / 'train', layers=LAYERS)
  config.acts = str(tmp_path / 'acts')
  runs = {}
  for name, layers in (('both', LAYERS), ('one', LAYERS[1:])):
    config = copy.deepcopy(config)
    config.lmm.layers = layers
    runs[name] = Workdir.of(tmp_path / name, config.acts)
    train.run(config, runs[name])
  saes = [exports.load(runs['both'].export(layer)) for layer in LAYERS]
  alone = exports.load(runs['one'].export(LAYERS[1]))
  assert [sae.config.layer for sae in saes] == list(LAYERS)
  np.testing.assert_array_equal(saes[1].w_dec_MD, alone.w_dec_MD)
  np.testing.assert_array_equal(saes[1].b_dec_D, alone.b_dec_D)
  assert np.abs(saes[0].b_dec_D - saes[1].b_dec_D).max() > 0.01
  for layer in LAYERS:
    assert checkpoint.steps(runs['both'].sae(layer)) == [5, 6]
  lines = records.read_lines(runs['both'].file('metrics.jsonl'))
  assert [(x['layer'], x['step']) for x in lines] == [
    (layer, step) for layer in LAYERS for step in range(1, 7)
  ]
