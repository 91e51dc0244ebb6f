"""Heat maps over patches, and the pictures made of them.

The paper upsamples a BINARY patch map bilinearly, which dilates it (one patch
grows to about four times its area); the exact map is the nearest one. Both
stand here, and every IoU is given both ways.
"""

import numpy as np
from PIL import Image

DIM = 0.12  # brightness of what is masked, arXiv 2411.14982


def lit(heat_HW: np.ndarray, peak: float, threshold: float) -> np.ndarray:
  """Patches of at least `threshold` of the latent's peak, boolean.

  Where an image fires the latent more weakly, the strongest patch is lit; where
  it does not fire it, none is.
  """
  level = min(threshold * peak, float(heat_HW.max(initial=0.0)))
  return (heat_HW >= level) & (heat_HW > 0)


def upsample(active_HW: np.ndarray, size: tuple[int, int], style: str):
  """A boolean patch grid as a boolean pixel mask of `size` = (width, height).

  `exact` repeats each patch; `paper` interpolates the binary map bilinearly
  and keeps what is above zero.
  """
  grid = Image.fromarray(active_HW.astype(np.float32))
  if style == 'exact':
    return np.asarray(grid.resize(size, Image.Resampling.NEAREST)) > 0.5
  if style == 'paper':
    return np.asarray(grid.resize(size, Image.Resampling.BILINEAR)) > 1e-5
  raise ValueError(f'mask style {style!r} is neither exact nor paper')


def shrink(image: Image.Image, pixels: int) -> Image.Image:
  """The image scaled so that its longer side has `pixels`; 0: as it is."""
  if not pixels or max(image.size) == pixels:
    return image
  scale = pixels / max(image.size)
  width, height = (max(1, round(side * scale)) for side in image.size)
  return image.resize((width, height), Image.Resampling.BICUBIC)


def dim(image: Image.Image, mask_HW: np.ndarray) -> Image.Image:
  """The image with what lies outside the mask at 12% of its brightness."""
  pixels = np.asarray(image.convert('RGB'))
  kept = np.where(mask_HW[..., None], pixels, (pixels * DIM).astype(np.uint8))
  return Image.fromarray(kept)


def iou(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
  """Intersection over union of two boolean masks; 0 where both are empty."""
  union = np.logical_or(a_HW, b_HW).sum()
  if union == 0:
    return 0.0
  return float(np.logical_and(a_HW, b_HW).sum() / union)
