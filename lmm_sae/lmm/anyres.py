"""Where the image tokens of LLaVA-NeXT look: AnyRes, undone.

An image is seen twice: squeezed into one square base view, and, scaled with
its shape kept and padded, cut into square tiles. Both are grids of patches.
Rows and columns of the tiles' grid that are padding are dropped again ("un-
padded", in whole patches: where the padding ends inside a patch, up to one
patch at either edge of the image may be dropped with it), and each row ends
with a newline token. LLaVA-OneVision then pools a large grid to fewer cells, by
bilinear samples a cell apart; a cell's box is its share of the grid.
"""

import math
from collections.abc import Sequence

import numpy as np
from transformers.image_processing_utils import select_best_resolution

from lmm_sae.core import tokens
from lmm_sae.core.tokens import Kind, TokenMap
from lmm_sae.lmm import views
from lmm_sae.lmm.views import Axis

POOL_FROM = 1.1  # a grid is pooled if its sides exceed the limit's by this


def image_tokens(
  width: int,
  height: int,
  view: int,
  patch: int,
  pinpoints: Sequence[tuple[int, int]],
  most: int = 0,
) -> TokenMap:
  """The tokens of one image, in the model's order: base, then tiles by row.

  Args:
    width, height: of the original image, in pixels.
    view: side of the base view and of a tile; patch: side of a patch.
    pinpoints: allowed (height, width) of the tiled canvas.
    most: tiles whose tokens are not pooled; 0: none ever are.

  Returns:
    A TokenMap whose token_T is 0 and whose image_T is 0. Of an image thinner
    than a patch of its canvas no tile may be left, only newlines.
  """
  tall, wide = select_best_resolution((height, width), pinpoints)
  side = view // patch
  base = views.base(
    Axis(side, patch, width, width / view),
    Axis(side, patch, height, height / view),
  )
  new_height, new_width = _scaled(width, height, tall, wide)
  rows, cols = tall // view * side, wide // view * side
  drop_y, drop_x = _unpadded(width, height, rows, cols)
  rows, cols = rows - 2 * drop_y, cols - 2 * drop_x
  out_rows, out_cols = _pooled(rows, cols, most * side**2)
  pad_y, pad_x = (tall - new_height) // 2, (wide - new_width) // 2
  x = Axis(out_cols, 1, width, width / new_width, -pad_x)
  y = Axis(out_rows, 1, height, height / new_height, -pad_y)
  x_N2 = x.original(_tiled(drop_x, cols, out_cols, view, patch))
  y_N2 = y.original(_tiled(drop_y, rows, out_rows, view, patch))
  tiles = views.grid(x_N2, y_N2, Kind.TILE, newline=True)
  return tokens.concatenate([base, tiles], base.grid)


def _scaled(width: int, height: int, tall: int, wide: int) -> tuple[int, int]:
  """(height, width) of the image once it is scaled into the canvas."""
  by_width, by_height = wide / width, tall / height
  if by_width < by_height:
    return min(math.ceil(height * by_width), tall), wide
  return tall, min(math.ceil(width * by_height), wide)


def _unpadded(width: int, height: int, rows: int, cols: int):
  """How many (rows, cols) of patches the model drops at either side."""
  if width / height > cols / rows:
    return (rows - int(round(height * (cols / width), 7))) // 2, 0
  return 0, (cols - int(round(width * (rows / height), 7))) // 2


def _pooled(rows: int, cols: int, most: int) -> tuple[int, int]:
  """(rows, cols) once a grid of more than `most` cells is pooled."""
  ratio = math.sqrt(rows * cols / most) if most else 0.0
  if ratio <= POOL_FROM:
    return rows, cols
  return int(rows // ratio), int(cols // ratio)


def _tiled(drop: int, kept: int, cells: int, view: int, patch: int):
  """[cells, 2] pixels of the canvas, of cells that share the kept patches."""
  bounds = drop + np.round(np.arange(cells + 1) * (kept / max(cells, 1)), 9)
  side = view // patch

  def pixel(patch_n: np.ndarray, place_n: np.ndarray) -> np.ndarray:
    # A tile's last pixels, less than a patch, are seen by no patch.
    start_n = patch_n // side * view + patch_n % side * patch
    return start_n + (place_n - patch_n) * patch

  low, high = bounds[:-1], bounds[1:]
  return np.stack(
    [pixel(np.floor(low), low), pixel(np.ceil(high) - 1, high)], -1
  )
