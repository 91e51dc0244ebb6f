"""A hub of data sets on loopback, as far as listing and reading them go.

    with data_hub.serve() as hub:
      hub.repos['owner/name'] = {'data/train-00000-of-00001.parquet': data}
      hub.failing = 2  # that many reads of data are answered 503

Requests are written down in `hub.asked`; ranges that were sent, in `hub.sent`.
The protocol is what datasets 5.2 and huggingface_hub 2.4 speak without Xet.
"""

import contextlib
import hashlib
import json
import re
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests import loopback


class Hub:
  """What the server holds, and how it behaves."""

  def __init__(self):
    self.repos: dict[str, dict[str, bytes]] = {}
    self.gated: set[str] = set()
    self.private: set[str] = set()  # read with the token `good`
    self.failing = 0
    self.short = 0  # that many reads send fewer bytes than were asked for
    self.asked: list[str] = []
    self.sent: list[tuple[str, int]] = []  # (file, bytes)
    self.url = ''

  def environment(self, home) -> dict[str, str]:
    """What a process sets before it imports the hub's client."""
    return {
      'HF_ENDPOINT': self.url,
      'HF_HOME': str(home),
      'HF_HUB_OFFLINE': '0',
      'HF_TOKEN': 'good',
      'HF_HUB_DISABLE_XET': '1',
      'HF_HUB_DISABLE_PROGRESS_BARS': '1',
      'HF_DATASETS_DISABLE_PROGRESS_BARS': '1',
    }

  def commit(self, repo: str) -> str:
    """The commit that a repository is at: a name of its content."""
    files = sorted(self.repos[repo].items())
    return hashlib.sha1(repr(files).encode()).hexdigest()


@contextlib.contextmanager
def serve():
  """Serves a new hub until the block ends."""
  hub = Hub()

  class Handler(_Handler):
    pass

  Handler.hub = hub
  with loopback.serve(Handler) as hub.url:
    yield hub


class _Handler(loopback.Handler):
  hub: Hub

  def do_GET(self):
    body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
    path = unquote(urlsplit(self.path).path)
    self.hub.asked.append(f'{self.command} {path}')
    if path.startswith('/cdn/'):
      _, _, owner, repo, name = path.split('/', 4)
      repo = f'{owner}/{repo}'
      return self._resolve(self.hub.repos[repo], repo, name, cdn=True)
    match = re.fullmatch(
      r'(/api)?/datasets/(?P<repo>[^/]+/[^/]+)(/(?P<rest>.*))?', path
    )
    if not match:
      return self._say(404, b'{}')
    repo, rest = match['repo'], match['rest'] or 'revision/main'
    if repo in self.hub.gated:
      return self._say(403, b'{}', {'X-Error-Code': 'GatedRepo'})
    token = self.headers.get('Authorization') == 'Bearer good'
    hidden = repo in self.hub.private and not token
    if hidden or repo not in self.hub.repos:
      return self._say(404, b'{}', {'X-Error-Code': 'RepoNotFound'})
    what, _, rest = rest.partition('/')
    revision, _, name = rest.partition('/')
    if revision not in ('main', self.hub.commit(repo)):
      return self._say(404, b'{}', {'X-Error-Code': 'RevisionNotFound'})
    files = self.hub.repos[repo]
    if what == 'resolve':
      return self._resolve(files, repo, name)
    if what == 'tree':
      return self._say_json(list(_listed(files, name)))
    if what == 'paths-info':
      return self._say_json(list(_infos(files, parse_qs(body.decode()))))
    return self._say_json(
      {
        'id': repo,
        'sha': self.hub.commit(repo),
        'siblings': [{'rfilename': each} for each in files],
      }
    )

  do_HEAD = do_POST = do_GET

  def _say(self, status, data, headers=()):
    self.send_response(status)
    for name, text in dict(headers).items():
      self.send_header(name, text)
    self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(data)

  def _say_json(self, value):
    data = json.dumps(value).encode()
    self._say(200, data, {'Content-Type': 'application/json'})

  def _resolve(self, files, repo, name, cdn=False):
    data = files.get(name)
    if data is None:
      return self._say(404, b'', {'X-Error-Code': 'EntryNotFound'})
    headers = {
      'ETag': f'"{hashlib.sha256(data).hexdigest()}"',
      'X-Repo-Commit': self.hub.commit(repo),
      'Accept-Ranges': 'bytes',
    }
    asked = self.headers.get('Range')
    if not asked:
      return self._say(200, data, headers)
    if not cdn:  # where the hub keeps large files
      where = f'{self.hub.url}/cdn/{quote(repo)}/{quote(name)}'
      return self._say(302, b'', headers | {'Location': where})
    if self.hub.failing:
      self.hub.failing -= 1
      return self._say(503, b'')
    start, stop = re.fullmatch(r'bytes=(\d+)-(\d+)', asked).groups()
    part = data[int(start) : int(stop) + 1]
    if self.hub.short:
      self.hub.short -= 1
      part = part[:-3]
    self.hub.sent.append((name, len(part)))
    headers['Content-Range'] = f'bytes {start}-{stop}/{len(data)}'
    return self._say(206, part, headers)


def _listed(files, inside):
  """What lies directly in a folder."""
  start = f'{inside}/' if inside else ''
  folders = set()
  for name, data in files.items():
    if not name.startswith(start):
      continue
    first, _, more = name[len(start) :].partition('/')
    if more:
      folders.add(start + first)
    else:
      yield _info(name, data)
  for folder in sorted(folders):
    yield {'type': 'directory', 'oid': '0' * 40, 'size': 0, 'path': folder}


def _infos(files, asked):
  for path in asked.get('paths', []):
    if path in files:
      yield _info(path, files[path])
    elif any(name.startswith(f'{path}/') for name in files):
      yield {'type': 'directory', 'oid': '0' * 40, 'size': 0, 'path': path}


def _info(name, data):
  oid = hashlib.sha1(data).hexdigest()
  return {'type': 'file', 'oid': oid, 'size': len(data), 'path': name}
