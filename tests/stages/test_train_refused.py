"""What `lmm-sae train` refuses: exit code 2, a message, nothing overwritten."""

import numpy as np
import pytest

from lmm_sae import cli
from lmm_sae.core import config as configs
from lmm_sae.core import records
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import checkpoint, exports
from tests.sae import small, small_config
from tests.sae.small import LAYER

CONFIG = '--config=tests/sae/small_config.py'


@pytest.fixture(autouse=True)
def here(root, monkeypatch):
  monkeypatch.chdir(root)


@pytest.fixture
def acts(tmp_path):
  small.write_store(tmp_path / 'acts' / 'train')
  return tmp_path / 'acts'


@pytest.fixture
def run(tmp_path, acts, capsys):
  """Runs the stage in this process: (exit code, what it said)."""

  def train(*words: str) -> tuple[int, str]:
    places = f'--workdir={tmp_path / "run"}', f'--config.acts={acts}'
    code = cli.main(['train', CONFIG, *places, *words])
    err = capsys.readouterr().err
    assert 'Traceback' not in err
    return code, err

  return train


def files(path):
  """{name: bytes} of a folder."""
  return {
    str(p.relative_to(path)): p.read_bytes()
    for p in path.rglob('*')
    if p.is_file()
  }


@pytest.mark.parametrize(
  ('words', 'said'),
  [
    (['--config.sae.k=13'], r'sae.k is 13'),
    (
      ['--config.train.devices=8', '--config.train.latent_shards=8'],
      'sae.latents is 12, which 8 devices cannot share evenly',
    ),
    (['--config.train.latent_shards=3'], 'train.latent_shards is 3'),
    (['--config.train.rows=18'], 'train.rows is 18, which the 4 shares'),
    (['--config.lmm.layers=(5,)'], 'layer 5 is not in'),
    (['--config.hosts.cluster=pod'], "hosts.cluster is 'pod'"),
  ],
)
def test_bad_settings_leave_no_output(run, tmp_path, words, said):
  code, err = run(*words)
  assert code == 2
  assert said in err
  assert [p.name for p in (tmp_path / 'run').iterdir()] == ['config.json']


@pytest.fixture
def trained(run, tmp_path):
  """The folder of a finished run."""
  assert run() == (0, '')
  return tmp_path / 'run'


@pytest.mark.parametrize(
  ('word', 'said'),
  [
    ('--config.sae.k=2', 'with sae.k=3, now it is 2'),
    ('--config.train.lr=0.02', 'with train.lr=0.01, now it is 0.02'),
    ('--config.train.steps=25', 'with train.steps=20, now it is 25'),
    ('--config.train.data_shares=2', 'train.data_shares=4, now it is 2'),
    ('--config.seed=7', 'with seed=0, now it is 7'),
  ],
)
def test_a_config_unlike_the_checkpoints_overwrites_nothing(
  run, trained, word, said
):
  before = files(trained)
  code, err = run(word)
  assert code == 2
  assert said in err
  assert 'use another --workdir, or remove' in err
  assert files(trained) == before


def test_settings_that_change_no_result_are_taken(run, trained):
  assert run('--config.train.save_every=3', '--config.train.keep=1')[0] == 0


def test_a_store_of_another_width_is_refused(
  run, trained, acts, tmp_path, monkeypatch
):
  acts.rename(tmp_path / 'aside')
  monkeypatch.setattr(small, 'D', 7)
  small.write_store(acts / 'train')
  before = files(trained)
  code, err = run()
  assert code == 2
  assert 'sae.width was 6, now 7' in err
  assert files(trained) == before


def test_a_store_that_has_grown_is_refused(run, trained, acts, tmp_path):
  acts.rename(tmp_path / 'aside')
  small.write_store(acts / 'train', samples=56)
  before = files(trained)
  code, err = run()
  assert code == 2
  assert 'acts.rows was 400, now 560' in err
  assert files(trained) == before


def test_a_half_written_checkpoint_is_refused(run, trained):
  workdir = Workdir.of(trained)
  export = workdir.export(LAYER)
  export.rename(trained / 'aside')  # so that the last state is read
  data = max(
    (workdir.sae(LAYER) / '20').glob('state/**/d/*'),
    key=lambda p: p.stat().st_size,
  )
  data.write_bytes(data.read_bytes()[:10])
  before = files(trained)
  code, err = run()
  assert code == 2
  assert '4/20 is damaged' in err
  assert 'the same command goes on from step 15' in err
  assert files(trained) == before


def test_the_layers_are_all_looked_at_before_the_first_is_trained(
  run, trained, acts, tmp_path
):
  # Layer 6 has checkpoints of layer 4: layer 4 must not be trained first.
  workdir = Workdir.of(trained)
  workdir.sae(LAYER).rename(workdir.sae(6))
  config = small_config.get_config()
  config.acts, config.lmm.layers = str(acts), (LAYER, 6)
  configs.save(config, workdir)
  (acts / 'train').rename(tmp_path / 'aside')
  two_layers(acts / 'train')
  code, err = run('--config.lmm.layers=(4, 6)')
  assert code == 2
  assert 'sae.layer was 4, now 6' in err
  assert not workdir.sae(LAYER).exists()


def two_layers(path) -> None:
  """A store of layers 4 and 6, with the same rows."""
  create, write = ActivationStore.create, ActivationStore.write_group

  def create_two(path, meta, *rest):
    paths = {'4': 'a', '6': 'b'}
    both = {**vars(meta), 'layers': (4, 6), 'layer_paths': paths}
    return create(path, type(meta)(**both), *rest)

  def write_two(self, group, rows, *rest):
    return write(self, group, rows | {6: rows[LAYER]}, *rest)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ActivationStore, 'create', create_two)
    patch.setattr(ActivationStore, 'write_group', write_two)
    small.write_store(path)


@pytest.fixture
def spoil(tmp_path, acts, monkeypatch):
  """Writes the store anew, with something not finite in some of its rows."""
  rows = small.rows

  def write(value: float, every: int, first: int = 3) -> None:
    def spoiled(count, seed=0):
      x_ND = rows(count, seed)
      x_ND[first::every, 2] = value
      return x_ND

    acts.rename(tmp_path / 'aside')
    with monkeypatch.context() as patch:
      patch.setattr(small, 'rows', spoiled)
      small.write_store(acts / 'train')

  return write


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_a_step_with_rows_that_are_not_finite_is_skipped_and_counted(
  run, spoil, tmp_path, value
):
  spoil(value, 10**6)  # one row in each of three groups
  code, _ = run('--config.train.max_skipped=3')
  assert code == 0
  lines = records.read_lines(tmp_path / 'run' / 'metrics.jsonl')
  skipped = [line['step'] for line in lines if line['fvu'] is None]
  assert 1 <= len(skipped) <= 3
  assert lines[-1]['skipped'] == len(skipped)
  sae = exports.load(Workdir.of(tmp_path / 'run').export(LAYER))
  for name in ('w_enc_MD', 'b_enc_M', 'w_dec_MD', 'b_dec_D'):
    assert np.isfinite(getattr(sae, name)).all()


def test_too_many_skipped_steps_end_the_run(run, spoil, tmp_path):
  spoil(np.nan, 8)
  code, err = run('--config.train.max_skipped=2')
  assert code == 2
  assert '3 steps of layer 4 met NaN or Inf' in err
  lines = records.read_lines(tmp_path / 'run' / 'metrics.jsonl')
  assert [line['skipped'] for line in lines] == [1, 2, 3]
  assert checkpoint.steps(Workdir.of(tmp_path / 'run').sae(LAYER)) == []


def test_a_store_without_a_finite_row_is_refused(run, spoil):
  spoil(np.nan, 1, first=0)
  code, err = run()
  assert code == 2
  assert 'no row of layer 4' in err
  assert 'capture it again' in err


def test_a_pool_larger_than_the_store_is_told_and_taken(run, caplog):
  code, _ = run('--config.train.pool_blocks=64')
  assert code == 0
  assert 'train.pool_blocks is 64, more than the 50 blocks' in caplog.text
