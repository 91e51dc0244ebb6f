"""The subject: a LLaVA-NeXT, its typed tokens and its residual stream.

  subject = llava.Subject.load('small')
  prompt = subject.chat('what is this?', 1)
  inputs = subject.inputs([prompt], [[image]])
  (tokens,) = subject.token_maps([prompt], [[image]], inputs)
  x_BTD = subject.residuals(inputs, (2,))[2]

`small` and `base` are packaged; any other path is a llava-hf folder.
"""

import contextlib
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import torch
import transformers
from PIL import Image
from torch import nn

from lmm_sae.core import host, tokens
from lmm_sae.core.tokens import TokenMap
from lmm_sae.lmm import anyres, folders, parts
from lmm_sae.lmm import prompt as prompts
from lmm_sae.lmm.prompt import Prompt, Turns

Images = Sequence[Sequence[Image.Image]]  # of each text, in order


# What transformers raises for folders that lack a file or hold a broken one.
_LOAD_ERRORS = (
  OSError,
  RuntimeError,
  KeyError,
  TypeError,
  ValueError,
  safetensors.SafetensorError,
)


class _EnoughError(Exception):
  """The last hooked layer has run: nothing above it is needed."""


class Subject:
  """A frozen LLaVA-NeXT; make it with `load`.

  Attributes:
    name: of the packaged model, or of the folder.
    model, processor, tokenizer: of transformers; the image processor is the
      PIL one.
    width: D. num_layers: decoder layers. grid: (rows, cols) of the base view.
    max_tokens: the longest text the model reads, image tokens counted.
    device: of the model's inputs.
  """

  def __init__(
    self,
    name: str,
    folder: pathlib.Path,
    model: transformers.PreTrainedModel,
    processor: transformers.ProcessorMixin,
  ):
    self.name = name
    self.folder = folder
    self.model = model.eval().requires_grad_(False)
    self.processor = processor
    self.tokenizer = processor.tokenizer
    self.device = model.get_input_embeddings().weight.device
    text = model.config.get_text_config()
    self.width, self.max_tokens = text.hidden_size, text.max_position_embeddings
    self._path, self._layers = parts.find_layers(model)
    self.num_layers = len(self._layers)
    vision = model.config.vision_config
    self.view, self.patch = vision.image_size, vision.patch_size
    self.grid = (self.view // self.patch,) * 2
    self.image_token = model.config.image_token_id
    parts.skip_unread(model)
    parts.check_pixels(processor.image_processor, self.view)

  @classmethod
  def load(
    cls,
    path: str | os.PathLike,
    device: str = 'cpu',
    dtype: str = 'float32',
    threads: int = 0,
  ) -> 'Subject':
    """The model of a folder, or a packaged one.

    Args:
      path: `small`, `base`, or a folder in the llava-hf layout.
      device: cpu, cuda, cuda:1, ..., or auto: sharded over what there is.
      dtype: float32, bfloat16 or float16.
      threads: CPU threads of this process; 0: one a core.

    Raises:
      ValueError: there is no such model, it is no LLaVA-NeXT, or it is broken.
    """
    folder = folders.resolve(path)
    if dtype not in ('float32', 'bfloat16', 'float16'):
      raise ValueError(
        f'lmm.dtype {dtype!r} is none of float32, bfloat16, float16'
      )
    if device.startswith('cuda') and not torch.cuda.is_available():
      raise ValueError(f'lmm.device is {device!r}, but there is no CUDA device')
    torch.set_num_threads(threads or host.cores())
    transformers.utils.logging.disable_progress_bar()
    try:
      processor = transformers.AutoProcessor.from_pretrained(
        folder, backend='pil', local_files_only=True
      )
      model, info = (
        transformers.LlavaNextForConditionalGeneration.from_pretrained(
          folder,
          dtype=getattr(torch, dtype),
          device_map='auto' if device == 'auto' else None,
          local_files_only=True,
          output_loading_info=True,
        )
      )
    except _LOAD_ERRORS as error:
      raise ValueError(f'{folder} cannot be loaded: {error}') from error
    if info['missing_keys']:
      raise ValueError(
        f'{folder} lacks weights, such as {sorted(info["missing_keys"])[0]}: '
        'copy the whole folder'
      )
    if device != 'auto':
      model = model.to(device)
    name = str(path) if str(path) in folders.PACKAGED else folder.name
    return cls(name, folder, model, processor)

  @property
  def image_backend(self) -> str:
    """Class of the image processor: what made the pixels."""
    return type(self.processor.image_processor).__name__

  def vocab(self) -> list[str]:
    """The text of every token id."""
    size = self.model.config.get_text_config().vocab_size
    return [
      self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
      for token in range(size)
    ]

  # Layers.

  def layer(self, layer: int) -> nn.Module:
    """Decoder layer, 0-based.

    Raises:
      ValueError: the model has no such layer.
    """
    if not 0 <= layer < self.num_layers:
      raise ValueError(
        f'layer {layer} is not in {self.name}, whose {self.num_layers} layers '
        f'are 0 to {self.num_layers - 1}: change lmm.layers'
      )
    return self._layers[layer]

  def layer_path(self, layer: int) -> str:
    """Where that layer stands in this model's modules."""
    self.layer(layer)
    return f'{self._path}.{layer}'

  # Texts.

  def chat(self, user_text: str, has_image: int = 0) -> Prompt:
    """A question ready to be answered, images (a count, or a bool) first."""
    return self.conversation([('user', user_text)], has_image, generate=True)

  def conversation(
    self, turns: Turns, has_image: int = 0, generate: bool = False
  ) -> Prompt:
    """A conversation with the chat template; see `prompt.render`."""
    return prompts.render(self.processor, turns, int(has_image), generate)

  def bare(self, text: str = prompts.IMAGE) -> Prompt:
    """Text without chat template; the plain `<image>` is the paper's."""
    return prompts.bare(text, self.processor.image_token)

  # Inputs and what their tokens are.

  def encode(self, text: str, images: Sequence[Image.Image] = ()) -> TokenMap:
    """The tokens of one text and its images, and what each of them is.

    Args:
      text: a `Prompt` knows its turns; a plain string is one question.

    Raises:
      ValueError: images and placeholders do not fit.
    """
    bos = self.tokenizer.bos_token
    encoded = self.tokenizer(
      str(text),
      add_special_tokens=not (bos and text.startswith(bos)),
      return_offsets_mapping=True,
    )
    token_T = np.array(encoded['input_ids'], np.int32).reshape(-1)
    offsets_T2 = np.array(encoded['offset_mapping'], np.int64).reshape(-1, 2)
    kind_T = prompts.kinds(
      text, offsets_T2, token_T, self.tokenizer.bos_token_id
    )
    at = np.flatnonzero(token_T == self.image_token)
    if len(at) != len(images):
      raise ValueError(
        f'a text has {len(at)} image placeholders for {len(images)} images'
      )
    pieces, start = [], 0
    for number, (stop, image) in enumerate(zip(at, images, strict=True)):
      pieces.append(tokens.text_map(token_T[start:stop], kind_T[start:stop]))
      pieces.append(self._image_map(image, number))
      start = stop + 1
    pieces.append(tokens.text_map(token_T[start:], kind_T[start:]))
    return tokens.concatenate(pieces, self.grid if images else (0, 0))

  def batch(
    self, maps: Sequence[TokenMap], images: Images, padding_side: str = 'right'
  ) -> dict[str, torch.Tensor]:
    """What `encode` made of several texts, as the model's arguments.

    Returns:
      input_ids, attention_mask and, where there are images, pixel_values and
      image_sizes.
    """
    count = max(len(each.token_T) for each in maps)
    pad = self.tokenizer.pad_token_id or 0
    input_BT = np.full((len(maps), count), pad, np.int64)
    mask_BT = np.zeros_like(input_BT)
    for row, each in enumerate(maps):
      length = len(each.token_T)
      at = count - length if padding_side == 'left' else 0
      input_BT[row, at : at + length] = each.token_T
      mask_BT[row, at : at + length] = 1
    batch = {
      'input_ids': torch.from_numpy(input_BT),
      'attention_mask': torch.from_numpy(mask_BT),
    }
    flat = [image for row in images for image in row]
    if flat:
      pixels = self.processor.image_processor(flat, return_tensors='pt')
      batch['pixel_values'] = pixels['pixel_values'].to(self.model.dtype)
      batch['image_sizes'] = pixels['image_sizes']
    return {name: value.to(self.device) for name, value in batch.items()}

  def inputs(
    self, texts: Sequence[str], images: Images, padding_side: str = 'right'
  ) -> dict[str, torch.Tensor]:
    """`encode` and `batch` in one: texts, each with its list of images.

    Pad on the right to read residuals, on the left to generate.
    """
    return self.batch(self.token_maps(texts, images), images, padding_side)

  def token_maps(
    self,
    texts: Sequence[str],
    images: Images,
    inputs: dict[str, torch.Tensor] | None = None,
  ) -> list[TokenMap]:
    """What the tokens of each text are; padded as `inputs` are, if given."""
    if not texts or len(texts) != len(images):
      raise ValueError(
        f'{len(texts)} texts and images of {len(images)}: each text needs its '
        'own list of images'
      )
    maps = [self.encode(*each) for each in zip(texts, images, strict=True)]
    if inputs is None:
      return maps
    mask_BT = inputs['attention_mask'].cpu().numpy().astype(bool)
    pad = self.tokenizer.pad_token_id or 0
    return [
      tokens.pad(each, mask_T, pad)
      for each, mask_T in zip(maps, mask_BT, strict=True)
    ]

  def _image_map(self, image: Image.Image, number: int) -> TokenMap:
    pinpoints = [tuple(p) for p in self.model.config.image_grid_pinpoints]
    found = anyres.image_tokens(
      image.width, image.height, self.view, self.patch, pinpoints
    )
    found.token_T[:] = self.image_token
    found.image_T[:] = number
    return found

  # The residual stream.

  def residuals(
    self, inputs: dict[str, torch.Tensor], layers: Sequence[int]
  ) -> dict[int, torch.Tensor]:
    """The output of each layer [B, T, D]; nothing above the last is run."""
    found: dict[int, torch.Tensor] = {}
    last = max(layers)

    def hook(layer: int, module: nn.Module, args: Any, output: Any) -> None:
      del module, args
      found[layer] = output[0] if isinstance(output, tuple) else output
      if layer == last:
        raise _EnoughError

    with contextlib.ExitStack() as stack:
      for layer in layers:
        handle = self.layer(layer).register_forward_hook(
          functools.partial(hook, layer)
        )
        stack.callback(handle.remove)
      stack.enter_context(contextlib.suppress(_EnoughError))
      stack.enter_context(torch.no_grad())
      self.model.model(**inputs, use_cache=False)
    return found

  def rows(
    self, inputs: dict[str, torch.Tensor], layers: Sequence[int]
  ) -> list[dict[int, np.ndarray]]:
    """For each text {layer: bfloat16 [T, D]}, padding left out.

    Raises:
      ValueError: the residual stream overflows the model's dtype.
    """
    found = self.residuals(inputs, layers)
    mask_BT = inputs['attention_mask'].cpu().numpy().astype(bool)
    texts: list[dict[int, np.ndarray]] = [{} for _ in mask_BT]
    for layer, x_BTD in found.items():
      half = x_BTD.to(torch.bfloat16).cpu()
      for text, x_TD, mask_T in zip(texts, half, mask_BT, strict=True):
        kept = x_TD[torch.from_numpy(mask_T)]
        if not torch.isfinite(kept).all():
          raise ValueError(
            f'layer {layer} of {self.name} is not finite in {self.model.dtype}:'
            ' set lmm.dtype to bfloat16 or float32'
          )
        text[layer] = kept.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return texts
