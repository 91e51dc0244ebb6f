import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from lmm_sae.core.tokens import Kind
from lmm_sae.lmm import folders
from tests.lmm import tiny_llava

SIZES = [(40, 30), (91, 30), (12, 80), (200, 20), (56, 56), (6, 49), (1, 300)]


@pytest.fixture(scope='module')
def pictures():
  rng = np.random.default_rng(7)
  return [
    Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in SIZES
  ]


@pytest.fixture(scope='module')
def texts(subject):
  asked = ['what is this?', 'where', 'a red cat sits on the blue mat']
  return [
    subject.conversation(
      [('user', asked[at % 3]), ('assistant', 'yes ' * at)], 1
    )
    for at in range(len(SIZES))
  ]


def hidden(subject, texts, images, **kwargs):
  """hidden_states by transformers' own processor and forward, nothing of us."""
  inputs = tiny_llava.processor(subject.folder)(
    text=[str(text) for text in texts],
    images=[image for each in images for image in each] or None,
    return_tensors='pt',
    padding=True,
    padding_side='right',
  )
  with torch.no_grad():
    out = subject.model(**inputs, output_hidden_states=True, **kwargs)
  return inputs, out.hidden_states


def test_inputs_are_those_of_the_processor(subject, texts, pictures):
  images = [[each] for each in pictures]
  theirs, _ = hidden(subject, texts, images)
  ours = subject.inputs(texts, images)
  assert set(ours) == {
    'input_ids',
    'attention_mask',
    'pixel_values',
    'image_sizes',
  }
  for name, value in ours.items():
    torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize('batch', [1, 2, 6])
def test_residuals_are_the_hidden_states(subject, texts, pictures, batch):
  for at in range(0, len(texts), batch):
    images = [[each] for each in pictures[at : at + batch]]
    inputs = subject.inputs(texts[at : at + batch], images)
    found = subject.residuals(inputs, (0, 1))
    _, states = hidden(subject, texts[at : at + batch], images)
    mask = inputs['attention_mask'].bool()
    for layer, x_BTD in found.items():
      torch.testing.assert_close(
        x_BTD[mask], states[layer + 1][mask], rtol=1e-5, atol=1e-5
      )


@pytest.mark.parametrize('side', ['left', 'right'])
def test_kept_rows_are_those_of_all_rows(subject, texts, pictures, side):
  images = [[each] for each in pictures[:3]]
  inputs = subject.inputs(texts[:3], images, side)
  keep = [np.array([5, 0, 5]), np.array([], np.int64), np.array([1])]
  kept = subject.rows(inputs, (0, 1), keep)
  for all_of, some, at in zip(
    subject.rows(inputs, (0, 1)), kept, keep, strict=True
  ):
    for layer in (0, 1):
      assert some[layer].dtype == ml_dtypes.bfloat16
      np.testing.assert_array_equal(some[layer], all_of[layer][at])
  length = len(subject.encode(texts[2], images[2]).token_T)
  for wrong in (-1, length):
    with pytest.raises(ValueError, match=f'text has {length} tokens'):
      subject.rows(inputs, (0,), [*keep[:2], np.array([wrong])])


def test_nothing_above_the_last_layer_runs_and_no_hook_stays(subject, pictures):
  ran = []
  handles = [
    subject.layer(at).register_forward_hook(
      lambda m, a, o, at=at: ran.append(at)
    )
    for at in range(subject.num_layers)
  ]
  inputs = subject.inputs([subject.bare()], [[pictures[0]]])
  subject.residuals(inputs, (1,))
  assert ran == [0, 1]
  with pytest.raises(ValueError, match='do not match'):  # the model's own
    subject.residuals(inputs | {'input_ids': inputs['input_ids'] * 0}, (1,))
  for handle in handles:
    handle.remove()
  for at in range(subject.num_layers):
    own = subject.layer(at)._forward_hooks
    assert not [hook for hook in own.values() if 'residuals' in repr(hook)]


def test_image_features_do_not_feel_the_layers_that_are_skipped(
  subject, model_folder, pictures
):
  whole = transformers.LlavaNextForConditionalGeneration.from_pretrained(
    model_folder
  )
  inputs = subject.inputs([subject.bare()], [[pictures[1]]])
  pixels = {name: inputs[name] for name in ('pixel_values', 'image_sizes')}
  theirs = whole.model.get_image_features(**pixels)
  ours = subject.model.model.get_image_features(**pixels)
  if not isinstance(theirs, list | tuple):
    theirs, ours = theirs.pooler_output, ours.pooler_output
  assert torch.equal(theirs[0], ours[0])


def test_maps_are_padded_as_their_inputs(subject, texts, pictures):
  images = [[each] for each in pictures[:2]] + [[]]
  batch = [*texts[:2], 'a plain text']
  for side in ('left', 'right'):
    inputs = subject.inputs(batch, images, side)
    maps = subject.token_maps(batch, images, inputs)
    for ids_T, mask_T, tokens in zip(
      inputs['input_ids'], inputs['attention_mask'], maps, strict=True
    ):
      np.testing.assert_array_equal(tokens.token_T, ids_T)
      np.testing.assert_array_equal(tokens.kind_T == Kind.PADDING, mask_T == 0)
  assert maps[2].grid == (0, 0)
  assert set(maps[2].kind_T) == {Kind.BOS, Kind.QUESTION, Kind.PADDING}


def test_words_keep_their_kind(subject):
  text = subject.conversation(
    [('user', 'what is this?'), ('assistant', 'a red cat')]
  )
  tokens = subject.encode(text)
  vocab = subject.vocab()

  def words(kind):
    at = tokens.kind_T == kind
    return ''.join(vocab[token] for token in tokens.token_T[at])

  assert words(Kind.BOS) == '<|bos|>'
  assert words(Kind.QUESTION) == 'what is this?'
  assert words(Kind.ANSWER) == 'a red cat'
  assert words(Kind.TEMPLATE).count('<|eot|>') == 2


def test_two_images_of_a_text_are_told_apart(subject, pictures):
  text = subject.chat('what is this?', 2)
  tokens = subject.encode(text, pictures[:2])
  for number, picture in enumerate(pictures[:2]):
    box = tokens.box_T4[(tokens.image_T == number) & tokens.where('base')]
    assert tuple(box.max(0)[2:]) == picture.size
  assert (tokens.image_T[tokens.where('text')] == -1).all()


def test_images_and_places_must_fit(subject, pictures):
  with pytest.raises(ValueError, match='1 image placeholders for 0 images'):
    subject.inputs([subject.bare()], [[]])
  with pytest.raises(ValueError, match='each text needs its own list'):
    subject.inputs(['a', 'b'], [pictures[:1]])


def test_a_layer_outside_the_model_is_refused(subject):
  assert subject.layer_path(2) == 'model.language_model.layers.2'
  for layer in (-1, 3):
    with pytest.raises(ValueError, match='3 layers are 0 to 2'):
      subject.layer(layer)


def test_residuals_that_are_not_finite_are_refused(subject, pictures):
  inputs = subject.inputs([subject.bare()], [[pictures[0]]])
  inputs['pixel_values'] = inputs['pixel_values'] * np.inf
  with pytest.raises(ValueError, match=r'not finite .* set lmm\.dtype'):
    subject.rows(inputs, (1,))


@pytest.fixture
def copy(model_folder, tmp_path):
  return shutil.copytree(model_folder, tmp_path / 'copy')


def test_the_fingerprint_tells_models_apart(copy, tmp_path):
  one = folders.fingerprint(copy)
  assert one == folders.fingerprint(copy)
  other = tiny_llava.make(tmp_path / 'other', seed=1)
  assert one != folders.fingerprint(other)
