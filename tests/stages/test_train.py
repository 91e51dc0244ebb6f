import itertools
import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from experiments import base
from lmm_sae.core import records
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import checkpoint, exports
from lmm_sae.stages import train
from tests.sae import small
from tests.sae.small import LAYER


@pytest.fixture
def workdir(tmp_path) -> Workdir:
  small.write_store(tmp_path / 'acts' / 'train')
  return Workdir.of(tmp_path)


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Workdir:
  """A finished run of 20 steps; read it, do not change it."""
  root = tmp_path_factory.mktemp('trained')
  small.write_store(root / 'acts' / 'train')
  workdir = Workdir.of(root)
  train.run(small.run_config(base.get_config()), workdir)
  return workdir


def files(path):
  """{name: bytes} of a folder."""
  return {
    str(p.relative_to(path)): p.read_bytes()
    for p in path.rglob('*')
    if p.is_file()
  }


def steps(workdir):
  return [x['step'] for x in records.read_lines(workdir.file('metrics.jsonl'))]


def test_training_leaves_checkpoints_metrics_and_exports(trained):
  assert checkpoint.steps(trained.sae(LAYER)) == [15, 20]
  assert set(files(trained.export(LAYER))) == {
    'README.md',
    'sparsify/cfg.json',
    'sparsify/probe.safetensors',
    'sparsify/sae.safetensors',
    'saelens/cfg.json',
    'saelens/probe.safetensors',
    'saelens/sae_weights.safetensors',
  }
  lines = records.read_lines(trained.file('metrics.jsonl'))
  assert [line['step'] for line in lines] == list(range(1, 21))
  assert set(lines[0]) == {
    'layer',
    'step',
    'fvu',
    'auxk',
    'multi',
    'l0',
    'dead',
    'lr',
    'grad_norm',
    'skipped',
    'rows_per_s',
    'input_wait_share',
  }
  assert lines[-1]['fvu'] < lines[0]['fvu']


def test_the_export_reconstructs_raw_rows(trained):
  sae = exports.load(trained.export(LAYER))
  store = ActivationStore.open(trained.acts('train'))
  x_ND = store.read(LAYER, *store.ranges[0]).astype(np.float32)
  error = np.square(x_ND - sae.decode(sae.encode(x_ND))).sum()
  assert error < 0.6 * np.square(x_ND - x_ND.mean(0)).sum()
  np.testing.assert_allclose(np.linalg.norm(sae.w_dec_MD, axis=1), 1, rtol=1e-6)


def test_a_finished_run_is_left_as_it_is(trained):
  before = files(trained.root)
  train.run(small.run_config(base.get_config()), trained)
  assert files(trained.root) == before


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('sae__k', 2, 'sae.k was 3, now 2'),
    ('train__steps', 25, 'train.steps was 20, now 25'),
    ('train__kinds', ('base',), "train.kinds was .'all'., now .'base'."),
  ],
)
def test_other_settings_than_the_checkpoints_are_refused(
  trained, field, value, message
):
  before = files(trained.root)
  config = small.run_config(base.get_config(), **{field: value})
  with pytest.raises(ValueError, match=rf'{message}.*use another workdir'):
    train.run(config, trained)
  assert files(trained.root) == before


def test_what_does_not_change_the_result_may_differ(trained):
  config = small.run_config(base.get_config(), train__save_every=7)
  train.run(config, trained)
  assert checkpoint.steps(trained.sae(LAYER)) == [15, 20]


def test_a_missing_export_is_written_again(trained, tmp_path, monkeypatch):
  aside = tmp_path / 'aside'
  trained.export(LAYER).rename(aside)
  train.run(small.run_config(base.get_config()), trained)
  assert files(trained.export(LAYER)) == files(aside)


KILLED = """
import os, signal, sys
from experiments import base
from lmm_sae.core.workdir import Workdir
from lmm_sae.stages import train
from tests.sae import small

add = train.StepLog.add

def add_or_die(self, step, numbers):
  if step == int(sys.argv[2]):
    os.kill(os.getpid(), signal.SIGKILL)
  add(self, step, numbers)

train.StepLog.add = add_or_die
train.run(small.run_config(base.get_config()), Workdir.of(sys.argv[1]))
"""


@pytest.mark.parametrize('at', [3, 13])
def test_a_killed_run_ends_bit_for_bit_as_an_uninterrupted_one(
  workdir, trained, root, at
):
  command = [sys.executable, '-c', KILLED, str(workdir.root), str(at)]
  done = subprocess.run(command, cwd=root, capture_output=True, check=False)
  assert done.returncode == -signal.SIGKILL, done.stderr.decode()
  found = checkpoint.steps(workdir.sae(LAYER))  # the last was being written
  assert found in ([], [5], [5, 10]) if at > 5 else found == []
  assert not workdir.export(LAYER).exists()
  with workdir.file('metrics.jsonl').open('ab') as file:
    file.write(b'{"layer": 4, "st')  # as if killed while it wrote
  train.run(small.run_config(base.get_config()), workdir)
  assert files(workdir.export(LAYER)) == files(trained.export(LAYER))
  assert steps(workdir) == list(range(1, 21))


def test_the_last_state_saved_is_on_disk_when_training_ends(trained):
  assert not list(trained.sae(LAYER).glob('*tmp*'))


def test_a_kill_while_a_checkpoint_is_written_loses_only_that(
  workdir, trained, monkeypatch
):
  class Killed(BaseException):
    pass

  def die(*_):
    raise Killed

  saves = itertools.count(1)
  save = checkpoint.Checkpoints.save

  def save_or_die(self, state, note, places_S2):
    if next(saves) == 3:
      self.wait()
      (self.path / f'{note.step}.orbax-checkpoint-tmp').mkdir()
      die()
    save(self, state, note, places_S2)

  monkeypatch.setattr(checkpoint.Checkpoints, 'save', save_or_die)
  with pytest.raises(Killed):
    train.run(small.run_config(base.get_config()), workdir)
  monkeypatch.undo()
  assert checkpoint.steps(workdir.sae(LAYER)) == [5, 10]
  train.run(small.run_config(base.get_config()), workdir)
  assert files(workdir.export(LAYER)) == files(trained.export(LAYER))


def test_a_giant_bos_leaves_the_sae_unharmed(tmp_path, trained):
  store = small.write_store(tmp_path / 'acts' / 'train', bos=1e4)
  largest = np.abs(store.read(LAYER, *store.ranges[0]).astype('f4')).max()
  assert largest > 1e4
  workdir = Workdir.of(tmp_path)
  train.run(small.run_config(base.get_config()), workdir)
  assert files(workdir.export(LAYER)) == files(trained.export(LAYER))


def test_every_layer_gets_an_sae(tmp_path, monkeypatch):
  done = []
  store = small.write_store(tmp_path / 'acts' / 'train')
  monkeypatch.setattr(
    train.Run, 'train', lambda self: done.append(self.config.layer)
  )
  monkeypatch.setattr(
    train, 'ActivationStore', type('Fake', (), {'open': lambda _: store})
  )
  store.meta = type(store.meta)(**{**vars(store.meta), 'layers': (4, 6)})
  config = small.run_config(base.get_config(), lmm__layers=(4, 6))
  train.run(config, Workdir.of(tmp_path))
  assert done == [4, 6]


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('sae__k', 13, 'sae.k is 13'),
    ('sae__k', 0, 'sae.k is 0'),
    ('sae__latents', 0, 'sae.latents is 0'),
    ('train__rows', 0, 'train.rows is 0'),
    ('train__devices', 99, 'train.devices is 99'),
    ('train__devices', 3, 'data_shares is 2, which 3'),
    ('train__accumulate', 5, 'multiple of 5'),
    ('train__latent_shards', 2, 'does not divide the 1'),
    ('train__data_shares', 3, 'train.rows is 16, which the 3 shares'),
    ('train__data_shares', 8, 'train.pool_blocks is 4'),
    ('train__keep_best', -1, 'train.keep_best is -1'),
    ('hosts__cluster', 'k8s', "hosts.cluster is 'k8s'"),
    ('hosts__silent_s', 0, 'hosts.silent_s is 0'),
    ('lmm__layers', (5,), 'layer 5 is not in'),
  ],
)
def test_bad_settings_are_refused_before_anything_is_written(
  workdir, field, value, message
):
  before = files(workdir.root)
  config = small.run_config(base.get_config(), **{field: value})
  with pytest.raises(ValueError, match=message):
    train.run(config, workdir)
  assert files(workdir.root) == before


def test_latents_that_the_devices_cannot_share_are_refused(workdir):
  before = files(workdir.root)
  config = small.run_config(
    base.get_config(), train__devices=8, train__latent_shards=8
  )
  with pytest.raises(ValueError, match=r'sae\.latents is 12.*multiple of 8'):
    train.run(config, workdir)
  assert files(workdir.root) == before


def test_a_run_goes_on_with_other_devices(workdir, trained, root):
  command = [sys.executable, '-c', KILLED, str(workdir.root), '13']
  subprocess.run(command, cwd=root, capture_output=True, check=False)
  config = small.run_config(
    base.get_config(), train__devices=8, train__latent_shards=4
  )
  train.run(config, workdir)
  one, many = (
    exports.load(place.export(LAYER)) for place in (trained, workdir)
  )
  np.testing.assert_allclose(many.w_enc_MD, one.w_enc_MD, atol=1e-4)
  np.testing.assert_allclose(many.w_dec_MD, one.w_dec_MD, atol=1e-4)


def test_rows_that_are_not_finite_stop_the_run(workdir, monkeypatch, caplog):
  read_many = train.data.Rows.read_many

  def spoiled(self, blocks):
    for block, x_ND in zip(blocks, read_many(self, blocks), strict=True):
      if block % 3 == 0:
        x_ND[0] = np.nan
      yield x_ND

  monkeypatch.setattr(train.data.Rows, 'read_many', spoiled)
  monkeypatch.setattr(
    train.data.Rows, 'sample', lambda self, count, seed: small.rows(count)
  )
  with pytest.raises(ValueError, match='2 steps of layer 4 met NaN or Inf'):
    train.run(small.run_config(base.get_config()), workdir)
  lines = records.read_lines(workdir.file('metrics.jsonl'))
  assert lines[-1]['fvu'] is None
  assert lines[-1]['skipped'] == 2
  assert not workdir.export(LAYER).exists()


def test_a_missing_store_names_the_stage_that_makes_it(tmp_path, config):
  with pytest.raises(ValueError, match='run `lmm-sae capture`'):
    train.run(small.run_config(config), Workdir.of(tmp_path))


def test_training_imports_no_torch(root):
  code = (
    'import sys; import lmm_sae.stages.train, lmm_sae.stages.evaluate;'
    "sys.exit('torch' in sys.modules)"
  )
  subprocess.run([sys.executable, '-c', code], cwd=root, check=True)


def test_settings_survive_json(trained):
  with checkpoint.Checkpoints(trained.sae(LAYER)) as checkpoints:
    note = checkpoints.note(20)
  assert json.loads(json.dumps(note.settings)) == note.settings
  assert note.settings['acts'] == {'model': 'toy', 'rows': 400}
