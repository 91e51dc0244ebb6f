"""The boxes of image tokens, held against pictures that were drawn for it.

A picture whose every pixel says where it is goes through the image processor.
What each patch of the encoder got is read from the pixels that come out, and is
handed to the model's own code in place of features, to be cut, unpadded, pooled
and put in order: so each token brings along where it has looked.
"""

import types

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from lmm_sae.core.tokens import Kind
from lmm_sae.lmm import anyres
from lmm_sae.lmm.llava import Subject
from tests.lmm import tiny_llava
from tests.lmm.tiny_llava import PATCH

SIZES = st.one_of(
  st.tuples(st.integers(1, 400), st.integers(1, 400)),
  st.tuples(st.integers(1, 9), st.integers(1, 400)),
  st.tuples(st.integers(1, 400), st.integers(1, 9)),
)
ODD = [(1, 180), (180, 1), (3, 3), (1000, 30), (30, 1000), (97, 31), (7, 9)]
ODD += [(56, 56), (28, 84), (30, 90), (90, 90), (60, 30), (14, 14), (2, 2)]
ODD += [(1, 1), (28, 28), (41, 83), (113, 64), (6, 49), (251, 257), (1, 500)]
TOO_THIN = 200  # Qwen refuses what is thinner


@pytest.fixture(scope='module')
def subjects(tmp_path_factory):
  """{family: a subject whose image processor leaves the pixels as they are}"""
  found = {}
  for name in tiny_llava.FAMILIES:
    folder = tiny_llava.family(tmp_path_factory.mktemp(name) / name, name)
    subject = Subject.load(folder, threads=1)
    subject.pixels.image_mean = [0.0, 0.0, 0.0]
    subject.pixels.image_std = [1 / 255, 1 / 255, 1 / 255]
    found[name] = subject
  return found


def picture(width, height):
  """Red says x, green y, and blue that this is the picture."""
  x_HW, y_HW = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
  planes = [x_HW * 255 / width, y_HW * 255 / height, np.full_like(x_HW, 255)]
  return Image.fromarray(np.rint(np.stack(planes, -1)).astype(np.uint8))


def looked(pixels, width, height):
  """(x0, y0, x1, y1, share that is picture) of patches [..., 3, h, w].

  Of pixels' centres; where no pixel is of the picture, all are 0.
  """
  x, y, blue = pixels.movedim(-3, 0)
  inside = blue > 127  # black padding darkens all three alike
  x, y = x * width / blue.clamp(1), y * height / blue.clamp(1)
  far = torch.full_like(x, 1e9)
  ends = [torch.where(inside, each, far).amin((-2, -1)) for each in (x, y)]
  ends += [torch.where(inside, each, -far).amax((-2, -1)) for each in (x, y)]
  share = inside.float().mean((-2, -1))
  found = torch.stack([*ends, share], -1)
  return torch.where(share[..., None] > 0, found, torch.zeros(()))


def patches(views, side):
  """[..., side * side, 3, PATCH, PATCH] of views [..., 3, H, W]."""
  cut = views[..., : side * PATCH, : side * PATCH]
  cut = cut.unflatten(-1, (side, PATCH)).unflatten(-3, (side, PATCH))
  return cut.movedim((-4, -2), (-5, -4)).flatten(-5, -4)


def oracle(subject, name, images):
  """What each image token has looked at, [T, 5], -1 for newlines."""
  made = subject.family.inputs([images])
  pixels = made['pixel_values']
  (width, height), side = images[0].size, subject.grid[0]
  if name == 'qwen2_5_vl':
    # A row is a patch of two equal frames; four in a row become a token.
    cells = pixels.unflatten(-1, (3, 2, PATCH, PATCH))[:, :, 0]
    seen_n5 = looked(cells, width, height).unflatten(0, (-1, 4))
    low, high = seen_n5[..., :2].amin(1), seen_n5[..., 2:4].amax(1)
    return torch.cat([low, high, seen_n5[..., 4:].mean(1)], -1)
  seen = looked(patches(pixels, side), width, height)
  if name.startswith('llava_') and 'image_sizes' in made:
    alone = len(images) == 1 or name == 'llava_next'
    count = _tiles(subject, made) if alone else 1
    rest = (
      {'vision_feature_select_strategy': 'default'}
      if name == 'llava_next'
      else {'vision_aspect_ratio': subject.model.config.vision_aspect_ratio}
    )
    found, _ = subject.model.model.pack_image_features(
      [each[:count] for each in seen],
      made['image_sizes'],
      image_newline=torch.full((5,), -1.0),
      **rest,
    )
    return torch.cat(list(found))
  return seen.flatten(0, 1)


def _tiles(subject, made):
  """Views of the first image: the rest of pixel_values is padding."""
  config = subject.model.config
  view = config.vision_config.image_size
  tall, wide = select_best_resolution(
    made['image_sizes'][0].tolist(), config.image_grid_pinpoints
  )
  return tall // view * (wide // view) + 1


def check(subject, name, width, height, images=1):
  given = [picture(width, height)] * images
  text = subject.bare('<image>' * images)
  tokens = subject.encode(text, given)
  seen_T5 = oracle(subject, name, given).numpy()
  shown = tokens.where('image')
  kind_T, box_T4 = tokens.kind_T[shown], tokens.box_T4[shown]
  newline_T = (seen_T5 == -1).all(-1)
  np.testing.assert_array_equal(kind_T == Kind.NEWLINE, newline_T)
  _check_boxes(subject, kind_T, box_T4, seen_T5, (width, height))
  subject.rows(subject.inputs([text], [given]), (0,))  # as many as it makes


def _check_boxes(subject, kind_T, box_T4, seen_T5, size):
  """Boxes are where tokens looked, to a pixel of the view and of the colour."""
  for kind in (Kind.BASE, Kind.TILE):
    at = kind_T == kind
    if not at.any():
      continue
    box_n4, seen_n5 = box_T4[at], seen_T5[at]
    sides = box_n4[:, 2:] - box_n4[:, :2]
    pixels = sides.max(0) / PATCH  # of the view, in pixels of the image
    unseen = sides[seen_n5[:, 4] == 0].min(-1)
    assert (unseen <= max(3 * pixels.max(), 1)).all()
    # A pooled cell has no ends to be seen: it takes samples at its middle.
    pooled = kind == Kind.TILE and hasattr(subject.family, 'most')
    some = seen_n5[:, 4] > (0.999 if pooled else 0.15)
    # Where padding blurs into the picture, a pixel more is not told apart.
    blurred = (seen_n5[some, 4] < 0.999).any()
    for axis, pixel in enumerate(pixels):
      slack = (1.5 + blurred) * pixel + 1.5 * size[axis] / 255
      # Enlarged, the outer half of a border's pixels has no slope.
      slack += 0.6 if pixel < 1 else 0.0
      box_n2 = box_n4[some][:, axis::2]
      seen_n2 = seen_n5[some][:, axis:4:2] + [-pixel / 2, pixel / 2]
      if pooled:
        box_n2, seen_n2 = box_n2.mean(1), seen_n2.mean(1)
      np.testing.assert_allclose(box_n2, seen_n2, atol=slack)


@pytest.mark.parametrize('name', list(tiny_llava.FAMILIES))
@pytest.mark.parametrize(('width', 'height'), ODD)
def test_odd_images_are_seen_where_their_boxes_are(
  subjects, name, width, height
):
  thin = max(width, height) > TOO_THIN * min(width, height)
  if name == 'qwen2_5_vl' and thin:
    with pytest.raises(ValueError, match='aspect ratio'):
      subjects[name].encode(subjects[name].bare(), [picture(width, height)])
    return
  check(subjects[name], name, width, height)


@pytest.mark.parametrize('name', list(tiny_llava.FAMILIES))
def test_images_are_seen_where_their_boxes_are(subjects, name):
  @settings(max_examples=50, deadline=None)
  @given(SIZES)
  def run(size):
    if name != 'qwen2_5_vl' or max(size) <= TOO_THIN * min(size):
      check(subjects[name], name, *size)

  run()


@pytest.mark.parametrize('name', list(tiny_llava.FAMILIES))
@pytest.mark.parametrize('size', [(91, 30), (12, 80), (7, 7)])
def test_images_of_one_text_are_seen_where_their_boxes_are(
  subjects, name, size
):
  check(subjects[name], name, *size, images=3)


def corners(tokens, kind, spare):
  """Checks that boxes adjoin but for `spare` view pixels; (low, high) corner.

  Args:
    spare: pixels of the original, (x, y), that no patch sees after a tile.
  """
  at = tokens.kind_T == kind
  rows, cols = tokens.row_T[at].max() + 1, tokens.col_T[at].max() + 1
  box = tokens.box_T4[at].reshape(rows, cols, 4)
  assert (box[:, :, 0::2] == box[:1, :, 0::2]).all()
  assert (box[:, :, 1::2] == box[:, :1, 1::2]).all()
  for axis, line in enumerate((box[0], box[:, 0])):
    gaps = line[1:, axis] - line[:-1, axis + 2]
    assert (gaps >= -1e-3).all()
    assert (gaps <= spare[axis] + 1e-3).all()
  return box[0, 0, :2], box[-1, -1, 2:]


@settings(max_examples=150, deadline=None)
@given(st.tuples(st.integers(20, 400), st.integers(20, 400)))
def test_boxes_tile_the_image(subjects, size):
  for name in ('llava_interleave', 'llava_next', 'llava_onevision'):
    subject = subjects[name]
    view = subject.family.view
    unseen = view % PATCH / view
    tokens = subject.family.tokens(*size, True)
    low, high = corners(tokens, Kind.BASE, (0, 0))
    np.testing.assert_allclose(low, 0)
    np.testing.assert_allclose(high, np.array(size) * (1 - unseen), rtol=1e-5)
    if name == 'llava_interleave':
      continue
    tall, wide = select_best_resolution(
      size[::-1], subject.family.config.image_grid_pinpoints
    )
    scale = max(size[0] / wide, size[1] / tall)  # canvas to image, shape kept
    if not (tokens.kind_T == Kind.TILE).any():
      continue
    spare = view % PATCH * scale
    low, high = corners(tokens, Kind.TILE, (1.1 * spare, 1.1 * spare))
    lost = 1.1 * (PATCH * scale + spare * max(tall, wide) / view)
    assert (low <= lost).all()
    assert (high >= np.array(size) - lost).all()
    assert np.isclose(low, 0).any()


@settings(max_examples=100, deadline=None)
@given(st.tuples(st.integers(3, 400), st.integers(3, 400)))
def test_qwens_view_is_the_whole_image_in_its_shape(subjects, size):
  tokens = subjects['qwen2_5_vl'].family.tokens(*size, True)
  low, high = corners(tokens, Kind.BASE, (0, 0))
  np.testing.assert_allclose([*low, *high], [0, 0, *size], rtol=1e-5)
  assert tokens.grid[0] * tokens.grid[1] == len(tokens.kind_T)


@settings(max_examples=100, deadline=None)
@given(st.tuples(st.integers(1, 400), st.integers(1, 400)))
def test_a_crop_is_the_middle_of_the_image(subjects, size):
  tokens = subjects['llava'].family.tokens(*size, True)
  low, high = corners(tokens, Kind.BASE, (0, 0))
  short = min(size)
  np.testing.assert_allclose(high - low, short, atol=1 + 0.05 * short)
  middle = np.array(size) / 2
  np.testing.assert_allclose((low + high) / 2, middle, atol=1 + 0.05 * short)


def test_an_image_thinner_than_a_patch_keeps_newlines_alone(subjects):
  tokens = subjects['llava_next'].family.tokens(6, 49, True)
  assert not (tokens.kind_T == Kind.TILE).any()
  assert (tokens.kind_T == Kind.NEWLINE).any()


def test_an_image_that_would_be_blown_up_is_refused(subjects):
  for name, alone, made in (
    ('llava', True, '28 x 28000000'),
    ('llava_padded', True, '1000000 x 1000000'),
    ('llava_onevision', False, '1000000 x 1000000'),
  ):
    with pytest.raises(ValueError, match=f'too thin: .* makes it {made}'):
      subjects[name].family.tokens(1, 10**6, alone)
  assert len(subjects['llava_next'].family.tokens(1, 10**6, True).kind_T)


# At the sizes of the checkpoints there are, as many tokens as their processors
# write into the text.

NEXT = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
ONEVISION = [(384 * h, 384 * w) for h in range(1, 7) for w in range(1, 7)]
PHOTOS = st.tuples(st.integers(1, 4000), st.integers(1, 4000))


class Counts(transformers.LlavaOnevisionProcessor):
  """The processor's arithmetic without the processor, which loads videos."""

  num_image_tokens = 27**2
  vision_aspect_ratio = 'anyres_max_9'
  image_processor = types.SimpleNamespace(
    image_grid_pinpoints=[list(pair) for pair in ONEVISION]
  )

  def __init__(self):
    pass


@settings(max_examples=300, deadline=None)
@given(PHOTOS)
def test_photos_become_as_many_tokens_as_onevision_counts(size):
  tokens = anyres.image_tokens(*size, 384, 14, ONEVISION, 9)
  want = Counts()._get_number_of_features(*size[::-1], 384, 384)
  assert len(tokens.kind_T) == want


@settings(max_examples=300, deadline=None)
@given(PHOTOS)
def test_photos_become_as_many_tokens_as_next_counts(size):
  tokens = anyres.image_tokens(*size, 336, 14, NEXT)
  whole = transformers.LlavaNextProcessor
  counts = types.SimpleNamespace(
    patch_size=14,
    image_processor=types.SimpleNamespace(
      image_grid_pinpoints=[list(pair) for pair in NEXT]
    ),
    num_additional_image_tokens=1,
    _get_unpadded_features=lambda *sizes: whole._get_unpadded_features(
      None, *sizes
    ),
  )
  want = whole._get_number_of_features(counts, *size[::-1], 336, 336)
  assert len(tokens.kind_T) == want - 1  # CLIP's own token is not read
