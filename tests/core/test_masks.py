"""Masks against the rules of the paper's code, worked out by hand."""

import numpy as np
import pytest
from PIL import Image

from lmm_sae.core import masks


def one_patch(rows: int, cols: int, row: int, col: int) -> np.ndarray:
  active_HW = np.zeros((rows, cols), bool)
  active_HW[row, col] = True
  return active_HW


def bilinear(grid_HW: np.ndarray, patch: int) -> np.ndarray:
  """A plain bilinear upsampling: centres keep their places, edges repeat."""

  def near(side: int) -> np.ndarray:
    at = (np.arange(side * patch) + 0.5) / patch - 0.5
    weight = np.maximum(0, 1 - abs(at[:, None] - np.arange(-1, side + 1)))
    weight[:, 1] += weight[:, 0]  # what lies beyond the edge is the edge
    weight[:, -2] += weight[:, -1]
    return weight[:, 1:-1]

  rows, cols = grid_HW.shape
  return near(rows) @ grid_HW @ near(cols).T


def test_an_exact_mask_repeats_each_patch():
  active_HW = np.random.default_rng(0).random((3, 5)) < 0.5
  wanted = active_HW.repeat(7, 0).repeat(7, 1)
  found = masks.upsample(active_HW, (35, 21), 'exact')
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
  ('block', 'area', 'iou'), [(1, 3.98, 0.25), (4, 25.0, 0.64), (8, 81.0, 0.79)]
)
def test_the_papers_mask_dilates_as_the_paper_says(block, area, iou):
  active_HW = np.zeros((24, 24), bool)
  active_HW[8 : 8 + block, 9 : 9 + block] = True
  exact = masks.upsample(active_HW, (336, 336), 'exact')
  paper = masks.upsample(active_HW, (336, 336), 'paper')
  assert paper[exact].all()
  assert paper.sum() / 14**2 == pytest.approx(area, abs=0.021)
  assert masks.iou(exact, paper) == pytest.approx(iou, abs=0.005)


@pytest.mark.parametrize('seed', range(3))
def test_the_papers_mask_is_a_bilinear_one(seed):
  active_HW = np.random.default_rng(seed).random((5, 7)) < 0.3
  dark_HW = bilinear(np.where(active_HW, 0.0, 224.0), 6)
  found = masks.upsample(active_HW, (42, 30), 'paper')
  sure = abs(dark_HW - 223.5) > 0.4  # rounded twice, between
  np.testing.assert_array_equal(found[sure], dark_HW[sure] < 223.5)
  assert sure.mean() > 0.9


def test_the_papers_picture_dims_to_an_eighth_with_soft_edges():
  image = Image.new('RGB', (42, 30), (200, 100, 250))
  active_HW = one_patch(5, 7, 2, 3)
  found = np.asarray(masks.masked(image, active_HW, 'paper')).astype(float)
  dark_HW = bilinear(np.where(active_HW, 0.0, 224.0), 6)
  wanted = np.array([200, 100, 250]) * (1 - dark_HW / 255)[..., None]
  np.testing.assert_allclose(found, wanted, atol=2)
  corner = found[0, 0] / [200, 100, 250]
  np.testing.assert_allclose(corner, 31 / 255, atol=0.005)  # 12%
  assert len(np.unique(found[..., 0])) > 4  # graded, not two levels


def test_an_exact_picture_has_hard_edges():
  image = Image.new('RGB', (14, 10), (200, 100, 250))
  active_HW = one_patch(5, 7, 2, 3)
  found = np.asarray(masks.masked(image, active_HW, 'exact'))
  lit = active_HW.repeat(2, 0).repeat(2, 1)
  assert (found[lit] == (200, 100, 250)).all()
  assert (found[~lit] == (24, 12, 30)).all()


def test_an_unknown_style_is_refused():
  with pytest.raises(ValueError, match='neither exact nor paper'):
    masks.masked(Image.new('RGB', (4, 4)), one_patch(2, 2, 0, 0), 'soft')


def test_exact_shows_a_share_of_the_peak_and_paper_all_that_fires():
  heat_HW = np.array([[0.0, 1e-6, 2e-5], [0.9, 1.1, 4.0]])
  options = {'peak': 4.0, 'share': 0.25, 'level': 1e-5}
  exact = masks.bright(heat_HW, 'exact', **options)
  paper = masks.bright(heat_HW, 'paper', **options)
  np.testing.assert_array_equal(exact, [[0, 0, 0], [0, 1, 1]])
  np.testing.assert_array_equal(paper, [[0, 0, 1], [1, 1, 1]])


def test_a_weak_image_lights_its_strongest_patch_and_a_silent_one_none():
  weak_HW = np.array([[0.0, 0.1], [0.2, 0.0]])
  lit_HW = masks.lit(weak_HW, peak=4.0, threshold=0.25)
  np.testing.assert_array_equal(lit_HW, [[0, 0], [1, 0]])
  assert not masks.lit(np.zeros((2, 3)), peak=4.0, threshold=0.0).any()


def test_two_empty_masks_have_no_overlap():
  empty = np.zeros((3, 4), bool)
  assert masks.iou(empty, empty) == 0.0
