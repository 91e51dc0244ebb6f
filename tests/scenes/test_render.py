"""The scenes are what their labels say, and stay the same for ever."""

import hashlib

import numpy as np
import pytest

from lmm_sae.scenes import questions, render

DIGEST = '9d63fbf3eeabb7cdc23efa63f4ec2fe89ffd7fa5daab1444f4e9db41514c5a77'


def scene(*words: int) -> render.Scene:
  return render.sample(np.random.default_rng(words))


def test_a_scene_follows_from_its_seed():
  one, two = scene(3, 4), scene(3, 4)
  np.testing.assert_array_equal(one.pixels_HW3, two.pixels_HW3)
  assert one.objects == two.objects
  assert not np.array_equal(one.pixels_HW3, scene(3, 5).pixels_HW3)


def test_regions_do_not_change_with_a_version_of_numpy_or_pillow():
  regions = np.stack([scene(7, i).regions_HW for i in range(20)])
  digest = hashlib.sha256(regions.tobytes()).hexdigest()
  assert digest == DIGEST


def test_every_object_lies_in_its_quadrant_and_covers_enough():
  for i in range(200):
    made = scene(1, i)
    for number, thing in enumerate(made.objects):
      rows, columns = np.nonzero(made.regions_HW == number + 1)
      assert rows.size > 150
      assert set(rows // 64) == {thing.place // 2}
      assert set(columns // 64) == {thing.place % 2}


@pytest.mark.parametrize('colour', render.COLOURS)
def test_the_region_of_a_solid_square_has_its_colour(colour):
  thing = render.Object(colour, 'square', 'solid', 'large', 1)
  made = render.draw((thing,), np.random.default_rng(0))
  mean = made.pixels_HW3[made.regions_HW == 1].mean(0)
  np.testing.assert_allclose(mean, render.COLOURS[colour], atol=14)


def test_coverage_is_the_share_of_each_patch():
  made = scene(5, 1)
  covered = made.coverage(8)
  patch = made.regions_HW[16:32, 48:64]
  for number in range(len(made.objects)):
    assert covered[number, 1, 3] == np.mean(patch == number + 1)


def test_a_fixed_attribute_is_obeyed_and_no_two_objects_agree():
  for i in range(100):
    fixed = {'detail': 'angry', 'colour': 'cyan'}
    made = render.sample(np.random.default_rng([9, i]), fixed)
    assert any(o.detail == 'angry' and o.colour == 'cyan' for o in made.objects)
    assert len({o.phrase for o in made.objects}) == len(made.objects)


def test_there_are_26_concepts():
  assert len(set(render.CONCEPTS)) == 26


def test_answers_hold_of_the_scene():
  asked = set()
  for i in range(300):
    made, rng = scene(2, i), np.random.default_rng(i)
    for turn in questions.scene_turns(made, rng):
      asked.add(turn.type)
      if turn.type in ('yes or no', 'detect'):
        label = turn.question.split(': ')[-1].split('?')[0]
        label = label.removeprefix('is there a ').removesuffix(' object')
        assert (turn.answer == 'yes') == questions.holds(made, label)
      if turn.type == 'colour':
        assert turn.answer in {o.colour for o in made.objects}
        assert turn.answer not in turn.question.split()
      if turn.type == 'emotion':
        assert [turn.answer] == [
          o.detail for o in made.objects if o.name == 'face'
        ]
  assert asked == set(questions.WEIGHTS)


def test_a_question_is_about_the_objects_that_it_names():
  types = set()
  for i in range(200):
    made, rng = scene(3, i), np.random.default_rng(i)
    for turn, about in questions.scene_asked(made, rng):
      things = [made.objects[index] for index in about]
      if turn.type == 'relation':
        one, two = things
        axis = 1 if turn.answer in ('left', 'right') else 0
        at = [divmod(thing.place, 2)[axis] for thing in things]
        assert (at[0] < at[1]) == (turn.answer in ('left', 'above'))
        assert f' {turn.answer} ' in turn.question
        first, second = turn.question.removesuffix('?').split(' the ')[1:]
        first = first.split(' left or ')[0].split(' above or ')[0]
        assert first in questions.references(one, made, 'place')
        assert second in questions.references(two, made, 'place')
      elif turn.type in ('colour', 'texture', 'size'):
        (thing,) = things
        named = {'texture': thing.detail}.get(turn.type)
        assert turn.answer == (named or getattr(thing, turn.type))
      elif turn.type in ('yes or no', 'detect') and things:
        assert turn.answer == 'yes'
      if about:
        types.add(turn.type)
  assert {'where', 'place', 'relation', 'what', 'emotion', 'letter'} <= types


def test_a_reference_singles_out_one_object():
  made = render.draw(
    (
      render.Object('red', 'square', 'solid', 'large', 0),
      render.Object('red', 'circle', 'dotted', 'small', 3),
    ),
    np.random.default_rng(0),
  )
  found = questions.references(made.objects[0], made, 'place')
  assert found == ['square', 'red square', 'solid square']


def test_a_mask_lights_its_object_and_background_masks_touch_none():
  for i in range(100):
    made, rng = scene(4, i), np.random.default_rng(i)
    covered = made.coverage()
    lit = questions.mask(made, [0], rng)
    assert (lit & (covered[0] >= 0.02)).sum() >= 1
    assert (lit & (covered[0] < 0.02)).sum() <= 1
    empty = questions.background_mask(made, rng)
    assert empty.any()
    assert not (empty & (covered.max(0) >= 0.02)).any()


def test_what_objects_share_is_what_all_have():
  red = render.Object('red', 'face', 'happy', 'large', 0)
  blue = render.Object('blue', 'face', 'happy', 'small', 1)
  letter = render.Object('blue', 'T', '', 'small', 1)
  assert questions.shared([red, blue]) == 'happy face'
  assert questions.shared([blue, letter]) == 'blue'
  assert questions.shared([red, letter]) == ''
  assert questions.shared([letter, letter]) == 'blue letter T'
