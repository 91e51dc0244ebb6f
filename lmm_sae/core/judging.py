"""Has an LMM answer questions about explanations, and counts what it says.

judgements.jsonl has a line for each latent, task, label and judge, with every
answer; scores.jsonl is made of it, and so is judges.json: how each judge fared
where the right answers are known, and how far two judges agree.
"""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from lmm_sae.core import stats
from lmm_sae.core.chat import ChatClient, ChatError
from lmm_sae.core.trials import NO, YES, Question, read

CALIBRATION = 'calibration'  # baseline of lines about true concepts
PICTURE_TASKS = ('detection', 'fuzzing', 'intruder')
TEXT_TASKS = ('detection_text', 'fuzzing_text', 'intruder_text')
TASKS = (*PICTURE_TASKS, *TEXT_TASKS)
FAILED = 'failed'  # an answer that could not be had
AT_ONCE = 16  # lines whose questions are asked together
WARNINGS = 5  # failures told one by one; all are counted


@dataclasses.dataclass(frozen=True)
class Judgement:
  """What a judge said of one label, task by task.

  Attributes:
    latent: -1 of a calibration.
    baseline: '', `shuffled`, or CALIBRATION.
    label: that was judged.
    judge: the model that answered.
    expected: of each question `yes`, `no` or a number.
    said: of each the same, '' for an answer that says neither, or FAILED.
    choices: numbers there were to choose from; 2 for yes and no.
  """

  layer: int
  latent: int
  dictionary: str
  explainer: str
  scorer: str
  baseline: str
  label: str
  judge: str
  expected: tuple[str, ...]
  said: tuple[str, ...]
  choices: int

  @property
  def key(self) -> tuple:
    """What tells lines apart."""
    return (
      *(self.layer, self.latent, self.dictionary, self.explainer),
      *(self.scorer, self.baseline, self.judge),
      *((self.label,) if self.baseline == CALIBRATION else ()),
    )

  @property
  def answered(self) -> list[tuple[str, str]]:
    """(expected, said) of the questions that did not fail.

    An answer that says neither stays, as a wrong one: a judge that speaks only
    where it is sure is not a better one.
    """
    pairs = zip(self.expected, self.said, strict=True)
    return [(want, said) for want, said in pairs if said != FAILED]

  @property
  def failed(self) -> int:
    return self.said.count(FAILED)


@dataclasses.dataclass(frozen=True)
class Trial:
  """A line that is wanted: a Judgement without answers, and its questions."""

  line: Judgement
  questions: tuple[Question, ...]


def answers(
  chat: ChatClient, trials: Iterable[Trial], threads: int
) -> Iterator[Judgement]:
  """The lines, in order; `threads` questions are under way at once.

  Raises:
    ConnectionError: the server is gone; ValueError: it has no such model.
  """

  def ask(question: Question) -> str:
    try:
      answer = chat.ask(question.prompt, question.images)
    except ChatError as error:
      logging.log_first_n(logging.WARNING, 'score: judge: %s', WARNINGS, error)
      return FAILED
    return read(question, answer.text)

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for some in _parts(trials):
      asked = [q for trial in some for q in trial.questions]
      said = iter(list(pool.map(ask, asked)))
      for trial in some:
        mine = tuple(next(said) for _ in trial.questions)
        yield dataclasses.replace(trial.line, said=mine)


def accuracy(pairs: Sequence[tuple[str, str]]) -> float | None:
  """Of yes and no the balanced accuracy, of numbers the accuracy.

  None where a side has no answer.
  """
  sides: dict[str, list[bool]] = {}
  for want, said in pairs:
    sides.setdefault(want if want in (YES, NO) else '', []).append(want == said)
  if not sides or (set(sides) & {YES, NO} and len(sides) < 2):
    return None
  return float(np.mean([np.mean(side) for side in sides.values()]))


def accuracy_figure(
  lines: Sequence[Judgement], reason: str, seed: int, resamples: int
) -> dict[str, Any]:
  """`accuracy` of the answers of all lines; whole lines are resampled."""
  rows = []
  for line in lines:
    row = np.zeros(4)  # right and all of the true cases, then of the others
    for want, said in line.answered:
      side = 2 if want == NO else 0
      row[side : side + 2] += (want == said, 1)
    rows.append(row)

  def figure(sums_R4: np.ndarray) -> np.ndarray:
    true_R, false_R = (sums_R4[:, at] / sums_R4[:, at + 1] for at in (0, 2))
    two_sided = any(NO in line.expected for line in lines)
    return (true_R + false_R) / 2 if two_sided else true_R

  table_S4 = np.array(rows).reshape(-1, 4)
  found = stats.pooled_figure(table_S4, figure, reason, seed, resamples)
  return found | {'n': int(table_S4[:, [1, 3]].sum()), 'lines': len(lines)}


def kappa(pairs: Sequence[tuple[str, str]]) -> tuple[float, float | None]:
  """The share of pairs that agree, and Cohen's kappa of them.

  kappa is None where each side says one and the same of all.
  """
  agree = float(np.mean([one == other for one, other in pairs]))
  sides = [collections.Counter(side) for side in zip(*pairs, strict=True)]
  by_chance = (
    sum(sides[0][said] * sides[1][said] for said in sides[0]) / len(pairs) ** 2
  )
  if by_chance == 1:
    return agree, None
  return agree, (agree - by_chance) / (1 - by_chance)


def both(first: Judgement, second: Judgement) -> list[tuple[str, str]]:
  """What two judges said of the same questions, where both answered."""
  pairs = zip(first.said, second.said, strict=True)
  return [pair for pair in pairs if not {'', FAILED} & set(pair)]


def summary(
  lines: Sequence[Judgement], first: str, second: str, seed: int, resamples: int
) -> dict[str, Any]:
  """What judges.json says of the judges, by task.

  `calibration` is the accuracy where right answers are known, `chance` that of
  guessing; `trusted` says whether the interval lies above chance, None where
  nothing is known.
  """
  judges = {}
  for judge in dict.fromkeys((first, second) if second else (first,)):
    tasks = {}
    for task in TASKS:
      mine = [x for x in lines if (x.judge, x.scorer) == (judge, task)]
      if not mine:
        continue
      known = [x for x in mine if x.baseline == CALIBRATION]
      figure = accuracy_figure(
        known, 'no right answers are known', seed, resamples
      )
      chance = 1 / max(x.choices for x in mine)
      said = [answer for line in mine for answer in line.said]
      tasks[task] = {
        'chance': chance,
        'calibration': figure,
        'trusted': figure['ci'][0] > chance if figure['ci'] else None,
        'asked': len(said),
        'failed': said.count(FAILED),
        'unread': said.count(''),
      }
    judges[judge] = tasks
  return {
    'first': first,
    'second': second,
    'judges': judges,
    'agreement': agreement(lines, first, second, seed, resamples),
  }


def agreement(
  lines: Sequence[Judgement], first: str, second: str, seed: int, resamples: int
) -> dict[str, Any]:
  """By task {value, n, ci, kappa} of two judges on the same questions."""
  found = {}
  by_key = {line.key: line for line in lines}
  for task in TASKS if second else ():
    pairs = []
    for line in lines:
      if (line.judge, line.scorer, line.baseline) == (first, task, ''):
        other = by_key.get(dataclasses.replace(line, judge=second).key)
        pairs += both(line, other) if other else []
    if pairs:
      alike = [one == other for one, other in pairs]
      mean, low, high = stats.mean_ci(alike, seed, resamples)
      found[task] = {
        'value': mean,
        'n': len(pairs),
        'ci': [low, high],
        'kappa': kappa(pairs)[1],
      }
  return found


def _parts(trials: Iterable[Trial]) -> Iterator[list[Trial]]:
  part: list[Trial] = []
  for trial in trials:
    part.append(trial)
    if len(part) == AT_ONCE:
      yield part
      part = []
  if part:
    yield part
