"""Files that are written in pieces and replaced in one step, by any process."""

import contextlib
import fcntl
import os
from collections.abc import Iterable

ATTEMPTS = 100  # to make a file in a folder that others remove
LOCK = '.__lock'  # what TensorStore adds to the name of a file it writes


def replace(path: str, pieces: Iterable[bytes]) -> int:
  """Writes beside the file, under a lock, then puts that in its place.

  The name beside it is always the same, so that what a killed process left is
  taken up by the next; TensorStore's listings leave it out.
  """
  part = path + LOCK
  while True:
    descriptor = _opened(part)
    with open(descriptor, 'r+b', buffering=0) as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      if not _same(file, part):  # another process has put it in place
        continue
      try:
        size = _fill(file, pieces)
        os.replace(part, path)
      except BaseException:
        os.unlink(part)  # of a full disk it would take what is left
        raise
      with contextlib.suppress(FileNotFoundError):  # it was removed already
        _sync_folder(os.path.dirname(path))
      return size


def _opened(path: str) -> int:
  """Opens a file for writing, and makes the folders that are not there."""
  for attempt in range(ATTEMPTS):
    try:
      _make_folder(os.path.dirname(path))
      return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # another process removed the folder meanwhile
      if attempt == ATTEMPTS - 1:
        raise
  raise AssertionError('the last attempt returns or raises')


def _make_folder(path: str) -> None:
  """Makes a folder and those above it, each as known to the disk as a file."""
  if os.path.isdir(path):
    return
  above = os.path.dirname(path)
  _make_folder(above)
  with contextlib.suppress(FileExistsError):  # another process was first
    os.mkdir(path)
  _sync_folder(above)


def _same(file, path: str) -> bool:
  """Whether the open file is the one of that name."""
  try:
    there = os.stat(path)
  except FileNotFoundError:
    return False
  return os.path.samestat(os.fstat(file.fileno()), there)


def _fill(file, pieces: Iterable[bytes]) -> int:
  """Writes the pieces to the disk; gives their bytes."""
  file.truncate(0)
  for piece in pieces:
    view = memoryview(piece)
    while len(view):
      view = view[file.write(view) :]
  os.fsync(file.fileno())
  return file.tell()


def _sync_folder(path: str) -> None:
  """Has the disk know the names in a folder, as a commit must come after."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
