"""What people say of labels: which cases they see, and WORKDIR/ratings/.

Every rater sees the same cases, each in an order of their own: a latent's
exemplars, and a label that is the latent's own or, in half of the cases, that
of another latent (the control). First they may put what they see into words of
their own, then the label is shown and they say whether it fits.

ratings/<rater>.jsonl holds a line for every step; of the lines of a case the
last one counts. One process serves a rater at a time.
"""

import dataclasses
import pathlib
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmm_sae.core import agreement, records, stats
from lmm_sae.core.records import Explanation, Score
from lmm_sae.core.workdir import Workdir

ANSWERS = ('no', 'partly', 'fits')  # worth 0, 1/2 and 1
NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_-]{0,39}')
FILE = 'agreement.json'
JUDGES = ('detection', 'fuzzing', 'intruder')  # scorers people are held beside


@dataclasses.dataclass(frozen=True)
class Case:
  """A latent's exemplars under a label; `control`: another latent's label."""

  layer: int
  latent: int
  explainer: str
  label: str
  control: bool


@dataclasses.dataclass(frozen=True)
class Rating:
  """A step of a rater on a case.

  Attributes:
    own: the rater's words, given before the label was seen; '' where none.
    answer: one of ANSWERS; '': the label was shown and is not answered yet.
  """

  rater: str
  layer: int
  latent: int
  explainer: str
  label: str
  control: bool
  own: str
  answer: str


def raters(text: str) -> tuple[str, ...]:
  """The names in a comma-separated list.

  Raises:
    ValueError: one cannot be the name of a file.
  """
  names = [name.strip() for name in text.split(',') if name.strip()]
  for name in names:
    if not NAME.fullmatch(name):
      raise ValueError(
        f'label.rater: {name!r} is no name: take at most 40 letters, digits, '
        '- and _'
      )
  return tuple(dict.fromkeys(names))


def cases(
  explained: Sequence[Explanation], count: int, seed: int
) -> list[Case]:
  """At most `count` cases of the SAE's explained latents, half of it controls.

  They depend on the first explainer's lines and the seed alone.

  Raises:
    ValueError: nothing was explained.
  """
  first = [one for one in explained if not one.dictionary]
  first = [one for one in first if one.explainer == first[0].explainer]
  first = [one for one in first if one.outcome == 'explained' and one.exemplars]
  if not first:
    raise ValueError(
      'explanations.jsonl explains no latent: run `lmm-sae explain` first'
    )
  first.sort(key=lambda one: (one.layer, one.latent))
  rng = np.random.default_rng([seed, *b'label'])
  chosen = [first[i] for i in rng.permutation(len(first))[:count]]
  found = []
  for at, one in enumerate(chosen):
    others = chosen[at + 1 :] + chosen[:at]
    other = next(
      (o.label for o in others if o.label.lower() != one.label.lower()), None
    )
    control = at % 2 == 1 and other is not None
    label = other if control else one.label
    found.append(Case(one.layer, one.latent, one.explainer, label, control))
  return found


def order(cases: Sequence[Case], rater: str, seed: int) -> list[Case]:
  """The cases as a rater sees them."""
  rng = np.random.default_rng([seed, zlib.crc32(rater.encode())])
  return [cases[i] for i in rng.permutation(len(cases))]


class Sheet:
  """What one rater has said; may be read by others meanwhile."""

  def __init__(self, workdir: Workdir, rater: str, cases: Sequence[Case]):
    self.rater, self.cases = rater, list(cases)
    self._path = path(workdir, rater)
    self._last = _last(self._path)
    if not self._last.keys() <= {_key(case) for case in self.cases}:
      raise ValueError(
        f'{self._path} rates other cases: label.latents, the seed or '
        'explanations.jsonl changed since; move it away to begin anew'
      )

  def last(self, case: Case) -> Rating | None:
    return self._last.get(_key(case))

  def next(self) -> int:
    """Which case comes next; as many as there are, where all are answered."""
    for at, case in enumerate(self.cases):
      last = self.last(case)
      if last is None or not last.answer:
        return at
    return len(self.cases)

  def note(self, case: Case, own: str, answer: str) -> None:
    """Writes a step down."""
    rating = Rating(
      rater=self.rater, own=own, answer=answer, **dataclasses.asdict(case)
    )
    with records.Appender(self._path) as file:
      file.add(rating)
    self._last[_key(case)] = rating


def path(workdir: Workdir, rater: str) -> pathlib.Path:
  return workdir.file('ratings') / f'{rater}.jsonl'


def _key(one: Case | Rating) -> tuple:
  return one.layer, one.latent, one.explainer, one.label, one.control


def _last(file: pathlib.Path) -> dict[tuple, Rating]:
  """The line of each case that counts."""
  return {_key(one): one for one in records.read(Rating, file)}


def read(workdir: Workdir) -> dict[str, list[Rating]]:
  """The answers that count, by rater."""
  found = {}
  for file in sorted(workdir.file('ratings').glob('*.jsonl')):
    found[file.stem] = [one for one in _last(file).values() if one.answer]
  return {rater: lines for rater, lines in found.items() if lines}


def measure(workdir: Workdir, seed: int) -> dict[str, Any]:
  """What agreement.json holds: figures as {value, n, ci}.

  fits, control   mean worth of the answers to the latents' own labels, and to
                  those of others; cases resampled
  alpha           Krippendorff's, ordinal, over all raters
  kappa           {'a, b': Cohen's of two raters}
  judge           {scorer: correlation of people's worth of a latent's own label
                  with the LMM judge's score of that latent}

  Raises:
    ValueError: nobody has rated anything.
  """
  by_rater = read(workdir)
  if not by_rater:
    raise ValueError(
      f'{workdir.file("ratings")} holds no answers: serve the page first, with '
      '--config.label.rater=NAME'
    )
  names = list(by_rater)
  keys = sorted({_key(r) for lines in by_rater.values() for r in lines})
  worth_UR = np.full((len(keys), len(names)), np.nan)
  for column, name in enumerate(names):
    for one in by_rater[name]:
      worth = ANSWERS.index(one.answer) / 2
      worth_UR[keys.index(_key(one)), column] = worth
  mean_U = np.nanmean(worth_UR, 1)
  control_U = np.array([key[-1] for key in keys], bool)
  pairs = [(a, b) for a in range(len(names)) for b in range(a + 1, len(names))]
  return {
    'format_version': records.FORMAT_VERSION,
    'raters': {name: len(lines) for name, lines in by_rater.items()},
    'fits': stats.mean_figure(mean_U[~control_U], 'no own label was rated'),
    'control': stats.mean_figure(mean_U[control_U], 'no control was rated'),
    'alpha': agreement.figure(agreement.krippendorff_alpha, worth_UR, seed),
    'kappa': {
      f'{names[a]}, {names[b]}': agreement.figure(
        lambda x_UR: agreement.cohen_kappa(*x_UR.T), worth_UR[:, [a, b]], seed
      )
      for a, b in pairs
    },
    'judge': _beside_judge(workdir, keys, mean_U, seed),
  }


def _beside_judge(
  workdir: Workdir, keys: Sequence[tuple], mean_U: np.ndarray, seed: int
) -> dict[str, Any]:
  rated = {
    key[:3]: worth
    for key, worth in zip(keys, mean_U.tolist(), strict=True)
    if not key[-1]
  }
  pairs: dict[str, list] = {name: [] for name in JUDGES}
  for one in records.read(Score, workdir.file('scores.jsonl')):
    key = (one.layer, one.latent, one.explainer)
    mine = not (one.baseline or one.dictionary)
    if one.scorer in pairs and mine and key in rated:
      pairs[one.scorer].append([(rated[key], one.value)])
  return {
    name: stats.correlation_figure(
      found, 'fewer than 3 rated latents were judged, or all alike', seed
    )
    for name, found in pairs.items()
  }
