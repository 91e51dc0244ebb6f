"""The lean forward is the model's own; runs resume; base starts as small."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from lmm_sae.scenes import (
  batches,
  lean,
  losses,
  model,
  muon,
  questions,
  render,
  sets,
  train,
)


@pytest.fixture(scope='module')
def small():
  torch.manual_seed(0)
  return model.make_model('small').eval()


def inputs(tiles: int, tail: int = 9) -> dict[str, torch.Tensor]:
  """One picture and `tail` tokens about it, as the Hugging Face model takes."""
  generator = torch.Generator().manual_seed(tiles)
  side = 64 if tiles == 1 else 128
  image = 64 + (72 if tiles == 1 else 272)
  words = torch.randint(6, 600, (tail,), generator=generator)
  head = torch.tensor([model.BOS, model.USER])
  ids = torch.cat([head, torch.full((image,), model.IMAGE), words])[None]
  pixels = torch.randn(1, 1 + tiles, 3, 64, 64, generator=generator)
  if tiles == 1:
    pixels[:, 1] = pixels[:, 0]
  return {
    'input_ids': ids,
    'attention_mask': torch.ones_like(ids),
    'pixel_values': pixels,
    'image_sizes': torch.tensor([[side, side]]),
  }


@pytest.mark.parametrize('tiles', [1, 4])
def test_the_lean_forward_gives_the_models_own_logits(small, tiles):
  given = inputs(tiles)
  with torch.no_grad():
    want = small(**given).logits[0, -9:]
    inner = small.model
    seen = lean.vision(inner.vision_tower, given['pixel_values'][0])[:, 1:]
    embed = inner.language_model.embed_tokens
    prefix = torch.cat(
      [
        embed(torch.tensor([[model.BOS, model.USER]])),
        lean.image_tokens(inner, seen, tiles),
      ],
      1,
    )
    words = embed(given['input_ids'][:, -9:])
    other = torch.randn(1, 2, 5, words.shape[-1])
    got, _ = lean.language(
      inner.language_model, prefix, [other, words[:, None]]
    )
  torch.testing.assert_close(got[1][0, 0] @ embed.weight.T, want)


def test_base_starts_as_exactly_its_small(small):
  torch.manual_seed(1)
  base = model.grow(small).eval()
  given = inputs(1)
  with torch.no_grad():
    torch.testing.assert_close(base(**given).logits, small(**given).logits)
  count = [sum(p.numel() for p in m.parameters()) for m in (small, base)]
  assert 1.7 < count[1] / count[0] < 2.3


@pytest.mark.parametrize(('side', 'tiles'), [(64, 1), (128, 4)])
def test_views_are_those_of_the_processor(side, tiles):
  scene = render.sample(np.random.default_rng(5))
  image = batches.picture(scene, side, None)
  processor = model.make_processor(batches._tokenizer())
  text = processor.apply_chat_template(
    [
      {
        'role': 'user',
        'content': [{'type': 'image'}, {'type': 'text', 'text': 'what?'}],
      }
    ],
    add_generation_prompt=True,
  )
  made = processor(images=[image], text=[text], return_tensors='pt')
  ours = batches.normalise(batches.views(image, tiles))
  if tiles == 1:
    ours = np.concatenate([ours, ours])
  np.testing.assert_allclose(ours, made['pixel_values'][0].numpy(), atol=1e-5)
  head, tail = [model.BOS, model.USER], [*batches.tokens('what?')]
  images = [model.IMAGE] * (64 + (72 if tiles == 1 else 272))
  assert made['input_ids'][0].tolist() == [
    *head,
    *images,
    *tail,
    model.ASSISTANT,
  ]


def test_patch_labels_name_the_object_that_covers_the_patch():
  thing = render.Object('green', 'square', 'solid', 'large', 3)
  scene = render.draw((thing,), np.random.default_rng(0))
  lit = np.ones((8, 8), bool)
  lit[:, 6] = False
  labels = batches.patch_labels(scene, batches.owners(scene, 4, lit))
  green = batches.HEADS['colour'].index('green')
  base = labels['colour'][0].reshape(8, 8)
  assert base[6, 5] == green
  assert base[6, 6] == 0
  assert base[1, 1] == 0
  assert labels['colour'].shape == (5, 64)
  assert (labels['colour'][4] == green).sum() > (labels['colour'][1] > 0).sum()
  assert (labels['place'][1:] == -1).all()


def test_targets_are_the_answer_and_the_end():
  turn = questions.visible_turns(None)[0]
  ids, targets, types, about = batches.group([[questions.Asked(turn)]])
  answer = [*batches.tokens(turn.answer), model.EOS]
  assert targets[targets >= 0].tolist() == answer
  assert ids[0, 0][targets[0, 0] >= 0][0] == model.ASSISTANT
  assert types == [['visible']]
  assert (about == -1).all()


def test_the_answer_of_a_common_batch_is_what_the_pictures_share():
  made = batches.common(np.random.default_rng(3), 4, 5)
  assert made.pixels_B3HW.shape == (20, 3, 64, 64)
  assert made.groups[0].ids.shape[:2] == (4, 3)
  for types in made.groups[0].types:
    assert types[0] in {'common', 'intruder'}
  assert made.groups[1].ids.shape[:2] == (4, 7)
  asked = {t for row in made.groups[1].types for t in row}
  assert asked == {'nth picture', 'which picture'}


def test_a_picture_is_named_by_what_only_it_shows():
  for seed in range(20):
    rng = np.random.default_rng(seed)
    shown, _ = sets.sample(rng, 4)
    for turn, (number,) in sets.by_content(shown, rng):
      label = turn.question.removeprefix('which picture shows this: ')
      fit = [x.fits(label.removesuffix('?')) for x in shown]
      assert fit == [i == number for i in range(4)]
      assert turn.answer == str(number + 1)


def test_all_pictures_but_the_intruder_show_the_label():
  asked = 0
  for seed in range(40):
    shown, turns = sets.sample(np.random.default_rng(seed), 5)
    for turn, about in turns:
      if turn.type != 'intruder':
        continue
      label = turn.question.split('show this: ')[1].split('. Which')[0]
      fit = [one.fits(label) for one in shown]
      assert fit == [i != int(turn.answer) - 1 for i in range(5)]
      assert about == (int(turn.answer) - 1,)
      asked += 1
  assert asked > 20


@pytest.mark.parametrize('tiles', [0, 1, 4])
def test_a_question_is_about_the_patches_of_its_object(tiles):
  made = batches.single(np.random.default_rng(tiles), 6, tiles, 8, False)
  group = made.groups[0]
  colour = batches.HEADS['colour']
  views = made.regions.reshape(6, -1, 64)
  labels = made.labels['colour'].reshape(views.shape)
  checked = 0
  for item, types in enumerate(group.types):
    for number, type_ in enumerate(types):
      if type_ != 'colour':
        continue
      on = views[item] == group.about[item, number, 0]
      first = group.targets[item, number]
      answer = [*batches.tokens(colour[labels[item][on][0]]), model.EOS]
      assert first[first >= 0].tolist() == answer
      assert len(set(labels[item][on])) == 1
      checked += 1
  assert checked


def test_the_watched_scores_are_the_models_own_attention(small):
  given = inputs(1)
  with torch.no_grad():
    inner = small.model
    prefix = torch.randn(2, 11, 192, generator=torch.Generator().manual_seed(0))
    words = inner.language_model.embed_tokens(given['input_ids'][:, -9:])
    asked = words.expand(2, 9, -1)[:, None]
    _, (scores,) = lean.language(inner.language_model, prefix, [asked], 3)
    whole = inner.language_model(
      inputs_embeds=torch.cat([prefix, asked[:, 0]], 1), output_attentions=True
    ).attentions[3]
  want = whole[:, :, 11:, :11]
  want = want / want.sum(-1, keepdim=True)
  torch.testing.assert_close(scores[:, :, 0].softmax(-1), want)


def test_the_gaze_loss_is_the_attention_that_misses_what_is_asked_about():
  rng = np.random.default_rng(0)
  batch, turns, length, places = 2, 3, 5, 7
  scores = torch.from_numpy(rng.normal(size=(batch, 4, turns, length, places)))
  regions = torch.from_numpy(rng.integers(0, 4, size=(batch, places)))
  targets = np.full((batch, turns, length), -1)
  targets[:, :, 2:4] = [9, model.EOS]
  about = rng.integers(1, 4, size=(batch, turns, 2))
  about[1, 2] = -1  # about nothing
  about[0, 1] = 5  # about what no patch shows
  types = [['colour', 'intruder', 'what']] * batch
  group = batches.Group(targets, targets, types, about)
  share = scores.softmax(-1)
  about[1, 1] = 1
  want, weights = 0.0, 0.0
  for b, q, h in np.ndindex(batch, turns, 2):
    on = regions[b] == about[b, q, h]
    if on.any():
      weight = 4.0 if q == 1 else 1.0
      want -= weight * float(share[b, h, q, 2][on].sum().log())
      weights += weight
  turns = torch.tensor([[1.0, 4.0, 1.0]] * batch)
  got, count = losses.gaze(scores, regions, group, turns)
  assert float(count) == weights > 6
  assert float(got) == pytest.approx(want)


def test_muon_makes_matrices_nearly_orthogonal():
  x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
  values = torch.linalg.svdvals(muon.orthogonalise(x, 8))
  assert values.min() > 0.6
  assert values.max() < 1.3


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
  monkeypatch.setattr(train, 'STEPS', {'a': 2, 'b': 2, 'c': 2})
  monkeypatch.setattr(
    batches, 'patches', lambda rng, scenes: _small_patches(rng)
  )
  monkeypatch.setattr(
    train, 'make_batch', lambda t: _make(t, train.batches.WEIGHTS_SEED)
  )
  whole = train.Trainee(0, size='base')
  _steps(whole, 5)
  half = train.Trainee(0, size='base')
  _steps(half, 3)
  half.save(tmp_path / 'checkpoint.pt')
  again = train.Trainee(0, size='base')
  again.load(tmp_path / 'checkpoint.pt')
  _steps(again, 2)
  assert (again.stage, again.step) == (whole.stage, whole.step) == ('c', 1)
  for name, p in whole.named().items():
    torch.testing.assert_close(again.named()[name], p, rtol=0, atol=0)


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
  grown = train.Trainee(0, size='base')
  grown.stage = 'b'
  grown.advance()
  grown.save(tmp_path / 'checkpoint.pt')
  with pytest.raises(ValueError, match='is a base: give another --out'):
    train.Trainee(0).load(tmp_path / 'checkpoint.pt')


def _steps(t: train.Trainee, count: int) -> None:
  for _ in range(count):
    if t.step == t.steps:
      t.advance()
    train.train_step(t)


def _small_patches(rng):
  made = batches.single(rng, 1, 0, 2, False)
  return dataclasses.replace(made, groups=[])


def _make(t: train.Trainee, first: int):
  rng = np.random.default_rng([first, t.seed, ord(t.stage), t.step])
  if t.stage == 'a':
    return 'patches', batches.patches(rng, 1)
  return 'single 0', batches.single(rng, 2, 0, 3, False)


def test_dimming_is_twelve_percent_outside_the_lit_patches():
  scene = render.sample(np.random.default_rng(2))
  lit = np.zeros((8, 8), bool)
  lit[2, 3] = True
  shown = np.asarray(batches.picture(scene, 64, lit)).astype(int)
  plain = Image.fromarray(scene.pixels_HW3).resize(
    (64, 64), Image.Resampling.BICUBIC
  )
  plain = np.asarray(plain).astype(int)
  np.testing.assert_array_equal(shown[16:24, 24:32], plain[16:24, 24:32])
  assert abs(shown[:16] - plain[:16] * 0.12).max() <= 1
