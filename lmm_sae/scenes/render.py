"""Renders scenes whose masks and labels are exact: the embedded ground truth.

A scene is 128x128 pixels with one to three objects, each in a quadrant of its
own, on a tinted background. Everything is drawn with numpy from formulas of
our own (no font, no drawing library), so a scene is the same for ever: it
follows from the words of its seed alone.
"""

import dataclasses
import functools

import numpy as np

SIDE = 128  # pixels of a scene
PATCH = 16  # pixels of a base-view patch: 8 px of the 64 px view

COLOURS = {
  'red': (224, 36, 36),
  'orange': (250, 140, 20),
  'yellow': (245, 225, 40),
  'green': (36, 170, 60),
  'cyan': (50, 215, 225),
  'blue': (45, 75, 225),
  'purple': (155, 50, 200),
  'white': (245, 245, 245),
}
SHAPES = ('circle', 'square', 'triangle', 'star', 'ring', 'cross')
TEXTURES = ('solid', 'striped', 'dotted')
EMOTIONS = ('happy', 'sad', 'angry', 'surprised')
LETTERS = ('H', 'L', 'T', 'Z')
SIZES = {'small': 20.0, 'large': 28.0}  # radius in pixels
PLACES = ('top left', 'top right', 'bottom left', 'bottom right')
CONCEPTS = (*COLOURS, *SHAPES, 'face', *TEXTURES, *EMOTIONS, *LETTERS)


@dataclasses.dataclass(frozen=True)
class Object:
  """One object. `name` is a shape, `face` or a letter.

  `detail` is the texture of a shape, the emotion of a face, '' for a letter.
  `place` is an index into PLACES.
  """

  colour: str
  name: str
  detail: str
  size: str
  place: int

  @property
  def noun(self) -> str:
    return f'letter {self.name}' if self.name in LETTERS else self.name

  @property
  def concepts(self) -> tuple[str, ...]:
    """Those of CONCEPTS that hold of the object."""
    return tuple(c for c in (self.colour, self.detail, self.name) if c)

  @property
  def phrase(self) -> str:
    """Colour, detail and noun: `red striped square`, `blue happy face`."""
    return ' '.join(w for w in (self.colour, self.detail, self.noun) if w)


@dataclasses.dataclass(frozen=True)
class Scene:
  """A rendered scene: uint8 pixels; region ids, 0 background, i+1 object i."""

  objects: tuple[Object, ...]
  pixels_HW3: np.ndarray
  regions_HW: np.ndarray

  def coverage(self, cells: int = 8) -> np.ndarray:
    """[objects, cells, cells]: the share of each patch that object i covers."""
    step = SIDE // cells
    ids = np.arange(1, len(self.objects) + 1)[:, None, None]
    hit = (self.regions_HW[None] == ids).astype(np.float32)
    return hit.reshape(len(ids), cells, step, cells, step).mean((2, 4))


def sample_object(
  rng: np.random.Generator, place: int, fixed: dict[str, str] | None = None
) -> Object:
  """A random object; `fixed` holds colour, name, detail or size to its value.

  A third of the objects are faces, a fifth letters, the rest shapes.
  """
  fixed = fixed or {}
  detail = fixed.get('detail', '')
  name = fixed.get('name', '')
  if not name:
    if detail:
      kind = 'face' if detail in EMOTIONS else 'shape'
    else:
      kind = rng.choice(('face', 'letter', 'shape'), p=(0.35, 0.2, 0.45))
    if kind == 'face':
      name = 'face'
    else:
      name = str(rng.choice(LETTERS if kind == 'letter' else SHAPES))
  if not detail:
    if name == 'face':
      detail = str(rng.choice(EMOTIONS))
    elif name in SHAPES:
      detail = str(rng.choice(TEXTURES))
  colour = fixed.get('colour') or str(rng.choice(tuple(COLOURS)))
  size = fixed.get('size') or str(rng.choice(tuple(SIZES)))
  return Object(colour, name, detail, size, place)


def sample(
  rng: np.random.Generator,
  fixed: dict[str, str] | None = None,
  count: int | None = None,
) -> Scene:
  """A random scene; its first object (in a random place) obeys `fixed`.

  It has one to three objects, or `count`. No two objects of a scene agree in
  colour, detail and name.
  """
  count = count or int(rng.choice((1, 2, 3), p=(0.35, 0.4, 0.25)))
  places = rng.permutation(4)[:count]
  objects: list[Object] = []
  for i, place in enumerate(places):
    while True:
      new = sample_object(rng, int(place), fixed if i == 0 else None)
      if all(new.phrase != other.phrase for other in objects):
        break
    objects.append(new)
  objects.sort(key=lambda o: o.place)
  return draw(tuple(objects), rng)


def draw(objects: tuple[Object, ...], rng: np.random.Generator) -> Scene:
  """Pixels and regions of the objects on a random background."""
  pixels = _background(rng)
  regions = np.zeros((SIDE, SIDE), np.uint8)
  for i, thing in enumerate(objects):
    radius = SIZES[thing.size] * rng.uniform(0.94, 1.06)
    slack = 32 - radius - 2
    cy = 32 + 64 * (thing.place // 2) + rng.uniform(-slack, slack)
    cx = 32 + 64 * (thing.place % 2) + rng.uniform(-slack, slack)
    _draw_object(pixels, regions, i + 1, thing, cy, cx, radius, rng)
  noise = rng.standard_normal((SIDE, SIDE), np.float32)[..., None] * 4
  pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
  return Scene(objects, pixels, regions)


@functools.cache
def _axes() -> tuple[np.ndarray, np.ndarray]:
  return tuple(
    np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)  # pixel centres
  )


def _background(rng: np.random.Generator) -> np.ndarray:
  """Plain, gradient or blotched, in a dull tint: float32 [H, W, 3]."""
  base = rng.uniform(45, 105) + rng.uniform(-14, 14, 3)
  kind = rng.integers(3)
  if kind == 0:
    shade = np.zeros((SIDE, SIDE), np.float32)
  elif kind == 1:
    y, x = _axes()
    angle = rng.uniform(0, 2 * np.pi)
    shade = (np.cos(angle) * (x - 64) + np.sin(angle) * (y - 64)) * 0.35
  else:
    blotch = rng.standard_normal((16, 16)).astype(np.float32) * 11
    shade = blotch.repeat(8, 0).repeat(8, 1)
  return (base[None, None] + shade[..., None]).astype(np.float32)


def _draw_object(pixels, regions, region, thing, cy, cx, radius, rng) -> None:
  """Paints one object into pixels and regions, in its bounding box only."""
  top, left = (max(int(c - radius - 1), 0) for c in (cy, cx))
  bottom, right = (min(int(c + radius + 2), SIDE) for c in (cy, cx))
  box = np.s_[top:bottom, left:right]
  y, x = _axes()
  v, u = (y[box] - cy) / radius, (x[box] - cx) / radius  # about -1 .. 1
  inside = _outline(thing.name, u, v)
  colour = np.array(COLOURS[thing.colour], np.float32) + rng.uniform(-10, 10, 3)
  paint = np.broadcast_to(colour, (*inside.shape, 3)).copy()
  dark = colour * 0.28
  if thing.detail == 'striped':
    phase = rng.uniform(0, 8)
    paint[((x[box] + y[box] + phase) % 9) < 4] = dark
  elif thing.detail == 'dotted':
    py, px = rng.uniform(0, 9, 2)
    near = ((x[box] + px) % 9 - 4.5) ** 2 + ((y[box] + py) % 9 - 4.5) ** 2
    paint[near < 7.5] = dark
  elif thing.name == 'face':
    paint[_features(thing.detail, u, v)] = (20, 16, 16)
  pixels[box][inside] = paint[inside]
  regions[box][inside] = region


def _outline(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Boolean inside of a named outline; u to the right, v down, in -1 .. 1."""
  r = np.hypot(u, v)
  a, b = np.abs(u), np.abs(v)
  if name in ('circle', 'face'):
    return r <= 1
  if name == 'square':
    return np.maximum(a, b) <= 0.84
  if name == 'triangle':
    return (v <= 0.8) & (v >= -1) & (a <= (v + 1) * 0.53)
  if name == 'ring':
    return (r <= 1) & (r >= 0.52)
  if name == 'cross':
    return (np.minimum(a, b) <= 0.27) & (np.maximum(a, b) <= 0.95)
  if name == 'star':
    angle = np.mod(np.arctan2(u, -v), 2 * np.pi / 5) - np.pi / 5
    # the edge of a five-pointed star between a tip (1) and a notch (.42)
    tip, notch = 1.0, 0.42
    t = np.pi / 5 - np.abs(angle)  # 0 at a tip, pi/5 at a notch
    edge = (tip * notch * np.sin(np.pi / 5)) / (
      tip * np.sin(t) + notch * np.sin(np.pi / 5 - t)
    )
    return r <= edge
  return _letter(name, u, v)


def _letter(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Block letters of bars, about 1.3 wide and 1.8 high."""
  a, b = np.abs(u), np.abs(v)
  frame = (a <= 0.68) & (b <= 0.9)
  top, bottom = v <= -0.52, v >= 0.52
  if name == 'H':
    return frame & ((a >= 0.32) | (b <= 0.19))
  if name == 'L':
    return frame & ((u <= -0.28) | bottom)
  if name == 'T':
    return frame & (top | (a <= 0.2))
  if name == 'Z':
    return frame & (top | bottom | (np.abs(u + v * 0.9) <= 0.26))
  raise ValueError(f'{name!r} is no outline that the scenes know')


def _features(emotion: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Eyes, brows and mouth of a face."""
  a = np.abs(u)
  eye = 0.19 if emotion == 'surprised' else 0.15
  eyes = np.hypot(a - 0.37, v + 0.25) <= eye
  if emotion == 'happy':
    mouth = (np.abs(np.hypot(u, v - 0.05) - 0.55) <= 0.11) & (v >= 0.22)
    return eyes | mouth
  if emotion == 'sad':
    mouth = (np.abs(np.hypot(u, v - 0.92) - 0.5) <= 0.11) & (v <= 0.68)
    return eyes | (mouth & (a <= 0.5))
  if emotion == 'angry':
    brows = (np.abs(v + 0.62 - (a - 0.4) * -0.75) <= 0.12) & (
      (a >= 0.1) & (a <= 0.72)
    )
    mouth = (np.abs(v - 0.48) <= 0.11) & (a <= 0.48)
    return eyes | brows | mouth
  if emotion == 'surprised':
    return eyes | (np.hypot(u * 1.25, v - 0.48) <= 0.29)
  raise ValueError(f'{emotion!r} is no emotion that the scenes know')
