"""Training that was killed: it ends with the bits of a run that was not."""

import pathlib
import random
import shutil
import signal

import jax
import numpy as np
import pytest

from lmm_sae.core import records
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import checkpoint
from lmm_sae.stages import train
from tests import processes
from tests.sae import small, small_config
from tests.sae.small import LAYER

STEPS = small.TRAIN.steps


@pytest.fixture(scope='module')
def whole(tmp_path_factory, acts) -> pathlib.Path:
  """The workdir of a run that nobody disturbed; do not change it."""
  path = tmp_path_factory.mktemp('whole')
  go_on(path, acts)
  return path


def go_on(path: pathlib.Path, acts: pathlib.Path, **changes) -> None:
  """Trains to the end, in this process."""
  config = small_config.get_config()
  for field, value in changes.items():
    config.train[field] = value
  train.run(config, Workdir.of(path, str(acts)))


@pytest.fixture
def kill(acts, cache):
  """Runs `lmm-sae train` until it kills itself, see `tests.killed`."""

  def until(path: pathlib.Path, die: str) -> None:
    words = [
      'train',
      '--config=tests/sae/small_config.py',
      f'--workdir={path}',
      f'--config.acts={acts}',
    ]
    done = processes.run(words, die=die, cache=cache)
    assert done.code == -signal.SIGKILL, done.err

  return until


def files(path: pathlib.Path) -> dict[str, bytes]:
  """{name: bytes} under a folder."""
  return {
    str(p.relative_to(path)): p.read_bytes()
    for p in path.rglob('*')
    if p.is_file()
  }


def assert_same(path: pathlib.Path, whole: pathlib.Path) -> None:
  """Same export, same checkpoint at the end, same figures of every step."""
  one, other = (Workdir.of(each).sae(LAYER) for each in (path, whole))
  assert files(one / 'export') == files(other / 'export')
  with (
    checkpoint.Checkpoints(one) as mine,
    checkpoint.Checkpoints(other) as theirs,
  ):
    states = [each.restore(small.CONFIG, STEPS) for each in (mine, theirs)]
  for x, y in zip(*(tree_bytes(state) for state in states), strict=True):
    assert x == y
  lines = [records.read_lines(each / 'metrics.jsonl') for each in (path, whole)]
  for x, y in zip(*lines, strict=True):
    clock = {'rows_per_s', 'input_wait_share'}
    assert {**x, **dict.fromkeys(clock)} == {**y, **dict.fromkeys(clock)}


def tree_bytes(state) -> list[bytes]:
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


@pytest.mark.parametrize(
  'die',
  [
    'save:10:4',
    *(
      pytest.param(die, marks=pytest.mark.slow)
      for die in ('step:1', 'step:20', 'save:5:1', 'save:15:9', 'save:20:2')
    ),
  ],
)
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(
  whole, acts, kill, tmp_path, die
):
  kill(tmp_path, die)
  assert not Workdir.of(tmp_path).export(LAYER).exists()
  if die.startswith('save:10'):  # with 4 files much is yet to be written
    assert checkpoint.steps(Workdir.of(tmp_path).sae(LAYER)) == [5]
  go_on(tmp_path, acts)
  assert_same(tmp_path, whole)


def test_saving_at_other_steps_changes_nothing(whole, acts, kill, tmp_path):
  kill(tmp_path, 'step:13')  # between two saves
  go_on(tmp_path, acts, save_every=3)
  assert_same(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(3))
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(
  whole, acts, kill, tmp_path, seed
):
  draw = random.Random(seed)
  for _ in range(4):
    done = max(checkpoint.steps(Workdir.of(tmp_path).sae(LAYER)), default=0)
    step = draw.randrange(done + 1, STEPS + 1)
    save = draw.randrange(done // 5 + 1, STEPS // 5 + 1) * 5 if done < 20 else 0
    dies = [f'step:{step}', f'save:{save}:{draw.randrange(1, 12)}']
    kill(tmp_path, draw.choice(dies))
    if max(checkpoint.steps(Workdir.of(tmp_path).sae(LAYER)), default=0) == 20:
      break
  go_on(tmp_path, acts)
  assert_same(tmp_path, whole)


@pytest.mark.filterwarnings('ignore:coroutine:RuntimeWarning')
def test_a_torn_checkpoint_is_named_and_can_be_moved_away(
  whole, acts, tmp_path
):
  path = tmp_path / 'run'
  shutil.copytree(whole, path)
  workdir = Workdir.of(path)
  shutil.rmtree(workdir.export(LAYER))
  last = workdir.sae(LAYER) / '20'
  largest = max(last.glob('state/**/d/*'), key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  before = files(path)
  with pytest.raises(ValueError, match=r'4/20 is damaged.*on from step 15'):
    go_on(path, acts)
  assert files(path) == before
  last.rename(tmp_path / 'aside')
  go_on(path, acts)
  assert_same(path, whole)


def test_the_last_checkpoints_and_the_best_are_kept(acts, tmp_path):
  go_on(tmp_path, acts, save_every=2, keep=2, keep_best=1, lr=0.3)
  lines = records.read_lines(tmp_path / 'metrics.jsonl')
  means = {
    at: sum(x['fvu'] for x in lines[at - 2 : at]) for at in range(2, 21, 2)
  }
  best = min(means, key=means.get)
  assert best not in (18, 20)  # this learning rate is too high to end well
  assert checkpoint.steps(Workdir.of(tmp_path).sae(LAYER)) == [best, 18, 20]
