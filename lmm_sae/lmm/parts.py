"""What a subject is made of, whatever the version of transformers."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn

VERSION = int(transformers.__version__.partition('.')[0])

# Where decoder layers stand: transformers 5, then 4.5x, then the oldest.
LAYER_PATHS = (
  'model.language_model.layers',
  'model.language_model.model.layers',
  'language_model.model.layers',
  'language_model.layers',
)
VISION_PATHS = (
  'model.vision_tower.encoder.layers',
  'model.vision_tower.vision_model.encoder.layers',
  'vision_tower.vision_model.encoder.layers',
)


def find_layers(
  model: nn.Module, paths: Sequence[str] = LAYER_PATHS
) -> tuple[str, nn.ModuleList]:
  """(path, layers) of a model of any version of transformers."""
  for path in paths:
    try:
      return path, model.get_submodule(path)
    except AttributeError:
      continue
  raise ValueError(f'{type(model).__name__} has its layers at none of {paths}')


def skip_unread(model: nn.Module) -> None:
  """Lets the image encoder's layers above the one that is read do nothing.

  LLaVA reads the output of the last layer but one: a fifth of the packaged
  encoder, a twenty-fourth of CLIP-L, is work that nobody looks at.
  """
  if VERSION < 5:  # some of whose layers return tuples
    return
  if not hasattr(model.config, 'vision_feature_layer'):  # Qwen's reads all
    return
  _, layers = find_layers(model, VISION_PATHS)
  states = len(layers) + 1  # hidden_states: the embeddings, then each layer
  read = model.config.vision_feature_layer
  read = [read] if isinstance(read, int) else read
  for layer in layers[max(at % states for at in read) :]:
    layer.forward = _pass_on


def _pass_on(x_BTD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
  del args, kwargs
  return x_BTD


def device(model: nn.Module) -> torch.device:
  """Where the model's inputs must be."""
  embeddings = model.get_input_embeddings()
  if embeddings.weight.device.type == 'meta':  # offloaded by accelerate
    return torch.device(embeddings._hf_hook.execution_device)
  return embeddings.weight.device
