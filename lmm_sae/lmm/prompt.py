"""Conversations as the text a model reads, every turn's place known.

Chat templates are programs, so where a turn's words stand is not guessed from
the result: the conversation is rendered once more with a marker for each turn,
and the pieces between the markers are the template.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

import jinja2
import numpy as np
import transformers

from lmm_sae.core.tokens import Kind

IMAGE = '<image>'  # how data and users write an image's place

Turns = Sequence[tuple[str, str]]  # (role, text)
_KINDS = {
  'user': Kind.QUESTION,
  'assistant': Kind.ANSWER,
  'system': Kind.TEMPLATE,
}
_MARK = re.compile('\u27e6(\\d+)\u27e7')
_PLACE = re.compile(rf'\s*{IMAGE}\s*')


class Prompt(str):
  """A text to be tokenised that knows which of its parts are turns.

  Attributes:
    spans: (start, stop, kind) of the turns' words, in characters, in order.
  """

  spans: tuple[tuple[int, int, Kind], ...]

  def __new__(cls, text: str, spans=()):
    self = super().__new__(cls, text)
    self.spans = tuple(spans)
    return self


@dataclasses.dataclass(frozen=True)
class Template:
  """How a model's conversations are written.

  Attributes:
    tokenizer: of transformers, which runs the template.
    source: the chat template; None where the model has none.
    image: the text of an image's token.
    wrapped: an image among words: that token, with what must stand around it.
  """

  tokenizer: transformers.PreTrainedTokenizerBase
  source: str | None
  image: str
  wrapped: str

  def render(self, messages: list[dict], generate: bool) -> str:
    """The text of messages; ValueError where the template refuses them."""
    try:
      return self.tokenizer.apply_chat_template(
        messages,
        chat_template=self.source,
        tokenize=False,
        add_generation_prompt=generate,
      )
    except (jinja2.TemplateError, TypeError) as error:
      raise ValueError(f'the chat template refuses this: {error}') from error

  @functools.cached_property
  def content(self) -> Callable[[str, int], str | list[dict]]:
    """Makes a turn's content of its words and images, as the template likes.

    Raises:
      ValueError: there is no template, or it renders no image.
    """
    if not self.source:
      raise ValueError(
        'the model has no chat template: add chat_template.jinja to its folder'
      )
    for style in (_parts, self._string):
      message = {'role': 'user', 'content': style('hello', 1)}
      try:
        text = self.render([message], False)
      except ValueError:
        continue
      if text.count(self.image) == 1 and 'hello' in text:
        return style
    raise ValueError('the chat template renders no image: mend the template')

  def _string(self, text: str, images: int) -> str:
    """As the templates of plain language models want it."""
    return f'{self.wrapped}\n' * images + text


def bare(template: Template, text: str) -> Prompt:
  """Text without chat template: all of it is a question, but for images."""
  text = text.replace(IMAGE, template.wrapped)
  return Prompt(text, [(0, len(text), Kind.QUESTION)])


def raw(template: Template, turns: Turns, images: int = 0) -> Prompt:
  """The turns alone, a line each, their images where they are named.

  Where no text names one, a line each stands before the first user's turn.

  Raises:
    ValueError: the roles or the number of images do not fit.
  """
  counts, named = _counts(turns, images)
  text, spans = '', []
  for (role, words), count in zip(turns, counts, strict=True):
    if not named:
      text += f'{template.wrapped}\n' * count
    words = words.strip().replace(IMAGE, template.wrapped)
    spans.append((len(text), len(text) + len(words), _KINDS[role]))
    text += f'{words}\n'
  return Prompt(text.removesuffix('\n'), spans)


def render(
  template: Template,
  turns: Turns,
  images: int = 0,
  generate: bool = False,
) -> Prompt:
  """A conversation with the model's chat template.

  Args:
    turns: (role, text). A turn's only `<image>` moves to its start, as in
      LLaVA's training; several stay where they are among its words. Where no
      text has one, the first user's turn begins with them all.
    images: how many images the conversation has.
    generate: whether the assistant is to speak next.

  Raises:
    ValueError: the roles, the number of images or the template do not fit.
  """
  counts, named = _counts(turns, images)
  roles, texts, first = [], [], []
  for (role, text), count in zip(turns, counts, strict=True):
    moves = count == 1 or not named
    first.append(count if moves else 0)
    text = _PLACE.sub(' ', text) if moves else text
    texts.append(text.strip().replace(IMAGE, template.wrapped))
    roles.append(role)
  marks = [f'\u27e6{at}\u27e7' for at in range(len(turns))]
  skeleton = _apply(template, roles, marks, first, generate)
  found = _MARK.split(skeleton)
  if found[1::2] != [str(at) for at in range(len(turns))]:
    raise ValueError('the chat template drops or repeats turns')
  before = [piece.count(template.image) for piece in found[0::2]]
  if before != [*first, 0]:
    raise ValueError('the chat template drops, repeats or moves images')

  text, spans = found[0], []
  for at, after in enumerate(found[2::2]):
    spans.append((len(text), len(text) + len(texts[at]), _KINDS[roles[at]]))
    text += texts[at] + after
  if text != _apply(template, roles, texts, first, generate):
    raise ValueError("the chat template changes the turns' words")
  return Prompt(text, spans)


def _counts(turns: Turns, images: int) -> tuple[list[int], bool]:
  """Images of each turn, and whether the turns name them."""
  roles = [role for role, _ in turns]
  if unknown := set(roles) - set(_KINDS):
    raise ValueError(f'role {unknown.pop()!r} is none of {", ".join(_KINDS)}')
  counts = [text.count(IMAGE) for _, text in turns]
  named = any(counts)
  if not named and images and 'user' in roles:
    counts[roles.index('user')] = images
  if sum(counts) != images:
    raise ValueError(
      f'the conversation has {sum(counts)} {IMAGE} for {images} images'
    )
  return counts, named


def _apply(template, roles, texts, counts, generate) -> str:
  content = template.content
  messages = [
    {'role': role, 'content': content(text, count)}
    for role, text, count in zip(roles, texts, counts, strict=True)
  ]
  return template.render(messages, generate)


def _parts(text: str, images: int) -> list[dict]:
  """A turn's content as llava-hf templates want it."""
  return [{'type': 'image'}] * images + [{'type': 'text', 'text': text}]


def kinds(
  prompt: str,
  offsets_T2: np.ndarray,
  token_T: np.ndarray,
  bos: int | None,
) -> np.ndarray:
  """The kind of every token of a text, image placeholders not told apart.

  A token that overlaps a turn's words is of that turn's kind; BOS is the first
  token if it is the tokenizer's; all else is template.

  Args:
    offsets_T2: (start, stop) of each token in the text, in characters.
  """
  kind_T = np.full(len(token_T), Kind.TEMPLATE, np.uint8)
  start_T, stop_T = offsets_T2[:, 0], offsets_T2[:, 1]
  for start, stop, kind in spans(prompt):
    kind_T[(start_T < stop) & (stop_T > start) & (stop_T > start_T)] = kind
  if len(token_T) and bos is not None and token_T[0] == bos:
    kind_T[0] = Kind.BOS
  return kind_T


def spans(prompt: str) -> tuple[tuple[int, int, Kind], ...]:
  """The turns of a prompt; a plain string is one question."""
  if isinstance(prompt, Prompt):
    return prompt.spans
  return ((0, len(prompt), Kind.QUESTION),)
