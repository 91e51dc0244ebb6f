"""Grounding DINO and SAM, held against transformers' own, and the server."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from lmm_sae.core.remote import SubjectClient
from lmm_sae.lmm import dino_sam, judges
from lmm_sae.lmm.service import Service
from tests.lmm import tiny_judges
from tests.lmm.serving import running

TEXTS = ('a red cat', 'blue', 'a red cat')


@pytest.fixture(scope='module')
def pictures() -> list[Image.Image]:
  rng = np.random.default_rng(0)
  return [
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
    for size in ((16, 16), (20, 30))
  ]


@pytest.fixture(scope='module')
def clip(tmp_path_factory) -> judges.Clip:
  path = tmp_path_factory.mktemp('judges') / 'clip'
  return judges.Clip(tiny_judges.save_clip(path))


@pytest.fixture(scope='module')
def clipseg(tmp_path_factory) -> judges.ClipSeg:
  path = tmp_path_factory.mktemp('judges') / 'clipseg'
  return judges.ClipSeg(tiny_judges.save_clipseg(path))


@pytest.fixture(scope='module')
def dino(tmp_path_factory):
  folder = tmp_path_factory.mktemp('judges')
  tiny_judges.save_dino(folder / 'dino')
  tiny_judges.save_sam(folder / 'sam')
  return judges.grounder('dino', f'{folder / "dino"},{folder / "sam"}', None)


def test_sam_fills_the_boxes_of_dino(dino, pictures):
  everywhere, nowhere = (
    dino.masks(pictures, [0, 1], TEXTS[:2], threshold)
    for threshold in (0.0, 1.0)
  )
  assert [m.shape for m in everywhere] == [(16, 16), (20, 30)]
  assert not any(mask_HW.any() for mask_HW in nowhere)
  assert all(mask_HW.dtype == bool for mask_HW in everywhere + nowhere)


def test_boxes_are_those_of_the_processor_of_transformers(dino, pictures):
  """Several phrases of one picture, read together, as each alone."""
  processor = transformers.GroundingDinoProcessor(
    dino.processor, dino.tokenizer
  )
  phrases = ('Red cat', ' blue. ', 'a striped red thing on the left')
  levels = []
  for phrase in phrases:
    text = phrase.lower().strip().rstrip('.') + '.'
    inputs = processor(images=pictures[1], text=text, return_tensors='pt')
    with torch.no_grad():
      out = dino.dino(**inputs)
    scores = out.logits[0].sigmoid().amax(-1).sort().values
    levels.append(float(scores[2:4].mean()))  # two of five boxes are above
  for phrase, level in zip(phrases, levels, strict=True):
    got = dino._boxes(pictures[1], phrases, level)
    text = phrase.lower().strip().rstrip('.') + '.'
    inputs = processor(images=pictures[1], text=text, return_tensors='pt')
    with torch.no_grad():
      out = dino.dino(**inputs)
    (want,) = processor.post_process_grounded_object_detection(
      out,
      inputs['input_ids'],
      threshold=level,
      text_threshold=0.25,
      target_sizes=[pictures[1].size[::-1]],
    )
    assert len(want['boxes']) == 2
    torch.testing.assert_close(
      got[phrases.index(phrase)], want['boxes'], atol=1e-4, rtol=1e-4
    )


def test_masks_are_those_of_sam_on_the_picture_itself(
  dino, pictures, monkeypatch
):
  """Boxes of several phrases, some without, filled in two parts."""
  monkeypatch.setattr(dino_sam, 'SAM_BOXES', 2)
  groups = [
    torch.tensor([[1.0, 2, 20, 15], [3, 3, 9, 9]]),
    torch.zeros(0, 4),
    torch.tensor([[0.0, 0, 30, 20]]),
  ]
  got = dino._fill(pictures[1], groups)
  assert not got[1].any()
  for mask_HW, boxes_N4 in zip(got, groups, strict=True):
    want_HW = np.zeros((20, 30), bool)
    for box in boxes_N4.tolist():
      inputs = dino.sam_processor(
        pictures[1], input_boxes=[[box]], return_tensors='pt'
      )
      inputs['input_boxes'] = inputs['input_boxes'].float()
      with torch.no_grad():
        out = dino.sam(
          **{k: inputs[k] for k in ('pixel_values', 'input_boxes')},
          multimask_output=False,
        )
      (filled,) = dino.sam_processor.post_process_masks(
        out.pred_masks,
        inputs['original_sizes'],
        inputs['reshaped_input_sizes'],
      )
      want_HW |= filled[0, 0].numpy()
    np.testing.assert_array_equal(mask_HW, want_HW)
  assert got[0].any() or got[2].any()


def test_pairs_in_any_order_are_as_each_alone(dino, pictures):
  index, phrases = [1, 0, 1, 0], ['red', 'blue thing', 'blue thing', '']
  got = dino.masks(pictures, index, phrases, 0.0)
  for mask_HW, at, phrase in zip(got, index, phrases, strict=True):
    (alone_HW,) = dino.masks([pictures[at]], [0], [phrase], 0.0)
    assert (mask_HW == alone_HW).mean() > 0.99  # sums in another order


def test_a_phrase_longer_than_the_judges_read_is_cut(dino, clipseg, pictures):
  for judge in (dino, clipseg):
    (mask_HW,) = judge.masks(pictures[:1], [0], ['red ' * 600], 0.1)
    assert mask_HW.shape == (16, 16)


def test_the_server_gives_what_the_judges_give(
  dino, clipseg, clip, pictures, subject
):
  service = Service(
    subject, {}, clip, {'dino': dino, 'clipseg': clipseg, 'clip': clip}
  )
  chosen = [pictures[0], pictures[1], pictures[1]]
  index = [0, 1, 1]
  with running(service) as url, SubjectClient(url, timeout_s=60) as client:
    assert client.info()['judges'] == ['dino', 'clipseg', 'clip']
    for name, judge in (('dino', dino), ('clipseg', clipseg), ('clip', clip)):
      got = client.ground(chosen, TEXTS, box_threshold=0.2, judge=name)
      want = judge.masks(pictures, index, TEXTS, 0.2)
      for one_HW, other_HW in zip(got, want, strict=True):
        np.testing.assert_array_equal(one_HW, other_HW)
    np.testing.assert_array_equal(
      client.ground(chosen[:1], TEXTS[:1], box_threshold=0.2)[0],
      dino.masks(pictures, [0], TEXTS[:1], 0.2)[0],
    )  # the first one served is the default
    np.testing.assert_allclose(
      client.clip(chosen, TEXTS), clip.score(pictures, index, TEXTS), rtol=1e-5
    )
