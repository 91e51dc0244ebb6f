"""Grounding DINO draws boxes about phrases, SAM fills them."""

import pathlib
from collections.abc import Sequence

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.grounding_dino import (
  image_processing_pil_grounding_dino,
)
from transformers.models.sam import image_processing_pil_sam

DINO_BATCH = 8  # phrases that Grounding DINO reads at once
SAM_BOXES = 64  # boxes that SAM fills at once


class DinoSam:
  """Boxes by Grounding DINO, filled by SAM; their union is the mask.

  As in arXiv 2411.14982: a box counts where one of its words exceeds the box
  threshold (a threshold of text only names boxes), and SAM gives one mask a
  box. Both run in float32 whatever their files hold: boxes hang on thresholds.
  """

  def __init__(self, dino: str, sam: str, device: str = 'cpu'):
    dino = model_folder(dino, 'score.grounder_path')
    sam = model_folder(sam, 'score.grounder_path')
    self.dino = transformers.GroundingDinoForObjectDetection.from_pretrained(
      dino, dtype=torch.float32
    )
    self.sam = transformers.SamModel.from_pretrained(sam, dtype=torch.float32)
    self.tokenizer = transformers.AutoTokenizer.from_pretrained(dino)
    pil = image_processing_pil_grounding_dino.GroundingDinoImageProcessorPil
    self.processor = pil.from_pretrained(dino)
    self.sam_processor = transformers.SamProcessor(
      image_processing_pil_sam.SamImageProcessorPil.from_pretrained(sam)
    )
    self.device = device
    for model in (self.dino, self.sam):
      model.to(device).eval()

  @torch.no_grad()
  def masks(self, images, index, phrases, box_threshold) -> list[np.ndarray]:
    """See Grounder. Phrases of one image are read together, and SAM sees the
    image once."""
    found: dict[int, np.ndarray] = {}
    for at in dict.fromkeys(index):
      mine = [i for i, each in enumerate(index) if each == at]
      boxes = self._boxes(
        images[at].convert('RGB'), [phrases[i] for i in mine], box_threshold
      )
      filled = self._fill(images[at].convert('RGB'), boxes)
      found |= zip(mine, filled, strict=True)
    return [found[i] for i in range(len(index))]

  def _boxes(
    self, image: Image.Image, phrases: Sequence[str], threshold: float
  ) -> list[torch.Tensor]:
    """Boxes (x0, y0, x1, y1) in pixels, [N, 4] a phrase."""
    pixels = self.processor(image, return_tensors='pt')
    boxes: list[torch.Tensor] = []
    for at in range(0, len(phrases), DINO_BATCH):
      # as it was trained: in lower case, a full stop after it
      texts = [
        phrase.lower().strip().rstrip('.') + '.'
        for phrase in phrases[at : at + DINO_BATCH]
      ]
      tokens = self.tokenizer(
        texts,
        padding=True,
        truncation=True,
        max_length=self.dino.config.max_text_len,
        return_tensors='pt',
      )
      seen = {
        name: pixels[name].expand(len(texts), *pixels[name].shape[1:])
        for name in ('pixel_values', 'pixel_mask')
      }
      inputs = {
        name: value.to(self.device)
        for name, value in {**seen, **tokens}.items()
      }
      out = self.dino(**inputs)
      score_BN = out.logits.sigmoid().amax(-1)
      for keep_N, box_N4 in zip(
        score_BN > threshold, out.pred_boxes, strict=True
      ):
        x_N, y_N, w_N, h_N = box_N4[keep_N].unbind(-1)
        corners_N4 = torch.stack(
          [x_N - w_N / 2, y_N - h_N / 2, x_N + w_N / 2, y_N + h_N / 2], -1
        )
        boxes.append(corners_N4.cpu() * torch.tensor(image.size * 2))
    return boxes

  def _fill(
    self, image: Image.Image, boxes: Sequence[torch.Tensor]
  ) -> list[np.ndarray]:
    """The union of the masks of each group of boxes, bool [H, W]."""
    empty_HW = np.zeros(image.size[::-1], bool)
    if not any(map(len, boxes)):
      return [empty_HW.copy() for _ in boxes]
    every_N4 = torch.cat(list(boxes))
    inputs = self.sam_processor(
      image, input_boxes=[every_N4.tolist()], return_tensors='pt'
    )
    seen = self.sam.get_image_embeddings(inputs['pixel_values'].to(self.device))
    parts = []
    for at in range(0, len(every_N4), SAM_BOXES):
      some = inputs['input_boxes'][:, at : at + SAM_BOXES]
      out = self.sam(
        image_embeddings=seen,
        input_boxes=some.to(self.device, torch.float32),
        multimask_output=False,
      )
      masks = self.sam_processor.image_processor.post_process_masks(
        out.pred_masks.cpu(),
        inputs['original_sizes'],
        inputs['reshaped_input_sizes'],
      )[0]
      parts.append(masks.flatten(0, 1).numpy())
    filled_NHW = np.concatenate(parts)
    ends = np.cumsum([len(some) for some in boxes])
    return [
      filled_NHW[end - len(some) : end].any(0) if len(some) else empty_HW.copy()
      for end, some in zip(ends, boxes, strict=True)
    ]


def model_folder(path: str | pathlib.Path, field: str) -> pathlib.Path:
  path = pathlib.Path(path)
  if not (path / 'config.json').is_file():
    raise ValueError(f'{field}: {path} is no model folder (no config.json)')
  return path
