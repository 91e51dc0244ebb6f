"""A LLaVA-NeXT of random weights in a folder, unlike the packaged ones.

28 px views of 4 x 4 patches, 3 decoder layers of width 24, the chat format of
llama3-llava-next: headers, images first, BOS added by the tokenizer and not by
the template. For tests:

  path = tiny_llava.make(tmp_path / 'model')
"""

import pathlib

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers.models.llava_next import image_processing_pil_llava_next

VIEW = 28
PATCH = 7
WIDTH = 24
LAYERS = 3
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
SPECIAL = ('<|bos|>', '<|eot|>', '<|start|>', '<|end|>', '<|pad|>', '<image>')
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
    image_processor=image_processing_pil_llava_next.LlavaNextImageProcessorPil(
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


def _tokenizer(chat: str) -> transformers.PreTrainedTokenizerFast:
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=list(SPECIAL),
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


def _model(tokenizer, seed: int, layers: int):
  text = transformers.LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=WIDTH,
    intermediate_size=40,
    num_hidden_layers=layers,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    initializer_range=0.3,
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
  )
  vision = transformers.CLIPVisionConfig(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=VIEW,
    patch_size=PATCH,
  )
  config = transformers.LlavaNextConfig(
    vision_config=vision.to_dict(),
    text_config=text.to_dict(),
    image_token_index=tokenizer.convert_tokens_to_ids('<image>'),
    image_grid_pinpoints=PINPOINTS,
    image_seq_length=(VIEW // PATCH) ** 2,
    vision_feature_layer=-2,
    vision_feature_select_strategy='default',
    tie_word_embeddings=False,
  )
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
