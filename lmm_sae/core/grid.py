"""The grid of rows that the activation store's arrays stand on.

All arrays of a store are zarr3 with the sharding codec, uncompressed, every
chunk with a checksum: a shard is a file that is written once and whole, a chunk
is what one read touches. What is not there is an error to read, never zeros.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from lmm_sae.core import places
from lmm_sae.core.place_errors import FAILURES, explained
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
CODECS = [
  {'name': 'bytes', 'configuration': {'endian': 'little'}},
  {'name': 'crc32c'},
]
NARROW = 2**20  # bytes of a shard's rows that the codec takes at once
NOWHERE = 2**64 - 1  # in a shard's index: the chunk is not there


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
  sharding = {
    'chunk_shape': [layout.chunk_rows, *tail],
    'codecs': CODECS,
    'index_codecs': CODECS,
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
    'recheck_cached_data': 'open',  # a shard is written once
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
  except FAILURES as error:
    raise explained(error, str(place)) from error


class Encoder:
  """Makes the files of an array's shards, a few chunks at a time.

  A file is what the sharding codec makes of a shard that begins with the rows:
  its chunks, each with its checksum, then an index of where they lie. The codec
  itself holds four times the shard in memory, so it is left the narrow ones,
  whose many small chunks it makes faster.
  """

  def __init__(self, dtype: str, columns: int, layout: Layout):
    self._about = dtype, columns, layout
    self._tail = [columns] if columns else []
    self._dtype = ts.dtype(dtype).numpy_dtype

  def pieces(self, rows: np.ndarray) -> Iterator[bytes]:
    """The file of a shard that begins with these rows and has no others."""
    _, _, layout = self._about
    rows = rows.astype(self._dtype, copy=False)
    row = math.prod(self._tail) * self._dtype.itemsize
    if layout.shard_rows * row < NARROW:
      yield self._whole(rows)
    else:
      yield from self._chunks(rows)

  def _whole(self, rows: np.ndarray) -> bytes:
    dtype, columns, layout = self._about
    one = dataclasses.replace(layout, groups=1, group_rows=layout.shard_rows)
    array = self._memory(metadata(dtype, columns, one))
    with ts.Transaction() as together:  # or the chunks might change places
      array.with_transaction(together)[: len(rows)] = rows
    return self._file(array)

  def _chunks(self, rows: np.ndarray) -> Iterator[bytes]:
    dtype, _, layout = self._about
    each = layout.chunk_rows
    array = self._array([each, *self._tail], dtype)
    places = self._array([layout.shard_rows // each, 2], 'uint64')
    index = np.full(places.shape, NOWHERE, np.uint64)
    offset = 0
    for chunk, at in enumerate(range(0, len(rows), each)):
      part = rows[at : at + each]
      if len(part) < each:
        part = np.pad(
          part, [(0, each - len(part))] + [(0, 0)] * bool(self._tail)
        )
      data = self._encoded(array, part)
      index[chunk] = offset, len(data)
      offset += len(data)
      yield data
    yield self._encoded(places, index)

  def _array(self, shape: list[int], dtype: str) -> ts.TensorStore:
    """One chunk in memory, which is encoded as a shard's are."""
    grid = {'name': 'regular', 'configuration': {'chunk_shape': shape}}
    return self._memory(
      {
        'shape': shape,
        'data_type': dtype,
        'fill_value': 0,
        'chunk_grid': grid,
        'codecs': CODECS,
      }
    )

  def _memory(self, about: dict[str, Any]) -> ts.TensorStore:
    spec = {
      'driver': 'zarr3',
      'kvstore': {'driver': 'memory'},
      'metadata': about,
      'store_data_equal_to_fill_value': True,
    }
    context = ts.Context({'memory_key_value_store': {}})  # of its own
    return ts.open(spec, context=context, create=True).result()

  def _encoded(self, array: ts.TensorStore, values: np.ndarray) -> bytes:
    array.write(values).result()
    return self._file(array)

  def _file(self, array: ts.TensorStore) -> bytes:
    return array.kvstore['c' + '/0' * len(array.shape)]
