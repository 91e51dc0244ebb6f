"""Asks a larger LMM what the exemplars of each latent have in common.

Each latent's strongest images, dimmed where it is silent, go in one message to
an OpenAI-compatible server; an answer of more than five words is shortened to a
label, and the label sorted into a category, by the same model. Appends
explanations.jsonl, one line a latent; run it again and only what is missing or
failed is asked. Run it with another explain.model and a second explainer stands
beside the first.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from lmm_sae.core import host, masks, progress, prompts, records
from lmm_sae.core.chat import Answer, ChatClient, ChatError
from lmm_sae.core.index import ImageExemplar, LatentIndex, TextExemplar
from lmm_sae.core.records import Exemplar, Explanation
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir

FILE = 'explanations.jsonl'
CATEGORIES = ('scene', 'object', 'part', 'material', 'texture', 'colour')
LABEL_WORDS = 5  # a text of no more is a label, as the refine prompt has it
AHEAD = 4  # latents begun a thread before the first of them must be done
WARNINGS = 5  # failures told one by one; all are counted
IMAGES = 256  # small images kept in memory

T = TypeVar('T')
U = TypeVar('U')


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
    if self.mask not in ('exact', 'paper'):
      raise ValueError(f'explain.mask {self.mask!r} is neither exact nor paper')
    if not 0 <= self.threshold <= 1:
      raise ValueError(f'explain.threshold {self.threshold} is not in 0..1')


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Explains the latents of every hooked layer that are not explained yet."""
  opts = ExplainConfig(**config.explain)
  model = opts.model or 'base'
  with ChatClient(
    opts.base_url,
    model,
    api_key=opts.api_key,
    cache=workdir.file('cache') / 'chat',
    usage=workdir.file('usage.json'),
    max_tokens=opts.max_tokens,
    timeout_s=opts.timeout_s,
    retries=opts.retries,
  ) as chat:
    for layer in config.lmm.layers:
      index = workdir.require(workdir.index(layer, opts.split), 'index')
      acts = workdir.require(workdir.acts(opts.split), 'capture')
      explainer = Explainer(
        opts, layer, LatentIndex.open(index), ActivationStore.open(acts), chat
      )
      explain(explainer, workdir.file(FILE))


def explain(explainer: 'Explainer', path: pathlib.Path) -> None:
  """Appends to the file what it lacks of one layer by one explainer.

  Failed lines are taken out and asked again. Lines stand in order of latent, so
  a file does not tell whether its run was broken off.
  """
  _drop(path, explainer.name, explainer.layer, outcome='failed')
  fates: collections.Counter[str] = collections.Counter()
  try:
    with records.Appender(path) as file:
      done = {
        line['latent']
        for line in file.existing
        if (line['layer'], line['explainer'])
        == (explainer.layer, explainer.name)
      }
      todo = [m for m in explainer.chosen() if m not in done]
      answers = _in_order(explainer.explain, todo, explainer.opts.concurrency)
      for explanation in progress.track(
        answers, len(todo), f'explain {explainer.layer}: latents'
      ):
        file.add(explanation)
        fates[explanation.outcome] += 1
  except ValueError:  # no such model: its failures are no explainer's
    _drop(path, explainer.name, explainer.layer, outcome='failed')
    raise
  _sort(path)
  logging.info(
    'explain: layer %d by %s: %s, %d were done before',
    explainer.layer,
    explainer.name,
    ', '.join(f'{n} {outcome}' for outcome, n in sorted(fates.items())) or '0',
    len(done),
  )


class Explainer:
  """Explains single latents of one layer; may be shared by threads."""

  def __init__(
    self,
    opts: ExplainConfig,
    layer: int,
    index: LatentIndex,
    store: ActivationStore,
    chat: ChatClient,
  ):
    self.opts = opts
    self.layer = layer
    self.name = short_name(chat.model)
    self._index = index
    self._store = store
    self._chat = chat
    self._small = functools.lru_cache(IMAGES)(self._load)

  def chosen(self) -> list[int]:
    """The latents that get a line, in order.

    All of them, or those of explain.latents; where explain.limit is less than
    what would be asked, those that fire on most images.

    Raises:
      ValueError: explain.latents names one that there is not.
    """
    count = self._index.num_latents
    for latent in self.opts.latents:
      if not 0 <= latent < count:
        raise ValueError(
          f'explain.latents: {latent} is no latent; 0 to {count - 1} are'
        )
    chosen = sorted(set(self.opts.latents)) or range(count)
    if not self.opts.limit:
      return list(chosen)
    fired = self._index.stats['images_fired']
    asked = [m for m in chosen if not self._fate(m)]
    asked.sort(key=lambda m: (-fired[m], m))
    kept = set(asked[: self.opts.limit])
    return [m for m in chosen if m in kept or self._fate(m)]

  def explain(self, latent: int) -> Explanation:
    """The explanation, or why there is none.

    Raises:
      ConnectionError: the server is gone; ValueError: it has no such model.
    """
    images = self._index.exemplars(latent)[: self.opts.exemplars]
    texts = self._index.texts(latent)[: self.opts.exemplars]
    shown = [
      Exemplar(one.sample, round(one.strength, 6)) for one in images or texts
    ]
    made = functools.partial(
      Explanation,
      layer=self.layer,
      latent=latent,
      exemplars=tuple(shown),
      explainer=self.name,
    )
    nothing = {'text': '', 'label': '', 'category': ''}
    fate = self._fate(latent)
    if fate:
      return made(outcome=fate, **nothing)
    try:
      if images:
        answer = self._chat.ask(
          prompts.fill('explain', n=len(images)),
          [self._masked(latent, one) for one in images],
        )
      else:
        lines = [mark(one, self.opts.threshold) for one in texts]
        answer = self._chat.ask(
          prompts.fill('explain_text', texts='\n'.join(lines))
        )
      outcome, text = read(answer)
      if outcome == 'no_pattern':
        return made(outcome=outcome, **nothing)
      label = self._label(text)
      kind = self._chat.ask(prompts.fill('category', label=label)).text
    except ChatError as error:
      logging.log_first_n(
        logging.WARNING, 'explain: latent %d: %s', WARNINGS, latent, error
      )
      return made(outcome='failed', **nothing)
    return made(
      outcome=outcome, text=text, label=label, category=category(kind)
    )

  def _label(self, text: str) -> str:
    """The text where it is short already, else what the refiner makes of it."""
    if len(text.split()) > LABEL_WORDS:
      text = self._chat.ask(prompts.fill('refine', text=text)).text
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
    peak = float(self._index.stats['peak_base'][latent])
    image = self._small(exemplar.sample)
    lit_HW = masks.lit(exemplar.heat_HW, peak, self.opts.threshold)
    return masks.dim(image, masks.upsample(lit_HW, image.size, self.opts.mask))

  def _load(self, sample: int) -> Image.Image:
    return masks.shrink(self._store.image(sample), self.opts.pixels)


def short_name(model: str) -> str:
  """How files name an explainer: a packaged model by its size alone."""
  path = pathlib.Path(model)
  return path.name if path.parent == host.weights() else model


def read(answer: Answer) -> tuple[str, str]:
  """(outcome, text) of an answer to an explain prompt.

  Raises:
    ChatError: it was cut off before it came to its point.
  """
  if answer.cut and prompts.MARKER not in answer.text:
    raise ChatError('cut off before its marker: raise explain.max_tokens')
  return prompts.parse(answer.text)


def tidy(answer: str) -> str:
  """The first line of an answer, without quotes and full stop."""
  lines = [line.strip() for line in answer.splitlines() if line.strip()]
  return ' '.join(lines[0].strip('\'".` ').split()) if lines else ''


def category(answer: str) -> str:
  """The first of CATEGORIES that an answer names; '' if it names none."""
  for word in answer.lower().replace('color', 'colour').split():
    if word.strip('\'".,:;`*()') in CATEGORIES:
      return word.strip('\'".,:;`*()')
  return ''


def mark(exemplar: TextExemplar, threshold: float) -> str:
  """The text with << >> about what fires at `threshold` of the exemplar."""
  parts, open_ = [], False
  for token, act in zip(exemplar.tokens, exemplar.acts, strict=True):
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


def _in_order(
  function: Callable[[T], U], items: Iterable[T], threads: int
) -> Iterator[U]:
  """function(item) for each item, in order, on threads; stops at an error."""
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    ahead: collections.deque[concurrent.futures.Future[U]] = collections.deque()
    try:
      for item in items:
        ahead.append(pool.submit(function, item))
        if len(ahead) >= threads * AHEAD:
          yield ahead.popleft().result()
      while ahead:
        yield ahead.popleft().result()
    finally:
      for future in ahead:
        future.cancel()


def _drop(path: pathlib.Path, name: str, layer: int, outcome: str) -> None:
  lines = records.read_lines(path)
  kept = [
    line
    for line in lines
    if (line['explainer'], line['layer'], line['outcome'])
    != (name, layer, outcome)
  ]
  if len(kept) < len(lines):
    _write(path, kept)


def _sort(path: pathlib.Path) -> None:
  """Puts the lines in order: explainers as they came, layers, latents."""
  lines = records.read_lines(path)
  came = {
    name: i
    for i, name in enumerate(dict.fromkeys(line['explainer'] for line in lines))
  }
  ranked = sorted(
    lines,
    key=lambda line: (came[line['explainer']], line['layer'], line['latent']),
  )
  if ranked != lines:
    _write(path, ranked)


def _write(path: pathlib.Path, lines: Sequence[dict]) -> None:
  """Replaces the file as a whole."""
  part = path.with_name(path.name + '.part')
  part.unlink(missing_ok=True)
  with records.Appender(part) as file:
    for line in lines:
      file.add(line)
  part.replace(path)
