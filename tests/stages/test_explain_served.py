"""Explaining by a packaged model behind `transformers serve`, over HTTP."""

import collections
import json
import urllib.request

import pytest

from lmm_sae.core import chat, host, prompts, records, servers
from lmm_sae.core.explaining import CATEGORIES
from lmm_sae.stages import explain as stage
from lmm_sae.stages import index
from tests import toy


@pytest.fixture(scope='module')
def server(tmp_path_factory):
  logs = tmp_path_factory.mktemp('logs')
  with servers.explainer(host.weights() / 'small', logs, 'cpu', 1) as server:
    server.wait()
    yield server


@pytest.fixture
def config(config, server):
  config.lmm.layers = (toy.LAYER,)
  config.index.splits = ('b',)
  config.explain.update(
    {'base_url': f'{server.wait()}/v1', 'model': 'small', 'concurrency': 3}
  )
  return config


@pytest.fixture
def workdir(config, tmp_path):
  workdir = toy.make_workdir(tmp_path)
  index.run(config, workdir)
  return workdir


def ask_plainly(server, body: bytes) -> dict:
  """The server's own words to a request, without any code of ours."""
  request = urllib.request.Request(
    f'{server.wait()}/v1/chat/completions',
    body,
    {'Content-Type': 'application/json'},
  )
  with urllib.request.urlopen(request, timeout=60) as response:
    return json.load(response)


def test_what_stands_in_the_file_is_what_the_model_said(
  config, workdir, server, monkeypatch
):
  bodies = []
  post = chat.ChatClient._post

  def spy(self, place, body):
    bodies.append(body)
    return post(self, place, body)

  monkeypatch.setattr(chat.ChatClient, '_post', spy)
  stage.run(config, workdir)
  lines = records.read(records.Explanation, workdir.file(stage.FILE))
  outcomes = collections.Counter(line.outcome for line in lines)
  assert outcomes['failed'] == 0
  assert outcomes['always_on'] == outcomes['dead'] == 1
  assert outcomes['explained'] + outcomes['no_pattern'] == toy.M - 2
  assert outcomes['explained'] > 0
  assert len(bodies) == len(set(bodies))
  said, tokens = [], collections.Counter()
  for body in bodies:
    answer = ask_plainly(server, body)
    said.append(answer['choices'][0]['message']['content'].strip())
    for name in ('prompt_tokens', 'completion_tokens'):
      tokens[name] += answer['usage'][name]
  for line in lines:
    if line.outcome == 'explained':
      assert ('explained', line.text) in map(prompts.parse, said)
      assert line.category in ('', *CATEGORIES)
      assert line.category in (*said, '')
  used = json.loads(workdir.file('usage.json').read_text())['used']
  roles = [models['small'] for models in used.values()]
  assert sum(role['requests'] for role in roles) == len(bodies)
  for name, count in tokens.items():
    assert sum(role[name] for role in roles) == count
  assert not any('faults' in role for role in roles)


def test_an_answer_cut_by_max_tokens_fails_and_a_longer_one_mends_it(
  config, workdir
):
  config.explain.update({'latents': (0, 1), 'max_tokens': 1})
  stage.run(config, workdir)
  lines = records.read(records.Explanation, workdir.file(stage.FILE))
  assert [line.outcome for line in lines] == ['failed', 'failed']
  used = json.loads(workdir.file('usage.json').read_text())['used']
  assert 'faults' not in used['explainer']['small']  # whole, as far as allowed
  config.explain.max_tokens = 64
  stage.run(config, workdir)
  lines = records.read(records.Explanation, workdir.file(stage.FILE))
  assert all(line.outcome in ('explained', 'no_pattern') for line in lines)


def test_a_model_that_is_not_served_is_refused_and_counted(config, workdir):
  config.explain.update({'model': 'large', 'latents': (0, 1)})
  stage.run(config, workdir)  # a longer run ends here, see chat.REFUSALS
  lines = records.read(records.Explanation, workdir.file(stage.FILE))
  assert [line.outcome for line in lines] == ['failed', 'failed']
  used = json.loads(workdir.file('usage.json').read_text())['used']
  counts = used['explainer']['large']
  assert counts['faults'] == {'400': 2}
  assert counts['failed'] == 2
  assert 'requests' not in counts
