"""The mistakes study: can wrong answers be mended by a rule, harming no others?

The rule does not know the truth. Where the subject's answer leads the runner-up
by a margin of at most `margin`, the `latents` latents that pushed the answer
most are ablated, and the subject answers again. Both numbers are fitted on
half A, to gain most right answers there (none, if nothing gains); half B tells:

  mended   share of the wrong answers that become right
  broken   share of the right answers that become wrong
  random   both, with random latents that fire on the image in their place

Only questions whose right answer is one word are asked: one token decides them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lmm_sae.core import causes, eq, stats
from lmm_sae.core.asking import Ask, Asker
from lmm_sae.core.causes import Priced
from lmm_sae.core.records import Sample, Turn

SIZES = (1, 2, 3, 5)  # latents ablated together
QUANTILES = (0.25, 0.5, 0.75, 1.0)  # of the wrong answers' margins on A
PER_SAMPLE = 4  # questions asked about one image
ASKED = 12  # questions asked for one mistake that is wanted
RIGHT = 2  # right answers watched for one mistake
# (half, sample, prompt, widest) -> the prices of the subject's answer; None
# where it leads the runner-up by more than `widest`.
Price = Callable[[str, int, str, float], Priced | None]

NO_WRONG = 'the subject made no such mistake'


@dataclasses.dataclass(frozen=True)
class Rule:
  """Ablate so many latents where the margin is at most this; 0: none."""

  latents: int
  margin: float


@dataclasses.dataclass(frozen=True)
class Answered:
  """An answer, what pushed it, and what ablation makes of it.

  Attributes:
    margin: logit(answer) - logit(runner-up); inf where it was not priced, as
      it leads by more than any rule at hand touches.
    pushers: the latents that pushed it most, strongest first.
    edited: the answer by number of pushers ablated.
  """

  sample: int
  turn: Turn
  text: str
  margin: float
  pushers: list[int]
  edited: dict[int, str]

  @property
  def correct(self) -> bool:
    return right(self.text, self.turn)

  def under(self, rule: Rule) -> str:
    """The answer once the rule has been applied."""
    return self.edited[rule.latents] if self.touched(rule) else self.text

  def touched(self, rule: Rule) -> bool:
    return rule.latents > 0 and self.margin <= rule.margin


def right(text: str, turn: Turn) -> bool:
  """Whether an answer is exactly the true one, but for case and full stop."""
  return text.strip().rstrip('.').lower() == turn.answer.lower()


def questions(samples: Sequence[Sample], count: int) -> list[tuple[int, Turn]]:
  """At most `count` questions whose true answer is one word."""
  found = []
  for sample in samples:
    turns = [
      turn
      for turn in sample.turns
      if turn.type and len(turn.answer.split()) == 1 and sample.image
    ]
    found.extend((sample.sample, turn) for turn in turns[:PER_SAMPLE])
  return found[:count]


def study(
  samples: dict[str, Sequence[Sample]],
  askers: dict[str, Asker],
  price: Price,
  fired: Callable[[int], np.ndarray],
  wanted: int,
  seed: int,
) -> dict[str, Any]:
  """The fitted rule, its figures on B ({value, n, ci}), and the cases.

  Args:
    samples, askers: by half, a and b.
    price: see `Price`.
    fired: sample of B -> the latents that fire on its image.
    wanted: mistakes looked for on each half.
  """
  halves = {
    half: _collect(samples[half], askers[half], wanted) for half in 'ab'
  }
  every = Rule(max(SIZES), np.inf)
  before = _ablate(halves['a'].picked, askers['a'], 'a', price, every, SIZES)
  rule = fit(before, halves['a'].accuracy)
  sizes = (rule.latents,) if rule.latents else ()
  after = _ablate(halves['b'].picked, askers['b'], 'b', price, rule, sizes)
  rng = np.random.default_rng(seed)
  random = _random(after, askers['b'], rule, fired, rng)
  texts = [one.under(rule) for one in after]
  return {
    'rule': dataclasses.asdict(rule),
    'asked': {half: halves[half].asked for half in 'ab'},
    'accuracy': {half: halves[half].accuracy for half in 'ab'},
    **_figures(after, texts, ''),
    **_figures(after, random, '_random'),
    'cases': [
      {
        'sample': one.sample,
        'prompt': one.turn.question,
        'right': one.turn.answer,
        'text': one.text,
        'edited': text,
        'latents': one.pushers[: rule.latents],
      }
      for one, text in zip(after, texts, strict=True)
      if text != one.text or not one.correct
    ],
  }


def fit(answers: Sequence[Answered], accuracy: float) -> Rule:
  """The rule that gains most right answers; the mildest of several.

  Args:
    answers: of half A, wrong ones and right ones, edited by every size.
    accuracy: share of right answers among all that were asked on A, by which
      what is mended weighs against what is broken.
  """
  wrong = [one for one in answers if not one.correct]
  kept = [one for one in answers if one.correct]
  best, rule = 0.0, Rule(0, 0.0)
  if not wrong:
    return rule
  margins = np.quantile([one.margin for one in wrong], QUANTILES)
  for latents in SIZES:
    for margin in sorted({float(margin) for margin in margins}):
      tried = Rule(latents, margin)
      mended = np.mean([right(o.under(tried), o.turn) for o in wrong])
      broken = np.mean([not right(o.under(tried), o.turn) for o in kept] or [0])
      gain = float((1 - accuracy) * mended - accuracy * broken)
      if gain > best + 1e-12:
        best, rule = gain, tried
  return rule


@dataclasses.dataclass(frozen=True)
class _Half:
  picked: list[tuple[int, Turn, str]]
  asked: int
  accuracy: float


def _collect(samples: Sequence[Sample], asker: Asker, wanted: int) -> _Half:
  """Asks, and picks the first mistakes and right answers spread over all."""
  asked = questions(samples, ASKED * wanted)
  texts = asker.answers([Ask(sample, turn.question) for sample, turn in asked])
  answers = [(*one, text) for one, text in zip(asked, texts, strict=True)]
  good = [one for one in answers if right(one[2], one[1])]
  bad = [one for one in answers if not right(one[2], one[1])]
  spread = np.linspace(0, len(good) - 1, min(RIGHT * wanted, len(good)))
  picked = bad[:wanted] + [good[int(i)] for i in spread]
  return _Half(picked, len(asked), len(good) / max(1, len(asked)))


def _ablate(
  picked: Sequence[tuple[int, Turn, str]],
  asker: Asker,
  half: str,
  price: Price,
  rule: Rule,
  sizes: Sequence[int],
) -> list[Answered]:
  """Prices what the rule touches, and asks again without 1, 2, ... pushers."""
  answers, asks = [], []
  for sample, turn, text in picked:
    priced = None
    if rule.latents:
      priced = price(half, sample, turn.question, rule.margin)
    if priced is None:
      answers.append(Answered(sample, turn, text, np.inf, [], {}))
      continue
    pushers = priced.pushers(max(sizes))
    answers.append(Answered(sample, turn, text, priced.margin, pushers, {}))
    asks.extend(
      Ask(sample, turn.question, causes.ablation(pushers[:size]))
      for size in sizes
    )
  texts = iter(asker.answers(asks))
  for one in answers:
    if one.margin < np.inf:
      one.edited.update((size, next(texts)) for size in sizes)
  return answers


def _random(
  answers: Sequence[Answered],
  asker: Asker,
  rule: Rule,
  fired: Callable[[int], np.ndarray],
  rng: np.random.Generator,
) -> list[str]:
  """The answers with random latents in the place of the rule's."""
  texts = [one.text for one in answers]
  touched = [i for i, one in enumerate(answers) if one.touched(rule)]
  asks = []
  for i in touched:
    one = answers[i]
    drawn = eq.draw(rng, fired(one.sample), one.pushers[: rule.latents])
    asks.append(Ask(one.sample, one.turn.question, causes.ablation(drawn)))
  for i, text in zip(touched, asker.answers(asks), strict=True):
    texts[i] = text
  return texts


def _figures(
  answers: Sequence[Answered], texts: Sequence[str], suffix: str
) -> dict[str, Any]:
  pairs = list(zip(answers, texts, strict=True))
  mended = [right(text, one.turn) for one, text in pairs if not one.correct]
  broken = [not right(text, one.turn) for one, text in pairs if one.correct]
  return {
    f'mended{suffix}': stats.share_figure(mended, NO_WRONG),
    f'broken{suffix}': stats.share_figure(broken, 'no answer was right'),
  }
