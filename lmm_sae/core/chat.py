"""The client of an OpenAI-compatible chat server that reads images.

  with ChatClient(url, model, cache=workdir.file('cache/chat')) as chat:
    answer = chat.ask('What do these have in common?', images)

Answers are greedy, so an answer is a function of the request: it is kept under
the hash of the request, and asked for once. Tokens are counted.
"""

import base64
import collections
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

import httpx
from absl import logging
from PIL import Image

from lmm_sae.core import completions, prompts, records, wire
from lmm_sae.core.completions import Answer, ChatError
from lmm_sae.core.turns import Turns
from lmm_sae.core.usage import Usage

std_logging.getLogger('httpx').setLevel(std_logging.WARNING)  # else: all

__all__ = ['FIELDS', 'Answer', 'ChatClient', 'ChatError']

LONGEST_REST_S = 900.0  # that a server may ask for before the run ends
CONNECT_S = 10.0  # at most, of an attempt, until the server takes it
LARGEST = 16 << 20  # bytes of an answer
REFUSALS = 8  # requests refused at the start, and none answered, end the run
LOCKS = 1024  # requests of one lock wait for one another: far more than threads
KNOWN_NOT = (
  401,
  403,
  404,
)  # this model, by this key: no request will fare well
AGAIN = (408, 409, 425, 429)  # of the 4xx, those worth a further attempt

# What a model is asked for, and the config's fields for its server and model.
FIELDS = {
  'explainer': ('explain.base_url', 'explain.model'),
  'refiner': ('explain.refine_url', 'explain.refine_model'),
  'category': ('explain.category_url', 'explain.category_model'),
  'judge': ('score.judge_url', 'score.judge_model'),
  'second': ('score.second_url', 'score.second_model'),
}


class ChatClient:
  """Asks one model; may be shared by threads.

  Args:
    base_url: of the server, with /v1; several, comma separated, share the work.
    model: as the server calls it.
    role: what it is asked for, one of FIELDS: whose fields a message names, and
      under which its use is counted.
    api_key: '': the environment's OPENAI_API_KEY, if any.
    cache: folder of answers, shared by models, roles and runs; None: no cache.
    usage: JSON file of counts, see `core.usage`; None: not kept.
    prices: of 10^6 tokens of prompts and of answers.
    max_tokens: of an answer.
    timeout_s: of one attempt, from its first byte to its last.
    retries: attempts after the first one, of which a server that does not
      listen costs none while another does; backoff_s: the pause before a server
      is asked the same again, doubled each time, and longer where the server
      says so (Retry-After).

  Raises:
    ValueError: base_url is empty, or no URL.
  """

  def __init__(
    self,
    base_url: str,
    model: str,
    *,
    role: str = 'explainer',
    api_key: str = '',
    cache: pathlib.Path | None = None,
    usage: pathlib.Path | None = None,
    prices: tuple[float, float] = (0.0, 0.0),
    max_tokens: int = 64,
    timeout_s: float = 120.0,
    retries: int = 4,
    backoff_s: float = 0.5,
  ):
    self._url_field, self._model_field = FIELDS[role]
    urls = [url.strip() for url in base_url.split(',') if url.strip()]
    for url in urls:
      if not _is_url(url):
        raise ValueError(f'{self._url_field} {url!r} is not an http(s) URL')
    if not urls:
      raise ValueError(f'{self._url_field}: no URL of a chat server is given')
    self.model = model
    self._urls = urls
    self._turns = Turns(len(urls), backoff_s)
    key = (api_key or os.environ.get('OPENAI_API_KEY', '')).strip()
    self._clients = {
      remote: httpx.Client(
        timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S)),
        # An answer that a server sends twice would be read as the answer to
        # the next request of that connection: there is none.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        headers={'Content-Type': 'application/json', 'Connection': 'close'}
        | ({'Authorization': f'Bearer {key}'} if key else {}),
        trust_env=remote,
      )
      for remote in {_is_remote(url) for url in urls}
    }
    self._cache = cache
    self._max_tokens = max_tokens
    self._timeout_s = timeout_s
    self._retries = retries
    self._usage = Usage(usage, role, model, prices)
    self._answered = False
    self._refusals = 0
    self._locks = [threading.Lock() for _ in range(LOCKS)]
    self._stop = threading.Event()
    self._fatal: ConnectionError | ValueError | None = None

  def __enter__(self) -> 'ChatClient':
    return self

  def __exit__(self, *_) -> None:
    self._usage.close()
    for client in self._clients.values():
      client.close()

  def stop(self, why: ConnectionError | ValueError) -> None:
    """Nothing is asked any more, nor waited for: `ask` raises `why`."""
    self._fatal = self._fatal or why
    self._stop.set()

  def ask(self, text: str, images: Sequence[Image.Image] = ()) -> Answer:
    """The answer to one user message of images, in order, and text.

    Raises:
      ChatError: every attempt failed, or the server refuses this request.
      ConnectionError: nobody listens at the URL, or the client was stopped.
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
        self._usage.cached()
        return found
      try:
        answer, tokens = self._attempts(body, turn)
      except ChatError:
        self._usage.add(failed=1)
        raise
      except (ConnectionError, ValueError) as error:
        self.stop(error)
        raise
      # Counted first: who is killed in between pays for the answer again.
      self._usage.add(requests=1, **_counts(tokens))
      self._keep(key, answer)
      return answer

  def _attempts(self, body: bytes, turn: int) -> tuple[Answer, tuple[int, int]]:
    """The first good answer; servers take turns, also after a failure."""
    tries: collections.Counter[int] = collections.Counter()
    gone: set[int] = set()
    left = self._retries + 1
    while True:
      place, pause_s = self._turns.choose(turn, tries)
      self._pause(place, pause_s)
      tries[place] += 1
      gone.discard(place)
      try:
        found = self._post(place, body)
        self._answered = True
        return found
      except ChatError as error:
        self._usage.add(fault=error.fault, **_counts(error.tokens))
        logging.debug('chat: %s: %s', self._urls[place], error)
        if error.refused:
          self._refuse(place, error)
          raise
        hangs = error.gone or error.fault == 'timeout'
        self._turns.failed(place, error.rest_s, hangs)
        if error.gone:
          gone.add(place)
        elsewhere = len(tries) < len(self._urls)  # costs no attempt
        left -= not (error.gone and elsewhere)
        if left > 0:
          continue
        if len(gone) == len(self._urls):
          raise ConnectionError(
            f'nobody answers at {", ".join(self._urls)}: start the server, or '
            f'give its URL as {self._url_field} ({error}); answers had so far '
            'are kept'
          ) from error
        count = tries.total()
        raise ChatError(
          f'{count} attempts failed, at last: {error}', error.fault
        ) from error

  def _pause(self, place: int, pause_s: float) -> None:
    """Waits so long, and until the server wants no rest any more."""
    while True:
      if pause_s > LONGEST_REST_S:
        raise ConnectionError(
          f'{self._urls[place]} asks to be left alone for {pause_s:.0f} s: run '
          'this again then; answers had so far are kept'
        )
      if self._stop.wait(pause_s):
        raise type(self._fatal)(str(self._fatal)) from self._fatal
      pause_s = self._turns.rest_s(place)
      if not pause_s:
        return

  def _post(self, place: int, body: bytes) -> tuple[Answer, tuple[int, int]]:
    """One attempt: (answer, tokens of the prompt and of the answer).

    Raises:
      ChatError: it failed; ValueError: so will every other.
    """
    url = self._urls[place]
    until = time.monotonic() + self._timeout_s
    data = bytearray()
    try:
      with self._clients[_is_remote(url)].stream(
        'POST', f'{url.rstrip("/")}/chat/completions', content=body
      ) as response:
        for chunk in response.iter_bytes():
          data += chunk
          if time.monotonic() > until:  # httpx counts from the last byte had
            raise ChatError(f'no end after {self._timeout_s:g} s', 'timeout')
          if len(data) > LARGEST:
            raise ChatError(f'more than {LARGEST} bytes', 'too large')
    except httpx.HTTPError as error:
      late = isinstance(error, httpx.TimeoutException)
      raise ChatError(
        f'{type(error).__name__}: {error}',
        'timeout' if late else 'connection',
        gone=_nobody_listens(error),
      ) from error
    if response.is_success:
      return completions.read(bytes(data), self._max_tokens)
    said = data[:300].decode(errors='replace')
    why = f'status {response.status_code}: {said}'
    if response.status_code in KNOWN_NOT:
      raise ValueError(self._refused(place, why))
    refused = response.is_client_error and response.status_code not in AGAIN
    raise ChatError(
      f'the server refuses: {why}' if refused else why,
      str(response.status_code),
      rest_s=completions.rest_s(response.headers),
      refused=refused,
    )

  def _refuse(self, place: int, error: ChatError) -> None:
    """Ends the run where every request is refused from its start."""
    self._refusals += 1
    if not self._answered and self._refusals >= REFUSALS:
      raise ValueError(self._refused(place, str(error))) from error

  def _refused(self, place: int, why: str) -> str:
    return (
      f'{self._urls[place]} refuses model {self.model!r}: check '
      f'{self._model_field}, {self._url_field}, explain.api_key and how many '
      f'images the model takes ({why})'
    )

  def _cached(self, key: str) -> Answer | None:
    if self._cache is None or not self._path(key).exists():
      return None
    try:
      return Answer(**json.loads(self._path(key).read_text()))
    except (TypeError, ValueError) as error:
      logging.warning('chat: %s is asked anew: %s', self._path(key), error)
      return None

  def _keep(self, key: str, answer: Answer) -> None:
    if self._cache is not None:
      records.write_json(self._path(key), dataclasses.asdict(answer))

  def _path(self, key: str) -> pathlib.Path:
    return self._cache / key[:2] / f'{key}.json'


def _counts(tokens: tuple[int, int]) -> dict[str, int]:
  names = ('prompt_tokens', 'completion_tokens')
  return {name: n for name, n in zip(names, tokens, strict=True) if n}


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


def _nobody_listens(error: BaseException | None) -> bool:
  """As against a server that broke off."""
  while error is not None:
    if isinstance(
      error, ConnectionRefusedError | socket.gaierror | httpx.ConnectTimeout
    ):
      return True
    error = error.__cause__ or error.__context__
  return False


def _is_url(url: str) -> bool:
  try:
    return bool(httpx.URL(url).host) and url.startswith(('http://', 'https://'))
  except httpx.InvalidURL:
    return False


def _is_remote(url: str) -> bool:
  """Loopback is never reached through a proxy."""
  host = url.split('://', 1)[1].split('/', 1)[0].rsplit(':', 1)[0]
  return host not in ('127.0.0.1', 'localhost', '[::1]')
