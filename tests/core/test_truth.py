"""The rule for concepts, on patches whose labels are known by hand."""

import numpy as np
import pytest

from lmm_sae.core import records, truth

VOCABULARY = truth.Vocabulary(('blue', 'red'), ('background',))


def sample(concepts: dict[str, list[str]]) -> records.Sample:
  return records.Sample(
    *(0, 0, '', '', 8, 6, '', (), 0, 0),
    truth={'regions': '', 'concepts': concepts},
  )


def half(acts_NM: np.ndarray, shares_NC: np.ndarray) -> truth.Half:
  """A half whose residual is its activations; K = M."""
  order = np.argsort(-acts_NM, axis=1, kind='stable')
  return truth.Half(
    acts_NM.astype(np.float32),
    np.take_along_axis(acts_NM, order, 1).astype(np.float32),
    order,
    shares_NC.astype(np.float32),
  )


def test_background_names_are_not_counted():
  samples = [
    sample({'0': ['background'], '1': ['red', 'striped']}),
    sample({'0': ['background', 'red'], '2': ['blue']}),
  ]
  vocabulary = truth.Vocabulary.of(samples)
  assert vocabulary.counted == ('blue', 'red', 'striped')
  assert vocabulary.others == ('background',)


def test_coverage_is_the_share_of_a_patch_in_regions_of_the_concept():
  regions_HW = np.zeros((6, 8), np.uint8)
  regions_HW[:3, :2] = 1  # half of patch 0, 2 x 2 patches of 3 x 4 pixels
  regions_HW[3:, 4:] = 2  # all of patch 3
  known = sample({'0': ['background'], '1': ['red'], '2': ['red', 'blue']})
  covered_PC = truth.coverage(regions_HW, known, VOCABULARY, (2, 2))
  wanted = {
    'blue': [0, 0, 0, 1],
    'red': [0.5, 0, 0, 1],
    'background': [0.5, 1, 1, 0],
    'objects': [0.5, 0, 0, 1],
  }
  for c, name in enumerate((*VOCABULARY.names, 'objects')):
    np.testing.assert_allclose(covered_PC[:, c], wanted[name], atol=1e-6)


def test_a_mask_needs_every_name_and_is_empty_without_one():
  regions_HW = np.array([[0, 1], [2, 1]], np.uint8)
  known = sample({'0': ['background'], '1': ['red', 'cross'], '2': ['red']})
  for named, wanted in (
    (['red'], [[0, 1], [1, 1]]),
    (['red', 'cross'], [[0, 1], [0, 1]]),
    (['background'], [[1, 0], [0, 0]]),
    (['red', 'background'], [[0, 0], [0, 0]]),
    ([], [[0, 0], [0, 0]]),
  ):
    found = truth.mask(regions_HW, known, named)
    np.testing.assert_array_equal(found, np.array(wanted, bool))


@pytest.fixture
def shares():
  """8 patches: 3 red, one of them hardly; 1 blue; 4 background."""
  shares_NC = np.zeros((8, 4))
  shares_NC[:3, 1] = shares_NC[:3, 3] = (1, 1, 0.1)
  shares_NC[3, 0] = shares_NC[3, 3] = 1
  shares_NC[:, 2] = 1 - shares_NC[:, 3]
  return shares_NC


def test_the_table_holds_what_was_worked_out_by_hand(shares):
  acts_NM = np.zeros((8, 5))
  acts_NM[:, 0] = (4, 4, 2, 0, 0.5, 0.5, 0.5, 0.5)  # red, once cut at a quarter
  acts_NM[:, 1] = (0, 0, 0, 1, 0, 0, 0, 0)  # blue
  acts_NM[:, 2] = (0, 0, 0, 0, 1, 1, 1, 0)  # background
  acts_NM[:, 3] = (1, 1, 0, 0, 1, 0, 0, 0)  # red, but not cleanly
  a = half(acts_NM, shares)
  rows = truth.concept_table(truth.Latents(5), a, a, VOCABULARY)
  assert [row.concept for row in rows] == [
    'red',
    'blue',
    'background',
    'red',
    '',
  ]
  # red is shown on 2 patches. Latent 0 at .1 of its peak: 7 fire, 2 right; at
  # .25: 3 fire, 2 right; at .6: 2 fire, 2 right.
  red = rows[0]
  assert (red.f1_a, red.f1_b, red.precision_b) == (1, 1, 1)
  assert red.threshold == pytest.approx(2.4)
  assert red.peak == 4
  assert red.objects == pytest.approx(3 / 7, abs=1e-6)
  assert rows[3].f1_a == pytest.approx(2 * 2 / (3 + 2))
  assert rows[3].precision_b == pytest.approx(2 / 3, abs=1e-6)
  assert [row.clean for row in rows] == [True, True, False, False, False]
  assert truth.clean_count(rows) == 2


def test_concept_and_threshold_are_of_a_and_figures_of_b(shares):
  on_a, on_b = np.zeros((8, 1)), np.zeros((8, 1))
  on_a[:2] = 1
  on_b[:, 0] = (0.05, 0.7, 0.7, 0.7, 0, 0, 0, 0)  # peak, level are those of A
  (row,) = truth.concept_table(
    truth.Latents(1), half(on_a, shares), half(on_b, shares), VOCABULARY
  )
  assert (row.concept, row.f1_a, row.threshold) == ('red', 1, 0.1)
  assert row.f1_b == pytest.approx(2 * 1 / (3 + 2))
  # patch 2 is covered a tenth: it is not red, but touches it
  assert row.precision_b == pytest.approx(2 / 3, abs=1e-6)
  assert not row.clean


def test_neurons_are_both_sides_of_each_channel(shares):
  x_ND = np.full((8, 2), 5.0)
  x_ND[:2, 0] += 1  # red above the mean
  x_ND[3, 1] -= 2  # blue below it
  a = half(np.zeros((8, 3)), shares)
  a = truth.Half(x_ND.astype(np.float32), a.vals_NK, a.idx_NK, a.covered_NC)
  rows = truth.concept_table(truth.Neurons(a), a, a, VOCABULARY)
  assert [(r.latent, r.concept) for r in rows if r.clean] == [
    (0, 'red'),
    (3, 'blue'),
  ]
  assert truth.clean_count(rows) == 2


def test_blocks_of_rows_do_not_change_the_table(shares, monkeypatch):
  acts_NM = np.random.default_rng(0).random((8, 6)) > 0.6
  a = half(acts_NM.astype(float), shares)
  whole = truth.concept_table(truth.Latents(6), a, a, VOCABULARY)
  monkeypatch.setattr(truth, 'CELLS', 12)
  assert truth.concept_table(truth.Latents(6), a, a, VOCABULARY) == whole
