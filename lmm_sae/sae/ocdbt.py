"""What an OCDBT database holds, and where, without a read of its values.

Orbax keeps the chunks of all arrays in one: a B+ tree of key -> value, the
value in the tree itself where it is small, else at a place in a file. So sizes
are known from the tree alone, and which file is too short.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator

import tensorstore as ts

from lmm_sae.sae.stored import damaged

MANIFEST = 'manifest.ocdbt'
META = {'.zarray': 'zarr', 'zarr.json': 'zarr3'}  # of an array -> its driver

_CHUNK = re.compile(r'(.*?)/(c(?:/\d+)*|[^/]+)')  # zarr 3 has array/c/0/1


@dataclasses.dataclass
class Stored:
  """What stands on disk of one array: its zarr metadata, bytes and chunks."""

  driver: str = ''
  meta: bytes = b''
  size: int = 0
  chunks: int = 0


def database(folder: pathlib.Path) -> dict[str, Stored]:
  """{name: what is stored} of an OCDBT database.

  Raises:
    ValueError: a node cannot be read, or a file is shorter than it must be.
  """
  base = ts.KvStore.open({'driver': 'file', 'path': f'{folder}/'}).result()
  found, ends = {}, {}
  try:
    versions = ts.ocdbt.dump(base).result()['versions']
    if not versions:
      raise damaged(folder, f'{MANIFEST} names no version')
    root = versions[-1]['root'].get('location')
    for key, inline, place in _entries(base, root, b'') if root else ():
      array, chunk = _CHUNK.fullmatch(key.decode()).groups()
      stored = found.setdefault(array, Stored())
      size = len(inline) if place is None else _extent(place, ends)
      if chunk in META:
        stored.driver = META[chunk]
        stored.meta = inline or ts.ocdbt.dump(base, place).result()
      else:
        stored.chunks += 1
        stored.size += size
  except (ValueError, KeyError, TypeError) as error:
    if 'is damaged' in str(error):
      raise
    raise damaged(folder, error) from error
  for file, end in ends.items():
    length = (folder / file).stat().st_size if (folder / file).exists() else -1
    if length < end:
      lacks = 'is missing' if length < 0 else f'has {length} bytes of {end}'
      raise damaged(folder, f'{file} {lacks}')
  return found


def _entries(base, node: str, prefix: bytes) -> Iterator[tuple]:
  """(key, value or None, place or None) of a B+ tree, in order."""
  for entry in ts.ocdbt.dump(base, node).result()['entries']:
    key = prefix + entry['key']
    if 'location' in entry:
      below = prefix + entry['subtree_common_prefix']
      yield from _entries(base, entry['location'], below)
    else:
      yield key, entry.get('inline_value'), entry.get('indirect_value')


def _extent(place: str, ends: dict[str, int]) -> int:
  """The bytes of a value at `value:folder:file:offset:length`."""
  _, folder, file, start, length = place.split(':')
  name = f'{folder}{file}'
  ends[name] = max(ends.get(name, 0), int(start) + int(length))
  return int(length)
