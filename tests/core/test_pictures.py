"""Heat maps as strings, and small pictures."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from lmm_sae.core import masks, pictures


def test_the_example_of_the_docstring_is_true():
  heat_HW = np.array([[0, 0, 0], [0, 0.5, 1]])
  text = pictures.encode_heat(heat_HW, heat_HW == 1, peak=1.0)
  assert text == '2x3:4mZ'


@pytest.mark.parametrize('seed', range(5))
def test_levels_and_capitals_come_back(seed):
  rng = np.random.default_rng(seed)
  heat_HW = rng.random((5, 7)) * (rng.random((5, 7)) < 0.4)
  lit_HW = masks.lit(heat_HW, 1.0, 0.25)
  text = pictures.encode_heat(heat_HW, lit_HW, peak=1.0)
  level_HW, capital_HW = pictures.decode_heat(text)
  np.testing.assert_array_equal(level_HW > 0, heat_HW > 0)
  np.testing.assert_array_equal(capital_HW, lit_HW)
  share_HW = level_HW / pictures.LEVELS
  assert (share_HW >= heat_HW - 1e-6).all()
  assert (share_HW <= heat_HW + 1 / pictures.LEVELS).all()


def test_what_exceeds_the_peak_is_the_peak():
  heat_HW = np.array([[3.0, 0.0]])
  text = pictures.encode_heat(heat_HW, heat_HW > 0, peak=1.0)
  assert text == '1x2:Z'


def test_prices_against_an_answer_keep_their_size():
  heat_HW = np.array([[-1.0, 0.5]])
  text = pictures.encode_heat(heat_HW, heat_HW < 0, peak=1.0)
  assert text == '1x2:Zm'


@pytest.mark.parametrize(
  ('size', 'wanted'), [((200, 100), (50, 25)), ((40, 30), (40, 30))]
)
def test_a_thumbnail_shrinks_and_never_grows(size, wanted):
  data = pictures.thumbnail(Image.new('RGB', size, 'red'), 50)
  with Image.open(io.BytesIO(data)) as image:
    assert image.format == 'WEBP'
    assert image.size == wanted


def test_an_overlay_grows_hotter_and_leaves_what_is_silent():
  image = Image.new('RGB', (12, 8), (40, 80, 120))
  heat_HW = np.array([[0.0, 0.5, 1.0], [2.0, 0.25, 0.0]])
  over = np.asarray(pictures.overlay(image, heat_HW, peak=1.0)).astype(int)
  patches = over.reshape(2, 4, 3, 4, 3)
  assert (patches == patches[:, :1, :, :1]).all()  # whole patches, no smear
  at = patches[:, 0, :, 0]
  np.testing.assert_array_equal(at[0, 0], [40, 80, 120])
  np.testing.assert_array_equal(at[1, 2], [40, 80, 120])
  np.testing.assert_array_equal(at[1, 0], at[0, 2])  # the peak, and above
  # the half: 62% of (221, 81, 58) over 38% of the picture
  np.testing.assert_allclose(at[0, 1], [152, 81, 82], atol=1)
  assert at[1, 1].sum() < at[0, 1].sum() < at[0, 2].sum()


def test_the_page_paints_in_the_same_colours(root):
  script = root / 'lmm_sae/stages/report_assets/pictures.js'
  found = re.search(r'const RAMP = (\[.*?\]);', script.read_text(), re.DOTALL)
  rows = json.loads(re.sub(r',\s*\]', ']', found[1]))
  assert [tuple(row) for row in rows] == list(pictures.RAMP)
