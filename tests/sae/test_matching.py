import itertools

import numpy as np
import pytest

from lmm_sae.sae import matching

A, B, D = 5, 7, 6


def unit(w_MD):
  return w_MD / np.linalg.norm(w_MD, axis=1, keepdims=True)


@pytest.fixture
def pair():
  rng = np.random.default_rng(0)
  return rng.normal(size=(A, D)), 3 * rng.normal(size=(B, D))


def test_no_other_matching_has_a_larger_sum(pair):
  a_MD, b_MD = pair
  left, right, cosine_L = matching.match(a_MD, b_MD)
  cosine_AB = unit(a_MD) @ unit(b_MD).T
  best = max(
    cosine_AB[range(A), picks].sum()
    for picks in map(list, itertools.permutations(range(B), A))
  )
  assert sorted(left) == list(range(A))
  assert len(set(right.tolist())) == A
  np.testing.assert_allclose(cosine_L, cosine_AB[left, right], rtol=1e-5)
  np.testing.assert_allclose(cosine_L.sum(), best, rtol=1e-5)


@pytest.mark.parametrize('block', [2, 3, 100])
def test_large_saes_are_matched_by_mutual_neighbours(pair, block, monkeypatch):
  monkeypatch.setattr(matching, 'HUNGARIAN', 3)
  monkeypatch.setattr(matching, 'BLOCK', block)
  a_MD, b_MD = pair
  cosine_AB = unit(a_MD) @ unit(b_MD).T
  want = [
    (i, j)
    for i, j in itertools.product(range(A), range(B))
    if cosine_AB[i].argmax() == j and cosine_AB[:, j].argmax() == i
  ]
  left, right, cosine_L = matching.match(a_MD, b_MD)
  assert list(zip(left, right, strict=True)) == want
  assert 0 < len(want) < A
  np.testing.assert_allclose(cosine_L, cosine_AB[left, right], rtol=1e-5)
  found = matching.stability(a_MD, b_MD)
  assert found['method'] == 'mutual_nearest'
  assert found['pairs'] == len(want)


@pytest.mark.parametrize('limit', [2, matching.HUNGARIAN])
def test_the_same_directions_in_another_order_are_found(limit, monkeypatch):
  monkeypatch.setattr(matching, 'HUNGARIAN', limit)
  rng = np.random.default_rng(1)
  a_MD = rng.normal(size=(40, 16))
  order = rng.permutation(40)
  b_MD = a_MD[order] * rng.uniform(0.5, 2, (40, 1))
  b_MD[:10] = rng.normal(size=(10, 16))  # these were not found again
  left, right, cosine_L = matching.match(a_MD, b_MD)
  again = cosine_L > 0.999
  assert again.sum() == 30
  np.testing.assert_array_equal(order[right[again]], left[again])
  found = matching.stability(a_MD, b_MD)
  assert found['share'] >= 30 / 40
  assert found['latents'] == 40
  assert found['random']['share'] < 0.3
  assert found['random']['mean'] < found['mean']


def test_an_sae_without_latents_that_fire_matches_none(pair):
  found = matching.stability(pair[0][:0], pair[1])
  assert found['pairs'] == 0
  assert found['mean'] is None
  assert found['random']['share'] is None
