"""Models of random weights in folders, unlike the packaged ones.

`make` writes a LLaVA-NeXT:

28 px views of 4 x 4 patches, 3 decoder layers of width 24, the chat format of
llama3-llava-next: headers, images first, BOS added by the tokenizer and not by
the template; `family` any of FAMILIES. For tests:

  path = tiny_llava.make(tmp_path / 'model')
  path = tiny_llava.family(tmp_path / 'model', 'qwen2_5_vl')
"""

import json
import pathlib

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

VIEW = 28
PATCH = 7
WIDTH = 24
LAYERS = 3
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
SPECIAL = ('<|bos|>', '<|eot|>', '<|start|>', '<|end|>', '<|pad|>', '<image>')
QWEN_IMAGE = '<|vision_start|><|image_pad|><|vision_end|>'
QWEN = ('<|image_pad|>', '<|video_pad|>', '<|vision_start|>', '<|vision_end|>')
CHAT = (
  '{% for message in messages %}'
  "{{ '<|start|>' + message['role'] + '<|end|>\n\n' }}"
  "{% for part in message['content'] | selectattr('type', 'equalto', 'image') "
  '%}'
  "{{ '<image>\n' }}{% endfor %}"
  "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
  "{{ part['text'] | trim + '<|eot|>' }}{% endfor %}"
  '{% endfor %}'
  '{% if add_generation_prompt %}'
  "{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
WORDS = (
  'user assistant what is this picture a red cat sits on the blue mat and '
  'looks at you how does the face feel happy sad angry surprised yes no one '
  'two three which colour has it describe where left right top bottom ? . , !'
)


def make(
  folder: str | pathlib.Path,
  seed: int = 0,
  layers: int = LAYERS,
  chat: str = CHAT,
) -> pathlib.Path:
  """Writes model, tokenizer and processor; the same seed, the same bytes."""
  folder = pathlib.Path(folder)
  tokenizer = _tokenizer(chat)
  _model(tokenizer, seed, layers).save_pretrained(folder)
  transformers.LlavaNextProcessor(
    image_processor=pixels(
      'LlavaNextImageProcessor',
      size={'shortest_edge': VIEW},
      crop_size={'height': VIEW, 'width': VIEW},
      image_grid_pinpoints=PINPOINTS,
    ),
    tokenizer=tokenizer,
    patch_size=PATCH,
    vision_feature_select_strategy='default',
    num_additional_image_tokens=1,
    chat_template=chat,
  ).save_pretrained(folder)
  return folder


def pixels(name: str, **settings):
  """The image processor of PIL, as this version of transformers calls it."""
  pil = f'{name}Pil' if hasattr(transformers, f'{name}Pil') else name
  return getattr(transformers, pil)(**settings)


def processor(folder: str | pathlib.Path):
  """The whole processor of a folder that has one, its images made by PIL."""
  new = hasattr(transformers, 'LlavaNextImageProcessorPil')
  how = {'backend': 'pil'} if new else {'use_fast': False}
  return transformers.AutoProcessor.from_pretrained(folder, **how)


def family(
  folder: str | pathlib.Path, name: str, seed: int = 0, chat: str = CHAT
) -> pathlib.Path:
  """Writes a model of one of FAMILIES, in files as they are on the hub."""
  folder = pathlib.Path(folder)
  if name == 'qwen2_5_vl':
    chat = chat.replace('<image>', QWEN_IMAGE)
  tokenizer = _tokenizer(chat, QWEN)
  kind, made, processor = FAMILIES[name]
  with torch.random.fork_rng():
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(made(tokenizer))
  model.save_pretrained(folder)
  tokenizer.save_pretrained(folder)
  (folder / 'chat_template.jinja').write_text(chat)
  settings = dict(processor)
  settings['image_processor_type'] = settings.pop('name')
  (folder / 'preprocessor_config.json').write_text(json.dumps(settings))
  return folder


# A view of 30 pixels has 4 patches of 7 a side, and 2 pixels that none sees.
SIGLIP_VIEW = 30
POOLED = [[30 * h, 30 * w] for h in (1, 2, 3) for w in (1, 2, 3)]
CELL = 14  # of Qwen: two patches of 7


def _text(config: type, tokenizer, **fields):
  return config(
    **{
      'vocab_size': len(tokenizer),
      'hidden_size': WIDTH,
      'intermediate_size': 40,
      'num_hidden_layers': LAYERS,
      'num_attention_heads': 4,
      'num_key_value_heads': 2,
      'max_position_embeddings': 2048,
      'initializer_range': 0.3,
      'bos_token_id': tokenizer.bos_token_id,
      'eos_token_id': tokenizer.eos_token_id,
      'pad_token_id': tokenizer.pad_token_id,
      **fields,
    }
  ).to_dict()


def _vision(config: type, view: int, spread: float = 0.3, **fields):
  return config(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=view,
    patch_size=PATCH,
    initializer_range=spread,
    **fields,
  ).to_dict()


def _llava(tokenizer):
  return transformers.LlavaConfig(
    vision_config=_vision(transformers.CLIPVisionConfig, VIEW),
    text_config=_text(transformers.LlamaConfig, tokenizer),
    image_token_index=tokenizer.convert_tokens_to_ids('<image>'),
    image_seq_length=(VIEW // PATCH) ** 2,
  )


def _interleave(tokenizer):
  return transformers.LlavaConfig(
    vision_config=_vision(transformers.SiglipVisionConfig, SIGLIP_VIEW),
    text_config=_text(transformers.Qwen2Config, tokenizer),
    image_token_index=tokenizer.convert_tokens_to_ids('<image>'),
    image_seq_length=(SIGLIP_VIEW // PATCH) ** 2,
    vision_feature_layer=-1,
    vision_feature_select_strategy='full',
  )


def _onevision(tokenizer):
  return transformers.LlavaOnevisionConfig(
    vision_config=_vision(
      transformers.SiglipVisionConfig, SIGLIP_VIEW, vision_use_head=False
    ),
    text_config=_text(transformers.Qwen2Config, tokenizer),
    image_token_index=tokenizer.convert_tokens_to_ids('<image>'),
    image_grid_pinpoints=POOLED,
    vision_feature_layer=-1,
    vision_feature_select_strategy='full',
    vision_aspect_ratio='anyres_max_2',
  )


def _qwen(tokenizer):
  token = tokenizer.convert_tokens_to_ids
  return transformers.Qwen2_5_VLConfig(
    vision_config={
      'depth': 2,
      'hidden_size': 16,
      'intermediate_size': 32,
      'num_heads': 2,
      'out_hidden_size': WIDTH,
      'patch_size': PATCH,
      'window_size': 2 * CELL,
      'fullatt_block_indexes': [1],
      'initializer_range': 0.3,
    },
    text_config=_text(
      transformers.Qwen2_5_VLConfig.sub_configs['text_config'],
      tokenizer,
      num_attention_heads=2,
      rope_theta=10_000.0,
      rope_scaling={'type': 'mrope', 'mrope_section': [2, 2, 2]},
    ),
    image_token_id=token('<|image_pad|>'),
    video_token_id=token('<|video_pad|>'),
    vision_start_token_id=token('<|vision_start|>'),
    vision_end_token_id=token('<|vision_end|>'),
  )


# The model's class, its config, and the image processor's settings.
FAMILIES = {
  'llava': (
    'LlavaForConditionalGeneration',
    _llava,
    {
      'name': 'CLIPImageProcessor',
      'size': {'shortest_edge': VIEW},
      'crop_size': {'height': VIEW, 'width': VIEW},
    },
  ),
  'llava_padded': (
    'LlavaForConditionalGeneration',
    _llava,
    {
      'name': 'LlavaImageProcessor',
      'do_pad': True,
      'size': {'shortest_edge': VIEW},
      'crop_size': {'height': VIEW, 'width': VIEW},
    },
  ),
  'llava_interleave': (
    'LlavaForConditionalGeneration',
    _interleave,
    {
      'name': 'SiglipImageProcessor',
      'size': {'height': SIGLIP_VIEW, 'width': SIGLIP_VIEW},
    },
  ),
  'llava_next': (
    'LlavaNextForConditionalGeneration',
    lambda tokenizer: _config(tokenizer, LAYERS, 0.3),
    {
      'name': 'LlavaNextImageProcessor',
      'size': {'shortest_edge': VIEW},
      'crop_size': {'height': VIEW, 'width': VIEW},
      'image_grid_pinpoints': PINPOINTS,
    },
  ),
  'llava_onevision': (
    'LlavaOnevisionForConditionalGeneration',
    _onevision,
    {
      'name': 'LlavaOnevisionImageProcessor',
      'size': {'height': SIGLIP_VIEW, 'width': SIGLIP_VIEW},
      'image_grid_pinpoints': POOLED,
    },
  ),
  'qwen2_5_vl': (
    'Qwen2_5_VLForConditionalGeneration',
    _qwen,
    {
      'name': 'Qwen2VLImageProcessor',
      'patch_size': PATCH,
      'merge_size': 2,
      'min_pixels': 4 * CELL**2,
      'max_pixels': 30 * CELL**2,
    },
  ),
}


def _tokenizer(chat: str, more=()) -> transformers.PreTrainedTokenizerFast:
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=[*SPECIAL, *more],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  bpe.train_from_iterator([WORDS] * 3, trainer)
  bpe.post_processor = processors.TemplateProcessing(
    single='<|bos|> $A', special_tokens=[('<|bos|>', 0)]
  )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=bpe,
    bos_token='<|bos|>',
    eos_token='<|eot|>',
    pad_token='<|pad|>',
    padding_side='left',
    extra_special_tokens={'image_token': '<image>'},
  )
  tokenizer.chat_template = chat
  return tokenizer


def _config(tokenizer, layers: int, spread: float = 0.02):
  return transformers.LlavaNextConfig(
    vision_config=_vision(transformers.CLIPVisionConfig, VIEW, spread),
    text_config=_text(
      transformers.LlamaConfig, tokenizer, num_hidden_layers=layers
    ),
    image_token_index=tokenizer.convert_tokens_to_ids('<image>'),
    image_grid_pinpoints=PINPOINTS,
    image_seq_length=(VIEW // PATCH) ** 2,
    vision_feature_layer=-2,
    vision_feature_select_strategy='default',
    tie_word_embeddings=False,
  )


def _model(tokenizer, seed: int, layers: int):
  config = _config(tokenizer, layers)
  with torch.random.fork_rng():
    torch.manual_seed(seed)
    model = transformers.LlavaNextForConditionalGeneration(config)
  model.generation_config = transformers.GenerationConfig(
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
    max_new_tokens=16,
  )
  return model.eval()
