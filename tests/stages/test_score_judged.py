"""The score stage before judges that see the toy run's colours, over HTTP."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from lmm_sae.core import judging, records
from lmm_sae.core.judging import CALIBRATION, Judgement
from lmm_sae.core.records import Explanation, Score
from lmm_sae.sae import exports
from lmm_sae.stages import index
from lmm_sae.stages import score as stage
from tests import toy
from tests.fake_chat import FakeChat, text_of
from tests.stages.test_score import Judge

LABELS = {0: 'a red thing', 1: 'blue', 5: 'striped'}


def shows(image, label: str) -> bool:
  """Whether bright red or blue, as the label has it, is to be seen."""
  pixels = np.asarray(image).astype(int)
  at, other = (0, 2) if 'red' in label else (2, 0)
  return bool((pixels[..., at] > pixels[..., other] + 100).any())


def see(request: dict) -> str:
  """What a judge says who knows red and blue; striped is none of them."""
  text, images = text_of(request), FakeChat.images(request)
  if text.startswith('Look only'):
    return ' '.join(c for c in ('red', 'blue') if shows(images[0], c)) or 'grey'
  label = re.search(r'show this: (.*?)[?.] ', text)[1]
  if 'Which picture' in text:
    lacking = [i for i, x in enumerate(images, 1) if not shows(x, label)]
    return f'Picture {lacking[0]}.' if lacking else 'all of them do'
  return 'Yes.' if shows(images[0], label) else 'No.'


@pytest.fixture
def server():
  with FakeChat(see) as server:
    yield server


@pytest.fixture
def config(config, server):
  config.lmm.layers = (toy.LAYER,)
  config.server.url = 'http://127.0.0.1:1'
  config.score.random = 4
  config.score.bootstrap = 20
  config.score.judge_url = server.url
  config.score.judge_model = 'one'
  config.score.cases = 4
  config.explain.exemplars = 3
  config.explain.retries = 0
  return config


@pytest.fixture
def workdir(config, tmp_path, monkeypatch):
  monkeypatch.setattr(stage, 'SubjectClient', Judge)
  workdir = toy.make_workdir(tmp_path, samples=24)
  index.run(config, workdir)
  explain(workdir)
  return workdir


def explain(workdir, labels=LABELS, explainer='eye') -> None:
  with records.Appender(workdir.file('explanations.jsonl')) as file:
    for latent, label in labels.items():
      made = (toy.LAYER, latent, (), 'explained', label, label, '', explainer)
      file.add(Explanation(*made))


def scores(workdir) -> dict[tuple, Score]:
  lines = records.read(Score, workdir.file('scores.jsonl'))
  table = {(s.latent, s.scorer, s.baseline): s for s in lines}
  assert len(table) == len(lines)
  return table


def judgements(workdir) -> list[Judgement]:
  return records.read(Judgement, workdir.file('judgements.jsonl'))


def told(workdir) -> dict:
  return json.loads(workdir.file('judges.json').read_text())


@pytest.mark.parametrize('fuzz', ['fuzz', 'visible'])
def test_a_judge_that_sees_is_right_of_a_true_label_alone(
  config, workdir, fuzz
):
  config.score.fuzz = fuzz
  stage.run(config, workdir)
  table = scores(workdir)
  assert table[0, 'detection', ''].value == 1
  assert table[0, 'fuzzing', ''].value == 1
  assert table[0, 'intruder', ''].value == 1
  assert table[0, 'detection', ''].n == 4
  assert table[0, 'intruder', ''].n == 1  # of three pictures, for four cases
  for scorer in ('detection', 'fuzzing'):
    assert table[0, scorer, 'shuffled'].value <= 0.5
  # all pictures fire latent 1, be it faintly: there is no silent one
  assert (1, 'detection', '') not in table
  known = told(workdir)['judges']['one']['fuzzing']['calibration']
  assert 0.5 < known['value'] < 1  # it knows no stripes


def test_the_shuffled_label_is_judged_on_the_same_pictures(
  config, workdir, server
):
  stage.run(config, workdir)
  (own, other) = (
    next(
      x
      for x in judgements(workdir)
      if (x.latent, x.scorer, x.baseline) == (0, 'detection', baseline)
    )
    for baseline in ('', 'shuffled')
  )
  assert own.expected == other.expected
  assert own.label != other.label
  seen: dict[str, set[bytes]] = {}
  for request in server.requests:
    if text_of(request).startswith('Does the picture'):
      (image,) = FakeChat.images(request)
      label = re.search(r'show this: (.*?)\?', text_of(request))[1]
      seen.setdefault(label, set()).add(image.tobytes())
  assert len(seen[own.label]) == 4
  assert seen[own.label] <= seen[other.label]  # it has pictures of its own, too


def test_judges_are_tried_on_true_concepts(config, workdir):
  stage.run(config, workdir)
  known = [x for x in judgements(workdir) if x.baseline == CALIBRATION]
  assert {x.label for x in known} == {'red', 'blue', 'striped'}
  for line in known:
    assert (line.latent, line.layer, line.explainer) == (-1, -1, '')
    if line.label != 'striped' and line.scorer != 'intruder':
      assert judging.accuracy(line.answered) == 1


def test_failures_are_counted_and_asked_again(config, workdir, server):
  server.faults = ['500'] * 3 + ['nonsense'] * 2 + ['cut', 'empty']
  stage.run(config, workdir)
  first = told(workdir)['judges']['one']
  assert sum(task['failed'] for task in first.values()) == 6
  asked = sum(task['asked'] for task in first.values())
  answered = [
    said
    for line in judgements(workdir)
    for said in line.said
    if said != judging.FAILED
  ]
  assert len(answered) == asked - 6
  before = len(server.requests)
  stage.run(config, workdir)
  # what failed once, and was not asked again in between, each but once
  assert before < len(server.requests) <= before + 6
  again = told(workdir)['judges']['one']
  assert sum(task['failed'] for task in again.values()) == 0
  assert scores(workdir)[0, 'detection', ''].value == 1


def test_a_run_again_asks_and_changes_nothing(config, workdir, server):
  config.score.second_model = 'two'
  stage.run(config, workdir)
  names = ('scores.jsonl', 'judgements.jsonl', 'judges.json')
  before = {name: workdir.file(name).read_bytes() for name in names}
  count = len(server.requests)
  stage.run(config, workdir)
  assert len(server.requests) == count
  for name in names:
    assert workdir.file(name).read_bytes() == before[name]


def test_a_second_judge_answers_the_same_questions(config, workdir, server):
  config.score.second_model = 'two'
  server.answer = lambda request: (
    'No.' if request['model'] == 'two' else see(request)
  )
  stage.run(config, workdir)
  lines = judgements(workdir)
  mine = {x.key[:6]: x for x in lines if x.judge == 'one' and not x.baseline}
  other = {x.key[:6]: x for x in lines if x.judge == 'two' and not x.baseline}
  assert set(mine) == set(other)
  assert all(mine[key].expected == other[key].expected for key in mine)
  table = scores(workdir)
  assert 0.3 < table[0, 'consistency', ''].value < 0.7
  agreed = told(workdir)['agreement']['detection']
  assert (agreed['value'], agreed['kappa']) == (0.5, 0)
  assert told(workdir)['judges']['two']['detection']['trusted'] is False


def test_another_judge_takes_the_place_of_the_first(config, workdir, server):
  stage.run(config, workdir)
  was = scores(workdir)
  config.score.judge_model = 'blind'
  server.answer = lambda request: 'No.'
  stage.run(config, workdir)
  table = scores(workdir)
  assert set(table) <= set(was)
  assert table[0, 'detection', ''].value == 0.5
  assert table[0, 'iou', ''] == was[0, 'iou', '']
  assert {x.judge for x in judgements(workdir)} == {'blind'}


def test_so_many_latents_are_judged(config, workdir):
  config.score.judged = 1
  stage.run(config, workdir)
  judged = {x.latent for x in judgements(workdir)} - {-1}
  assert len(judged) == 1
  assert {s.latent for s in scores(workdir).values()} >= set(LABELS)


def test_without_truth_nothing_is_known_of_a_judge(
  config, tmp_path, monkeypatch
):
  monkeypatch.setattr(stage, 'SubjectClient', Judge)
  workdir = toy.make_workdir(tmp_path, truth=False)
  index.run(config, workdir)
  explain(workdir)
  stage.run(config, workdir)
  task = told(workdir)['judges']['one']['fuzzing']
  assert task['calibration']['value'] is None
  assert task['trusted'] is None
  assert scores(workdir)[0, 'fuzzing', ''].value == 1


def test_latents_of_a_dictionary_are_scored_beside_the_saes(
  config, workdir, monkeypatch
):
  """It has the same latents here, with the labels of one another."""
  other = workdir.index(toy.LAYER, 'b', 'untrained')
  shutil.copytree(workdir.index(toy.LAYER, 'b'), other)
  loaded = []

  def load(workdir, layer, dictionary, seed):
    loaded.append((layer, dictionary, seed))
    return exports.load(workdir.export(layer))

  monkeypatch.setattr(stage.dictionaries, 'load', load)
  with records.Appender(workdir.file('explanations.jsonl')) as file:
    for latent, label in {0: 'blue', 1: 'red'}.items():
      made = (toy.LAYER, latent, (), 'explained', label, label, '', 'eye')
      file.add(Explanation(*made, dictionary='untrained'))
  config.score.second_model = 'two'
  stage.run(config, workdir)
  assert loaded == [(toy.LAYER, '', 0), (toy.LAYER, 'untrained', 0)]
  lines = records.read(Score, workdir.file('scores.jsonl'))
  by = {(s.dictionary, s.latent, s.scorer, s.baseline): s.value for s in lines}
  assert len(by) == len(lines)
  for scorer in ('detection', 'fuzzing', 'iou'):
    assert by['', 0, scorer, ''] > by['untrained', 0, scorer, '']
  assert by['untrained', 0, 'detection', 'shuffled'] == 1  # the label is red
  scorers = {s.scorer for s in lines if s.dictionary}
  assert scorers == {
    *('iou_exact', 'iou', 'iou_paper', 'clip'),
    *('detection', 'fuzzing', 'intruder'),
  }  # its concepts are not known, and the second judge is not asked
  before = workdir.file('scores.jsonl').read_bytes()
  stage.run(config, workdir)
  assert workdir.file('scores.jsonl').read_bytes() == before


def test_no_judge_is_sent_the_key_of_another(config, workdir, monkeypatch):
  monkeypatch.delenv('OPENAI_API_KEY', raising=False)
  sent = []

  def client(url, model, **options):
    sent.append((url, model, options['role'], options['api_key']))
    raise ConnectionError('as asked')

  monkeypatch.setattr(stage, 'ChatClient', client)
  config.explain.api_key = 'explainer'
  config.score.judge_key = 'first'
  url = config.score.judge_url
  with pytest.raises(ConnectionError):
    stage.run(config, workdir)
  assert sent == [(url, 'one', 'judge', 'first')]


@pytest.mark.parametrize(
  ('url', 'key', 'sent'),
  [('', '', 'first'), ('http://h/v1', '', ''), ('http://h/v1', 'own', 'own')],
)
def test_the_second_judge_has_the_key_of_its_own_server(
  config, workdir, monkeypatch, url, key, sent
):
  config.score.judge_key = 'first'
  config.score.second_model = 'two'
  config.score.second_url = url
  config.score.second_key = key
  kept = stage.Chats.open
  got = []

  def open_(self, role, url, model, key, workdir):
    got.append((role, key))
    return kept(self, role, config.score.judge_url, model, key, workdir)

  monkeypatch.setattr(stage.Chats, 'open', open_)
  stage.run(config, workdir)
  assert got == [('judge', 'first'), ('second', sent)]


def test_without_a_judge_no_one_is_asked(config, workdir, server):
  config.score.judge_url = ''
  config.score.judge_model = ''
  stage.run(config, workdir)
  assert not server.requests
  assert not workdir.file('judges.json').exists()


@pytest.mark.parametrize(
  ('changes', 'says'),
  [
    ({'cases': 1}, 'score.cases 1'),
    ({'judged': -1}, 'score.judged -1'),
    ({'fuzz': 'guess'}, "'guess'"),
    ({'judge_model': ''}, 'without score.judge_model'),
    ({'judge_url': '', 'second_model': 'two'}, 'needs a first'),
    ({'second_model': 'one'}, 'two names'),
    ({'concurrency': 0}, 'score.concurrency'),
  ],
)
def test_what_cannot_be_is_refused(config, changes, says):
  config.score.update(changes)
  with pytest.raises(ValueError, match=says):
    stage.ScoreConfig(**config.score)


KILLED = textwrap.dedent(
  """
  import json, os, signal, sys, threading
  from experiments import base
  from lmm_sae.core.workdir import Workdir
  from lmm_sae.core import chat
  from lmm_sae.stages import score
  from tests.stages.test_score import Judge

  config = base.get_config()
  config.update(json.loads(sys.argv[1]))
  left, lock, keep = [int(sys.argv[3])], threading.Lock(), chat.ChatClient._keep

  def kept(self, *args):
    keep(self, *args)
    with lock:
      left[0] -= 1
      if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)

  chat.ChatClient._keep = kept
  score.SubjectClient = Judge
  score.run(config, Workdir.of(sys.argv[2]))
  """
)


@pytest.mark.parametrize('answers', [0, 9])
def test_killed_amid_answers_and_run_again_it_is_the_same(
  config, workdir, server, answers, tmp_path_factory
):
  config.score.second_model = 'two'
  root = workdir.file('scores.jsonl').parent
  command = [sys.executable, '-c', KILLED, config.to_json_best_effort()]
  env = os.environ | {'JAX_PLATFORMS': 'cpu'}
  process = subprocess.run(
    [*command, str(root), str(answers)], env=env, timeout=120, check=False
  )
  assert process.returncode == -signal.SIGKILL
  begun = len(server.requests)
  assert begun > answers
  stage.run(config, workdir)
  killed = {
    name: workdir.file(name).read_bytes()
    for name in ('scores.jsonl', 'judgements.jsonl', 'judges.json')
  }
  asked = [json.dumps(r, sort_keys=True) for r in server.requests]
  # no more is asked twice than was under way at the kill
  assert len(asked) - len(set(asked)) <= config.score.concurrency
  for name in killed:
    workdir.file(name).unlink()
  stage.run(config, workdir)
  for name, data in killed.items():
    assert workdir.file(name).read_bytes() == data
