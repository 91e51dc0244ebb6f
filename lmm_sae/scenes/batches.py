"""Training batches: scenes, questions and patch labels, from a seed alone.

A batch follows from (seed, stage, step), so that a run that was killed goes on
with exactly the batches it would have seen.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from lmm_sae.core import masks, prompts
from lmm_sae.scenes import model, questions, render, sets
from lmm_sae.scenes.questions import Asked
from lmm_sae.scenes.render import Scene

WEIGHTS_SEED = 20_241_122  # first word of every training seed; no data set's
HEADS = {
  'colour': (None, *render.COLOURS),
  'name': (None, *render.SHAPES, 'face', *render.LETTERS),
  'detail': ('', *render.TEXTURES, *render.EMOTIONS),
  'size': (None, *render.SIZES),
  'place': (None, *range(4)),
}
TILES = 0.6  # share of the tiles that stage A keeps, of those with an object
OBJECTS = 4  # more than a scene ever has


@dataclasses.dataclass(frozen=True)
class Batch:
  """B items, each with `images` pictures and groups of questions.

  Attributes:
    pixels_B3HW: float32 normalised views, base view first; where `tiles` is 1
      the only tile equals the base view and is not repeated here.
    labels: head -> int64 [views, 64], -1 where the head is not asked.
    regions: int64 [views, 64], which region of the item each patch shows, 0 for
      none: OBJECTS times the picture's number (from 0), plus the object's (from
      1), or plus 1 for all that is bright where there are several pictures.
    tiles: 0, 1 or 4 a picture; images: pictures an item, 0 for text alone.
    groups: packed questions, each group with a Q and a T of its own.
  """

  pixels_B3HW: np.ndarray
  labels: dict[str, np.ndarray]
  regions: np.ndarray
  tiles: int
  images: int
  groups: list['Group']

  def types(self) -> list[str]:
    """The type of each turn, over all groups in order."""
    return [x for group in self.groups for row in group.types for x in row]


class Group(NamedTuple):
  """Questions: ids and targets [B, Q, T], types [B][Q], about [B, Q, 2].

  A target is -1 where no token is to be predicted; `about` holds regions that
  a question is about, the same one twice or -1 where there are fewer than two.
  """

  ids: np.ndarray
  targets: np.ndarray
  types: list[list[str]]
  about: np.ndarray


@functools.cache
def _tokenizer():
  return model.make_tokenizer()


@functools.lru_cache(100_000)
def tokens(text: str) -> tuple[int, ...]:
  return tuple(_tokenizer().backend_tokenizer.encode(text).ids)


@functools.cache
def names(images: int) -> np.ndarray:
  """Token ids of the words before each of several pictures, [images, n]."""
  numbers = range(1, images + 1)
  return np.array([tokens(prompts.fill('picture', n=n)) for n in numbers])


def normalise(pixels: np.ndarray) -> np.ndarray:
  """[..., H, W, 3] uint8 -> [..., 3, H, W] float32, as the processor does."""
  x = (pixels.astype(np.float32) * (1 / 255) - 0.5) * 4
  return np.moveaxis(x, -1, -3)


def views(image: Image.Image, tiles: int) -> np.ndarray:
  """uint8 [1 or 5, 64, 64, 3]: the base view, then the tiles of 128 px."""
  side = (model.VIEW, model.VIEW)
  base = np.asarray(image.resize(side, Image.Resampling.BICUBIC))
  if tiles < 4:
    return base[None]
  whole = np.asarray(image)
  half = model.VIEW
  cut = whole.reshape(2, half, 2, half, 3).transpose(0, 2, 1, 3, 4)
  return np.concatenate([base[None], cut.reshape(4, half, half, 3)])


def owners(
  scene: Scene, tiles: int, lit: np.ndarray | None = None
) -> np.ndarray:
  """int64 [views, 64]: 1 + index of the object that covers most of a patch.

  0 where the patch is covered less than a quarter, or dimmed.
  """
  owner = _owners(scene, model.CELLS, lit)[None]
  if tiles == 4:
    fine = _owners(scene, 2 * model.CELLS, lit)
    cut = fine.reshape(2, model.CELLS, 2, model.CELLS).transpose(0, 2, 1, 3)
    owner = np.concatenate([owner, cut.reshape(4, model.CELLS, model.CELLS)])
  return owner.reshape(len(owner), -1)


def _owners(scene: Scene, cells: int, lit: np.ndarray | None) -> np.ndarray:
  covered = scene.coverage(cells)
  owner = np.where(covered.max(0) >= 0.25, covered.argmax(0) + 1, 0)
  if lit is not None:
    times = cells // lit.shape[0]
    owner = owner * lit.repeat(times, 0).repeat(times, 1)
  return owner


def patch_labels(scene: Scene, owner: np.ndarray) -> dict[str, np.ndarray]:
  """Per view and patch, the class of its owner under every head.

  `place` is asked of base views alone: a tile does not know where it stands.
  """
  found = {}
  for head, classes in HEADS.items():
    of = [0] + [classes.index(getattr(o, head)) for o in scene.objects]
    found[head] = np.array(of)[owner]
  found['place'][1:] = -1
  return found


def picture(scene: Scene, side: int, lit: np.ndarray | None) -> Image.Image:
  """The scene at `side` pixels, dimmed outside the lit patches."""
  image = Image.fromarray(scene.pixels_HW3)
  if side != render.SIDE:
    image = image.resize((side, side), Image.Resampling.BICUBIC)
  if lit is None:
    return image
  return masks.dim(image, masks.upsample(lit, (side, side), 'exact'))


def group(asked: list[list[Asked]]) -> Group:
  """Turns [B][Q], each about one or two regions or none, as a padded group."""
  rows, about = [], []
  for turn, regions in (pair for item in asked for pair in item):
    question, answer = tokens(turn.question), tokens(turn.answer)
    ids = (*question, model.ASSISTANT, *answer, model.EOS)
    rows.append((ids, len(question)))
    about.append((*regions, *regions)[:2] if regions else (-1, -1))
  longest = max(len(ids) for ids, _ in rows) - 1
  inputs = np.full((len(rows), longest), model.PAD)
  targets = np.full((len(rows), longest), -1)
  for row, (ids, start) in enumerate(rows):
    inputs[row, : len(ids) - 1] = ids[:-1]
    targets[row, start : len(ids) - 1] = ids[start + 1 :]
  shape = (len(asked), len(asked[0]), longest)
  types = [[turn.type for turn, _ in item] for item in asked]
  return Group(
    inputs.reshape(shape),
    targets.reshape(shape),
    types,
    np.array(about).reshape(*shape[:2], 2),
  )


def _object(number: int) -> int:
  """The region of that object of a single picture."""
  return number + 1


def _bright(number: int) -> int:
  """The region of all that is bright in that picture of several."""
  return number * OBJECTS + 1


def _side(tiles: int) -> int:
  return render.SIDE if tiles == 4 else model.VIEW


def _stack(pictures, tiles, images, groups) -> Batch:
  """pictures: (image, scene, lit) of every item, in order."""
  seen = [views(image, tiles) for image, _, _ in pictures]
  owner = [owners(scene, tiles, lit) for _, scene, lit in pictures]
  labels = [
    patch_labels(scene, mine)
    for (_, scene, _), mine in zip(pictures, owner, strict=True)
  ]
  joined = {
    head: np.concatenate([found[head] for found in labels]) for head in HEADS
  }
  if images > 1:
    owner = [
      (mine > 0) * _bright(number % images) for number, mine in enumerate(owner)
    ]
  regions = np.concatenate(owner)
  pixels = normalise(np.concatenate(seen))
  return Batch(pixels, joined, regions, tiles, images, groups)


def patches(rng: np.random.Generator, scenes: int) -> Batch:
  """Views for the dense pre-training: bases and tiles, a third dimmed.

  Scenes are full, and tiles that show no object are left out, so that nearly
  every view teaches something.
  """
  pictures = []
  for _ in range(scenes):
    scene = render.sample(rng, count=3)
    lit = _any_mask(scene, rng)[0] if rng.random() < 0.33 else None
    pictures.append((picture(scene, render.SIDE, lit), scene, lit))
  whole = _stack(pictures, 4, 1, [])
  kept = (whole.labels['name'] > 0).any(1) & (rng.random(5 * scenes) < TILES)
  kept[::5] = True
  return dataclasses.replace(
    whole,
    pixels_B3HW=whole.pixels_B3HW[kept],
    labels={head: found[kept] for head, found in whole.labels.items()},
    regions=whole.regions[kept],
  )


def _any_mask(scene: Scene, rng: np.random.Generator):
  """(lit patches, the object they show or None, whether nothing is lit)."""
  draw = rng.random()
  if draw < 0.04:
    return np.zeros((model.CELLS, model.CELLS), bool), None, True
  if draw < 0.2:
    return questions.background_mask(scene, rng), None, False
  index = int(rng.integers(len(scene.objects)))
  return questions.mask(scene, [index], rng), scene.objects[index], False


def single(
  rng: np.random.Generator,
  items: int,
  tiles: int,
  asked: int,
  describe: bool,
) -> Batch:
  """One whole picture an item and `asked` short questions about it."""
  side = _side(tiles)
  pictures, short, detect, whole = [], [], [], []
  for _ in range(items):
    scene = _rich(rng)
    pictures.append((picture(scene, side, None), scene, None))
    turns = questions.scene_asked(scene, rng)
    if len(scene.objects) > 1:  # else few questions tell where two things are
      more = [questions.relation_asked(scene, rng) for _ in range(asked // 4)]
      turns = [one for one in more if one] + turns
    turns = _placed(turns, _object)
    plain = [t for t in turns if t.turn.type not in ('describe', 'detect')]
    short.append(_cycle(plain, asked))
    detect.append([t for t in turns if t.turn.type == 'detect'])
    whole.append([t for t in turns if t.turn.type == 'describe'])
  groups = [group(short), group(detect)]
  if describe:
    groups.append(group(whole))
  return _stack(pictures, tiles, 1, groups)


def _rich(rng: np.random.Generator) -> Scene:
  """Any scene; at times a full one, or two faces, which are rare."""
  draw = rng.random()
  if draw > 0.15:
    return render.sample(rng, count=3 if draw < 0.4 else None)
  while True:
    count = int(rng.integers(2, 4))
    scene = render.sample(rng, {'name': 'face'}, count)
    if sum(o.name == 'face' for o in scene.objects) == 2:
      return scene


def masked(rng: np.random.Generator, items: int, tiles: int) -> Batch:
  """One dimmed picture an item: what is in its bright region?"""
  side = _side(tiles)
  pictures, asked = [], []
  for _ in range(items):
    scene = render.sample(rng)
    lit, thing, empty = _any_mask(scene, rng)
    pictures.append((picture(scene, side, lit), scene, lit))
    turns = [Asked(t) for t in questions.visible_turns(thing, empty)]
    asked.append(_cycle(turns, 3))
  return _stack(pictures, tiles, 1, [group(asked)])


def common(rng: np.random.Generator, items: int, images: int) -> Batch:
  """Several dimmed pictures an item: what do they share, which one does not?

  Each of them is asked for by its number, and some by what they show.
  """
  pictures, first, each = [], [], []
  for _ in range(items):
    shown, asked = sets.sample(rng, images)
    for one in shown:
      image = picture(one.scene, model.VIEW, one.lit)
      pictures.append((image, one.scene, one.lit))
    own = [*sets.by_content(shown, rng)[:2], *sets.by_number(shown)] or asked
    first.append(_cycle(_placed([*asked, *own][:3], _bright), 3))
    each.append(_cycle(_placed(own, _bright), images + 2))
  return _stack(pictures, 1, images, [group(first), group(each)])


def _placed(asked: list[Asked], region: Callable[[int], int]) -> list[Asked]:
  """The questions, about regions instead of objects or pictures."""
  return [Asked(t, tuple(map(region, about))) for t, about in asked]


def _cycle(asked: list[Asked], count: int) -> list[Asked]:
  """`count` questions, the first ones again if there are fewer."""
  return [asked[i % len(asked)] for i in range(count)]


def text(rng: np.random.Generator, items: int, texts: int) -> Batch:
  """Refiner and category turns, and text explainer turns, no picture."""
  short = [
    Asked(questions.text_turn(rng, ('refine', 'category')[i % 2]))
    for i in range(items)
  ]
  long = [Asked(questions.text_turn(rng, 'common text')) for _ in range(texts)]
  empty = np.zeros((0, 3, model.VIEW, model.VIEW), np.float32)
  none = np.zeros((0, model.CELLS**2), int)
  return Batch(empty, {}, none, 1, 0, [group([short]), group([long])])
