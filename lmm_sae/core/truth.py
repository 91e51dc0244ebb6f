"""What each latent stands for, measured where masks and labels are exact.

The rule. Fixed on half A: a latent's concept and threshold are those of the
highest F1 over patches, the threshold out of SHARES of its peak on A; a patch
shows a concept if it is covered at least COVERED. Measured on half B: the
latent is clean if its F1 exceeds concepts.MIN_F1 and more than CLEAN of what
it fires on touches the concept, a patch touching it if covered at least
TOUCHED. Objects' concepts count; names of the background may be a latent's
concept, so that it has a name, but never make it clean.

Raw neurons go through the same rule: each channel of the residual, less its
mean over A, is two units, what is above 0 and what is below.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

from lmm_sae.core import concepts
from lmm_sae.core.records import Sample

SHARES = (0.1, 0.25, 0.4, 0.6)  # thresholds, of a unit's peak on A
COVERED = 0.25  # of a patch, by a concept, for the patch to show it
TOUCHED = 0.02  # of a patch, by a concept, for the patch to touch it
CLEAN = 0.9  # soft precision on B above which a latent is clean
FIRES = 1e-5  # least activation that is a firing
CELLS = 1 << 24  # activations held at a time


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The concepts of a run: `counted` hold of objects, `others` do not."""

  counted: tuple[str, ...]
  others: tuple[str, ...]

  @property
  def names(self) -> tuple[str, ...]:
    return self.counted + self.others

  @classmethod
  def of(cls, samples: Iterable[Sample]) -> 'Vocabulary':
    """The concepts of the regions of all samples; region 0 is background."""
    counted, others = set(), set()
    for sample in samples:
      for region, names in sample.truth['concepts'].items():
        (others if region == '0' else counted).update(names)
    return cls(tuple(sorted(counted)), tuple(sorted(others - counted)))


def mask(
  regions_HW: np.ndarray, sample: Sample, named: Sequence[str]
) -> np.ndarray:
  """Pixels of the regions of which every one of the named concepts holds."""
  wanted = set(named)
  inside = np.zeros(256, bool)  # region ids are uint8
  for region, names in sample.truth['concepts'].items():
    inside[int(region)] = bool(wanted) and wanted <= set(names)
  return inside[regions_HW]


def coverage(
  regions_HW: np.ndarray,
  sample: Sample,
  vocabulary: Vocabulary,
  grid: tuple[int, int],
) -> np.ndarray:
  """The share of each patch that each concept covers, float32 [P, C + 1].

  The last column is of objects: of any region but 0.
  """
  rows, cols = grid
  by_region = {}
  for region in sample.truth['concepts']:
    area = Image.fromarray((regions_HW == int(region)).astype(np.float32))
    shares = area.resize((cols, rows), Image.Resampling.BOX)
    by_region[region] = np.asarray(shares).reshape(-1)
  place = {name: c for c, name in enumerate(vocabulary.names)}
  covered_PC = np.zeros((rows * cols, len(place) + 1), np.float32)
  for region, share_P in by_region.items():
    for name in sample.truth['concepts'][region]:
      covered_PC[:, place[name]] += share_P
    if region != '0':
      covered_PC[:, -1] += share_P
  return covered_PC


@dataclasses.dataclass(frozen=True)
class Half:
  """The base-view patches of one half: N patches of all its samples.

  Attributes:
    x_ND: residuals; vals_NK, idx_NK: their codes.
    covered_NC: `coverage`, objects last.
  """

  x_ND: np.ndarray
  vals_NK: np.ndarray
  idx_NK: np.ndarray
  covered_NC: np.ndarray


class Latents:
  """The units of an SAE: activations of its M latents."""

  def __init__(self, latents: int):
    self.count = latents

  def blocks(self, half: Half) -> Iterator[tuple[slice, np.ndarray]]:
    """Activations [N, M] of some rows at a time."""
    for rows in _blocks(len(half.vals_NK), self.count):
      acts_NM = np.zeros((len(half.vals_NK[rows]), self.count), np.float32)
      np.put_along_axis(acts_NM, half.idx_NK[rows], half.vals_NK[rows], axis=1)
      yield rows, acts_NM


class Neurons:
  """The raw neurons: each channel above its mean, and below, 2 D units."""

  def __init__(self, half_a: Half):
    self.mean_D = half_a.x_ND.astype(np.float32).mean(axis=0)
    self.count = 2 * len(self.mean_D)

  def blocks(self, half: Half) -> Iterator[tuple[slice, np.ndarray]]:
    for rows in _blocks(len(half.x_ND), self.count):
      x_ND = half.x_ND[rows].astype(np.float32) - self.mean_D
      acts = np.concatenate([np.maximum(x_ND, 0), np.maximum(-x_ND, 0)], axis=1)
      yield rows, acts


@dataclasses.dataclass(frozen=True)
class Tally:
  """Patches counted: S thresholds, C concepts, M units.

  shown_C: that show a concept; fires_SM: on which a unit fires; hits_SCM: both;
  touches_SCM: on which it fires and which touch the concept. The last concept
  is objects.
  """

  shown_C: np.ndarray
  fires_SM: np.ndarray
  hits_SCM: np.ndarray
  touches_SCM: np.ndarray

  def f1(self) -> np.ndarray:
    """F1 of each unit as a detector of each concept, [S, C, M]."""
    either = self.fires_SM[:, None] + self.shown_C[None, :, None]
    return 2 * self.hits_SCM / np.maximum(either, 1)

  def soft_precision(self) -> np.ndarray:
    return self.touches_SCM / np.maximum(self.fires_SM[:, None], 1)


def tally(units, half: Half, levels_SM: np.ndarray) -> Tally:
  """Counts the patches on which units reach their levels, of S each."""
  shown_NC = (half.covered_NC >= COVERED).astype(np.float32)
  touched_NC = (half.covered_NC >= TOUCHED).astype(np.float32)
  depth, concepts_ = len(levels_SM), shown_NC.shape[1]
  fires_SM = np.zeros((depth, units.count))
  hits_SCM = np.zeros((depth, concepts_, units.count))
  touches_SCM = np.zeros_like(hits_SCM)
  for rows, acts_NM in units.blocks(half):
    for s, level_M in enumerate(levels_SM):
      fires_NM = ((acts_NM >= level_M) & (acts_NM >= FIRES)).astype(np.float32)
      fires_SM[s] += fires_NM.sum(axis=0)
      hits_SCM[s] += shown_NC[rows].T @ fires_NM
      touches_SCM[s] += touched_NC[rows].T @ fires_NM
  return Tally(shown_NC.sum(axis=0), fires_SM, hits_SCM, touches_SCM)


def peaks(units, half: Half) -> np.ndarray:
  """The largest activation of each unit, [M]."""
  peak_M = np.zeros(units.count, np.float32)
  for _, acts_NM in units.blocks(half):
    peak_M = np.maximum(peak_M, acts_NM.max(axis=0))
  return peak_M


def concept_table(
  units, half_a: Half, half_b: Half, vocabulary: Vocabulary
) -> list[concepts.Concept]:
  """The concept of each unit by the rule above; '' where it never fires."""
  peak_M = peaks(units, half_a)
  levels_SM = np.array(SHARES, np.float32)[:, None] * peak_M
  on_a = tally(units, half_a, levels_SM)
  f1_SCM = on_a.f1()[:, :-1]
  flat = f1_SCM.reshape(-1, units.count).argmax(axis=0)
  share_M, concept_M = np.divmod(flat, len(vocabulary.names))
  every = np.arange(units.count)
  level_M = levels_SM[share_M, every]
  on_b = tally(units, half_b, level_M[None])
  f1_b_M = on_b.f1()[0, concept_M, every]
  precision_b_M = on_b.soft_precision()[0, concept_M, every]
  objects_M = tally(
    units, half_a, np.zeros((1, units.count), np.float32)
  ).soft_precision()[0, -1]
  clean_M = (
    (peak_M >= FIRES)
    & (f1_b_M > concepts.MIN_F1)
    & (precision_b_M > CLEAN)
    & (concept_M < len(vocabulary.counted))
  )
  return [
    concepts.Concept(
      latent=m,
      concept=vocabulary.names[concept_M[m]] if peak_M[m] >= FIRES else '',
      threshold=_short(level_M[m]),
      f1_a=_short(f1_SCM[share_M[m], concept_M[m], m]),
      f1_b=_short(f1_b_M[m]),
      precision_b=_short(precision_b_M[m]),
      objects=_short(objects_M[m]),
      peak=_short(peak_M[m]),
      clean=bool(clean_M[m]),
    )
    for m in range(units.count)
  ]


def clean_count(table: Sequence[concepts.Concept]) -> int:
  """How many concepts have at least one clean unit."""
  return len({row.concept for row in table if row.clean})


def _blocks(rows: int, units: int) -> Iterator[slice]:
  size = max(1, CELLS // units)
  for at in range(0, rows, size):
    yield slice(at, min(at + size, rows))


def _short(value: float) -> float:
  return round(float(value), 6)
