"""The boxes of image tokens, held against pictures that were drawn for it.

The oracle draws nothing new: it lets the model's own image processor resize,
pad and cut a picture whose every pixel says where it is, and asks what each
patch has seen.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.llava_next import image_processing_pil_llava_next

from lmm_sae.core.tokens import Kind
from lmm_sae.lmm import anyres
from tests.lmm.tiny_llava import PATCH, PINPOINTS, VIEW

SIDE = VIEW // PATCH
SHAPES = [(60, 40), (28, 28), (31, 97), (200, 20), (20, 200), (113, 64), (7, 9)]


def tokens_of(width, height, pinpoints=PINPOINTS):
  return anyres.image_tokens(width, height, VIEW, PATCH, pinpoints)


def canvas(width, height):
  """Per pixel of the padded canvas (H, W, 3): x and y in 0-1, and 1 = image."""
  x_HW, y_HW = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
  image = np.stack([x_HW, y_HW, np.ones_like(x_HW)]).astype(np.float32)
  pil = image_processing_pil_llava_next.LlavaNextImageProcessorPil()
  best = image_processing_pil_llava_next.select_best_resolution(
    (height, width), PINPOINTS
  )
  new = image_processing_pil_llava_next.get_patch_output_size(
    image, best, input_data_format='channels_first'
  )
  resized = np.stack(
    [
      np.asarray(Image.fromarray(plane).resize(new[::-1], Image.Resampling.BOX))
      for plane in image
    ]
  )
  return pil._pad_for_patching(resized, best)


@pytest.mark.parametrize(('width', 'height'), SHAPES)
def test_tile_boxes_are_what_the_patches_see(width, height):
  tokens = tokens_of(width, height)
  padded = canvas(width, height)
  rows, cols = padded.shape[1] // PATCH, padded.shape[2] // PATCH
  patches = padded.reshape(3, rows, PATCH, cols, PATCH).transpose(1, 3, 0, 2, 4)
  tile = tokens.kind_T == Kind.TILE
  drop_row = (rows - (tokens.row_T[tile].max() + 1)) // 2
  drop_col = (cols - (tokens.col_T[tile].max() + 1)) // 2
  step = max(width / padded.shape[2], height / padded.shape[1], 1) * 2
  for row, col, box in zip(
    tokens.row_T[tile] + drop_row,
    tokens.col_T[tile] + drop_col,
    tokens.box_T4[tile],
    strict=True,
  ):
    x, y, inside = patches[row, col]
    inside = inside > 0.5
    if not inside.any():
      assert box[0] >= box[2] - step or box[1] >= box[3] - step
      continue
    seen = [x[inside].min(), y[inside].min(), x[inside].max(), y[inside].max()]
    np.testing.assert_allclose(box, seen, atol=step)


@settings(max_examples=200, deadline=None)
@given(st.integers(50, 400), st.integers(50, 400))
def test_boxes_tile_the_image(width, height):
  tokens = tokens_of(width, height)
  base = tokens.kind_T == Kind.BASE
  tile = tokens.kind_T == Kind.TILE
  assert base.sum() == SIDE * SIDE
  assert base[: SIDE * SIDE].all()  # they come first
  assert (tokens.box_T4 >= 0).all()
  assert (tokens.box_T4[:, 0::2] <= width).all()
  assert (tokens.box_T4[:, 1::2] <= height).all()
  _tile_without_gaps(tokens, base, (0, 0, width, height))
  kept = _tile_without_gaps(tokens, tile, None)
  assert np.isclose(kept[0], 0) or np.isclose(kept[1], 0)
  # What is missing at an edge is less than a patch of the canvas.
  rows, cols = tokens.row_T[tile].max() + 1, tokens.col_T[tile].max() + 1
  assert kept[0] <= width / (cols - 1 or 0.5)
  assert kept[1] <= height / (rows - 1 or 0.5)
  newlines = (tokens.kind_T == Kind.NEWLINE).sum()
  assert newlines == rows
  assert rows * cols == tile.sum()


def _tile_without_gaps(tokens, which, whole):
  """Checks that boxes adjoin in their grid; returns where they begin."""
  rows, cols = tokens.row_T[which].max() + 1, tokens.col_T[which].max() + 1
  box = tokens.box_T4[which].reshape(rows, cols, 4)
  np.testing.assert_allclose(box[:, 1:, 0], box[:, :-1, 2], rtol=1e-5)
  np.testing.assert_allclose(box[1:, :, 1], box[:-1, :, 3], rtol=1e-5)
  assert (box[:, :, 0] == box[:1, :, 0]).all()
  assert (box[:, :, 1] == box[:, :1, 1]).all()
  ends = (*box[0, 0, :2], *box[-1, -1, 2:])
  if whole is not None:
    np.testing.assert_allclose(ends, whole, rtol=1e-5)
  return ends


def test_a_square_image_on_square_tiles_has_no_padding():
  tokens = tokens_of(56, 56, [[56, 56]])
  tile = tokens.kind_T == Kind.TILE
  assert tile.sum() == (2 * SIDE) ** 2
  np.testing.assert_array_equal(tokens.box_T4[tile][0], [0, 0, 7, 7])
  np.testing.assert_array_equal(tokens.box_T4[tile][-1], [49, 49, 56, 56])


def test_an_image_thinner_than_a_patch_keeps_newlines_alone():
  tokens = tokens_of(6, 49)
  assert not (tokens.kind_T == Kind.TILE).any()
  assert (tokens.kind_T == Kind.NEWLINE).sum() == 2 * SIDE
