"""An OpenAI-compatible chat server for tests: in process, faulty on demand."""

import base64
import http.server
import io
import json
import socket
import threading
from collections.abc import Callable

from PIL import Image

STALL_S = 2.0


def text_of(request: dict) -> str:
  """What the one user message asks, after its pictures."""
  (message,) = request['messages']
  return message['content'][-1]['text']


class FakeChat:
  """Answers with `answer(request)`; `faults` are made first, one a request.

  Faults: an HTTP status as text; `drop` (the connection ends), `stall` (no
  answer until the server stops), `torn` (half a body), `nonsense` (200, but no
  JSON), `empty` (no choices), `cut` (all of max_tokens, and had more to say).
  """

  def __init__(self, answer: Callable[[dict], str]):
    self.answer = answer
    self.faults: list[str] = []
    self.requests: list[dict] = []
    self._lock = threading.Lock()
    self._stop = threading.Event()
    fake = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = 'HTTP/1.1'

      def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        fake.serve(self, json.loads(body))

      def log_message(self, *_):
        pass

    self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    self._server.daemon_threads = True
    self.url = f'http://127.0.0.1:{self._server.server_port}/v1'

  def __enter__(self) -> 'FakeChat':
    threading.Thread(
      target=self._server.serve_forever, args=(0.01,), daemon=True
    ).start()
    return self

  def __exit__(self, *_) -> None:
    self.stop()

  def stop(self) -> None:
    """Ends the server, and the connections that it has."""
    self._stop.set()
    self._server.shutdown()
    self._server.server_close()

  @staticmethod
  def images(request: dict) -> list[Image.Image]:
    urls = [
      part['image_url']['url']
      for part in request['messages'][0]['content']
      if part['type'] == 'image_url'
    ]
    return [
      Image.open(io.BytesIO(base64.b64decode(url.split(',', 1)[1])))
      for url in urls
    ]

  def serve(self, handler, request: dict) -> None:
    with self._lock:
      self.requests.append(request)
      fault = self.faults.pop(0) if self.faults else ''
    if fault == 'stall':
      self._stop.wait(STALL_S)
    if fault in ('drop', 'stall') or self._stop.is_set():
      handler.connection.shutdown(socket.SHUT_RDWR)
      handler.close_connection = True
      return
    status = int(fault) if fault.isdigit() else 200
    body = json.dumps(self._completion(request, fault)).encode()
    if fault == 'nonsense':
      body = b'<html>proxy error</html>'
    if status != 200:
      body = json.dumps({'error': {'message': 'as asked'}}).encode()
    handler.send_response(status)
    kind = 'text/html' if fault == 'nonsense' else 'application/json'
    handler.send_header('Content-Type', kind)
    handler.send_header('Content-Length', str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2] if fault == 'torn' else body)
    handler.close_connection = fault == 'torn'

  def _completion(self, request: dict, fault: str) -> dict:
    choice = {
      'index': 0,
      'message': {'role': 'assistant', 'content': self.answer(request)},
      'finish_reason': 'length' if fault == 'cut' else 'stop',
    }
    return {
      'id': 'x',
      'object': 'chat.completion',
      'created': 0,
      'model': request['model'],
      'choices': [] if fault == 'empty' else [choice],
      'usage': {
        'prompt_tokens': 7,
        'completion_tokens': request['max_tokens'] if fault == 'cut' else 3,
      },
    }
