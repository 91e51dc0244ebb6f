"""Models that judge an explanation: what fits an image, and where it is.

clip     CLIPModel: 100 * cos(image, text); and, patch by patch, a segmenter
dino     Grounding DINO draws boxes, SAM fills them (arXiv 2411.14982)
clipseg  CLIPSeg, lighter than dino

A folder of CLIP may hold a judge.json with the fields of `PatchRule`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn import functional
from transformers.models.clip import image_processing_pil_clip
from transformers.models.vit import image_processing_pil_vit

from lmm_sae.lmm.dino_sam import DinoSam, model_folder

GROUNDERS = ('clip', 'dino', 'clipseg')
BATCH = 32  # images, or pairs, a forward


class Grounder(Protocol):
  """Finds phrases in images."""

  def masks(
    self,
    images: Sequence[Image.Image],
    index: Sequence[int],
    phrases: Sequence[str],
    box_threshold: float,
  ) -> list[np.ndarray]:
    """A mask bool [H, W] for each pair (images[index[i]], phrases[i])."""


@dataclasses.dataclass(frozen=True)
class PatchRule:
  """How CLIP's patches are compared with a phrase.

  A patch shows the phrase if cos(patch, phrase), less the mean of
  cos(patch, neutral) over the neutral texts, exceeds the threshold.

  Attributes:
    patch_embedding: `value`: the last layer's value and output projections
      alone, without mixing of patches (MaskCLIP, arXiv 2112.01071);
      `last_hidden`: the last hidden state, for a CLIP trained patch by patch.
    template: what a phrase is put into.
    neutral: texts that fit any patch; (): nothing is subtracted.
    scales: the image is also seen in s x s crops for every s; maps are averaged
      on the finest grid.
  """

  patch_embedding: str
  threshold: float
  template: str = '{}'
  neutral: tuple[str, ...] = ()
  scales: tuple[int, ...] = (1,)

  def __post_init__(self):
    if self.patch_embedding not in ('value', 'last_hidden'):
      raise ValueError(
        f'judge.json: patch_embedding {self.patch_embedding!r} is neither '
        'value nor last_hidden'
      )


# For a CLIP that comes without a rule.
MASK_CLIP = PatchRule(
  patch_embedding='value',
  threshold=0.02,
  template='a photo of a {}.',
  neutral=('a photo of something.', 'a background.'),
  scales=(1, 2),
)


class Clip:
  """CLIP as judge of whole images and as segmenter."""

  def __init__(self, path: str | pathlib.Path, device: str = 'cpu'):
    path = model_folder(path, 'score.clip_path')
    self.model = transformers.CLIPModel.from_pretrained(path).to(device).eval()
    self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    self.processor = (
      image_processing_pil_clip.CLIPImageProcessorPil.from_pretrained(path)
    )
    rule = path / 'judge.json'
    self.rule = _rule(rule) if rule.exists() else MASK_CLIP

  @torch.no_grad()
  def score(
    self,
    images: Sequence[Image.Image],
    index: Sequence[int],
    texts: Sequence[str],
  ) -> np.ndarray:
    """100 * cos of each pair (images[index[i]], texts[i]), float32 [B]."""
    seen_ID = torch.cat(
      [
        self.model.get_image_features(
          pixel_values=self._pixels(images[at : at + BATCH])
        ).pooler_output
        for at in range(0, len(images), BATCH)
      ]
      or [torch.zeros(0, self.model.projection_dim)]
    )
    seen_ID = functional.normalize(seen_ID, dim=-1)
    text_BD = self._texts(texts)
    score_B = 100 * (seen_ID[torch.tensor(index, dtype=int)] * text_BD).sum(-1)
    return score_B.float().cpu().numpy()

  @torch.no_grad()
  def masks(self, images, index, phrases, box_threshold) -> list[np.ndarray]:
    """See Grounder; box_threshold says nothing here."""
    del box_threshold
    rule = self.rule
    patch_IHWD = self._patches(images)
    phrase_BD = self._texts([rule.template.format(p) for p in phrases])
    if rule.neutral:
      phrase_BD = phrase_BD - self._texts(rule.neutral).mean(0)
    found = []
    for at, text_D in zip(index, phrase_BD, strict=True):
      heat_HW = patch_IHWD[at] @ text_D
      heat_HW = functional.interpolate(
        heat_HW[None, None],
        images[at].size[::-1],
        mode='bilinear',
        align_corners=False,
      )[0, 0]
      found.append((heat_HW > rule.threshold).cpu().numpy())
    return found

  def _pixels(self, images: Sequence[Image.Image], **how) -> torch.Tensor:
    pixels = self.processor(list(images), return_tensors='pt', **how)
    return pixels['pixel_values'].to(self.model.device, self.model.dtype)

  def _texts(self, texts: Sequence[str]) -> torch.Tensor:
    """Unit embeddings [B, D]; each distinct text is read once."""
    distinct = list(dict.fromkeys(texts))
    parts = []
    for at in range(0, len(distinct), BATCH):
      tokens = self.tokenizer(
        distinct[at : at + BATCH],
        padding=True,
        truncation=True,
        max_length=self.model.config.text_config.max_position_embeddings,
        return_tensors='pt',
      ).to(self.model.device)
      out = self.model.get_text_features(
        input_ids=tokens['input_ids'], attention_mask=tokens['attention_mask']
      )
      parts.append(functional.normalize(out.pooler_output, dim=-1))
    place = {text: i for i, text in enumerate(distinct)}
    return torch.cat(parts)[[place[text] for text in texts]]

  def _patches(self, images: Sequence[Image.Image]) -> torch.Tensor:
    """Unit patch embeddings [images, H, W, D] on the finest scale's grid."""
    finest, total = max(self.rule.scales), 0
    for scale in self.rule.scales:
      crops = [crop for image in images for crop in _crops(image, scale)]
      side = self.model.config.vision_config.image_size
      squares = [crop.resize((side, side), Image.BICUBIC) for crop in crops]
      parts = [
        self._patch_embeddings(
          self._pixels(
            squares[at : at + BATCH], do_resize=False, do_center_crop=False
          )
        )
        for at in range(0, len(squares), BATCH)
      ]
      patch_BHWD = functional.normalize(torch.cat(parts), dim=-1)
      _, rows, cols, width = patch_BHWD.shape
      grid = patch_BHWD.reshape(-1, scale, scale, rows, cols, width)
      grid = grid.permute(0, 5, 1, 3, 2, 4).flatten(2, 3).flatten(3, 4)
      total = total + functional.interpolate(
        grid, (finest * rows, finest * cols), mode='bilinear'
      )
    return (total / len(self.rule.scales)).permute(0, 2, 3, 1)

  def _patch_embeddings(self, pixels: torch.Tensor) -> torch.Tensor:
    """Projected patches [B, H, W, D] of square images."""
    vision = self.model.vision_model
    out = vision(pixel_values=pixels, output_hidden_states=True)
    if self.rule.patch_embedding == 'last_hidden':
      x_BPD = out.last_hidden_state
    else:
      last = vision.encoder.layers[-1]
      x_BPD = last.layer_norm1(out.hidden_states[-2])
      x_BPD = last.self_attn.out_proj(last.self_attn.v_proj(x_BPD))
    x_BPD = self.model.visual_projection(vision.post_layernorm(x_BPD[:, 1:]))
    side = round(x_BPD.shape[1] ** 0.5)
    return x_BPD.unflatten(1, (side, side))


def _rule(path: pathlib.Path) -> PatchRule:
  fields = json.loads(path.read_text())
  tuples = {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
  try:
    return PatchRule(**fields | tuples)
  except TypeError as error:
    raise ValueError(f'{path}: {error}') from error


def _crops(image: Image.Image, scale: int) -> list[Image.Image]:
  """The image cut into scale x scale, row by row."""
  xs = [round(i * image.width / scale) for i in range(scale + 1)]
  ys = [round(i * image.height / scale) for i in range(scale + 1)]
  return [
    image.crop((xs[j], ys[i], xs[j + 1], ys[i + 1]))
    for i in range(scale)
    for j in range(scale)
  ]


class ClipSeg:
  """CLIPSeg: a mask where the phrase's probability exceeds a half."""

  def __init__(self, path: str | pathlib.Path, device: str = 'cpu'):
    path = model_folder(path, 'score.grounder_path')
    model = transformers.CLIPSegForImageSegmentation.from_pretrained(
      path, dtype=torch.float32
    )
    self.model = model.to(device).eval()
    self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    self.processor = (
      image_processing_pil_vit.ViTImageProcessorPil.from_pretrained(path)
    )

  @torch.no_grad()
  def masks(self, images, index, phrases, box_threshold) -> list[np.ndarray]:
    """See Grounder; box_threshold says nothing here."""
    del box_threshold
    found: list[np.ndarray] = []
    for at in range(0, len(phrases), BATCH):
      chosen = [images[i].convert('RGB') for i in index[at : at + BATCH]]
      tokens = self.tokenizer(
        list(phrases[at : at + BATCH]),
        padding=True,
        truncation=True,
        max_length=self.model.config.text_config.max_position_embeddings,
        return_tensors='pt',
      )
      pixels = self.processor(chosen, return_tensors='pt')['pixel_values']
      out = self.model(
        input_ids=tokens['input_ids'].to(self.model.device),
        attention_mask=tokens['attention_mask'].to(self.model.device),
        pixel_values=pixels.to(self.model.device),
      )
      logits_BHW = out.logits.reshape(len(chosen), *out.logits.shape[-2:])
      for image, logits_HW in zip(chosen, logits_BHW, strict=True):
        wide_HW = functional.interpolate(
          logits_HW[None, None],
          image.size[::-1],
          mode='bilinear',
          align_corners=False,
        )[0, 0]
        found.append((wide_HW > 0).cpu().numpy())
    return found


def grounder(name: str, path: str, clip: Clip, device: str = 'cpu') -> Grounder:
  """The grounder of that name; `path` as in score.grounder_path."""
  if name not in GROUNDERS:
    raise ValueError(f'score.grounder {name!r} is none of {GROUNDERS}')
  if name == 'clip':
    return Clip(path, device) if path else clip
  if not path:
    raise ValueError(
      f'score.grounder {name} has no packaged model: give its folder'
      f'{"s, DINO,SAM," if name == "dino" else ""} as score.grounder_path'
    )
  if name == 'clipseg':
    return ClipSeg(path, device)
  dino, comma, sam = path.partition(',')
  if not comma:
    raise ValueError(f'score.grounder_path {path!r} is not DINO,SAM folders')
  return DinoSam(dino.strip(), sam.strip(), device)
