"""Child processes that never outlive their parent, and servers among them.

Children stand in process groups of their own, so that Ctrl-C reaches the parent
alone, and it ends them in order. On Linux the kernel kills them where the
parent is killed outright.
"""

import contextlib
import ctypes
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

GRACE_S = 10.0  # between SIGTERM and SIGKILL
POLL_S = 0.1
START_S = 900.0  # a large model takes minutes to load
TAIL = 15  # lines of a log that are shown

_SERVING = re.compile(r'^serving on (http://\S+)', re.MULTILINE)
_PR_SET_PDEATHSIG = 1
# Loopback is never reached through a proxy.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_LIBC = ctypes.CDLL(None) if sys.platform == 'linux' else None


def spawn(command: list[str], **options) -> subprocess.Popen:
  """Starts a child that is killed when this process ends, however it ends."""
  parent = os.getpid()

  def tie():
    if _LIBC is not None:
      _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
      if os.getppid() != parent:  # it died before the line above
        os._exit(1)

  return subprocess.Popen(command, process_group=0, preexec_fn=tie, **options)


def end(process: subprocess.Popen) -> None:
  """Ends a child and its group: SIGTERM, then SIGKILL."""
  for number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
    if process.poll() is not None:
      return
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, number)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(wait_s)


@contextlib.contextmanager
def child(command: list[str]) -> Iterator[subprocess.Popen]:
  """A child that is ended with the block."""
  process = spawn(command)
  try:
    yield process
  finally:
    end(process)


class Server:
  """A server process that prints `serving on URL` once it is up.

  Use as a context manager: starting does not wait, `wait` does.
  """

  def __init__(
    self,
    name: str,
    command: list[str],
    logs: pathlib.Path,
    model: str = '',
    **options,
  ):
    self.name, self.model = name, model
    self.log = logs / f'{name}.log'
    self._command, self._options = command, options
    self._process: subprocess.Popen | None = None
    self._url = ''

  def __enter__(self) -> 'Server':
    self.log.parent.mkdir(parents=True, exist_ok=True)
    options = {'env': os.environ} | self._options
    options['env'] = options['env'] | {'PYTHONUNBUFFERED': '1'}
    with self.log.open('wb') as file:
      self._process = spawn(
        self._command,
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=subprocess.STDOUT,
        **options,
      )
    return self

  def __exit__(self, *_) -> None:
    self.stop()

  def stop(self) -> None:
    if self._process is not None:
      end(self._process)

  def wait(self) -> str:
    """The server's URL, once it answers.

    Raises:
      ChildProcessError: it ended, or was not up in time.
    """
    until = time.monotonic() + START_S
    while time.monotonic() < until:
      if self._process is None or self._process.poll() is not None:
        raise ChildProcessError(f'the {self.name} server ended\n{self._tail()}')
      self._url = self._url or self._find()
      if self._url:
        return self._url
      time.sleep(POLL_S)
    raise ChildProcessError(
      f'the {self.name} server was not up in {START_S:g} s\n{self._tail()}'
    )

  def _find(self) -> str:
    found = _SERVING.search(self.log.read_text(errors='replace'))
    return found[1] if found else ''

  def _tail(self) -> str:
    lines = self.log.read_text(errors='replace').splitlines()[-TAIL:]
    return '\n'.join([f'{self.log} ends with:', *lines])


class HealthServer(Server):
  """A server that does not tell its URL: it is up when /health says so."""

  def __init__(self, *args, url: str, **options):
    super().__init__(*args, **options)
    self._health = url

  def _find(self) -> str:
    try:
      with _DIRECT.open(f'{self._health}/health', timeout=5.0):
        return self._health
    except (urllib.error.URLError, ConnectionError, TimeoutError):
      return ''


def explainer(
  folder: pathlib.Path, logs: pathlib.Path, device: str, threads: int
) -> HealthServer:
  """`transformers serve` of a model folder, an OpenAI-compatible server.

  On a CPU it has so many threads.

  A request must name the model as the server was told it, so it is started
  beside the folder and the name is the folder's own.
  """
  port = free_port()
  on_cpu = device == 'cpu'
  command = [
    *(sys.executable, '-m', 'transformers.cli.transformers', 'serve'),
    folder.name,
    *('--host', '127.0.0.1', '--port', str(port)),
    # fp16 weights are slow on a CPU, and exact in float32.
    *('--device', 'cpu' if on_cpu else 'auto'),
    *('--dtype', 'float32' if on_cpu else 'auto'),
  ]
  return HealthServer(
    f'explainer-{folder.name}',
    command,
    logs,
    url=f'http://127.0.0.1:{port}',
    model=folder.name,
    cwd=folder.parent,
    env=os.environ
    | {
      'HF_HUB_OFFLINE': '1',
      'TOKENIZERS_PARALLELISM': 'false',
      'OMP_NUM_THREADS': str(threads),
    },
  )


def free_port() -> int:
  """A port of the loopback address that nobody listens on now."""
  with socket.socket() as sock:
    sock.bind(('127.0.0.1', 0))
    return sock.getsockname()[1]
