"""stages/all.py, with stubs in the place of the stages and of the servers."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from lmm_sae.core import config as configs
from lmm_sae.core import host, servers, summary
from lmm_sae.core.workdir import Workdir
from lmm_sae.stages import all as all_stage

# A stage that writes down its flags; one named in FAIL fails, in HANG hangs.
STUB = """
import json, os, sys, time
stage, root, *flags = sys.argv[1:]
with open(os.path.join(root, 'calls.jsonl'), 'a') as file:
  file.write(json.dumps([stage, *flags]) + '\\n')
if stage == 'serve':
  print('serving on http://127.0.0.1:7', flush=True)
if stage == 'serve' or stage == os.environ.get('HANG'):
  with open(os.path.join(root, stage + '.pid'), 'w') as file:
    file.write(str(os.getpid()))
  time.sleep(600)
sys.exit(3 if stage == os.environ.get('FAIL') else 0)
"""


@pytest.fixture
def workdir(tmp_path, config):
  place = Workdir.of(tmp_path / 'run')
  place.root.mkdir()
  configs.save(config, place)
  return place


@pytest.fixture
def stubs(monkeypatch, tmp_path):
  """Stubs for every child; the packaged explainers are empty folders."""
  for name in ('small', 'base'):
    (tmp_path / 'weights' / name).mkdir(parents=True)
    (tmp_path / 'weights' / name / 'config.json').write_text('{}')
  monkeypatch.setattr(host, 'weights', lambda: tmp_path / 'weights')

  def command(stage, workdir, flags):
    return [sys.executable, '-c', STUB, stage, str(workdir.root), *flags]

  def explainer(folder, logs, device, threads):
    line = f'print("serving on http://{folder.name}", flush=True)'
    code = f'{line}; import time; time.sleep(600)'
    return servers.Server(
      f'explainer-{folder.name}',
      [sys.executable, '-c', code],
      logs,
      model=folder.name,
    )

  monkeypatch.setattr(all_stage, 'command', command)
  monkeypatch.setattr(servers, 'explainer', explainer)


def calls(workdir: Workdir) -> list[list[str]]:
  lines = workdir.file('calls.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_the_stages_run_in_order_with_their_servers(stubs, config, workdir):
  workdir.file('concepts.json').write_text('{}')
  all_stage.run(config, workdir)
  done = calls(workdir)
  stages = [stage for stage, *_ in done if stage != 'serve']
  assert tuple(stages[:2]) == all_stage.FIRST
  assert stages[2] == 'index'
  assert stages[-1] == 'report'
  beside = stages[3:-1]
  first = [x for x in beside if x in all_stage.LANES[0]]
  assert first == ['evaluate', 'explain', 'explain', 'score']
  assert beside.index('steer') < beside.index('attribute')
  assert beside.count('explain') == 2
  flags = [words for stage, *words in done if stage == 'explain']
  assert flags == [
    [
      f'--config.explain.base_url=http://{name}/v1',
      f'--config.explain.model={name}',
    ]
    for name in ('base', 'small')
  ]
  by_stage = {stage: words for stage, *words in done}
  url = '--config.server.url=http://127.0.0.1:7'
  for stage in ('evaluate', 'score', 'steer', 'attribute'):
    assert by_stage[stage] == [url]
  assert by_stage['capture'] == by_stage['report'] == []


def test_explainers_judge_and_live_until_scores_are_there(
  stubs, config, workdir, monkeypatch
):
  config.score.judge_model, config.score.second_model = 'base', 'small'
  stopped = []
  stop = servers.Server.stop

  def note(server):
    stopped.append((server.name, [stage for stage, *_ in calls(workdir)][-1]))
    stop(server)

  monkeypatch.setattr(servers.Server, 'stop', note)
  all_stage.run(config, workdir)
  by_stage = {stage: words for stage, *words in calls(workdir)}
  assert by_stage['score'][1:] == [
    '--config.score.judge_url=http://base/v1',
    '--config.score.judge_model=base',
    '--config.score.second_url=http://small/v1',
    '--config.score.second_model=small',
  ]
  assert stopped[:2] == [
    ('explainer-base', 'score'),
    ('explainer-small', 'score'),
  ]


def test_without_judges_explainers_end_before_scores(
  stubs, config, workdir, monkeypatch
):
  stopped = []
  stop = servers.Server.stop

  def note(server):
    stopped.append((server.name, [stage for stage, *_ in calls(workdir)][-1]))
    stop(server)

  monkeypatch.setattr(servers.Server, 'stop', note)
  all_stage.run(config, workdir)
  assert stopped[0] == ('explainer-base', 'explain')
  by_stage = {stage: words for stage, *words in calls(workdir)}
  assert len(by_stage['score']) == 1


def test_a_judge_that_nobody_starts_is_refused(stubs, config, workdir):
  config.score.judge_model = 'large'
  with pytest.raises(ValueError, match="'large' is none of the explainers"):
    all_stage.run(config, workdir)
  assert not workdir.file('calls.jsonl').exists()
  config.score.judge_url = 'http://there:3/v1'  # the user's own judges
  all_stage.run(config, workdir)
  by_stage = {stage: words for stage, *words in calls(workdir)}
  assert len(by_stage['score']) == 1  # the subject's server alone


def test_the_seconds_of_each_stage_are_added_up(stubs, config, workdir):
  all_stage.run(config, workdir)
  first = json.loads(workdir.file('seconds.json').read_text())
  assert set(first) == {*all_stage.ORDER, summary.WALL}
  all_stage.run(config, workdir)
  second = json.loads(workdir.file('seconds.json').read_text())
  assert all(second[stage] > first[stage] > 0 for stage in first)


def test_servers_of_the_users_own_are_used(stubs, config, workdir):
  config.server.url = 'http://there:1'
  config.explain.base_url = 'http://there:2/v1'
  all_stage.run(config, workdir)
  done = calls(workdir)
  assert {stage for stage, *_ in done} == set(all_stage.ORDER)
  assert all(not flags for _, *flags in done)  # config.json names them
  assert not workdir.file('logs').exists()


def test_a_failing_stage_is_named_and_ends_the_run(
  stubs, config, workdir, monkeypatch
):
  monkeypatch.setenv('FAIL', 'explain')
  with pytest.raises(ChildProcessError, match=r'stage explain.*exit code 3'):
    all_stage.run(config, workdir)
  assert not {'score', 'report'} & {stage for stage, *_ in calls(workdir)}
  assert not alive(workdir, 'serve')


def test_without_truth_every_stage_waits_for_the_labels(stubs, config, workdir):
  all_stage.run(config, workdir)
  stages = [stage for stage, *_ in calls(workdir) if stage != 'serve']
  stages.remove('explain')  # the second explainer's
  assert tuple(stages) == all_stage.ORDER


def test_a_failing_stage_ends_the_one_beside_it(
  stubs, config, workdir, monkeypatch
):
  workdir.file('concepts.json').write_text('{}')
  monkeypatch.setenv('FAIL', 'steer')
  monkeypatch.setenv('HANG', 'explain')
  with pytest.raises(ChildProcessError, match=r'stage steer.*exit code 3'):
    all_stage.run(config, workdir)
  assert not alive(workdir, 'explain')


def test_a_missing_explainer_is_found_before_anything_runs(
  stubs, config, workdir
):
  config.explain.model = 'large'
  with pytest.raises(ValueError, match="no model 'large'"):
    all_stage.run(config, workdir)
  assert not workdir.file('calls.jsonl').exists()


def test_the_keys_go_to_the_children_and_not_to_disk(
  stubs, config, workdir, monkeypatch
):
  monkeypatch.delenv('OPENAI_API_KEY', raising=False)
  config.explain.api_key = 'sesame'
  config.server.token = 'open'
  config.explain.refine_key, config.score.judge_key = 'short', 'stern'
  logged = []
  monkeypatch.setattr(
    all_stage.logging, 'info', lambda text, *words: logged.append(text % words)
  )
  all_stage.run(config, workdir)
  assert os.environ.pop('OPENAI_API_KEY') == 'sesame'
  by_stage = {stage: words for stage, *words in calls(workdir)}
  for stage in ('serve', 'evaluate', 'score', 'steer', 'attribute'):
    assert '--config.server.token=open' in by_stage[stage]
  assert '--config.explain.refine_key=short' in by_stage['explain']
  assert '--config.score.judge_key=stern' in by_stage['score']
  assert not any('judge_key' in word for word in by_stage['explain'])
  assert not re.search('sesame|open|short|stern', ''.join(logged))


def test_a_command_names_the_config_of_the_workdir(workdir):
  words = all_stage.command('train', workdir, ['--config.sae.k=3'])
  assert words[1:4] == ['-m', 'lmm_sae', 'train']
  assert f'--config={workdir.file("config.json")}' in words
  assert words[-2:] == ['--norecord', '--config.sae.k=3']


@pytest.mark.parametrize(
  ('number', 'code'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_ends_stage_and_servers(tmp_path, workdir, root, number, code):
  """In a process of its own: signals are the process's."""
  driver = tmp_path / 'driver.py'
  driver.write_text(
    textwrap.dedent(
      f"""
      import signal
      import sys
      signal.signal(signal.SIGINT, signal.default_int_handler)  # under nohup
      sys.path.insert(0, {str(root)!r})
      from lmm_sae.core import config as configs
      from lmm_sae.core.workdir import Workdir
      from lmm_sae.stages import all as all_stage
      STUB = {STUB!r}
      all_stage.command = lambda stage, workdir, flags: [
        sys.executable, '-c', STUB, stage, str(workdir.root), *flags]
      workdir = Workdir.of({str(workdir.root)!r})
      config = configs.load(workdir.file('config.json'))
      with config.unlocked():
        config.explain.base_url = 'http://there/v1'
      try:
        all_stage.run(config, workdir)
      except KeyboardInterrupt:
        sys.exit(130)
      """
    )
  )
  process = subprocess.Popen(
    [sys.executable, str(driver)], env=os.environ | {'HANG': 'index'}
  )
  until = time.monotonic() + 60
  try:
    while not alive(workdir, 'index') or not alive(workdir, 'serve'):
      assert time.monotonic() < until
      time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == code
  finally:
    process.kill()
  assert not alive(workdir, 'index')
  assert not alive(workdir, 'serve')


def alive(workdir: Workdir, stage: str) -> bool:
  """Whether the stub of a stage has started and still runs."""
  file = pathlib.Path(workdir.root / f'{stage}.pid')
  if not file.exists() or not file.read_text():
    return False
  try:
    os.kill(int(file.read_text()), 0)
  except ProcessLookupError:
    return False
  return True
