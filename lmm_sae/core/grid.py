"""The grid of rows that the activation store's arrays stand on.

All arrays of a store are zarr3 with the sharding codec, uncompressed, every
chunk with a checksum: a shard is what one writer owns, a chunk is what one
read touches.
"""

import dataclasses
import pathlib
from typing import Any

import tensorstore as ts

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


def field(name: str, width: int) -> tuple[str, int]:
  """(dtype, columns) of an array: `layer_<L>` or a name in `TOKENS`."""
  return ('bfloat16', width) if name.startswith('layer_') else TOKENS[name]


def shard_keys(name: str, layout: Layout, group: int) -> list[str]:
  """The files of a group's shards, inside the folder of array `name`."""
  tail = '/0' if field(name, width=1)[1] else ''
  shards = layout.group_rows // layout.shard_rows
  return [f'c/{at}{tail}' for at in range(group * shards, (group + 1) * shards)]


def open_array(
  root: pathlib.Path, name: str, width: int, layout: Layout, writes: bool
) -> ts.TensorStore:
  """The array `name` of the store at `root`; made where it is written first."""
  dtype, columns = field(name, width)
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
  spec: dict[str, Any] = {
    'driver': 'zarr3',
    'kvstore': {'driver': 'file', 'path': f'{root / name}/'},
    'metadata': {
      'shape': [layout.groups * layout.group_rows, *tail],
      'data_type': dtype,
      'fill_value': 0,
      'chunk_grid': {'name': 'regular', 'configuration': regular},
      'codecs': [{'name': 'sharding_indexed', 'configuration': sharding}],
    },
  }
  return ts.open(
    spec, open=True, create=writes, read=True, write=writes
  ).result()
