"""HTTP servers of the tests, on loopback."""

import contextlib
import http.server
import threading
from collections.abc import Iterator


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers in silence; connections are kept, so bodies need their length."""

  protocol_version = 'HTTP/1.1'
  wbufsize = -1  # an answer in one piece, or it waits for the client's ACK

  def log_message(self, *_):
    pass


class _Server(http.server.ThreadingHTTPServer):
  request_queue_size = 256  # of connections that come at once


@contextlib.contextmanager
def serve(handler: type[Handler]) -> Iterator[str]:
  """The address of a server that runs until the block ends."""
  server = _Server(('127.0.0.1', 0), handler)
  thread = threading.Thread(
    target=server.serve_forever, args=(0.01,), daemon=True
  )
  thread.start()
  try:
    yield f'http://127.0.0.1:{server.server_port}'
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
