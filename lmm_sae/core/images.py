"""Pictures from files: upright, RGB, whole, or a reason why not."""

import os
from typing import BinaryIO

from PIL import Image, ImageOps

MAX_SIDE = 32767  # pixel boxes are stored as int16


def load(file: str | os.PathLike | BinaryIO) -> Image.Image:
  """The image of a file, or of its bytes: see `upright`.

  Raises:
    ValueError: it is missing, broken, or too large.
  """
  name = file if isinstance(file, str | os.PathLike) else 'in the data'
  try:
    with Image.open(file) as image:
      return upright(image)
  except FileNotFoundError:
    raise ValueError(f'image {name} does not exist') from None
  except (
    OSError,
    SyntaxError,  # what Pillow's PNG reader raises on a broken chunk
    Image.DecompressionBombError,
  ) as error:
    raise ValueError(f'image {name} cannot be read: {error}') from error


def upright(image: Image.Image) -> Image.Image:
  """RGB pixels of an image's first frame, turned as its EXIF tag says.

  CMYK, palette and grey images are converted; transparency is dropped.
  """
  if max(image.size) > MAX_SIDE or min(image.size) < 1:
    raise ValueError(
      f'image of {image.width} x {image.height} pixels: sides must be '
      f'between 1 and {MAX_SIDE}'
    )
  return ImageOps.exif_transpose(image).convert('RGB')
