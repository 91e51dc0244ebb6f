"""Conversations as the text a model reads, every turn's place known.

Chat templates are programs, so where a turn's words stand is not guessed from
the result: the conversation is rendered once more with a marker for each turn,
and the pieces between the markers are the template.
"""

import re
from collections.abc import Sequence

import jinja2
import numpy as np
import transformers

from lmm_sae.core.tokens import Kind

IMAGE = '<image>'  # how data and users write an image's place

Turns = Sequence[tuple[str, str]]  # (role, text); role: user or assistant
_KINDS = {'user': Kind.QUESTION, 'assistant': Kind.ANSWER}
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


def bare(text: str, image_token: str) -> Prompt:
  """Text without chat template: all of it is a question, but for images."""
  text = text.replace(IMAGE, image_token)
  return Prompt(text, [(0, len(text), Kind.QUESTION)])


def render(
  processor: transformers.ProcessorMixin,
  turns: Turns,
  images: int = 0,
  generate: bool = False,
) -> Prompt:
  """A conversation with the model's chat template.

  Args:
    turns: (role, text). `<image>` in a text moves to the start of its turn;
      where no text has one, the first user's turn gets them all.
    images: how many images the conversation has.
    generate: whether the assistant is to speak next.

  Raises:
    ValueError: the roles, the number of images or the template do not fit.
  """
  roles = [role for role, _ in turns]
  if unknown := set(roles) - set(_KINDS):
    raise ValueError(f'role {unknown.pop()!r} is neither user nor assistant')
  texts = [_PLACE.sub(' ', text).strip() for _, text in turns]
  counts = [text.count(IMAGE) for _, text in turns]
  if not any(counts) and images and 'user' in roles:
    counts[roles.index('user')] = images
  if sum(counts) != images:
    raise ValueError(
      f'the conversation has {sum(counts)} {IMAGE} for {images} images'
    )
  marks = [f'\u27e6{at}\u27e7' for at in range(len(turns))]
  skeleton = _apply(processor, roles, marks, counts, generate)
  found = _MARK.split(skeleton)
  if found[1::2] != [str(at) for at in range(len(turns))]:
    raise ValueError('the chat template drops or repeats turns')
  if skeleton.count(processor.image_token) != images:
    raise ValueError('the chat template drops or repeats images')

  text, spans = found[0], []
  for at, after in enumerate(found[2::2]):
    spans.append((len(text), len(text) + len(texts[at]), _KINDS[roles[at]]))
    text += texts[at] + after
  if text != _apply(processor, roles, texts, counts, generate):
    raise ValueError("the chat template changes the turns' words")
  return Prompt(text, spans)


def _apply(processor, roles, texts, counts, generate) -> str:
  style = _style(processor)
  messages = [
    {'role': role, 'content': style(processor, text, count)}
    for role, text, count in zip(roles, texts, counts, strict=True)
  ]
  return _template(processor, messages, generate)


def _template(processor, messages, generate) -> str:
  try:
    return processor.apply_chat_template(
      messages, tokenize=False, add_generation_prompt=generate
    )
  except (jinja2.TemplateError, TypeError) as error:
    raise ValueError(f'the chat template refuses this: {error}') from error


def _parts(processor, text: str, images: int):
  """A turn's content as llava-hf templates want it."""
  del processor
  return [{'type': 'image'}] * images + [{'type': 'text', 'text': text}]


def _string(processor, text: str, images: int):
  """A turn's content as the templates of plain language models want it."""
  return f'{processor.image_token}\n' * images + text


def _style(processor):
  """Which of the two the processor's template renders as a whole.

  Raises:
    ValueError: there is no template, or it renders neither.
  """
  if not (processor.chat_template or processor.tokenizer.chat_template):
    raise ValueError(
      'the model has no chat template: add chat_template.jinja to its folder'
    )
  for style in (_parts, _string):
    message = {'role': 'user', 'content': style(processor, 'hello', 1)}
    try:
      text = _template(processor, [message], False)
    except ValueError:
      continue
    if text.count(processor.image_token) == 1 and 'hello' in text:
      return style
  raise ValueError('the chat template renders no image: mend the template')


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
