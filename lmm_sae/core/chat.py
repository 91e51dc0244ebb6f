"""The client of an OpenAI-compatible chat server that reads images.

  with ChatClient(url, model, cache=workdir.file('cache/chat')) as chat:
    answer = chat.ask('What do these have in common?', images)

Answers are greedy, so an answer is a function of the request: it is kept under
the hash of the request, and asked for once. Tokens are counted.
"""

import base64
import dataclasses
import hashlib
import json
import logging as std_logging
import os
import pathlib
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import openai
from absl import logging
from PIL import Image

from lmm_sae.core import prompts, records, wire

LONGEST_PAUSE_S = 30.0
REFUSALS = 8  # requests refused at the start, and none answered, end the run
LOCKS = 1024  # requests of one lock wait for one another: far more than threads
SAVE_EVERY_S = 2.0  # between two writes of the token counts


for _name in ('httpx', 'httpx2', 'openai'):  # a line a request is too much
  std_logging.getLogger(_name).setLevel(std_logging.WARNING)


class ChatError(RuntimeError):
  """No usable answer could be had to one request; others may fare better."""


@dataclasses.dataclass(frozen=True)
class Answer:
  """What the model said; `cut`: it had more to say than max_tokens."""

  text: str
  cut: bool


class ChatClient:
  """Asks one model; may be shared by threads.

  Args:
    base_url: of the server, with /v1; several, comma separated, share the work.
    model: as the server calls it.
    api_key: '': the environment's OPENAI_API_KEY, if any.
    cache: folder of answers, shared by models and runs; None: no cache.
    usage: JSON file that counts {model: {requests, cached, failed,
      prompt_tokens, completion_tokens}} over all runs; None: not kept.
    max_tokens: of an answer.
    timeout_s: of one attempt.
    retries: attempts after the first one; backoff_s: the pause before the first
      of them, doubled before each further one.

  Raises:
    ValueError: base_url is empty, or no URL.
  """

  def __init__(
    self,
    base_url: str,
    model: str,
    *,
    api_key: str = '',
    cache: pathlib.Path | None = None,
    usage: pathlib.Path | None = None,
    max_tokens: int = 64,
    timeout_s: float = 120.0,
    retries: int = 4,
    backoff_s: float = 0.5,
  ):
    urls = [url.strip() for url in base_url.split(',') if url.strip()]
    for url in urls:
      if not url.startswith(('http://', 'https://')):
        raise ValueError(f'explain.base_url {url!r} is not an http(s) URL')
    if not urls:
      raise ValueError('no URL of a chat server is given')
    self.model = model
    self._urls = urls
    self._clients = [
      openai.OpenAI(
        base_url=url,
        # a server of one's own asks for no key, but the client wants one
        api_key=api_key or os.environ.get('OPENAI_API_KEY') or 'none',
        timeout=timeout_s,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=_is_remote(url)),
      )
      for url in urls
    ]
    self._cache = cache
    self._max_tokens = max_tokens
    self._retries = retries
    self._backoff_s = backoff_s
    self._counts = _Counts(usage, model)
    self._answered = False
    self._refusals = 0
    self._locks = [threading.Lock() for _ in range(LOCKS)]

  def __enter__(self) -> 'ChatClient':
    return self

  def __exit__(self, *_) -> None:
    self._counts.save()
    for client in self._clients:
      client.close()

  def ask(self, text: str, images: Sequence[Image.Image] = ()) -> Answer:
    """The answer to one user message of images, in order, and text.

    Raises:
      ChatError: every attempt failed, or the server refuses this request.
      ConnectionError: nobody listens at the URL.
      ValueError: the server knows no such model, or wants another key.
    """
    request = {
      'model': self.model,
      'messages': [{'role': 'user', 'content': _content(text, images)}],
      'temperature': 0,
      'max_tokens': self._max_tokens,
    }
    body = json.dumps(request, sort_keys=True).encode()
    key = hashlib.sha256(body).hexdigest()
    turn = int(key[:8], 16)
    with self._locks[turn % len(self._locks)]:  # the same is asked for once
      found = self._cached(key)
      if found is not None:
        self._counts.add(cached=1)
        return found
      try:
        answer, tokens = self._attempts(request, turn)
      except ChatError:
        self._counts.add(failed=1)
        raise
      self._counts.add(requests=1, **tokens)
      self._keep(key, answer)
      return answer

  def _attempts(
    self, request: dict[str, Any], turn: int
  ) -> tuple[Answer, dict[str, int]]:
    """The first good answer; servers take turns, also after a failure."""
    why, gone = '', set()
    for attempt in range(self._retries + 1):
      if attempt:
        pause_s = self._backoff_s * 2 ** (attempt - 1)
        time.sleep(min(pause_s, LONGEST_PAUSE_S))
      place = (turn + attempt) % len(self._clients)
      gone.discard(place)
      try:
        found = _read(self._clients[place].chat.completions.create(**request))
        self._answered = True
        return found
      except (
        openai.AuthenticationError,
        openai.NotFoundError,
        openai.PermissionDeniedError,
      ) as error:
        raise ValueError(self._refused(place, error)) from error
      except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
        self._refusals += 1
        if not self._answered and self._refusals >= REFUSALS:
          raise ValueError(self._refused(place, error)) from error
        raise ChatError(f'the server refuses: {_brief(error)}') from error
      except openai.APITimeoutError as error:
        why = _brief(error)
      except openai.APIConnectionError as error:
        why = _brief(error)
        if _nobody_listens(error):
          gone.add(place)
      except (openai.OpenAIError, json.JSONDecodeError, ChatError) as error:
        why = _brief(error)
      logging.debug('chat: attempt %d failed: %s', attempt + 1, why)
    if len(gone) == len(self._clients):
      raise ConnectionError(
        f'no explainer answers at {", ".join(self._urls)}: start it, or give '
        f'its URL as explain.base_url ({why}); answers had so far are kept'
      )
    raise ChatError(f'{self._retries + 1} attempts failed, at last: {why}')

  def _refused(self, place: int, error: openai.APIStatusError) -> str:
    return (
      f'{self._urls[place]} refuses model {self.model!r}: check explain.model, '
      f'explain.api_key and explain.exemplars ({_brief(error)})'
    )

  def _cached(self, key: str) -> Answer | None:
    if self._cache is None:
      return None
    path = self._path(key)
    return Answer(**json.loads(path.read_text())) if path.exists() else None

  def _keep(self, key: str, answer: Answer) -> None:
    if self._cache is not None:
      records.write_json(self._path(key), dataclasses.asdict(answer))

  def _path(self, key: str) -> pathlib.Path:
    return self._cache / key[:2] / f'{key}.json'


class _Counts:
  """Counts of one model in the usage file, saved now and then."""

  def __init__(self, path: pathlib.Path | None, model: str):
    self._path, self._model = path, model
    self._lock = threading.Lock()
    self._saved_at = 0.0
    self._all = {}
    if path is not None and path.exists():
      self._all = json.loads(path.read_text())
    self._mine = self._all.setdefault(model, {})

  def add(self, **counts: int) -> None:
    with self._lock:
      for name, count in counts.items():
        self._mine[name] = self._mine.get(name, 0) + count
      if time.monotonic() - self._saved_at > SAVE_EVERY_S:
        self._save()

  def save(self) -> None:
    with self._lock:
      self._save()

  def _save(self) -> None:
    self._saved_at = time.monotonic()
    if self._path is not None and self._mine:
      records.write_json(self._path, self._all)


def _content(text: str, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
  """Pictures, numbered where there are several, then the text."""
  parts: list[dict[str, Any]] = []
  for number, image in enumerate(images, 1):
    if len(images) > 1:
      name = prompts.fill('picture', n=number)
      parts.append({'type': 'text', 'text': name})
    url = _data_url(image)
    parts.append({'type': 'image_url', 'image_url': {'url': url}})
  return [*parts, {'type': 'text', 'text': text}]


def _data_url(image: Image.Image) -> str:
  png = wire.png(image).tobytes()
  return 'data:image/png;base64,' + base64.b64encode(png).decode()


def _read(completion: Any) -> tuple[Answer, dict[str, int]]:
  """Answer and token counts of a completion, if it is one.

  Raises:
    ChatError: a server may send 200 and nonsense.
  """
  choices = completion.choices if hasattr(completion, 'choices') else None
  if not choices or choices[0].message is None:
    raise ChatError('the server sent no completion')
  content = choices[0].message.content
  if not isinstance(content, str):
    raise ChatError('the completion has no text')
  usage, tokens = completion.usage, {}
  if usage is not None:
    tokens = {
      'prompt_tokens': int(usage.prompt_tokens or 0),
      'completion_tokens': int(usage.completion_tokens or 0),
    }
  return Answer(content.strip(), choices[0].finish_reason == 'length'), tokens


def _nobody_listens(error: BaseException | None) -> bool:
  """As against a server that broke off."""
  while error is not None:
    if isinstance(error, ConnectionRefusedError | socket.gaierror):
      return True
    error = error.__cause__ or error.__context__
  return False


def _is_remote(url: str) -> bool:
  """Loopback is never reached through a proxy."""
  host = url.split('://', 1)[1].split('/', 1)[0].rsplit(':', 1)[0]
  return host not in ('127.0.0.1', 'localhost', '[::1]')


def _brief(error: Exception) -> str:
  said = f'{type(error).__name__}: {error}'
  if isinstance(error, openai.APIStatusError):
    said += f' {error.response.text}'
  return said[:300]
