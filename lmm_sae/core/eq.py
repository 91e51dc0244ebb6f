"""The EQ study: do emotion latents cause the subject's answers about feelings?

Over the answers about emotions that are right:

  top      share whose strongest pushing latent stands for the true emotion
  top5     share with such a latent among the five strongest
  ablated  share of answers that change when the n strongest are ablated, for
           each n; `random` the same for random latents that fire on the image

Emotion is stored redundantly, so it takes several latents to break an answer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lmm_sae.core import causes, stats
from lmm_sae.core.asking import Ask, Asker
from lmm_sae.core.records import Attribution

SIZES = (1, 2, 3, 5, 10)  # latents ablated together
NONE_RIGHT = 'no answer about emotions was right'


def study(
  answers: Sequence[Attribution],
  names: dict[int, str],
  asker: Asker,
  fired: Callable[[int], np.ndarray],
  seed: int,
) -> dict[str, Any]:
  """The figures, each {value, n, ci}, and the cases behind them.

  Args:
    answers: attributed answers to questions about emotions.
    names: latent -> concept.
    fired: sample -> the latents that fire on its image.
  """
  answers = [answer for answer in answers if answer.correct]
  pushers = [pushing(answer) for answer in answers]
  named = [
    [names.get(latent) == answer.target for latent in latents[:5]]
    for answer, latents in zip(answers, pushers, strict=True)
  ]
  rng = np.random.default_rng(seed)
  sets = {
    '': pushers,
    'random': [
      draw(rng, fired(answer.sample), latents)
      for answer, latents in zip(answers, pushers, strict=True)
    ],
  }
  edited = {
    control: _edited(asker, answers, latents)
    for control, latents in sets.items()
  }
  shares = {
    control: {
      str(n): stats.share_figure(
        [
          text != answer.text
          for answer, text in zip(answers, texts, strict=True)
        ],
        NONE_RIGHT,
      )
      for n, texts in by_size.items()
    }
    for control, by_size in edited.items()
  }
  return {
    'top': stats.share_figure([row[:1] == [True] for row in named], NONE_RIGHT),
    'top5': stats.share_figure([any(row) for row in named], NONE_RIGHT),
    'ablated': shares[''],
    'random': shares['random'],
    'cases': [
      {
        'sample': answer.sample,
        'prompt': answer.prompt,
        'text': answer.text,
        'latents': pushers[i],
        'ablated': {str(n): texts[i] for n, texts in edited[''].items()},
      }
      for i, answer in enumerate(answers)
    ],
  }


def pushing(answer: Attribution) -> list[int]:
  """The recorded latents that pushed the answer, strongest first."""
  effects = [one for one in answer.latents if one.effect > 0]
  effects.sort(key=lambda one: -one.effect)
  return [one.latent for one in effects]


def draw(
  rng: np.random.Generator, fired_M: np.ndarray, latents: Sequence[int]
) -> list[int]:
  """As many random latents out of those that fire, none of `latents`."""
  others = np.setdiff1d(fired_M, latents)
  return rng.permutation(others)[: len(latents)].tolist()


def _edited(
  asker: Asker, answers: Sequence[Attribution], latents: Sequence[list[int]]
) -> dict[int, list[str]]:
  """The texts by number of ablated latents; one answer's rows together."""
  asks = [
    Ask(answer.sample, answer.prompt, causes.ablation(some[:n]))
    for answer, some in zip(answers, latents, strict=True)
    for n in SIZES
  ]
  texts = asker.answers(asks)
  return {n: texts[i :: len(SIZES)] for i, n in enumerate(SIZES)}
