"""The two small LLaVA-NeXTs and their CLIP: configs, tokenizer, folders.

Both are the Hugging Face classes of the real model, only smaller, and load
with `from_pretrained` from a folder. A 128 px scene is one 64 px base view and
four 64 px AnyRes tiles: 64 + 256 + 16 newlines = 336 image tokens.
"""

import dataclasses
import pathlib
import re

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lmm_sae.core import prompts
from lmm_sae.scenes import questions, render

WEIGHTS = pathlib.Path(__file__).with_name('weights')
SPECIAL = ('<pad>', '<s>', '</s>', '<image>', '<|user|>', '<|assistant|>')
PAD, BOS, EOS, IMAGE, USER, ASSISTANT = range(len(SPECIAL))
VOCABULARY = 656
VIEW = 64  # pixels of the base view and of a tile
PATCH = 8
CELLS = VIEW // PATCH  # patches a side of a view
CHAT = (
  '{{ bos_token }}{% for message in messages %}'
  "{% if message['role'] == 'assistant' %}<|assistant|>"
  '{% else %}<|user|>{% endif %}'
  "{% if message['content'] is string %}{{ message['content'] }}"
  "{% else %}{% for part in message['content'] %}"
  "{% if part['type'] == 'text' %}{{ part['text'] }}"
  '{% else %}<image>{% endif %}{% endfor %}{% endif %}'
  "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
  '{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}'
)


@dataclasses.dataclass(frozen=True)
class Size:
  """Widths and depths of one of the two models."""

  vision_width: int
  vision_mlp: int
  vision_layers: int
  vision_heads: int
  width: int
  mlp: int
  layers: int
  heads: int
  kv_heads: int


SIZES = {
  'small': Size(128, 384, 5, 4, 192, 448, 6, 4, 2),
  'base': Size(128, 640, 6, 4, 192, 768, 8, 4, 2),
}


def corpus() -> list[str]:
  """Every word that is asked or answered, for the tokenizer."""
  rng = np.random.default_rng(0)
  lines = []
  for _ in range(3000):
    for turn in questions.scene_turns(render.sample(rng), rng):
      lines += [turn.question, turn.answer, ' ' + turn.answer]
  for i in range(3000):
    type_ = ('refine', 'category', 'common text')[i % 3]
    turn = questions.text_turn(rng, type_)
    lines += [turn.question, turn.answer]
  for count in range(1, 6):
    lines += [questions.explain_turn(count, '').question] * 50
    lines += [questions.intruder_turn(count, 'red', 0).question] * 50
    lines += [questions.which_turn('red', 0).question] * 50
  lines += [prompts.load('visible')] * 50
  lines += [prompts.fill('picture', n=n) for n in range(1, 6)] * 50
  lines += [f'{prompts.MARKER} {prompts.NONE} nothing background'] * 200
  return lines


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
  """Byte-level BPE of the corpus; any UTF-8 text has tokens."""
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = decoders.ByteLevel()
  bpe.train_from_iterator(
    corpus(),
    trainers.BpeTrainer(
      vocab_size=VOCABULARY,
      special_tokens=list(SPECIAL),
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=bpe,
    pad_token='<pad>',
    bos_token='<s>',
    eos_token='</s>',
    padding_side='left',
    extra_special_tokens={'image_token': '<image>'},
    model_max_length=4096,
  )
  tokenizer.chat_template = CHAT
  return tokenizer


def make_processor(tokenizer) -> transformers.LlavaNextProcessor:
  from transformers.models.llava_next import image_processing_pil_llava_next

  pixels = image_processing_pil_llava_next.LlavaNextImageProcessorPil(
    size={'shortest_edge': VIEW},
    crop_size={'height': VIEW, 'width': VIEW},
    image_grid_pinpoints=pinpoints(),
    image_mean=[0.5] * 3,
    image_std=[0.25] * 3,
  )
  return transformers.LlavaNextProcessor(
    image_processor=pixels,
    tokenizer=tokenizer,
    patch_size=PATCH,
    vision_feature_select_strategy='default',
    num_additional_image_tokens=1,
    chat_template=CHAT,
  )


def pinpoints() -> list[list[int]]:
  return [[VIEW * i, VIEW * j] for i in (1, 2) for j in (1, 2)]


def vision_config(size: Size) -> transformers.CLIPVisionConfig:
  return transformers.CLIPVisionConfig(
    hidden_size=size.vision_width,
    intermediate_size=size.vision_mlp,
    num_hidden_layers=size.vision_layers,
    num_attention_heads=size.vision_heads,
    image_size=VIEW,
    patch_size=PATCH,
    projection_dim=size.vision_width,
  )


def make_model(name: str) -> transformers.LlavaNextForConditionalGeneration:
  """The model of that size with Hugging Face's random weights.

  Seed torch before.
  """
  size = SIZES[name]
  text = transformers.LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=size.width,
    intermediate_size=size.mlp,
    num_hidden_layers=size.layers,
    num_attention_heads=size.heads,
    num_key_value_heads=size.kv_heads,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
  )
  config = transformers.LlavaNextConfig(
    vision_config=vision_config(size).to_dict(),
    text_config=text.to_dict(),
    image_token_index=IMAGE,
    image_grid_pinpoints=pinpoints(),
    image_seq_length=CELLS**2,
    vision_feature_layer=-2,
    vision_feature_select_strategy='default',
    tie_word_embeddings=True,
  )
  config.architectures = ['LlavaNextForConditionalGeneration']
  config._attn_implementation = 'eager'
  model = transformers.LlavaNextForConditionalGeneration(config)
  model.generation_config = transformers.GenerationConfig(
    bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=64
  )
  return model


def grow(parent):
  """A `base` that computes exactly what its `small` parent does.

  New layers have zero output projections and new MLP units zero outgoing
  weights, so that training goes on from the parent's function (Net2Net, Chen
  et al. 2016, arXiv 1511.05641). Seed torch before.
  """
  child = make_model('base')
  source = parent.state_dict()
  grown = {}
  for name, tensor in child.state_dict().items():
    origin, new = _origin(name)
    if new and name.endswith(_OUTPUTS):
      grown[name] = torch.zeros_like(tensor)
      continue
    old = source[origin]
    if old.shape == tensor.shape:
      grown[name] = old.clone()
      continue
    wide = torch.randn_like(tensor) * old.std()
    if name.endswith(_OUTPUTS):
      wide.zero_()
    wide[tuple(slice(0, n) for n in old.shape)] = old
    grown[name] = wide
  child.load_state_dict(grown)
  return child


_OUTPUTS = (
  'o_proj.weight',
  'down_proj.weight',
  'out_proj.weight',
  'out_proj.bias',
  'fc2.weight',
  'fc2.bias',
)


def _origin(name: str) -> tuple[str, bool]:
  """The parent's name of a child's parameter, and whether its layer is new.

  One ViT layer is added below the last (which the LMM does not read), and one
  decoder layer after every third.
  """
  match = re.match(r'(.*\.layers\.)(\d+)(\..*)', name)
  if not match:
    return name, False
  head, number, tail = match[1], int(match[2]), match[3]
  parents = (0, 1, 2, 3, 3, 4) if 'vision' in name else (0, 1, 2, 2, 3, 4, 5, 5)
  new = number > 0 and parents[number] == parents[number - 1]
  return f'{head}{parents[number]}{tail}', new


def save(model, processor, folder: pathlib.Path) -> None:
  """Writes the folder that `from_pretrained` reads, weights in float16."""
  folder.mkdir(parents=True, exist_ok=True)
  half = {k: v.to(torch.float16) for k, v in model.state_dict().items()}
  model.save_pretrained(folder, state_dict=half)
  processor.save_pretrained(folder)
