"""Typed tokens: what each position of a sequence is, and where it looks."""

import dataclasses
import enum
from collections.abc import Sequence

import numpy as np


class Kind(enum.IntEnum):
  """What a token is. The numbers are part of the store's format."""

  BOS = 0
  TEMPLATE = 1
  QUESTION = 2
  ANSWER = 3
  BASE = 4
  TILE = 5
  NEWLINE = 6
  PADDING = 7  # never stored


TEXT = (Kind.TEMPLATE, Kind.QUESTION, Kind.ANSWER)
IMAGE = (Kind.BASE, Kind.TILE, Kind.NEWLINE)


def kinds(where: str) -> tuple[Kind, ...]:
  """The kinds meant by `all`, `text`, `image` or a kind's name, lower case.

  `all` is everything that may be edited or trained on: BOS and padding are out.

  Raises:
    ValueError: no such kind.
  """
  if where == 'all':
    return TEXT + IMAGE
  if where == 'text':
    return TEXT
  if where == 'image':
    return IMAGE
  names = {kind.name.lower(): kind for kind in Kind}
  if where not in names:
    raise ValueError(
      f'token kind {where!r} is none of all, text, image, {", ".join(names)}'
    )
  return (names[where],)


@dataclasses.dataclass(frozen=True)
class TokenMap:
  """What each of the T tokens of one sequence is.

  Attributes:
    token_T: int32 token ids.
    kind_T: uint8, values of `Kind`.
    image_T: int16, which image of the sequence; -1 for text.
    row_T, col_T: int16, place in the grid of the base view (BASE) or in the
      whole unpadded AnyRes grid (TILE); -1 elsewhere.
    box_T4: float32 (x0, y0, x1, y1) in pixels of the ORIGINAL image, what the
      token's patch covers, clipped to the image; 0 for text and newlines.
    grid: (rows, cols) of the base view's grid; (0, 0) without image.
  """

  token_T: np.ndarray
  kind_T: np.ndarray
  image_T: np.ndarray
  row_T: np.ndarray
  col_T: np.ndarray
  box_T4: np.ndarray
  grid: tuple[int, int]

  def where(self, name: str) -> np.ndarray:
    """Boolean [T]: the tokens of `kinds(name)`."""
    return np.isin(self.kind_T, [int(kind) for kind in kinds(name)])


ARRAYS = ('token_T', 'kind_T', 'image_T', 'row_T', 'col_T', 'box_T4')


def text_map(token_T: np.ndarray, kind_T: np.ndarray, /) -> TokenMap:
  """The map of tokens that look at no image."""
  count = len(token_T)
  return TokenMap(
    token_T=token_T,
    kind_T=kind_T,
    image_T=np.full(count, -1, np.int16),
    row_T=np.full(count, -1, np.int16),
    col_T=np.full(count, -1, np.int16),
    box_T4=np.zeros((count, 4), np.float32),
    grid=(0, 0),
  )


def concatenate(maps: Sequence[TokenMap], grid: tuple[int, int]) -> TokenMap:
  """One map after the other."""
  arrays = {
    name: np.concatenate([getattr(each, name) for each in maps])
    for name in ARRAYS
  }
  return TokenMap(**arrays, grid=grid)


def pad(tokens: TokenMap, mask_T: np.ndarray, token: int) -> TokenMap:
  """The map spread over the True places of a mask; PADDING elsewhere."""
  count = len(mask_T)
  wide = text_map(
    np.full(count, token, np.int32), np.full(count, Kind.PADDING, np.uint8)
  )
  for name in ARRAYS:
    getattr(wide, name)[mask_T] = getattr(tokens, name)
  return dataclasses.replace(wide, grid=tokens.grid)
