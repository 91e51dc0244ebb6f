"""Answers of judges counted."""

import dataclasses

import numpy as np
import pytest

from lmm_sae.core import judged, judging
from lmm_sae.core.chat import Answer, ChatError
from lmm_sae.core.judging import FAILED, Judgement, Trial
from lmm_sae.core.trials import Question

LINE = Judgement(
  *(1, 5, '', 'eye', 'detection', '', 'red', 'one'),
  ('yes', 'yes', 'no', 'no', 'no'),
  ('yes', 'no', 'no', 'no', FAILED),
  2,
)


def line(**changes) -> Judgement:
  return dataclasses.replace(LINE, **changes)


def test_what_says_nothing_is_wrong():
  mumbled = line(said=('', 'yes', 'no', '', 'no'))
  assert judging.accuracy(mumbled.answered) == pytest.approx(
    (1 / 2 + 2 / 3) / 2
  )


def test_accuracy_is_balanced_between_true_and_false():
  assert judging.accuracy(LINE.answered) == (1 / 2 + 2 / 2) / 2
  assert judging.accuracy([('yes', 'yes')]) is None
  assert judging.accuracy([('3', '3'), ('1', '2')]) == 1 / 2
  assert judging.accuracy([]) is None


def test_a_figure_of_accuracy_is_of_all_lines_and_tells_its_n():
  lines = [line(said=('yes', 'yes', 'no', 'yes', '')), LINE]
  found = judging.accuracy_figure(lines, 'none', 0, 200)
  assert found['value'] == pytest.approx((3 / 4 + 3 / 5) / 2)
  assert (found['n'], found['lines']) == (9, 2)
  assert found['ci'][0] <= found['value'] <= found['ci'][1]
  numbers = [line(expected=('1', '3'), said=('1', '2'), choices=5)]
  assert judging.accuracy_figure(numbers, 'none', 0, 20)['value'] == 1 / 2
  nothing = judging.accuracy_figure([], 'none is known', 0, 20)
  assert (nothing['value'], nothing['reason']) == (None, 'none is known')


def test_kappa_is_cohens():
  # Cohen's own layout: 20 both yes, 5 and 10 apart, 15 both no
  pairs = [('yes', 'yes')] * 20 + [('yes', 'no')] * 5
  pairs += [('no', 'yes')] * 10 + [('no', 'no')] * 15
  agree, kappa = judging.kappa(pairs)
  assert (agree, kappa) == (pytest.approx(0.7), pytest.approx(0.4))
  assert judging.kappa([('yes', 'yes')] * 3) == (1, None)
  rng = np.random.default_rng(0)
  said = rng.integers(3, size=(9000, 2)).astype(str).tolist()
  assert abs(judging.kappa([tuple(pair) for pair in said])[1]) < 0.05


class Chat:
  """Says yes; fails where the question says so."""

  def ask(self, text, images=()):
    if text == 'fail':
      raise ChatError('as asked')
    return Answer('maybe' if text == 'mumble' else 'Yes.', False)


def test_an_answer_that_cannot_be_had_is_a_failure_of_its_own():
  made = [
    Trial(
      line(latent=m, expected=('yes', 'no', 'no', 'no'), said=()),
      tuple(
        Question(text, (), right, 'yes_no', 'red')
        for text, right in (
          ('a', 'yes'),
          ('fail', 'no'),
          ('mumble', 'no'),
          (f'b {m}', 'no'),
        )
      ),
    )
    for m in range(judging.AT_ONCE + 3)
  ]
  found = list(judging.answers(Chat(), iter(made), 3))
  assert [one.latent for one in found] == list(range(judging.AT_ONCE + 3))
  assert {one.said for one in found} == {('yes', FAILED, '', 'yes')}
  assert found[0].answered == [('yes', 'yes'), ('no', ''), ('no', 'yes')]
  told = judging.summary(found, 'one', '', 0, 20)['judges']['one']
  assert told['detection'] | {'calibration': None} == {
    'chance': 1 / 2,
    'calibration': None,
    'trusted': None,
    'asked': 4 * len(found),
    'failed': len(found),
    'unread': len(found),
  }
  (score, *_) = judged.scores(found, 'one', '')
  assert (score.value, score.n) == (1 / 2, 3)


def test_a_judge_that_guesses_is_not_trusted():
  def known(said):
    return [
      line(baseline='calibration', label=str(i), said=said, latent=-1)
      for i in range(8)
    ]

  right, guess = ('yes', 'yes', 'no', 'no', 'no'), ('yes',) * 5
  for said, trusted in ((right, True), (guess, False)):
    told = judging.summary(known(said), 'one', '', 0, 50)['judges']['one']
    assert told['detection']['trusted'] is trusted


def test_judges_are_compared_on_what_both_answered():
  other = line(judge='two', said=('yes', 'no', 'yes', '', 'no'))
  table = judging.summary([LINE, other], 'one', 'two', 0, 50)['agreement']
  assert table['detection']['value'] == pytest.approx(2 / 3)
  assert table['detection']['n'] == 3
  scores = judged.scores([LINE, other], 'one', 'two')
  assert [(s.scorer, s.value, s.n) for s in scores] == [
    ('detection', 0.75, 4),
    ('consistency', 0.666667, 3),
  ]


def test_a_task_with_one_side_alone_has_no_score():
  silent = line(said=(FAILED, FAILED, 'no', 'no', 'no'))
  assert judged.scores([silent], 'one', '') == []


def test_the_latents_drawn_hardly_depend_on_the_explainer():
  all_ = judged.drawn(range(50), 60, 10, 3, 1)
  fewer = judged.drawn(range(1, 50, 1), 60, 10, 3, 1)
  assert len(all_) == 10
  assert all_ == sorted(all_)
  assert len(set(all_) & set(fewer)) >= 9
  assert judged.drawn((4, 2), 60, 0, 3, 1) == [2, 4]
