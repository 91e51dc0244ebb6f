"""The judges on tiny models of random weights: shapes, pairs, thresholds."""

import json

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from transformers.models.clip import image_processing_pil_clip
from transformers.models.sam import image_processing_pil_sam
from transformers.models.vit import image_processing_pil_vit

from lmm_sae.lmm import judges
from tests.lmm import tiny_llava

SIDE = 16
TEXTS = ('a red cat', 'blue', 'a red cat')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A CLIP of random weights, 16 px views of 4 x 4 patches."""
  return save_clip(tmp_path_factory.mktemp('judges') / 'clip')


def save_clip(path):
  text, vision = small_text(), small_vision()
  config = transformers.CLIPConfig(
    text_config=text, vision_config=vision, projection_dim=10
  )
  torch.manual_seed(0)
  transformers.CLIPModel(config).save_pretrained(path)
  save_tokenizer(path)
  image_processing_pil_clip.CLIPImageProcessorPil(
    size={'shortest_edge': SIDE}, crop_size={'height': SIDE, 'width': SIDE}
  ).save_pretrained(path)
  return path


def small_text():
  return {
    'vocab_size': 400,
    'hidden_size': 8,
    'intermediate_size': 12,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'max_position_embeddings': 12,
    'bos_token_id': 0,
    'eos_token_id': 1,
    'initializer_range': 0.5,
  }


def small_vision():
  return {
    'hidden_size': 12,
    'intermediate_size': 16,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'image_size': SIDE,
    'patch_size': 4,
    'initializer_range': 0.5,
  }


def save_tokenizer(path):
  tokenizer = tiny_llava._tokenizer('')
  tokenizer.padding_side = 'right'
  tokenizer.backend_tokenizer.post_processor = (
    tokenizers.processors.TemplateProcessing(
      single='<|bos|> $A <|eot|>',
      special_tokens=[('<|bos|>', 0), ('<|eot|>', 1)],
    )
  )
  tokenizer.save_pretrained(path)


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
  path = save_clip(tmp_path / 'clip')
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


def test_clipseg_gives_a_mask_a_pair(tmp_path, pictures):
  config = transformers.CLIPSegConfig(
    text_config=small_text(),
    vision_config=small_vision(),
    projection_dim=8,
    extract_layers=[0, 1],
    reduce_dim=4,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=8,
    conditional_layer=0,
    initializer_range=0.5,
  )
  torch.manual_seed(0)
  path = tmp_path / 'clipseg'
  transformers.CLIPSegForImageSegmentation(config).save_pretrained(path)
  save_tokenizer(path)
  image_processing_pil_vit.ViTImageProcessorPil(
    size={'height': SIDE, 'width': SIDE}
  ).save_pretrained(path)
  clipseg = judges.grounder('clipseg', str(path), None)
  masks = clipseg.masks(pictures, [0, 1, 1], TEXTS, 0.3)
  assert [m.shape for m in masks] == [(16, 16), (20, 30), (20, 30)]
  assert all(mask_HW.dtype == bool for mask_HW in masks)
  single = clipseg.masks(pictures[:1], [0], TEXTS[:1], 0.3)
  np.testing.assert_array_equal(masks[0], single[0])


def test_sam_fills_the_boxes_of_dino(tmp_path, pictures, monkeypatch):
  save_dino(tmp_path / 'dino')
  save_sam(tmp_path / 'sam')
  path = f'{tmp_path / "dino"},{tmp_path / "sam"}'
  judge = judges.grounder('dino', path, None)
  everywhere, nowhere = (
    judge.masks(pictures, [0, 1], TEXTS[:2], threshold)
    for threshold in (0.0, 1.0)
  )
  assert [m.shape for m in everywhere] == [(16, 16), (20, 30)]
  assert not any(mask_HW.any() for mask_HW in nowhere)
  boxes_N4 = judge._boxes(pictures[1], 'Red cat', 0.0)
  assert boxes_N4.shape == (5, 4)


def save_dino(path):
  config = transformers.GroundingDinoConfig(
    backbone_config=transformers.SwinConfig(
      image_size=32,
      patch_size=4,
      embed_dim=8,
      depths=[1, 1],
      num_heads=[1, 1],
      window_size=2,
      out_features=['stage1', 'stage2'],
    ),
    text_config=transformers.BertConfig(
      vocab_size=400,
      hidden_size=8,
      num_hidden_layers=1,
      num_attention_heads=1,
      intermediate_size=8,
    ),
    d_model=32,
    encoder_layers=1,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=8,
    decoder_ffn_dim=8,
    num_queries=5,
    num_feature_levels=2,
    max_text_len=24,
  )
  torch.manual_seed(0)
  transformers.GroundingDinoForObjectDetection(config).save_pretrained(path)
  save_tokenizer(path)
  pil = transformers.models.grounding_dino.image_processing_pil_grounding_dino
  pil.GroundingDinoImageProcessorPil(
    size={'shortest_edge': 32, 'longest_edge': 48}
  ).save_pretrained(path)


def save_sam(path):
  config = transformers.SamConfig(
    vision_config={
      'hidden_size': 8,
      'mlp_dim': 8,
      'num_hidden_layers': 1,
      'num_attention_heads': 1,
      'image_size': 32,
      'patch_size': 8,
      'output_channels': 8,
      'global_attn_indexes': [0],
      'num_pos_feats': 4,
      'window_size': 2,
    },
    prompt_encoder_config={
      'hidden_size': 8,
      'image_size': 32,
      'patch_size': 8,
      'mask_input_channels': 4,
    },
    mask_decoder_config={
      'hidden_size': 8,
      'mlp_dim': 8,
      'num_hidden_layers': 1,
      'num_attention_heads': 2,
      'attention_downsample_rate': 1,
      'iou_head_hidden_dim': 8,
    },
  )
  torch.manual_seed(0)
  transformers.SamModel(config).save_pretrained(path)
  image_processing_pil_sam.SamImageProcessorPil(
    size={'longest_edge': 32},
    pad_size={'height': 32, 'width': 32},
    mask_size={'longest_edge': 8},
    mask_pad_size={'height': 8, 'width': 8},
  ).save_pretrained(path)


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
