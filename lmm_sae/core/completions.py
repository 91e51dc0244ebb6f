"""Reads what an OpenAI-compatible server sent, and believes none of it.

A body may be anything: half of one, a proxy's page, JSON of another shape. What
is no whole answer to a chat completion is a `ChatError` that says what it is.
"""

import dataclasses
import datetime
import email.utils
import json
import re
from collections.abc import Mapping
from typing import Any

MOST_TOKENS = 10**9  # of one answer: what is more is no count


class ChatError(RuntimeError):
  """No usable answer could be had to one request; others may fare better.

  Attributes:
    fault: kind of failure, as usage.json counts it: a status such as `500`,
      `timeout`, `connection`, `nonsense`, `empty`, `cut`, `too large`.
    tokens: (of the prompt, of the answer) that were paid all the same.
    rest_s: how long the server asks to be left alone.
    gone: nobody listens there.
    refused: it makes no sense to ask the same again.
  """

  def __init__(
    self,
    why: str,
    fault: str = 'nonsense',
    *,
    tokens: tuple[int, int] = (0, 0),
    rest_s: float = 0.0,
    gone: bool = False,
    refused: bool = False,
  ):
    super().__init__(why)
    self.fault, self.tokens, self.rest_s = fault, tokens, rest_s
    self.gone, self.refused = gone, refused


@dataclasses.dataclass(frozen=True)
class Answer:
  """What the model said; `cut`: it had more to say than max_tokens."""

  text: str
  cut: bool


def read(body: bytes, max_tokens: int) -> tuple[Answer, tuple[int, int]]:
  """Answer and token counts (of the prompt, of the answer) of a completion.

  Raises:
    ChatError: it is none, has no text, or was broken off before `max_tokens`.
  """
  try:
    completion = json.loads(body)
  except (ValueError, RecursionError) as error:
    raise ChatError(f'the server sent no JSON: {body[:80]!r}') from error
  tokens = _tokens(completion)
  choice = _first(_get(completion, 'choices'))
  message = _get(choice, 'message')
  if message is None:
    raise ChatError(
      f'the server sent no completion: {body[:80]!r}',
      'empty' if _get(completion, 'choices') == [] else 'nonsense',
      tokens=tokens,
    )
  text = _get(message, 'content')
  if not isinstance(text, str) or not text.strip():
    why = f'the completion has no text ({_get(choice, "finish_reason")!r})'
    raise ChatError(why, 'empty', tokens=tokens)
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ChatError('the text is no Unicode', tokens=tokens) from error
  cut = _get(choice, 'finish_reason') == 'length'
  if cut and tokens[1] < max_tokens:
    raise ChatError(
      f'the server broke off after {tokens[1]} tokens of {max_tokens}',
      'cut',
      tokens=tokens,
    )
  return Answer(text.strip(), cut), tokens


def rest_s(headers: Mapping[str, str]) -> float:
  """Seconds for which the header Retry-After asks to be left alone; 0: none.

  It gives seconds or a date; OpenAI's retry-after-ms is finer.
  """
  fine = headers.get('retry-after-ms', '').strip()
  if re.fullmatch(r'\d{1,12}(\.\d+)?', fine):
    return float(fine) / 1000
  text = headers.get('retry-after', '').strip()
  if re.fullmatch(r'\d{1,12}(\.\d+)?', text):
    return float(text)
  try:
    when = email.utils.parsedate_to_datetime(text)
  except ValueError:  # no date, either
    return 0.0
  if when.tzinfo is None:
    when = when.replace(tzinfo=datetime.UTC)
  now = datetime.datetime.now(datetime.UTC)
  return max(0.0, (when - now).total_seconds())


def _get(value: Any, name: str) -> Any:
  return value[name] if isinstance(value, dict) and name in value else None


def _first(value: Any) -> Any:
  return value[0] if isinstance(value, list) and value else None


def _tokens(completion: Any) -> tuple[int, int]:
  """What the server says that it counted; 0 where that is no count."""
  usage = _get(completion, 'usage')
  found = [_get(usage, name) for name in ('prompt_tokens', 'completion_tokens')]
  known = [n if type(n) is int and 0 <= n <= MOST_TOKENS else 0 for n in found]
  return known[0], known[1]
