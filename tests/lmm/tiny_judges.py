"""CLIP, CLIPSeg, Grounding DINO and SAM, tiny and of random weights."""

import tokenizers
import torch
import transformers
from transformers.models.clip import image_processing_pil_clip
from transformers.models.sam import image_processing_pil_sam
from transformers.models.vit import image_processing_pil_vit

from tests.lmm import tiny_llava

SIDE = 16  # of what CLIP and CLIPSeg see, 4 x 4 patches


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


def save_clipseg(path):
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
  # a judge runs in float32 whatever its file holds
  model = transformers.CLIPSegForImageSegmentation(config)
  model.to(torch.bfloat16).save_pretrained(path)
  save_tokenizer(path)
  image_processing_pil_vit.ViTImageProcessorPil(
    size={'height': SIDE, 'width': SIDE}
  ).save_pretrained(path)
  return path


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
  transformers.SamModel(config).to(torch.bfloat16).save_pretrained(path)
  image_processing_pil_sam.SamImageProcessorPil(
    size={'longest_edge': 32},
    pad_size={'height': 32, 'width': 32},
    mask_size={'longest_edge': 8},
    mask_pad_size={'height': 8, 'width': 8},
  ).save_pretrained(path)
