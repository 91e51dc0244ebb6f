"""core/servers.py: children that come up, fail, and never stay behind."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from lmm_sae.core import servers

SLEEP = 'import time; time.sleep(600)'
SERVE = f'print("serving on http://127.0.0.1:1234"); {SLEEP}'
HEALTH = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    self.send_response(200 if self.path == '/health' else 404)
    self.end_headers()
http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()
"""


def python(code: str, *argv: str) -> list[str]:
  return [sys.executable, '-c', code, *argv]


def gone(pid: int) -> bool:
  """Whether a process has ended, within ten seconds; a zombie has."""
  for _ in range(200):
    try:
      state = pathlib.Path(f'/proc/{pid}/stat').read_text()
    except FileNotFoundError:
      return True
    if state.rpartition(')')[2].split()[0] == 'Z':
      return True
    time.sleep(0.05)
  return False


def test_a_server_is_up_when_it_says_its_address(tmp_path):
  with servers.Server('subject', python(SERVE), tmp_path / 'logs') as server:
    assert server.wait() == 'http://127.0.0.1:1234'
    pid = server._process.pid
  assert gone(pid)


def test_a_server_is_up_when_its_health_is_good(tmp_path):
  port = servers.free_port()
  url = f'http://127.0.0.1:{port}'
  command = python(HEALTH, str(port))
  with servers.HealthServer('x', command, tmp_path, url=url) as server:
    assert server.wait() == url


def test_a_server_that_ends_shows_the_end_of_its_log(tmp_path):
  code = 'import sys; sys.exit("no such model: llama")'
  with (
    servers.Server('subject', python(code), tmp_path) as server,
    pytest.raises(ChildProcessError, match='no such model: llama'),
  ):
    server.wait()


def test_a_server_that_hangs_is_given_up(tmp_path, monkeypatch):
  monkeypatch.setattr(servers, 'START_S', 0.3)
  with (
    servers.Server('subject', python(SLEEP), tmp_path) as server,
    pytest.raises(ChildProcessError, match=r'not up in 0\.3 s'),
  ):
    server.wait()


def test_a_child_that_ignores_sigterm_is_killed(monkeypatch):
  monkeypatch.setattr(servers, 'GRACE_S', 0.2)
  code = (
    'import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);'
    f'print("up", flush=True); {SLEEP}'
  )
  process = servers.spawn(python(code), stdout=subprocess.PIPE)
  process.stdout.readline()
  servers.end(process)
  process.stdout.close()
  assert process.returncode == -signal.SIGKILL


def test_a_failure_inside_the_block_ends_the_child():
  with (
    pytest.raises(ZeroDivisionError),
    servers.child(python(SLEEP)) as process,
  ):
    _ = 1 / 0
  assert process.returncode is not None


@pytest.mark.skipif(sys.platform != 'linux', reason='prctl is of Linux')
def test_a_child_dies_with_a_parent_that_was_killed(root):
  code = (
    'from lmm_sae.core import servers; import sys, time;'
    f'child = servers.spawn([sys.executable, "-c", "{SLEEP}"]);'
    f'print(child.pid, flush=True); {SLEEP.replace("import time; ", "")}'
  )
  parent = subprocess.Popen(
    python(code), stdout=subprocess.PIPE, text=True, cwd=root
  )
  child = int(parent.stdout.readline())
  os.kill(parent.pid, signal.SIGKILL)
  parent.wait()
  parent.stdout.close()
  assert gone(child)
