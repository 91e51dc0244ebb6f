"""What a folder must hold, and what this machine must have, to be loaded."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from lmm_sae.lmm import families, loading
from lmm_sae.lmm import folders as model_folders
from lmm_sae.lmm.llava import Subject
from tests.lmm import tiny_llava

SPACE = 230


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """{family: its folder}, not to be changed."""
  return {
    name: tiny_llava.family(tmp_path_factory.mktemp(name) / name, name)
    for name in tiny_llava.FAMILIES
  }


@pytest.fixture
def copy(folders, tmp_path):
  return shutil.copytree(folders['llava_next'], tmp_path / 'copy')


def edit(path, **fields):
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_folder_of_no_known_family_is_refused(copy, tmp_path):
  with pytest.raises(ValueError, match='is no folder: give `small`'):
    Subject.load(tmp_path / 'nowhere')
  with pytest.raises(ValueError, match='is no model folder'):
    Subject.load(tmp_path)
  edit(copy / 'config.json', model_type='pixtral')
  known = r"a 'pixtral', none of LLaVA-1\.5 \(llava\).*Qwen2\.5-VL"
  with pytest.raises(ValueError, match=known):
    Subject.load(copy)


@pytest.mark.parametrize(
  'name', ['model.safetensors', 'tokenizer.json', 'preprocessor_config.json']
)
def test_a_folder_that_lacks_a_file_is_refused(copy, name):
  (copy / name).unlink()
  with pytest.raises(ValueError, match='cannot be loaded'):
    Subject.load(copy)


def test_pickled_weights_are_refused(copy):
  weights = safetensors.torch.load_file(copy / 'model.safetensors')
  (copy / 'model.safetensors').unlink()
  torch.save(weights, copy / 'pytorch_model.bin')
  with pytest.raises(ValueError, match='write them anew as safetensors'):
    Subject.load(copy)


def test_torn_or_missing_weights_are_refused(copy):
  path = copy / 'model.safetensors'
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match='cannot be loaded'):
    Subject.load(copy)
  weights = safetensors.torch.load(whole)
  del weights[min(weights)]
  safetensors.torch.save_file(weights, path, metadata={'format': 'pt'})
  with pytest.raises(ValueError, match='lacks weights'):
    Subject.load(copy)


def test_the_image_processor_may_stand_in_either_file(copy):
  settings = json.loads((copy / 'preprocessor_config.json').read_text())
  (copy / 'preprocessor_config.json').unlink()
  (copy / 'processor_config.json').write_text(
    json.dumps({'image_processor': settings})
  )
  assert Subject.load(copy).pixels.size['shortest_edge'] == tiny_llava.VIEW


def test_the_processors_chat_template_goes_before_the_tokenizers(copy):
  ours = tiny_llava.CHAT.replace('<|eot|>', '<|eot|>!')
  edit(copy / 'tokenizer_config.json', chat_template=tiny_llava.CHAT)
  (copy / 'chat_template.jinja').unlink()
  (copy / 'chat_template.json').write_text(json.dumps({'chat_template': ours}))
  assert Subject.load(copy).template.source == ours


@pytest.mark.parametrize(
  ('family', 'fields', 'message'),
  [
    ('llava', {'crop_size': {'height': 21, 'width': 21}}, 'the model wants 28'),
    ('llava', {'size': {'shortest_edge': 21}}, 'the model wants 28'),
    ('llava_next', {'size': {'shortest_edge': 21}}, 'the model wants 28'),
    ('llava_next', {'image_grid_pinpoints': [[28, 28]]}, 'differ: mend one'),
    ('llava_onevision', {'size': {'height': 28, 'width': 28}}, 'wants 30'),
    ('qwen2_5_vl', {'patch_size': 14}, 'patches 14 pixels wide'),
    ('llava', {'image_processor_type': 'PixtralImageProcessor'}, 'only CLIP'),
  ],
)
def test_other_views_than_the_models_are_refused(
  folders, tmp_path, family, fields, message
):
  copy = shutil.copytree(folders[family], tmp_path / 'copy')
  edit(copy / 'preprocessor_config.json', **fields)
  with pytest.raises(ValueError, match=message):
    Subject.load(copy)


@pytest.mark.parametrize(
  ('family', 'fields', 'message'),
  [
    (
      'llava',
      {'vision_feature_select_strategy': 'full'},
      "gives a clip_vision_model other tokens .* set 'default'",
    ),
    (
      'llava_onevision',
      {'vision_aspect_ratio': 'square'},
      "'square' of config.json is no anyres_max_N",
    ),
    (
      'llava',  # a space, which the tokenizer writes otherwise
      {'image_token_index': SPACE, 'image_token_id': SPACE},
      'no token of its own',
    ),
  ],
)
def test_settings_that_make_other_tokens_are_refused(
  folders, tmp_path, family, fields, message
):
  copy = shutil.copytree(folders[family], tmp_path / 'copy')
  edit(copy / 'config.json', **fields)
  with pytest.raises(ValueError, match=message):
    Subject.load(copy)


def test_a_config_of_a_later_version_is_refused(folders, tmp_path, monkeypatch):
  copy = shutil.copytree(folders['llava_next'], tmp_path / 'copy')
  config = json.loads((copy / 'config.json').read_text())
  config['text_config'] |= {'rope_parameters': {'rope_theta': 5e5}}
  config['text_config'].pop('rope_theta', None)
  (copy / 'config.json').write_text(json.dumps(config))
  monkeypatch.setattr(loading, 'VERSION', 4)
  with pytest.raises(ValueError, match='written by transformers 5'):
    Subject.load(copy)


@pytest.mark.parametrize(
  ('field', 'value'), [('dtype', 'float8'), ('device', 'cuda')]
)
def test_a_dtype_or_device_that_is_not_there_is_refused(
  folders, monkeypatch, field, value
):
  monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
  with pytest.raises(ValueError, match=f'lmm.{field}'):
    Subject.load(folders['llava_next'], **{field: value})


def test_eight_bits_without_their_package_are_refused(folders, monkeypatch):
  monkeypatch.setattr(loading.importlib.util, 'find_spec', lambda _: None)
  with pytest.raises(ValueError, match=r'pip install "lmm_sae\[int8\]"'):
    Subject.load(folders['llava_next'], dtype='int8')


def test_the_families_that_are_loaded_are_those_that_are_listed():
  assert list(families.FAMILIES) == list(model_folders.FAMILIES)
