import io

import numpy as np
from PIL import Image

from lmm_sae.core import duplicates


def picture(seed: int) -> Image.Image:
  rng = np.random.default_rng(seed)
  blocks = rng.integers(0, 256, (5, 7, 3), np.uint8)
  return Image.fromarray(blocks).resize((140, 100), Image.Resampling.BILINEAR)


def saved_as_jpeg(image: Image.Image) -> Image.Image:
  buffer = io.BytesIO()
  image.save(buffer, 'JPEG', quality=80)
  return Image.open(buffer)


def test_a_scaled_and_a_recompressed_copy_are_duplicates_of_the_first():
  one, other = picture(0), picture(1)
  images = [other, one, one.resize((70, 50)), saved_as_jpeg(one), other]
  firsts = duplicates.firsts([duplicates.thumbnail(i) for i in images])
  assert firsts.tolist() == [0, 1, 1, 1, 0]


def test_different_pictures_are_not_duplicates():
  thumbnails = [duplicates.thumbnail(picture(seed)) for seed in range(40)]
  assert duplicates.firsts(thumbnails).tolist() == list(range(40))


def test_one_small_patch_of_another_colour_makes_a_different_picture():
  pixels = np.full((64, 64, 3), 200, np.uint8)
  other = pixels.copy()
  other[8:16, 8:16] = (180, 200, 200)
  thumbnails = [
    duplicates.thumbnail(Image.fromarray(p)) for p in (pixels, other)
  ]
  assert duplicates.firsts(thumbnails).tolist() == [0, 1]
