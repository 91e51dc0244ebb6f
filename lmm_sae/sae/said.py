"""What settings and a workdir say of an SAE, whoever wrote them."""

import pathlib
from typing import Any

from lmm_sae.core import evaluation
from lmm_sae.sae import stored

# What ours, sparsify, SAELens and dictionary_learning call a setting.
_SETTINGS = {
  'layer': ('layer',),
  'width': ('width', 'd_in', 'activation_dim'),
  'latents': ('latents', 'num_latents', 'd_sae', 'dict_size'),
  'k': ('mean_k', 'k'),
  'activation': ('activation', 'architecture', 'dict_class'),
  'dead_after': ('dead_after',),
}


def sae(settings: dict[str, Any]) -> dict[str, Any]:
  """{layer, width, latents, k, activation, dead_after}: what settings say."""
  for section in ('sae', 'trainer'):
    if isinstance(settings.get(section), dict):
      settings = settings[section]
  said = {
    name: [settings[key] for key in keys if settings.get(key) is not None]
    for name, keys in _SETTINGS.items()
  }
  return {name: values[0] for name, values in said.items() if values}


def around(path: pathlib.Path) -> tuple[pathlib.Path | None, str]:
  """(workdir, layer) that a checkpoint or an export lies in; (None, '')."""
  for folder in (path, *path.parents):
    if folder.parent.name == 'sae' and folder.name.isdigit():
      return folder.parents[1], folder.name
  return None, ''


def measured(path: pathlib.Path) -> dict[str, Any]:
  """What the evaluation of its workdir says of an SAE over all rows; or {}."""
  root, layer = around(path)
  if root is None or not (root / evaluation.FILE).is_file():
    return {}
  value = stored.read_json(root / evaluation.FILE)
  for key in (layer, 'all'):
    value = value.get(key) if isinstance(value, dict) else None
  return value if isinstance(value, dict) else {}


def number(value: Any = None) -> float | None:
  return float(value) if isinstance(value, int | float) else None
