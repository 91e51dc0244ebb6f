"""The page of labels, asked over HTTP, and what is measured of its answers."""

import concurrent.futures
import contextlib
import functools
import json
import pathlib
import shutil
import threading
import urllib.error
import urllib.request

import pytest

from experiments import base
from lmm_sae.core import label_page, ratings, records
from lmm_sae.core.records import Explanation
from lmm_sae.core.workdir import Workdir
from lmm_sae.stages import label
from tests.stages import fake_run

SEEN = label.Seen('b', 'exact', 0.25)
SEED = 3


@pytest.fixture(scope='module')
def made(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('label') / 'run'
  fake_run.make(folder)
  return folder


@pytest.fixture
def workdir(made, tmp_path) -> Workdir:
  shutil.copytree(made, tmp_path / 'run')
  return Workdir.of(tmp_path / 'run')


def cases(workdir, count=6):
  explained = records.read(Explanation, workdir.file('explanations.jsonl'))
  return ratings.cases(explained, count, SEED)


@contextlib.contextmanager
def served(workdir, *names, token='', count=6):
  """A function that posts to a page of these raters."""
  sheets = {
    name: ratings.Sheet(
      workdir, name, ratings.order(cases(workdir, count), name, SEED)
    )
    for name in names
  }
  show = functools.partial(label.show, workdir, SEEN, 3)
  desk = label_page.Desk(sheets, show)
  with label_page.server(desk, '127.0.0.1', 0, token) as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    url = f'http://127.0.0.1:{server.server_address[1]}'
    yield functools.partial(post, url)
    server.shutdown()
    thread.join()


def post(url, path, body=None, *, raw=None, headers=None):
  """(status, JSON) of a request; a GET where there is no body."""
  data = json.dumps(body).encode() if raw is None else raw
  if body is None and raw is None:
    data = None
  given = {'Content-Type': 'application/json', **(headers or {})}
  request = urllib.request.Request(url + path, data, given)
  opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  try:
    with opener.open(request, timeout=60) as answer:
      text = answer.read()
      return answer.status, json.loads(text) if data else (text, answer.headers)
  except urllib.error.HTTPError as error:
    return error.code, json.loads(error.read())


def rate(ask, rater, answer, own=''):
  _, found = ask('/api/case', {'rater': rater})
  about = {'rater': rater, 'number': found['number']}
  _, told = ask('/api/label', {**about, 'own': own})
  return told['label'], ask('/api/answer', {**about, 'answer': answer})[1]


def test_half_of_the_cases_are_controls_with_labels_of_others(workdir):
  found = cases(workdir)
  explained = {
    one.latent: one.label
    for one in records.read(Explanation, workdir.file('explanations.jsonl'))
    if one.explainer == found[0].explainer and one.outcome == 'explained'
  }
  assert sum(case.control for case in found) == 3
  for case in found:
    assert (case.label == explained[case.latent]) != case.control


def test_a_label_is_shown_after_the_raters_own_words_and_they_stay(workdir):
  with served(workdir, 'ann') as ask:
    _, found = ask('/api/case', {'rater': 'ann'})
    assert 'label' not in found
    assert found['images'] or found['texts']
    status, told = ask(
      '/api/answer', {'rater': 'ann', 'number': 0, 'answer': 'fits'}
    )
    assert (status, told['error']) == (409, 'ask for the label first')
    about = {'rater': 'ann', 'number': 0}
    first = ask('/api/label', {**about, 'own': ' red  things '})[1]
    again = ask('/api/label', {**about, 'own': 'what the label says'})[1]
    assert first == again
    assert first['own'] == 'red things'


def test_a_rater_goes_on_where_they_were_and_may_undo(workdir):
  with served(workdir, 'ann') as ask:
    rate(ask, 'ann', 'fits')
    seen, _ = rate(ask, 'ann', 'no', own='mine')
    _, found = ask('/api/undo', {'rater': 'ann'})
    assert (found['number'], found['label'], found['own']) == (1, seen, 'mine')
  with ratings.path(workdir, 'ann').open('ab') as file:
    file.write(b'{"rater": "ann", "lay')  # torn by a kill
  with served(workdir, 'ann') as ask:
    _, found = ask('/api/case', {'rater': 'ann'})
    assert (found['number'], found['label']) == (1, seen)
    rate(ask, 'ann', 'partly')
  answers = [one.answer for one in ratings.read(workdir)['ann']]
  assert answers == ['fits', 'partly']


def test_raters_at_once_see_the_same_cases_in_orders_of_their_own(workdir):
  names = ['ann', 'bob', 'cyd']
  pool = concurrent.futures.ThreadPoolExecutor(3)
  with served(workdir, *names) as ask, pool:
    for done in pool.map(
      lambda name: [rate(ask, name, 'fits')[1] for _ in range(6)], names
    ):
      assert done[-1]['done']
  by_rater = ratings.read(workdir)
  keys = [[(one.latent, one.label) for one in by_rater[name]] for name in names]
  assert sorted(keys[0]) == sorted(keys[1]) == sorted(keys[2])
  assert keys[0] != keys[1]


@pytest.mark.parametrize(
  ('path', 'body', 'status'),
  [
    ('/api/case', {'rater': '../../etc/passwd'}, 403),
    ('/api/case', {'rater': 7}, 403),
    ('/api/case', {}, 403),
    ('/api/case', [1], 400),
    ('/api/nothing', {'rater': 'ann'}, 404),
    ('/api/label', {'rater': 'ann', 'number': 99, 'own': ''}, 404),
    ('/api/label', {'rater': 'ann', 'number': -1, 'own': ''}, 404),
    ('/api/label', {'rater': 'ann', 'number': True, 'own': ''}, 404),
    ('/api/label', {'rater': 'ann', 'number': 1, 'own': ''}, 409),
    ('/api/label', {'rater': 'ann', 'number': 0, 'own': 'x' * 201}, 400),
    ('/api/label', {'rater': 'ann', 'number': 0}, 400),
    ('/api/answer', {'rater': 'ann', 'number': 0, 'answer': 'maybe'}, 400),
  ],
)
def test_what_makes_no_sense_is_refused_and_leaves_no_trace(
  workdir, path, body, status
):
  with served(workdir, 'ann') as ask:
    found, told = ask(path, body)
  assert found == status
  assert told['error']
  assert not workdir.file('ratings').exists()


def test_bodies_and_tokens_are_checked(workdir):
  with served(workdir, 'ann', token='secret') as ask:
    body = {'rater': 'ann'}
    good = {'Authorization': 'Bearer secret'}
    assert ask('/api/case', body)[0] == 401
    wrong = {'Authorization': 'Bearer sécret'.encode().decode('latin-1')}
    assert ask('/api/case', body, headers=wrong)[0] == 401
    assert ask('/api/case', body, headers=good)[0] == 200
    plain = {**good, 'Content-Type': 'text/plain'}
    assert ask('/api/case', body, headers=plain)[0] == 415
    assert ask('/api/case', raw=b'{', headers=good)[0] == 400
    assert ask('/api/case', raw=b' ' * 20_000, headers=good)[0] == 413


def test_the_page_runs_no_text_and_has_no_other_files(workdir):
  with served(workdir, 'ann') as ask:
    _, (text, headers) = ask('/')
    assert b'<script src="/label.js"' in text
    assert headers['Content-Security-Policy'].startswith("default-src 'none'")
    assert ask('/../core/label_page.py')[0] == 404


def test_agreement_is_measured_beside_controls_and_printed(workdir, capsys):
  with served(workdir, 'ann', 'bob') as ask:
    for name in ('ann', 'bob'):
      mine = ratings.order(cases(workdir), name, SEED)
      for _ in range(6):
        _, found = ask('/api/case', {'rater': name})
        about = {'rater': name, 'number': found['number']}
        ask('/api/label', {**about, 'own': ''})
        says = 'no' if mine[found['number']].control else 'fits'
        ask('/api/answer', {**about, 'answer': says})
  config = base.get_config()
  config.seed = SEED
  label.run(config, workdir)
  found = json.loads(workdir.file(ratings.FILE).read_text())
  assert found['alpha']['value'] == found['kappa']['ann, bob']['value'] == 1
  assert found['raters'] == {'ann': 6, 'bob': 6}
  assert (found['fits']['value'], found['control']['value']) == (1, 0)
  assert 'own labels fit' in capsys.readouterr().out


def test_settings_that_cannot_work_say_what_to_do(workdir):
  config = base.get_config()
  with pytest.raises(ValueError, match='holds no answers'):
    label.run(config, workdir)
  config.label.rater = '../ann'
  with pytest.raises(ValueError, match='is no name'):
    label.run(config, workdir)
  config.label.rater, config.label.host = 'ann', '0.0.0.0'
  with pytest.raises(ValueError, match=r'set server\.token too'):
    label.run(config, workdir)
  config.label.host = '127.0.0.1'
  workdir.file('explanations.jsonl').unlink()
  with pytest.raises(ValueError, match='run `lmm-sae explain`'):
    label.run(config, workdir)


def test_ratings_of_other_cases_are_not_mixed_with_these(workdir):
  with served(workdir, 'ann') as ask:
    rate(ask, 'ann', 'fits')
  explained = records.read(Explanation, workdir.file('explanations.jsonl'))
  others = ratings.cases(explained, 6, SEED + 1)
  with pytest.raises(ValueError, match='rates other cases'):
    ratings.Sheet(workdir, 'ann', others[:1])
