"""Three models explain, and any answer of theirs may fail."""

import collections
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from lmm_sae.core import explaining, records
from lmm_sae.core.index import LatentIndex
from lmm_sae.stages import explain as stage
from lmm_sae.stages import index
from tests import toy
from tests.fake_chat import FakeChat, text_of

LONG = 'what is bright here is a thing that is red'


def say(request: dict) -> str:
  text = text_of(request)
  if text.startswith('Shorten'):
    return 'red thing'
  if text.startswith('Which kind'):
    return 'object'
  return f'CONCEPT: {LONG}'


@pytest.fixture
def servers():
  with FakeChat(say) as one, FakeChat(say) as two, FakeChat(say) as three:
    yield one, two, three


@pytest.fixture
def config(config, servers):
  explainer, refiner, category = servers
  config.lmm.layers = (toy.LAYER,)
  config.index.splits = ('b',)
  config.explain.update(
    {
      'base_url': explainer.url,
      'model': 'eye',
      'refine_url': refiner.url,
      'refine_model': 'tongue',
      'category_url': category.url,
      'category_model': 'clerk',
      'exemplars': 3,
      'concurrency': 1,
      'retries': 0,
    }
  )
  return config


@pytest.fixture
def workdir(config, tmp_path):
  workdir = toy.make_workdir(tmp_path)
  index.run(config, workdir)
  return workdir


def explanations(workdir) -> list[records.Explanation]:
  return records.read(records.Explanation, workdir.file(stage.FILE))


def asked(server: FakeChat) -> set[str]:
  return {text_of(request).split()[0] for request in server.requests}


def test_each_question_goes_to_its_own_model(config, workdir, servers):
  config.explain.update({'price_in': 2.0, 'price_out': 4.0})
  config.explain.category_prices = (10.0, 0.0)
  stage.run(config, workdir)
  assert [asked(server) for server in servers] == [
    {'3', 'One'}, {'Shorten'}, {'Which'}
  ]  # fmt: skip
  models = [{r['model'] for r in server.requests} for server in servers]
  assert models == [{'eye'}, {'tongue'}, {'clerk'}]
  done = [line for line in explanations(workdir) if line.outcome == 'explained']
  assert {(e.text, e.label, e.category, e.explainer) for e in done} == {
    (LONG, 'red thing', 'object', 'eye')
  }
  used = json.loads(workdir.file('usage.json').read_text())['used']
  counts = {role: list(models) for role, models in used.items()}
  assert counts == {
    'explainer': ['eye'], 'refiner': ['tongue'], 'category': ['clerk']
  }  # fmt: skip
  seen, sorted_ = used['explainer']['eye'], used['category']['clerk']
  assert seen['cost'] == pytest.approx(
    seen['requests'] * (7 * 2 + 3 * 4) * 1e-6
  )
  assert sorted_['cost'] == pytest.approx(sorted_['requests'] * 70e-6)
  assert used['refiner']['tongue']['cost'] == 0  # no price of it is known


def test_no_server_is_sent_another_ones_key(config, workdir, monkeypatch):
  monkeypatch.delenv('OPENAI_API_KEY', raising=False)
  config.explain.api_key, config.explain.category_key = 'mine', 'theirs'
  opts = explaining.ExplainConfig(**config.explain)
  with stage.clients(opts, workdir) as chats:
    keys = [
      client.headers.get('Authorization')
      for chat in chats
      for client in chat._clients.values()
    ]
  assert keys == ['Bearer mine', None, 'Bearer theirs']


@pytest.mark.parametrize(
  ('role', 'parts'), [(0, ('', '', '')), (1, (LONG, '', '')),
                      (2, (LONG, 'red thing', ''))]
)  # fmt: skip
def test_what_was_had_outlives_the_answer_that_failed(
  config, workdir, servers, role, parts
):
  servers[role].faults = ['500'] * 99
  stage.run(config, workdir)
  failed = [e for e in explanations(workdir) if e.outcome == 'failed']
  assert len(failed) == 5
  assert {(e.text, e.label, e.category) for e in failed} == {parts}
  before = [len(server.requests) for server in servers]
  servers[role].faults = []
  stage.run(config, workdir)
  assert [e.outcome for e in explanations(workdir)].count('explained') == 5
  # only what failed, and what follows from it, is asked again
  more = [
    len(server.requests) - count
    for server, count in zip(servers, before, strict=True)
  ]
  assert more == [[5, 1, 1], [0, 1, 1], [0, 0, 1]][role]


def test_a_refiner_that_is_away_ends_the_run_and_keeps_the_explanations(
  config, workdir, servers
):
  servers[1].stop()
  with pytest.raises(ConnectionError, match=r'explain\.refine_url'):
    stage.run(config, workdir)
  asked = len(servers[0].requests)
  config.explain.refine_url = servers[2].url
  stage.run(config, workdir)
  assert [e.outcome for e in explanations(workdir)].count('explained') == 5
  texts = [str(request) for request in servers[0].requests]
  assert len(texts) > asked
  assert max(collections.Counter(texts).values()) == 1


def test_a_run_that_is_left_asks_no_further(
  config, workdir, servers, monkeypatch
):
  config.explain.update({'retries': 4, 'concurrency': 2})
  servers[0].faults = ['500'] * 99

  def leave(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(stage.progress, 'track', lambda answers, *_: answers)
  monkeypatch.setattr(stage.records.Appender, 'add', leave)
  config.explain.latents = (4, 5)  # the first is done at once: always on
  began = time.monotonic()
  with pytest.raises(KeyboardInterrupt):
    stage.run(config, workdir)
  assert time.monotonic() - began < 3  # four pauses are 7.5 s and more


# Runs the stage until the n-th answer is had, dies before or after it is kept,
# and begins again, until there is nothing left to ask.
KILLED = """
  import os, pathlib, signal, sys
  from experiments import base
  from lmm_sae.core.chat import ChatClient
  from lmm_sae.core.workdir import Workdir
  from lmm_sae.stages import explain as stage

  root, when, *urls = sys.argv[1:]
  config = base.get_config()
  config.lmm.layers = (2,)
  fields = ('base_url', 'refine_url', 'category_url')
  config.explain.update(dict(zip(fields, urls)))
  config.explain.update({'model': 'eye', 'exemplars': 3, 'concurrency': 1})
  config.explain.update({'refine_model': 'tongue', 'category_model': 'clerk'})
  config.explain.retries = 0

  keep = ChatClient._keep
  def die(self, key, answer):
    if when == 'after':
      keep(self, key, answer)
    if when != 'before' or not pathlib.Path(root, key).exists():
      pathlib.Path(root, key).touch()
      os.kill(os.getpid(), signal.SIGKILL)
    keep(self, key, answer)
  ChatClient._keep = die

  lives = 0
  while True:
    lives += 1
    child = os.fork()
    if not child:
      stage.run(config, Workdir.of(root))
      os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
      break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
  print(lives)
"""


@pytest.mark.parametrize('when', ['before', 'after'])
def test_killed_at_every_answer_it_asks_no_kept_one_again(
  config, workdir, servers, root, when, tmp_path_factory
):
  other = tmp_path_factory.mktemp('whole') / 'run'
  shutil.copytree(workdir.root, other)
  done = subprocess.run(
    [
      *(sys.executable, '-c', textwrap.dedent(KILLED), str(workdir.root), when),
      *(server.url for server in servers),
    ],
    cwd=root,
    env=os.environ | {'PYTHONPATH': str(root)},
    check=True,
    capture_output=True,
    text=True,
  )
  killed = [json.dumps(r, sort_keys=True) for s in servers for r in s.requests]
  for server in servers:
    server.requests.clear()
  whole = type(workdir).of(other)
  stage.run(config, whole)
  once = [json.dumps(r, sort_keys=True) for s in servers for r in s.requests]
  assert len(once) == 7  # of each of five latents, and then two for all
  times = {'before': 2, 'after': 1}[when]
  assert collections.Counter(killed) == dict.fromkeys(once, times)
  assert int(done.stdout) == 1 + len(once)
  assert (
    workdir.file(stage.FILE).read_bytes() == whole.file(stage.FILE).read_bytes()
  )
  used = json.loads(workdir.file('usage.json').read_text())['used']
  paid = [
    models['requests'] for role in used.values() for models in role.values()
  ]
  assert sum(paid) == len(killed)  # twice where it was paid twice


# Baseline dictionaries.


@pytest.fixture
def baselines(config, workdir):
  config.explain.dictionaries = ('neurons', 'untrained')
  for name in records.DICTIONARIES:
    shutil.copytree(
      workdir.index(toy.LAYER, 'b'), workdir.index(toy.LAYER, 'b', name)
    )
  return workdir


def drawn(workdir, dictionary: str) -> list[int]:
  return [e.latent for e in explanations(workdir) if e.dictionary == dictionary]


def test_baselines_are_explained_beside_the_sae(config, baselines):
  config.explain.dictionary_limit = 3
  config.explain.latents = (0, 1)
  stage.run(config, baselines)
  lines = explanations(baselines)
  ranks = [('', *records.DICTIONARIES).index(e.dictionary) for e in lines]
  assert ranks == sorted(ranks)  # the SAE, untrained, neurons
  assert drawn(baselines, '') == [0, 1]
  three = {name: drawn(baselines, name) for name in records.DICTIONARIES}
  for latents in three.values():
    assert len(latents) == 3
    assert 6 not in latents  # which is dead
  # The same latents have the same exemplars here, so they are asked once.
  before = baselines.file(stage.FILE).read_bytes()
  stage.run(config, baselines)
  assert baselines.file(stage.FILE).read_bytes() == before
  config.explain.dictionary_limit = 5
  stage.run(config, baselines)
  for name, latents in three.items():
    assert set(latents) < set(drawn(baselines, name))
  config.explain.dictionary_limit = 0
  stage.run(config, baselines)
  assert drawn(baselines, 'neurons') == [0, 1, 2, 3, 4, 5]


def test_baselines_are_drawn_by_seed(config, baselines):
  config.explain.dictionary_limit = 3
  opts = explaining.ExplainConfig(**config.explain)
  with stage.clients(opts, baselines) as chats:
    draws = {
      tuple(
        explaining.Explainer(
          opts, seed, layer, name,
          LatentIndex.open(baselines.index(toy.LAYER, 'b', name)), None, chats,
        ).chosen()
      )
      for seed in range(4)
      for layer in (1, 2)
      for name in records.DICTIONARIES
    }  # fmt: skip
  assert len(draws) > 5


def test_a_dictionary_without_index_is_refused(config, workdir):
  config.explain.dictionaries = ('neurons',)
  with pytest.raises(ValueError, match=r'index\.dictionaries'):
    stage.run(config, workdir)
  config.explain.dictionaries = ('random',)
  with pytest.raises(ValueError, match="'random' is none of"):
    stage.run(config, workdir)


# What is shown.


def test_the_paper_style_is_sent_as_the_paper_dims(config, workdir, servers):
  config.explain.update({'mask': 'paper', 'latents': (0,), 'pixels': 0})
  stage.run(config, workdir)
  shown = np.asarray(servers[0].images(servers[0].requests[0])[0]).astype(int)
  exemplar = LatentIndex.open(workdir.index(toy.LAYER, 'b')).exemplars(0)[0]
  whole = explaining.ActivationStore.open(workdir.acts('b')).image(
    exemplar.sample
  )
  pixels = np.asarray(whole).astype(int)
  fires = (exemplar.heat_HW > 0).repeat(4, 0).repeat(4, 1)
  share = shown.max(-1) / pixels.max(-1)
  assert share.min() == pytest.approx(31 / 255, abs=0.01)
  assert ((share > 0.2) & (share < 0.9)).any()  # soft edges, within and without
  assert share[fires].min() > share[~fires].max() - 0.5
  assert share[fires].mean() > 0.8 > share[~fires].mean()


class Counted:
  """Statistics of one latent, as `from_text` reads them."""

  def __init__(self, images, base, peak_base, text, peak_text):
    self.stats = {
      'images_fired': [images],
      'fired_base': [base],
      'peak_base': [peak_base],
      'fired_template': [0],
      'fired_question': [text - text // 3],
      'fired_answer': [text // 3],
    }
    self._peak = peak_text

  def texts(self, _):
    if not self._peak:
      return []
    return [explaining.TextExemplar(0, 0, self._peak, ['a'], [self._peak], 0)]


@pytest.mark.parametrize(
  ('counts', 'wanted'),
  [
    ((0, 0, 0.0, 9, 2.0), True),
    ((3, 4, 1.0, 9, 2.0), True),
    ((3, 4, 2.0, 9, 1.0), False),  # weaker on text
    ((3, 9, 1.0, 4, 2.0), False),  # rarer on text
    ((3, 9, 1.0, 0, 0.0), False),
  ],
)
def test_a_latent_of_text_is_explained_from_text(counts, wanted):
  assert explaining.from_text(Counted(*counts), 0) is wanted


def test_marks_of_the_text_itself_do_not_stand():
  exemplar = explaining.TextExemplar(
    0, 1, 4.0, ['a\n', '<<', ' b', '\n>>'], [0.0, 0.0, 4.0, 0.0], 2
  )
  assert explaining.mark(exemplar, 0.25) == 'a < < <<b>> > >'


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('retries', -1),
    ('limit', -1),
    ('price_in', float('nan')),
    ('refine_prices', (1.0,)),
    ('category_prices', (1.0, -1.0)),
    ('timeout_s', 0.0),
    ('mask', 'soft'),
  ],
)
def test_a_value_out_of_bounds_is_named(config, workdir, field, value):
  config.explain.update({field: value})
  with pytest.raises(ValueError, match=rf'explain\.{field}'):
    stage.run(config, workdir)
