"""The packaged models are what their cards say."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
import transformers

from lmm_sae.scenes import accuracy, batches, clip, model, questions, render

NAMES = ('small', 'base', 'clip')


@pytest.mark.parametrize('name', NAMES)
def test_the_weights_have_the_hash_of_their_card(name):
  folder = model.WEIGHTS / name
  card = (folder / 'README.md').read_text(encoding='utf-8')
  digest = hashlib.sha256((folder / 'model.safetensors').read_bytes())
  assert re.findall(r'\b[0-9a-f]{64}\b', card) == [digest.hexdigest()]
  assert 'Apache-2.0' in card


def test_all_weights_together_stay_below_24_mb():
  files = [path for path in model.WEIGHTS.rglob('*') if path.is_file()]
  assert sum(path.stat().st_size for path in files) < 24e6


@pytest.mark.parametrize('name', ['small', 'base'])
def test_the_packaged_tokenizer_is_the_recipes(name):
  packaged = transformers.AutoTokenizer.from_pretrained(model.WEIGHTS / name)
  text = 'is the red face left or right of it? above CONCEPT: letter T'
  assert tuple(packaged(text)['input_ids']) == batches.tokens(text)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['small', 'base'])
def test_the_card_tells_the_accuracy_that_is_measured(name):
  folder = model.WEIGHTS / name
  card = (folder / 'README.md').read_text(encoding='utf-8')
  told = dict(re.findall(r'^\| ([\w ]+) \| (0\.\d+|1\.0+) \|', card, re.M))
  found = accuracy.exact_match(folder, 80)
  for type_, (share, count) in found.items():
    error = 4 * np.sqrt(0.25 / count) + 0.02
    assert abs(share - float(told[type_])) < error, type_


@pytest.fixture(scope='module')
def judge():
  folder = model.WEIGHTS / 'clip'
  loaded = transformers.CLIPModel.from_pretrained(folder, dtype=torch.float32)
  return loaded.eval(), json.loads((folder / 'judge.json').read_text())


def test_the_judge_ranks_a_true_label_above_a_false_one(judge):
  loaded, _ = judge
  labels = ['red', 'blue', 'happy face', 'sad face', 'striped', 'dotted']
  truths = [('red', 'face', 'happy'), ('blue', 'square', 'striped')]
  truths += [('blue', 'face', 'sad'), ('red', 'circle', 'dotted')]
  pixels = []
  for i, (colour, name, detail) in enumerate(truths):
    thing = render.Object(colour, name, detail, 'large', i)
    scene = render.draw((thing,), np.random.default_rng(i))
    pixels.append(np.asarray(batches.picture(scene, model.VIEW, None)))
  cosine = _cosines(loaded, np.stack(pixels), labels)
  for row, (colour, name, detail) in zip(cosine, truths, strict=True):
    thing = render.Object(colour, name, detail, 'large', 0)
    fits = np.array([questions.fits(thing, label) for label in labels])
    assert row[fits].min() > np.median(row[~fits])


def test_the_judge_grounds_a_colour_where_it_is(judge):
  loaded, settings = judge
  thing = render.Object('green', 'square', 'solid', 'large', 2)
  scene = render.draw((thing,), np.random.default_rng(1))
  pixels = np.asarray(batches.picture(scene, model.VIEW, None))[None]
  cosine = _cosines(loaded, pixels, ['green'], patches=True)[0, :, 0]
  found = (cosine > settings['threshold']).reshape(8, 8)
  true = scene.coverage()[0] >= 0.25
  assert (found & true).sum() / (found | true).sum() > 0.6


def _cosines(loaded, pixels, labels, patches=False):
  tokenizer = transformers.AutoTokenizer.from_pretrained(model.WEIGHTS / 'clip')
  given = tokenizer(labels, padding=True, return_tensors='pt')
  with torch.no_grad():
    words = loaded.get_text_features(
      input_ids=given['input_ids'], attention_mask=given['attention_mask']
    ).pooler_output
    words = torch.nn.functional.normalize(words, dim=-1)
    seen = loaded.vision_model(torch.from_numpy(batches.normalise(pixels)))
    x = loaded.vision_model.post_layernorm(seen.last_hidden_state)
    x = torch.nn.functional.normalize(loaded.visual_projection(x), dim=-1)
  return (x[:, 1:] if patches else x[:, 0]).matmul(words.T).numpy()


def test_a_label_holds_of_a_patch_that_its_object_covers():
  pixels, labels, of_image, of_patch = clip.draw(np.random.default_rng(0))
  assert pixels.shape == (clip.IMAGES, 3, model.VIEW, model.VIEW)
  assert len(set(labels)) == clip.LABELS
  some = of_patch.max(1) > 0
  background = labels.index(questions.BACKGROUND)
  others = [i for i in range(clip.LABELS) if i != background]
  assert (some[:, others] <= (of_image[:, others] > 0)).all()
