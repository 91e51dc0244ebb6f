import json
import subprocess
import sys

import pytest

from lmm_sae.core import wording
from lmm_sae.sae import exports, hub
from tests.sae import fake_hub, small

ASK = """
import json, sys
from lmm_sae.sae import hub
said = []
for call in json.loads(sys.argv[1]):
  try:
    said.append(str(getattr(hub, call[0])(*call[1:])))
  except ValueError as error:
    said.append(f'refused: {error}')
print(json.dumps(said))
"""


def ask(server, home, *calls, **environment) -> list[str]:
  """What functions of `hub` answer, in a process that knows this hub alone."""
  done = subprocess.run(
    [sys.executable, '-c', ASK, json.dumps(calls)],
    capture_output=True,
    text=True,
    check=True,
    env=server.environment(home, **environment),
  )
  return json.loads(done.stdout)


@pytest.fixture
def export(tmp_path):
  """An export with its card, and its SAE."""
  sae = small.random_sae()
  exports.write(sae, tmp_path / 'export')
  return tmp_path / 'export', sae


@pytest.fixture
def server():
  with fake_hub.serve() as server:
    yield server


def test_what_is_sent_comes_back_from_the_hub_and_then_from_its_cache(
  server, tmp_path, export
):
  folder, sae = export
  home = tmp_path / 'home'
  [url] = ask(server, home, ('send', str(folder), 'owner/name'))
  assert url == f'{server.url}/owner/name'
  assert server.private == {'owner/name'}
  sent = {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }
  assert server.repos['owner/name'] == sent
  whole, part, pinned = ask(
    server,
    home,
    ('fetch', 'owner/name'),
    ('fetch', 'owner/name:saelens'),
    ('fetch', f'owner/name:sparsify@{server.commit("owner/name")}'),
  )
  for at in (whole, part, pinned):
    back = exports.load(at)
    assert (back.w_enc_MD == sae.w_enc_MD).all()
  server.asked.clear()
  [again] = ask(server, home, ('fetch', 'owner/name'), HF_HUB_OFFLINE='1')
  assert again == whole
  assert not server.asked


def test_pickles_are_fetched_only_if_they_are_asked_for(server, tmp_path):
  files = {'ae.pt': b'pickle', 'config.json': b'{}', 'run.py': b'print()'}
  server.put('owner/name', files)
  without, pickled = ask(
    server,
    tmp_path,
    ('fetch', 'owner/name'),
    ('fetch', 'owner/name', True),
  )
  assert not [line for line in server.asked if line.endswith('run.py')]
  asked = [line for line in server.asked if line.endswith('/ae.pt')]
  assert [line.split()[0] for line in asked] == ['HEAD', 'GET']
  assert without == pickled


def test_what_cannot_be_fetched_is_one_line_of_why(server, tmp_path, export):
  server.put_folder('owner/name', export[0])
  server.put('owner/none', {'model.bin': b'0'})
  server.gated.add('owner/gated')
  calls = {
    'owner/missing': 'neither a path here nor a repository',
    'owner/name@v9': 'owner/name@v9 has no such revision',
    'owner/name:nowhere': 'no file of the kinds',
    'owner/none': 'no file of the kinds',
    'owner/gated': 'its owner has to grant access',
    'owner/name:../other': 'no folder of the repository',
    'owner': 'is no repository',
    'owner/name:a:b': 'is no repository',
  }
  said = ask(server, tmp_path, *(('fetch', source) for source in calls))
  for (source, why), answer in zip(calls.items(), said, strict=True):
    assert answer.startswith('refused: '), source
    assert why in answer
    assert '\n' not in answer


def test_an_absolute_subfolder_stays_within_the_repository(server, tmp_path):
  server.put('owner/name', {'etc/cfg.json': b'{}'})
  [folder] = ask(server, tmp_path, ('fetch', 'owner/name:/etc'))
  assert folder.startswith(str(tmp_path))


def test_without_a_network_the_message_says_so(server, tmp_path):
  for environment in (
    {'HF_HUB_OFFLINE': '1'},
    {'HF_ENDPOINT': 'http://127.0.0.1:9'},  # nobody listens there
  ):
    [said] = ask(server, tmp_path, ('fetch', 'owner/name'), **environment)
    assert 'refused: owner/name is no path here' in said
    assert 'the hub is not reached' in said
    assert '\n' not in said


def test_an_upload_that_is_refused_says_why(server, tmp_path, export):
  folder = str(export[0])
  said = ask(
    server,
    tmp_path,
    ('send', folder, 'owner/name'),
    ('send', folder, 'nobody'),
    ('send', folder, '../name/x'),
    HF_TOKEN='bad',
  )
  assert '403: set HF_TOKEN to a token that may write' in said[0]
  assert all('is no repository' in answer for answer in said[1:])
  (export[0] / 'README.md').unlink()
  [said] = ask(server, tmp_path, ('send', folder, 'owner/name'))
  assert 'no README.md' in said
  assert not server.repos


def test_an_existing_path_is_no_repository(tmp_path, monkeypatch):
  (tmp_path / 'runs' / 'mine').mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  assert not hub.is_repo('runs/mine')
  assert str(hub.place('runs/mine')) == 'runs/mine'
  assert hub.is_repo('runs/yours')
  for path in ('/runs/yours', './runs/yours', 'a/b/c', 'name', '../a/b', ''):
    assert not hub.is_repo(path)


def test_a_missing_client_names_its_extra():
  error = ModuleNotFoundError("No module named 'huggingface_hub'")
  error.name = 'huggingface_hub'
  assert 'lmm_sae[hub]' in wording.of(error)
