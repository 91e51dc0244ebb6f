"""A hub on loopback: the routes that fetching and uploading a folder use.

    with fake_hub.serve() as hub:
      hub.put('owner/name', {'sparsify/cfg.json': b'{}'})
      environment = hub.environment(tmp_path)  # for a process of its own

Every request is written down in `hub.asked`. A repository in `hub.gated` or
`hub.hidden` is answered as the hub answers for such a one; uploads need the
token `good`. The protocol is what huggingface_hub 2.4 speaks without Xet.
"""

import base64
import contextlib
import hashlib
import json
import os
import pathlib
import re
from urllib.parse import unquote, urlsplit

from tests import loopback

TOKEN = 'good'


class Hub:
  """What the server holds."""

  def __init__(self):
    self.repos: dict[str, dict[str, bytes]] = {}
    self.private: set[str] = set()
    self.gated: set[str] = set()
    self.asked: list[str] = []
    self.blobs: dict[str, bytes] = {}  # uploaded and not yet in a commit
    self.url = ''

  def put(self, repo: str, files: dict[str, bytes]) -> None:
    self.repos.setdefault(repo, {}).update(files)

  def put_folder(self, repo: str, folder: pathlib.Path) -> None:
    """A repository of the files below a folder."""
    self.put(
      repo,
      {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file()
      },
    )

  def environment(self, home: pathlib.Path, **more: str) -> dict[str, str]:
    """The environment of a process that knows only this hub."""
    return os.environ | {
      'HF_ENDPOINT': self.url,
      'HF_HOME': str(home),
      'HF_HUB_OFFLINE': '0',
      'HF_HUB_DISABLE_XET': '1',
      'HF_HUB_DISABLE_PROGRESS_BARS': '1',
      'HF_TOKEN': TOKEN,
      **more,
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


def _sha256(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()


class _Handler(loopback.Handler):
  hub: Hub

  def do_GET(self):
    self._answer()

  do_HEAD = do_POST = do_PUT = do_GET

  def _answer(self):
    size = int(self.headers.get('Content-Length') or 0)
    body = self.rfile.read(size)
    path = unquote(urlsplit(self.path).path)
    self.hub.asked.append(f'{self.command} {path}')
    for method, pattern, answer in _ROUTES:
      match = re.fullmatch(pattern, path)
      if match and self.command in method.split():
        return answer(self, body, **match.groupdict())
    return self._say(404, {'error': f'no route {path}'})

  def _say(self, status, value=None, headers=(), data=None):
    data = json.dumps(value).encode() if data is None else data
    self.send_response(status)
    for name, text in dict(headers).items():
      self.send_header(name, text)
    self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(data)

  def _refused(self, repo):
    """Answers for a repository that is not to be read; whether it did."""
    if repo in self.hub.gated:
      self._say(403, {}, {'X-Error-Code': 'GatedRepo'})
    elif repo not in self.hub.repos:
      self._say(404, {}, {'X-Error-Code': 'RepoNotFound'})
    else:
      return False
    return True

  def _unknown(self, repo, revision):
    if revision in ('main', self.hub.commit(repo)):
      return False
    self._say(404, {}, {'X-Error-Code': 'RevisionNotFound'})
    return True

  def info(self, _, repo, revision='main'):
    if self._refused(repo) or self._unknown(repo, revision):
      return
    names = [{'rfilename': name} for name in self.hub.repos[repo]]
    sha = self.hub.commit(repo)
    self._say(200, {'id': repo, 'modelId': repo, 'sha': sha, 'siblings': names})

  def tree(self, _, repo, revision, inside=''):
    if self._refused(repo) or self._unknown(repo, revision):
      return
    listed = []
    for name, data in self.hub.repos[repo].items():
      if name.startswith(inside):
        oid = hashlib.sha1(data).hexdigest()
        listed.append(
          {'type': 'file', 'oid': oid, 'size': len(data), 'path': name}
        )
    self._say(200, listed)

  def resolve(self, _, repo, revision, name):
    if self._refused(repo) or self._unknown(repo, revision):
      return
    data = self.hub.repos[repo].get(name)
    if data is None:
      self._say(404, {}, {'X-Error-Code': 'EntryNotFound'})
      return
    headers = {
      'ETag': f'"{_sha256(data)}"',
      'X-Repo-Commit': self.hub.commit(repo),
    }
    self._say(200, headers=headers, data=data)

  def _writes(self):
    if self.headers.get('Authorization') == f'Bearer {TOKEN}':
      return True
    self._say(403, {'error': 'this token may not write'})
    return False

  def create(self, body):
    if not self._writes():
      return
    asked = json.loads(body)
    owner = asked.get('organization') or 'owner'
    repo = f'{owner}/{asked["name"]}'
    if repo in self.hub.repos:
      self._say(409, {'url': f'{self.hub.url}/{repo}', 'error': 'is there'})
      return
    self.hub.put(repo, {})
    if asked.get('private') or asked.get('visibility') == 'private':
      self.hub.private.add(repo)
    self._say(200, {'url': f'{self.hub.url}/{repo}', 'name': repo})

  def preupload(self, body, repo):
    files = [
      {
        'path': file['path'],
        'uploadMode': (
          'lfs' if file['path'].endswith('.safetensors') else 'regular'
        ),
        'shouldIgnore': False,
      }
      for file in json.loads(body)['files']
    ]
    self._say(200, {'files': files})

  def batch(self, body, repo):
    objects = [
      {
        'oid': entry['oid'],
        'size': entry['size'],
        'actions': {'upload': {'href': f'{self.hub.url}/blob/{entry["oid"]}'}},
      }
      for entry in json.loads(body)['objects']
    ]
    answer = {'transfer': 'basic', 'objects': objects}
    self._say(200, answer, {'Content-Type': 'application/vnd.git-lfs+json'})

  def blob(self, body, oid):
    assert _sha256(body) == oid
    self.hub.blobs[oid] = body
    self._say(200, {})

  def committed(self, body, repo):
    if not self._writes():
      return
    files = {}
    for line in body.decode().splitlines():
      entry = json.loads(line)
      value = entry['value']
      if entry['key'] == 'file':
        files[value['path']] = base64.b64decode(value['content'])
      elif entry['key'] == 'lfsFile':
        files[value['path']] = self.hub.blobs[value['oid']]
    self.hub.put(repo, files)
    sha = self.hub.commit(repo)
    url = f'{self.hub.url}/{repo}/commit/{sha}'
    self._say(200, {'commitUrl': url, 'commitOid': sha})

  def card(self, body):
    self._say(200, {'errors': [], 'warnings': []})


_NAME = r'(?P<repo>[^/]+/[^/]+)'
_ROUTES = [
  ('GET', rf'/api/models/{_NAME}', _Handler.info),
  ('GET', rf'/api/models/{_NAME}/revision/(?P<revision>[^/]+)', _Handler.info),
  (
    'GET',
    rf'/api/models/{_NAME}/tree/(?P<revision>[^/]+)(/(?P<inside>.*))?',
    lambda self, body, inside, **more: self.tree(
      body, **more, inside=inside or ''
    ),
  ),
  (
    'GET HEAD',
    rf'/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<name>.+)',
    _Handler.resolve,
  ),
  ('POST', r'/api/repos/create', _Handler.create),
  ('POST', r'/api/validate-yaml', _Handler.card),
  ('POST', rf'/api/models/{_NAME}/preupload/main', _Handler.preupload),
  ('POST', rf'/{_NAME}(\.git)/info/lfs/objects/batch', _Handler.batch),
  ('PUT', r'/blob/(?P<oid>\w+)', _Handler.blob),
  ('POST', rf'/api/models/{_NAME}/commit/main', _Handler.committed),
]
