"""The grid of rows that the activation store's arrays stand on.

All arrays of a store are zarr3 with the sharding codec, uncompressed, every
chunk with a checksum: a shard is a file that is written once and whole, a chunk
is what one read touches. What is not there is an error to read, never zeros.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from lmm_sae.core import places
from lmm_sae.core.places import Place

TOKENS = {  # name: (dtype, columns; 0 is a plain vector)
  'sample': ('int32', 0),
  'position': ('int32', 0),
  'token': ('int32', 0),
  'kind': ('uint8', 0),
  'image': ('int16', 0),  # which of the sample's images; -1 for text
  'row': ('int16', 0),
  'col': ('int16', 0),
  'box': ('int16', 4),
}
WIDTH = -1  # columns of a layer: D


@dataclasses.dataclass(frozen=True)
class Layout:
  """The grid of rows: `groups` groups of `group_rows`, in shards, in chunks."""

  groups: int
  group_rows: int
  shard_rows: int
  chunk_rows: int

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if value < 1:
        raise ValueError(f'store: {name} is {value}; it must be at least 1')
    if self.shard_rows % self.chunk_rows:
      raise ValueError(
        f'store: shard_rows {self.shard_rows} is no multiple of chunk_rows '
        f'{self.chunk_rows}; change capture.shard_rows or capture.chunk_rows'
      )
    if self.group_rows % self.shard_rows:
      raise ValueError(
        f'store: group_rows {self.group_rows} is no multiple of shard_rows '
        f'{self.shard_rows}; round it up'
      )

  def spans(self, group: int, count: int) -> list[tuple[int, int, int]]:
    """(shard, start, stop) of the shards that a group's first rows fill.

    Rows are counted from the group's first.
    """
    first = group * self.group_rows // self.shard_rows
    return [
      (first + at // self.shard_rows, at, min(at + self.shard_rows, count))
      for at in range(0, count, self.shard_rows)
    ]


def fields(
  layers: Sequence[int], width: int, dtype: str
) -> dict[str, tuple[str, int]]:
  """{name: (dtype, columns; 0 is a plain vector)} of all arrays of a store."""
  found = {}
  for layer in layers:
    found[f'layer_{layer}'] = (dtype, width)
    if dtype == 'int8':
      found[f'scale_{layer}'] = ('float32', 0)
  return found | TOKENS


def shard_key(name: str, columns: int, shard: int) -> str:
  """The file of a shard, inside the store."""
  return f'{name}/c/{shard}' + ('/0' if columns else '')


def metadata(dtype: str, columns: int, layout: Layout) -> dict[str, Any]:
  """The zarr3 metadata of an array."""
  tail = [columns] if columns else []
  codecs = [
    {'name': 'bytes', 'configuration': {'endian': 'little'}},
    {'name': 'crc32c'},
  ]
  sharding = {
    'chunk_shape': [layout.chunk_rows, *tail],
    'codecs': codecs,
    'index_codecs': codecs,
    'index_location': 'end',
  }
  regular = {'chunk_shape': [layout.shard_rows, *tail]}
  return {
    'shape': [layout.groups * layout.group_rows, *tail],
    'data_type': dtype,
    'fill_value': 0,
    'chunk_grid': {'name': 'regular', 'configuration': regular},
    'codecs': [{'name': 'sharding_indexed', 'configuration': sharding}],
  }


def open_array(
  place: Place, dtype: str, columns: int, layout: Layout, create: bool = False
) -> ts.TensorStore:
  """The array at a place; with `create`, its metadata is made if it is not.

  Raises:
    ValueError: it is not there, or is another.
  """
  spec = {
    'driver': 'zarr3',
    'kvstore': place.spec,
    'metadata': metadata(dtype, columns, layout),
    # Of a damaged store zeros would look like data.
    'fill_missing_data_reads': False,
    'store_data_equal_to_fill_value': True,
  }
  try:
    return ts.open(
      spec,
      context=places.CONTEXT,
      open=True,
      create=create,
      read=True,
      write=create,
    ).result()
  except ValueError as error:
    raise places.explained(error, place) from error


def encode(rows: np.ndarray, dtype: str, columns: int, layout: Layout) -> bytes:
  """The file of a shard that begins with these rows and has no others."""
  memory = ts.Context({'memory_key_value_store': {}})
  one = dataclasses.replace(layout, groups=1, group_rows=layout.shard_rows)
  spec = {
    'driver': 'zarr3',
    'kvstore': {'driver': 'memory'},
    'metadata': metadata(dtype, columns, one),
    'store_data_equal_to_fill_value': True,
  }
  array = ts.open(spec, context=memory, create=True).result()
  rows = rows.astype(array.dtype.numpy_dtype, copy=False)
  with ts.Transaction() as transaction:  # the shard is encoded once, whole
    array.with_transaction(transaction)[: len(rows)] = rows
  return array.kvstore[shard_key('', columns, 0)[1:]]
