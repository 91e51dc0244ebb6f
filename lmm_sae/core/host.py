"""What a run stands on: the commit, the versions, the model, the threads."""

import ctypes
import functools
import importlib.metadata
import ipaddress
import json
import os
import pathlib
import subprocess
from typing import Any

import lmm_sae

PACKAGES = (
  'lmm_sae',
  'numpy',
  'ml_dtypes',
  'tensorstore',
  'pillow',
  'ml_collections',
  'safetensors',
  'openai',
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'torch',
  'transformers',
  'tokenizers',
  'accelerate',
  'fastapi',
  'uvicorn',
  'ray',
  'datasets',
)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT = 2**27


def root() -> pathlib.Path:
  """The folder that holds the package: the repository, in a checkout."""
  return pathlib.Path(lmm_sae.__file__).resolve().parents[1]


def weights() -> pathlib.Path:
  """The folder of the packaged models."""
  return pathlib.Path(lmm_sae.__file__).resolve().parent / 'scenes' / 'weights'


def language_model(path: str) -> dict[str, Any]:
  """Settings of the language model of a subject; {} where it is not here.

  Args:
    path: lmm.path: a packaged size, or a LLaVA-NeXT folder.
  """
  packaged = weights() / path
  folder = packaged if '/' not in path and packaged.is_dir() else None
  file = (folder or pathlib.Path(path)) / 'config.json'
  if not file.is_file():
    return {}
  model = json.loads(file.read_text())
  return model.get('text_config', model)


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
  """The version of each package, '' where it is absent; none is imported."""
  found = {}
  for name in packages:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = ''
  return found


@functools.cache
def commit() -> str:
  """The git commit of the code, `+dirty` if changed; '' outside a checkout."""
  if not (root() / '.git').exists():
    return ''
  try:
    head = _git('rev-parse', 'HEAD')
    changed = _git('status', '--porcelain', '--untracked-files=no')
  except (FileNotFoundError, subprocess.CalledProcessError):
    return ''  # no git program, or a checkout that is someone else's
  return head + ('+dirty' if changed else '')


def cores() -> int:
  """How many cores this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def check_address(field: str, address: str, token: str) -> None:
  """Refuses to serve other machines without a token.

  Raises:
    ValueError: the address that `field` names is no loopback, and no token is
      set.
  """
  try:
    loopback = ipaddress.ip_address(address).is_loopback
  except ValueError:
    loopback = address == 'localhost'
  if not token and not loopback:
    raise ValueError(
      f'{field} {address!r} can be reached from other machines: set '
      'server.token too, or serve on 127.0.0.1'
    )


def first() -> bool:
  """Whether no other process of this run comes before this one.

  As JAX_PROCESS_ID, SLURM inside srun, or GKE on a TPU slice says; a process
  that none of them knows of is taken to be alone.
  """
  names = ('JAX_PROCESS_ID', 'SLURM_PROCID', 'TPU_WORKER_ID')
  found = [os.environ[name] for name in names if name in os.environ]
  return not found or found[0] == '0'


def _git(*words: str) -> str:
  command = ['git', '-C', str(root()), *words]
  return subprocess.run(
    command, capture_output=True, text=True, check=True
  ).stdout.strip()


def keep_freed_memory() -> bool:
  """Lets this process keep the memory of freed arrays for the next ones.

  Otherwise glibc gives it back and the kernel hands out pages of zeros anew,
  each step: 8 of the 52 ms that a training step takes in XLA on two Zen 5 cores
  (2048 rows, D=256, M=8192), 1 of the 17 ms of a sample's forward in torch.
  Arrays of KEPT bytes and more are still given back: holes of their size would
  cost more than their pages.

  Returns:
    Whether the C library knows how.
  """
  library = ctypes.CDLL(None)
  if not hasattr(library, 'mallopt'):
    return False
  kept = library.mallopt(M_MMAP_THRESHOLD, KEPT)
  return bool(kept and library.mallopt(M_TRIM_THRESHOLD, -1))
