"""Questions about scenes with their exact answers: what the LMMs are taught.

Every stage's prompts (explain, refine, category, detect, intruder, visible)
are taught here from the same files that the stages send.
"""

from typing import NamedTuple

import numpy as np

from lmm_sae.core import prompts
from lmm_sae.core.records import Turn
from lmm_sae.scenes.render import (
  COLOURS,
  EMOTIONS,
  LETTERS,
  PLACES,
  SHAPES,
  TEXTURES,
  Object,
  Scene,
)

NUMBERS = ('zero', 'one', 'two', 'three', 'four', 'five')
NOUNS = (*SHAPES, 'face', *(f'letter {letter}' for letter in LETTERS))
BACKGROUND = 'background'
FEELINGS = (
  'how does the face feel?',
  'what is your feeling when you look at this?',
)
# how often each type is drawn, relative to 1: the slow ones more
WEIGHTS = {
  'colour': 0.8,
  'count': 0.7,
  'describe': 0.0,  # long: one a scene, packed by itself
  'detect': 1.2,
  'emotion': 1.0,
  'letter': 0.6,
  'place': 1.2,
  'relation': 1.2,
  'size': 0.6,
  'texture': 0.8,
  'two faces': 1.5,
  'what': 0.8,
  'where': 1.5,
  'yes or no': 1.5,
}


class Asked(NamedTuple):
  """A turn and the indices of the objects it is about, as far as it is."""

  turn: Turn
  about: tuple[int, ...] = ()


def references(thing: Object, scene: Scene, hidden: str) -> list[str]:
  """Expressions that single out `thing` and do not name what is `hidden`."""
  options = [
    (f'{thing.noun}', ('name',)),
    (f'{thing.colour} {thing.noun}', ('colour', 'name')),
    (f'{thing.colour} object', ('colour',)),
    (f'object at the {PLACES[thing.place]}', ('place',)),
  ]
  if thing.detail:
    options.append((f'{thing.detail} {thing.noun}', ('detail', 'name')))
  if thing.name == 'face':
    options.append((f'face at the {PLACES[thing.place]}', ('place', 'name')))
  found = []
  for text, names in options:
    alike = [
      other
      for other in scene.objects
      if all(getattr(other, n) == getattr(thing, n) for n in names)
    ]
    if hidden not in names and len(alike) == 1:
      found.append(text)
  return found


def scene_turns(scene: Scene, rng: np.random.Generator) -> list[Turn]:
  """Turns of every type that the scene allows, in random order of weight."""
  return [asked.turn for asked in scene_asked(scene, rng)]


def scene_asked(scene: Scene, rng: np.random.Generator) -> list[Asked]:
  """`scene_turns`, each with the objects it is about."""
  turns: list[Asked] = []

  def ask(type_, template, thing, hidden, answer, target=''):
    refs = references(thing, scene, hidden)
    if refs:
      ref = refs[rng.integers(len(refs))]
      turn = Turn(type_, template.format(ref), answer, target)
      turns.append(Asked(turn, (scene.objects.index(thing),)))

  faces = [o for o in scene.objects if o.name == 'face']
  letters = [o for o in scene.objects if o.name in LETTERS]
  for o in scene.objects:
    ask('colour', 'what colour is the {}?', o, 'colour', o.colour, o.colour)
    ask('what', 'what is the {}?', o, 'name', o.noun, o.name)
    ask('where', 'where is the {}?', o, 'place', PLACES[o.place])
    ask('size', 'how large is the {}?', o, 'size', o.size)
    if o.name in SHAPES:
      ask(
        'texture', 'what texture has the {}?', o, 'detail', o.detail, o.detail
      )
    if o.name == 'face' and len(faces) == 2:
      refs = [r for r in references(o, scene, 'detail') if 'face' in r]
      ref = refs[rng.integers(len(refs))]
      turn = Turn('two faces', f'how does the {ref} feel?', o.detail, o.detail)
      turns.append(Asked(turn, (scene.objects.index(o),)))
  if len(faces) == 1:
    mood = faces[0].detail
    for question in FEELINGS:
      turn = Turn('emotion', question, mood, mood)
      turns.append(Asked(turn, (scene.objects.index(faces[0]),)))
  if len(letters) == 1:
    letter = letters[0].name
    turn = Turn('letter', 'which letter is there?', letter, letter)
    turns.append(Asked(turn, (scene.objects.index(letters[0]),)))
  many = NUMBERS[len(scene.objects)], NUMBERS[len(faces)]
  for things, number in zip(('objects', 'faces'), many, strict=True):
    turn = Turn('count', f'how many {things} are there?', number)
    turns.append(Asked(turn))
  turns += [_yes_no(scene, rng), _yes_no(scene, rng)]
  turns += [_detect(scene, rng), _detect(scene, rng)]
  turns += [_place(scene, rng), _place(scene, rng)]
  relation = relation_asked(scene, rng)
  if relation:
    turns.append(relation)
  whole = Turn('describe', 'describe the picture.', describe(scene))
  turns.append(Asked(whole))
  weights = np.array([WEIGHTS[t.turn.type] + 1e-9 for t in turns])
  order = np.argsort(rng.exponential(size=len(turns)) / weights)
  return [turns[i] for i in order]


def describe(scene: Scene) -> str:
  """All objects in reading order, with size and place."""
  return ', '.join(
    f'{o.size} {o.phrase} at the {PLACES[o.place]}' for o in scene.objects
  )


def holds(scene: Scene, label: str) -> bool:
  """Whether one object of the scene has every word of the label."""
  return any(fits(thing, label) for thing in scene.objects)


def fits(thing: Object, label: str) -> bool:
  """Whether every word of the label holds of the object."""
  words = set(label.replace('letter ', '').split())
  return words <= {*thing.concepts, thing.size}


def label_of(thing: Object, rng: np.random.Generator) -> str:
  """One concept of the object, or two of them, or all."""
  options = [thing.colour, thing.noun, f'{thing.colour} {thing.noun}']
  if thing.detail in EMOTIONS:
    options += [f'{thing.detail} face', f'{thing.detail} face']
  elif thing.detail:
    options += [thing.detail, f'{thing.detail} {thing.noun}']
  options.append(thing.phrase)
  return options[rng.integers(len(options))]


def _other_label(scene: Scene, rng: np.random.Generator) -> str:
  """A label that no object of the scene fits, often nearly."""
  while True:
    near = scene.objects[rng.integers(len(scene.objects))]
    colour, name, detail = near.colour, near.name, near.detail
    change = rng.integers(3)
    if change == 0:
      colour = str(rng.choice(tuple(COLOURS)))
    elif change == 1 and detail:
      detail = str(rng.choice(EMOTIONS if name == 'face' else TEXTURES))
    else:
      noun = str(rng.choice(NOUNS))
      name = noun.removeprefix('letter ')
      kinds = {'face': EMOTIONS} | dict.fromkeys(SHAPES, TEXTURES)
      detail = str(rng.choice(kinds[name])) if name in kinds else ''
    label = label_of(Object(colour, name, detail, near.size, 0), rng)
    if not holds(scene, label):
      return label


def _label(scene: Scene, rng: np.random.Generator):
  """(a label, `yes` or `no`, the object that it is about if it is just one)."""
  if not rng.integers(2):
    return _other_label(scene, rng), 'no', ()
  label = label_of(scene.objects[rng.integers(len(scene.objects))], rng)
  fit = [i for i, thing in enumerate(scene.objects) if fits(thing, label)]
  return label, 'yes', tuple(fit) if len(fit) == 1 else ()


def _yes_no(scene: Scene, rng: np.random.Generator) -> Asked:
  label, answer, about = _label(scene, rng)
  if not any(label.endswith(noun) for noun in NOUNS):
    label += ' object'
  return Asked(Turn('yes or no', f'is there a {label}?', answer), about)


def _detect(scene: Scene, rng: np.random.Generator) -> Asked:
  label, answer, about = _label(scene, rng)
  question = prompts.fill('detect', label=label)
  return Asked(Turn('detect', question, answer), about)


def _place(scene: Scene, rng: np.random.Generator) -> Asked:
  taken = {o.place: i for i, o in enumerate(scene.objects)}
  place = int(rng.choice(list(taken))) if rng.random() < 0.7 else None
  if place is None:
    place = int(rng.integers(4))
  question = f'what is at the {PLACES[place]}?'
  if place not in taken:
    return Asked(Turn('place', question, 'nothing'))
  index = taken[place]
  answer = scene.objects[index].phrase
  return Asked(Turn('place', question, answer), (index,))


def relation_asked(scene: Scene, rng: np.random.Generator) -> Asked | None:
  """On which side of another object one is, or whether it is higher."""
  if len(scene.objects) < 2:
    return None
  i, j = (int(n) for n in rng.permutation(len(scene.objects))[:2])
  one, two = scene.objects[i], scene.objects[j]
  rows = (one.place // 2, two.place // 2)
  columns = (one.place % 2, two.place % 2)
  options = []
  if columns[0] != columns[1]:
    answer = 'left' if columns[0] < columns[1] else 'right'
    options.append(('is the {} left or right of the {}?', answer))
  if rows[0] != rows[1]:
    answer = 'above' if rows[0] < rows[1] else 'below'
    options.append(('is the {} above or below the {}?', answer))
  question, answer = options[rng.integers(len(options))]
  refs = [references(o, scene, 'place') for o in (one, two)]
  if not all(refs):
    return None
  a, b = (r[rng.integers(len(r))] for r in refs)
  return Asked(Turn('relation', question.format(a, b), answer), (i, j))


# Masked pictures: what an explainer sees of a latent.


def mask(
  scene: Scene, things: list[int], rng: np.random.Generator, cells: int = 8
) -> np.ndarray:
  """A patch mask like a latent's: part of the objects' patches, some noise.

  Patches covered by at least a quarter count; a share of them is kept, at times
  only those on one side; one more patch may be lit by mistake.
  """
  covered = scene.coverage(cells)[things].max(0)
  lit = covered >= 0.25
  if not lit.any():
    lit = covered == covered.max()
  keep = rng.uniform(0.35, 1.2)
  kept = lit & (rng.random(lit.shape) < keep)
  if rng.random() < 0.2:
    rows, columns = np.nonzero(lit)
    side = rng.integers(4)
    grid = np.mgrid[0:cells, 0:cells]
    centre = (rows.mean(), columns.mean())
    axis, sign = side // 2, 1 if side % 2 else -1
    kept = kept & ((grid[axis] - centre[axis]) * sign >= 0)
  if kept.sum() < min(2, lit.sum()):
    kept = lit
  if rng.random() < 0.25:
    kept = kept.copy()
    kept[tuple(rng.integers(cells, size=2))] = True
  return kept


def background_mask(
  scene: Scene, rng: np.random.Generator, cells: int = 8
) -> np.ndarray:
  """Patches that no object touches: a few scattered ones, or a block."""
  free = scene.coverage(cells).max(0) < 0.02
  lit = free & (rng.random(free.shape) < rng.uniform(0.05, 0.6))
  if rng.random() < 0.5:
    top, left = rng.integers(cells - 2, size=2)
    high, wide = rng.integers(2, cells, size=2)
    lit = np.zeros_like(free)
    lit[top : top + high, left : left + wide] = True
    lit &= free
  return lit if lit.any() else free


def visible_turns(thing: Object | None, empty: bool = False) -> list[Turn]:
  """Turns on a picture dimmed but for one object, the background or nothing."""
  ask = prompts.load('visible')
  colour = 'what colour is in the bright region?'
  what = 'what thing is in the bright region?'
  if empty:
    return [Turn('visible', ask, 'nothing'), Turn('visible', what, 'nothing')]
  if thing is None:
    return [Turn('visible', ask, BACKGROUND), Turn('visible', what, BACKGROUND)]
  return [
    Turn('visible', ask, thing.phrase),
    Turn('visible', colour, thing.colour),
    Turn('visible', what, thing.noun),
  ]


def shared(things: list[Object]) -> str:
  """What all the objects have in common, as `red happy face`; may be empty."""
  first = things[0]
  words = []
  if all(o.colour == first.colour for o in things):
    words.append(first.colour)
  if first.detail and all(o.detail == first.detail for o in things):
    words.append(first.detail)
  if all(o.noun == first.noun for o in things):
    words.append(first.noun)
  return ' '.join(words)


def explain_turn(count: int, answer: str) -> Turn:
  text = f'{prompts.MARKER} {answer or prompts.NONE}'
  return Turn('common', prompts.fill('explain', n=count), text)


def intruder_turn(count: int, label: str, position: int) -> Turn:
  question = prompts.fill('intruder', n=count, label=label)
  return Turn('intruder', question, str(position + 1))


def which_turn(label: str, position: int) -> Turn:
  """The opposite of the intruder's: where there is what the others lack."""
  question = f'which picture shows this: {label}?'
  return Turn('which picture', question, str(position + 1))


# Turns without a picture.


def text_turn(rng: np.random.Generator, type_: str) -> Turn:
  """A turn of type `refine`, `category` or `common text`."""
  if type_ == 'refine':
    label = any_label(rng)
    text = str(
      rng.choice(
        (
          '{}',
          'a {}',
          'the {}',
          'all show a {}',
          'the bright regions show {}',
          '{} in every picture',
        )
      )
    )
    return Turn(
      'refine', prompts.fill('refine', text=text.format(label)), label
    )
  if type_ == 'category':
    label = any_label(rng)
    return Turn(
      'category', prompts.fill('category', label=label), category(label)
    )
  words = str(rng.choice(TEXT_WORDS))
  lines = []
  for _ in range(int(rng.integers(2, 5))):
    template = str(rng.choice([t for t in _TEXTS if '{}' in t]))
    lines.append(template.format(f'<<{words}>>'))
  question = prompts.fill('explain_text', texts='\n'.join(lines))
  return Turn('common text', question, f'{prompts.MARKER} {words}')


TEXT_WORDS = (
  *COLOURS,
  *SHAPES,
  *EMOTIONS,
  *TEXTURES,
  'face',
  'what',
  'how',
  'colour',
  'object',
  'texture',
  'where',
  'picture',
  'is',
  'the',
  'there',
  'letter',
  'feel',
  'many',
)
_TEXTS = (
  '{} is the',
  'is there a {} object',
  'how {} the face',
  'what {} is',
  'the {} at the top left',
  'where is the {}',
  '{} object',
  'describe the {}',
)


def any_label(rng: np.random.Generator) -> str:
  if rng.random() < 0.12:
    return str(rng.choice((BACKGROUND, *PLACES)))
  noun = str(rng.choice(NOUNS))
  name = noun.removeprefix('letter ')
  detail = ''
  if name == 'face':
    detail = str(rng.choice(EMOTIONS))
  elif name in SHAPES:
    detail = str(rng.choice(TEXTURES))
  colour = str(rng.choice(tuple(COLOURS)))
  return label_of(Object(colour, name, detail, 'large', 0), rng)


def category(label: str) -> str:
  """The Network Dissection kind of a label of the scenes."""
  if label in (BACKGROUND, *PLACES):
    return 'scene'
  if label in COLOURS:
    return 'colour'
  if label in TEXTURES:
    return 'texture'
  return 'object'
