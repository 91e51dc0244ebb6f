"""Heat maps over patches, and the pictures made of them.

The paper's code (arXiv 2411.14982, EvolvingLMMs-Lab/multimodal-sae) makes an
8-bit map of its binary patch map, 224 where it is silent, upsamples it
bilinearly (Pillow's: the centres of patches keep their places, corners are not
aligned) and blends so many 255ths of black in. That dilates the map, one patch
to 3.98 times its area, with soft edges. The exact map is the nearest one, its
edges hard. Both stand here, and every IoU is given both ways.
"""

import numpy as np
from PIL import Image

DIM = 0.12  # brightness of what is masked, arXiv 2411.14982
BLACK = (
  224  # 255ths of black that the paper's code blends in: 31 / 255 are left
)
STYLES = ('exact', 'paper')


def lit(heat_HW: np.ndarray, peak: float, threshold: float) -> np.ndarray:
  """Patches of at least `threshold` of the latent's peak, boolean.

  Where an image fires the latent more weakly, the strongest patch is lit; where
  it does not fire it, none is.
  """
  level = min(threshold * peak, float(heat_HW.max(initial=0.0)))
  return (heat_HW >= level) & (heat_HW > 0)


def bright(
  heat_HW: np.ndarray,
  style: str,
  *,
  peak: float,
  share: float,
  level: float,
) -> np.ndarray:
  """Patches that an explainer sees bright, boolean: `exact` those of at least
  `share` of the peak (`lit`), `paper` all of at least `level`, as in the paper.
  """
  if style == 'paper':
    return heat_HW >= level
  return lit(heat_HW, peak, share)


def upsample(
  active_HW: np.ndarray, size: tuple[int, int], style: str
) -> np.ndarray:
  """A boolean patch grid as a boolean pixel mask of `size` = (width, height).

  `exact` repeats each patch; `paper` is what the paper's mask does not darken
  fully.
  """
  if style == 'exact':
    grid = Image.fromarray(active_HW.astype(np.uint8))
    return np.asarray(grid.resize(size, Image.Resampling.NEAREST)) > 0
  if style == 'paper':
    return np.asarray(_paper(active_HW, size)) < BLACK
  raise ValueError(f'mask style {style!r} is neither exact nor paper')


def masked(
  image: Image.Image, active_HW: np.ndarray, style: str
) -> Image.Image:
  """The image, dimmed where a boolean patch grid is False.

  `exact` dims to DIM with hard edges, `paper` as the paper's code does.
  """
  if style != 'paper':
    return dim(image, upsample(active_HW, image.size, style))
  black = Image.new('RGB', image.size)
  mask = _paper(active_HW, image.size)
  return Image.composite(black, image.convert('RGB'), mask)


def _paper(active_HW: np.ndarray, size: tuple[int, int]) -> Image.Image:
  """255ths of black, as the paper's code has them."""
  dark = Image.fromarray(np.where(active_HW, 0, BLACK).astype(np.uint8))
  return dark.resize(size, Image.Resampling.BILINEAR)


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
