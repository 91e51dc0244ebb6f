"""A tiny model and odd data that the tests of capture run on."""

import hashlib
import json
import pathlib

import numpy as np
from PIL import Image

from experiments import base
from lmm_sae.core.sources import SPLITS
from lmm_sae.core.store import ActivationStore

LAYERS = (0, 2)
ROWS = 23
BAD = (4, 11, 12)  # torn image, no conversation, role unknown


def make_data(folder: pathlib.Path, count: int = ROWS) -> pathlib.Path:
  """A LLaVA-format file of odd images, texts without image and bad rows."""
  rng = np.random.default_rng(3)
  rows = []
  for at in range(count):
    width, height = (int(n) for n in rng.integers(20, 140, 2))
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f'{at}.png')
    value = ('<image>\nwhat is this?', 'where?\n<image>')[at % 2]
    row = {
      'id': f'id{at}',
      'image': f'{at}.png',
      'conversations': [
        {'from': 'human', 'value': value},
        {'from': 'gpt', 'value': 'a red cat ' * int(rng.integers(1, 5))},
      ],
    }
    if at % 7 == 6:
      del row['image']
      row['conversations'][0]['value'] = 'how does it feel?'
    rows.append(row)
  (folder / f'{BAD[0]}.png').write_bytes(b'torn')
  rows[BAD[1]]['conversations'] = []
  rows[BAD[2]]['conversations'][0]['from'] = 'narrator'
  path = folder / 'data.json'
  path.write_text(json.dumps(rows))
  return path


def config_of(model_folder, data):
  """Eight groups or so, in sample order."""
  config = base.get_config()
  config.lmm.path = str(model_folder)
  config.lmm.layers = LAYERS
  config.lmm.threads = 1
  config.data.source = 'llava'
  config.data.path = str(data)
  config.data.heldout = 0.4
  config.capture.batch = 3
  config.capture.group = 5
  config.capture.mix = False
  config.capture.max_tokens = 300
  config.capture.shard_rows = 256
  config.capture.chunk_rows = 32
  return config


def stores(workdir):
  return {name: ActivationStore.open(workdir.acts(name)) for name in SPLITS}


def digest(workdir):
  """The content of every file."""
  return {
    str(file.relative_to(workdir.root)): hashlib.sha256(
      file.read_bytes()
    ).hexdigest()
    for file in sorted(workdir.root.rglob('*'))
    if file.is_file()
  }
