"""inspect: the table, the JSON, the command line; figures are in tests/sae/."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import orbax.checkpoint as v0
import pytest

from lmm_sae import cli
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import exports, looking, tables, trainer
from tests import processes
from tests.sae import small
from tests.sae.small import CONFIG, LAYER
from tests.sae.test_looking import save
from tests.stages import save_together


@pytest.fixture(autouse=True)
def here(root, monkeypatch):
  monkeypatch.chdir(root)


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Workdir:
  """A workdir with two checkpoints, an export and a store; do not change it."""
  workdir = Workdir.of(tmp_path_factory.mktemp('run'))
  state = trainer.start(CONFIG, small.rows(50), 0, normalise=True)
  save(workdir.root, state, 5)
  state = state.replace(idle_M=state.idle_M + 1000)
  save(workdir.root, state, 10)
  exports.write(exports.of(CONFIG, state), workdir.export(LAYER), step=10)
  small.write_store(workdir.acts('train'))
  workdir.file('metrics.jsonl').write_text('{}\n{}\n')
  return workdir


@pytest.fixture
def shown(capsys):
  """Runs inspect with some words and gives what it prints."""

  def run(*words, code=0):
    got = cli.main(['inspect', *map(str, words)])
    said = capsys.readouterr()
    assert got == code, said.err
    if code:
      assert said.err.count('\n') == 1, said.err
      assert said.err.startswith('lmm-sae: ')
      return said.err
    if not said.out.startswith('{'):
      narrow(said.out)
    return said.out

  return run


def narrow(text):
  """No line but a path's is wider than 100 columns."""
  for line in text.splitlines():
    assert len(line) <= tables.WIDTH or line.strip().startswith('/'), line


def parsed(text):
  return json.loads(text, parse_constant=pytest.fail)


def test_a_checkpoint_is_a_table(run, shown):
  out = shown(run.sae(LAYER) / '5')
  for text in (
    'format 4 of lmm_sae',
    'step 5, fvu 0.25, written by 1 process(es)',
    'checkpoints here: 5  10',
    '6 -> 12 latents, k 3, topk',
    'dead_after=400',
    'data position: share 0: pool 2 row 7, share 1: pool 1 row 30',
    'w_enc_MD  12 x 6  float32    288 B',
    'cpu:0',
  ):
    assert text in out


def test_the_table_and_the_json_say_the_same(run, shown):
  path = run.sae(LAYER) / '5'
  facts = parsed(shown(path, '--json', '--stats', '--against', path))
  lines = '\n'.join(tables.lines(facts)) + '\n'
  assert lines == shown(path, '--stats', f'--against={path}')


def test_figures_are_read_only_when_asked_for(run, shown, monkeypatch):
  from lmm_sae.sae.stored import Array

  read = []
  blocks = Array.blocks

  def recorded(self, *rest, **words):
    read.append(self.name)
    return blocks(self, *rest, **words)

  monkeypatch.setattr(Array, 'blocks', recorded)
  shown(run.sae(LAYER) / '5')
  assert not read
  out = shown(run.sae(LAYER) / '5', '--stats')
  assert 'params.w_dec_MD' in read
  for text in ('norms of rows', 'dead: 0 of 12', 'nearest pairs', '####'):
    assert text in out


def test_what_differs_is_told_below(run, shown):
  out = shown(run.sae(LAYER), f'--against={run.sae(LAYER) / "5"}')
  assert 'the same settings' in out
  assert 'latents: 12 died, 0 woke' in out
  assert 'state.idle_M' in out


def test_fields_may_be_written_in_full(run, shown):
  path = run.sae(LAYER) / '5'
  full = shown(
    f'--config.inspect.path={path}',
    '--config.inspect.stats=True',
    '--config.inspect.json=True',
  )
  assert parsed(full) == parsed(shown(path, '--json', '--stats'))


def test_a_workdir_is_shown_in_short_with_all_that_it_holds(run, shown):
  out = shown(f'--workdir={run.root}')
  assert out == shown('--workdir', run.root) == shown(run.root)
  for text in (
    'acts/train',
    '3 of 3 groups, 40 samples, 400 rows',
    f'sae/{LAYER}/5\n',
    f'sae/{LAYER}/10\n',
    'w_enc_MD  12 x 6',
    'SAE in the layout of sparsify and saelens, ',
    'metrics.jsonl  2 lines  6 B',
  ):
    assert text in out
  facts = parsed(shown(run.root, '--json'))
  kinds = [part['kind'] for part in facts['parts']]
  assert kinds == ['store', 'checkpoint', 'checkpoint', 'export']
  assert facts['files']['metrics.jsonl'] == {'bytes': 6, 'lines': 2}
  assert not facts['damaged']


def test_of_a_workdir_what_is_whole_is_shown_beside_what_is_damaged(
  run, tmp_path, capsys
):
  copy = shutil.copytree(run.root, tmp_path / 'run')
  (Workdir.of(copy).sae(LAYER) / '5' / 'state' / 'manifest.ocdbt').unlink()
  assert cli.main(['inspect', str(copy)]) == 2
  said = capsys.readouterr()
  assert f'sae/{LAYER}/10' in said.out
  assert 'manifest.ocdbt is missing' in said.err


def test_an_export_and_a_store_are_tables(run, shown):
  out = shown(run.export(LAYER), '--stats')
  for text in ('k 3, topk', 'encoder.weight', 'dead latents: unknown'):
    assert text in out
  out = shown(run.acts('train'), '--stats')
  for text in ('layer_4', 'bfloat16', 'rows by kind: ', 'not finite'):
    assert text in out


def test_a_checkpoint_of_another_program_is_a_table(tmp_path, shown):
  tree = {
    'a rather long name of a module': {
      'of_which_there_is_another_one_inside': {
        'and_a_third_one_below_that': np.ones((3, 2, 4), np.float16)
      }
    },
    'words': [np.arange(7)] * 60,
  }
  with v0.StandardCheckpointer() as saver:
    saver.save(tmp_path / 'saved', tree)
  out = shown(tmp_path / 'saved', '--stats')
  assert '3 x 2 x 4' in out
  assert 'written by another program' in out
  parsed(shown(tmp_path / 'saved', '--stats', '--json'))


@pytest.mark.parametrize(
  ('words', 'said'),
  [
    (['nowhere'], 'does not exist'),
    (['--workdir=nowhere'], 'does not exist'),
    (['README.md'], 'is a file'),
    (['tests'], 'none that is known'),
    (['ftp://host/x'], 'local folder, or at s3:// or gs://'),
    (['RUN', '--stats'], 'is a workdir: for stats and against name one'),
    (['RUN/acts/train', '--against=RUN/sae/4/5'], 'only checkpoints and SAEs'),
    (['RUN/sae/4/5', '--against=nowhere'], 'nowhere does not exist'),
  ],
)
def test_a_wrong_path_is_one_line(run, shown, words, said):
  words = [word.replace('RUN', str(run.root)) for word in words]
  assert said in shown(*words, code=2)


@pytest.mark.parametrize(
  ('words', 'said'),
  [
    (['a', 'b'], "what is 'b'?"),
    (['a', '--against'], '--against has no value'),
    (['a', '--stats=perhaps'], 'stats'),
    (['a', '--sats'], 'sats'),
  ],
)
def test_a_wrong_word_is_explained(capsys, words, said):
  assert cli.main(['inspect', *words]) == 2
  assert said in capsys.readouterr().err


def test_a_reader_that_is_gone_is_no_error(run, root):
  command = [sys.executable, '-m', 'lmm_sae', 'inspect', str(run.root)]
  with subprocess.Popen(
    command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as process:
    process.stdout.close()
    assert process.stderr.read() == b''
  assert process.returncode == -signal.SIGPIPE


def test_short_fields_are_for_inspect_alone(capsys):
  words = ['train', '--config=experiments/tiny.py', '--workdir=x', '--stats']
  assert cli.main(words) == 2
  assert 'stats' in capsys.readouterr().err


def test_a_torn_checkpoint_is_one_line(run, tmp_path, shown):
  path = shutil.copytree(run.sae(LAYER) / '5', tmp_path / '5')
  for name in ('_CHECKPOINT_METADATA', 'state/manifest.ocdbt'):
    held = (path / name).read_bytes()
    (path / name).write_bytes(held[:20])
    assert 'is damaged' in shown(path, code=2)
    (path / name).write_bytes(held)
  shown(path)


# tensorstore leaves coroutines behind where a read fails.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_values_that_rotted_are_one_line_when_they_are_read(tmp_path, shown):
  big = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
  with v0.StandardCheckpointer() as saver:
    saver.save(tmp_path / 'saved', {'w': big})
  files = [x for x in (tmp_path / 'saved').rglob('d/*') if x.is_file()]
  file = max(files, key=lambda x: x.stat().st_size)
  data = bytearray(file.read_bytes())
  data[:200] = bytes(200)
  file.write_bytes(data)
  shown(tmp_path / 'saved')
  assert 'is damaged' in shown(tmp_path / 'saved', '--stats', code=2)


def by_processes(count, path, cache):
  done = processes.together(
    count, [str(path)], cache=cache, module='tests.stages.save_together'
  )
  assert [x.code for x in done] == [0] * count, done
  return Workdir.of(path).sae(LAYER) / '5'


def check_shares(path, count, data, shown):
  facts = parsed(shown(path, '--json', '--stats'))
  assert (facts['processes'], facts['step']) == (count, 5)
  assert facts['position'] == [{'pool': 2, 'row': 7}, {'pool': 1, 'row': 30}]
  arrays = {f'{x["item"]}.{x["name"]}': x for x in facts['arrays']}
  mesh = {'data': data, 'latent': 2}
  w_dec = arrays['state.params.w_dec_MD']
  assert w_dec['shape'] == [save_together.CONFIG.latents, 70]
  assert w_dec['sharding'] == {'mesh': mesh, 'spec': ['latent']}
  bias = arrays['state.params.b_dec_D']
  assert bias['sharding'] == {'mesh': mesh, 'spec': []}
  state = trainer.export_params(save_together.state())
  for name, parameter in looking.look(path).parameters.items():
    want = getattr(state, name)
    np.testing.assert_allclose(parameter.read(), want, rtol=1e-4, atol=1e-6)
  out = shown(path)
  assert f'written by {count} process(es)' in out
  assert f'mesh data={data} latent=2' in out
  for rank in range(count):
    name = f'state/array_metadatas/process_{rank}'
    assert 'lacks one of the processes' in without(path, name, shown)
    files = path.glob(f'state/ocdbt.process_{rank}/d/*')
    file = max(files, key=lambda x: x.stat().st_size)
    name = str(file.relative_to(path))
    assert f'{file.name} is missing' in without(path, name, shown)


def without(path, name, shown):
  """What is said while a file is away."""
  away = path.parent / 'away'
  (path / name).rename(away)
  said = shown(path, code=2)
  away.rename(path / name)
  return said


def test_a_checkpoint_of_two_processes_is_shown(tmp_path, shown):
  path = by_processes(2, tmp_path / 'two', tmp_path / 'cache')
  check_shares(path, 2, 1, shown)


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_is_shown(tmp_path, shown):
  path = by_processes(4, tmp_path / 'four', tmp_path / 'cache')
  check_shares(path, 4, 2, shown)
