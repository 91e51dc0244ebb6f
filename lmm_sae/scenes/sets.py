"""Sets of dimmed pictures, as an explainer sees a latent's exemplars.

The questions about them are about pictures, by their numbers from 0.
"""

from typing import NamedTuple

import numpy as np

from lmm_sae.core.records import Turn
from lmm_sae.scenes import model, questions, render
from lmm_sae.scenes.questions import Asked
from lmm_sae.scenes.render import Scene


class Shown(NamedTuple):
  """A picture of a set and the objects that are lit in it."""

  scene: Scene
  lit: np.ndarray
  things: tuple[render.Object, ...] = ()

  def fits(self, label: str) -> bool:
    return any(questions.fits(thing, label) for thing in self.things)


def sample(
  rng: np.random.Generator, images: int
) -> tuple[list[Shown], list[Asked]]:
  """The pictures, and at most three questions about all of them."""
  draw = rng.random()
  if draw < 0.07:  # nothing but background
    scenes = [render.sample(rng) for _ in range(images)]
    shown = [Shown(x, questions.background_mask(x, rng)) for x in scenes]
    return shown, [Asked(questions.explain_turn(images, questions.BACKGROUND))]
  if draw < 0.09:  # nothing at all
    dark = np.zeros((model.CELLS, model.CELLS), bool)
    shown = [Shown(render.sample(rng), dark) for _ in range(images)]
    return shown, [Asked(questions.explain_turn(images, ''))]
  fixed = _fixed(rng) if draw > 0.16 else {}
  if draw < 0.5 or images < 3:
    shown = [_lit(render.sample(rng, fixed), fixed, rng) for _ in range(images)]
    answer = questions.shared([one.things[0] for one in shown])
    explain = Asked(questions.explain_turn(images, answer))
    return shown, [explain, *intruders(shown, rng)[:1]]
  if rng.random() < 0.7:  # attributes that each lack in a picture of its own
    fixed = {'colour': str(rng.choice(tuple(render.COLOURS))), **_kind(rng)}
    if fixed.get('detail') in render.TEXTURES and rng.random() < 0.5:
      fixed['name'] = str(rng.choice(render.SHAPES))
  shown = _with_intruders(fixed, images, rng)
  return shown, intruders(shown, rng)[:3]


def by_number(shown: list[Shown]) -> list[Asked]:
  """Every picture asked for by its number, but for those of several objects."""
  asked = []
  for number, one in enumerate(shown):
    if len(one.things) > 1:
      continue
    thing = one.things[0] if one.things else None
    answer = questions.visible_turns(thing, not one.lit.any())[0].answer
    question = f'what is in the bright region of picture {number + 1}?'
    asked.append(Asked(Turn('nth picture', question, answer), (number,)))
  return asked


def by_content(shown: list[Shown], rng: np.random.Generator) -> list[Asked]:
  """Pictures asked for by a label that is only theirs."""
  asked = []
  for number in rng.permutation(len(shown)).tolist():
    if not shown[number].things:
      continue
    label = questions.label_of(shown[number].things[0], rng)
    if sum(one.fits(label) for one in shown) == 1:
      asked.append(Asked(questions.which_turn(label, number), (number,)))
  return asked


def intruders(shown: list[Shown], rng: np.random.Generator) -> list[Asked]:
  """Pictures asked for by what all the others share, in random order.

  The label is all that the others' first objects have in common.
  """
  asked = []
  for odd in rng.permutation(len(shown)).tolist():
    alike = [one.things[0] for i, one in enumerate(shown) if i != odd]
    label = questions.shared(alike)
    if label and not shown[odd].fits(label):
      turn = questions.intruder_turn(len(shown), label, odd)
      asked.append(Asked(turn, (odd,)))
  return asked


def _with_intruders(
  fixed: dict[str, str], images: int, rng: np.random.Generator
) -> list[Shown]:
  """A set of which all pictures but one share each of `fixed`, or all of it."""
  if len(fixed) > 1 and rng.random() < 0.8:
    parts = [{name: value} for name, value in fixed.items()]
  else:
    parts = [fixed]
  odds = rng.permutation(images)[: len(parts)].tolist()
  shown = []
  for number in range(images):
    want, lacks = {}, {}
    for odd, part in zip(odds, parts, strict=True):
      (lacks if odd == number else want).update(part)
    while True:
      one = _lit(render.sample(rng, want), want, rng)
      if not lacks or not any(_agrees(thing, lacks) for thing in one.things):
        break
    shown.append(one)
  return shown


def _agrees(thing: render.Object, fixed: dict[str, str]) -> bool:
  return all(getattr(thing, name) == value for name, value in fixed.items())


def _fixed(rng: np.random.Generator) -> dict[str, str]:
  """What a set of pictures shares: mostly one attribute, at times two."""
  colour = {'colour': str(rng.choice(tuple(render.COLOURS)))}
  draw = rng.random()
  if draw < 0.3:
    return colour
  return _kind(rng) | (colour if draw < 0.45 else {})


def _kind(rng: np.random.Generator) -> dict[str, str]:
  """A name, a texture or an emotion."""
  draw = rng.random()
  if draw < 0.4:
    names = (*render.SHAPES, 'face', *render.LETTERS)
    return {'name': str(rng.choice(names))}
  details = render.TEXTURES if draw < 0.6 else render.EMOTIONS
  return {'detail': str(rng.choice(details))}


def _lit(
  scene: Scene, fixed: dict[str, str], rng: np.random.Generator
) -> Shown:
  """Lights the objects that obey `fixed` (one of them if it is empty)."""
  agree = [i for i, thing in enumerate(scene.objects) if _agrees(thing, fixed)]
  if not fixed:
    agree = [int(rng.choice(agree))]
  if len(agree) > 1 and rng.random() < 0.1:
    agree = agree[:1]
  things = tuple(scene.objects[i] for i in agree)
  return Shown(scene, questions.mask(scene, agree, rng), things)
