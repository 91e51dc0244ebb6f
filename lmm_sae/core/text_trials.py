"""Questions that tell a judge's right answers from wrong ones, on texts.

  detection_text  contexts, half of which fire: is the label in it?
  fuzzing_text    contexts that fire, with << >> where they do, and elsewhere
  intruder_text   marked contexts, of which one is another latent's

They are made of a latent's contexts, or of those of a word: what a word is
needs no truth to be known. The packaged models were not trained on these turns.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from lmm_sae.core import prompts
from lmm_sae.core.index import LatentIndex, TextExemplar
from lmm_sae.core.trial_sources import TRIES, Rng
from lmm_sae.core.trials import NO, YES, Question, Style, amid, halves

SCANNED = 500  # latents whose contexts are looked through for words, at most


class Marked(NamedTuple):
  """A text, token by token, and which of them are marked."""

  tokens: tuple[str, ...]
  marks: tuple[bool, ...]

  @property
  def plain(self) -> str:
    return ' '.join(''.join(self.tokens).split('\n')).strip()

  @property
  def text(self) -> str:
    """The text on one line, with << >> about runs of marked tokens alone."""
    parts, open_ = [], False
    for token, mark in zip(self.tokens, self.marks, strict=True):
      token = ' '.join(
        token.replace('<<', '< <').replace('>>', '> >').split('\n')
      )
      if mark != open_:
        bare = token.lstrip() if mark else token
        space = token[: len(token) - len(bare)]
        parts.append(space + '<<' if mark else '>>')
        token, open_ = bare, mark
      parts.append(token)
    return ''.join([*parts, '>>' if open_ else '']).strip()


class TextSource(Protocol):
  """Where texts of one latent, or of one word, are drawn from."""

  def firing(self) -> Sequence[Marked]:
    """Texts that show it, marked, in the order in which they are to be used."""

  def silent(self, count: int) -> list[str]:
    """At most so many texts that do not show it."""

  def odd(self) -> Marked | None:
    """A text marked where something else is; None where none was found."""


class OfTextLatent:
  """Contexts that fire one latent.

  Args:
    others: latents that fire on text.
    lit: of the exemplar's activation, above which a token is marked.
  """

  def __init__(
    self,
    index: LatentIndex,
    latent: int,
    others: Sequence[int],
    lit: float,
    rng: Rng,
  ):
    self._index, self._latent, self._lit = index, latent, lit
    self._odd = rng('odd text')
    spread, strongest = index.text_spread(latent), index.texts(latent)
    order = rng('texts').permutation(len(spread)).tolist()
    every = [*(spread[i] for i in order), *strongest]
    drawn = {(one.sample, one.position): one for one in every}
    self._firing = list(
      {
        x.text: x for x in (self._marked(one) for one in drawn.values())
      }.values()
    )
    self._samples = set(index.postings(latent, view='text')[0].tolist())
    self._others = [m for m in others if m != latent]

  def firing(self) -> Sequence[Marked]:
    return self._firing

  def silent(self, count: int) -> list[str]:
    found: dict[str, None] = {}
    for _ in range(TRIES * count):
      one = self._other()
      if one is not None:
        found[one.plain] = None
      if len(found) == count:
        break
    return list(found)

  def odd(self) -> Marked | None:
    for _ in range(TRIES):
      one = self._other()
      if one is not None:
        return one
    return None

  def _other(self) -> Marked | None:
    """Another latent's context of a sample whose text is silent here."""
    if not self._others:
      return None
    found = self._index.texts(int(self._odd.choice(self._others)))
    if not found:
      return None
    one = found[int(self._odd.integers(len(found)))]
    return None if one.sample in self._samples else self._marked(one)

  def _marked(self, one: TextExemplar) -> Marked:
    level = self._lit * one.strength
    return Marked(
      tuple(one.tokens), tuple(act > 0 and act >= level for act in one.acts)
    )


class OfWord:
  """Contexts that hold a word, of those that the index has."""

  def __init__(self, contexts: Sequence[tuple[str, ...]], word: str, rng: Rng):
    self._odd = rng('odd text')
    self._firing, self._lacking = [], []
    for at in rng('texts').permutation(len(contexts)).tolist():
      tokens = contexts[at]
      marks = tuple(token.strip() == word for token in tokens)
      if any(marks):
        self._firing.append(Marked(tokens, marks))
      elif word.lower() not in ''.join(tokens).lower():
        self._lacking.append(tokens)

  def firing(self) -> Sequence[Marked]:
    return self._firing

  def silent(self, count: int) -> list[str]:
    bare = (False,) * max(map(len, self._lacking), default=0)
    return [
      Marked(tokens, bare[: len(tokens)]).plain
      for tokens in self._lacking[:count]
    ]

  def odd(self) -> Marked | None:
    if not self._lacking:
      return None
    tokens = self._lacking[int(self._odd.integers(len(self._lacking)))]
    words = [i for i, token in enumerate(tokens) if is_word(token)]
    if not words:
      return None
    place = int(self._odd.choice(words))
    return Marked(tokens, tuple(i == place for i in range(len(tokens))))


def contexts(index: LatentIndex, rng: Rng) -> list[tuple[str, ...]]:
  """Distinct contexts of at most SCANNED latents that fire on text."""
  latents = np.flatnonzero(index.stats['samples_fired'])
  drawn = rng('latents').permutation(latents)[:SCANNED].tolist()
  every = (tuple(one.tokens) for m in drawn for one in index.texts(m))
  return list(dict.fromkeys(every))


def is_word(token: str) -> bool:
  return token.strip().isalpha() and len(token.strip()) > 1


class TextAsker:
  """Makes the questions about one source of texts; see `trials.Asker`."""

  def __init__(self, style: Style, source: TextSource, rng: Rng):
    self._style, self._source, self._rng = style, source, rng

  def questions(self, scorer: str, labels: Sequence[str]) -> list[list]:
    """The questions of that name, with each of the labels in them."""
    make = {
      'detection_text': self._detection,
      'fuzzing_text': self._fuzzing,
      'intruder_text': self._intruder,
    }[scorer]
    return make(labels)

  def _detection(self, labels):
    half = self._style.cases // 2
    fires = [one.plain for one in self._source.firing()[:half]]
    shown = halves(fires, self._source.silent(len(fires)))
    return [self._yes_no('detect_text', label, shown) for label in labels]

  def _fuzzing(self, labels):
    rng = self._rng('fuzzing_text')
    shown: list[tuple[str, str]] = []
    for one in self._source.firing():
      if len(shown) >= self._style.cases // 2 * 2:
        break
      elsewhere = moved(one, rng)
      if elsewhere is not None:
        shown += [(one.text, YES), (elsewhere.text, NO)]
    return [self._yes_no('fuzz_text', label, shown) for label in labels]

  def _yes_no(self, prompt: str, label: str, shown: Sequence[tuple[str, str]]):
    return [
      Question(
        prompts.fill(prompt, label=label, text=text), (), right, 'yes_no', label
      )
      for text, right in shown
    ]

  def _intruder(self, labels):
    count, rng = self._style.pictures, self._rng('intruder_text')
    sets = [
      ('\n'.join(f'{i}. {one.text}' for i, one in enumerate(shown, 1)), right)
      for shown, right in amid(self._source, self._style, rng)
    ]
    return [
      [
        Question(
          prompts.fill('intruder_text', n=count, label=label, texts=texts),
          *((), right, 'number', label, count),
        )
        for texts, right in sets
      ]
      for label in labels
    ]


def moved(one: Marked, rng: np.random.Generator) -> Marked | None:
  """As many other words marked; None where there are not so many."""
  free = [
    i
    for i, (token, mark) in enumerate(zip(one.tokens, one.marks, strict=True))
    if not mark and is_word(token)
  ]
  if len(free) < sum(one.marks):
    return None
  chosen = set(rng.choice(free, sum(one.marks), replace=False).tolist())
  return Marked(one.tokens, tuple(i in chosen for i in range(len(one.tokens))))
