"""Cases, choices and the journal of steering: what the figures rest on.

No server is asked here but through an `Asker`; choices look at half A alone.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lmm_sae.core import concepts, progress, records
from lmm_sae.core.asking import Ask, Asker
from lmm_sae.core.records import Sample, Steering, Turn

SPARE = 8  # one spare case for so many, for those that the subject gets wrong


@dataclasses.dataclass(frozen=True)
class Case:
  """A question about an image (sample -1: none) with its unsteered answers."""

  sample: int
  turn: Turn
  plain: str = ''
  sae: str = ''


def pool_of(
  samples: Sequence[Sample], study: str, targets: Sequence[str], count: int
) -> list[Case]:
  """Questions enough for `count` cases of every target, and a few to spare.

  First the first question of each sample, then the second ones, and so on.
  """
  turns = [
    [turn for turn in sample.turns if turn.type == study and turn.target]
    for sample in samples
  ]
  rounds = max(map(len, turns), default=0)
  ordered = [
    Case(sample.sample, asked[i])
    for i in range(rounds)
    for sample, asked in zip(samples, turns, strict=True)
    if i < len(asked) and sample.image
  ]
  lacking = dict.fromkeys(targets, count + -(-count // SPARE))
  pool = []
  for case in ordered:
    if all(left <= 0 for left in lacking.values()):
      break
    pool.append(case)
    for target in targets:
      lacking[target] -= case.turn.target != target
  return pool


def choose(
  swept: Sequence[Steering],
  candidates: dict[str, list[int]],
  doses: Sequence[float],
) -> tuple[float, dict[str, int]]:
  """The study's dose and each target's latent, from answers of half A.

  The dose has the highest mean over the targets of the best candidate's flip
  rate, the smallest dose of several; the latent is that candidate, the one of
  higher F1 of several. A target without cases on A keeps its first candidate.

  Raises:
    ValueError: an answer is not of half A.
  """
  flips: dict[tuple[str, int, float], list[bool]] = {}
  for one in swept:
    if one.half != 'a':
      raise ValueError(f'a choice was offered an answer of half {one.half}')
    key = (one.target, one.edits[0].latent, one.edits[0].value)
    hit = concepts.says(one.text_edited, one.target)
    flips.setdefault(key, []).append(hit)

  def rate(target, latent, dose):
    return float(np.mean(flips.get((target, latent, dose), [False])))

  def best(target, dose):
    return max(candidates[target], key=lambda m: rate(target, m, dose))

  dose = max(
    sorted(doses),
    key=lambda d: sum(rate(t, best(t, d), d) for t in candidates),
  )
  return dose, {target: best(target, dose) for target in candidates}


class Journal:
  """steering.jsonl as it is made again: what stands there is not asked again.

  The order of the records follows from config and workdir, so what a killed run
  left is the beginning of what is made now.
  """

  def __init__(self, out: records.Appender):
    self._out = out
    self._before = [records.from_json(Steering, line) for line in out.existing]
    self._at = 0

  def answer(self, asker: Asker, wanted: Sequence[Steering]) -> list[Steering]:
    """The records with `text_edited`: from the file, else from the server.

    Raises:
      ValueError: the file holds other records, of other settings.
    """
    done = []
    starts = range(0, len(wanted), asker.batch)
    for start in progress.track(starts, len(starts), 'steered requests'):
      part = wanted[start : start + asker.batch]
      known = self._before[self._at : self._at + len(part)]
      for found, want in zip(known, part, strict=False):
        if dataclasses.replace(found, text_edited='') != want:
          self._refuse()
      if len(known) < len(part):  # the same request as before the kill
        texts = asker.ask([Ask(w.sample, w.prompt, w.edits) for w in part])
        for want, text in list(zip(part, texts, strict=True))[len(known) :]:
          known.append(dataclasses.replace(want, text_edited=text))
          self._out.add(known[-1])
      self._at += len(part)
      done.extend(known)
    return done

  def finish(self) -> None:
    if self._at < len(self._before):
      self._refuse()

  def _refuse(self):
    raise ValueError(
      f'{self._out.path} was made with other settings or another SAE: remove '
      'it to steer again'
    )
