"""What each latent stands for, where the truth is known: WORKDIR/concepts.json.

The `index` stage writes {layer: [one dict a latent], 'neurons': {layer: clean
concepts among the raw neurons}, 'counted': [concepts of objects],
'dictionaries': {dictionary: {layer: as of the SAE}}}; score, steer, attribute
and report read it here. A run without truth has no such file, and no
concepts.
"""

import dataclasses
import json
import re
from collections.abc import Container, Iterable

from lmm_sae.core.workdir import Workdir

FILE = 'concepts.json'
MIN_F1 = 0.2  # below it on half A a latent is said to stand for nothing
OBJECTS = 0.8  # share of its firings on objects that makes a latent theirs


@dataclasses.dataclass(frozen=True)
class Concept:
  """The concept of one latent; fixed on half A, measured on half B.

  Attributes:
    concept: the argmax of F1 on A over the concepts.
    threshold: activation above which it counts as firing, chosen on A.
    objects: share of its firings on A that lie on objects.
    peak: largest activation on A.
    clean: on B, F1 > .2 and soft precision > .9.
  """

  latent: int
  concept: str
  threshold: float
  f1_a: float
  f1_b: float
  precision_b: float
  objects: float
  peak: float
  clean: bool


def load(workdir: Workdir, layer: int, dictionary: str = '') -> list[Concept]:
  """The concepts of the latents of a layer, or of a dictionary beside the SAE;
  [] where no truth is known."""
  found = _table(workdir)
  if dictionary:
    found = found.get('dictionaries', {}).get(dictionary, {})
  table = found.get(str(layer), [])
  names = [field.name for field in dataclasses.fields(Concept)]
  return [Concept(**{name: row[name] for name in names}) for row in table]


def of_objects(
  table: Iterable[Concept], explained: Container[int]
) -> list[Concept]:
  """The rows that explanations are held against: explained latents that speak
  of objects and stand for something, both fixed on half A."""
  return [
    row
    for row in table
    if row.objects >= OBJECTS and row.f1_a > MIN_F1 and row.latent in explained
  ]


def neurons(workdir: Workdir, layer: int) -> int | None:
  """Clean concepts among the raw neurons, the same rule; None if not known."""
  counts = _table(workdir).get('neurons')
  return counts.get(str(layer)) if isinstance(counts, dict) else counts


def counted(workdir: Workdir) -> list[str]:
  """The concepts of objects: those that may have a clean latent."""
  return _table(workdir).get('counted', [])


def names(concepts: list[Concept]) -> dict[int, str]:
  """Latent -> concept, for the latents that stand for one (F1 on A > .2)."""
  return {
    row.latent: row.concept
    for row in concepts
    if row.concept and row.f1_a > MIN_F1
  }


def says(text: str, concept: str) -> bool:
  """Whether a text contains the concept as a word, in any case, or many of it.

  A concept of one letter must stand as it is: `t` of "don't" is not the T.
  """
  word = re.escape(concept)
  if len(concept) == 1:
    return bool(re.search(rf'\b{word}\b', text))
  return bool(re.search(rf'\b{word}(?:e?s)?\b', text, re.IGNORECASE))


def _table(workdir: Workdir) -> dict:
  path = workdir.file(FILE)
  return json.loads(path.read_text()) if path.exists() else {}
