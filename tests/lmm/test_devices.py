"""Subjects that are spread over devices, or whose weights have 8 bits."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from lmm_sae.lmm import loading
from lmm_sae.lmm.llava import Subject
from tests.lmm import tiny_llava

PATH = 'model.language_model'
OFFLOADED = [
  {f'{PATH}.layers.1'},
  {f'{PATH}.layers.0', f'{PATH}.layers.2', f'{PATH}.embed_tokens'},
  {'model.multi_modal_projector', 'model.vision_tower', 'model.visual'},
]


@pytest.fixture(
  scope='module',
  params=['llava', 'llava_next', 'llava_onevision', 'qwen2_5_vl'],
)
def folder(request, tmp_path_factory):
  name = request.param
  return tiny_llava.family(tmp_path_factory.mktemp(name) / name, name)


def rows(subject, layers=(0, 2)):
  rng = np.random.default_rng(3)
  images = [Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))]
  text = subject.chat('what is this?', 1)
  inputs = subject.inputs([text], [images])
  return subject.rows(inputs, layers)[0]


def test_auto_finds_the_devices_there_are(folder):
  found = rows(Subject.load(folder, device='auto', threads=1))
  for layer, want in rows(Subject.load(folder, threads=1)).items():
    np.testing.assert_array_equal(found[layer], want)


@pytest.mark.parametrize('disk', OFFLOADED)
def test_hooks_see_layers_whose_weights_are_on_disk(folder, tmp_path, disk):
  whole = Subject.load(folder, threads=1)
  model = whole.model.model
  parts = [f'model.{name}' for name, _ in model.named_children()]
  parts += [
    f'model.{name}' for name, _ in model.named_parameters(recurse=False)
  ]
  parts.remove(PATH)
  parts += [f'{PATH}.{name}' for name in ('embed_tokens', 'norm', 'rotary_emb')]
  parts += [f'{PATH}.layers.{layer}' for layer in range(whole.num_layers)]
  places = {name: 'disk' if name in disk else 'cpu' for name in parts}
  spread = type(whole.model).from_pretrained(
    folder,
    device_map=places | {'lm_head': 'cpu'},
    offload_folder=tmp_path / 'disk',
    dtype=torch.float32,
  )
  subject = Subject('spread', folder, spread, whole.family, whole.template)
  assert subject.device == torch.device('cpu')
  weights = dict(spread.named_parameters())
  assert any(weights[name].device.type == 'meta' for name in weights)
  for layers in ((1,), (0, 1, 2)):  # stopped early, and then again
    want = rows(whole, layers)
    for layer, found in rows(subject, layers).items():
      np.testing.assert_array_equal(found, want[layer])


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_rows_of_half_precision_are_near_those_of_whole(folder, dtype):
  half = Subject.load(folder, dtype=dtype, threads=1)
  assert half.dtype == getattr(torch, dtype)
  assert fvu(rows(half), rows(Subject.load(folder, threads=1))) < 0.005


def fvu(found, wanted):
  """Share of the last layer's variance that is lost."""
  x_TD, want_TD = (each[2].astype(np.float32) for each in (found, wanted))
  lost = ((x_TD - want_TD) ** 2).sum()
  return lost / ((want_TD - want_TD.mean(0)) ** 2).sum()


@pytest.mark.int8
def test_weights_of_eight_bits_are_the_decoders_alone(folder):
  eight = Subject.load(folder, dtype='int8', threads=1)
  linear = eight.layer(1).mlp.up_proj
  assert linear.weight.dtype == torch.int8
  above = [
    weight.dtype
    for name, weight in eight.model.named_parameters()
    if not name.startswith(PATH)
  ]
  assert above
  assert set(above) == {torch.bfloat16}
  whole = rows(Subject.load(folder, threads=1))
  assert 0 < fvu(rows(eight), whole) < 0.02


@pytest.mark.int8
def test_weights_that_stay_whole_are_refused(folder, monkeypatch):
  monkeypatch.setattr(loading, '_WHOLE', ('lm_head', 'model'))
  with pytest.raises(ValueError, match='left its weights as they were'):
    Subject.load(folder, dtype='int8')


def test_the_version_is_one_that_is_known():
  assert transformers.__version__.startswith(('4.5', '5.'))
