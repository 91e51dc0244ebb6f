import numpy as np
import pytest

from lmm_sae.core import agreement

GAP = np.nan
# Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", section C:
# four observers of twelve units.
PUBLISHED = np.array(
  [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, GAP, GAP, GAP],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, GAP, 3],
    [GAP, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, GAP],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, GAP],
  ]
).T


@pytest.mark.parametrize(('ordinal', 'alpha'), [(False, 0.743), (True, 0.815)])
def test_alpha_is_that_of_the_published_example(ordinal, alpha):
  found = agreement.krippendorff_alpha(PUBLISHED, ordinal=ordinal)
  assert found == pytest.approx(alpha, abs=5e-4)


def test_kappa_is_that_of_a_table_counted_by_hand():
  a = [1] * 20 + [1] * 5 + [0] * 10 + [0] * 15
  b = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
  # p_o = 35/50; p_e = .5 * .6 + .5 * .4 = .5
  assert agreement.cohen_kappa(a, b) == pytest.approx(0.4)


def test_perfect_agreement_is_one_and_chance_about_zero():
  rng = np.random.default_rng(0)
  same = rng.integers(0, 3, 900) / 2
  assert agreement.cohen_kappa(same, same) == pytest.approx(1)
  two = np.stack([same, same], 1)
  assert agreement.krippendorff_alpha(two) == pytest.approx(1)
  two[:, 1] = rng.permutation(same)
  assert abs(agreement.cohen_kappa(*two.T)) < 0.1
  assert abs(agreement.krippendorff_alpha(two)) < 0.1


@pytest.mark.parametrize(
  'ratings_UR', [[[1, GAP], [GAP, 0]], [[1, 1], [1, 1]], np.zeros((0, 2))]
)
def test_where_nothing_can_be_said_there_is_a_reason(ratings_UR):
  found = agreement.figure(
    agreement.krippendorff_alpha, np.array(ratings_UR, float)
  )
  assert found['value'] is None
  assert found['reason']


def test_the_interval_holds_the_value():
  found = agreement.figure(agreement.krippendorff_alpha, PUBLISHED, seed=3)
  low, high = found['ci']
  assert low < found['value'] < high <= 1
  assert found['n'] == 11  # the last unit was rated once
