"""Synthetic codes as a TopK SAE gives them for images and their text.

A sample draws its latents by Zipf's law, and some fire on every image. Each
has a smooth bump on the image (or along the text): of those that are drawn,
the k largest at a token are its code. A sample's codes depend on the seed and
its number alone, so any process can make any of them.
"""

import dataclasses

import numpy as np

from lmm_sae.core.tokens import Kind

ALWAYS = 8  # latents that every image draws
TEXT_VOCAB = 4096


@dataclasses.dataclass(frozen=True)
class Codes:
  """What samples look like.

  Attributes:
    latents: M; k: of a code; drawn: latents a sample, a multiple of k.
    side: of the base view's grid; tiles: of the tiles' grid, 0: none.
    text: tokens of text a sample, beside BOS.
  """

  latents: int
  k: int
  drawn: int = 16
  side: int = 24
  tiles: int = 0
  text: int = 24
  seed: int = 0

  @property
  def tokens(self) -> int:
    """Rows of a sample."""
    return 1 + self.side**2 + self.tiles**2 + self.text

  def sample(
    self, sample: int
  ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """(token fields, vals_NK, idx_NK) of the rows of one sample."""
    rng = np.random.default_rng((self.seed, sample))
    base = _places(self.side, Kind.BASE)
    tile = _places(self.tiles, Kind.TILE)
    text = np.full((1 + self.text, 3), -1)
    text[:, 0] = Kind.QUESTION
    text[0, 0] = Kind.BOS
    kind, row, col = np.concatenate([text[:1], base, tile, text[1:]]).T
    count = len(kind)
    tokens = {
      'sample': np.full(count, sample),
      'position': np.arange(count),
      'token': rng.zipf(1.3, count) % TEXT_VOCAB,
      'kind': kind,
      'image': np.zeros(count, np.int64),
      'row': row,
      'col': col,
    }
    image = self._drawn(rng)
    bump = rng.random((4, len(image)), np.float32)
    size = np.exp(rng.standard_normal(len(image), np.float32))
    parts = [self._text(rng, 1)]
    for side in (self.side, self.tiles):
      if side:
        parts.append(self._image(rng, image, bump, size, side))
    parts.append(self._text(rng, self.text))
    vals, idx = (np.concatenate(each) for each in zip(*parts, strict=True))
    return tokens, vals, idx

  def samples(self, first: int, stop: int):
    """The same of several samples, one after the other."""
    found = [self.sample(i) for i in range(first, stop)]
    tokens = {
      name: np.concatenate([one[0][name] for one in found])
      for name in found[0][0]
    }
    return (
      tokens,
      np.concatenate([one[1] for one in found]),
      np.concatenate([one[2] for one in found]),
    )

  def _drawn(self, rng: np.random.Generator) -> np.ndarray:
    """Latents that a sample draws: the first ones, and others by Zipf's law."""
    most = min(self.drawn * self.k, self.latents)
    # Of density 1/x from 10 on: the rank of a latent is its share.
    rank = 10 * (self.latents / 10) ** rng.random(2 * most)
    always = np.arange(min(ALWAYS, self.k))
    found = np.unique(np.concatenate([always, rank.astype(np.int64)]))
    rest = rng.permutation(found[len(always) :])[: most - len(always)]
    if len(always) + len(rest) < self.k:
      left = np.setdiff1d(np.arange(self.latents), [*always, *rest])
      rest = np.concatenate([rest, rng.choice(left, self.k, replace=False)])
    return np.concatenate([always, rest]).astype(np.int32)

  def _image(self, rng, latent, bump, size, side):
    """Codes of a grid; the bumps are those of every grid of the image."""
    at = (np.arange(side, dtype=np.float32) + 0.5) / side
    wide = 0.02 + 0.25 * bump[2] ** 2
    wide[: min(ALWAYS, self.k)] = 3
    rows, cols = (
      np.exp(-(((at[:, None] - bump[axis]) / wide) ** 2)) for axis in (0, 1)
    )
    heat = rows[:, None] * cols[None] * size + 0.01
    return self._top(rng, latent, heat.reshape(side * side, -1))

  def _text(self, rng, count):
    latent = self._drawn(rng)
    size = np.exp(rng.standard_normal(len(latent), np.float32))
    heat = np.broadcast_to(size, (count, len(latent)))
    return self._top(rng, latent, heat)

  def _top(self, rng, latent, heat):
    noisy = heat * (0.5 + rng.random(heat.shape, np.float32))
    slot = np.argpartition(noisy, -self.k, axis=1)[:, -self.k :]
    vals = np.take_along_axis(noisy, slot, axis=1)
    return vals, latent[slot]


def _places(side: int, kind: Kind) -> np.ndarray:
  """[side * side, 3]: kind, row, col."""
  row, col = np.divmod(np.arange(side * side), max(side, 1))
  return np.stack([np.full(side * side, int(kind)), row, col], axis=1)
