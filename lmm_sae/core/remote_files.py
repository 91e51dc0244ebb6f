"""Files here, or on the hub at hf://..., read by exact ranges, with patience.

A network that fails is asked again for minutes; then reading stops with an
OSError, since no row is to be rejected for it. Where the hub stands
(HF_ENDPOINT) and who asks (HF_TOKEN) are its client's own settings.
"""

import io
import time
from collections.abc import Callable
from typing import TypeVar

from absl import logging

T = TypeVar('T')

WAITS_S = (1, 5, 15, 30, 60, 120)  # between attempts, beside the hub client's


def patiently(file: str, read: Callable[[], T]) -> T:
  """What `read` makes of a file, asked again while a network fails.

  Raises:
    ValueError: the bytes are there, and broken.
    ConnectionError: the network fails to the end; capture goes on later.
    OSError: the file is gone, or the disk fails, or the login does not do.
  """
  failures = _failures(file)
  for attempt, wait_s in enumerate((*WAITS_S, None)):
    try:
      return read()
    except failures as error:
      if _is_broken(error, file):
        if attempt == 0 and is_remote(file):
          continue  # what came over the network may be whole the next time
        raise ValueError(_line(error)) from error
      if not is_remote(file) or not _passes(error):
        raise OSError(f'{file} cannot be read: {_line(error)}') from error
      if wait_s is None:
        raise ConnectionError(
          f'{file} cannot be read over the network: {_line(error)}. When it is '
          'back, run the same command again: it goes on from there'
        ) from error
      logging.warning('%s: %s; asked again in %d s', file, _line(error), wait_s)
      time.sleep(wait_s)
  raise AssertionError('the last attempt returns or raises')


def is_remote(file: str) -> bool:
  return file.startswith('hf://')


def _failures(file: str) -> tuple[type[Exception], ...]:
  """What reading a file may raise."""
  if not is_remote(file):
    return (OSError, ValueError)
  from huggingface_hub import errors

  return (OSError, ValueError, errors.HTTPError)


def _is_broken(error: Exception, file: str) -> bool:
  """Whether Arrow refuses what was read: its own errors have no number."""
  if is_remote(file):
    from huggingface_hub import errors

    if isinstance(error, errors.HTTPError):  # some are a ValueError, too
      return False
  plain = type(error) is OSError and error.errno is None
  return plain or isinstance(error, ValueError)


def _passes(error: Exception) -> bool:
  """Whether the network or the hub may answer otherwise the next time."""
  from huggingface_hub import errors

  if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
    status = error.response.status_code
    return status in (408, 429) or status >= 500
  return not isinstance(error, FileNotFoundError | PermissionError)


def _line(error: Exception) -> str:
  """What it says, on one line."""
  lines = str(error).strip().split('\n')[:2]
  return ' '.join(line.strip() for line in lines) or type(error).__name__


def opened(file: str):
  """A file, here or on the hub, that is read by exact ranges."""
  if not is_remote(file):
    return open(file, 'rb')
  from huggingface_hub import HfFileSystem

  return _Ranges(HfFileSystem().open(file, 'rb', cache_type='none'))


class _Ranges(io.RawIOBase):
  """A file of the hub that gives all bytes asked for, or raises."""

  def __init__(self, file):
    self._file = file

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._file.tell()

  def seek(self, offset: int, whence: int = 0) -> int:
    return self._file.seek(offset, whence)

  def read(self, size: int = -1) -> bytes:
    left = self._file.size - self._file.tell()
    wanted = left if size < 0 else min(size, left)
    data = self._file.read(wanted)
    if len(data) != wanted:
      raise ConnectionError(f'{len(data)} bytes came of {wanted} asked for')
    return data
