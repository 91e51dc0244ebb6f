"""A server of Google Cloud Storage on loopback, as far as TensorStore asks.

It holds one bucket, `acts`, in memory, and gives listings in pages of two.
"""

import contextlib
import itertools
import json
import os
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

from tests import loopback

BUCKET = 'acts'
PAGE = 2  # names


@contextlib.contextmanager
def serve():
  """Serves an empty bucket until the block ends, named by the environment."""

  class Handler(_Handler):
    objects: dict[str, tuple[int, bytes]] = {}
    generations = itertools.count(1)

  with loopback.serve(Handler) as url:
    named = {
      'TENSORSTORE_GCS_HTTP_URL': url,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'token',
    }
    with mock.patch.dict(os.environ, named):
      yield


class _Handler(loopback.Handler):
  objects: dict[str, tuple[int, bytes]]
  generations: itertools.count

  def do_GET(self):
    parts = urlsplit(self.path)
    query = {key: value[0] for key, value in parse_qs(parts.query).items()}
    _, _, rest = parts.path.partition('/storage/v1/b/')
    bucket, _, name = rest.partition('/o')
    name = unquote(name.removeprefix('/'))
    if bucket != BUCKET:
      return self._send(404, b'{"error": {"message": "no such bucket"}}')
    if self.command == 'POST':
      size = int(self.headers.get('Content-Length') or 0)
      name, data = query['name'], self.rfile.read(size)
      self.objects[name] = next(self.generations), data
      return self._send(200, json.dumps(self._facts(name)).encode())
    if not name:
      return self._list(query)
    if name not in self.objects:
      return self._send(404, b'')
    if self.command == 'DELETE':
      del self.objects[name]
      return self._send(204, b'')
    return self._read(name)

  do_POST = do_DELETE = do_GET

  def _list(self, query):
    start, stop = query.get('startOffset', ''), query.get('endOffset')
    start = max(start, query.get('pageToken', ''))
    names = sorted(
      name
      for name in self.objects
      if start <= name and (stop is None or name < stop)
    )
    page = {'items': [self._facts(name) for name in names[:PAGE]]}
    if names[PAGE:]:
      page['nextPageToken'] = names[PAGE]
    self._send(200, json.dumps(page).encode())

  def _read(self, name):
    generation, data = self.objects[name]
    headers, status = {'x-goog-generation': str(generation)}, 200
    wanted = self.headers.get('Range', '').removeprefix('bytes=')
    if wanted:
      first, _, last = wanted.partition('-')
      if not first:
        first, last = max(len(data) - int(last), 0), ''
      first, last = int(first), min(int(last or len(data)), len(data) - 1)
      if first > last:
        return self._send(416, b'')
      headers['Content-Range'] = f'bytes {first}-{last}/{len(data)}'
      data, status = data[first : last + 1], 206
    return self._send(status, data, headers)

  def _facts(self, name):
    generation, data = self.objects[name]
    return {
      'name': name,
      'size': str(len(data)),
      'generation': str(generation),
      'timeCreated': '2026-01-01T00:00:00Z',
      'updated': '2026-01-01T00:00:00Z',
    }

  def _send(self, status, body, headers=None):
    self.send_response(status)
    for key, value in (headers or {}).items():
      self.send_header(key, value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)
