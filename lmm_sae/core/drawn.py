"""What `LatentIndex` is about to draw itself, until it does."""

import pathlib

import numpy as np

from lmm_sae.core.index import LatentIndex


class Drawn(LatentIndex):
  """An index with seeded samples of exemplars and of silent images."""

  def spread(self, latent: int):
    return self.exemplars(latent)

  def text_spread(self, latent: int):
    return self.texts(latent)

  def silent(self, latent: int, count: int, rng: np.random.Generator):
    fires = set(super().postings(latent)[0].tolist())
    every = rng.permutation(self.num_samples).tolist()
    quiet = [s for s in every if s not in fires and self.duplicate_S[s] == s]
    return quiet[:count]

  def postings(self, latent: int, view: str = 'base'):
    found = super().postings(latent)
    if view == 'text':
      samples = np.array([one.sample for one in self.texts(latent)], int)
      return samples, *found[1:]
    return found


def open_index(path: pathlib.Path) -> LatentIndex:
  own = hasattr(LatentIndex, 'silent')
  return LatentIndex.open(path) if own else Drawn.open(path)
