"""Which explanations a judge is asked about, and what becomes of its answers.

Answers are kept by the chat client's cache, so a run that was broken off asks
for what it lacks; everything else is made again from them, the same.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lmm_sae.core import explaining, grounded, judging, records, truth
from lmm_sae.core.grounded import Bench
from lmm_sae.core.judging import CALIBRATION, Judgement, Trial
from lmm_sae.core.records import Explanation, Score
from lmm_sae.core.text_trials import (
  OfTextLatent,
  OfWord,
  TextAsker,
  contexts,
  is_word,
)
from lmm_sae.core.trial_sources import OfConcept, OfLatent, rng_of
from lmm_sae.core.trials import Asker, Question, Style

KNOWN = 8  # true concepts, and words, that a judge is tried on
WORD_TEXTS = 2  # least contexts with a word, and without, for it to be tried
CONSISTENCY = 'consistency'


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is asked of a judge about one layer.

  Attributes:
    judged: latents of an explainer, drawn by seed; 0: all.
    seen: exemplars that an explainer was shown.
  """

  style: Style
  judged: int
  seen: int


def trials(
  bench: Bench,
  explained: Sequence[Explanation],
  plan: Plan,
  judge: str,
  baselines: bool,
) -> Iterator[Trial]:
  """The questions about one explainer's labels, by latent.

  A latent that was explained from texts is judged by them.
  """
  layer, index = bench.index.meta.layer, bench.index
  by_latent = {
    e.latent: e for e in explained if e.outcome == 'explained' and e.label
  }
  worded = {m for m in by_latent if explaining.from_text(index, m)}
  pictured = sorted(set(by_latent) - worded)
  stats = index.stats
  alive = ~stats['dead'] & ~stats['always_on']
  on_images = np.flatnonzero(alive & (stats['images_fired'] > 0)).tolist()
  on_texts = np.flatnonzero(alive & (stats['samples_fired'] > 0)).tolist()
  other = {
    **grounded.others(pictured, bench.seed, layer),
    **grounded.others(sorted(worded), bench.seed, layer),
  }
  for m in drawn(by_latent, index.num_latents, plan.judged, bench.seed,
                 layer):  # fmt: skip
    one = by_latent[m]
    rng = rng_of(bench.seed, layer, m)
    if m not in worded:
      source = OfLatent(bench, m, plan.seen, on_images, plan.style.mask, rng)
      asker = Asker(plan.style, bench.image, source, rng)
      tasks = judging.PICTURE_TASKS
    else:
      source = OfTextLatent(index, m, on_texts, bench.lit, rng)
      asker = TextAsker(plan.style, source, rng)
      tasks = judging.TEXT_TASKS
    labels = {'': one.label}
    if baselines and m in other:
      labels['shuffled'] = by_latent[other[m]].label
    for task in tasks:
      asked = asker.questions(task, list(labels.values()))
      for (baseline, label), questions in zip(
        labels.items(), asked, strict=True
      ):
        if questions:
          about = (layer, m, one.dictionary, one.explainer)
          yield _trial(about, task, baseline, label, judge, questions)


def drawn(
  latents: Iterable[int], count: int, judged: int, seed: int, layer: int
) -> list[int]:
  """At most `judged` of the latents, as far as can be the same for every
  explainer, in order."""
  wanted = set(latents)
  order = np.random.default_rng([seed, layer, 1]).permutation(count).tolist()
  mine = [m for m in order if m in wanted]
  return sorted(mine[: judged or len(mine)])


def calibration(bench: Bench, plan: Plan, judge: str) -> Iterator[Trial]:
  """The picture tasks about true concepts, where they are known."""
  samples = bench.view.store.samples()
  if not bench.names:
    return
  vocabulary = truth.Vocabulary.of(samples)
  rng = np.random.default_rng([bench.seed, 2])
  for i in rng.permutation(len(vocabulary.counted))[:KNOWN].tolist():
    name = vocabulary.counted[i]
    own = rng_of(bench.seed, i)
    wanted = max(plan.style.cases, plan.style.pictures)
    source = OfConcept(bench, vocabulary, name, wanted, own)
    asker = Asker(plan.style, bench.image, source, own)
    yield from _known(asker.questions, judging.PICTURE_TASKS, name, judge)


def text_calibration(bench: Bench, plan: Plan, judge: str) -> Iterator[Trial]:
  """The text tasks about words, each its own label."""
  rng = rng_of(bench.seed, 3)
  every = contexts(bench.index, rng)
  held: dict[str, set[int]] = {}
  for at, tokens in enumerate(every):
    for token in tokens:
      if is_word(token):
        held.setdefault(token.strip(), set()).add(at)
  least = max(WORD_TEXTS, plan.style.pictures - 1)
  fit = sorted(
    word
    for word, at in held.items()
    if len(at) >= least and len(every) - len(at) >= WORD_TEXTS
  )
  for i in rng('words').permutation(len(fit))[:KNOWN].tolist():
    own = rng_of(bench.seed, i)
    asker = TextAsker(plan.style, OfWord(every, fit[i], own), own)
    yield from _known(asker.questions, judging.TEXT_TASKS, fit[i], judge)


def _known(ask, tasks: Sequence[str], label: str, judge: str):
  for task in tasks:
    (questions,) = ask(task, [label])
    if questions:
      about = (-1, -1, '', '')
      yield _trial(about, task, CALIBRATION, label, judge, questions)


def _trial(
  about: tuple[int, int, str, str],
  task: str,
  baseline: str,
  label: str,
  judge: str,
  questions: Sequence[Question],
) -> Trial:
  expected = tuple(question.expected for question in questions)
  choices = questions[0].choices
  return Trial(
    Judgement(*about, task, baseline, label, judge, expected, (), choices),
    tuple(questions),
  )


def scores(lines: Sequence[Judgement], first: str, second: str) -> list[Score]:
  """The lines of scores.jsonl: the first judge's, then how the second agrees.

  A task without an answer on either side has none.
  """
  found, agreed = [], {}
  by_key = {line.key: line for line in lines}
  for line in lines:
    if line.judge != first or line.baseline == CALIBRATION:
      continue
    made = functools.partial(
      Score,
      layer=line.layer,
      latent=line.latent,
      explainer=line.explainer,
      dictionary=line.dictionary,
    )
    value = judging.accuracy(line.answered)
    if value is not None:
      found.append(
        made(
          scorer=line.scorer,
          baseline=line.baseline,
          value=grounded.short(value),
          n=len(line.answered),
        )
      )
    other = by_key.get(dataclasses.replace(line, judge=second).key)
    if second and other and not line.baseline:
      about = (line.layer, line.dictionary, line.explainer, line.latent)
      pairs = agreed.setdefault(about, (made, []))[1]
      pairs += judging.both(line, other)
  for made, pairs in agreed.values():
    if pairs:
      alike = np.mean([one == other for one, other in pairs])
      found.append(
        made(
          scorer=CONSISTENCY,
          baseline='',
          value=grounded.short(alike),
          n=len(pairs),
        )
      )
  return found


def replace(
  path: pathlib.Path, mine: Sequence[dict], layers: Sequence[int]
) -> None:
  """Puts lines in the place of those of the same layers that a judge gave.

  The others stay, in their order, before them.
  """
  judged = {*judging.TASKS, CONSISTENCY}
  lines = records.read_lines(path)
  kept = [
    line
    for line in lines
    if line['scorer'] not in judged or line['layer'] not in layers
  ]
  if lines == [*kept, *mine]:
    return
  records.write_lines(path, [*kept, *mine])
