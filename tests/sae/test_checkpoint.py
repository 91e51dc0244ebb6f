import jax
import numpy as np
import pytest

from lmm_sae.sae import checkpoint, trainer
from lmm_sae.sae.checkpoint import Checkpoints, Note
from tests.sae import small
from tests.sae.small import CONFIG, D, M

SETTINGS = {'sae': {'k': 3}, 'seed': 0}
DATA = {'parent': {'next_index': 2}, 'batch_idx': 7}


@pytest.fixture(scope='module')
def state():
  return trainer.start(CONFIG, small.rows(50), 0, normalise=True)


def test_a_state_comes_back_bit_for_bit(tmp_path, state):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.latest is None
    checkpoints.save(state, Note(5, SETTINGS, DATA))
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest == 5
    assert checkpoints.note(5) == Note(5, SETTINGS, DATA)
    back = checkpoints.restore(CONFIG, 5)
  jax.tree.map(np.testing.assert_array_equal, back, state)
  assert jax.tree.structure(back) == jax.tree.structure(state)


def test_only_the_last_checkpoints_are_kept(tmp_path, state):
  (tmp_path / 'export').mkdir()
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (5, 10, 15):
      checkpoints.save(state, Note(step, SETTINGS, DATA))
  assert checkpoint.steps(tmp_path) == [10, 15]
  assert (tmp_path / 'export').is_dir()


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path, state):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(state, Note(5, SETTINGS, DATA))
  torn = tmp_path / '10.orbax-checkpoint-tmp'
  torn.mkdir()
  (torn / 'half').write_text('x')
  with Checkpoints(tmp_path) as checkpoints:  # reading leaves it alone
    assert checkpoints.latest == 5
  assert torn.exists()
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.latest == 5
    checkpoints.save(state, Note(10, SETTINGS, DATA))  # waits for the cleaning
    assert checkpoints.latest == 10
  assert not torn.exists()


def test_a_checkpoint_of_an_unknown_format_is_refused(
  tmp_path, state, monkeypatch
):
  with monkeypatch.context() as patch, Checkpoints(tmp_path, keep=1) as made:
    patch.setattr(checkpoint, 'FORMAT_VERSION', 99)
    made.save(state, Note(5, SETTINGS, DATA))
  with (
    Checkpoints(tmp_path) as checkpoints,
    pytest.raises(ValueError, match=r'format_version 99.*reads 3'),
  ):
    checkpoints.note(5)


def test_shapes_name_every_array(tmp_path, state):
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(state, Note(5, SETTINGS, DATA))
  shapes = checkpoint.shapes(tmp_path, 5)
  assert tuple(shapes['params.w_enc_MD'].shape) == (M, D)
  assert tuple(shapes['opt_state.mu.b_dec_D'].shape) == (D,)
  assert len(shapes) == len(jax.tree.leaves(state))
