"""A connection to the subject server: waiting, retries, and its errors.

What may be asked of it stands in `core.remote`.
"""

import logging
import time
from typing import Any, Self

import httpx
import numpy as np

from lmm_sae.core import wire

logging.getLogger('httpx').setLevel(logging.WARNING)  # a line a request


class Connection:
  """Posts bodies of `core.wire` to one server; may be shared by threads.

  Args:
    url: of the server, `http://HOST:PORT`.
    token: bearer token, where the server has one.
    timeout_s: of one request, its wait in the server's queue included.
    connect_s: how long a server that does not answer is given to come up.

  Raises:
    ValueError: the URL is none.
  """

  def __init__(
    self,
    url: str,
    token: str = '',
    timeout_s: float = 600.0,
    connect_s: float = 10.0,
  ):
    self.url = url.rstrip('/')
    self.timeout_s = timeout_s
    self.connect_s = connect_s
    headers = {'Authorization': f'Bearer {token}'} if token else {}
    limits = httpx.Timeout(timeout_s, connect=min(connect_s, timeout_s))
    try:
      self._http = httpx.Client(
        base_url=self.url, headers=headers, timeout=limits, trust_env=False
      )
    except httpx.InvalidURL as error:
      raise ValueError(f'server.url {url!r} is not a URL: {error}') from error

  def close(self) -> None:
    self._http.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def health(self) -> bool:
    """Whether the server answers, asked once."""
    try:
      return self._http.get('/health', timeout=5.0).status_code == 200
    except httpx.TransportError:
      return False

  def _post(
    self, path: str, header: dict[str, Any], arrays: dict[str, np.ndarray]
  ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return wire.unpack(
      self._send('POST', path, wire.pack(header, arrays)).content
    )

  def _send(self, method: str, path: str, body: bytes | None = None):
    """The good answer to one request; waits out a start-up and a full queue."""
    start, pause_s = time.monotonic(), 0.05
    while True:
      spent_s = time.monotonic() - start
      try:
        answer = self._http.request(method, path, content=body)
      except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        if spent_s >= self.connect_s:
          raise ConnectionError(
            f'the subject server at {self.url} does not answer: start it with '
            '`lmm-sae serve` and the same --config and --workdir, and give '
            f'its URL as server.url ({error})'
          ) from error
      except httpx.UnsupportedProtocol as error:
        raise ValueError(f'server.url {self.url!r}: {error}') from error
      except httpx.TimeoutException as error:
        raise ConnectionError(
          f'the subject server at {self.url} gave no answer to {path} within '
          f'{self.timeout_s:g} s: raise server.timeout_s or send less at once'
        ) from error
      except httpx.TransportError as error:
        raise ConnectionError(
          f'the subject server at {self.url} went away during {path}: {error}'
        ) from error
      else:
        if answer.status_code != 503:
          return _checked(answer, path)
        if spent_s >= self.timeout_s:
          raise ConnectionError(
            f'the subject server at {self.url} stayed busy for '
            f'{self.timeout_s:g} s: raise server.queue or server.timeout_s'
          )
      time.sleep(pause_s)
      pause_s = min(1.6 * pause_s, 2.0)


def _checked(answer: httpx.Response, path: str) -> httpx.Response:
  """The answer if it is good, else its message as an exception."""
  if answer.status_code == 200:
    return answer
  try:
    message = answer.json()['error']
  except (ValueError, KeyError, TypeError):
    message = answer.text[:200]
  message = f'the subject server refused {path}: {message}'
  if 400 <= answer.status_code < 500:
    raise ValueError(message)
  raise RuntimeError(message.replace('refused', 'failed at'))
