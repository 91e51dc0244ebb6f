"""Where the image tokens of LLaVA-NeXT look: AnyRes, undone.

An image is seen twice: squeezed into one square base view, and, scaled with
its shape kept and padded, cut into square tiles. Both are grids of patches.
Rows and columns of the tiles' grid that are padding are dropped again ("un-
padded", in whole patches: where the padding ends inside a patch, up to one
patch at either edge of the image may be dropped with it), and each row ends
with a newline token.
"""

import math
from collections.abc import Sequence

import numpy as np
from transformers.image_processing_utils import select_best_resolution

from lmm_sae.core.tokens import Kind, TokenMap


def image_tokens(
  width: int,
  height: int,
  view: int,
  patch: int,
  pinpoints: Sequence[tuple[int, int]],
) -> TokenMap:
  """The tokens of one image, in the model's order: base, then tiles by row.

  Args:
    width, height: of the original image, in pixels.
    view: side of the base view and of a tile; patch: side of a patch.
    pinpoints: allowed (height, width) of the tiled canvas.

  Returns:
    A TokenMap whose token_T is 0 and whose image_T is 0. Of an image thinner
    than a patch of its canvas no tile may be left, only newlines.
  """
  tall, wide = select_best_resolution((height, width), pinpoints)
  side = view // patch
  starts = np.arange(side) * patch
  base_x = _edges(starts, patch, 0, width / view, width)
  base_y = _edges(starts, patch, 0, height / view, height)

  new_height, new_width = _scaled(width, height, tall, wide)
  tile_x = (np.arange(wide // view)[:, None] * view + starts).ravel()
  tile_y = (np.arange(tall // view)[:, None] * view + starts).ravel()
  tile_x = _edges(
    tile_x, patch, (wide - new_width) // 2, width / new_width, width
  )
  tile_y = _edges(
    tile_y, patch, (tall - new_height) // 2, height / new_height, height
  )
  drop_y, drop_x = _unpadded(width, height, len(tile_y), len(tile_x))
  tile_x = tile_x[drop_x : len(tile_x) - drop_x]
  tile_y = tile_y[drop_y : len(tile_y) - drop_y]

  base = _grid(base_x, base_y, Kind.BASE, newline=False)
  tiles = _grid(tile_x, tile_y, Kind.TILE, newline=True)
  kind_T, row_T, col_T, box_T4 = (
    np.concatenate(pair) for pair in zip(base, tiles, strict=True)
  )
  return TokenMap(
    token_T=np.zeros(len(kind_T), np.int32),
    kind_T=kind_T,
    image_T=np.zeros(len(kind_T), np.int16),
    row_T=row_T,
    col_T=col_T,
    box_T4=box_T4,
    grid=(side, side),
  )


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


def _edges(starts, patch, pad, scale, limit) -> np.ndarray:
  """[n, 2] first and last pixel of patches, in the original image, clipped."""
  edges = (np.stack([starts, starts + patch], -1) - pad) * scale
  return np.clip(edges, 0, limit)


def _grid(x_N2: np.ndarray, y_N2: np.ndarray, kind: Kind, newline: bool):
  """kind, row, col and box of a grid of patches, each row ended or not."""
  rows, cols = len(y_N2), len(x_N2)
  shape = (rows, cols + newline)
  kind_T = np.full(shape, kind, np.uint8)
  row_T = np.full(shape, -1, np.int16)
  col_T = np.full(shape, -1, np.int16)
  box_T4 = np.zeros((*shape, 4), np.float32)
  row_T[:, :cols] = np.arange(rows)[:, None]
  col_T[:, :cols] = np.arange(cols)
  box_T4[:, :cols, 0::2] = x_N2
  box_T4[:, :cols, 1::2] = y_N2[:, None]
  kind_T[:, cols:] = Kind.NEWLINE
  return kind_T.ravel(), row_T.ravel(), col_T.ravel(), box_T4.reshape(-1, 4)
