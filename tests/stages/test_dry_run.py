"""`capture --dry_run` beside what `capture` then does, and where it cannot."""

import json
import pathlib
import re
import shutil

import pytest

from experiments import base, llava_next_8b
from lmm_sae import cli
from lmm_sae.core import places
from lmm_sae.core.workdir import Workdir
from lmm_sae.lmm import dry_run, estimate, needs
from lmm_sae.stages import capture
from tests.lmm import tiny_llava
from tests.stages import captures
from tests.stages.captures import BAD, config_of, digest, stores

KINDS = ('bos', 'template', 'question', 'answer', 'base', 'tile', 'newline')


@pytest.fixture(scope='module')
def model_folder(tmp_path_factory):
  return tiny_llava.make(tmp_path_factory.mktemp('dry_run') / 'tiny')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return captures.make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture
def config(model_folder, data):
  found = config_of(model_folder, data)
  found.capture.processes = 1
  found.plan.trial = 2
  return found


@pytest.fixture(autouse=True)
def soon(monkeypatch):
  monkeypatch.setattr(estimate, 'RUN_S', (0.0, 60.0))


@pytest.fixture
def forecast(monkeypatch, capsys):
  """Runs a dry run: (what it prints, the parts that it expects)."""

  def run(config, workdir: pathlib.Path) -> tuple[str, dict]:
    parts = {}
    count = estimate.count

    def noted(*args):
      parts.update(count(*args))
      return parts

    monkeypatch.setattr(estimate, 'count', noted)
    capture.dry_run(config, Workdir.of(workdir, config.acts))
    monkeypatch.setattr(estimate, 'count', count)
    return capsys.readouterr().out, parts

  return run


def disk_bytes(folder: pathlib.Path) -> int:
  """As `du` counts them."""
  return sum(file.stat().st_blocks * 512 for file in folder.rglob('*'))


def rows_by_kind(store) -> dict[str, int]:
  found = dict.fromkeys(KINDS, 0)
  for line in store.manifest:
    for kind, count in line['kinds'].items():
      found[kind] += count
  return {kind: count for kind, count in found.items() if count}


CASES = {
  'all tokens': {},
  'mixed': {'mix': True},
  'shares': {'keep': ('base', 'text:0.5'), 'keep_halves': ('all', 'bos')},
  'int8': {'store': 'int8', 'keep': ('image:0.3',)},
}


@pytest.mark.parametrize('fields', CASES.values(), ids=CASES)
def test_what_is_forecast_is_what_is_then_captured(
  config, forecast, tmp_path, fields
):
  config.capture.update(fields)
  out, parts = forecast(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
  assert out.splitlines()[-1] == 'capture can start: nothing is missing'
  workdir = Workdir.of(tmp_path / 'run')
  capture.run(config, workdir)
  rejected = 0
  for name, store in stores(workdir).items():
    part = parts[name]
    kept = {kind: round(one.total) for kind, one in part.kept.items()}
    assert kept == rows_by_kind(store)
    assert part.rows.total == store.num_rows
    assert part.rows.spread == 0
    assert part.rejected.total == len(store.rejects())
    assert sorted(part.reasons) == sorted(r['reason'] for r in store.rejects())
    rejected += part.rejected.total
    seen = sum(sample.tokens for sample in store.samples())
    assert sum(one.total for one in part.seen.values()) == seen
    # Of so small a store much is folders and small files.
    assert part.bytes.total == pytest.approx(
      disk_bytes(tmp_path / 'run' / 'acts' / name), rel=0.05
    )
  assert rejected == len(BAD)


def test_scenes_are_forecast_with_the_images_that_are_kept(
  config, forecast, tmp_path
):
  config.update(base.get_config())
  config.data.train, config.data.half = 9, 5
  config.capture.group, config.capture.processes = 4, 1
  config.capture.max_tokens = 512
  out, parts = forecast(config, tmp_path / 'run')
  assert 'samples      19: train 9, a 5, b 5' in out
  workdir = Workdir.of(tmp_path / 'run')
  capture.run(config, workdir)
  for name, store in stores(workdir).items():
    kept = {kind: one.total for kind, one in parts[name].kept.items()}
    assert kept == rows_by_kind(store)
    assert parts[name].bytes.total == pytest.approx(
      disk_bytes(tmp_path / 'run' / 'acts' / name), rel=0.03
    )


def test_a_part_of_the_data_is_told_with_its_spread(
  config, forecast, tmp_path, monkeypatch
):
  monkeypatch.setattr(estimate, 'COUNTED', 12)
  out, parts = forecast(config, tmp_path / 'run')
  whole, part = parts['a'], parts['train']
  assert (whole.counted, whole.samples, whole.rows.spread) == (4, 4, 0)
  assert (part.counted, part.samples) == (12, 15)
  assert part.rows.spread > 0
  assert ' ± ' in out
  capture.run(config, Workdir.of(tmp_path / 'run'))
  store = stores(Workdir.of(tmp_path / 'run'))['train']
  # The spread is that of 95 in 100 draws; this seed's is one of them.
  assert abs(part.rows.total - store.num_rows) <= part.rows.spread


def test_nothing_is_left_behind(config, forecast, tmp_path, monkeypatch):
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path / 'temporary'))
  (tmp_path / 'temporary').mkdir()
  forecast(config, tmp_path / 'run')
  assert [path.name for path in tmp_path.iterdir()] == ['temporary']
  assert not list((tmp_path / 'temporary').iterdir())


def test_a_store_that_is_partly_captured_is_left_as_it_is(
  config, forecast, tmp_path
):
  config.capture.share = '1/2'  # of 3 groups of train and 1 of a: 1 and 0
  workdir = Workdir.of(tmp_path / 'run')
  capture.run(config, workdir)
  before = digest(workdir)
  config.capture.share = ''
  out, parts = forecast(config, tmp_path / 'run')
  assert digest(workdir) == before
  assert 'train: 1 of 3 groups' in out
  assert 'left         samples of train 10, a 4, b 4' in out
  assert {name: part.samples for name, part in parts.items()} == {
    'train': 10,
    'a': 4,
    'b': 4,
  }
  done = disk_bytes(tmp_path / 'run')
  capture.run(config, workdir)
  left = sum(part.bytes.total for part in parts.values())
  assert left == pytest.approx(disk_bytes(tmp_path / 'run') - done, rel=0.2)
  out, _ = forecast(config, tmp_path / 'run')
  assert 'nothing is left to be done' in out
  assert out.splitlines()[-1] == 'capture is complete: there is nothing to do'


def test_a_store_of_other_settings_is_missing_nothing_but_another_place(
  config, forecast, tmp_path
):
  capture.run(config, Workdir.of(tmp_path / 'run'))
  config.capture.batch = 2
  out, _ = forecast(config, tmp_path / 'run')
  assert 'was captured with other settings' in re.sub(r'\s+', ' ', out)
  assert out.splitlines()[-1] == 'capture cannot start here; missing: store'


def test_a_disk_that_is_too_small_is_told_with_what_helps(
  config, forecast, tmp_path, monkeypatch
):
  usage = shutil.disk_usage(tmp_path)._replace(free=70_000)
  monkeypatch.setattr(needs.shutil, 'disk_usage', lambda path: usage)
  out, _ = forecast(config, tmp_path / 'run')
  assert 'it does not fit' in ' '.join(out.split())  # wherever it is wrapped
  assert '--config.capture.store=int8' in out
  assert out.splitlines()[-1] == 'capture cannot start here; missing: disk'


def test_of_a_bucket_it_is_not_known_what_it_holds(
  config, forecast, tmp_path, monkeypatch
):
  config.acts = 's3://bucket/run'
  monkeypatch.setattr(dry_run.captured, 'found', lambda *_: {})
  monkeypatch.setattr(places.Place, 'exists', lambda _: False)
  out, _ = forecast(config, tmp_path / 'run')
  told = 's3://bucket/run: a bucket; how much it may hold is not known'
  assert told in re.sub(r'\s+', ' ', out)
  assert out.splitlines()[-1] == 'capture can start: nothing is missing'


def test_more_memory_than_there_is_is_missing(
  config, forecast, tmp_path, monkeypatch
):
  monkeypatch.setattr(needs.jobs, 'memory', lambda: 20_000)
  out, _ = forecast(config, tmp_path / 'run')
  assert out.splitlines()[-1] == 'capture cannot start here; missing: memory'


def test_rows_that_all_are_rejected_are_told(config, forecast, tmp_path):
  config.capture.max_tokens = 3
  out, _ = forecast(config, tmp_path / 'run')
  assert 'at most 3 are taken' in re.sub(r'\s+', ' ', out)
  assert out.splitlines()[-1].endswith('missing: model or data')


def test_the_paper_on_a_machine_with_nothing(capsys, monkeypatch, root):
  monkeypatch.chdir(root)
  path = 'experiments/llava_next_8b.py'
  assert cli.main(['capture', f'--config={path}', '--dry_run']) == 0
  out = capsys.readouterr().out
  plan = llava_next_8b.get_config().plan
  assert f'{plan.samples * plan.tokens:,}' in out
  size = plan.samples * plan.tokens * (2 * plan.width + 27) / 2**40
  assert f'{size:.3g} TiB' in out
  commands = [line.strip() for line in out.splitlines()]
  assert (
    'hf download llava-hf/llama3-llava-next-8b-hf --local-dir DIR' in commands
  )
  assert '--config.data.path=FILE.json --config.data.image_root=IMAGES' in (
    commands
  )
  verdict = out.splitlines()[-1]
  assert verdict.startswith('capture cannot start here; missing: weights')
  assert 'data' in verdict


def test_a_config_json_alone_tells_width_and_weights(
  config, forecast, model_folder, tmp_path
):
  bare = tmp_path / 'bare'
  bare.mkdir()
  shutil.copy(model_folder / 'config.json', bare)
  config.lmm.path = str(bare)
  config.lmm.dtype = 'bfloat16'
  config.lmm.layers = (0, 1, 2)
  out, parts = forecast(config, tmp_path / 'run')
  assert not parts
  assert 'D=24, bfloat16, layers 0, 1, 2' in out
  count = needs.parameters(model_folder)
  assert needs.parameters(bare) == count
  assert f'{needs.size(2 * count)} as bfloat16' in out
  lacking = 'lacks tokenizer.json, preprocessor_config.json, '
  assert lacking in re.sub(r'\s+', ' ', out)
  assert out.splitlines()[-1] == 'capture cannot start here; missing: weights'


def test_shards_of_the_weights_that_are_not_here_are_named(
  config, forecast, model_folder, tmp_path
):
  folder = tmp_path / 'sharded'
  shutil.copytree(model_folder, folder)
  names = [f'model-0000{at}-of-00003.safetensors' for at in (1, 2, 3)]
  (folder / 'model.safetensors').rename(folder / names[1])
  index = {'weight_map': dict(zip('xyz', names, strict=True))}
  (folder / needs.INDEX).write_text(json.dumps(index))
  config.lmm.path = str(folder)
  out, _ = forecast(config, tmp_path / 'run')
  assert f'lacks {names[0]}, {names[2]}' in re.sub(r'\s+', ' ', out)


def test_packages_that_are_missing_are_named_with_their_extras(
  config, forecast, tmp_path, monkeypatch
):
  find = needs.importlib.util.find_spec
  absent = ('torch', 'ray', 'bitsandbytes')
  monkeypatch.setattr(
    needs.importlib.util,
    'find_spec',
    lambda name: None if name in absent else find(name),
  )
  config.capture.workers, config.lmm.dtype = 'ray', 'int8'
  out, _ = forecast(config, tmp_path / 'run')
  assert 'not installed: torch, bitsandbytes' in re.sub(r'\s+', ' ', out)
  assert "pip install 'lmm_sae[torch,int8,ray]'" in out


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'data.source': 'images', 'data.path': 'no'}, 'FOLDER_OF_IMAGES'),
    (
      {'data.source': 'hub', 'data.path': 'owner/name'},
      'hf download --repo-type dataset owner/name --local-dir DIR',
    ),
  ],
)
def test_data_that_is_not_here_is_told_how_to_get(
  config, forecast, tmp_path, fields, said
):
  config.update_from_flattened_dict(fields)
  out, _ = forecast(config, tmp_path / 'run')
  assert said in out
  assert out.splitlines()[-1] == 'capture cannot start here; missing: data'


def test_what_capture_refuses_is_refused(capsys, root, monkeypatch):
  monkeypatch.chdir(root)
  argv = ['capture', '--config=experiments/tiny.py', '--dry_run']
  assert cli.main([*argv, '--config.capture.keep=zzz']) == 2
  assert 'zzz' in capsys.readouterr().err


def test_help_says_what_a_dry_run_of_capture_is(capsys):
  assert cli.main(['capture', '--help']) == 0
  assert 'of capture: what it lacks' in capsys.readouterr().out
