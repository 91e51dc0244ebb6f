"""Explains one latent: what is shown, what is asked, what the answer means.

Three questions, each to its own model: what the exemplars have in common, a
label of it, and the label's category. A latent is explained from text where no
image fires it, or where text does so more often and more strongly than patches
(`from_text`).
"""

import dataclasses
import functools
import pathlib
import re
from typing import NamedTuple

import numpy as np
from absl import logging
from PIL import Image

from lmm_sae.core import host, masks, prompts
from lmm_sae.core.chat import Answer, ChatClient, ChatError
from lmm_sae.core.index import ImageExemplar, LatentIndex, TextExemplar
from lmm_sae.core.records import DICTIONARIES, Exemplar, Explanation
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.tokens import TEXT

CATEGORIES = ('scene', 'object', 'part', 'material', 'texture', 'colour')
LABEL_WORDS = 5  # a text of no more is a label, as the refine prompt has it
WARNINGS = 5  # failures told one by one; all are counted
IMAGES = 256  # small images kept in memory
WHOLE_IMAGES = 16  # the same, where they are sent as they are


@dataclasses.dataclass(frozen=True)
class ExplainConfig:
  """The section `explain` of the config; its fields are explained there."""

  base_url: str
  model: str
  others: tuple[str, ...]
  api_key: str
  latents: tuple[int, ...]
  limit: int
  exemplars: int
  refine_url: str
  refine_model: str
  refine_key: str
  refine_prices: tuple[float, ...]
  category_url: str
  category_model: str
  category_key: str
  category_prices: tuple[float, ...]
  dictionaries: tuple[str, ...]
  dictionary_limit: int
  price_in: float
  price_out: float
  split: str
  pixels: int
  mask: str
  threshold: float
  max_tokens: int
  concurrency: int
  retries: int
  timeout_s: float

  def __post_init__(self):
    if not self.base_url:
      raise ValueError(
        'explain.base_url is empty: give the URL of an OpenAI-compatible '
        'server with /v1, or run `lmm-sae all`, which starts one'
      )
    for name in ('exemplars', 'max_tokens', 'concurrency'):
      if getattr(self, name) < 1:
        raise ValueError(f'explain.{name} must be at least 1')
    for name in (
      *('limit', 'dictionary_limit', 'pixels', 'retries'),
      *('price_in', 'price_out'),
    ):
      if not getattr(self, name) >= 0:
        raise ValueError(f'explain.{name} {getattr(self, name)} is below 0')
    for name in ('refine_prices', 'category_prices'):
      prices = getattr(self, name)
      if len(prices) not in (0, 2) or not all(price >= 0 for price in prices):
        raise ValueError(
          f'explain.{name} {prices} is neither () nor (in, out), both >= 0'
        )
    if not self.timeout_s > 0:
      raise ValueError(f'explain.timeout_s {self.timeout_s} is not above 0')
    if self.mask not in masks.STYLES:
      raise ValueError(f'explain.mask {self.mask!r} is neither exact nor paper')
    if not 0 <= self.threshold <= 1:
      raise ValueError(f'explain.threshold {self.threshold} is not in 0..1')
    for name in self.dictionaries:
      if name not in DICTIONARIES:
        raise ValueError(
          f'explain.dictionaries: {name!r} is none of {DICTIONARIES}'
        )


class Chats(NamedTuple):
  """Whom the three questions go to."""

  explainer: ChatClient
  refiner: ChatClient
  category: ChatClient


class Explainer:
  """Explains single latents of one dictionary; may be shared by threads."""

  def __init__(
    self,
    opts: ExplainConfig,
    seed: int,
    layer: int,
    dictionary: str,
    index: LatentIndex,
    store: ActivationStore,
    chats: Chats,
  ):
    self.opts = opts
    self.layer, self.dictionary = layer, dictionary
    self.name = short_name(chats.explainer.model)
    self._seed = seed
    self._index = index
    self._chats = chats
    kept = IMAGES if opts.pixels else WHOLE_IMAGES
    self._small = functools.lru_cache(kept)(
      lambda sample: masks.shrink(store.image(sample), opts.pixels)
    )

  def chosen(self) -> list[int]:
    """The latents that get a line, in order.

    Of the SAE all, or those of explain.latents; where explain.limit is less
    than what would be asked, those that fire on most images. Of a baseline
    dictionary explain.dictionary_limit of those alive, drawn: a larger limit
    adds to them.

    Raises:
      ValueError: explain.latents names one that there is not.
    """
    stats, count = self._index.stats, self._index.num_latents
    if self.dictionary:
      alive = np.flatnonzero(~stats['dead'].astype(bool))
      number = DICTIONARIES.index(self.dictionary)
      rng = np.random.default_rng([self._seed, self.layer, number])
      drawn = rng.permutation(alive)[: self.opts.dictionary_limit or None]
      return sorted(drawn.tolist())
    for latent in self.opts.latents:
      if not 0 <= latent < count:
        raise ValueError(
          f'explain.latents: {latent} is no latent; 0 to {count - 1} are'
        )
    chosen = sorted(set(self.opts.latents)) or range(count)
    if not self.opts.limit:
      return list(chosen)
    fired = stats['images_fired']
    asked = [m for m in chosen if not self._fate(m)]
    asked.sort(key=lambda m: (-fired[m], m))
    kept = set(asked[: self.opts.limit])
    return [m for m in chosen if m in kept or self._fate(m)]

  def stop(self) -> None:
    """Asks nothing any more."""
    for chat in self._chats:
      chat.stop(ConnectionError('explain was stopped'))

  def explain(self, latent: int) -> Explanation:
    """The explanation, or why there is none.

    Where an answer fails, what was had before it stands in the explanation.

    Raises:
      ConnectionError: a server is gone; ValueError: it has no such model.
    """
    outcome, text, label, kind = self._fate(latent), '', '', ''
    texts = from_text(self._index, latent)
    found = self._index.texts if texts else self._index.exemplars
    shown = found(latent)[: self.opts.exemplars]
    if not outcome:
      outcome = 'failed'
      try:
        said, text = read(self._ask(latent, shown))
        if said == 'explained':
          label = self._label(text)
          question = prompts.fill('category', label=label)
          kind = category(self._chats.category.ask(question).text)
        outcome = said
      except ChatError as error:
        logging.log_first_n(
          logging.WARNING, 'explain: latent %d: %s', WARNINGS, latent, error
        )
    return Explanation(
      layer=self.layer,
      latent=latent,
      exemplars=tuple(
        Exemplar(one.sample, round(one.strength, 6)) for one in shown
      ),
      outcome=outcome,
      text=text,
      label=label,
      category=kind,
      explainer=self.name,
      dictionary=self.dictionary,
    )

  def _ask(
    self, latent: int, shown: list[ImageExemplar] | list[TextExemplar]
  ) -> Answer:
    if isinstance(shown[0], ImageExemplar):
      return self._chats.explainer.ask(
        prompts.fill('explain', n=len(shown)),
        [self._masked(latent, one) for one in shown],
      )
    lines = [mark(one, self.opts.threshold) for one in shown]
    return self._chats.explainer.ask(
      prompts.fill('explain_text', texts='\n'.join(lines))
    )

  def _label(self, text: str) -> str:
    """The text where it is short already, else what the refiner makes of it."""
    if len(text.split()) > LABEL_WORDS:
      text = self._chats.refiner.ask(prompts.fill('refine', text=text)).text
    label = tidy(text)
    if not label:
      raise ChatError('there is no label')
    return label

  def _fate(self, latent: int) -> str:
    """The outcome that needs no asking; '' where the explainer is asked."""
    stats = self._index.stats
    if stats['always_on'][latent]:
      return 'always_on'
    if stats['images_fired'][latent] or self._index.texts(latent):
      return ''
    return 'dead'

  def _masked(self, latent: int, exemplar: ImageExemplar) -> Image.Image:
    """As the explainer sees an exemplar: what the mask leaves bright."""
    style, threshold = self.opts.mask, self.opts.threshold
    active_HW = bright(self._index, latent, exemplar.heat_HW, style, threshold)
    return masks.masked(self._small(exemplar.sample), active_HW, style)


def bright(
  index: LatentIndex,
  latent: int,
  heat_HW: np.ndarray,
  style: str,
  threshold: float,
) -> np.ndarray:
  """Patches of a heat map that explainers, judges and people see bright.

  Args:
    style, threshold: of the mask, as explain.mask and explain.threshold.
  """
  return masks.bright(
    heat_HW,
    style,
    peak=float(index.stats['peak_base'][latent]),
    share=threshold,
    level=index.meta.threshold,
  )


def from_text(index: LatentIndex, latent: int) -> bool:
  """Whether a latent is explained from text: no image fires it, or text does
  more often than patches of the base view, and more strongly."""
  stats = index.stats
  if not stats['images_fired'][latent]:
    return True
  names = [f'fired_{kind.name.lower()}' for kind in TEXT]
  if sum(int(stats[n][latent]) for n in names) <= stats['fired_base'][latent]:
    return False
  texts = index.texts(latent)
  return bool(texts) and texts[0].strength > stats['peak_base'][latent]


def short_name(model: str) -> str:
  """How files name an explainer: a packaged model by its size alone."""
  path = pathlib.Path(model)
  return path.name if path.parent == host.weights() else model


def read(answer: Answer) -> tuple[str, str]:
  """(outcome, text) of an answer to an explain prompt.

  Raises:
    ChatError: it was cut off before it came to its point.
  """
  if answer.cut and not prompts.marked(answer.text):
    raise ChatError('cut off before its marker: raise explain.max_tokens')
  return prompts.parse(answer.text)


def tidy(answer: str) -> str:
  """The first line of an answer, without quotes and full stop."""
  lines = [line.strip() for line in answer.splitlines() if line.strip()]
  return ' '.join(lines[0].strip('\'".` ').split()) if lines else ''


def category(answer: str) -> str:
  """The first of CATEGORIES that an answer names; '' if it names none."""
  for word in re.findall('[a-z]+', answer.lower().replace('color', 'colour')):
    if word in CATEGORIES:
      return word
  return ''


def mark(exemplar: TextExemplar, threshold: float) -> str:
  """The text with << >> about what fires at `threshold` of the exemplar.

  On one line, and no other << or >> stand in it.
  """
  parts, open_ = [], False
  for token, act in zip(exemplar.tokens, exemplar.acts, strict=True):
    token = ' '.join(
      token.replace('<<', '< <').replace('>>', '> >').split('\n')
    )
    fires = act > 0 and act >= threshold * exemplar.strength
    if fires != open_:
      if fires:
        space = token[: len(token) - len(token.lstrip())]
        parts.append(space + '<<')
        token = token.lstrip()
      else:
        parts.append('>>')
      open_ = fires
    parts.append(token)
  return ''.join([*parts, '>>' if open_ else '']).strip()
