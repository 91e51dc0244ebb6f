"""Figures against what numpy says of whole arrays."""

import dataclasses
import json

import jax
import numpy as np
import orbax.checkpoint as v0
import pytest

from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import exports, figures, looking, trainer
from tests import toy
from tests.sae import small
from tests.sae.small import CONFIG, D, M
from tests.sae.test_looking import save


def neighbours_of(sae, path):
  exports.write(sae, path / 'sae')
  return figures.of(looking.look(path / 'sae'))['neighbours']


def directions(count=37, width=5, seed=0):
  rng = np.random.default_rng(seed)
  x_MD = rng.normal(size=(count, width)).astype(np.float32)
  return x_MD / np.linalg.norm(x_MD, axis=1, keepdims=True)


@pytest.mark.parametrize('block', [1, 4, 8, 37])
def test_nearest_rows_are_those_of_the_whole_table(block):
  unit_MD = directions()
  unit_MD[20] = unit_MD[3]  # a tie: 3 and 20 are alike to all others
  cos_MM = unit_MD @ unit_MD.T
  np.fill_diagonal(cos_MM, -np.inf)
  best_M, at_M = figures.nearest(unit_MD, block)
  np.testing.assert_allclose(best_M, cos_MM.max(1), rtol=1e-5, atol=1e-6)
  chosen_M = cos_MM[np.arange(37), at_M]
  np.testing.assert_allclose(chosen_M, cos_MM.max(1), rtol=1e-5, atol=1e-6)
  assert (at_M[3], at_M[20]) == (20, 3)


def test_of_equal_neighbours_the_lower_is_named():
  unit_MD = np.tile(directions(1), (11, 1))
  for block in (2, 3, 11):
    _, at_M = figures.nearest(unit_MD, block)
    assert at_M.tolist() == [1, *[0] * 10]


def test_no_product_of_all_latents_is_ever_held(monkeypatch):
  seen = []
  whole = figures._cosines

  def cosines(one_BD, two_BD, *rest):
    seen.append((one_BD.shape, two_BD.shape))
    return whole(one_BD, two_BD, *rest)

  monkeypatch.setattr(figures, '_cosines', cosines)
  figures.nearest(directions(), 8)
  assert set(seen) == {((8, 5), (8, 5))}
  assert len(seen) == 5 * 6 // 2  # each pair of blocks once


def test_pairs_are_named_once_and_the_closest_first(tmp_path):
  sae = small.random_sae()
  w_dec_MD = sae.w_dec_MD.copy()
  w_dec_MD[2] = 3 * w_dec_MD[9]
  w_dec_MD[4] = w_dec_MD[7] + 0.1 * w_dec_MD[8]
  found = neighbours_of(dataclasses.replace(sae, w_dec_MD=w_dec_MD), tmp_path)
  assert found['pairs'][0]['latents'] == [2, 9]
  assert found['pairs'][1]['latents'] == [4, 7]
  assert found['max'] == pytest.approx(1)
  pairs = [tuple(x['latents']) for x in found['pairs']]
  assert len(set(pairs)) == len(pairs)
  assert sum(found['counts']) == M


def test_rows_that_are_zero_or_not_finite_have_no_neighbour(tmp_path):
  sae = small.random_sae()
  w_dec_MD = sae.w_dec_MD.copy()
  w_dec_MD[0], w_dec_MD[5, 2] = 0, np.nan
  found = neighbours_of(dataclasses.replace(sae, w_dec_MD=w_dec_MD), tmp_path)
  assert not any({0, 5} & set(x['latents']) for x in found['pairs'])
  assert found['latents'] == sum(found['counts']) == M - 2


def test_figures_of_a_checkpoint_equal_those_of_its_arrays(tmp_path):
  state = trainer.start(CONFIG, small.rows(50), 0, normalise=True)
  idle_M = np.arange(M) * 100
  state = state.replace(idle_M=jax.numpy.asarray(idle_M, 'int32'))
  found = figures.of(looking.look(save(tmp_path, state)))
  w_enc_MD = np.asarray(state.params.w_enc_MD)
  said = found['arrays']['state.params.w_enc_MD']
  assert said['norm'] == pytest.approx(np.linalg.norm(w_enc_MD), rel=1e-6)
  assert (said['min'], said['max']) == (w_enc_MD.min(), w_enc_MD.max())
  norm_M = np.linalg.norm(w_enc_MD, axis=1)
  rows = found['rows']['w_enc_MD']
  assert rows['median'] == pytest.approx(np.median(norm_M), rel=1e-6)
  assert rows['min'] == pytest.approx(norm_M.min(), rel=1e-6)
  assert found['rows']['w_dec_MD']['max'] == pytest.approx(1, rel=1e-6)
  bias_D = trainer.export_params(state).b_dec_D
  assert found['b_dec_norm'] == pytest.approx(np.linalg.norm(bias_D), rel=1e-6)
  assert found['dead'] == {
    'count': 7,  # more than dead_after=400 rows: 500, 600, ..., 1100
    'share': 7 / M,
    'latents': M,
    'dead_after': 400,
  }
  assert sum(found['idle']['counts']) == M
  assert found['idle']['counts'][:3] == [1, 9, 2]


def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path):
  x = np.arange(24, dtype=np.float32).reshape(6, 4)
  x[2, 1], x[5, 3], x[0, 0] = np.nan, np.inf, -np.inf
  with v0.StandardCheckpointer() as saver:
    saver.save(tmp_path / 'saved', {'x': x, 'none': np.full(3, np.nan)})
  arrays = figures.of(looking.look(tmp_path / 'saved'))['arrays']
  assert arrays['x']['nonfinite'] == 3
  assert (arrays['x']['min'], arrays['x']['max']) == (1, 22)
  assert arrays['none'] == {'norm': 0, 'min': None, 'max': None, 'nonfinite': 3}


@pytest.mark.parametrize('layout', ['sparsify', 'saelens'])
def test_both_layouts_have_the_same_norms_of_rows(tmp_path, layout):
  sae = small.random_sae()
  exports.write(sae, tmp_path / 'sae')
  found = figures.of(looking.look(tmp_path / 'sae' / layout))
  want = np.linalg.norm(sae.w_enc_MD, axis=1)
  for name, value in figures.spread(want).items():
    assert found['rows']['w_enc_MD'][name] == pytest.approx(value, rel=1e-5)
  assert found['dead'] is None


def test_firing_rates_come_from_the_index_of_the_workdir(tmp_path, config):
  from lmm_sae.stages import index

  workdir = toy.make_workdir(tmp_path)
  config.lmm.layers = (toy.LAYER,)
  config.sae.latents, config.sae.k = toy.M, toy.K
  index.run(config, workdir)
  look = looking.look(workdir.export(toy.LAYER))
  rates = figures.of(look)['rates']
  index_of = f'index/{toy.LAYER}'
  assert [x['source'] for x in rates] == [f'{index_of}/a', f'{index_of}/b']
  for of in rates:
    assert of['never'] + sum(of['counts']) == toy.M
    assert of['never'] >= 1  # latent 6 never fires
    assert of['counts'][-1] >= 1  # latent 4 always does
  assert Workdir.of(tmp_path).root in look.path.parents


def test_firing_rates_come_from_an_evaluation_with_a_histogram(tmp_path):
  path = Workdir.of(tmp_path).export(small.LAYER)
  exports.write(small.random_sae(), path)
  firing = {'edges': [-8, -3, 0], 'latents': [4, 6], 'never': 2}
  table = {str(small.LAYER): {'all': {'rows': 99, 'firing': firing}}}
  (tmp_path / 'evaluation.json').write_text(json.dumps(table))
  (rates,) = figures.of(looking.look(path))['rates']
  assert rates['edges'] == pytest.approx([1e-8, 1e-3, 1])
  assert (rates['counts'], rates['never']) == ([4, 6], 2)
  firing['never'] = 3  # of an SAE with more latents
  (tmp_path / 'evaluation.json').write_text(json.dumps(table))
  assert figures.of(looking.look(path))['rates'] == []


def test_histograms_count_everything_once():
  x_N = np.array([-2.0, -1, 0, 0.05, 0.95, 0.999, 1.0, 1.5])
  found = figures.histogram(x_N, figures.COSINES)
  assert sum(found['counts']) == len(x_N)
  assert found['counts'][-1] == 4
  assert found['counts'][0] == 2


def test_a_store_says_how_long_its_rows_are(tmp_path):
  store = small.write_store(tmp_path / 'train', samples=20)
  rows = [store.read(small.LAYER, *span) for span in store.ranges]
  norm_N = np.linalg.norm(np.concatenate(rows).astype(np.float32), axis=1)
  look = looking.look(tmp_path / 'train')
  found = figures.of_store(look)[f'layer_{small.LAYER}']
  assert (found['rows'], found['nonfinite']) == (200, 0)
  assert found['norm']['median'] == pytest.approx(np.median(norm_N), rel=1e-6)
  assert store.meta.width == D
