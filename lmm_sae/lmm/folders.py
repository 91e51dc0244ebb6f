"""Folders that hold a LLaVA-NeXT: which, whether whole, and what is inside."""

import hashlib
import json
import os
import pathlib

from torch import nn

WEIGHTS = pathlib.Path(__file__).parents[1] / 'scenes' / 'weights'
PACKAGED = ('small', 'base')

# Where decoder layers stand: transformers 5, then 4.5x, then the oldest.
LAYER_PATHS = (
  'model.language_model.layers',
  'model.language_model.model.layers',
  'language_model.model.layers',
  'language_model.layers',
)


def resolve(path: str | os.PathLike) -> pathlib.Path:
  """The folder of a model; ValueError says what is wrong with it."""
  packaged = str(path) in PACKAGED
  folder = WEIGHTS / path if packaged else pathlib.Path(path).expanduser()
  if not folder.is_dir():
    raise ValueError(
      f'the packaged model {path!r} is not at {folder}: make it with '
      f'`python -m lmm_sae.scenes.train --size={path}`'
      if packaged
      else f'lmm.path {str(path)!r} is no folder: give `small`, `base`, or a '
      'folder such as `hf download llava-hf/llama3-llava-next-8b-hf '
      '--local-dir DIR` makes'
    )
  try:
    config = json.loads((folder / 'config.json').read_text())
  except (OSError, json.JSONDecodeError) as error:
    raise ValueError(f'{folder} is no model folder: {error}') from error
  if config.get('model_type') != 'llava_next':
    raise ValueError(
      f'{folder} holds a {config.get("model_type")!r}, not a LLaVA-NeXT '
      '(llava_next): give a llava-hf LLaVA-NeXT folder'
    )
  return folder


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
  """(path, decoder layers) of a model of any version of transformers."""
  for path in LAYER_PATHS:
    try:
      return path, model.get_submodule(path)
    except AttributeError:
      continue
  raise ValueError(
    f'{type(model).__name__} has its decoder layers at none of {LAYER_PATHS}'
  )


def check_pixels(pixels, view: int) -> None:
  """The processor must make views of the size that the model wants."""
  size, crop = pixels.size, pixels.crop_size
  sides = {size.get('shortest_edge') or size.get('height'), crop.get('height')}
  if sides != {view}:
    raise ValueError(
      f'the image processor makes views of {sides} pixels, the model wants '
      f'{view}: mend processor_config.json'
    )


def fingerprint(folder: pathlib.Path) -> str:
  """Tells models apart: a digest of the settings and samples of the weights."""
  digest = hashlib.sha256()
  for file in sorted(folder.iterdir()):
    if file.suffix in ('.json', '.jinja', '.safetensors'):
      size = file.stat().st_size
      digest.update(f'{file.name} {size}\n'.encode())
      with file.open('rb') as data:
        for at in range(0, size, max(1 << 20, size // 16)):
          data.seek(at)
          digest.update(data.read(1 << 20))
  return digest.hexdigest()[:16]
