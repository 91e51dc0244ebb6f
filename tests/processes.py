"""`lmm-sae` in processes of their own, also several that train as one."""

import os
import pathlib
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
DEADLINE_S = 120  # far more than any of these runs takes


class Done(NamedTuple):
  """How a process ended: its exit code, what it wrote to stderr."""

  code: int
  err: str


def start(
  words: Sequence[str],
  *,
  devices: int = 1,
  cache: pathlib.Path | None = None,
  rank: int | None = None,
  of: tuple[int, int] | None = None,
  die: str = '',
  module: str = 'lmm_sae',
) -> subprocess.Popen:
  """A process that runs `lmm-sae WORDS` on CPU devices.

  Args:
    words: of the command line.
    devices: that it has.
    cache: a folder of compiled programs, shared by many runs.
    rank: which process of the run it is; None: it is alone.
    of: (how many processes, the port at which process 0 listens).
    die: when it kills itself, see `tests.killed`.
    module: what runs instead, as `python -m MODULE WORDS`.
  """
  flags = re.sub(
    r'(device_count)=\d+', rf'\1={devices}', os.environ['XLA_FLAGS']
  )
  env = os.environ | {'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)}
  if cache is not None:
    env |= {
      'JAX_COMPILATION_CACHE_DIR': str(cache),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
  if rank is not None:
    count, port = of
    env |= {
      'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
      'JAX_NUM_PROCESSES': str(count),
      'JAX_PROCESS_ID': str(rank),
    }
  command = ['tests.killed', die] if die else [module]
  return subprocess.Popen(
    [sys.executable, '-m', *command, *words],
    cwd=ROOT,
    env=env,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(words: Sequence[str], **options) -> Done:
  """One process, to its end."""
  return _end([start(words, **options)])[0]


def together(
  count: int,
  words: Sequence[str],
  *,
  own: dict[int, Sequence[str]] | None = None,
  die: dict[int, str] | None = None,
  until: int | None = None,
  **options,
) -> list[Done]:
  """`count` processes that train as one, to the end of the last.

  Args:
    count: of processes.
    words: that all of them are given.
    own: further ones, by process.
    die: when a process kills itself, by process.
    until: the process whose end ends the run: the others are killed then;
      None: all of them.
    options: see `start`.
  """
  of = count, free_port()
  running = [
    start(
      [*words, *(own or {}).get(rank, ())],
      rank=rank,
      of=of,
      die=(die or {}).get(rank, ''),
      **options,
    )
    for rank in range(count)
  ]
  return _end(running, until)


def free_port() -> int:
  """A port of the loopback address at which nobody listens."""
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


def _end(
  running: list[subprocess.Popen], until: int | None = None
) -> list[Done]:
  said = [''] * len(running)
  try:
    for rank, process in enumerate(running):
      if until in (None, rank):
        said[rank] = process.communicate(timeout=DEADLINE_S)[1]
  finally:
    for process in running:
      process.kill()
      process.communicate()
  return [Done(p.returncode, err) for p, err in zip(running, said, strict=True)]
