"""Folders that hold a model: which one is meant, and is it the same.

No torch here: a stage may ask before it loads anything.
"""

import hashlib
import json
import os
import pathlib

from lmm_sae.core import host

PACKAGED = ('small', 'base')
FAMILIES = {  # model_type: name, in the order of lmm/families.py
  'llava': 'LLaVA-1.5',
  'llava_next': 'LLaVA-NeXT',
  'llava_onevision': 'LLaVA-OneVision',
  'qwen2_5_vl': 'Qwen2.5-VL',
}


def resolve(path: str | os.PathLike) -> pathlib.Path:
  """The folder of a model; ValueError says what is wrong with it."""
  packaged = str(path) in PACKAGED
  folder = (
    host.weights() / path if packaged else pathlib.Path(path).expanduser()
  )
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
  kind = config.get('model_type')
  if kind not in FAMILIES:
    known = ', '.join(f'{name} ({key})' for key, name in FAMILIES.items())
    raise ValueError(
      f'{folder} holds a {kind!r}, none of {known}: give a folder of one of '
      'these, such as llava-hf/llama3-llava-next-8b-hf'
    )
  if not size(folder) and any(folder.glob('pytorch_model*.bin')):
    raise ValueError(
      f'{folder} has its weights as pickles alone, which may run code: write '
      'them anew as safetensors, with save_pretrained of transformers'
    )
  return folder


def check_served(folder: pathlib.Path) -> None:
  """Raises ValueError for a model that cannot be run in two halves.

  `lmm.forward` runs the layers above an edit by themselves, and leaves their
  positions to the decoder; Qwen's depend on where the image stood.
  """
  kind = json.loads((folder / 'config.json').read_text())['model_type']
  if kind == 'qwen2_5_vl':
    raise ValueError(
      f'{folder} holds a {FAMILIES[kind]}, which can be captured but not '
      'served: steer, attribute and evaluate in the loop need a LLaVA'
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


def size(folder: pathlib.Path) -> int:
  """Bytes of the weights."""
  return sum(file.stat().st_size for file in folder.glob('*.safetensors'))
