"""Scores each explanation against the images, beside two baselines.

Writes scores.jsonl, for each explained latent:

  right      1 where the explanation names the latent's concept; of latents with
             at least 80% of their firings on objects and F1 > .2 on half A.
             shuffled: the share of the other latents' texts that name it
  iou_exact  the exact mask of what the label names, against the patches that
             the explainer saw lit; mean over the strongest images
  iou        the model server's mask of the label, against the same
  iou_paper  the same against the paper's mask (arXiv 2411.14982): all that
             fires, upsampled bilinearly, which dilates it
  clip       100 * cos(label, whole image)

with the baselines `random` (the label and the latent's own activations on
random images) and `shuffled` (another latent's label on these images). Run it
again and what is missing is scored.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from lmm_sae.core import concepts, masks, progress, records, stats, truth
from lmm_sae.core.index import LatentIndex
from lmm_sae.core.records import Explanation, Score
from lmm_sae.core.remote import SubjectClient
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import exports
from lmm_sae.sae.baseview import BaseView

FILE = 'scores.jsonl'
BLOCK = 128  # latents whose pairs of image and text are judged together
PAIRS = 256  # of a request
IMAGES = 256  # images, and region maps, kept in memory


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
  """The section `score` of the config; its fields are explained there."""

  images: int
  random: int
  box_threshold: float
  grounder: str
  grounder_path: str
  clip_path: str
  bootstrap: int

  def __post_init__(self):
    for name in ('images', 'random', 'bootstrap'):
      if getattr(self, name) < 1:
        raise ValueError(f'score.{name} must be at least 1')


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Appends to scores.jsonl what it lacks."""
  opts = ScoreConfig(**config.score)
  if not config.server.url:
    raise ValueError(
      'server.url is empty: start `lmm-sae serve` and give its URL, or run '
      '`lmm-sae all`, which starts one'
    )
  explained = records.read(
    Explanation, workdir.require(workdir.file('explanations.jsonl'), 'explain')
  )
  layers = tuple(config.lmm.layers)
  split, lit, seed = config.explain.split, config.explain.threshold, config.seed
  server = config.server
  with SubjectClient(server.url, server.token, server.timeout_s) as client:
    for layer in layers:
      index = workdir.require(workdir.index(layer, split), 'index')
      sae = exports.load(workdir.require(workdir.export(layer), 'train'))
      view = BaseView(ActivationStore.open(workdir.acts(split)), layer, sae)
      bench = Bench(opts, seed, lit, LatentIndex.open(index), view, client)
      mine = [e for e in explained if e.layer == layer]
      for name in dict.fromkeys(e.explainer for e in mine):
        score(
          bench,
          concepts.load(workdir, layer),
          [e for e in mine if e.explainer == name],
          workdir.file(FILE),
        )
  _log(workdir, opts, seed)


def score(
  bench: 'Bench',
  table: Sequence[concepts.Concept],
  explained: Sequence[Explanation],
  path: pathlib.Path,
) -> None:
  """Appends what the file lacks of one explainer's explanations of a layer."""
  with records.Appender(path) as file:
    _append(file, right(table, explained))
    grounded(bench, explained, file)


# Explanations against concepts.


def right(
  table: Sequence[concepts.Concept], explained: Sequence[Explanation]
) -> list[Score]:
  """Whether explanations name the concept of their latents; see the module.

  An explanation that was not had does not name it.
  """
  by_latent = {e.latent: e for e in explained}
  chosen = concepts.of_objects(table, by_latent)
  texts = [by_latent[row.latent].text for row in chosen]
  lines = []
  for i, row in enumerate(chosen):
    says = [concepts.says(text, row.concept) for text in texts]
    one = by_latent[row.latent]
    made = functools.partial(
      Score, one.layer, one.latent, 'right', n=1, explainer=one.explainer
    )
    lines.append(made(baseline='', value=float(says[i])))
    if len(says) > 1:
      others = (sum(says) - says[i]) / (len(says) - 1)
      lines.append(made(baseline='shuffled', value=_short(others)))
  return lines


# Explanations against images.


class Bench:
  """What the scores of one layer are taken with.

  `lit` is the share of a latent's peak above which the explainer saw a patch;
  `names` are the concepts of the images, () where they are not known.
  """

  def __init__(
    self,
    opts: ScoreConfig,
    seed: int,
    lit: float,
    index: LatentIndex,
    view: BaseView,
    client: SubjectClient,
  ):
    self.opts, self.seed, self.lit = opts, seed, lit
    self.index, self.view, self.client = index, view, client
    samples = view.store.samples()
    known = all(s.truth for s in samples)
    self.names = truth.Vocabulary.of(samples).names if known else ()
    self.pictured = [s.sample for s in samples if s.image]
    self.image = functools.lru_cache(IMAGES)(view.store.image)
    self._regions = functools.lru_cache(IMAGES)(view.store.regions)
    self._named = functools.lru_cache(None)(self._concepts)

  def named(self, sample: int, label: str) -> np.ndarray:
    """The exact mask of what a label names; empty if it names nothing known."""
    return truth.mask(
      self._regions(sample),
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
class Case:
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
  explainer = explained[0].explainer
  scorers = (
    *(('iou_exact',) if bench.names else ()),
    'iou',
    'iou_paper',
    'clip',
  )
  done = {
    (line['latent'], line['scorer'], line['baseline'])
    for line in file.existing
    if (line['layer'], line['explainer']) == (bench.index.meta.layer, explainer)
  }
  latents = list(cases)
  blocks = [latents[at : at + BLOCK] for at in range(0, len(latents), BLOCK)]
  for block in progress.track(
    blocks,
    what=f'score {bench.index.meta.layer} by {explainer}: blocks of latents',
  ):
    mine = [case for latent in block for case in cases[latent]]
    wanted = {(c.latent, s, c.baseline) for c in mine for s in scorers}
    if wanted <= done:
      continue
    for case, values in judge(bench, mine):
      for scorer in scorers:
        if (case.latent, scorer, case.baseline) not in done:
          file.add(
            Score(
              layer=bench.index.meta.layer,
              latent=case.latent,
              scorer=scorer,
              baseline=case.baseline,
              value=_short(np.mean(values[scorer])),
              n=len(case.samples),
              explainer=explainer,
            )
          )


def plan(
  bench: Bench, explained: Sequence[Explanation]
) -> dict[int, list[Case]]:
  """The cases of each latent that has a label and images, by latent."""
  labels = {
    e.latent: e.label
    for e in explained
    if e.outcome == 'explained' and bench.index.exemplars(e.latent)
  }
  latents = sorted(labels)
  rng = np.random.default_rng([bench.seed, bench.index.meta.layer])
  ring = rng.permutation(latents).tolist()
  other = dict(zip(ring, ring[1:] + ring[:1], strict=True))
  cases = {}
  for m in latents:
    shown = tuple(
      e.sample for e in bench.index.exemplars(m)[: bench.opts.images]
    )
    rng = np.random.default_rng([bench.seed, bench.index.meta.layer, m])
    size = min(bench.opts.random, len(bench.pictured))
    random = rng.choice(bench.pictured, size, replace=False).tolist()
    cases[m] = [
      Case(m, '', labels[m], shown),
      Case(m, 'random', labels[m], tuple(random)),
    ]
    if len(latents) > 1:
      cases[m].append(Case(m, 'shuffled', labels[other[m]], shown))
  return cases


def judge(
  bench: Bench, cases: Sequence[Case]
) -> Iterator[tuple[Case, dict[str, list[float]]]]:
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


def _append(file: records.Appender, scores: Sequence[Score]) -> None:
  """Adds the scores that the file lacks."""
  key = ('layer', 'latent', 'scorer', 'baseline', 'explainer')
  done = {tuple(line[k] for k in key) for line in file.existing}
  for score in scores:
    if tuple(getattr(score, k) for k in key) not in done:
      file.add(score)


def _log(workdir: Workdir, opts: ScoreConfig, seed: int) -> None:
  """Logs the mean of every score and its 95% interval."""
  groups: dict[tuple, list[float]] = {}
  for line in records.read(Score, workdir.file(FILE)):
    key = (line.layer, line.explainer, line.scorer, line.baseline)
    groups.setdefault(key, []).append(line.value)
  for (layer, explainer, scorer, baseline), values in groups.items():
    mean, low, high = stats.mean_ci(values, seed, opts.bootstrap)
    logging.info(
      'score: layer %d by %s: %s %s %.3f [%.3f, %.3f] of %d latents',
      *(layer, explainer, scorer, baseline or 'itself'),
      *(mean, low, high, len(values)),
    )


def _short(value: float) -> float:
  return round(float(value), 6)
