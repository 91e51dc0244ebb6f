"""The subject: a multimodal model, its typed tokens, its residual stream.

  subject = llava.Subject.load('small')
  prompt = subject.chat('what is this?', 1)
  inputs = subject.inputs([prompt], [[image]])
  (tokens,) = subject.token_maps([prompt], [[image]], inputs)
  x_BTD = subject.residuals(inputs, (2,))[2]

`small` and `base` are packaged; any other path is a folder of the hub's layout
with a model of one of `families.FAMILIES`.
"""

import contextlib
import dataclasses
import functools
import inspect
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn

from lmm_sae.core import host, tokens
from lmm_sae.core.tokens import Kind, TokenMap
from lmm_sae.lmm import folders, loading, parts
from lmm_sae.lmm import prompt as prompts
from lmm_sae.lmm.families import Family, Images
from lmm_sae.lmm.prompt import Prompt, Template, Turns

MAPS = 256  # token maps kept: of equal sizes, images have the same


class _EnoughError(Exception):
  """The last hooked layer has run: nothing above it is needed."""


class Subject:
  """A frozen multimodal model; make it with `load`.

  Attributes:
    name: of the packaged model, or of the folder.
    model, tokenizer: of transformers. pixels: its image processor, of PIL.
    family, template: what is particular to it, and how it is spoken to.
    width: D. num_layers: decoder layers.
    grid: (rows, cols) of the base view; (0, 0) where it depends on the image.
    max_tokens: the longest text the model reads, image tokens counted.
    device: of the model's inputs.
  """

  def __init__(
    self,
    name: str,
    folder: pathlib.Path,
    model: transformers.PreTrainedModel,
    family: Family,
    template: Template,
  ):
    self.name = name
    self.folder = folder
    self.model = model.eval().requires_grad_(False)
    self.family, self.template = family, template
    self.tokenizer, self.pixels = template.tokenizer, family.pixels
    self.device = parts.device(model)
    text = model.config.get_text_config()
    self.width, self.max_tokens = text.hidden_size, text.max_position_embeddings
    self._path, self._layers = parts.find_layers(model)
    self.num_layers = len(self._layers)
    self.grid = family.grid
    self.image_token = model.config.image_token_id
    self._around = self.tokenizer.convert_tokens_to_ids(
      [token for token in family.around if token]
    )
    self._map = functools.lru_cache(MAPS)(family.tokens)
    # Since transformers 5 Qwen's positions are made from the tokens' types.
    self._typed = (
      'mm_token_type_ids'
      in inspect.signature(type(model.model).forward).parameters
    )
    parts.skip_unread(model)

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
      dtype: float32, bfloat16, float16, or int8: weights of 8 bits.
      threads: CPU threads of this process; 0: one a core.

    Raises:
      ValueError: there is no such model, it is of no known family, it is
        broken, or this machine lacks what it needs.
    """
    folder = folders.resolve(path)
    torch.set_num_threads(threads or host.cores())
    model, family, template = loading.load(folder, device, dtype)
    name = str(path) if str(path) in folders.PACKAGED else folder.name
    return cls(name, folder, model, family, template)

  @property
  def dtype(self) -> torch.dtype:
    """Of the residual stream and of the pixels."""
    return self.model.get_input_embeddings().weight.dtype

  @property
  def image_backend(self) -> str:
    """Class of the image processor: what made the pixels."""
    return type(self.pixels).__name__

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
    return prompts.render(self.template, turns, int(has_image), generate)

  def raw(self, turns: Turns, images: int = 0) -> Prompt:
    """The turns alone, a line each, without template; see `prompt.raw`."""
    return prompts.raw(self.template, turns, images)

  def bare(self, text: str = prompts.IMAGE) -> Prompt:
    """Text without chat template; the plain `<image>` is the paper's."""
    return prompts.bare(self.template, text)

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
    kind_T[np.isin(token_T, self._around)] = Kind.TEMPLATE
    at = np.flatnonzero(token_T == self.image_token)
    if len(at) != len(images):
      raise ValueError(
        f'a text has {len(at)} image placeholders for {len(images)} images'
      )
    pieces, start, grid = [], 0, (0, 0)
    for number, (stop, image) in enumerate(zip(at, images, strict=True)):
      pieces.append(tokens.text_map(token_T[start:stop], kind_T[start:stop]))
      seen = self._map(image.width, image.height, len(images) == 1)
      count, start = len(seen.kind_T), stop + 1
      pieces.append(
        dataclasses.replace(
          seen,
          token_T=np.full(count, self.image_token, np.int32),
          image_T=np.full(count, number, np.int16),
        )
      )
      grid = grid if number else seen.grid
    pieces.append(tokens.text_map(token_T[start:], kind_T[start:]))
    return tokens.concatenate(pieces, grid)

  def batch(
    self, maps: Sequence[TokenMap], images: Images, padding_side: str = 'right'
  ) -> dict[str, torch.Tensor]:
    """What `encode` made of several texts, as the model's arguments.

    Returns:
      input_ids, attention_mask and, where there are images, what the family
      makes of them, such as pixel_values and image_sizes.
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
    if any(images):
      batch |= self.family.inputs(images)
      batch['pixel_values'] = batch['pixel_values'].to(self.dtype)
      if self._typed:
        is_image_BT = batch['input_ids'] == self.image_token
        batch['mm_token_type_ids'] = is_image_BT.to(torch.int32)
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
    self,
    inputs: dict[str, torch.Tensor],
    layers: Sequence[int],
    keep: Sequence[np.ndarray] | None = None,
  ) -> list[dict[int, np.ndarray]]:
    """For each text {layer: bfloat16 [T, D]}, padding left out.

    Args:
      keep: for each text the positions, int64, whose rows are wanted, counted
        from its first token; they are picked before anything leaves the device.

    Raises:
      ValueError: the residual stream overflows the model's dtype, or `keep`
        names positions that are not there.
    """
    mask_BT = inputs['attention_mask'].cpu().numpy().astype(bool)
    places, counts = _places(mask_BT, keep)
    if _ends_padded(mask_BT):
      inputs = {n: x for n, x in inputs.items() if n != 'attention_mask'}
    found = self.residuals(inputs, layers)
    texts: list[dict[int, np.ndarray]] = [{} for _ in mask_BT]
    stops = np.cumsum(counts)
    for layer, x_BTD in found.items():
      index = torch.from_numpy(places).to(x_BTD.device)
      half_ND = x_BTD.flatten(0, 1)[index].to(torch.bfloat16)
      if not torch.isfinite(half_ND).all():
        raise ValueError(
          f'layer {layer} of {self.name} is not finite in {self.dtype}: set '
          'lmm.dtype to bfloat16 or float32'
        )
      rows_ND = half_ND.cpu().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
      for text, stop, count in zip(texts, stops, counts, strict=True):
        text[layer] = rows_ND[stop - count : stop]
    return texts


def _ends_padded(mask_BT: np.ndarray) -> bool:
  """Whether padding stands at the ends alone, where no token sees it.

  Attention is causal in every family, and without a mask it takes the faster
  kernels.
  """
  return bool((mask_BT[:, :-1] >= mask_BT[:, 1:]).all())


def _places(
  mask_BT: np.ndarray, keep: Sequence[np.ndarray] | None
) -> tuple[np.ndarray, list[int]]:
  """The wanted rows among B x T, text after text, and how many of each."""
  places = []
  for row, mask_T in enumerate(mask_BT):
    own = row * len(mask_T) + np.flatnonzero(mask_T)
    if keep is not None:
      wanted = np.asarray(keep[row], np.int64)
      if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(own):
        raise ValueError(
          f'keep of text {row} has positions {wanted.min()} to '
          f'{wanted.max()}, but the text has {len(own)} tokens'
        )
      own = own[wanted]
    places.append(own)
  return np.concatenate(places), [len(own) for own in places]
