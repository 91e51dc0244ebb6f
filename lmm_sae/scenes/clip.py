"""Makes the CLIP judge on a trained LMM's vision trunk.

    python -m lmm_sae.scenes.clip --model=DIR --out=DIR

The trunk is frozen; the last ViT layer (which the LMM does not read), the
projections and a two-layer text tower learn to say which labels hold of a
picture (its class token) and of a patch (every other token), by the pairwise
sigmoid loss of SigLIP (Zhai et al. 2023, arXiv 2303.15343). So a label grounds
itself: its mask is where the patch's cosine exceeds the loss's own threshold.
"""

import argparse
import json
import os
import pathlib

import numpy as np
import torch
import transformers
from absl import logging
from tokenizers import processors
from torch import Tensor
from torch.nn import functional as F

from lmm_sae.scenes import batches, lean, model, questions, render

END = '<|assistant|>'  # pooled token of the text tower
STEPS = 900
IMAGES = 24
LABELS = 40


def make_clip(trunk) -> transformers.CLIPModel:
  """A CLIPModel whose vision tower starts as the trunk."""
  vision = transformers.CLIPVisionConfig(**trunk.config.to_dict())
  text = transformers.CLIPTextConfig(
    vocab_size=model.VOCABULARY,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=model.PAD,
    bos_token_id=model.BOS,
    eos_token_id=model.ASSISTANT,
  )
  config = transformers.CLIPConfig(
    vision_config=vision.to_dict(),
    text_config=text.to_dict(),
    projection_dim=128,
  )
  clip = transformers.CLIPModel(config)
  clip.vision_model.load_state_dict(trunk.state_dict(), strict=False)
  return clip


def make_processor() -> transformers.CLIPProcessor:
  from transformers.models.clip import image_processing_pil_clip

  tokenizer = model.make_tokenizer()
  tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
    single=f'$A {END}', special_tokens=[(END, model.ASSISTANT)]
  )
  tokenizer.padding_side = 'right'
  tokenizer.chat_template = None
  side = {'height': model.VIEW, 'width': model.VIEW}
  pixels = image_processing_pil_clip.CLIPImageProcessorPil(
    size=side,
    crop_size=side,
    image_mean=[0.5] * 3,
    image_std=[0.25] * 3,
  )
  return transformers.CLIPProcessor(image_processor=pixels, tokenizer=tokenizer)


def embed(clip, trunk_BTD: Tensor) -> tuple[Tensor, Tensor]:
  """Unit image [B, 128] and patch [B, 64, 128] embeddings of trunk outputs."""
  x = lean.vision_layer(clip.vision_model.encoder.layers[-1], trunk_BTD)
  x = clip.visual_projection(clip.vision_model.post_layernorm(x))
  x = F.normalize(x, dim=-1)
  return x[:, 0], x[:, 1:]


def embed_text(clip, processor, labels: list[str]) -> Tensor:
  """Unit embeddings [labels, 128]."""
  inputs = processor.tokenizer(labels, padding=True, return_tensors='pt')
  pooled = clip.text_model(
    input_ids=inputs['input_ids'], attention_mask=inputs['attention_mask']
  ).pooler_output
  return F.normalize(clip.text_projection(pooled), dim=-1)


def draw(rng: np.random.Generator):
  """Pixels, labels, which hold of a picture [B, L], which of a patch [B, P, L].

  Of a patch the value is 1, 0, or -1 (not asked: touched, yet less than a
  quarter covered).
  """
  scenes = [render.sample(rng) for _ in range(IMAGES)]
  labels = [questions.BACKGROUND]
  while len(labels) < LABELS:
    scene = scenes[rng.integers(IMAGES)]
    thing = scene.objects[rng.integers(len(scene.objects))]
    label = questions.any_label(rng)
    if rng.random() < 0.75:
      label = questions.label_of(thing, rng)
    if label not in labels and label not in render.PLACES:
      labels.append(label)
  of_image = np.zeros((IMAGES, LABELS), np.float32)
  of_patch = np.zeros((IMAGES, model.CELLS**2, LABELS), np.float32)
  for i, scene in enumerate(scenes):
    covered = scene.coverage().reshape(len(scene.objects), -1)
    for j, label in enumerate(labels):
      if label == questions.BACKGROUND:
        of_patch[i, :, j] = covered.max(0) < 0.02
        of_image[i, j] = 1
        continue
      fits = [questions.fits(thing, label) for thing in scene.objects]
      of_image[i, j] = any(fits)
      if any(fits):
        share = covered[fits].max(0)
        of_patch[i, :, j] = np.where(
          share >= 0.25, 1, np.where(share > 0.02, -1, 0)
        )
  pictures = [batches.picture(scene, model.VIEW, None) for scene in scenes]
  pixels = batches.normalise(np.stack([np.asarray(p) for p in pictures]))
  return pixels, labels, of_image, of_patch


def loss_of(cosine: Tensor, target: Tensor, scale: Tensor, bias: Tensor):
  """Balanced sigmoid loss; targets of -1 are left out."""
  asked = target >= 0
  logits, target = (cosine * scale.exp() + bias)[asked], target[asked]
  losses = F.binary_cross_entropy_with_logits(logits, target, reduction='none')
  return losses[target > 0].mean() + losses[target == 0].mean() * 3


def run(folder: pathlib.Path, out: pathlib.Path, steps: int, seed: int) -> None:
  """Trains and writes the folder, with `judge.json` beside the weights."""
  torch.manual_seed(seed)
  lmm = transformers.LlavaNextForConditionalGeneration.from_pretrained(
    folder, dtype=torch.float32, local_files_only=True
  )
  clip = make_clip(lmm.model.vision_tower)
  processor = make_processor()
  scale = torch.nn.Parameter(torch.tensor([2.3, 2.3]))
  bias = torch.nn.Parameter(torch.tensor([-5.0, -5.0]))
  learned = [
    *clip.vision_model.encoder.layers[-1].parameters(),
    *clip.vision_model.post_layernorm.parameters(),
    *clip.visual_projection.parameters(),
    *clip.text_model.parameters(),
    *clip.text_projection.parameters(),
    scale,
    bias,
  ]
  optimiser = torch.optim.AdamW(learned, lr=2e-3, weight_decay=0.01)
  schedule = torch.optim.lr_scheduler.LambdaLR(
    optimiser, lambda step: min((step + 1) / 50, (steps - step) / steps)
  )
  for step in range(steps):
    rng = np.random.default_rng([batches.WEIGHTS_SEED, seed, ord('k'), step])
    pixels, labels, of_image, of_patch = draw(rng)
    with torch.no_grad():
      trunk = lean.vision(clip.vision_model, torch.from_numpy(pixels))
    image, patch = embed(clip, trunk)
    words = embed_text(clip, processor, labels)
    whole = loss_of(
      image @ words.T, torch.from_numpy(of_image), scale[0], bias[0]
    )
    local = loss_of(
      patch @ words.T, torch.from_numpy(of_patch), scale[1], bias[1]
    )
    optimiser.zero_grad()
    (whole + local).backward()
    optimiser.step()
    schedule.step()
    if step % 50 == 0 or step == steps - 1:
      logging.info(
        'step %d of %d: image %.3f, patch %.3f', step, steps, whole, local
      )
  clip.logit_scale.data.copy_(scale[0].detach())
  model.save(clip, processor, out)
  threshold = float(-bias[1] / scale[1].exp())
  judge = {'patch_embedding': 'last_hidden', 'threshold': threshold}
  (out / 'judge.json').write_text(json.dumps(judge, indent=1) + '\n')


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--model', type=pathlib.Path, required=True)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--steps', type=int, default=STEPS)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--threads', type=int, default=os.cpu_count())
  args = parser.parse_args()
  logging.set_verbosity(logging.INFO)
  torch.set_num_threads(args.threads)
  run(args.model, args.out, args.steps, args.seed)


if __name__ == '__main__':
  main()
