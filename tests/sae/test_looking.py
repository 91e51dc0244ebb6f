"""What looking says of a folder, and what it reads for that."""

import json
import os
import pathlib
import re
import shutil

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from hypothesis import strategies as st

from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import checkpoint, exports, figures, looking, tables, trainer
from lmm_sae.sae.checkpoint import Checkpoints, Note
from tests.sae import foreign_files, small
from tests.sae.small import CONFIG, LAYER, D, M

SETTINGS = {'sae': dict(vars(CONFIG)), 'seed': 0}


def save(root, state, step=5, fvu=0.25) -> pathlib.Path:
  """A checkpoint of ours in a workdir."""
  folder = Workdir.of(root).sae(LAYER)
  places_S2 = jnp.array([[2, 7], [1, 30]], jnp.int32)
  with Checkpoints(folder, keep=3) as checkpoints:
    checkpoints.save(state, Note(step, SETTINGS, fvu), places_S2)
  return folder / str(step)


@pytest.fixture(scope='module')
def state():
  return trainer.start(CONFIG, small.rows(50), 0, normalise=True)


@pytest.fixture(scope='module')
def ours(tmp_path_factory, state) -> pathlib.Path:
  """A checkpoint of step 5; do not change it."""
  return save(tmp_path_factory.mktemp('run'), state)


def test_a_checkpoint_of_ours_says_what_it_is(ours, state):
  facts = looking.look(ours).facts
  assert facts['kind'] == 'checkpoint'
  assert (facts['writer'], facts['format']) == ('lmm_sae', 4)
  assert (facts['step'], facts['fvu'], facts['processes']) == (5, 0.25, 1)
  assert facts['settings'] == json.loads(json.dumps(SETTINGS))
  assert facts['position'] == [{'pool': 2, 'row': 7}, {'pool': 1, 'row': 30}]
  assert facts['bytes'] == sum(
    x.stat().st_size for x in ours.rglob('*') if x.is_file()
  )
  assert facts['scalars']['state.scale'] == pytest.approx(float(state.scale))
  shapes = {x['name']: tuple(x['shape']) for x in facts['arrays']}
  assert shapes['params.w_enc_MD'] == (M, D)
  assert len(shapes) == len(jax.tree.leaves(state)) + 1
  json.dumps(facts, allow_nan=False)


def test_of_a_folder_of_checkpoints_the_last_is_shown(tmp_path, state):
  for step in (5, 10, 200):
    save(tmp_path, state, step)
  facts = looking.look(Workdir.of(tmp_path).sae(LAYER)).facts
  assert (facts['step'], facts['steps']) == (200, [5, 10, 200])


def test_the_parameters_are_those_of_the_export(ours, state):
  want = trainer.export_params(state)
  found = looking.look(ours).parameters
  assert sorted(found) == sorted(vars(want))
  for name, parameter in found.items():
    np.testing.assert_allclose(
      parameter.read(), getattr(want, name), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize('layout', ['sparsify', 'saelens'])
def test_both_layouts_of_an_export_give_the_same_parameters(tmp_path, layout):
  sae = small.random_sae()
  exports.write(sae, tmp_path / 'sae', step=7)
  look = looking.look(tmp_path / 'sae' / layout)
  assert look.facts['layout'] == layout
  assert look.facts['settings']['d_in'] == D
  assert not look.facts['warnings']
  for name in ('w_enc_MD', 'b_enc_M', 'w_dec_MD', 'b_dec_D'):
    got = look.parameters[name].read()
    np.testing.assert_array_equal(got, getattr(sae, name))


def test_of_an_export_both_layouts_are_told(tmp_path):
  exports.write(small.random_sae(), tmp_path / 'sae', step=7)
  facts = looking.look(tmp_path / 'sae').facts
  assert (facts['kind'], facts['layout']) == ('export', 'sparsify')
  assert sorted(facts['layouts']) == ['saelens', 'sparsify']
  assert (facts['step'], facts['fvu']) == (7, None)


def test_an_export_has_the_fvu_of_its_workdir(tmp_path):
  workdir = Workdir.of(tmp_path)
  exports.write(small.random_sae(), workdir.export(LAYER))
  table = {str(LAYER): {'all': {'fvu': 0.125}}}
  workdir.file('evaluation.json').write_text(json.dumps(table))
  assert looking.look(workdir.export(LAYER)).facts['fvu'] == 0.125


def test_a_cfg_that_contradicts_the_tensors_is_told(tmp_path):
  exports.write(small.random_sae(), tmp_path / 'sae')
  file = tmp_path / 'sae' / 'sparsify' / 'cfg.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | {'d_in': 99}))
  facts = looking.look(file.parent).facts
  assert facts['warnings'] == ['the settings say width 99, the tensors have 6']


def test_a_bare_tree_of_another_program_is_shown(tmp_path):
  rng = np.random.default_rng(0)
  params = {
    'sae': {
      'W_enc': rng.normal(size=(D, M)),
      'W_dec': rng.normal(size=(M, D)),
      'b_dec': np.zeros(D),
    },
    'other': np.arange(7),
  }
  with v0.StandardCheckpointer() as saver:
    saver.save(tmp_path / 'saved', params)
  look = looking.look(tmp_path / 'saved')
  assert (look.facts['writer'], look.facts['settings']) == ('other', None)
  assert sorted(look.parameters) == ['b_dec_D', 'w_dec_MD', 'w_enc_MD']
  np.testing.assert_allclose(
    look.parameters['w_enc_MD'].read(), params['sae']['W_enc'].T, rtol=1e-6
  )


def test_a_store_says_its_rows_and_kinds(tmp_path):
  small.write_store(tmp_path / 'train')
  facts = looking.look(tmp_path / 'train').facts
  assert facts['kind'] == 'store'
  assert (facts['samples'], facts['rows'], facts['groups']) == (40, 400, 3)
  assert facts['kinds']['base'] == 120
  assert facts['arrays'][0]['dtype'] == 'bfloat16'


@pytest.mark.parametrize('name', ['state/_sharding', 'data/_sharding'])
def test_one_of_ours_without_its_sharding_is_damaged(tmp_path, state, name):
  path = save(tmp_path, state)
  (path / name).unlink()
  with pytest.raises(ValueError, match=f'damaged: {name} is missing'):
    looking.look(path)


def test_one_of_ours_without_its_settings_is_damaged(tmp_path, state):
  path = save(tmp_path, state)
  note = json.loads((path / '_CHECKPOINT_METADATA').read_text())
  del note['custom_metadata']
  (path / '_CHECKPOINT_METADATA').write_text(json.dumps(note))
  with pytest.raises(ValueError, match='damaged: it lacks its settings'):
    looking.look(path)


# What no reader needs: marks, and trees that a merge made superfluous.
SPARE = 'commit_success.txt', 'ocdbt.process_'


@pytest.mark.parametrize('harm', ['gone', 'empty', 'half'])
def test_ours_torn_at_any_file_is_refused(tmp_path, state, harm):
  path = save(tmp_path, state)
  unsaid = []
  for file in [x for x in sorted(path.rglob('*')) if x.is_file()]:
    held = file.read_bytes()
    file.unlink()
    if harm != 'gone':
      file.write_bytes(held[: len(held) // 2 * (harm == 'half')])
    try:
      looking.look(path)
    except ValueError as error:
      if 'is damaged' not in str(error):
        unsaid.append(str(error))
    else:
      if not any(x in str(file.relative_to(path)) for x in SPARE):
        unsaid.append(file)
    file.write_bytes(held)
  assert not unsaid


@hypothesis.settings(
  max_examples=150,
  deadline=None,
  derandomize=True,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(data=st.data())
def test_whatever_befalls_a_file_is_an_error_or_shown(ours, tmp_path, data):
  path = tmp_path / '5'
  if not path.exists():
    shutil.copytree(ours, path)
  files = sorted(x for x in path.rglob('*') if x.is_file())
  file = data.draw(st.sampled_from(files))
  held = file.read_bytes()
  at = data.draw(st.integers(0, len(held)))
  gone = data.draw(st.integers(0, 9))
  new = data.draw(
    st.one_of(
      st.binary(max_size=6),
      st.sampled_from([b'null', b'[]', b'{}', b'-1', b'"x"', b'1e999', b'}']),
    )
  )
  whole = data.draw(st.booleans())
  file.write_bytes(new if whole else held[:at] + new + held[at + gone :])
  try:
    look = looking.look(path)
    list(tables.lines(look.facts | {'stats': figures.of(look)}))
  except ValueError as error:
    assert '\n' not in str(error)  # noqa: PT017 - or nothing is raised
  finally:
    file.write_bytes(held)


def test_a_newer_format_is_refused_by_number(tmp_path, state, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint, 'FORMAT_VERSION', 99)
    path = save(tmp_path, state)
  with pytest.raises(ValueError, match=r'format_version 99.*reads 4'):
    looking.look(path)


def test_a_newer_export_is_refused_by_number(tmp_path):
  exports.write(small.random_sae(), tmp_path / 'sae')
  file = tmp_path / 'sae' / 'sparsify' / 'cfg.json'
  cfg = json.loads(file.read_text())
  file.write_text(json.dumps(cfg | {'format_version': 99}))
  said = rf'format_version 99.*reads {cfg["format_version"]}'
  with pytest.raises(ValueError, match=said):
    looking.look(tmp_path / 'sae')


def test_what_may_not_be_read_is_an_error_of_the_system(ours):
  mode, me = ours.stat().st_mode, os.geteuid()
  ours.chmod(0)
  if not me:
    os.seteuid(65534)  # root may read everything
  try:
    with pytest.raises(PermissionError, match='Permission denied'):
      looking.look(ours)
  finally:
    if not me:
      os.seteuid(me)
    ours.chmod(mode)


@pytest.mark.parametrize(
  ('what', 'said'),
  [
    ('nothing', 'does not exist'),
    ('a/file.txt', 'is a file: name the folder'),
    ('a', 'none that is known: name one checkpoint'),
  ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, what, said):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a' / 'file.txt').write_text('x')
  with pytest.raises(ValueError, match=said):
    looking.look(tmp_path / what)


def test_an_address_is_no_folder():
  with pytest.raises(ValueError, match='local folder, or at s3://'):
    looking.look('ftp://host/run')


def test_safetensors_that_are_cut_are_refused(tmp_path):
  exports.write(small.random_sae(), tmp_path / 'sae')
  file = tmp_path / 'sae' / 'sparsify' / 'sae.safetensors'
  held = file.read_bytes()
  for data in (b'', held[:5], held[:60], held[:-1], held + b'x'):
    file.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(str(file))):
      looking.look(file.parent)


def test_an_sae_of_dictionary_learning_is_shown(tmp_path):
  sae = small.random_sae()
  folders = foreign_files.learning(tmp_path, sae)
  with pytest.raises(
    ValueError, match=r'holds several SAEs: name one of .*topk'
  ):
    looking.look(folders)
  look = looking.look(folders / 'topk')
  assert look.facts['layout'] == 'dictionary_learning'
  assert look.facts['sae']['width'] == D
  for name in ('w_enc_MD', 'w_dec_MD'):
    got = look.parameters[name].read()
    np.testing.assert_array_equal(got, getattr(sae, name))


def read_bytes() -> int:
  """What this process has read from files so far."""
  said = pathlib.Path('/proc/self/io').read_text()
  return int(said.split('rchar:')[1].split()[0])


def test_a_paper_sized_export_is_shown_without_a_read(tmp_path):
  latents, width = 131072, 4096
  exports.write(small.random_sae(), tmp_path / 'sae')
  file = tmp_path / 'sae' / 'sparsify' / 'sae.safetensors'
  at, header = 0, {}
  for name, shape in (
    ('W_dec', [latents, width]),
    ('b_dec', [width]),
    ('encoder.bias', [latents]),
    ('encoder.weight', [latents, width]),
  ):
    end = at + 4 * int(np.prod(shape))
    header[name] = {'dtype': 'F32', 'shape': shape, 'data_offsets': [at, end]}
    at = end
  text = json.dumps(header).encode()
  with file.open('wb') as opened:  # sparse: holes take no disk
    opened.write(len(text).to_bytes(8, 'little') + text)
    opened.truncate(8 + len(text) + at)
  before = read_bytes()
  facts = looking.look(file.parent).facts
  assert read_bytes() - before < 100_000
  assert facts['bytes'] > 4e9
  assert facts['arrays'][0]['shape'] == [latents, width]


def test_a_checkpoint_is_shown_without_a_read_of_its_arrays(tmp_path):
  rng = np.random.default_rng(0)
  params = {
    name: rng.normal(size=(4096, 512)).astype(np.float32) for name in 'ab'
  }
  with v0.StandardCheckpointer() as saver:
    saver.save(tmp_path / 'saved', params)
  looking.look(tmp_path / 'saved')  # what is imported late is read now
  before = read_bytes()
  look = looking.look(tmp_path / 'saved')
  assert read_bytes() - before < 100_000
  assert look.facts['bytes'] > 12e6
  before = read_bytes()
  look.arrays[0].read()
  assert read_bytes() - before > 6e6  # so it would have been seen
