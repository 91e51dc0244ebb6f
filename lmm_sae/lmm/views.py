"""Where the patches of one view look: resizing, padding and cropping, undone.

A view is what an image encoder sees at once, a grid of cells of equal size. Of
cell i along an axis, the pixels [a, b) of the view are the pixels
[(a + crop) * scale - pad, ...) of the original image, which had `pad` pixels
put before it and was resized by 1 / scale, and of which `crop` were then cut
off. A view that is no whole number of cells (384 = 27 x 14 + 6) has pixels at
its right and lower edge that no cell sees.
"""

from typing import NamedTuple

import numpy as np

from lmm_sae.core.tokens import Kind, TokenMap


class Axis(NamedTuple):
  """One axis of a view.

  Attributes:
    cells: how many; size: pixels of a cell in the view.
    length: of the original image, in pixels.
    scale: pixels of the original a pixel of the resized image.
    crop: pixels of the resized image before the view; negative: padding.
    pad: pixels of padding before the original image.
  """

  cells: int
  size: float
  length: int
  scale: float
  crop: float = 0
  pad: float = 0

  def edges(self) -> np.ndarray:
    """[cells, 2] first and last pixel, in the original image, clipped to it."""
    starts = np.arange(self.cells) * self.size
    return self.original(np.stack([starts, starts + self.size], -1))

  def original(self, view_n2: np.ndarray) -> np.ndarray:
    """Places in the view as places in the original image, clipped to it."""
    return np.clip(
      (view_n2 + self.crop) * self.scale - self.pad, 0, self.length
    )


def grid(
  x_N2: np.ndarray, y_N2: np.ndarray, kind: Kind, newline: bool = False
) -> TokenMap:
  """A grid of cells, row by row, each row ended by a newline or not.

  Its token_T and image_T are 0, and its `grid` is its own rows and columns.
  """
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
  return TokenMap(
    token_T=np.zeros(rows * (cols + newline), np.int32),
    kind_T=kind_T.ravel(),
    image_T=np.zeros(rows * (cols + newline), np.int16),
    row_T=row_T.ravel(),
    col_T=col_T.ravel(),
    box_T4=box_T4.reshape(-1, 4),
    grid=(rows, cols),
  )


def base(x: Axis, y: Axis) -> TokenMap:
  """The map of a single view."""
  return grid(x.edges(), y.edges(), Kind.BASE)


def padded(width: int, height: int, view: int, patch: int) -> tuple[Axis, Axis]:
  """The axes (x, y) of an image padded to a square, then squeezed."""
  side, cells = max(width, height), view // patch
  x, y = (
    Axis(cells, patch, length, side / view, pad=(side - length) // 2)
    for length in (width, height)
  )
  return x, y
