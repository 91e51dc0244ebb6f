import dataclasses
import json

import numpy as np
import pytest

from lmm_sae.core import causes, mistakes, records, summary
from lmm_sae.core.causes import Priced
from lmm_sae.core.mistakes import Answered, Rule
from lmm_sae.core.records import Attribution, Turn
from lmm_sae.core.tokens import Kind, TokenMap
from lmm_sae.sae import exports
from lmm_sae.stages import attribute
from tests.stages import linear_subject as subject


@pytest.fixture
def attribute_config(config, monkeypatch):
  monkeypatch.setattr(exports, 'load', lambda _: subject.Sae())
  config.lmm.layers = (subject.LAYER,)
  config.attribute.samples = 13
  config.attribute.top = 3
  config.attribute.mistakes = 4
  config.attribute.batch = 5
  return config


def run(config, workdir, monkeypatch, client=None):
  client = client or subject.Client()
  subject.patch(monkeypatch, client)
  attribute.run(config, workdir)
  return client


def attributions(workdir):
  return records.read(Attribution, workdir.file('attributions.jsonl'))


def study(workdir, name):
  return json.loads(workdir.file(f'{name}.json').read_text())['2']


def test_prices_equal_ablation_where_the_readout_is_linear(
  attribute_config, tmp_path, monkeypatch
):
  workdir = subject.make(tmp_path)
  run(attribute_config, workdir, monkeypatch)
  found = attributions(workdir)
  assert [(a.sample, a.prompt) for a in found] == [
    *((i, subject.FEEL) for i in range(6)),
    *((i, subject.COLOUR) for i in range(6)),
    (6, subject.FEEL),
  ]
  for answer in found:
    checked = [one for one in answer.latents if one.exact is not None]
    assert checked
    for one in checked:
      assert one.effect == pytest.approx(one.exact, abs=1e-5)
      assert one.effect == pytest.approx(sum(one.kinds.values()))
      assert one.always_on == (one.latent == 7)
    sizes = [abs(one.effect) for one in answer.latents]
    assert sizes == sorted(sizes, reverse=True)
    top = answer.latents[0]
    wrong = answer.prompt == subject.COLOUR and subject.errs(answer.sample)
    assert answer.correct == (not wrong)
    assert top.effect == pytest.approx(3 if wrong else 2, abs=1e-5)
    assert top.latent == (5 if wrong else subject.WORDS.index(answer.target))
    assert top.concept == ('' if wrong else answer.target)
    assert set(top.kinds) == {'base'}
    assert len(answer.heat) == 2
    assert [word for word, _ in answer.words] == [subject.WORDS[0]]
  figure = summary.compute(workdir, (2,))['attribution_correlation']
  assert figure['value'] == pytest.approx(1, abs=1e-5)


def test_the_eq_study_ablates_what_the_prices_name(
  attribute_config, tmp_path, monkeypatch
):
  workdir = subject.make(tmp_path)
  run(attribute_config, workdir, monkeypatch)
  found = study(workdir, 'eq')
  assert found['top']['value'] == 1
  assert found['top5']['n'] == 7
  # without its latent both logits are 0, and a draw goes to happy: only what
  # was sad breaks, samples 2, 3 and 6 of 0 to 6
  for n in ('1', '2', '10'):
    assert found['ablated'][n]['value'] == pytest.approx(3 / 7)
    assert found['random'][n]['value'] == 0
  assert found['cases'][2]['ablated']['1'] == 'happy'


def test_the_rule_mends_what_one_latent_misled(
  attribute_config, tmp_path, monkeypatch
):
  workdir = subject.make(tmp_path)
  run(attribute_config, workdir, monkeypatch)
  found = study(workdir, 'mistakes')
  # a mistake leads by 1 and a right answer by 2
  assert found['rule'] == {'latents': 1, 'margin': pytest.approx(1)}
  assert found['asked'] == {'a': 48, 'b': 48}
  assert found['accuracy']['b'] == pytest.approx(46 / 48)
  assert found['mended']['value'] == 1
  assert found['mended']['n'] == 2
  assert found['broken']['value'] == 0
  assert found['broken']['n'] == 8
  assert found['mended_random']['value'] == 0
  assert [case['sample'] for case in found['cases']] == [5, 15]
  assert found['cases'][0]['latents'] == [5]
  assert found['cases'][0]['edited'] == 'blue'


@pytest.mark.parametrize('fail_after', [7, 14, 41, 60])
def test_a_killed_run_resumes_to_the_same_files(
  attribute_config, tmp_path, monkeypatch, fail_after
):
  whole = subject.make(tmp_path / 'whole')
  client = run(attribute_config, whole, monkeypatch)
  cut = subject.make(tmp_path / 'cut')
  with pytest.raises(ConnectionError):
    run(attribute_config, cut, monkeypatch, subject.Client(fail_after))
  again = run(attribute_config, cut, monkeypatch)
  assert again.requests < client.requests
  for name in ('attributions.jsonl', 'eq.json', 'mistakes.json'):
    assert cut.file(name).read_bytes() == whole.file(name).read_bytes()
  assert run(attribute_config, cut, monkeypatch).requests == 0


def test_answers_to_other_questions_are_refused(
  attribute_config, tmp_path, monkeypatch
):
  workdir = subject.make(tmp_path)
  run(attribute_config, workdir, monkeypatch)
  attribute_config.attribute.samples = 4
  with pytest.raises(ValueError, match='remove'):
    run(attribute_config, workdir, monkeypatch)


def test_without_truth_answers_are_priced_and_studies_say_why_not(
  attribute_config, tmp_path, monkeypatch
):
  workdir = subject.make(tmp_path, known=False)
  with records.Appender(workdir.file('explanations.jsonl')) as out:
    beside = ('explained', 'x', 'happy', 'object', 'base', 'neurons')
    out.add(records.Explanation(2, 3, (), *beside))  # none of the SAE's
    out.add(
      records.Explanation(2, 3, (), 'explained', 'x', 'sad', 'object', 'base')
    )
  run(attribute_config, workdir, monkeypatch)
  found = attributions(workdir)
  assert len(found) == 13
  assert all(a.correct is None for a in found)
  assert {
    one.concept for a in found for one in a.latents if one.latent == 3
  } == {'sad'}
  assert 'reason' in study(workdir, 'eq')
  assert 'reason' in study(workdir, 'mistakes')


def test_effects_are_summed_by_kind_and_latent():
  effect_TK = np.array([[1, 2], [4, 8], [16, 32]], np.float32)
  idx_TK = np.array([[0, 3], [3, 1], [3, 0]])
  kind_T = np.array([Kind.BASE, Kind.BASE, Kind.QUESTION], np.uint8)
  effect_KM = causes.table(effect_TK, idx_TK, kind_T, 4)
  assert effect_KM[Kind.BASE].tolist() == [1, 8, 0, 6]
  assert effect_KM[Kind.QUESTION].tolist() == [32, 0, 0, 16]
  priced = Priced('a', 'b', (0, 1), 1.0, effect_KM)
  assert priced.kinds(0) == {'base': 1, 'question': 32}
  assert priced.strongest(9) == [0, 3, 1]  # latent 2 did nothing


def test_prices_are_spread_over_patches_and_words():
  kind_T = np.array([Kind.BOS, *[Kind.BASE] * 3, *[Kind.QUESTION] * 2])
  none_T = np.full(6, -1)
  row_T, col_T = np.array([[-1, 0, 0, 1, -1, -1], [-1, 0, 2, 1, -1, -1]])
  map_ = TokenMap(
    np.arange(10, 16), kind_T, none_T, row_T, col_T, np.zeros((6, 4)), (2, 3)
  )
  heat_HW, words = causes.spread(np.array([9, 1, 2, -3, 4, 5.0]), map_)
  assert heat_HW.tolist() == [[1, 0, 2], [0, -3, 0]]
  assert words == ((14, 4.0), (15, 5.0))
  heat_HW, _ = causes.spread(
    np.zeros(6), dataclasses.replace(map_, kind_T=none_T)
  )
  assert heat_HW.size == 0


def answered(text, margin, edited):
  turn = Turn('colour', 'q', 'red')
  edited = dict.fromkeys(mistakes.SIZES, edited)
  return Answered(0, turn, text, margin, [4], edited)


def test_a_rule_weighs_what_it_breaks_by_how_often_answers_are_right():
  harmful = [answered('blue', 2.0, 'red'), answered('red', 1.0, 'blue')]
  assert mistakes.fit(harmful, accuracy=0.4) == Rule(1, 2.0)
  assert mistakes.fit(harmful, accuracy=0.6) == Rule(0, 0.0)


def test_a_rule_leaves_wider_margins_alone():
  answers = [answered('blue', 1.0, 'red'), answered('red', 2.0, 'blue')]
  rule = mistakes.fit(answers, accuracy=0.9)
  assert rule == Rule(1, 1.0)
  assert [one.under(rule) for one in answers] == ['red', 'red']


def test_an_answer_is_right_word_for_word():
  turn = Turn('letter', 'q', 'H')
  assert mistakes.right('h.', turn)
  assert not mistakes.right('the h', turn)
