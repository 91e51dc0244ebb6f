"""Data sets of the hub, and local folders and files of parquet.

`datasets` finds what a name means: its subsets, splits and files. Parquet that
is here, or that is streamed, is read in place (`core.parquet`); anything else
is downloaded and converted by `datasets`, and mapped into memory.
"""

import hashlib
import logging
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lmm_sae.core.items import Item
from lmm_sae.core.llava_file import folder
from lmm_sae.core.parquet import Columns, LargeGroup, ParquetFiles, row_of
from lmm_sae.core.remote_files import is_remote, patiently

T = TypeVar('T')

SAVED = ('dataset_dict.json', 'state.json')  # by save_to_disk
NEEDS = "needs the package `datasets`: pip install 'lmm_sae[data]'"


def open_data(
  path: str, subset: str, split: str, stream: bool, image_root: str
) -> 'ParquetFiles | HubDataset':
  """One split of a data set.

  Args:
    path: owner/name[@revision], or a local folder or parquet file, or what
      `datasets` has saved.
    subset: its configuration; '': the only one, or the default.
    image_root: folder of images that rows name by path; '': they hold them.

  Raises:
    ValueError: it, its subset or its split does not exist, or may not be read.
    OSError: the network fails.
  """
  if not path:
    raise ValueError(
      'data.path is empty: give owner/name of the hub, or a folder or file of '
      'parquet'
    )
  _datasets()  # brings pyarrow, too
  here = os.path.expanduser(path)
  if os.path.isfile(here):
    return _local_file(here, subset, split, stream, image_root)
  if any(os.path.isfile(os.path.join(here, name)) for name in SAVED):
    return _saved(here, subset, split, stream, image_root)
  if os.path.isdir(here):
    name, revision, root = here, None, image_root or here
  else:
    name, _, revision = path.partition('@')
    root = image_root
  files = _files(name, revision or None, subset, split)
  if stream and not files:
    raise ConnectionError(
      f'data.path {path} cannot be streamed: the hub is not reached. Set '
      'data.stream=False for what its cache holds'
    )
  parquet = bool(files) and all(file.endswith('.parquet') for file in files)
  if stream and not parquet:
    raise ValueError(
      f'data.stream=True reads parquet files, and {files[0]} is none: set '
      'data.stream=False'
    )
  if parquet and (stream or not any(map(is_remote, files))):
    try:
      return ParquetFiles(files, folder(root) if root else None)
    except LargeGroup:
      if stream:
        raise
  datasets = _datasets()
  rows = _asked(
    name,
    lambda: datasets.load_dataset(
      name, subset or None, split=split, revision=revision or None
    ),
  )
  # pictures that were downloaded as files lie in the cache
  cache = pathlib.Path(os.path.abspath(datasets.config.HF_CACHE_HOME))
  return HubDataset(rows, folder(root) if root else cache)


def _local_file(
  path: str, subset: str, split: str, stream: bool, image_root: str
) -> 'ParquetFiles | HubDataset':
  if not path.endswith('.parquet'):
    raise ValueError(
      f'data.path {path} is no parquet file; a JSON file is data.source=llava'
    )
  _check_choice('subset', subset, [''])
  _check_choice('split', split, ['train'])
  path = os.path.abspath(path)
  root = folder(image_root or os.path.dirname(path))
  try:
    return ParquetFiles([path], root)
  except LargeGroup:
    if stream:
      raise
    datasets = _datasets()
    rows = _asked(
      path,
      lambda: datasets.load_dataset('parquet', data_files=path, split='train'),
    )
    return HubDataset(rows, root)


def _saved(
  path: str, subset: str, split: str, stream: bool, image_root: str
) -> 'HubDataset':
  """What `save_to_disk` of `datasets` has written."""
  if stream:
    raise ValueError(
      f'data.stream=True reads parquet files, and {path} was written by '
      'save_to_disk: set data.stream=False'
    )
  datasets = _datasets()
  rows = _asked(path, lambda: datasets.load_from_disk(path))
  parts = rows if isinstance(rows, Mapping) else {'train': rows}
  _check_choice('subset', subset, [''])
  _check_choice('split', split, list(parts))
  return HubDataset(parts[split], folder(image_root or path))


class HubDataset:
  """Rows that `datasets` has mapped into memory; images are not decoded.

  `content` is a digest of their number and columns.
  """

  blocks = None

  def __init__(self, rows: Any, root: pathlib.Path | None):
    schema = rows.features.arrow_schema
    self._columns = Columns.of(schema)
    told = repr((len(rows), schema.names))
    self.content = hashlib.sha256(told.encode()).hexdigest()
    rows = rows.select_columns(list(self._columns.names))
    self._rows, self._root = rows.with_format('arrow'), root

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Item:
    row = row_of(self._rows[index : index + 1], 0)
    return self._columns.item(row, str(index), self._root)

  def name(self, index: int) -> str:
    return f'row {index}'


def _datasets():
  # else absl's handler shows which frameworks it has seen
  logging.getLogger('datasets').setLevel(logging.WARNING)
  try:
    import datasets
  except ImportError as error:
    raise ValueError(f'data.source=hub {NEEDS}') from error
  return datasets


def _files(
  name: str, revision: str | None, subset: str, split: str
) -> list[str]:
  """The files of a split: paths, or addresses that name the commit.

  None where the hub is not reached, and its cache holds the data.
  """
  datasets = _datasets()
  builder = _asked(
    name,
    lambda: datasets.load_dataset_builder(
      name, subset or None, revision=revision
    ),
  )
  found: Mapping[str, Any] = builder.config.data_files or {}
  known = found or builder.info.splits or {}
  _check_choice('split', split, [str(each) for each in known])
  return [str(file) for file in found[split]] if found else []


def _asked(name: str, ask: Callable[[], T]) -> T:
  """What `datasets` answers; ValueError: it says that it cannot.

  Raises:
    ConnectionError: the network fails.
  """
  errors = _datasets().exceptions.DatasetsError
  address = name if os.path.exists(name) else f'hf://datasets/{name}'
  try:
    return patiently(address, ask)
  except ConnectionError:
    raise
  except (OSError, ValueError, errors) as error:
    raise ValueError(f'data.path {name} cannot be had: {error}') from error


def _check_choice(field: str, value: str, known: list[str]) -> None:
  if value not in known:
    there = ', '.join(known) if any(known) else 'none'
    raise ValueError(
      f'data.{field} {value!r} is not in the data; there: {there}'
    )
