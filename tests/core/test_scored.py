"""Scores as figures, where intervals or figures cannot be had."""

import numpy as np
import pytest

from lmm_sae.core import records, scored
from lmm_sae.core.records import Score
from lmm_sae.core.workdir import Workdir


def test_a_share_difference_has_an_interval_where_no_pair_differs():
  same = {m: m < 20 for m in range(31)}
  found = scored.share_difference(same, same, 'none')
  assert (found['value'], found['n']) == (0, 31)
  half = 1.959964 / 33  # Agresti and Min: (sqrt(1) / (n + 2)) * z
  assert found['ci'] == pytest.approx([-half, half])


def test_the_interval_of_a_share_difference_covers_the_truth():
  rng = np.random.default_rng(0)
  shares = np.array([0.5, 0.25, 0.1, 0.15])  # both, one alone, other, neither
  truth = shares[1] - shares[2]
  covered = []
  for _ in range(400):
    cell_N = rng.choice(4, 40, p=shares)
    one = {m: c in (0, 1) for m, c in enumerate(cell_N)}
    other = {m: c in (0, 2) for m, c in enumerate(cell_N)}
    found = scored.share_difference(one, other, '')
    assert found['value'] == pytest.approx(
      np.mean(list(one.values())) - np.mean(list(other.values()))
    )
    low, high = found['ci']
    covered.append(low <= truth <= high)
  assert 0.92 <= np.mean(covered) <= 0.99


def test_a_difference_is_over_what_both_have():
  assert scored.share_difference({0: True}, {1: True}, 'none')['reason']
  found = scored.difference({0: 3.0, 1: 5.0}, {1: 4.5, 2: 9.0}, 'none')
  assert (found['value'], found['n'], found['ci']) == (0.5, 1, None)


@pytest.mark.parametrize(
  ('told', 'scorer', 'reason'),
  [
    (None, 'detection', 'give score.judge_model'),
    ({'second': ''}, 'consistency', 'give score.second_model'),
    ({'second': 'b'}, 'consistency', 'no question that both judges answered'),
    ({'second': ''}, 'fuzzing_text', 'fires on text alone'),
    ({'second': ''}, 'intruder', '11 say neither, 4 could not be had'),
  ],
)
def test_why_a_judge_gave_no_score_is_told(tmp_path, told, scorer, reason):
  workdir = Workdir.of(tmp_path)
  if told is not None:
    unread = {'asked': 15, 'unread': 11, 'failed': 4, 'chance': 0.2}
    unread |= {'trusted': None, 'calibration': {'value': None}}
    told = told | {'first': 'a', 'judges': {'a': {'intruder': unread}}}
    told |= {'format_version': records.FORMAT_VERSION, 'agreement': {}}
    records.write_json(workdir.file('judges.json'), told)
  scores = [Score(1, 0, 'clip', '', 20.0, 5, 'x')]
  found = scored.figures(workdir, scores, ('x',))
  assert found[scorer]['value'] is None
  assert reason in found[scorer]['reason']
  assert found['clip']['value'] == 20
  assert 'second explainer' in found['clip']['difference']['reason']
  assert 'index.dictionaries' in found['clip_neurons']['reason']


def test_a_random_baseline_of_judges_would_say_chance(tmp_path):
  scores = [Score(1, m, 'detection', '', 0.75, 5, 'x') for m in range(3)]
  found = scored.figures(Workdir.of(tmp_path), scores, ('x',))
  assert found['detection']['value'] == 0.75
  assert 'random ones' in found['detection_random']['reason']
  assert found['detection']['ci'] is None  # all alike: nothing to draw
