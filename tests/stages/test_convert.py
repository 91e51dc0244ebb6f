import json
import os
import pickle
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmm_sae import cli
from lmm_sae.core import evaluation
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import checkpoint, exports, probe, tensors, trainer
from lmm_sae.sae.checkpoint import Checkpoints, Note
from lmm_sae.stages import convert
from tests.sae import foreign_files, small
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


def test_the_card_has_the_figures_of_an_evaluation_that_is_newer(
  workdir, config
):
  file = workdir.file(evaluation.FILE)
  found = {
    'format_version': evaluation.FORMAT_VERSION,
    str(LAYER): {'all': {'rows': 9, 'fvu': 0.123}},
  }
  file.write_text(json.dumps(found))
  convert.run(small.run_config(config), workdir)
  card = workdir.export(LAYER) / 'README.md'
  assert '0.123' in card.read_text()
  os.utime(file, (0, 0))  # older than the checkpoint
  convert.run(small.run_config(config), workdir)
  assert '0.123' not in card.read_text()


def test_an_evaluation_of_an_unknown_format_is_refused(workdir, config):
  file = workdir.file(evaluation.FILE)
  file.write_text(json.dumps({'format_version': 9}))
  with pytest.raises(ValueError, match='format_version 9; this program reads'):
    convert.run(small.run_config(config), workdir)
  assert not workdir.export(LAYER).exists()


@pytest.mark.parametrize('text', ['{', '[1]', f'{{"{LAYER}": 3}}'])
def test_damaged_figures_are_refused(workdir, config, text):
  workdir.file('evaluation.json').write_text(text)
  with pytest.raises(ValueError, match=r'evaluation\.json is damaged'):
    convert.run(small.run_config(config), workdir)
  assert not workdir.export(LAYER).exists()


def test_a_checkpoint_that_was_cut_is_one_line(workdir):
  for file in (workdir.sae(LAYER) / '5' / 'state').glob('**/d/*'):
    os.truncate(file, 50)
  with (
    Checkpoints(workdir.sae(LAYER)) as checkpoints,
    pytest.raises(ValueError, match=r'is damaged \(.{,400}move it away'),
  ):
    checkpoints.note(5)


def test_a_foreign_sae_becomes_the_export_of_its_layer(
  tmp_path, config, foreign
):
  source, sae = foreign
  workdir = Workdir.of(tmp_path / 'new')
  convert.run(small.run_config(config, convert__source=str(source)), workdir)
  got = exports.load(workdir.export(LAYER))
  np.testing.assert_array_equal(got.w_dec_MD, sae.w_dec_MD)
  assert got.config.layer == LAYER
  card = (workdir.export(LAYER) / 'README.md').read_text()
  assert f'| imported from | {source.name} |' in card
  assert str(tmp_path) not in card  # it may be published


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


def tree(path):
  """{file or folder: bytes} below a path."""
  return {
    at.relative_to(path): at.read_bytes() if at.is_file() else b''
    for at in sorted(path.rglob('*'))
  }


def convert_from(source, workdir, *more):
  return cli.main(
    [
      'convert',
      '--config=tests/sae/small_config.py',
      f'--workdir={workdir}',
      f'--config.convert.source={source}',
      *more,
    ]
  )


@pytest.mark.parametrize('stored', [np.float32, ml_dtypes.bfloat16])
def test_the_published_layout_goes_from_file_to_file(
  tmp_path, config, monkeypatch, stored, caplog
):
  sae = small.random_sae(seed=5)
  foreign_files.sparsify(tmp_path / 'hub' / 'model.layers.4', sae, stored)
  read, most = tensors.Tensor.read, []

  def spy(tensor, start=0, stop=None):
    if len(tensor.shape) == 2:
      most.append(stop - start)
    return read(tensor, start, stop)

  monkeypatch.setattr(tensors.Tensor, 'read', spy)
  monkeypatch.setattr(
    tensors,
    'pieces',
    lambda rows, width: ((at, min(at + 5, rows)) for at in range(0, rows, 5)),
  )
  workdir = Workdir.of(tmp_path / 'new')
  settings = small.run_config(config, convert__source=str(tmp_path / 'hub'))
  with caplog.at_level('INFO', logger='absl'):
    convert.run(settings, workdir)
  assert max(most) == 5  # never a whole matrix
  assert 'has no probe.safetensors to verify' in caplog.text
  monkeypatch.undo()
  for layout in ('sparsify', 'saelens'):
    got = exports.load(workdir.export(LAYER) / layout)
    for name in ('w_enc_MD', 'b_enc_M', 'w_dec_MD', 'b_dec_D'):
      want = getattr(sae, name).astype(stored).astype(np.float32)
      np.testing.assert_array_equal(getattr(got, name), want)
  text = (workdir.export(LAYER) / 'README.md').read_text()
  assert 'autoencoder' in text


def test_an_import_of_another_layer_is_refused(tmp_path, config):
  foreign_files.sparsify(tmp_path / 'model.layers.24', small.random_sae())
  source = str(tmp_path / 'model.layers.24')
  settings = small.run_config(config, convert__source=source)
  with pytest.raises(ValueError, match=r'reads layer 24, but lmm\.layers is'):
    convert.run(settings, Workdir.of(tmp_path / 'new'))
  settings.convert.layer = LAYER
  convert.run(settings, Workdir.of(tmp_path / 'new'))
  assert exports.load(tmp_path / 'new/sae/4').config.layer == LAYER


def test_a_source_of_several_layers_gives_those_of_lmm_layers(tmp_path, config):
  saes = {4: small.random_sae(seed=4), 6: small.random_sae(seed=6)}
  for layer, sae in saes.items():
    foreign_files.sparsify(tmp_path / 'hub' / f'model.layers.{layer}', sae)
  for layer, sae in saes.items():
    settings = small.run_config(
      config, convert__source=str(tmp_path / 'hub'), lmm__layers=(layer,)
    )
    convert.run(settings, Workdir.of(tmp_path / 'new'))
    got = exports.load(tmp_path / 'new/sae' / str(layer))
    np.testing.assert_array_equal(got.w_enc_MD, sae.w_enc_MD)
    assert got.config.layer == layer


@pytest.mark.parametrize('at', ['', 'sae/4', 'sae/4/5'])
def test_a_checkpoint_of_another_run_is_imported(tmp_path, workdir, config, at):
  settings = small.run_config(config, convert__source=str(workdir.root / at))
  convert.run(settings, Workdir.of(tmp_path / 'new'))
  got = exports.load(tmp_path / 'new/sae/4')
  np.testing.assert_array_equal(
    got.w_dec_MD, checkpoint.load(workdir.sae(LAYER)).w_dec_MD
  )
  assert got.config == CONFIG


def no_tensor(folder):
  path = folder / 'sae.safetensors'
  path.write_bytes(path.read_bytes()[:-9])


def not_finite(folder):
  held = load_file(folder / 'sae.safetensors')
  held['W_dec'][-1, -1] = np.nan
  save_file(held, folder / 'sae.safetensors')


def other_settings(folder):
  (folder / 'cfg.json').write_text('{"d_in": 7, "k": 3}')


def other_probe(folder):
  golden = load_file(folder / probe.NAME)
  golden['vals_NK'][3] *= 1.01
  save_file(golden, folder / probe.NAME)


def runs_code(folder):
  (folder / 'sae.safetensors').unlink()
  (folder / 'config.json').write_text('{"trainer": {}}')

  class Evil:
    def __reduce__(self):
      return os.mkdir, (str(folder / 'trap'),)

  with zipfile.ZipFile(folder / 'ae.pt', 'w') as file:
    file.writestr('x/data.pkl', pickle.dumps(Evil()))


def leads_out(folder):
  path = folder / 'sae.safetensors'
  path.rename(folder.parent / 'outside')
  path.symlink_to('../outside')


@pytest.mark.parametrize(
  ('harm', 'says'),
  [
    (no_tensor, 'the file is truncated'),
    (not_finite, 'its weights are not finite'),
    (other_settings, 'a width of 7, the tensors 6'),
    (other_probe, 'in the probe and with'),
    (runs_code, 'nothing of it was run'),
    (leads_out, 'it is not read'),
  ],
)
@pytest.mark.parametrize('fresh', [True, False])
def test_what_is_refused_leaves_the_workdir_as_it_was(
  tmp_path, foreign, capsys, monkeypatch, root, harm, says, fresh
):
  monkeypatch.chdir(root)
  workdir = tmp_path / 'new' / 'run'
  if not fresh:
    whole = tmp_path / 'whole'
    exports.write(small.random_sae(seed=4), whole)
    assert convert_from(whole, workdir) == 0
  before = tree(tmp_path / 'new')
  harm(foreign[0])
  code = convert_from(foreign[0], workdir, '--config.index.context=3')
  err = capsys.readouterr().err
  assert code == 2
  assert says in err
  assert err.count('\n') == 1
  assert tree(tmp_path / 'new') == before
  assert (tmp_path / 'new').exists() != fresh
  assert not (foreign[0] / 'trap').exists()


def test_without_a_checkpoint_there_is_nothing_to_export(tmp_path, config):
  with pytest.raises(ValueError, match='run `lmm-sae train`'):
    convert.run(small.run_config(config), Workdir.of(tmp_path))
