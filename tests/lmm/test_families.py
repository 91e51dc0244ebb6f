"""Each family's rows, held against transformers alone.

What is expected is made without our code: the model loaded by its own class,
pixels by an image processor made from the test's settings, placeholders counted
by the model's own image features, the text tokenised with all of them in it,
and a hook written here. Only the text of the conversation comes from us.
"""

import inspect

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from lmm_sae.core.tokens import Kind
from lmm_sae.lmm.llava import Subject
from tests.lmm import tiny_llava

# Padding on the left moves positions, whose sines round anew.
FLOAT32 = {'rtol': 1e-4, 'atol': 1e-4}
SIZES = [(40, 30), (91, 30), (12, 80), (200, 20), (60, 60), (6, 49), (1, 150)]
SIZES += [(3, 3)]


@pytest.fixture(scope='module')
def pictures():
  rng = np.random.default_rng(7)
  return [
    Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in SIZES
  ]


@pytest.fixture(scope='module', params=list(tiny_llava.FAMILIES))
def name(request):
  return request.param


@pytest.fixture(scope='module')
def folder(name, tmp_path_factory):
  return tiny_llava.family(tmp_path_factory.mktemp(name) / name, name)


@pytest.fixture(scope='module')
def subject(folder):
  return Subject.load(folder, threads=1)


@pytest.fixture(scope='module')
def oracle(name, folder):
  return Oracle(name, folder)


class Oracle:
  """A model of transformers, and what a hook of ours sees in it."""

  def __init__(self, name, folder):
    kind, _, settings = tiny_llava.FAMILIES[name]
    self.model = getattr(transformers, kind).from_pretrained(folder).eval()
    self.pixels = tiny_llava.pixels(**settings)
    self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    self.nested = name == 'llava_onevision'
    self.image = '<|image_pad|>' if name == 'qwen2_5_vl' else '<image>'

  def images(self, images):
    """The model's arguments for images, and the tokens of each of them."""
    flat = [image for row in images for image in row]
    if not flat:
      return {}, []
    given = [row for row in images if row] if self.nested else flat
    made = dict(
      self.pixels(given, return_tensors='pt', input_data_format='channels_last')
    )
    with torch.no_grad():
      found = self.model.model.get_image_features(**made)
    if not isinstance(found, list | tuple):
      found = found.pooler_output
    return made, [len(each) for each in found]

  def inputs(self, texts, images, side):
    made, counts = self.images(images)
    counts = iter(counts)
    whole = []
    for text in texts:
      first, *rest = str(text).split(self.image)
      for piece in rest:
        first += self.image * next(counts) + piece
      whole.append(first)
    encoded = self.tokenizer(
      whole, return_tensors='pt', padding=True, padding_side=side
    )
    made |= {key: encoded[key] for key in ('input_ids', 'attention_mask')}
    takes = inspect.signature(self.model.forward).parameters
    if 'mm_token_type_ids' in takes and len(made) > 2:
      token = self.model.config.image_token_id
      made['mm_token_type_ids'] = (made['input_ids'] == token).int()
    return made

  def rows(self, texts, images, side):
    """{layer: [for each text [T, D]]} of a forward of the whole model."""
    inputs = self.inputs(texts, images, side)
    seen = {}

    def watch(module, args, output, layer):
      seen[layer] = output[0] if isinstance(output, tuple) else output

    handles = [
      module.register_forward_hook(
        lambda *args, layer=layer: watch(*args, layer)
      )
      for layer, module in enumerate(self.model.model.language_model.layers)
    ]
    with torch.no_grad():
      self.model(**inputs)
    for handle in handles:
      handle.remove()
    mask_BT = inputs['attention_mask'].bool()
    return {
      layer: [x_TD[mask_T] for x_TD, mask_T in zip(x_BTD, mask_BT, strict=True)]
      for layer, x_BTD in seen.items()
    }


@pytest.fixture(scope='module')
def asked(subject, pictures):
  """Eight conversations: (text, images)."""

  def chat(*turns, count=0):
    return subject.conversation(list(zip(ROLES, turns, strict=False)), count)

  return [
    (chat('what is this?', 'a red cat', count=1), pictures[:1]),
    (chat('yes', 'no', 'a cat'), []),
    (chat('is <image> like <image>?', 'no', count=2), pictures[1:3]),
    (chat('what is this?', 'yes ' * 9, count=1), pictures[3:4]),
    (chat('what?', 'one', 'and <image> this', 'two', count=1), pictures[4:5]),
    (chat('<image>who?', 'me', '<image>', 'you', count=2), pictures[5:7]),
    (subject.bare(), pictures[6:7]),
    (subject.raw([('user', 'one <image> is it?')], 1), pictures[7:8]),
  ]


ROLES = ('user', 'assistant') * 2


@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('batch', [1, 8])
def test_rows_equal_a_hook_of_the_test(subject, oracle, asked, batch, side):
  for at in range(0, len(asked), batch):
    texts, images = zip(*asked[at : at + batch], strict=True)
    wanted = oracle.rows(texts, images, side)
    inputs = subject.inputs(texts, images, side)
    mask_BT = inputs['attention_mask'].bool()
    for layers in ((0,), (0, 1, 2)):  # stopped early, and not
      found = subject.residuals(inputs, layers)
      rows = subject.rows(inputs, layers)
      assert set(found) == set(rows[0]) == set(layers)
      for layer in layers:
        for text, want_TD in enumerate(wanted[layer]):
          x_TD = found[layer][text, mask_BT[text]]
          torch.testing.assert_close(x_TD, want_TD, **FLOAT32)
          half = x_TD.to(torch.bfloat16).float().numpy()
          assert rows[text][layer].dtype == ml_dtypes.bfloat16
          np.testing.assert_array_equal(
            rows[text][layer].astype(np.float32), half
          )


@pytest.mark.parametrize('side', ['left', 'right'])
def test_batched_rows_equal_single_runs(subject, asked, side):
  texts, images = zip(*asked, strict=True)
  inputs = subject.inputs(texts, images, side)
  batched = subject.residuals(inputs, (2,))[2]
  mask_BT = inputs['attention_mask'].bool()
  for text, (one, own) in enumerate(asked):
    single = subject.residuals(subject.inputs([one], [own]), (2,))[2][0]
    torch.testing.assert_close(batched[text, mask_BT[text]], single, **FLOAT32)


def test_maps_say_what_the_model_is_given(subject, oracle, asked):
  for text, images in asked:
    inputs = oracle.inputs([text], [images], 'right')
    tokens = subject.encode(text, images)
    np.testing.assert_array_equal(tokens.token_T, inputs['input_ids'][0])
    is_image_T = tokens.token_T == oracle.model.config.image_token_id
    np.testing.assert_array_equal(tokens.where('image'), is_image_T)
    np.testing.assert_array_equal(tokens.image_T >= 0, is_image_T)
    _, counts = oracle.images([images])
    found = np.bincount(tokens.image_T[is_image_T], minlength=len(images))
    assert found.tolist() == counts
    assert (np.diff(tokens.image_T[is_image_T]) >= 0).all()


def test_newlines_are_where_the_model_has_them(subject, pictures):
  whole = subject.model.model
  if not hasattr(whole, 'image_newline'):
    for picture in pictures:
      kinds = subject.encode(subject.bare(), [picture]).kind_T
      assert Kind.NEWLINE not in kinds
    return
  for images in ([pictures[3]], [pictures[4]], [pictures[0], pictures[1]]):
    text = subject.bare('<image>' * len(images))
    inputs = subject.inputs([text], [images])
    found = whole.get_image_features(
      **{
        key: inputs[key]
        for key in inputs
        if key in ('pixel_values', 'image_sizes', 'batch_num_images')
      }
    )
    if not isinstance(found, list | tuple):
      found = found.pooler_output
    newline = (torch.cat(list(found)) == whole.image_newline).all(-1)
    tokens = subject.encode(text, images)
    at = tokens.kind_T[tokens.where('image')] == Kind.NEWLINE
    assert at.any()
    np.testing.assert_array_equal(newline.numpy(), at)


def test_grids_are_those_of_the_first_image(subject, name, pictures):
  text = subject.bare('<image><image>')
  tokens = subject.encode(text, pictures[1:3])
  first = (tokens.image_T == 0) & (tokens.kind_T == Kind.BASE)
  rows, cols = tokens.grid
  assert rows * cols == first.sum()
  assert tokens.row_T[first].max() + 1 == rows
  assert tokens.col_T[first].max() + 1 == cols
  own = subject.grid
  assert own == ((0, 0) if name == 'qwen2_5_vl' else (rows, cols))
  assert subject.encode('plain', []).grid == (0, 0)
