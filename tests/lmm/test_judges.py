"""The judges on tiny models of random weights: shapes, pairs, thresholds."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from lmm_sae.lmm import judges
from tests.lmm import tiny_judges
from tests.lmm.tiny_judges import SIDE

TEXTS = ('a red cat', 'blue', 'a red cat')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A CLIP of random weights, 16 px views of 4 x 4 patches."""
  return tiny_judges.save_clip(tmp_path_factory.mktemp('judges') / 'clip')


@pytest.fixture(scope='module')
def clip(folder) -> judges.Clip:
  return judges.Clip(folder)


@pytest.fixture(scope='module')
def pictures() -> list[Image.Image]:
  rng = np.random.default_rng(0)
  return [
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
    for size in ((16, 16), (20, 30))
  ]


def test_the_clip_score_is_a_hundred_cosines(clip, pictures):
  index = [0, 1, 1]
  got_B = clip.score(pictures, index, TEXTS)
  assert got_B.dtype == np.float32
  for got, at, text in zip(got_B, index, TEXTS, strict=True):
    pixels = clip.processor(pictures[at], return_tensors='pt')
    tokens = clip.tokenizer(text, return_tensors='pt')
    with torch.no_grad():
      out = clip.model(
        input_ids=tokens['input_ids'],
        attention_mask=tokens['attention_mask'],
        pixel_values=pixels['pixel_values'],
      )
    cos = torch.cosine_similarity(out.image_embeds, out.text_embeds)
    assert got == pytest.approx(100 * float(cos), abs=1e-4)
  assert got_B[1] != got_B[2]


def test_a_long_text_is_cut_to_what_clip_reads(clip, pictures):
  assert np.isfinite(clip.score(pictures, [0], ['red ' * 99])).all()


@pytest.mark.parametrize('embedding', ['value', 'last_hidden'])
@pytest.mark.parametrize('scales', [(1,), (1, 2), (3,)])
def test_masks_are_as_large_as_their_images(
  folder, pictures, embedding, scales
):
  clip = judges.Clip(folder)
  clip.rule = judges.PatchRule(embedding, -2.0, '{}', ('thing',), scales)
  everywhere = clip.masks(pictures, [0, 1, 1], TEXTS, 0.3)
  assert [m.shape for m in everywhere] == [(16, 16), (20, 30), (20, 30)]
  assert all(mask_HW.dtype == bool and mask_HW.all() for mask_HW in everywhere)
  clip.rule = judges.PatchRule(embedding, 0.0, '{}', ('thing',), scales)
  some = clip.masks(pictures, [0, 1, 1], TEXTS, 0.3)
  assert any(0 < mask_HW.mean() < 1 for mask_HW in some)
  clip.rule = judges.PatchRule(embedding, 2.0, '{}', ('thing',), scales)
  assert not any(m.any() for m in clip.masks(pictures, [0], ['red'], 0.3))


def test_the_last_hidden_patches_are_those_of_the_model(folder, pictures):
  clip = judges.Clip(folder)
  clip.rule = judges.PatchRule('last_hidden', 0.0)
  pixels = clip._pixels(pictures[:1])
  with torch.no_grad():
    got_HWD = clip._patch_embeddings(pixels)[0]
    vision = clip.model.vision_model
    x_BPD = vision(pixel_values=pixels).last_hidden_state
    want_PD = clip.model.visual_projection(vision.post_layernorm(x_BPD))[0, 1:]
  assert got_HWD.shape == (4, 4, 10)
  torch.testing.assert_close(got_HWD.flatten(0, 1), want_PD)


def test_crops_of_a_scale_lie_where_they_were_cut(folder):
  """A patch of the 2 x 2 crops embeds what the crop alone embeds."""
  clip = judges.Clip(folder)
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
  clip.rule = judges.PatchRule('value', 0.0, scales=(2,))
  with torch.no_grad():
    whole_HWD = clip._patches([image])[0]
    clip.rule = judges.PatchRule('value', 0.0)
    right_HWD = clip._patches([image.crop((16, 0, 32, 16))])[0]
  assert whole_HWD.shape == (8, 8, 10)
  torch.testing.assert_close(whole_HWD[:4, 4:], right_HWD)


def test_the_rule_is_read_from_the_folder(tmp_path):
  path = tiny_judges.save_clip(tmp_path / 'clip')
  assert judges.Clip(path).rule == judges.MASK_CLIP
  rule = {'patch_embedding': 'last_hidden', 'threshold': 0.5, 'scales': [1, 2]}
  (path / 'judge.json').write_text(json.dumps(rule))
  assert judges.Clip(path).rule == judges.PatchRule(
    'last_hidden', 0.5, scales=(1, 2)
  )
  for bad, says in (
    ({'patch_embedding': 'first', 'threshold': 1}, "'first'"),
    ({'patch_embedding': 'value'}, 'threshold'),
  ):
    (path / 'judge.json').write_text(json.dumps(bad))
    with pytest.raises(ValueError, match=says):
      judges.Clip(path)


@pytest.fixture(scope='module')
def clipseg(tmp_path_factory) -> judges.ClipSeg:
  path = tmp_path_factory.mktemp('judges') / 'clipseg'
  return judges.ClipSeg(tiny_judges.save_clipseg(path))


def test_clipseg_gives_a_mask_a_pair(clipseg, pictures):
  masks = clipseg.masks(pictures, [0, 1, 1], TEXTS, 0.3)
  assert [m.shape for m in masks] == [(16, 16), (20, 30), (20, 30)]
  assert all(mask_HW.dtype == bool for mask_HW in masks)
  single = clipseg.masks(pictures[:1], [0], TEXTS[:1], 0.3)
  np.testing.assert_array_equal(masks[0], single[0])


def test_clipseg_shows_where_the_phrase_is_likely(clipseg, pictures):
  processor = transformers.CLIPSegProcessor(
    clipseg.processor, clipseg.tokenizer
  )
  inputs = processor(text=[TEXTS[1]], images=[pictures[1]], return_tensors='pt')
  with torch.no_grad():
    logits = clipseg.model(**inputs).logits.reshape(1, 1, SIDE, SIDE)
  wide_HW = torch.nn.functional.interpolate(
    logits, pictures[1].size[::-1], mode='bilinear'
  )[0, 0]
  (got_HW,) = clipseg.masks(pictures, [1], TEXTS[1:2], 0.3)
  assert 0 < got_HW.mean() < 1
  want_HW = (wide_HW.sigmoid() > 0.5).numpy()
  assert (got_HW == want_HW).mean() > 0.99  # rounding at a half


def test_what_is_no_judge_is_refused(tmp_path, clip):
  assert judges.grounder('clip', '', clip) is clip
  for name, path, says in (
    ('sam', '', "'sam'"),
    ('dino', '', 'DINO,SAM'),
    ('dino', 'one', 'DINO,SAM'),
    ('clipseg', '', 'grounder_path'),
    ('clipseg', str(tmp_path), 'no model folder'),
    ('clip', str(tmp_path), 'no model folder'),
  ):
    with pytest.raises(ValueError, match=says):
      judges.grounder(name, path, clip)
