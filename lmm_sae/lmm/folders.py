"""Folders that hold a LLaVA-NeXT: which one is meant, and is it the same.

No torch here: a stage may ask before it loads anything.
"""

import hashlib
import json
import os
import pathlib

from lmm_sae.core import host

PACKAGED = ('small', 'base')


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
  if config.get('model_type') != 'llava_next':
    raise ValueError(
      f'{folder} holds a {config.get("model_type")!r}, not a LLaVA-NeXT '
      '(llava_next): give a llava-hf LLaVA-NeXT folder'
    )
  return folder


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
