"""Small pictures and compact heat maps, as the report's page draws them.

A heat map travels as a short string, `ROWSxCOLS:` and then the patches row by
row: a number skips so many cold patches, a letter is one warm patch at the
level of that letter. `2x3:4mZ` is five cold patches but for an `m`, then the
peak. The page decodes it with two lines of script.
"""

import io
import math
import re
import string

import numpy as np
from PIL import Image

LETTERS = string.ascii_letters
LEVELS = len(LETTERS)  # `a` is level 1, `Z` level 52, the latent's peak


def lit_level(threshold: float) -> int:
  """The least level that counts as lit at `threshold` of the peak."""
  return max(1, math.ceil(threshold * LEVELS - 1e-9))


def encode_heat(
  heat_HW: np.ndarray, /, *, peak: float, threshold: float
) -> str:
  """A heat map as a string; see the module.

  Levels are shares of `peak`, rounded down; what is at least `threshold` of it
  never falls below `lit_level(threshold)` and nothing else reaches it, so that
  the page masks exactly the patches that were masked for the explainer.
  """
  share_HW = np.asarray(heat_HW, np.float64) / max(peak, 1e-12)
  levels_HW = np.clip(np.floor(share_HW * LEVELS + 1e-9), 1, LEVELS)
  lit = lit_level(threshold)
  levels_HW = np.where(
    share_HW >= threshold,
    np.maximum(levels_HW, lit),
    np.minimum(levels_HW, lit - 1),
  )
  levels_HW = np.where(share_HW > 0, levels_HW, 0).astype(int)
  parts, cold = [f'{share_HW.shape[0]}x{share_HW.shape[1]}:'], 0
  for level in levels_HW.ravel().tolist():
    if level == 0:
      cold += 1
      continue
    if cold:
      parts.append(str(cold))
      cold = 0
    parts.append(LETTERS[level - 1])
  return ''.join(parts)


def decode_heat(text: str) -> np.ndarray:
  """The levels of an encoded heat map, integers of 0 to `LEVELS`."""
  shape, _, runs = text.partition(':')
  rows, cols = (int(side) for side in shape.split('x'))
  levels = np.zeros(rows * cols, int)
  at = 0
  for token in re.findall(r'\d+|[a-zA-Z]', runs):
    if token.isdigit():
      at += int(token)
    else:
      levels[at] = LETTERS.index(token) + 1
      at += 1
  return levels.reshape(rows, cols)


def thumbnail(image: Image.Image, pixels: int) -> bytes:
  """The image as WebP, its longer side at most `pixels`."""
  image = image.convert('RGB')
  scale = pixels / max(image.size)
  if scale < 1:
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  image.save(buffer, 'WEBP', quality=84, method=4)
  return buffer.getvalue()
