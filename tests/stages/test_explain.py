"""The explain stage against a server that sees the pictures' true colours."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from lmm_sae.core import explaining, records
from lmm_sae.core.chat import Answer, ChatError
from lmm_sae.core.index import TextExemplar
from lmm_sae.stages import explain as stage
from lmm_sae.stages import index
from tests import toy
from tests.fake_chat import FakeChat, text_of


def see(request: dict) -> str:
  """What a good explainer says: the colour of the bright patches."""
  text = text_of(request)
  if text.startswith('Shorten'):
    return f' "{text.rsplit(" ", 1)[1]}." \n'
  if text.startswith('Which kind'):
    return 'It is a Color.' if 'red' in text or 'blue' in text else 'dunno'
  if '<<' in text:
    return f'CONCEPT: the word {text.rsplit("<<")[-1].split(">>")[0]}'
  pixels = np.concatenate(
    [np.asarray(i, float).reshape(-1, 3) for i in FakeChat.images(request)]
  )
  red = (pixels[:, 0] > 2 * pixels[:, 2]) & (pixels[:, 0] > 100)
  blue = (pixels[:, 2] > 2 * pixels[:, 0]) & (pixels[:, 2] > 100)
  seen = [
    word for word, bright in (('red', red), ('blue', blue)) if bright.any()
  ]
  if len(seen) != 1:
    return 'CONCEPT: none'
  long = 'what is bright here is blue'
  return f'CONCEPT: {long if seen == ["blue"] else "red"}.'


@pytest.fixture
def server():
  with FakeChat(see) as server:
    yield server


@pytest.fixture
def config(config, server):
  config.lmm.layers = (toy.LAYER,)
  config.index.splits = ('b',)
  config.explain.base_url = server.url
  config.explain.model = 'eye'
  config.explain.pixels = 0
  config.explain.exemplars = 3
  config.explain.retries = 0
  return config


@pytest.fixture
def workdir(config, tmp_path):
  workdir = toy.make_workdir(tmp_path)
  index.run(config, workdir)
  return workdir


def explanations(workdir) -> list[records.Explanation]:
  return records.read(records.Explanation, workdir.file('explanations.jsonl'))


def test_every_latent_has_a_line_with_its_fate(config, workdir, server):
  stage.run(config, workdir)
  lines = explanations(workdir)
  assert [line.latent for line in lines] == list(range(toy.M))
  assert [line.outcome for line in lines] == [
    'explained',
    'explained',
    'no_pattern',
    'explained',
    'always_on',
    'no_pattern',  # stripes on red and on blue
    'dead',
  ]
  assert [line.text for line in lines[:4]] == [
    'red',
    'what is bright here is blue',
    '',
    'the word red',
  ]
  labels = [line.label for line in lines]
  assert labels == ['red', 'blue', '', 'the word red', '', '', '']
  assert [line.category for line in lines[:4]] == [
    'colour',
    'colour',
    '',
    'colour',
  ]
  assert {(line.layer, line.explainer) for line in lines} == {
    (toy.LAYER, 'eye')
  }
  assert [len(line.exemplars) for line in lines] == [3, 3, 3, 1, 3, 3, 0]
  strengths = [e.strength for e in lines[0].exemplars]
  assert strengths == sorted(strengths, reverse=True)
  asked = [text_of(request) for request in server.requests]
  assert sum(text.startswith('3 pictures') for text in asked) == 4


def test_what_is_silent_is_dimmed_to_an_eighth(config, workdir, server):
  config.explain.latents = (0,)
  config.explain.pixels = 8
  stage.run(config, workdir)
  request = next(r for r in server.requests if 'pictures' in text_of(r))
  image = np.asarray(FakeChat.images(request)[0])
  assert image.shape == (8, 8, 3)
  bright = image.max(-1) > 60
  assert 0 < bright.sum() < 64
  assert bright.reshape(4, 2, 4, 2).any((1, 3)).sum() * 4 == bright.sum()


def test_running_again_asks_nothing(config, workdir, server):
  stage.run(config, workdir)
  before = workdir.file('explanations.jsonl').read_bytes()
  count = len(server.requests)
  stage.run(config, workdir)
  assert len(server.requests) == count
  assert workdir.file('explanations.jsonl').read_bytes() == before


def test_a_second_explainer_stands_beside_the_first(config, workdir):
  stage.run(config, workdir)
  config.explain.model = 'other'
  stage.run(config, workdir)
  names = [line.explainer for line in explanations(workdir)]
  assert names == ['eye'] * toy.M + ['other'] * toy.M
  used = json.loads(workdir.file('usage.json').read_text())['used']
  for role in ('explainer', 'refiner', 'category'):
    assert set(used[role]) == {'eye', 'other'}
    one = used[role]['eye']
    assert one['prompt_tokens'] == 7 * one['requests'] > 0


def test_failures_are_counted_and_asked_again(config, workdir, server):
  config.explain.concurrency = 1
  server.faults = ['500', 'nonsense', 'drop', '400']
  stage.run(config, workdir)
  lines = explanations(workdir)
  assert [line.outcome for line in lines].count('failed') == 4
  assert all(not line.text for line in lines if line.outcome == 'failed')
  stage.run(config, workdir)
  mended = workdir.file('explanations.jsonl').read_bytes()
  assert b'failed' not in mended
  workdir.file('explanations.jsonl').unlink()
  stage.run(config, workdir)  # uninterrupted, from the cache
  assert workdir.file('explanations.jsonl').read_bytes() == mended


def test_a_server_that_goes_away_ends_the_stage_and_loses_nothing(
  config, workdir, server
):
  config.explain.concurrency = 1
  config.explain.retries = 1

  def answer(request):
    if len(server.requests) == 5:
      server.stop()
    return see(request)

  server.answer = answer
  with pytest.raises(ConnectionError, match=r'explain\.base_url'):
    stage.run(config, workdir)
  done = explanations(workdir)
  assert 0 < len(done) < toy.M
  assert not any(line.outcome == 'failed' for line in done)
  with FakeChat(see) as other:
    config.explain.base_url = other.url
    stage.run(config, workdir)
    assert explanations(workdir)[: len(done)] == done
    assert len(explanations(workdir)) == toy.M


def test_a_model_that_is_not_there_leaves_no_line(config, workdir, server):
  server.faults = ['500', '404']
  config.explain.concurrency = 1
  with pytest.raises(ValueError, match=r'explain\.model'):
    stage.run(config, workdir)
  assert not explanations(workdir)


KILLED = """
  import os, signal
  from experiments import base
  from lmm_sae.core import records
  from lmm_sae.core.workdir import Workdir
  from lmm_sae.stages import explain as stage

  class Killed(records.Appender):
    def add(self, record):
      if len(self.existing) + self.count == 2:
        self._file.write(b'{"layer": 2, "la')
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
      self.count += 1
      super().add(record)
    count = 0

  records.Appender = Killed
  config = base.get_config()
  config.lmm.layers = (2,)
  config.explain.base_url = $URL
  config.explain.model = 'eye'
  config.explain.pixels = 0
  config.explain.exemplars = 3
  stage.run(config, Workdir.of($ROOT))
"""


def test_killed_and_resumed_is_as_uninterrupted(config, workdir, server, root):
  script = textwrap.dedent(KILLED).replace('$URL', repr(server.url))
  done = subprocess.run(
    [sys.executable, '-c', script.replace('$ROOT', repr(str(workdir.root)))],
    cwd=root,
    env=os.environ | {'PYTHONPATH': str(root)},
    check=False,
  )
  assert done.returncode == -signal.SIGKILL
  path = workdir.file('explanations.jsonl')
  assert path.read_bytes().endswith(b'"la')
  stage.run(config, workdir)
  resumed = path.read_bytes()
  path.unlink()
  stage.run(config, workdir)
  assert path.read_bytes() == resumed
  assert len(explanations(workdir)) == toy.M


def test_a_limit_keeps_what_fires_on_most_images(config, workdir):
  config.explain.limit = 1
  stage.run(config, workdir)
  lines = explanations(workdir)
  assert [line.latent for line in lines] == [1, 4, 6]  # 4 and 6 cost nothing


def test_bad_input_says_what_to_do(config, workdir):
  config.explain.latents = (toy.M,)
  with pytest.raises(ValueError, match='0 to 6 are'):
    stage.run(config, workdir)
  config.explain.latents = ()
  config.explain.split = 'a'
  with pytest.raises(ValueError, match='lmm-sae index'):
    stage.run(config, workdir)
  config.explain.base_url = ''
  with pytest.raises(ValueError, match='lmm-sae all'):
    stage.run(config, workdir)


def test_marks_go_about_what_fires():
  tokens = ['is', ' the', ' red', ' s', 'quare', ' red', '?']
  acts = [0.1, 0.0, 4.0, 1.0, 0.9, 2.0, 0.0]
  exemplar = TextExemplar(0, 3, 4.0, tokens, acts, 2)
  assert explaining.mark(exemplar, 0.25) == 'is the <<red s>>quare <<red>>?'
  assert explaining.mark(exemplar, 0.0) == '<<is>> the <<red square red>>?'


def test_an_answer_cut_before_its_marker_is_a_failure():
  assert explaining.read(Answer('well, CONCEPT: red squ', True)) == (
    'explained',
    'red squ',
  )
  with pytest.raises(ChatError, match='max_tokens'):
    explaining.read(Answer('well, these pictures', True))


@pytest.mark.parametrize(
  ('answer', 'kind'),
  [
    ('colour', 'colour'),
    ('**Color**.', 'colour'),
    ('An object, or a scene', 'object'),
    ('objective', ''),
    ('', ''),
  ],
)
def test_a_category_is_the_first_kind_named(answer, kind):
  assert explaining.category(answer) == kind


def test_packaged_explainers_are_named_by_size():
  from lmm_sae.core import host

  assert explaining.short_name(str(host.weights() / 'base')) == 'base'
  assert explaining.short_name('lmms-lab/llava-72b') == 'lmms-lab/llava-72b'
