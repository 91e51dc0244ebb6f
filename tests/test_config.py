"""core/config.py and the files in experiments/."""

import ast
import json

import pytest

from lmm_sae.core import config as configs
from lmm_sae.core.workdir import Workdir

MINE = """
from experiments import base

def get_config():
  config = base.get_config()
  {line}
  return config
"""


@pytest.fixture
def mine(tmp_path):
  """Writes a config of the user's own, far from the checkout."""

  def write(line: str):
    path = tmp_path / 'folder' / 'mine.py'
    path.parent.mkdir(exist_ok=True)
    path.write_text(MINE.format(line=line))
    return path

  return write


@pytest.fixture
def run(tmp_path, config):
  """A workdir that ran with the plain defaults."""
  workdir = Workdir.of(tmp_path / 'run')
  workdir.root.mkdir()
  configs.save(config, workdir)
  return workdir


def test_every_field_of_base_has_a_comment(root, config):
  said = configs.comments(root / 'experiments' / 'base.py')
  silent = [field for field in configs.flat(config) if not said.get(field)]
  assert not silent


def test_a_comment_goes_on_in_the_lines_below(tmp_path):
  path = tmp_path / 'base.py'
  path.write_text(
    'ConfigDict({\n'
    "  'a': {  # the section\n"
    "    'x': 1,  # one\n"
    '    # and more\n'
    "    'y': (  # of y\n"
    '      2,\n'
    '    ),  # two\n'
    '  },\n'
    '})\n'
  )
  assert configs.comments(path) == {
    'a': 'the section',
    'a.x': 'one and more',
    'a.y': 'two',
  }


@pytest.mark.parametrize('name', ['base', 'tiny', 'llava_next_8b'])
def test_the_experiments_load(root, name):
  config = configs.load(root / 'experiments' / f'{name}.py')
  assert config.sae.k <= config.sae.latents


def test_experiments_hold_values_and_import_nothing_of_ours(root):
  for path in (root / 'experiments').glob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ImportFrom):
        assert node.module in ('ml_collections', 'experiments'), path
      assert not isinstance(node, ast.Import | ast.For | ast.If), path


def test_a_config_lies_anywhere(mine):
  assert configs.load(mine('config.sae.k = 3')).sae.k == 3


def test_a_misspelt_field_in_a_file_is_named_with_its_neighbour(mine):
  with pytest.raises(ValueError, match=r"'sae.latent'.*sae.latents"):
    configs.load(mine('config.sae.latent = 3'))


@pytest.mark.parametrize(
  'line',
  ["config.sae.k = 'three'", 'config.sea.k = 3', 'import nothing_at_all', 'if'],
)
def test_a_config_that_cannot_run_says_why(mine, line):
  with pytest.raises(ValueError, match='cannot be run'):
    configs.load(mine(line))


def test_a_missing_config_is_refused(tmp_path):
  with pytest.raises(ValueError, match='does not exist'):
    configs.load(tmp_path / 'nothing.py')


def test_a_config_json_with_fewer_fields_gets_the_defaults(run, config):
  file = run.file('config.json')
  line = json.loads(file.read_text())
  del line['config']['convert']['upload'], line['config']['inspect']
  line['config']['sae']['k'] = 7
  file.write_text(json.dumps(line))
  again = configs.load(file)
  assert again.convert.upload == ''
  assert again.inspect.to_dict() == config.inspect.to_dict()
  assert again.sae.k == 7


def test_config_json_runs_the_same_again(run, config):
  again = configs.load(run.file('config.json'))
  assert configs.flat(again) == configs.flat(config)
  assert isinstance(again.lmm.layers, tuple)


def test_no_secret_reaches_the_disk(tmp_path, config):
  config.explain.api_key = 'sesame'
  config.explain.refine_key = config.explain.category_key = 'sesame'
  config.server.token = 'sesame'
  workdir = Workdir.of(tmp_path)
  configs.save(config, workdir)
  assert 'sesame' not in workdir.file('config.json').read_text()


def test_a_format_from_the_future_is_refused(run):
  file = run.file('config.json')
  line = json.loads(file.read_text()) | {'format_version': 99}
  file.write_text(json.dumps(line))
  with pytest.raises(ValueError, match=r'99.* 1'):
    configs.load(file)


def test_a_folder_of_other_things_is_no_workdir(tmp_path, config):
  (tmp_path / 'letter.txt').write_text('dear')
  with pytest.raises(ValueError, match='no workdir'):
    configs.prepare(config, Workdir.of(tmp_path))


def test_a_file_is_no_workdir(tmp_path, config):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='is a file'):
    configs.prepare(config, Workdir.of(tmp_path / 'file'))


def test_a_new_and_an_empty_folder_are_taken(tmp_path, config):
  configs.prepare(config, Workdir.of(tmp_path / 'new'))
  configs.prepare(config, Workdir.of(tmp_path))


def test_a_change_under_a_trained_sae_is_refused(run, config):
  config.sae.k = 5
  configs.prepare(config, run)  # nothing is trained yet
  run.file('sae').mkdir()
  with pytest.raises(ValueError, match=r'sae.k=8, now it is 5'):
    configs.prepare(config, run)


def test_a_change_under_checkpoints_is_refused(run, config):
  config.train.lr = 0.5
  run.file('sae/2/export').mkdir(parents=True)
  configs.prepare(config, run)  # an imported SAE has no training behind it
  run.file('sae/2/5.orbax-checkpoint-tmp').mkdir()
  configs.prepare(config, run)  # nor has a save that was killed
  run.file('sae/2/5').mkdir()
  with pytest.raises(ValueError, match=r'train.lr=0.0, now it is 0.5.*/sae$'):
    configs.prepare(config, run)


def test_a_change_that_leaves_the_sae_as_it_is_is_taken(run, config):
  run.file('sae/2/5').mkdir(parents=True)
  config.train.save_every, config.train.devices = 7, 3
  configs.prepare(config, run)


def test_explanations_of_one_workdir_were_shown_the_same(run, config):
  config.explain.update({'model': 'other', 'max_tokens': 9, 'mask': 'paper'})
  configs.prepare(config, run)
  run.file('explanations.jsonl').touch()
  with pytest.raises(ValueError, match=r"explain.mask='exact'.*now.*'paper'"):
    configs.prepare(config, run)
  config.explain.mask = 'exact'
  configs.prepare(config, run)


def test_fields_that_may_change_exist(config):
  assert {*configs.FREE} <= {*configs.flat(config)}


def test_a_change_of_what_is_asked_later_is_taken(run, config):
  run.file('sae').mkdir()
  run.file('acts').mkdir()
  config.explain.limit = 7
  configs.prepare(config, run)


@pytest.mark.parametrize(
  ('field', 'value'),
  [('batch', 9), ('keep_halves', ('text',)), ('mix', False), ('store', 'int8')],
)
def test_what_a_capture_stored_cannot_be_told_anew(run, config, field, value):
  (run.root / 'acts').mkdir()
  config.capture[field] = value
  with pytest.raises(
    ValueError, match=rf'made by `capture` with capture.{field}'
  ):
    configs.prepare(config, run)


def test_how_a_capture_is_made_may_be_told_anew(run, config):
  (run.root / 'acts').mkdir()
  config.capture.update(processes=3, workers='ray', ray_gpus=1.0, share='1/4')
  config.lmm.threads = 2
  configs.prepare(config, run)


def test_a_share_is_of_one_command_and_not_kept(tmp_path, config):
  config.capture.share = '1/4'
  workdir = Workdir.of(tmp_path)
  configs.save(config, workdir)
  assert configs.load(workdir.file('config.json')).capture.share == ''
  assert [path.name for path in tmp_path.iterdir()] == ['config.json']


def test_a_config_that_another_host_is_writing_is_no_other_thing(
  tmp_path, config
):
  (tmp_path / 'config.json.node7-123.part').write_text('{')
  configs.prepare(config, Workdir.of(tmp_path))
