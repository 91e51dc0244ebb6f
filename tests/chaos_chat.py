"""OpenAI-compatible servers that fail at random, and know what they sent.

What becomes of a request follows from the seed, the request's hash and how
often it was asked before, never from the order in which threads come. The
answer follows from the hash alone, which it names.
"""

import collections
import contextlib
import hashlib
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

from tests import loopback

# What is done, its share of the attempts, and what the client must call it;
# '' is a good answer, however it is sent.
FAULTS = {
  'good': (0.0, ''),
  '500': (0.05, '500'),
  '503': (0.04, '503'),
  '429': (0.04, '429'),
  'stall': (0.006, 'timeout'),  # not a byte
  'drip': (0.006, 'timeout'),  # a byte now and then, for ever
  'close': (0.03, 'connection'),
  'reset': (0.03, 'connection'),
  'torn': (0.04, 'connection'),  # half of a body
  'torn chunk': (0.03, 'connection'),
  'broken off': (0.04, 'cut'),  # half of a text, finish_reason length
  'nonsense': (0.03, 'nonsense'),  # JSON of another kind
  'page': (0.03, 'nonsense'),  # a proxy's, status 200, text/html
  'no choices': (0.03, 'empty'),
  'no text': (0.02, 'empty'),
  'surrogate': (0.01, 'nonsense'),  # a text that no file can hold
  'plain': (0.03, ''),  # a good answer as text/plain
  'twice': (0.04, ''),  # a good answer, sent twice
  'poison': (0.04, ''),  # a good answer, and a false one right after it
}
TOKENS = (11, 5)  # of a prompt, and of its answer


class Chaos:
  """Several servers with one mind.

  Attributes:
    sent: (url, hash, what was done) of every request, in order.
    calm: True: every answer is good.
  """

  def __init__(
    self, answer: Callable[[dict, str], str], seed: int, calm: bool = False
  ):
    self.answer, self.seed, self.calm = answer, seed, calm
    self.sent: list[tuple[str, str, str]] = []
    self.texts: dict[str, str] = {}
    self._asked: collections.Counter[str] = collections.Counter()
    self._lock = threading.Lock()
    self._stop = threading.Event()

  @contextlib.contextmanager
  def serve(self, urls: int) -> Iterator[str]:
    """The comma-separated URLs of so many servers, until the block ends."""
    with contextlib.ExitStack() as stack:
      yield ','.join(
        f'{stack.enter_context(loopback.serve(self._handler(i)))}/v1'
        for i in range(urls)
      )
      self._stop.set()

  def faults(self) -> dict[str, int]:
    """How many attempts failed, by what the client must call it."""
    kinds = (FAULTS[done][1] for _, _, done in self.sent)
    return dict(collections.Counter(kind for kind in kinds if kind))

  def _handler(self, number: int) -> type[loopback.Handler]:
    chaos = self

    class Handler(loopback.Handler):
      wbufsize = 0

      def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        assert self.path == '/v1/chat/completions'
        digest = hashlib.sha256(body).hexdigest()
        done = chaos.decide(digest)
        text = chaos.answer(json.loads(body), digest)
        with chaos._lock:
          chaos.sent.append((number, digest, done))
          chaos.texts[digest] = text
        with contextlib.suppress(ConnectionError, BrokenPipeError):
          chaos.do(self, done, text)

    return Handler

  def decide(self, digest: str) -> str:
    with self._lock:
      self._asked[digest] += 1
      asked = self._asked[digest]
    if self.calm:
      return 'good'
    draw = random.Random(f'{self.seed} {digest} {asked}').random()
    for name, (share, _) in FAULTS.items():
      draw -= share
      if draw < 0:
        return name
    return 'good'

  def do(self, handler: loopback.Handler, done: str, text: str) -> None:
    handler.close_connection = done not in ('good', 'plain', 'twice', 'poison')
    if done == 'stall':
      self._stop.wait()
    elif done == 'drip':
      handler.wfile.write(_response(b' ' * 1000)[:-900])
      while not self._stop.wait(0.05):
        handler.wfile.write(b' ')
    elif done == 'close':
      pass
    elif done == 'reset':
      linger = struct.pack('ii', 1, 0)
      handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
      handler.connection.close()
    elif done in ('500', '503', '429'):
      body = json.dumps({'error': {'message': done}}).encode()
      rest = {'Retry-After': '0.02'} if done == '429' else {}
      handler.wfile.write(_response(body, int(done), **rest))
    elif done == 'torn':
      response = _response(_completion(text))
      handler.wfile.write(response[: -len(response) // 4])
    elif done == 'torn chunk':
      head = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n'
      body = _completion(text)
      size = f'{len(body):x}\r\n'.encode()
      head += b'Transfer-Encoding: chunked\r\n\r\n'
      handler.wfile.write(head + size + body[: len(body) // 2])
    else:
      handler.wfile.write(self._whole(done, text))

  def _whole(self, done: str, text: str) -> bytes:
    """A whole response of status 200."""
    good = _completion(text)
    if done == 'plain':
      return _response(good, kind='text/plain')
    if done == 'twice':
      return _response(good) * 2
    if done == 'poison':
      return _response(good) + _response(_completion('CONCEPT: invented'))
    if done == 'page':
      return _response(b'<html>busy</html>', kind='text/html')
    if done == 'nonsense':
      return _response(b'{"object": "list", "data": [{"choices": 3}]}')
    if done == 'no choices':
      return _response(_completion(text, choices=[]))
    if done == 'no text':
      return _response(_completion('  '))
    if done == 'surrogate':
      return _response(_completion(text + '\ud800'))
    if done == 'broken off':
      return _response(_completion(text[: len(text) // 2], cut=True))
    return _response(good)


def _completion(text: str, cut: bool = False, **changes) -> bytes:
  choice = {
    'index': 0,
    'message': {'role': 'assistant', 'content': text},
    'finish_reason': 'length' if cut else 'stop',
  }
  usage = dict(zip(('prompt_tokens', 'completion_tokens'), TOKENS, strict=True))
  line = {'object': 'chat.completion', 'choices': [choice], 'usage': usage}
  return json.dumps(line | changes).encode()


def _response(
  body: bytes, status: int = 200, kind: str = 'application/json', **headers
) -> bytes:
  lines = [f'HTTP/1.1 {status} Said', f'Content-Type: {kind}']
  lines += [f'Content-Length: {len(body)}']
  lines += [f'{name}: {value}' for name, value in headers.items()]
  return '\r\n'.join([*lines, '', '']).encode() + body


def until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
  """Waits for what another thread does."""
  end = time.monotonic() + limit_s
  while not condition():
    assert time.monotonic() < end, 'it never came'
    time.sleep(0.005)
