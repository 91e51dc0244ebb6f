"""A LLaVA-NeXT of random weights at 336 px, and pictures for it to look at.

It has the views, patches, tiles and token counts of the published models, with
narrower matrices, and the tokenizer and chat template of the packaged model.
"""

import json
import pathlib
import shutil

import numpy as np
import torch
import transformers
from PIL import Image

from lmm_sae.core import host

VIEW, PATCH = 336, 14
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIZES = ((640, 480), (500, 375), (480, 640), (1024, 683), (336, 336))
COPIED = ('chat_template.jinja', 'tokenizer.json', 'tokenizer_config.json')


def make(
  folder: pathlib.Path,
  width: int,
  layers: int,
  view: int = VIEW,
  tokens: int = 0,
) -> pathlib.Path:
  """Writes the model: D = width, of `layers` decoder layers.

  Args:
    tokens: of its vocabulary, most of which no text has; 0: the tokenizer's.
  """
  source = host.weights() / 'small'
  folder.mkdir(parents=True)
  for name in COPIED:
    shutil.copy(source / name, folder / name)
  settings = json.loads((source / 'processor_config.json').read_text())
  pinpoints = [[view * side // VIEW for side in pair] for pair in PINPOINTS]
  settings['patch_size'] = PATCH
  settings['image_processor'] |= {
    'crop_size': {'height': view, 'width': view},
    'size': {'shortest_edge': view},
    'image_grid_pinpoints': pinpoints,
  }
  (folder / 'processor_config.json').write_text(json.dumps(settings))
  packaged = transformers.AutoConfig.from_pretrained(source)
  text = transformers.LlamaConfig(
    vocab_size=tokens or packaged.text_config.vocab_size,
    hidden_size=width,
    intermediate_size=width * 7 // 2,
    num_hidden_layers=layers,
    num_attention_heads=max(1, width // 64),
    num_key_value_heads=max(1, width // 256),
    max_position_embeddings=8192,
    bos_token_id=packaged.text_config.bos_token_id,
    eos_token_id=packaged.text_config.eos_token_id,
    pad_token_id=packaged.text_config.pad_token_id,
  )
  vision = transformers.CLIPVisionConfig(
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=12,
    num_attention_heads=4,
    image_size=view,
    patch_size=PATCH,
  )
  config = transformers.LlavaNextConfig(
    vision_config=vision.to_dict(),
    text_config=text.to_dict(),
    image_token_index=packaged.image_token_id,
    image_grid_pinpoints=pinpoints,
    image_seq_length=(view // PATCH) ** 2,
    vision_feature_layer=-2,
    vision_feature_select_strategy='default',
    tie_word_embeddings=False,
  )
  with torch.random.fork_rng():
    torch.manual_seed(0)
    model = transformers.LlavaNextForConditionalGeneration(config)
  model.save_pretrained(folder)
  return folder


def pictures(
  folder: pathlib.Path, count: int, rows: int, scale: float = 1.0
) -> pathlib.Path:
  """Writes JPEGs and a LLaVA-format JSON of `rows` rows that show them.

  The pictures are noise whose power falls with frequency, as that of
  photographs does, at the sizes of photographs.

  Returns:
    The JSON.
  """
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  for at in range(count):
    wide, high = (round(side * scale) for side in SIZES[at % len(SIZES)])
    Image.fromarray(_photograph(rng, wide, high)).save(
      folder / f'{at}.jpg', quality=90
    )
  words = 'what colour is the thing in the middle of this picture'
  words = [*words.split(), '?']
  found = []
  for row in range(rows):
    asked = ' '.join(rng.choice(words, 8 + row % 40))
    answered = ' '.join(rng.choice(words, 20 + row % 90))
    turns = [
      {'from': 'human', 'value': f'<image>\n{asked}'},
      {'from': 'gpt', 'value': answered},
    ]
    image = f'{row % count}.jpg'
    found.append({'id': str(row), 'image': image, 'conversations': turns})
  file = folder / 'data.json'
  file.write_text(json.dumps(found))
  return file


def _photograph(rng: np.random.Generator, wide: int, high: int) -> np.ndarray:
  """uint8 [H, W, 3]."""
  spectrum = np.fft.rfft2(rng.normal(size=(high, wide, 3)), axes=(0, 1))
  tall = np.fft.fftfreq(high)[:, None, None]
  flat = np.fft.rfftfreq(wide)[None, :, None]
  spectrum /= np.maximum(np.hypot(tall, flat), 1 / max(wide, high))
  image = np.fft.irfft2(spectrum, s=(high, wide), axes=(0, 1))
  image = (image - image.min()) / np.ptp(image)
  return (255 * image).astype(np.uint8)
