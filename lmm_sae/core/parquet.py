"""Rows of parquet files, here or on the hub, read a row group at a time.

Opening reads the files' footers; of a row group only the columns that rows are
made of are read, and the last two groups are kept. Nothing is written.
"""

import collections
import concurrent.futures
import hashlib
import json
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmm_sae.core import remote_files
from lmm_sae.core.items import COLUMNS, Item, bare, item

KEPT = 2  # row groups a process holds
MAX_GROUP = 2**30  # bytes of a row group, uncompressed
AT_ONCE = 16  # footers read at the same time


class ParquetFiles:
  """Parquet files as one source; `blocks` are their row groups.

  Without `conversations` or `messages` a row is its images, with a bare prompt,
  or where there are none its `text`. Can be pickled; the groups that are held
  are left behind. `content` is a digest of the row
  groups' sizes.
  """

  def __init__(self, files: Sequence[str], root: pathlib.Path | None):
    """Reads the footers.

    Args:
      files: paths, or addresses hf://datasets/...
      root: folder of the images that rows name by path.

    Raises:
      ValueError: a file is no parquet file, its rows are made of other columns
        than the first's, or a row group is too large.
    """
    self._files, self._root = list(files), root
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
      self._footers = list(pool.map(_footer, self._files))
    schemas = [footer.schema.to_arrow_schema() for footer in self._footers]
    self.columns = Columns.of(schemas[0])
    for name, schema in zip(files, schemas, strict=True):
      _check_same(files[0], self.columns, name, Columns.of(schema))
    # of all columns: Arrow ends the process over a column's spoilt statistics
    groups = [
      (at, number, group.num_rows, group.total_byte_size)
      for at, footer in enumerate(self._footers)
      for number in range(footer.num_row_groups)
      for group in [footer.row_group(number)]
    ]
    if any(rows < 0 for _, _, rows, _ in groups):
      raise ValueError(f'a file of {files[0]} says it has fewer rows than none')
    groups = [group for group in groups if group[2]]
    self.largest = max((size for *_, size in groups), default=0)
    if self.largest > MAX_GROUP:
      raise LargeGroup(
        f'a row group of {self.largest} bytes is too large to be read as a '
        f'whole (at most {MAX_GROUP}): set data.stream=False, or write the '
        'files anew with smaller row groups'
      )
    self._groups = [(at, number) for at, number, *_ in groups]
    self._start_G = np.cumsum([0, *(rows for _, _, rows, _ in groups)])
    told = [schema.names for schema in schemas], groups
    self.content = hashlib.sha256(repr(told).encode()).hexdigest()
    self.__setstate__({})

  @property
  def blocks(self) -> list[int]:
    return self._start_G[:-1].tolist()

  def __len__(self) -> int:
    return int(self._start_G[-1])

  def __getitem__(self, index: int) -> Item:
    group = int(np.searchsorted(self._start_G, index, 'right')) - 1
    at = index - int(self._start_G[group])
    row = row_of(self._table(group), at)
    return self.columns.item(row, str(index), self._root)

  def name(self, index: int) -> str:
    return f'row {index}'

  def __getstate__(self) -> dict[str, Any]:
    own = ('_held', '_lock')
    return {k: v for k, v in self.__dict__.items() if k not in own}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._held = collections.OrderedDict()
    self._lock = threading.Lock()

  def _table(self, group: int):
    """The row group, read or held; ValueError: its bytes are broken."""
    with self._lock:
      if group not in self._held:
        self._held[group] = self._read(group)
        while len(self._held) > KEPT or (
          len(self._held) > 1 and _size(self._held.values()) > MAX_GROUP
        ):
          self._held.popitem(last=False)
      self._held.move_to_end(group)
      found = self._held[group]
    if isinstance(found, ValueError):
      raise ValueError(str(found))
    return found

  def _read(self, group: int):
    """The row group as an Arrow table, or the ValueError that it is broken."""
    file, number = self._groups[group]
    name, footer = self._files[file], self._footers[file]
    names = self.columns.names
    try:
      found = remote_files.patiently(
        name, lambda: _row_group(name, footer, number, names)
      )
      wanted = self._start_G[group + 1] - self._start_G[group]
      if found.num_rows != wanted:
        raise ValueError(f'it has {found.num_rows} rows, and says {wanted}')
    except ValueError as error:
      return ValueError(f'row group {number} of {name} is broken: {error}')
    return found


def row_of(table, at: int) -> dict[str, Any]:
  """Row `at` of an Arrow table, in Python's own types.

  Raises:
    ValueError: a text of it is not UTF-8, or a time beyond Python's.
  """
  try:
    return table.slice(at, 1).to_pylist()[0]
  except OverflowError as error:
    raise ValueError(f'a value of it is out of range: {error}') from error


class LargeGroup(ValueError):
  """A row group is larger than may be held."""


class Columns:
  """Which columns of a table rows are made of, and how."""

  def __init__(self, names: Sequence[str], image: str, is_bare: bool):
    self.names, self._image, self._bare = tuple(names), image, is_bare

  @classmethod
  def of(cls, schema) -> 'Columns':
    """What a table of that pyarrow schema gives.

    Raises:
      ValueError: it has neither words nor images.
    """
    names = [name for name in COLUMNS if name in schema.names]
    image = ''
    if not {'image', 'images'} & set(names):
      image = _image_column(schema)
      names += [image] if image else []
    talks = {'conversations', 'messages'} & set(names)
    has_image = bool(image or {'image', 'images'} & set(names))
    if not (talks or has_image or 'text' in names):
      raise ValueError(
        f'the data have none of the columns {", ".join(COLUMNS[1:])} and none '
        f'of images; their columns are {", ".join(schema.names)}'
      )
    return cls(names, image, has_image and not talks)

  def item(
    self, row: dict[str, Any], name: str, root: pathlib.Path | None
  ) -> Item:
    """The item of a row; ValueError: why it is none."""
    if self._image:
      row['image'] = row.pop(self._image)
    return (bare if self._bare else item)(row, name, root)


def _check_same(first: str, wanted: Columns, file: str, found: Columns) -> None:
  """Refuses a file whose rows would be made of more or less than the first's.

  Raises:
    ValueError: a column that one of the two lacks.
  """
  pairs = (file, found, first, wanted), (first, wanted, file, found)
  for here, has, there, want in pairs:
    if missing := set(want.names) - set(has.names):
      raise ValueError(
        f'{here} has no column {", ".join(sorted(missing))}, which {there} '
        'has: give files that have the same columns'
      )


def _footer(file: str):
  """The metadata of a parquet file."""
  import pyarrow.parquet

  def read():
    with remote_files.opened(file) as opened:
      return pyarrow.parquet.read_metadata(opened)

  try:
    return remote_files.patiently(file, read)
  except ValueError as error:
    raise ValueError(f'{file} is no parquet file: {error}') from error


def _row_group(file: str, footer, number: int, names: Sequence[str]):
  import pyarrow.parquet

  with remote_files.opened(file) as opened:
    read = pyarrow.parquet.ParquetFile(opened, metadata=footer, pre_buffer=True)
    return read.read_row_group(number, columns=list(names))


def _size(tables) -> int:
  return sum(t.nbytes for t in tables if not isinstance(t, ValueError))


def _image_column(schema) -> str:
  """The first column of images that is not called so; '' if there is none."""
  features = {}
  if b'huggingface' in (schema.metadata or {}):
    try:
      facts = json.loads(schema.metadata[b'huggingface'])
      features = facts['info']['features']
    except (ValueError, KeyError, TypeError):
      features = {}  # another program's: the types tell
  for field in schema:
    declared = features.get(field.name) if isinstance(features, dict) else None
    if '"_type": "Image"' in json.dumps(declared) or _holds_bytes(field.type):
      return field.name
  return ''


def _holds_bytes(kind) -> bool:
  """Whether a type is binary, {bytes, ...}, or a list of these."""
  from pyarrow import types

  if types.is_list(kind) or types.is_large_list(kind):
    return _holds_bytes(kind.value_type)
  if types.is_struct(kind):
    return any(
      field.name == 'bytes' and _holds_bytes(field.type) for field in kind
    )
  return types.is_binary(kind) or types.is_large_binary(kind)
