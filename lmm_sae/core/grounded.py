"""Explanations held against images: IoU both ways, and the CLIP score.

Each label is looked for by the model server's judges in images of its latent,
and in two baselines beside: `random`, the label and the latent's own
activations on random images (arXiv 2411.14982), and `shuffled`, another
latent's label on these images.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from lmm_sae.core import concepts, explaining, masks, progress, records, truth
from lmm_sae.core.index import LatentIndex
from lmm_sae.core.records import Explanation, Score
from lmm_sae.core.remote import SubjectClient
from lmm_sae.core.store import ActivationStore

BLOCK = 128  # latents whose pairs of image and text are judged together
PAIRS = 256  # of a request
IMAGES = 256  # images, and region maps, kept in memory
KEY = ('layer', 'latent', 'scorer', 'baseline', 'explainer', 'dictionary')


class View(Protocol):
  """`sae.baseview.BaseView`, as far as it is needed."""

  store: ActivationStore

  def heat(self, sample: int, latent: int) -> np.ndarray:
    """The latent's activations on the grid, float32 [H, W]."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the images are drawn and judged; as in the section `score`."""

  images: int
  random: int
  box_threshold: float


class Bench:
  """What the scores of one layer are taken with.

  `lit` is the share of a latent's peak above which the explainer saw a patch;
  `names` are the concepts of the images, () where they are not known.
  """

  def __init__(
    self,
    opts: Settings,
    seed: int,
    lit: float,
    index: LatentIndex,
    view: View,
    client: SubjectClient,
  ):
    self.opts, self.seed, self.lit = opts, seed, lit
    self.index, self.view, self.client = index, view, client
    samples = view.store.samples()
    known = all(s.truth for s in samples)
    self.names = truth.Vocabulary.of(samples).names if known else ()
    self.pictured = [s.sample for s in samples if s.image]
    self.image = functools.lru_cache(IMAGES)(view.store.image)
    self.regions = functools.lru_cache(IMAGES)(view.store.regions)
    self._named = functools.lru_cache(None)(self._concepts)

  def named(self, sample: int, label: str) -> np.ndarray:
    """The exact mask of what a label names; empty if it names nothing known."""
    return truth.mask(
      self.regions(sample),
      self.view.store.sample(sample),
      self._named(label),
    )

  def fires(self, latent: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels that the explainer saw lit, and the paper's mask; bool [H, W]."""
    about = self.view.store.sample(sample)
    size = (about.width, about.height)
    heat_HW = self.view.heat(sample, latent)
    peak = float(self.index.stats['peak_base'][latent])
    fires_HW = heat_HW >= self.index.meta.threshold
    return (
      masks.upsample(masks.lit(heat_HW, peak, self.lit), size, 'exact'),
      masks.upsample(fires_HW, size, 'paper'),
    )

  def _concepts(self, label: str) -> list[str]:
    return [name for name in self.names if concepts.says(label, name)]


@dataclasses.dataclass(frozen=True)
class Shown:
  """One latent's label on some samples, under one baseline."""

  latent: int
  baseline: str
  label: str
  samples: tuple[int, ...]


def grounded(
  bench: Bench, explained: Sequence[Explanation], file: records.Appender
) -> None:
  """Appends what the file lacks of the scores against images.

  Blocks of latents are the same in every run, and so is what is judged
  together: a run that was broken off ends in the same file.
  """
  cases = plan(bench, explained)
  if not cases:
    return
  explainer, dictionary = explained[0].explainer, explained[0].dictionary
  scorers = (
    *(('iou_exact',) if bench.names else ()),
    'iou',
    'iou_paper',
    'clip',
  )
  layer = bench.index.meta.layer
  done = {key(line) for line in file.existing}

  def is_done(case: Shown, scorer: str) -> bool:
    about = (layer, case.latent, scorer, case.baseline)
    return (*about, explainer, dictionary) in done

  latents = list(cases)
  blocks = [latents[at : at + BLOCK] for at in range(0, len(latents), BLOCK)]
  for block in progress.track(
    blocks,
    what=f'score {layer} {dictionary} by {explainer}: blocks of latents',
  ):
    mine = [case for latent in block for case in cases[latent]]
    if all(is_done(case, scorer) for case in mine for scorer in scorers):
      continue
    for case, values in judge(bench, mine):
      for scorer in scorers:
        if not is_done(case, scorer):
          file.add(
            Score(
              layer=layer,
              latent=case.latent,
              scorer=scorer,
              baseline=case.baseline,
              value=short(np.mean(values[scorer])),
              n=len(case.samples),
              explainer=explainer,
              dictionary=dictionary,
            )
          )


def plan(
  bench: Bench, explained: Sequence[Explanation]
) -> dict[int, list[Shown]]:
  """The cases of each latent that was explained from images, by latent."""
  labels = {
    e.latent: e.label
    for e in explained
    if e.outcome == 'explained'
    and not explaining.from_text(bench.index, e.latent)
  }
  latents = sorted(labels)
  other = others(latents, bench.seed, bench.index.meta.layer)
  cases = {}
  for m in latents:
    shown = tuple(
      e.sample for e in bench.index.exemplars(m)[: bench.opts.images]
    )
    rng = np.random.default_rng([bench.seed, bench.index.meta.layer, m])
    size = min(bench.opts.random, len(bench.pictured))
    random = rng.choice(bench.pictured, size, replace=False).tolist()
    cases[m] = [
      Shown(m, '', labels[m], shown),
      Shown(m, 'random', labels[m], tuple(random)),
    ]
    if m in other:
      cases[m].append(Shown(m, 'shuffled', labels[other[m]], shown))
  return cases


def others(latents: Sequence[int], seed: int, layer: int) -> dict[int, int]:
  """Of each latent another one, all different; {} of a single one."""
  rng = np.random.default_rng([seed, layer])
  ring = rng.permutation(latents).tolist()
  if len(ring) < 2:
    return {}
  return dict(zip(ring, ring[1:] + ring[:1], strict=True))


def judge(
  bench: Bench, cases: Sequence[Shown]
) -> Iterator[tuple[Shown, dict[str, list[float]]]]:
  """Each case with the values of all scorers, one a sample."""
  pairs = sorted({(s, c.label) for c in cases for s in c.samples})
  areas, fits = {}, {}  # by pair: masks as bits, `iou` and `iou_exact`; cosines
  for at in range(0, len(pairs), PAIRS):
    some = pairs[at : at + PAIRS]
    images = [bench.image(sample) for sample, _ in some]
    labels = [label for _, label in some]
    found = bench.client.ground(images, labels, bench.opts.box_threshold)
    fits |= zip(some, bench.client.clip(images, labels).tolist(), strict=True)
    for pair, area_HW in zip(some, found, strict=True):
      areas[pair] = {'iou': np.packbits(area_HW)}
      if bench.names:
        areas[pair]['iou_exact'] = np.packbits(bench.named(*pair))
  fires = functools.cache(bench.fires)
  for case in cases:
    values = {'iou': [], 'iou_paper': [], 'clip': [], 'iou_exact': []}
    for sample in case.samples:
      lit_HW, paper_HW = fires(case.latent, sample)
      for scorer, bits in areas[sample, case.label].items():
        area_HW = np.unpackbits(bits, count=lit_HW.size).astype(bool)
        area_HW = area_HW.reshape(lit_HW.shape)
        values[scorer].append(masks.iou(area_HW, lit_HW))
        if scorer == 'iou':
          values['iou_paper'].append(masks.iou(area_HW, paper_HW))
      values['clip'].append(fits[sample, case.label])
    yield case, values


def key(line: dict) -> tuple:
  """What tells lines of scores.jsonl apart; older ones know no dictionary."""
  return tuple(({'dictionary': ''} | line)[name] for name in KEY)


def short(value: float) -> float:
  return round(float(value), 6)
