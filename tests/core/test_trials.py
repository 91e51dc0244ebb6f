"""Questions about pictures, and how answers are read."""

import numpy as np
import pytest
from PIL import Image

from lmm_sae.core import trials
from lmm_sae.core.trials import Lit, Question, Style

GRID = (3, 4)


def question(reader, label='red star', choices=2):
  return Question('', (), 'yes', reader, label, choices)


@pytest.mark.parametrize(
  ('reader', 'answer', 'said'),
  [
    ('yes_no', 'Yes.', 'yes'),
    ('yes_no', 'no', 'no'),
    ('yes_no', 'No, although yes would be tempting', 'no'),
    ('yes_no', 'The answer is yes', 'yes'),
    ('yes_no', 'Well, yes or no', ''),
    ('yes_no', 'nothing', ''),
    ('yes_no', '<think>no, no</think> Yes', 'yes'),
    ('yes_no', '<think>yes', ''),
    ('yes_no', '', ''),
    ('number', '3', '3'),
    ('number', 'Picture 2.', '2'),
    ('number', '2, as 3 shows it', '2'),
    ('number', 'either 2 or 3', ''),
    ('number', '4', ''),
    ('number', 'Picture 2 of 5', ''),
    ('number', 'two', ''),
    ('names', 'a star, red and solid', 'yes'),
    ('names', 'Red stars', 'yes'),
    ('names', 'blue star', 'no'),
    ('names', 'starred', 'no'),
    ('names', ' ', ''),
  ],
)
def test_answers_are_read_as_what_they_say(reader, answer, said):
  choices = 3 if reader == 'number' else 2
  assert trials.read(question(reader, choices=choices), answer) == said


@pytest.mark.parametrize(
  ('label', 'answer', 'found'),
  [
    ('the letter T', 'blue letter T', True),
    ('letter T', "don't, letter", False),
    ('a', 'a', True),
    ('red things', 'red star', True),
    ('things', 'red star', False),
    ('?', 'what?', False),
  ],
)
def test_fillers_of_a_label_need_not_be_named(label, answer, found):
  assert trials.names(answer, label) == found


def test_a_moved_mask_keeps_its_size_and_leaves_what_fires():
  rng = np.random.default_rng(0)
  for _ in range(50):
    lit_HW = np.zeros(GRID, bool)
    lit_HW.ravel()[rng.choice(12, rng.integers(1, 4), replace=False)] = True
    touched_HW = lit_HW | (rng.random(GRID) < 0.1)
    elsewhere_HW = trials.moved(lit_HW, touched_HW, rng)
    if elsewhere_HW is None:
      continue
    assert elsewhere_HW.sum() == lit_HW.sum()
    assert (elsewhere_HW & touched_HW).sum() <= lit_HW.sum() / 4
  full_HW = np.ones(GRID, bool)
  assert trials.moved(full_HW, full_HW, rng) is None
  assert trials.moved(~full_HW, ~full_HW, rng) is None


class Corners:
  """Samples 0 to 6 fire in their first patch; 10 to 19 are silent."""

  def __init__(self, fires=7, silent=10):
    self.fires, self.quiet = fires, silent

  def firing(self):
    lit_HW = np.zeros(GRID, bool)
    lit_HW[0, 0] = True
    return [Lit(s, lit_HW, lit_HW) for s in range(self.fires)]

  def silent(self, count):
    return list(range(10, 10 + self.quiet))[:count]

  def odd(self):
    lit_HW = np.zeros(GRID, bool)
    lit_HW[2, 3] = True
    return Lit(30, lit_HW, lit_HW)


def asker(source=None, fuzz='fuzz', cases=6, pictures=3):
  def image(sample):
    return Image.new('RGB', (8, 6), (200, sample, 7))

  def rng(what):
    return np.random.default_rng([*what.encode()])

  style = Style(cases, pictures, fuzz, 0, 'exact')
  return trials.Asker(style, image, source or Corners(), rng)


def samples(asked: Question) -> list[int]:
  return [np.asarray(image).max((0, 1))[1] for image in asked.images]


def test_detection_shows_whole_pictures_half_of_which_fire():
  one, other = asker().questions('detection', ['red', 'blue'])
  assert [q.expected for q in one] == ['yes'] * 3 + ['no'] * 3
  assert [samples(q)[0] for q in one] == [0, 1, 2, 10, 11, 12]
  assert all(np.ptp(np.asarray(q.images[0]), (0, 1)).max() == 0 for q in one)
  assert {q.prompt for q in other} == {
    'Does the picture show this: blue? Answer yes or no.'
  }
  assert [samples(q) for q in other] == [samples(q) for q in one]
  few = asker(Corners(silent=1)).questions('detection', ['red'])[0]
  assert [q.expected for q in few] == ['yes', 'no']
  assert asker(Corners(silent=0)).questions('detection', ['red']) == [[]]


@pytest.mark.parametrize('fuzz', trials.FUZZ)
def test_fuzzing_lights_the_right_patch_and_another(fuzz):
  (asked,) = asker(fuzz=fuzz).questions('fuzzing', ['red'])
  assert [q.expected for q in asked] == ['yes', 'no'] * 3
  assert {q.reader for q in asked} == {'yes_no' if fuzz == 'fuzz' else 'names'}
  assert ('red' in asked[0].prompt) == (fuzz == 'fuzz')
  for q in asked:
    bright_HW = np.asarray(q.images[0])[..., 0] == 200
    assert bright_HW.sum() == 4
    assert bright_HW[0, 0] == (q.expected == 'yes')


def test_the_intruder_is_one_of_another_latent():
  one, other = asker(cases=8).questions('intruder', ['red', 'blue'])
  assert len(one) == 8 // 3
  for q, with_other_label in zip(one, other, strict=True):
    assert q.choices == 3
    assert samples(q).index(30) == int(q.expected) - 1
    assert with_other_label.images == q.images
    assert len(set(samples(q))) == 3
  assert samples(one[0]) != samples(one[1])
  assert asker(Corners(fires=1)).questions('intruder', ['red']) == [[]]
