import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_sae.sae import checkpoint, exports, hub, mesh, trainer
from lmm_sae.sae.checkpoint import Checkpoints, Note
from tests.sae import foreign_files, small
from tests.sae.small import CONFIG

SETTINGS = {'sae': {'k': 3}, 'seed': 0}
PLACES_S2 = np.array([[2, 7], [1, 30]], np.int32)


@pytest.fixture(scope='module')
def state():
  return trainer.start(CONFIG, small.rows(50), 0, normalise=True)


def one_device():
  return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def save(checkpoints, state, step, fvu=None):
  places_S2 = jax.device_put(PLACES_S2, one_device())
  checkpoints.save(state, Note(step, SETTINGS, fvu), places_S2)


def test_a_state_comes_back_bit_for_bit(tmp_path, state):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.latest is None
    save(checkpoints, state, 5, 0.25)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest == 5
    assert checkpoints.note(5) == Note(5, SETTINGS, 0.25)
    back = checkpoints.restore(CONFIG, 5)
    places_S2 = checkpoints.places(5, 2, one_device())
  np.testing.assert_array_equal(places_S2, PLACES_S2)
  jax.tree.map(np.testing.assert_array_equal, back, state)
  assert jax.tree.structure(back) == jax.tree.structure(state)


def test_only_the_last_checkpoints_are_kept(tmp_path, state):
  (tmp_path / 'export').mkdir()
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (5, 10, 15):
      save(checkpoints, state, step)
  assert checkpoint.steps(tmp_path) == [10, 15]
  assert (tmp_path / 'export').is_dir()


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path, state):
  with Checkpoints(tmp_path, keep=2, keep_best=1) as checkpoints:
    for step, fvu in ((5, 0.3), (10, 0.1), (15, None), (20, 0.2), (25, 0.4)):
      save(checkpoints, state, step, fvu)
  assert checkpoint.steps(tmp_path) == [10, 20, 25]
  with Checkpoints(tmp_path, keep=2, keep_best=1) as checkpoints:
    save(checkpoints, state, 30, 0.5)  # what was best is read from disk
  assert checkpoint.steps(tmp_path) == [10, 25, 30]


def test_what_is_saved_is_the_state_of_that_moment(tmp_path, state):
  step = jax.jit(
    lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0
  )
  moving = step(jax.tree.map(jnp.copy, state))
  wanted = jax.tree.map(np.array, moving)
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    save(checkpoints, moving, 5)
    for _ in range(5):
      moving = step(moving)
  with Checkpoints(tmp_path) as checkpoints:
    back = checkpoints.restore(CONFIG, 5)
  jax.tree.map(np.testing.assert_array_equal, back, wanted)


@pytest.mark.parametrize(
  'lost',
  ['_CHECKPOINT_METADATA', 'state/_METADATA', 'state/manifest.ocdbt', 'state'],
)
def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(
  tmp_path, state, lost
):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    save(checkpoints, state, 5)
    save(checkpoints, state, 10)
  path = tmp_path / '10' / lost
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink()

  def read():
    with Checkpoints(tmp_path, keep=2) as checkpoints:
      assert checkpoints.latest == 10
      checkpoints.note(10)
      checkpoints.restore(CONFIG, 10)

  with pytest.raises(ValueError, match=r'10 is damaged.*from step 5'):
    read()
  assert checkpoint.steps(tmp_path) == [5, 10]


# tensorstore leaves coroutines behind where a read fails.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.filterwarnings('ignore:coroutine:RuntimeWarning')
@pytest.mark.parametrize('harm', ['gone', 'empty', 'half'])
def test_a_checkpoint_torn_at_any_file_is_an_error_or_harmless(
  tmp_path, state, harm
):
  whole = tmp_path / 'whole'
  with Checkpoints(whole, keep=2) as checkpoints:
    save(checkpoints, state, 10)
  names = [
    p.relative_to(whole) for p in sorted(whole.rglob('*')) if p.is_file()
  ]
  refused = {}
  for at, name in enumerate(names):
    torn = tmp_path / str(at)
    shutil.copytree(whole, torn)
    held = (torn / name).read_bytes()
    (torn / name).unlink()
    if harm != 'gone':
      (torn / name).write_bytes(held[: len(held) // 2 * (harm == 'half')])
    try:
      with Checkpoints(torn) as checkpoints:
        note = checkpoints.note(10)
        back = checkpoints.restore(CONFIG, 10)
        places_S2 = checkpoints.places(10, 2, one_device())
    except ValueError as error:
      refused[name.name] = str(error)
      continue
    assert note == Note(10, SETTINGS, None)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    np.testing.assert_array_equal(places_S2, PLACES_S2)
  for said in refused.values():
    assert '/10 is damaged' in said
    assert 'move it away, and the same command goes from the start' in said
  assert {'_CHECKPOINT_METADATA', '_METADATA', 'manifest.ocdbt'} <= {*refused}


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path, state):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    save(checkpoints, state, 5)
  torn = tmp_path / '10.orbax-checkpoint-tmp'
  torn.mkdir()
  (torn / 'half').write_text('x')
  with Checkpoints(tmp_path) as checkpoints:  # reading leaves it alone
    assert checkpoints.latest == 5
  assert torn.exists()
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.latest == 5
    save(checkpoints, state, 10)
    checkpoints.wait()
    assert checkpoints.latest == 10
  assert not torn.exists()


def test_a_checkpoint_of_an_unknown_format_is_refused(
  tmp_path, state, monkeypatch
):
  with monkeypatch.context() as patch, Checkpoints(tmp_path, keep=1) as made:
    patch.setattr(checkpoint, 'FORMAT_VERSION', 99)
    save(made, state, 5)
  with (
    Checkpoints(tmp_path) as checkpoints,
    pytest.raises(ValueError, match=r'format_version 99.*reads 4'),
  ):
    checkpoints.note(5)


@pytest.fixture(scope='module')
def run(tmp_path_factory, state):
  """sae/4 of a workdir with the checkpoints 5 and 10 and no export."""
  path = tmp_path_factory.mktemp('run') / 'sae' / str(CONFIG.layer)
  settings = {'sae': dataclasses.asdict(CONFIG), 'seed': 0}
  later = state.replace(
    params=state.params.replace(b_enc_M=state.params.b_enc_M + 1)
  )
  with Checkpoints(path, keep=2) as checkpoints:
    for step, held in ((5, state), (10, later)):
      places_S2 = jax.device_put(PLACES_S2, one_device())
      checkpoints.save(held, Note(step, settings, None), places_S2)
  return path


@pytest.mark.parametrize(('at', 'step'), [('', 10), ('5', 5), ('10', 10)])
def test_an_sae_is_loaded_from_a_checkpoint(run, state, at, step):
  sae = checkpoint.load(run / at)
  want = trainer.export_params(state)
  scale = np.asarray(state.scale)
  np.testing.assert_array_equal(sae.w_enc_MD, want.w_enc_MD)
  np.testing.assert_allclose(
    sae.b_enc_M, want.b_enc_M + (step == 10) / scale, rtol=1e-6, atol=1e-7
  )
  assert sae.config == CONFIG


def test_a_workdir_with_one_layer_is_enough_to_say(run, tmp_path):
  workdir = run.parent.parent
  assert checkpoint.load(workdir).config == CONFIG
  copy = tmp_path / 'copy'
  shutil.copytree(run.parent, copy / 'sae')
  (copy / 'sae' / '9').mkdir()
  assert checkpoint.load(copy, layer=4).config == CONFIG
  with pytest.raises(ValueError, match=r'the layers \[4, 9\]: name one'):
    checkpoint.load(copy)


def test_an_sae_of_a_checkpoint_is_laid_on_a_mesh(run):
  spread = checkpoint.load(run, mesh=mesh.make(4, 2))
  x_ND = small.rows(9)
  np.testing.assert_array_equal(
    spread.encode(x_ND).idx_NK, checkpoint.load(run).encode(x_ND).idx_NK
  )


def test_an_export_goes_before_checkpoints(run, tmp_path):
  copy = tmp_path / 'sae' / '4'
  shutil.copytree(run, copy)
  exports.write(small.random_sae(), copy / 'export')
  sae = checkpoint.load(str(copy))
  np.testing.assert_array_equal(sae.w_enc_MD, small.random_sae().w_enc_MD)


def test_a_checkpoint_of_another_layer_is_refused(run):
  with pytest.raises(ValueError, match='is of layer 4, not 7'):
    checkpoint.load(run, layer=7)


def test_what_is_neither_folder_nor_repository_is_refused(tmp_path):
  with pytest.raises(ValueError, match='holds no SAE'):
    checkpoint.load(tmp_path / 'nothing')
  with pytest.raises(ValueError, match=r'no path here.*the hub'):
    checkpoint.load('nobody/nothing-of-this-name')


def test_a_repository_is_fetched_and_read(tmp_path, monkeypatch):
  fetched = []

  def fetch(repo, pickles):
    assert not pickles
    fetched.append(repo)
    return tmp_path

  foreign_files.sparsify(tmp_path / 'model.layers.24', small.random_sae())
  monkeypatch.setattr(hub, 'fetch', fetch)
  assert checkpoint.load('some/sae').config.layer == 24
  assert fetched == ['some/sae']
