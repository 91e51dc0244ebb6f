"""Questions that tell a judge's right answers from wrong ones, on pictures.

  detection  pictures as they are, half of which fire: does it show the label?
  fuzzing    pictures that fire, dimmed but where they do, and dimmed but
             elsewhere: is the label what is lit? (Asked outright, or by having
             the judge say what is lit.)
  intruder   dimmed pictures, of which one is another latent's: which one?

The same questions are made of a latent and of a concept whose place is known,
by a `Source` of each.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from PIL import Image

from lmm_sae.core import concepts, masks, prompts

T = TypeVar('T')

YES, NO = 'yes', 'no'
FUZZ = ('fuzz', 'visible')  # prompts of fuzzing
OVERLAP = 0.25  # of a moved mask, on what the true one may show
_THOUGHT = re.compile(r'<think>.*?(</think>|\Z)', re.DOTALL)
# Words of a label that hold of anything, or of nothing.
FILLERS = frozenset(
  (
    *('a', 'an', 'the', 'of', 'and', 'with', 'in', 'on'),
    *('thing', 'things', 'object', 'objects', 'something'),
    *('region', 'regions', 'area', 'areas'),
    *('picture', 'pictures', 'image', 'images'),
  )
)


@dataclasses.dataclass(frozen=True)
class Question:
  """One question and its right answer.

  Attributes:
    expected: `yes` or `no`, or the number of a picture or text.
    reader: how an answer is read: `yes_no`, `number`, or `names`: yes if it
      names the label.
    choices: how many numbers there are.
  """

  prompt: str
  images: tuple[Image.Image, ...]
  expected: str
  reader: str
  label: str
  choices: int = 2


def read(question: Question, answer: str) -> str:
  """What an answer comes down to, as in `expected`; '' if to nothing.

  An answer may give its reasons after a word or number; where it has several
  and starts with none, it says nothing. What a model thinks aloud, in <think>
  tags, is no part of it.
  """
  answer = _THOUGHT.sub('', answer).strip()
  if question.reader == 'names':
    if not answer:
      return ''
    return YES if names(answer, question.label) else NO
  words = re.findall(r'\w+', answer.lower())
  if question.reader == 'yes_no':
    valid = {YES, NO}
  else:
    valid = {str(i + 1) for i in range(question.choices)}
    words = [word for word in words if word.isdigit()] or words
  if words and words[0] in valid:
    first = re.match(r'\W*\w+', answer)[0]
    if first.lower().endswith(words[0]):
      return words[0]
  said = {word for word in words if word in valid or word.isdigit()}
  return said.pop() if len(said) == 1 and said <= valid else ''


def names(answer: str, label: str) -> bool:
  """Whether an answer has every word of a label, but for fillers."""
  words = re.findall(r'\w+', label)
  words = [word for word in words if word.lower() not in FILLERS] or words
  return bool(words) and all(concepts.says(answer, word) for word in words)


class Lit(NamedTuple):
  """A picture, the patches that are shown, and those that show the same."""

  sample: int
  lit_HW: np.ndarray
  touched_HW: np.ndarray


class Source(Protocol):
  """Where pictures of one latent, or of one concept, are drawn from."""

  def firing(self) -> Sequence[Lit]:
    """Pictures that show it, in the order in which they are to be used."""

  def silent(self, count: int) -> list[int]:
    """At most so many samples whose pictures do not show it."""

  def odd(self) -> Lit | None:
    """A picture lit where something else is; None where none was found."""


@dataclasses.dataclass(frozen=True)
class Style:
  """How questions are asked.

  Attributes:
    cases: pictures a task; an intruder question counts as its pictures.
    pictures: of an intruder question.
    fuzz: one of FUZZ.
    pixels, mask: as in the section `explain`.
  """

  cases: int
  pictures: int
  fuzz: str
  pixels: int
  mask: str


class Asker:
  """Makes the questions about one source.

  Args:
    image: of a sample.
    rng: of what is drawn; questions of one label do not depend on another's.
  """

  def __init__(
    self,
    style: Style,
    image: Callable[[int], Image.Image],
    source: Source,
    rng: Callable[[str], np.random.Generator],
  ):
    self._style, self._image, self._source = style, image, source
    self._rng = rng

  def questions(self, scorer: str, labels: Sequence[str]) -> list[list]:
    """The questions of that name, with each of the labels in them.

    The pictures are the same for every label. [] for each where the source has
    too few pictures.
    """
    make = {
      'detection': self._detection,
      'fuzzing': self._fuzzing,
      'intruder': self._intruder,
    }[scorer]
    return make(labels)

  def _detection(self, labels):
    half = self._style.cases // 2
    fires = [one.sample for one in self._source.firing()[:half]]
    shown = halves(fires, self._source.silent(len(fires)))
    pictures = [(self._small(sample), expected) for sample, expected in shown]
    return [
      [
        Question(
          prompts.fill('detect', label=label), (image,), right, 'yes_no', label
        )
        for image, right in pictures
      ]
      for label in labels
    ]

  def _fuzzing(self, labels):
    rng = self._rng('fuzzing')
    shown: list[tuple[Image.Image, str]] = []
    for one in self._source.firing():
      if len(shown) >= self._style.cases // 2 * 2:
        break
      elsewhere_HW = moved(one.lit_HW, one.touched_HW, rng)
      if elsewhere_HW is not None:
        shown.append((self._dimmed(one.sample, one.lit_HW), YES))
        shown.append((self._dimmed(one.sample, elsewhere_HW), NO))
    asks = self._style.fuzz == 'fuzz'
    return [
      [
        Question(
          prompts.fill('fuzz', label=label)
          if asks
          else prompts.load('visible'),
          (image,),
          right,
          'yes_no' if asks else 'names',
          label,
        )
        for image, right in shown
      ]
      for label in labels
    ]

  def _intruder(self, labels):
    count = self._style.pictures
    sets = [
      (tuple(self._dimmed(one.sample, one.lit_HW) for one in shown), right)
      for shown, right in amid(self._source, self._style, self._rng('intruder'))
    ]
    return [
      [
        Question(
          prompts.fill('intruder', n=count, label=label),
          *(images, right, 'number', label, count),
        )
        for images, right in sets
      ]
      for label in labels
    ]

  def _small(self, sample: int) -> Image.Image:
    return masks.shrink(self._image(sample), self._style.pixels)

  def _dimmed(self, sample: int, lit_HW: np.ndarray) -> Image.Image:
    return masks.masked(self._small(sample), lit_HW, self._style.mask)


def halves(fires: Sequence[T], silent: Sequence[T]) -> list[tuple[T, str]]:
  """As many that fire as do not, each with its right answer."""
  half = min(len(fires), len(silent))
  return [(x, YES) for x in fires[:half]] + [(x, NO) for x in silent[:half]]


def amid(
  source: Any, style: Style, rng: np.random.Generator
) -> Iterator[tuple[list, str]]:
  """Sets of style.pictures, all but one of them alike, and the number of the
  odd one; none where the source has too few.

  Args:
    source: with `firing` and `odd`, of pictures or of texts.
  """
  count = style.pictures
  fires = list(source.firing())
  for at in range(max(1, style.cases // count)):
    odd = source.odd()
    if len(fires) < count - 1 or odd is None:
      return
    turned = at * (count - 1) % len(fires)
    alike = (fires[turned:] + fires[:turned])[: count - 1]
    place = int(rng.integers(count))
    yield [*alike[:place], odd, *alike[place:]], str(place + 1)


def moved(
  lit_HW: np.ndarray, touched_HW: np.ndarray, rng: np.random.Generator
) -> np.ndarray | None:
  """The mask shifted (around the edges) to where it covers least of `touched`.

  Of the best shifts one is drawn. None where even they cover more than OVERLAP
  of the mask, or where nothing is lit.
  """
  rows, cols = lit_HW.shape
  lit = np.argwhere(lit_HW)
  if not len(lit):
    return None
  shifts = np.stack(np.mgrid[:rows, :cols], -1).reshape(-1, 1, 2)
  at = (shifts + lit) % (rows, cols)  # [shifts, lit, 2]
  covered = touched_HW[at[..., 0], at[..., 1]].sum(1)
  best = int(covered.min())
  if best > OVERLAP * len(lit):
    return None
  place = at[rng.choice(np.flatnonzero(covered == best))]
  elsewhere_HW = np.zeros_like(lit_HW)
  elsewhere_HW[place[:, 0], place[:, 1]] = True
  return elsewhere_HW
