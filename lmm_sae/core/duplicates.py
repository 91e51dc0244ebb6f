"""Near-duplicate images: equal once both are small.

A copy that was scaled, or saved again as JPEG, keeps the colours of an 8 x 8
thumbnail to within a few levels of 255; two pictures of different things do
not. Such copies would fill a latent's exemplars with one picture.
"""

import numpy as np
from PIL import Image

SIDE = 8  # pixels a side of the thumbnail
LEVELS = 8  # of 255, by which no channel of no pixel of a copy may differ


def thumbnail(image: Image.Image) -> np.ndarray:
  """The thumbnail that stands for an image, int16 [SIDE * SIDE * 3]."""
  small = image.convert('RGB').resize((SIDE, SIDE), Image.Resampling.BOX)
  return np.asarray(small, np.int16).reshape(-1)


def firsts(thumbnails: list[np.ndarray]) -> np.ndarray:
  """For each image the first one that it is nearly a copy of, or itself.

  Images are compared with those near in mean brightness only, which loses
  none: where no pixel differs by more than LEVELS, no mean does.
  """
  if not thumbnails:
    return np.zeros(0, np.int64)
  thumbs = np.stack(thumbnails)
  mean = thumbs.mean(axis=1)
  by_mean = np.argsort(mean, kind='stable')
  low = np.searchsorted(mean[by_mean], mean - LEVELS - 1e-6)
  high = np.searchsorted(mean[by_mean], mean + LEVELS + 1e-6)
  first = np.arange(len(thumbs))
  for i in range(len(thumbs)):
    near = by_mean[low[i] : high[i]]
    near = near[(near < i) & (first[near] == near)]
    same = np.abs(thumbs[near] - thumbs[i]).max(axis=1) <= LEVELS
    if same.any():
      first[i] = near[same].min()
  return first
