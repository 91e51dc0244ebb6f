"""The dictionaries that nobody trained, against their formulas in NumPy."""

import dataclasses

import jax
import numpy as np
import pytest

from lmm_sae.core import records
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.tokens import Kind
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import data, dictionaries, exports, trainer
from lmm_sae.sae import mesh as mesh_lib
from tests.sae import oracle, small

SEED = 3


@pytest.fixture
def workdir(tmp_path):
  """A run with rows to train on, of which BOS are long, and an SAE."""
  workdir = Workdir.of(tmp_path)
  small.write_store(workdir.acts('train'), bos=100.0)
  exports.write(small.random_sae(), workdir.export(small.LAYER))
  return workdir


def stored(workdir: Workdir) -> np.ndarray:
  """Every row of the store but those of BOS, float64 [N, 6]."""
  store = ActivationStore.open(workdir.acts('train'))
  rows = []
  for start, stop in store.ranges:
    kind_N = store.tokens(start, stop, ('kind',))['kind']
    x_ND = store.read(small.LAYER, start, stop).astype(np.float64)
    rows.append(x_ND[kind_N != Kind.BOS])
  return np.concatenate(rows)


def dense(code, latents: int) -> np.ndarray:
  """A code as a matrix [N, M]."""
  z_NM = np.zeros((len(code.vals_NK), latents))
  for row, vals_K, idx_K in zip(z_NM, *code, strict=True):
    row[idx_K[vals_K > 0]] = vals_K[vals_K > 0]
  return z_NM


def test_without_a_name_it_is_the_trained_export(workdir):
  found = dictionaries.load(workdir, small.LAYER, '', SEED)
  trained = exports.load(workdir.export(small.LAYER))
  for name in ('w_enc_MD', 'b_enc_M', 'w_dec_MD', 'b_dec_D', 'theta_M'):
    np.testing.assert_array_equal(getattr(found, name), getattr(trained, name))


def test_untrained_has_the_encoder_that_training_starts_with(workdir):
  sae = dictionaries.load(workdir, small.LAYER, 'untrained', SEED)
  trained = exports.load(workdir.export(small.LAYER))
  assert sae.config == trained.config
  rows = data.Rows(
    ActivationStore.open(workdir.acts('train')), small.LAYER, ('all',), 8
  )
  config = dataclasses.replace(sae.config, dead_after=400)
  state = trainer.start(config, rows.sample(999, 1), SEED, normalise=False)
  np.testing.assert_array_equal(sae.w_enc_MD, state.params.w_enc_MD)
  np.testing.assert_array_equal(sae.w_dec_MD, state.params.w_dec_MD)
  assert not np.array_equal(sae.w_enc_MD, trained.w_enc_MD)
  np.testing.assert_allclose(np.linalg.norm(sae.w_dec_MD, axis=1), 1, 1e-6)
  x_ND = stored(workdir)
  np.testing.assert_allclose(sae.b_dec_D, x_ND.mean(0), rtol=1e-5)

  z_NM = np.maximum((x_ND - x_ND.mean(0)) @ sae.w_enc_MD.T.astype(float), 0)
  wanted_NM = oracle.top(z_NM, small.K)
  found_NM = dense(sae.encode(x_ND), small.M)
  np.testing.assert_allclose(found_NM, wanted_NM, atol=1e-5)


def test_neurons_are_the_channels_and_their_negatives(workdir):
  sae = dictionaries.load(workdir, small.LAYER, 'neurons', SEED)
  assert sae.config.latents == 2 * small.D
  assert sae.config.k == small.K
  x_ND = stored(workdir)
  centred_ND = x_ND - x_ND.mean(0)
  z_NM = np.maximum(np.concatenate([centred_ND, -centred_ND], 1), 0)
  code = sae.encode(x_ND)
  np.testing.assert_allclose(
    dense(code, 2 * small.D), oracle.top(z_NM, small.K), atol=1e-5
  )
  kept_ND = np.where(
    np.argsort(np.argsort(-np.abs(centred_ND))) < small.K, centred_ND, 0
  )
  np.testing.assert_allclose(
    sae.decode(code), kept_ND + x_ND.mean(0), atol=1e-5
  )


@pytest.mark.parametrize('activation', ['batchtopk', 'jumprelu'])
def test_untrained_fires_k_latents_a_row_where_k_is_an_average(
  tmp_path, activation
):
  workdir = Workdir.of(tmp_path)
  small.write_store(workdir.acts('train'))
  config = dataclasses.replace(small.CONFIG, activation=activation, row_k=7)
  exports.write(small.random_sae(config), workdir.export(small.LAYER))
  sae = dictionaries.load(workdir, small.LAYER, 'untrained', SEED)
  assert sae.config.activation == activation
  assert len(set(sae.theta_M.tolist())) == 1
  fired_N = np.count_nonzero(sae.encode(stored(workdir)).vals_NK, axis=1)
  assert fired_N.mean() == pytest.approx(small.K, rel=0.01)
  assert len(set(fired_N.tolist())) > 1
  neurons = dictionaries.load(workdir, small.LAYER, 'neurons', SEED)
  assert neurons.config.most == small.K


def test_neurons_are_no_more_than_there_are(workdir):
  config = dataclasses.replace(small.CONFIG, latents=40, k=20)
  sae = dictionaries.neurons(config, small.rows(9))
  assert sae.config.k == sae.config.latents == 2 * small.D


def test_a_dictionary_is_the_same_each_time_and_with_its_seed(workdir):
  def made(name, seed):
    return dictionaries.load(workdir, small.LAYER, name, seed)

  for name in records.DICTIONARIES:
    one, two = made(name, SEED), made(name, SEED)
    np.testing.assert_array_equal(one.w_enc_MD, two.w_enc_MD)
    np.testing.assert_array_equal(one.b_dec_D, two.b_dec_D)
  other = made('untrained', SEED + 1)
  assert not np.array_equal(other.w_enc_MD, made('untrained', SEED).w_enc_MD)
  assert not list(workdir.root.glob('index'))


@pytest.mark.parametrize('dictionary', records.DICTIONARIES)
def test_on_a_mesh_the_same_latents_fire(workdir, dictionary):
  mesh = mesh_lib.make(4, 2)
  assert jax.device_count() >= 4
  alone = dictionaries.load(workdir, small.LAYER, dictionary, SEED)
  shared = dictionaries.load(workdir, small.LAYER, dictionary, SEED, mesh)
  rows_ND = small.rows(13)
  latents = alone.config.latents
  np.testing.assert_allclose(
    dense(shared.encode(rows_ND), latents),
    dense(alone.encode(rows_ND), latents),
    atol=1e-5,
  )


def test_what_is_not_there_is_named(workdir):
  with pytest.raises(ValueError, match="'raw' is no dictionary"):
    dictionaries.load(workdir, small.LAYER, 'raw', SEED)
  with pytest.raises(ValueError, match='lmm-sae train'):
    dictionaries.load(workdir, small.LAYER + 1, 'untrained', SEED)
  empty = Workdir.of(workdir.root / 'other')
  exports.write(small.random_sae(), empty.export(small.LAYER))
  with pytest.raises(ValueError, match='lmm-sae capture'):
    dictionaries.load(empty, small.LAYER, 'neurons', SEED)
