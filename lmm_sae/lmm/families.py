"""What is particular to each family of models: one small class a family.

A family says which classes of transformers load it, what tokens an image of a
given size becomes and where each of them looks, and which arguments the model
takes beside the text. Image processors are those of PIL, and are loaded without
the family's Processor class: some of those need torchvision, for videos.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from PIL import Image

from lmm_sae.core import tokens
from lmm_sae.core.tokens import Kind, TokenMap
from lmm_sae.lmm import anyres, views
from lmm_sae.lmm.views import Axis

# Thin images are blown up to gigabytes, by LLaVA-1.5 before it crops them and
# by others as they are padded to a square.
MAX_PIXELS = 2**27

Images = Sequence[Sequence[Image.Image]]  # of each text, in order


class Family:
  """What all have in common; a subclass is one `model_type`.

  Attributes:
    model: class of transformers. processors: image processors that a folder may
      name, as transformers 4 calls them; the first where it names none.
    around: what stands before and after an image's token among words.
    grid: (rows, cols) of the base view; (0, 0) where it depends on the image.
  """

  model: str
  processors: tuple[str, ...]
  around: tuple[str, str] = ('', '')
  grid: tuple[int, int] = (0, 0)

  def __init__(self, config: transformers.PretrainedConfig, pixels: Any):
    self.config, self.pixels = config, pixels

  def tokens(self, width: int, height: int, alone: bool) -> TokenMap:
    """What an image of that size becomes; token_T and image_T are 0.

    Args:
      alone: whether it is the only image of its text.

    Raises:
      ValueError: the model cannot take such an image.
    """
    raise NotImplementedError

  def inputs(self, images: Images) -> dict[str, torch.Tensor]:
    """The model's arguments for the images of a batch; there is one or more."""
    flat = [image for row in images for image in row]
    return dict(self._pixels(flat))

  def _pixels(self, images):
    # An image 1 or 3 pixels high could be taken for one with channels first.
    return self.pixels(
      images, return_tensors='pt', input_data_format='channels_last'
    )


class Llava(Family):
  """LLaVA-1.5 and its like: one view, cropped or squeezed, no newlines."""

  model = 'LlavaForConditionalGeneration'
  processors = ('CLIPImageProcessor', 'LlavaImageProcessor')
  processors += ('SiglipImageProcessor',)

  def __init__(self, config, pixels):
    super().__init__(config, pixels)
    self.view, self.patch = _view(config)
    self.grid = (self.view // self.patch,) * 2
    size = pixels.size
    # CLIP's processor has the field too, and means another thing by it.
    square = type(pixels).__name__.startswith('LlavaImageProcessor')
    self._pads = square and _is_on(pixels, 'do_pad')
    self._edge = _side(size, 'shortest_edge')
    self._crops = _is_on(pixels, 'do_center_crop')
    made = pixels.crop_size if self._crops else size
    sides = {_side(made, 'height'), _side(made, 'width')}
    _check_sides(sides, self.view)
    if self._edge and self._edge < self.view:
      _check_sides({self._edge}, self.view)

  def tokens(self, width, height, alone):
    del alone
    if self._pads:
      square = max(width, height)
      pads = [(square - length) // 2 for length in (width, height)]
      sizes = [square, square]
    else:
      pads, sizes = [0, 0], [width, height]
    if self._edge:
      short = min(sizes)
      new = [int(self._edge * size / short) for size in sizes]
    else:
      new = [_side(self.pixels.size, name) for name in ('width', 'height')]
    _check_size((width, height), sizes)
    _check_size((width, height), new)
    cells = self.grid[0]
    axes = [
      Axis(cells, self.patch, length, size / to, (to - self.view) // 2, pad)
      for length, size, to, pad in zip(
        (width, height), sizes, new, pads, strict=True
      )
    ]
    return views.base(*axes)

  def inputs(self, images):
    return {'pixel_values': super().inputs(images)['pixel_values']}


class LlavaNext(Family):
  """LLaVA-NeXT (1.6): a squeezed base view, then tiles with newlines."""

  model = 'LlavaNextForConditionalGeneration'
  processors = ('LlavaNextImageProcessor',)

  def __init__(self, config, pixels):
    super().__init__(config, pixels)
    self.view, self.patch = _view(config)
    self.grid = (self.view // self.patch,) * 2
    self.pinpoints = [tuple(p) for p in config.image_grid_pinpoints]
    if self.pinpoints != [tuple(p) for p in pixels.image_grid_pinpoints]:
      raise ValueError(
        'image_grid_pinpoints of config.json and of the image processor '
        'differ: mend one of them'
      )
    sides = {_side(pixels.size, 'shortest_edge', 'height')}
    if _is_on(pixels, 'do_center_crop'):
      sides |= {_side(pixels.crop_size, 'height')}
    _check_sides(sides, self.view)

  def tokens(self, width, height, alone):
    del alone
    return anyres.image_tokens(
      width, height, self.view, self.patch, self.pinpoints
    )

  def inputs(self, images):
    made = super().inputs(images)
    return {name: made[name] for name in ('pixel_values', 'image_sizes')}


class LlavaOnevision(LlavaNext):
  """LLaVA-OneVision: as NeXT, but large grids are pooled.

  Where a text has several images, each is one view, padded to a square, and one
  newline.
  """

  model = 'LlavaOnevisionForConditionalGeneration'
  processors = ('LlavaOnevisionImageProcessor',)

  def __init__(self, config, pixels):
    super().__init__(config, pixels)
    ratio = config.vision_aspect_ratio
    most = ratio.removeprefix('anyres_max_')
    if not most.isdecimal():
      raise ValueError(
        f'vision_aspect_ratio {ratio!r} of config.json is no anyres_max_N'
      )
    self.most = int(most)

  def tokens(self, width, height, alone):
    if alone:
      return anyres.image_tokens(
        width, height, self.view, self.patch, self.pinpoints, self.most
      )
    _check_size((width, height), [max(width, height)] * 2)
    base = views.base(*views.padded(width, height, self.view, self.patch))
    newline = views.grid(
      base.box_T4[:0, :2], base.box_T4[:1, :2], Kind.TILE, True
    )
    return tokens.concatenate([base, newline], base.grid)

  def inputs(self, images):
    made = self._pixels([list(row) for row in images if row])
    names = ('pixel_values', 'image_sizes', 'batch_num_images')
    return {name: made[name] for name in names}


class Qwen25Vl(Family):
  """Qwen2.5-VL: one view of the image's own shape, 2 x 2 patches a token."""

  model = 'Qwen2_5_VLForConditionalGeneration'
  processors = ('Qwen2VLImageProcessor', 'Qwen2_5_VLImageProcessor')
  around = ('<|vision_start|>', '<|vision_end|>')

  def __init__(self, config, pixels):
    super().__init__(config, pixels)
    vision = config.vision_config
    theirs = (vision.patch_size, vision.spatial_merge_size)
    if theirs != (pixels.patch_size, pixels.merge_size):
      raise ValueError(
        f'the image processor makes patches {pixels.patch_size} pixels wide '
        f'and merges {pixels.merge_size}, the model wants {theirs}: mend '
        'preprocessor_config.json'
      )
    self.cell = vision.patch_size * vision.spatial_merge_size
    # The very function by which this version's processor resizes.
    self._resized = inspect.getmodule(type(pixels)).smart_resize

  def tokens(self, width, height, alone):
    del alone
    tall, wide = self._resized(
      height,
      width,
      factor=self.cell,
      min_pixels=self.pixels.size['shortest_edge'],
      max_pixels=self.pixels.size['longest_edge'],
    )
    return views.base(
      Axis(wide // self.cell, self.cell, width, width / wide),
      Axis(tall // self.cell, self.cell, height, height / tall),
    )

  def inputs(self, images):
    made = super().inputs(images)
    return {name: made[name] for name in ('pixel_values', 'image_grid_thw')}


FAMILIES: dict[str, type[Family]] = {
  'llava': Llava,
  'llava_next': LlavaNext,
  'llava_onevision': LlavaOnevision,
  'qwen2_5_vl': Qwen25Vl,
}


def _view(config: transformers.PretrainedConfig) -> tuple[int, int]:
  """Side of a view and of a patch; the patches must be all that is read.

  Raises:
    ValueError: the image encoder is of another kind.
  """
  vision = config.vision_config
  whole = {'clip_vision_model': 'default', 'siglip_vision_model': 'full'}
  if vision.model_type not in whole:
    raise ValueError(
      f'its image encoder is a {vision.model_type!r}: only those of '
      f'{", ".join(whole)} are read'
    )
  chosen = config.vision_feature_select_strategy
  if chosen != whole[vision.model_type]:
    raise ValueError(
      f'vision_feature_select_strategy is {chosen!r}, which gives a '
      f'{vision.model_type} other tokens than its patches: set '
      f'{whole[vision.model_type]!r} in config.json'
    )
  return vision.image_size, vision.patch_size


def _check_size(image: Sequence[int], made: Sequence[int]) -> None:
  """Refuses images (width, height) that are made too large on the way."""
  if made[0] * made[1] > MAX_PIXELS:
    raise ValueError(
      f'an image of {image[0]} x {image[1]} pixels is too large or too thin: '
      f'the image processor makes it {made[0]} x {made[1]}, and at most '
      f'{MAX_PIXELS} pixels are taken'
    )


def _is_on(pixels: Any, name: str) -> bool:
  return hasattr(pixels, name) and bool(getattr(pixels, name))


def _side(size: Any, *names: str) -> int:
  """The first of these entries of an image processor's size; 0: none."""
  for name in names:
    if size.get(name):
      return size[name]
  return 0


def _check_sides(sides: set[int], view: int) -> None:
  if sides != {view}:
    raise ValueError(
      f'the image processor makes views of {sorted(sides)} pixels, the model '
      f'wants {view}: mend its settings in the folder'
    )
