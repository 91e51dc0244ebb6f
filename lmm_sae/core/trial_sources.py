"""Pictures of a latent, and of a concept whose place is known, for judges."""

from collections.abc import Callable, Sequence

import numpy as np

from lmm_sae.core import explaining, truth
from lmm_sae.core.grounded import Bench
from lmm_sae.core.index import ImageExemplar
from lmm_sae.core.trials import Lit

TRIES = 20  # other latents, or pictures, that are tried as intruders
AMID = 0.5  # of an intruder's lit patches that may fire the latent itself

Rng = Callable[[str], np.random.Generator]


def rng_of(*numbers: int) -> Rng:
  """Generators that depend on the numbers and on what is drawn."""
  return lambda what: np.random.default_rng([*numbers, *what.encode()])


class OfLatent:
  """Pictures that fire one latent; first those that no explainer was shown.

  Args:
    seen: how many of the strongest exemplars an explainer was shown.
    others: latents that fire on images and may be intruders.
    mask: style in which pictures are shown.
  """

  def __init__(
    self,
    bench: Bench,
    latent: int,
    seen: int,
    others: Sequence[int],
    mask: str,
    rng: Rng,
  ):
    self._bench, self._latent, self._others = bench, latent, others
    self._mask = mask
    self._rng = rng
    self._odd = rng('odd')
    strongest = bench.index.exemplars(latent)
    shown = {one.sample for one in strongest[:seen]}
    spread = bench.index.spread(latent)
    order = rng('firing').permutation(len(spread)).tolist()
    drawn = {
      one.sample: one for one in [*(spread[i] for i in order), *strongest]
    }
    ranked = sorted(drawn.values(), key=lambda one: one.sample in shown)
    self._firing = [self._lit(latent, one) for one in ranked]

  def firing(self) -> Sequence[Lit]:
    return self._firing

  def silent(self, count: int) -> list[int]:
    return self._bench.index.silent(self._latent, count, self._rng('silent'))

  def odd(self) -> Lit | None:
    for _ in range(min(TRIES, len(self._others))):
      other = int(self._odd.choice(self._others))
      found = self._bench.index.exemplars(other)
      if other == self._latent or not found:
        continue
      one = self._lit(other, found[int(self._odd.integers(len(found)))])
      if not self._fires_amid(one):
        return one
    return None

  def _fires_amid(self, one: Lit) -> bool:
    """Whether the latent, too, fires on most of what is lit."""
    fires, _ = self._bench.index.sample(one.sample)
    if self._latent not in fires:  # told without encoding the sample
      return False
    heat_HW = self._bench.view.heat(one.sample, self._latent)
    return (heat_HW[one.lit_HW] > 0).mean() > AMID

  def _lit(self, latent: int, one: ImageExemplar) -> Lit:
    lit_HW = explaining.bright(
      self._bench.index, latent, one.heat_HW, self._mask, self._bench.lit
    )
    return Lit(one.sample, lit_HW, one.heat_HW > 0)


class OfConcept:
  """Pictures of one concept of the images' truth, drawn in random order."""

  def __init__(self, bench: Bench, vocabulary: truth.Vocabulary, name: str,
               wanted: int, rng: Rng):  # fmt: skip
    self._bench, self._vocabulary, self._name = bench, vocabulary, name
    self._odd = rng('odd')
    order = rng('samples').permutation(bench.pictured).tolist()
    have = [s for s in order if name in self._named(s)]
    self._lacking = [s for s in order if name not in self._named(s)]
    self._firing: list[Lit] = []
    for sample in have:
      one = self._shown(sample, name)
      if one.lit_HW.any():
        self._firing.append(one)
      if len(self._firing) == wanted:
        break

  def firing(self) -> Sequence[Lit]:
    return self._firing

  def silent(self, count: int) -> list[int]:
    return self._lacking[:count]

  def odd(self) -> Lit | None:
    """Another concept's place in a picture that lacks this one."""
    for _ in range(min(TRIES, len(self._lacking))):
      sample = int(self._odd.choice(self._lacking))
      there = sorted(self._named(sample) & set(self._vocabulary.counted))
      if not there:
        continue
      one = self._shown(sample, str(self._odd.choice(there)))
      if one.lit_HW.any():
        return one
    return None

  def _named(self, sample: int) -> set[str]:
    about = self._bench.view.store.sample(sample).truth['concepts']
    return {name for names in about.values() for name in names}

  def _shown(self, sample: int, name: str) -> Lit:
    store = self._bench.view.store
    covered_PC = truth.coverage(
      self._bench.regions(sample),
      store.sample(sample),
      self._vocabulary,
      store.meta.grid,
    )
    share_P = covered_PC[:, self._vocabulary.names.index(name)]
    share_HW = share_P.reshape(store.meta.grid)
    return Lit(sample, share_HW >= truth.COVERED, share_HW >= truth.TOUCHED)
