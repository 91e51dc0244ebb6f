"""Models, tokenizers and image processors from a folder of the hub's layout.

Works with transformers 4.57 and 5: where these differ in a name, both are
here. Nothing is fetched, no code of the folder is run, and torchvision is never
needed.
"""

import importlib.util
import json
import logging
import pathlib
from typing import Any

import safetensors
import torch
import transformers

from lmm_sae.lmm.families import FAMILIES, Family
from lmm_sae.lmm.parts import VERSION
from lmm_sae.lmm.prompt import Template

DTYPES = ('float32', 'bfloat16', 'float16', 'int8')

# What stays in bfloat16 where the decoder's weights have 8 bits.
_WHOLE = ('lm_head', 'model.vision_tower', 'model.visual')
_WHOLE += ('model.multi_modal_projector',)

# What transformers raises for folders that lack a file or hold a broken one.
_ERRORS = (
  OSError,
  RuntimeError,
  KeyError,
  TypeError,
  AttributeError,
  ImportError,
  ValueError,
  safetensors.SafetensorError,
)


def load(
  folder: pathlib.Path, device: str, dtype: str
) -> tuple[transformers.PreTrainedModel, Family, Template]:
  """The model of a folder, its family and its template.

  Raises:
    ValueError: the folder lacks something, or this machine does.
  """
  _check(device, dtype)
  transformers.utils.logging.disable_progress_bar()
  try:
    config = transformers.AutoConfig.from_pretrained(
      folder, local_files_only=True
    )
    kind = FAMILIES[config.model_type]
    _check_config(folder)
    family = kind(config, _pixels(folder, kind))
    template = _template(folder, family)
    model, info = _model(folder, kind, device, dtype)
  except _ERRORS as error:
    raise ValueError(f'{folder} cannot be loaded: {error}') from error
  if info['missing_keys']:
    raise ValueError(
      f'{folder} lacks weights, such as {sorted(info["missing_keys"])[0]}: '
      'copy the whole folder'
    )
  return model, family, template


def _check(device: str, dtype: str) -> None:
  if dtype not in DTYPES:
    raise ValueError(f'lmm.dtype {dtype!r} is none of {", ".join(DTYPES)}')
  if device.startswith('cuda') and not torch.cuda.is_available():
    raise ValueError(f'lmm.device is {device!r}, but there is no CUDA device')
  if dtype == 'int8' and not importlib.util.find_spec('bitsandbytes'):
    raise ValueError(
      'lmm.dtype int8 needs bitsandbytes: pip install "lmm_sae[int8]", or set '
      'lmm.dtype to bfloat16'
    )


def _check_config(folder: pathlib.Path) -> None:
  """What transformers would pass over in silence is refused."""
  config = json.loads((folder / 'config.json').read_text())
  if 'quantization_config' in config:
    raise ValueError(
      'its weights are quantised already: give the plain checkpoint, and set '
      'lmm.dtype to int8 where memory is short'
    )
  # Before version 5 the base of the rotary embedding stood elsewhere.
  text = config.get('text_config', config)
  if VERSION < 5 and 'rope_parameters' in text and 'rope_theta' not in text:
    raise ValueError(
      'config.json was written by transformers 5, and '
      f'{transformers.__version__} would misread it: pip install '
      '"transformers>=5"'
    )


def _model(folder: pathlib.Path, kind: type[Family], device: str, dtype: str):
  """(model, what transformers says of its loading)."""
  options: dict[str, Any] = {}
  if device == 'auto':
    options['device_map'] = 'auto'
  if dtype == 'int8':
    # The residual stream overflows float16 in some models.
    options['quantization_config'] = transformers.BitsAndBytesConfig(
      load_in_8bit=True, llm_int8_skip_modules=list(_WHOLE)
    )
    options.setdefault('device_map', {'': device})
    # It says at every product that its inputs are cast, as they must be.
    logging.getLogger('bitsandbytes').setLevel(logging.ERROR)
  model, info = getattr(transformers, kind.model).from_pretrained(
    folder,
    **options,
    dtype=torch.bfloat16 if dtype == 'int8' else getattr(torch, dtype),
    local_files_only=True,
    output_loading_info=True,
  )
  if dtype == 'int8' and not _has_bytes(model):
    raise ValueError('bitsandbytes left its weights as they were')
  return model if options else model.to(device), info


def _has_bytes(model: torch.nn.Module) -> bool:
  return any(weight.dtype == torch.int8 for weight in model.parameters())


def _pixels(folder: pathlib.Path, kind: type[Family]) -> Any:
  """The image processor of PIL."""
  settings = _json(folder, 'processor_config.json')
  if 'image_processor' in settings:
    settings = settings['image_processor']
  else:
    settings = _json(folder, 'preprocessor_config.json')
  if not settings:
    raise ValueError(
      'it has neither preprocessor_config.json nor an image_processor in '
      'processor_config.json: copy the whole folder'
    )
  name = kind.processors[0]
  if 'image_processor_type' in settings:
    named = settings['image_processor_type'].removesuffix('Fast')
    if named not in kind.processors:
      raise ValueError(
        f'its image processor is {named}: only {", ".join(kind.processors)} '
        'are known here'
      )
    name = named if named != 'Qwen2_5_VLImageProcessor' else name
  if hasattr(transformers, f'{name}Pil'):  # since version 5
    name = f'{name}Pil'
  return getattr(transformers, name).from_dict(dict(settings))


def _template(folder: pathlib.Path, family: Family) -> Template:
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    folder, local_files_only=True
  )
  if not tokenizer.is_fast:
    raise ValueError(
      'its tokenizer cannot say where its tokens stand: add tokenizer.json'
    )
  token = family.config.image_token_id
  image = tokenizer.convert_ids_to_tokens(token)
  for text, number in (
    (image, [token]),
    *((text, None) for text in family.around if text),
  ):
    made = tokenizer.encode(text, add_special_tokens=False)
    if len(made) != 1 or (number and made != number):
      raise ValueError(
        f'{text!r} is no token of its own to the tokenizer: mend '
        'image_token_id in config.json, or the tokenizer'
      )
  before, after = family.around
  return Template(
    tokenizer, _source(folder, tokenizer), image, f'{before}{image}{after}'
  )


def _source(folder: pathlib.Path, tokenizer) -> str | None:
  """The chat template: the processor's own before the tokenizer's."""
  file = folder / 'chat_template.jinja'
  if file.is_file():
    return file.read_text()
  for name in ('chat_template.json', 'processor_config.json'):
    settings = _json(folder, name)
    if 'chat_template' in settings:
      return settings['chat_template']
  if isinstance(tokenizer.chat_template, dict):  # several, by name
    return tokenizer.chat_template['default']
  return tokenizer.chat_template


def _json(folder: pathlib.Path, name: str) -> dict[str, Any]:
  """The settings in a file; empty where there is no such file."""
  file = folder / name
  return json.loads(file.read_text()) if file.is_file() else {}
