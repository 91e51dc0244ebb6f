"""Where a store stands: a local folder, or a prefix of a bucket.

A `Place` is a name and what can be done with it, over TensorStore's key-value
stores: /folder, s3://bucket/prefix, gs://bucket/prefix. What is written is
there as a whole or not at all.

S3 is told by the variables that its other programs read: AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY (or AWS_PROFILE, or the machine's role; without any of
them requests are anonymous), AWS_REGION, and AWS_ENDPOINT_URL for a server that
is not Amazon's.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import tensorstore as ts

from lmm_sae.core import local_files
from lmm_sae.core.place_errors import FAILURES, explained, unwritten

SCHEMES = ('s3', 'gs')
URL = re.compile(r'^([a-zA-Z][a-zA-Z0-9+.-]*)://(.*)$')
RETRIES = {'max_retries': 6, 'initial_delay': '500ms', 'max_delay': '8s'}
IN_FLIGHT = 64  # small objects that are read or deleted at a time
PAST_END = re.compile(r"OUT_OF_RANGE|byte range|'416'")


@dataclasses.dataclass(frozen=True)
class Place:
  """A folder or a file; make it with `Place.of`."""

  url: str

  @classmethod
  def of(cls, path: 'str | os.PathLike | Place') -> 'Place':
    """The place of a local path, made absolute, or of an s3:// or gs:// URL.

    Raises:
      ValueError: another scheme, or no bucket.
    """
    if isinstance(path, Place):
      return path
    text = os.fspath(path)
    match = URL.match(text)
    if not match:  # a shell leaves the ~ of --config.acts=~/acts as it is
      return cls(os.path.abspath(os.path.expanduser(text)))
    scheme, rest = match[1].lower(), match[2]
    if scheme == 'file':
      return cls(os.path.abspath(rest))
    if scheme not in SCHEMES:
      raise ValueError(
        f'{text}: a store stands in a local folder, or at s3:// or gs://'
      )
    parts = [part for part in rest.split('/') if part]
    if not parts:
      raise ValueError(
        f'{text} names no bucket: write {scheme}://bucket/prefix'
      )
    if {'.', '..'} & set(parts):
      raise ValueError(f'{text}: "." and ".." mean nothing in a bucket')
    return cls(f'{scheme}://{"/".join(parts)}')

  def __str__(self) -> str:
    return self.url

  def __truediv__(self, name: str) -> 'Place':
    return Place(f'{self.url.rstrip("/")}/{name}')

  def __fspath__(self) -> str:
    """The local path.

    Raises:
      ValueError: it is in a bucket.
    """
    if not self.local:
      raise ValueError(f'{self} is in a bucket; a local path is needed here')
    return self.url

  @property
  def local(self) -> bool:
    return not URL.match(self.url)

  @property
  def name(self) -> str:
    return self.url.rsplit('/', 1)[-1]

  @property
  def kvstore(self) -> ts.KvStore:
    """The key-value store whose keys are the names below this place."""
    root, key = self._split()
    return (
      _open(root, _settings()) / f'{key}/' if key else _open(root, _settings())
    )

  @property
  def spec(self) -> dict[str, Any]:
    """The same as a TensorStore spec; share `CONTEXT` with it."""
    return self.kvstore.spec().to_json()

  def exists(self) -> bool:
    """Whether the file is there; of local places, a folder counts too."""
    if self.local:
      return os.path.exists(self.url)
    root, key = self._split()
    try:
      found = _open(root, _settings()).read(key, byte_range=slice(0, 1))
      return found.result().state == 'value'
    except FAILURES as error:
      if PAST_END.search(str(error)):  # it is empty
        return True
      raise explained(error, str(self)) from error

  def read(self) -> bytes:
    """The whole file.

    Raises:
      ValueError: there is none, or it cannot be read.
    """
    found = self.read_if_there()
    if found is None:
      raise ValueError(f'{self} does not exist')
    return found

  def read_if_there(self) -> bytes | None:
    """The whole file, or None where there is none.

    Raises:
      ValueError: it cannot be read.
    """
    (found,) = read_all([self])
    return found

  def write(self, data: bytes | Iterable[bytes]) -> int:
    """Replaces the file in one step; of pieces, only a few are in memory.

    A bucket takes a file as a whole, so there they all are.

    Returns:
      Its bytes.

    Raises:
      ValueError: it cannot be written.
    """
    if self.local:
      pieces = [data] if isinstance(data, bytes) else data
      try:
        return local_files.replace(self.url, pieces)
      except OSError as error:
        raise unwritten(str(self), error) from error
    if not isinstance(data, bytes):
      data = b''.join(data)
    root, key = self._split()
    try:
      _open(root, _settings()).write(key, data).result()
    except FAILURES as error:
      raise explained(error, str(self)) from error
    return len(data)

  def holds(self, size: int) -> bool:
    """Whether the file is there and has exactly so many bytes (1 or more).

    Raises:
      ValueError: it cannot be looked at.
    """
    if self.local:
      path = pathlib.Path(self.url)
      return path.is_file() and path.stat().st_size == size
    return self._has(size - 1) and not self._has(size)

  def _has(self, at: int) -> bool:
    """Whether the object has a byte at `at`."""
    root, key = self._split()
    store = _open(root, _settings())
    try:
      found = store.read(key, byte_range=slice(at, at + 1)).result()
    except FAILURES as error:
      if PAST_END.search(str(error)):
        return False
      raise explained(error, str(self)) from error
    return found.state == 'value' and len(found.value) == 1

  def check_bucket(self) -> None:
    """Tells an S3 bucket that is missing from one in which this file is.

    Raises:
      ValueError: there is no such bucket, or it cannot be looked at.
    """
    if self.local:
      return
    root, key = self._split()
    own = ts.KvStore.KeyRange(key, f'{key}\0')
    try:
      _open(root, _settings()).list(own).result()
    except FAILURES as error:
      raise explained(error, str(self)) from error

  def list(self) -> list[str]:
    """The names of all files below, as paths relative to this place, sorted.

    Raises:
      ValueError: it cannot be looked at.
    """
    try:
      return sorted(key.decode() for key in self.kvstore.list().result())
    except FAILURES as error:
      raise explained(error, str(self)) from error

  def delete(self) -> None:
    """Removes the file, if it is there."""
    delete_all([self])

  def delete_below(self) -> None:
    """Removes every file below, and the folder that held them.

    Raises:
      ValueError: one cannot be removed.
    """
    try:
      self.kvstore.delete_range(ts.KvStore.KeyRange()).result()
    except FAILURES as error:
      raise explained(error, str(self)) from error
    if self.local and os.path.isdir(self.url):
      with contextlib.suppress(OSError):  # another process writes there again
        os.rmdir(self.url)

  def _split(self) -> tuple[str, str]:
    """(root, key): what a key-value store is opened at, and the rest."""
    if self.local:
      return '/', self.url.lstrip('/')
    scheme, rest = self.url.split('://')
    bucket, _, key = rest.partition('/')
    return f'{scheme}://{bucket}', key


def read_all(places: Iterable[Place]) -> Iterator[bytes | None]:
  """Many small files, some in memory at a time; None for one that is not there.

  Raises:
    ValueError: one cannot be read.
  """
  places = list(places)
  for at in range(0, len(places), IN_FLIGHT):
    some = places[at : at + IN_FLIGHT]
    reads = [_keyed(place, ts.KvStore.read) for place in some]
    for place, read in zip(some, reads, strict=True):
      try:
        result = read.result()
      except FAILURES as error:
        raise explained(error, str(place)) from error
      yield result.value if result.state == 'value' else None


def delete_all(places: Iterable[Place]) -> None:
  """Removes many files, some at a time; one that is not there is none.

  Raises:
    ValueError: one cannot be removed.
  """
  places = [
    place for place in places if not place.local or os.path.exists(place.url)
  ]  # a local delete would make the folder
  for at in range(0, len(places), IN_FLIGHT):
    some = places[at : at + IN_FLIGHT]
    deletes = [_keyed(place, ts.KvStore.write, None) for place in some]
    for place, delete in zip(some, deletes, strict=True):
      try:
        delete.result()
      except FAILURES as error:
        raise explained(error, str(place)) from error


def _keyed(place: Place, method, *args) -> ts.Future:
  root, key = place._split()
  return method(_open(root, _settings()), key, *args)


def write_json(place: Place, value: Any) -> None:
  """Writes a JSON file, laid out as `records.write_json` does."""
  text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
  place.write(text.encode() + b'\n')


def context(retries: dict[str, Any]) -> ts.Context:
  """What all places and arrays share: how often requests are made again."""
  return ts.Context(
    {
      's3_request_retries': retries,
      'gcs_request_retries': retries,
      'cache_pool': {'total_bytes_limit': 2**25},  # where shards have chunks
    }
  )


CONTEXT = context(RETRIES)


def _settings() -> tuple[tuple[str, str], ...]:
  """What the environment says of S3, by the field of TensorStore's spec."""
  env = os.environ
  fields = {
    'endpoint': env.get('AWS_ENDPOINT_URL_S3') or env.get('AWS_ENDPOINT_URL'),
    'aws_region': env.get('AWS_REGION') or env.get('AWS_DEFAULT_REGION'),
    # The default chain looks for files and asks the network first.
    'credentials': 'environment' if env.get('AWS_ACCESS_KEY_ID') else 'default',
  }
  return tuple((name, value) for name, value in fields.items() if value)


@functools.cache
def _open(root: str, settings: tuple[tuple[str, str], ...]) -> ts.KvStore:
  """The key-value store at a root: '/', s3://bucket or gs://bucket."""
  scheme, _, bucket = root.partition('://')
  if not bucket:
    spec: dict[str, Any] = {'driver': 'file', 'path': '/'}
  elif scheme == 'gs':
    spec = {'driver': 'gcs', 'bucket': bucket}
  else:
    fields = dict(settings)
    kind = fields.pop('credentials')
    if 'endpoint' in fields:  # a server that is not Amazon's has any region
      fields.setdefault('aws_region', 'us-east-1')
    spec = {
      'driver': 's3',
      'bucket': bucket,
      'aws_credentials': {'type': kind},
      **fields,
    }
  try:
    return ts.KvStore.open(spec, context=CONTEXT).result()
  except FAILURES as error:
    raise explained(error, root) from error
