import numpy as np
import pytest

from lmm_sae.core import stats


def test_the_mean_lies_in_its_interval_and_the_seed_decides_it():
  values = np.random.default_rng(3).normal(5, 1, 40)
  mean, low, high = stats.mean_ci(values)
  assert mean == pytest.approx(values.mean())
  assert low < mean < high
  assert high - low == pytest.approx(4 * values.std() / np.sqrt(40), rel=0.2)
  assert stats.mean_ci(values) == (mean, low, high)


def test_a_share_has_the_interval_of_wilson():
  # Newcombe 1998, table I: 81 of 263
  share, low, high = stats.proportion(81, 263)
  assert (share, low, high) == pytest.approx((0.3080, 0.2553, 0.3662), abs=1e-4)
  assert stats.proportion(0, 20)[1] == 0
  assert stats.proportion(20, 20)[2] == 1


@pytest.mark.parametrize(('hits', 'n'), [(0, 0), (3, 2), (-1, 4)])
def test_what_is_no_share_is_refused(hits, n):
  with pytest.raises(ValueError, match='no share'):
    stats.proportion(hits, n)


def test_correlation_of_pooled_groups_is_pearsons():
  groups = [[(0, 1), (1, 3), (2, 4)], [(5, 2), (6, 9), (7, 7)], []]
  figure = stats.correlation_figure(groups, 'none')
  x, y = [0, 1, 2, 5, 6, 7], [1, 3, 4, 2, 9, 7]
  assert figure['value'] == pytest.approx(np.corrcoef(x, y)[0, 1])
  assert figure['n'] == 6
  assert figure['groups'] == 2
  own = [np.corrcoef(*np.transpose(g))[0, 1] for g in groups[:2]]
  assert figure['mean'] == pytest.approx(np.mean(own))


def test_no_values_give_a_reason_and_no_nan():
  assert stats.mean_figure([], 'why')['reason'] == 'why'
  assert stats.share_figure([], 'why')['value'] is None
  assert stats.correlation_figure([], 'why')['value'] is None
  assert stats.correlation([1, 1, 1], [1, 2, 3]) is None


def ratio(sums_R2):
  return sums_R2[:, 0] / sums_R2[:, 1]


def test_a_pooled_figure_resamples_whole_samples():
  rng = np.random.default_rng(0)
  sums_S2 = rng.uniform(1, 3, (40, 2))
  got = stats.pooled_figure(sums_S2, ratio, 'none', seed=3, resamples=2000)
  assert got['value'] == pytest.approx(
    sums_S2[:, 0].sum() / sums_S2[:, 1].sum()
  )
  assert got['n'] == 40
  picks = rng.integers(0, 40, (2000, 40))
  drawn = ratio(sums_S2[picks].sum(1))
  np.testing.assert_allclose(
    got['ci'], np.percentile(drawn, (2.5, 97.5)), atol=0.02
  )
  assert got == stats.pooled_figure(sums_S2, ratio, 'none', 3, 2000)


def test_a_pooled_figure_that_is_not_defined_has_a_reason():
  got = stats.pooled_figure(np.zeros((3, 2)), ratio, 'nothing to share')
  assert got == stats.missing('nothing to share')
  assert stats.pooled_figure(np.zeros((0, 2)), ratio, 'x')['value'] is None
