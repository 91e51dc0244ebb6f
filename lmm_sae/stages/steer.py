"""Edits latents while the subject answers, and counts what that changes.

Where the truth is known there are two studies, colour and emotion. For each
concept that answers such a question, latents and dose are chosen on half A and
the figures are taken on half B:

  latent  the `candidates` latents of highest F1 on A that stand for it are
          tried on A; the one that flips most answers of A, at the study's dose,
          is kept
  dose    one for the whole study: the best mean over its concepts on A, the
          smallest where several are equal
  case    a question about an image whose PLAIN answer lacks the concept, first
          those whose true answer is another one
  flip    the edited answer contains the concept

The edit is the paper's: the latent is clamped before TopK to `dose` times its
peak (its largest activation on an image token of A) and the reconstruction
replaces the residual. Beside each answer stand the plain one, the one with the
SAE but no edit at the same tokens, and, on B, the one under a random live
latent at the same dose.

Without truth, `steer.latents` or the best explained latents are clamped under
`steer.prompts`, with images and without; that makes records, not figures.

Answers are appended to steering.jsonl a request at a time.
"""

import dataclasses
from collections.abc import Sequence

import ml_collections
import numpy as np
from absl import logging

from lmm_sae.core import asking, concepts, records
from lmm_sae.core.asking import Ask, Asker
from lmm_sae.core.index import LatentIndex
from lmm_sae.core.records import Edit, Steering, Turn
from lmm_sae.core.remote import SubjectClient
from lmm_sae.core.steering import Case, Journal, choose, pool_of
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir

STUDIES = ('colour', 'emotion')
OPEN_LATENTS = 4  # steered where no truth is known and none are named


@dataclasses.dataclass(frozen=True)
class SteerConfig:
  """The fields of config.steer; their meaning stands in experiments/base.py."""

  latents: tuple[int, ...]
  candidates: int
  doses: tuple[float, ...]
  where: str
  when: str
  keep_error: bool
  cases_a: int
  cases_b: int
  prompts: tuple[str, ...]
  max_new_tokens: int
  batch: int

  def __post_init__(self):
    if not self.doses:
      raise ValueError('steer.doses is empty: name at least one, as (2.0,)')
    for name in ('candidates', 'cases_a', 'cases_b', 'batch', 'max_new_tokens'):
      if getattr(self, name) < 1:
        raise ValueError(f'steer.{name} is {getattr(self, name)}, must be >= 1')

  def edit(self, latent: int, dose: float, where: str = '') -> Edit:
    return Edit(
      latent,
      dose,
      unit='peak',
      mode='clamp',
      where=where or self.where,
      when=self.when,
      keep_error=self.keep_error,
    )


def run(config: ml_collections.ConfigDict, workdir: Workdir) -> None:
  opts = SteerConfig(**config.steer)
  layers, seed = tuple(config.lmm.layers), config.seed
  server = config.server
  stores = {
    half: ActivationStore.open(workdir.require(workdir.acts(half), 'capture'))
    for half in ('a', 'b')
  }
  with (
    asking.connect(server.url, server.token, server.timeout_s) as client,
    records.Appender(workdir.file('steering.jsonl')) as out,
  ):
    journal = Journal(out)
    for layer in layers:
      bench = Bench.of(workdir, layer, opts, seed, client, stores, journal)
      if bench.concepts:
        for study in STUDIES:
          steer_concepts(bench, study)
      if opts.latents or not bench.concepts:
        steer_open(bench, workdir)
    journal.finish()


@dataclasses.dataclass(frozen=True)
class Bench:
  """All that steering one layer needs."""

  layer: int
  opts: SteerConfig
  seed: int
  concepts: list[concepts.Concept]
  peaks_M: np.ndarray
  stores: dict[str, ActivationStore]
  askers: dict[str, Asker]
  journal: Journal

  @classmethod
  def of(
    cls,
    workdir: Workdir,
    layer: int,
    opts: SteerConfig,
    seed: int,
    client: SubjectClient,
    stores: dict[str, ActivationStore],
    journal: Journal,
  ) -> 'Bench':
    index = LatentIndex.open(
      workdir.require(workdir.index(layer, 'a'), 'index')
    )
    peaks_M = index.stats['peak_image']
    for latent in opts.latents:
      if not 0 <= latent < len(peaks_M):
        raise ValueError(
          f'steer.latents has {latent}; the SAE of layer {layer} has latents '
          f'0 to {len(peaks_M) - 1}'
        )
    askers = {
      half: Asker(
        client, store, layer, peaks_M, opts.batch, opts.max_new_tokens
      )
      for half, store in stores.items()
    }
    table = concepts.load(workdir, layer)
    return cls(layer, opts, seed, table, peaks_M, stores, askers, journal)

  def record(
    self,
    case: Case,
    edit: Edit,
    control: str,
    study: str,
    half: str,
    target: str,
  ) -> Steering:
    """The record of an answer that is still to be asked for."""
    return Steering(
      layer=self.layer,
      edits=(edit,),
      control=control,
      sample=case.sample,
      prompt=case.turn.question,
      text_plain=case.plain,
      text_sae=case.sae,
      text_edited='',
      study=study,
      half=half,
      target=target,
    )

  def unsteered(self, half: str, cases: Sequence[Case], where: str = ''):
    """The cases with their plain answers, and those with the SAE alone."""
    opts, asker = self.opts, self.askers[half]
    where = where or opts.where
    asks = [Ask(case.sample, case.turn.question) for case in cases]
    plain = asker.answers(asks)
    sae = plain  # with the error term kept, the SAE alone changes nothing
    if not opts.keep_error:
      control = {'sae': True, 'where': where, 'when': opts.when}
      sae = asker.answers([dataclasses.replace(a, **control) for a in asks])
    return [
      dataclasses.replace(case, plain=one, sae=other)
      for case, one, other in zip(cases, plain, sae, strict=True)
    ]


# Studies of concepts.


def steer_concepts(bench: Bench, study: str) -> None:
  """Chooses latents and dose on A, and takes the flips of B."""
  opts = bench.opts
  candidates = _candidates(bench, study)
  if not candidates:
    logging.warning('no latent stands for any %s: not steered', study)
    return
  targets = tuple(candidates)

  pool, picked = _cases(bench, study, 'a', targets, opts.cases_a)
  wanted = [
    bench.record(case, opts.edit(latent, dose), '', study, 'a', target)
    for case in pool
    for target in targets
    if case in picked[target]
    for latent in candidates[target]
    for dose in opts.doses
  ]
  swept = bench.journal.answer(bench.askers['a'], wanted)
  dose, chosen = choose(swept, candidates, opts.doses)
  logging.info('%s: dose %g, latents %s, chosen on A', study, dose, chosen)

  pool, picked = _cases(bench, study, 'b', targets, opts.cases_b)
  randoms = _randoms(bench, study, targets, exclude=set(chosen.values()))
  wanted = [
    bench.record(case, opts.edit(latent, dose), control, study, 'b', target)
    for case in pool
    for target in targets
    if case in picked[target]
    for latent, control in (
      (chosen[target], ''),
      (randoms[target][picked[target].index(case)], 'random'),
    )
  ]
  bench.journal.answer(bench.askers['b'], wanted)


def _candidates(bench: Bench, study: str) -> dict[str, list[int]]:
  """Each concept of the study, and its latents by falling F1 on A."""
  targets = {
    turn.target
    for store in bench.stores.values()
    for sample in store.samples()
    for turn in sample.turns
    if turn.type == study and turn.target
  }
  found = {}
  for target in sorted(targets):
    rows = [
      row
      for row in bench.concepts
      if row.concept == target and bench.peaks_M[row.latent] > 0
    ]
    rows.sort(key=lambda row: (-row.f1_a, row.latent))
    if rows:
      found[target] = [row.latent for row in rows[: bench.opts.candidates]]
    else:
      logging.warning('no latent stands for %s: it is not steered', target)
  return found


def _cases(
  bench: Bench, study: str, half: str, targets: Sequence[str], count: int
) -> tuple[list[Case], dict[str, list[Case]]]:
  """Cases with their unsteered answers, and at most `count` for each target."""
  pool = pool_of(bench.stores[half].samples(), study, targets, count)
  pool = bench.unsteered(half, pool)
  picked = {}
  for target in targets:
    usable = [c for c in pool if not concepts.says(c.plain, target)]
    usable.sort(key=lambda case: case.turn.target == target)
    picked[target] = usable[:count]
  return pool, picked


def _randoms(
  bench: Bench, study: str, targets: Sequence[str], exclude: set[int]
) -> dict[str, list[int]]:
  """A random live latent for each case of B, by target."""
  live = np.flatnonzero(bench.peaks_M > 0)
  live = live[~np.isin(live, list(exclude))]
  key = [bench.seed, bench.layer, *study.encode()]
  rng = np.random.default_rng(key)
  return {
    target: rng.choice(live, bench.opts.cases_b).tolist() for target in targets
  }


# Without truth.


def steer_open(bench: Bench, workdir: Workdir) -> None:
  """Clamps a few latents under the configured prompts, beside random ones."""
  opts = bench.opts
  index = LatentIndex.open(
    workdir.require(workdir.index(bench.layer, 'b'), 'index')
  )
  latents = opts.latents or _best_explained(bench, workdir)
  doses = sorted(
    {opts.doses[0], opts.doses[len(opts.doses) // 2], opts.doses[-1]}
  )
  live = np.flatnonzero(bench.peaks_M > 0)
  live = live[~np.isin(live, latents)]
  if not latents or not live.size:
    logging.warning('no latent fires on an image: nothing is steered')
    return
  key = [bench.seed, bench.layer, *b'open']
  rng = np.random.default_rng(key)
  shown = [
    exemplar.sample
    for latent in latents
    for exemplar in index.exemplars(latent)[:1]
  ]
  for study, samples, where in (
    ('image', shown, opts.where),
    ('text', [-1], 'all'),
  ):
    cases = [
      Case(sample, Turn(study, prompt, ''))
      for sample in dict.fromkeys(samples)
      for prompt in opts.prompts
    ]
    cases = bench.unsteered('b', cases, where)
    wanted = [
      bench.record(case, opts.edit(one, dose, where), control, study, 'b', '')
      for case in cases
      for latent in latents
      for one, control in ((latent, ''), (int(rng.choice(live)), 'random'))
      for dose in doses
    ]
    bench.journal.answer(bench.askers['b'], wanted)


def _best_explained(bench: Bench, workdir: Workdir) -> tuple[int, ...]:
  """The explained latents of highest CLIP score; unscored, of highest peak."""
  explained = {
    one.latent
    for one in records.read(
      records.Explanation, workdir.file('explanations.jsonl')
    )
    if one.layer == bench.layer
    and one.outcome == 'explained'
    and not one.dictionary
  }
  clip: dict[int, float] = {}
  for one in records.read(records.Score, workdir.file('scores.jsonl')):
    about = one.layer, one.scorer, one.baseline, one.dictionary
    if about == (bench.layer, 'clip', '', ''):
      clip.setdefault(one.latent, one.value)
  live = np.flatnonzero(bench.peaks_M > 0).tolist()
  pool = [latent for latent in live if latent in explained] or live
  pool.sort(key=lambda m: (-clip.get(m, -np.inf), -bench.peaks_M[m], m))
  return tuple(pool[:OPEN_LATENTS])
