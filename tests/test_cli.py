"""cli.py: what it refuses and how it says so."""

import errno
import json
import signal
import subprocess
import sys
import types

import pytest

from lmm_sae import cli
from lmm_sae.stages import all as all_stage

TINY = '--config=experiments/tiny.py'


@pytest.fixture(autouse=True)
def here(root, monkeypatch):
  monkeypatch.chdir(root)


@pytest.fixture
def stub(monkeypatch):
  """Puts a function in the place of the train stage's `run`."""

  def put(run):
    module = types.SimpleNamespace(run=run)
    monkeypatch.setitem(sys.modules, 'lmm_sae.stages.train', module)

  return put


def refused(capsys, *argv: str) -> str:
  assert cli.main(list(argv)) == 2
  err = capsys.readouterr().err
  assert 'Traceback' not in err
  return err


def test_without_words_the_stages_are_listed(capsys):
  assert cli.main([]) == 0
  out = capsys.readouterr().out
  for name, stage in cli.STAGES.items():
    assert name in out
    assert stage.does in out


def test_all_runs_the_listed_stages_in_the_listed_order():
  assert tuple(cli.STAGES)[: 1 + len(all_stage.ORDER)] == (
    'all',
    *all_stage.ORDER,
  )


def test_help_of_a_stage_shows_fields_values_and_comments(capsys):
  assert cli.main(['train', '--help']) == 0
  out = capsys.readouterr().out
  assert '--config.train.steps=1500\n      optimiser steps' in out
  assert 'explain.model' not in out


def test_help_shows_the_values_of_the_given_config(capsys):
  assert cli.main(['capture', '--help', TINY]) == 0
  # Or the next broken connection of this process would end it.
  assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
  assert '--config.capture.max_tokens=512' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('argv', 'said'),
  [
    (['trian'], 'did you mean train?'),
    (['zzz'], 'one of all, capture'),
    (['train', 'index', TINY], 'one stage at a time'),
    (['train', TINY], '--workdir=DIR is missing'),
    (['train', '--workdir=DIR'], '--config=FILE is missing'),
    (['train', '--workdir=DIR', '--config=no.py'], 'no.py does not exist'),
    (['train', '--workdir=DIR', '--confg=x.py'], 'Did you mean: config'),
    (['train', TINY, '--workdir=gs://bucket/run'], 'a local folder'),
  ],
)
def test_a_wrong_command_line_is_explained(capsys, tmp_path, argv, said):
  words = [word.replace('DIR', str(tmp_path)) for word in argv]
  assert said in refused(capsys, *words)


@pytest.mark.parametrize(
  ('override', 'said'),
  [
    ('--config.sae.kk=3', 'did you mean sae.k'),
    ('--config.explane.model=x', 'did you mean explain.model'),
    ('--config.steps=3', 'did you mean train.steps'),
    ('--config.sae.k=many', 'sae.k'),
    ('--config.sae.k=2.5', 'sae.k'),
    ('--config.sae=3', "unknown field 'sae'"),
    ('--config.sae.k', 'has no value'),
    ('--config.steer.keep_error=maybe', 'keep_error'),
  ],
)
def test_a_wrong_field_or_value_is_explained(capsys, tmp_path, override, said):
  words = ['train', TINY, f'--workdir={tmp_path / "run"}', override]
  assert said in refused(capsys, *words)
  assert not (tmp_path / 'run').exists()


def test_overrides_keep_the_type_of_their_field():
  config = cli.resolve(
    'experiments/tiny.py',
    [
      '--config.lmm.layers=1,3',
      '--config.train.kinds=base',
      '--config.train.lr=1',
      '--config.steer.keep_error=true',
      '--config.explain.model=a=b',
    ],
  )
  assert config.lmm.layers == (1, 3)
  assert config.train.kinds == ('base',)
  assert config.train.lr == 1.0
  assert config.steer.keep_error is True
  assert config.explain.model == 'a=b'


def test_latents_to_explain_are_a_count_or_a_list():
  count = cli.resolve('experiments/tiny.py', ['--config.explain.latents=20'])
  assert (count.explain.limit, count.explain.latents) == (20, ())
  some = cli.resolve('experiments/tiny.py', ['--config.explain.latents=(20,)'])
  assert (some.explain.limit, some.explain.latents) == (0, (20,))


def test_a_value_may_stand_after_a_space(capsys, tmp_path):
  words = ['train', TINY, '--workdir', str(tmp_path), '--dry_run']
  assert cli.main([*words, '--config.sae.k', '4']) == 0
  assert '--config.sae.k=4' in capsys.readouterr().out
  assert not list(tmp_path.iterdir())


def test_a_run_leaves_its_config_in_the_workdir(stub, tmp_path):
  seen = []
  stub(lambda config, workdir: seen.append((config.sae.k, workdir.root)))
  argv = ['train', TINY, f'--workdir={tmp_path / "run"}', '--config.sae.k=3']
  assert cli.main(argv) == 0
  assert seen == [(3, tmp_path / 'run')]
  line = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert line['config']['sae']['k'] == 3
  assert set(line) == {'format_version', 'commit', 'versions', 'config'}


def test_what_is_done_once_is_not_kept_in_config_json(monkeypatch, tmp_path):
  seen = []
  module = types.SimpleNamespace(
    run=lambda config, _: seen.append(config.convert.upload)
  )
  monkeypatch.setitem(sys.modules, 'lmm_sae.stages.convert', module)
  argv = ['convert', f'--workdir={tmp_path}', '--config.convert.layer=1']
  fields = ('source=a', 'upload=owner/name', 'to=neuronpedia', 'pickles=true')
  more = [f'--config.convert.{field}' for field in fields]
  assert cli.main([*argv, TINY, *more]) == 0
  assert cli.main([*argv, f'--config={tmp_path}/config.json']) == 0
  assert seen == ['owner/name', '']
  line = json.loads((tmp_path / 'config.json').read_text())
  kept = line['config']['convert']
  assert (kept['source'], kept['to'], kept['pickles']) == ('', '', False)
  assert kept['layer'] == 1


def test_an_evaluation_that_fails_leaves_config_json(capsys, tmp_path, stub):
  stub(lambda config, workdir: None)
  assert cli.main(['train', TINY, f'--workdir={tmp_path}']) == 0
  file = tmp_path / 'config.json'
  before = file.read_bytes()
  argv = ['evaluate', f'--config={file}', f'--workdir={tmp_path}']
  refused(capsys, *argv, '--config.evaluate.samples=-1')
  assert file.read_bytes() == before


@pytest.mark.parametrize(
  ('error', 'said'),
  [
    (ValueError('k is too large'), 'lmm-sae: k is too large'),
    (NotImplementedError('no such kernel'), 'no such kernel'),
    (OSError(errno.ENOSPC, 'No space left on device'), 'disk full'),
    (OSError(errno.EADDRINUSE, 'Address in use'), 'port taken'),
    (ConnectionRefusedError('http://x refused'), 'cannot reach a server'),
    (ModuleNotFoundError("No module 'jax'", name='jax'), 'lmm_sae[sae]'),
  ],
)
def test_an_expected_error_is_a_message(capsys, stub, tmp_path, error, said):
  def fail(config, workdir):
    raise error

  stub(fail)
  argv = ['train', TINY, f'--workdir={tmp_path}']
  assert said in refused(capsys, *argv)
  assert cli.main([*argv, '--verbosity=1']) == 2
  assert 'Traceback' in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(stub, tmp_path):
  def fail(config, workdir):
    raise AssertionError('a bug')

  stub(fail)
  with pytest.raises(AssertionError):
    cli.main(['train', TINY, f'--workdir={tmp_path}'])


def test_ctrl_c_exits_with_130(stub, tmp_path):
  def stop(config, workdir):
    raise KeyboardInterrupt

  stub(stop)
  assert cli.main(['train', TINY, f'--workdir={tmp_path}']) == 130


def test_the_module_is_the_command(root):
  done = subprocess.run(
    [sys.executable, '-m', 'lmm_sae', 'trian'],
    cwd=root,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert 'did you mean train' in done.stderr
