"""What changed between two checkpoints."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest

from lmm_sae.sae import differences, exports, trainer
from lmm_sae.sae.looking import look
from tests.sae import small, test_looking
from tests.sae.small import CONFIG, M


@pytest.fixture
def two(tmp_path):
  """(old, new) states and their folders: some rows and counters changed."""
  old = trainer.start(CONFIG, small.rows(50), 0, normalise=True)
  w_dec_MD = old.params.w_dec_MD.at[3].multiply(-1).at[5].multiply(2)
  new = old.replace(
    params=old.params.replace(
      w_dec_MD=w_dec_MD, b_enc_M=old.params.b_enc_M + 0.5
    ),
    idle_M=old.idle_M.at[jnp.array([0, 7])].set(401),
  )
  old = old.replace(idle_M=old.idle_M.at[2].set(9999))
  return [
    (state, test_looking.save(tmp_path, state, step))
    for state, step in ((old, 5), (new, 10))
  ]


def test_changes_equal_those_of_whole_arrays(two):
  (old, then), (new, now) = two
  found = differences.between(look(now), look(then))
  assert found['path'] == str(then)
  changes = found['arrays']['changes']
  name = 'state.params.w_dec_MD'
  a, b = np.asarray(new.params.w_dec_MD), np.asarray(old.params.w_dec_MD)
  assert changes[name]['max_abs'] == pytest.approx(np.abs(a - b).max())
  relative = np.linalg.norm(a - b) / np.linalg.norm(b)
  assert changes[name]['relative'] == pytest.approx(relative)
  assert changes['state.params.b_enc_M'] == {
    'max_abs': 0.5,
    'relative': None,  # the old ones were 0
    'nonfinite': 0,
  }
  assert changes['state.params.w_enc_MD']['max_abs'] == 0
  assert found['settings'] == {'added': {}, 'removed': {}, 'changed': {}}


def test_decoder_rows_are_compared_by_direction(two):
  found = differences.between(look(two[1][1]), look(two[0][1]))['decoder']
  assert found['min'] == pytest.approx(-1)
  assert found['median'] == pytest.approx(1)
  assert found['elsewhere'] == 1  # 3 was turned, 5 only stretched
  assert sum(found['counts']) == M


def test_latents_that_died_or_woke_are_counted(two):
  found = differences.between(look(two[1][1]), look(two[0][1]))
  assert found['latents'] == {'died': 2, 'woke': 1}


def test_a_checkpoint_differs_from_itself_in_nothing(two):
  found = differences.between(look(two[0][1]), look(two[0][1]))
  assert all(x['max_abs'] == 0 for x in found['arrays']['changes'].values())
  assert found['decoder']['min'] == pytest.approx(1)
  assert found['latents'] == {'died': 0, 'woke': 0}


def test_settings_that_differ_are_told_by_their_names(two, monkeypatch):
  settings = {
    'sae': {**vars(CONFIG), 'k': 5, 'extra': True},
    'train': {'lr': 0.5},
  }
  monkeypatch.setattr(test_looking, 'SETTINGS', settings)
  state, then = two[0]
  other = test_looking.save(then.parents[2] / 'other', state)
  found = differences.between(look(other), look(then))['settings']
  assert found == {
    'added': {'sae.extra': True, 'train.lr': 0.5},
    'removed': {'seed': 0},
    'changed': {'sae.k': [3, 5]},
  }


def tree(path, **arrays):
  with v0.StandardCheckpointer() as saver:
    saver.save(path, arrays)
  return look(path)


def test_arrays_that_came_went_or_were_reshaped_are_named(tmp_path):
  old = tree(tmp_path / 'old', a=np.zeros((2, 3)), b=np.ones(4), c=np.ones(5))
  new = tree(
    tmp_path / 'new', b=np.ones(6), c=np.ones(5, np.float32), d=np.ones(2)
  )
  found = differences.between(new, old)['arrays']
  assert (found['added'], found['removed']) == (['d'], ['a'])
  assert found['reshaped'] == {
    'b': ['4 float64', '6 float64'],
    'c': ['5 float64', '5 float32'],
  }
  assert list(found['changes']) == ['c']


def test_values_that_are_not_finite_are_left_out(tmp_path):
  old = tree(tmp_path / 'old', a=np.array([1.0, np.nan, 3, 4]))
  new = tree(tmp_path / 'new', a=np.array([1.0, 2, np.inf, 4.5]))
  found = differences.between(new, old)['arrays']['changes']['a']
  assert (found['max_abs'], found['nonfinite']) == (0.5, 2)


def test_a_checkpoint_and_its_export_have_the_same_parameters(two, tmp_path):
  state, path = two[0]
  exports.write(exports.of(CONFIG, state), tmp_path / 'out')
  for layout in ('sparsify', 'saelens'):
    found = differences.between(look(tmp_path / 'out' / layout), look(path))
    assert found['arrays']['by'] == 'parameter'
    assert not any(found['settings'].values())
    changes = found['arrays']['changes']
    assert {'w_enc_MD', 'b_enc_M', 'w_dec_MD', 'b_dec_D'} <= set(changes)
    assert all(x['max_abs'] < 1e-6 for x in changes.values())


def test_pieces_of_two_arrays_meet_however_they_are_cut(monkeypatch):
  x = np.arange(20.0).reshape(10, 2)

  @dataclasses.dataclass
  class Cut:
    step: int

    def blocks(self, elements):
      return ((at, x[at : at + self.step]) for at in range(0, 10, self.step))

  for one, two in ((3, 4), (10, 1), (1, 10), (5, 5)):
    pairs = list(differences.paired(Cut(one), Cut(two)))
    np.testing.assert_array_equal(np.concatenate([a for a, _ in pairs]), x)
    np.testing.assert_array_equal(np.concatenate([b for _, b in pairs]), x)
    assert all(a.shape == b.shape for a, b in pairs)
