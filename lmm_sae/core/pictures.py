"""Small pictures and compact heat maps, as the report's page draws them.

A heat map travels as a short string, `ROWSxCOLS:` and then the patches row by
row: a number skips so many cold patches, a letter is one warm patch, from a,
faint, to z, the peak. A capital is a patch that is lit (what a mask leaves
bright) or, in a map of prices, one that counts against. `2x3:4mZ` is five cold
patches but for an `m`, then a lit peak. Two lines of script decode it.
"""

import io
import re
import string

import numpy as np
from PIL import Image

from lmm_sae.core import masks

LEVELS = len(string.ascii_lowercase)

# Share of the peak, then the colour laid over the picture there and how opaque
# it is; between them, linear. The page's script (pictures.js) has the same.
RAMP = (
  (0.0, 60, 16, 104, 0.4),
  (0.25, 150, 38, 103, 0.55),
  (0.5, 221, 81, 58, 0.62),
  (0.75, 252, 165, 10, 0.68),
  (1.0, 252, 245, 150, 0.74),
)


def encode_heat(
  heat_HW: np.ndarray, capital_HW: np.ndarray, /, *, peak: float
) -> str:
  """A heat map as a string; levels are shares of `peak`, rounded up."""
  share_HW = np.abs(np.asarray(heat_HW, np.float64)) / max(peak, 1e-12)
  level_HW = np.clip(np.ceil(share_HW * LEVELS - 1e-6), 0, LEVELS).astype(int)
  rows, cols = level_HW.shape
  parts, cold = [f'{rows}x{cols}:'], 0
  for level, capital in zip(
    level_HW.ravel().tolist(), np.ravel(capital_HW).tolist(), strict=True
  ):
    if not level:
      cold += 1
      continue
    if cold:
      parts.append(str(cold))
      cold = 0
    letter = string.ascii_lowercase[level - 1]
    parts.append(letter.upper() if capital else letter)
  return ''.join(parts)


def decode_heat(text: str) -> tuple[np.ndarray, np.ndarray]:
  """(levels of 0 to LEVELS, whether capital) of an encoded heat map."""
  shape, _, runs = text.partition(':')
  rows, cols = (int(side) for side in shape.split('x'))
  level_P, capital_P = np.zeros(rows * cols, int), np.zeros(rows * cols, bool)
  at = 0
  for token in re.findall(r'\d+|[a-zA-Z]', runs):
    if token.isdigit():
      at += int(token)
      continue
    level_P[at] = string.ascii_lowercase.index(token.lower()) + 1
    capital_P[at] = token.isupper()
    at += 1
  return level_P.reshape(rows, cols), capital_P.reshape(rows, cols)


def overlay(
  image: Image.Image, heat_HW: np.ndarray, /, *, peak: float
) -> Image.Image:
  """The image under its heat map, for people: each patch in the colour of its
  share of `peak`, blended in; where the latent is silent, as it is."""
  share_HW = np.clip(np.asarray(heat_HW, np.float64) / max(peak, 1e-12), 0, 1)
  at, *channels = np.array(RAMP).T
  over_HW4 = np.stack([np.interp(share_HW, at, c) for c in channels], -1)
  over_HW4[..., 3] = np.where(share_HW > 0, over_HW4[..., 3] * 255, 0)
  over = Image.fromarray(np.rint(over_HW4).astype(np.uint8), 'RGBA')
  over = over.resize(image.size, Image.Resampling.NEAREST)
  return Image.alpha_composite(image.convert('RGBA'), over).convert('RGB')


def thumbnail(image: Image.Image, pixels: int) -> bytes:
  """The image as WebP, its longer side at most `pixels`."""
  image = image.convert('RGB')
  buffer = io.BytesIO()
  small = masks.shrink(image, min(pixels, max(image.size)))
  small.save(buffer, 'WEBP', quality=84, method=4)
  return buffer.getvalue()
