"""Orbax checkpoints as files: what is in them, without orbax and a template.

Both its layouts, one tree in a folder or several items below it, with OCDBT or
a folder an array, zarr 2 or 3, by one process or many. Orbax itself gives the
shapes, too; the bytes on disk, what is missing, and blocks of rows it does not:

    _CHECKPOINT_METADATA      JSON: items, times, metrics, custom metadata
    [item/]_METADATA          JSON: the tree, with the kind of each leaf
    [item/]_sharding          JSON by base64 of the name: how a jax.Array lay
    [item/]array_metadatas/   one file a process
    [item/]manifest.ocdbt     root of a B+ tree: array/chunk -> bytes, in the
                              node itself or at a place in d/ or ocdbt.process_*
    [item/]ARRAY/             without OCDBT
    item/item                 an item that is JSON

The tree's leaves say how long every file must be, so that a checkpoint that was
cut is known for it while no array is read.
"""

import base64
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorstore as ts

from lmm_sae.sae import ocdbt
from lmm_sae.sae.stored import Array, damaged, read_json

TORN = '.orbax-checkpoint-tmp'  # in the name of a save under way, or killed
NOTE, TREE = '_CHECKPOINT_METADATA', '_METADATA'
SHARDING, PROCESSES, STRINGS = '_sharding', 'array_metadatas', '_strings'
MANIFEST = ocdbt.MANIFEST


@dataclasses.dataclass(frozen=True)
class Folder:
  """What an orbax checkpoint holds.

  Attributes:
    path: of it.
    note: `_CHECKPOINT_METADATA`; {} where there is none.
    arrays: of every item, in the order of the tree.
    values: {item.name: value} of leaves that are no arrays: strings, None,
      empty containers.
    documents: {item: value} of the items that are JSON.
    processes: that wrote it; None where it does not say.
    warnings: what is odd, and yet no damage, a line each.
  """

  path: pathlib.Path
  note: dict[str, Any]
  arrays: list[Array]
  values: dict[str, Any]
  documents: dict[str, Any]
  processes: int | None
  warnings: list[str]


def holds(path: pathlib.Path) -> bool:
  """Whether a folder is an orbax checkpoint, whole or damaged."""
  if any((path / name).is_file() for name in (NOTE, TREE, MANIFEST)):
    return True
  return any(
    (folder / name).is_file()
    for folder in path.iterdir()
    if folder.is_dir() and not (_step(folder) or (folder / NOTE).is_file())
    for name in (TREE, MANIFEST)
  )


def steps(path: pathlib.Path) -> dict[int, pathlib.Path]:
  """{step: folder} of the checkpoints in a folder of checkpoints, ascending."""
  found = {
    int(re.search(r'(\d+)$', folder.name)[1]): folder
    for folder in path.iterdir()
    if _step(folder) and holds(folder)
  }
  return dict(sorted(found.items()))


def _step(path: pathlib.Path) -> bool:
  """Whether a folder is named like a step: 500, or step_500."""
  return bool(re.fullmatch(r'(\w+[_-])?\d+', path.name)) and path.is_dir()


def read(path: pathlib.Path) -> Folder:
  """What stands in a checkpoint; no array is read.

  Raises:
    ValueError: it is damaged, or a save that was killed.
  """
  if TORN in path.name:
    raise ValueError(
      f'{path} is no checkpoint: a save that was killed left it behind'
    )
  root = path
  if not (path / NOTE).is_file() and (path.parent / NOTE).is_file():
    root = path.parent  # of whose items this is one
  note = read_json(root / NOTE) if (root / NOTE).is_file() else {}
  handlers = note.get('item_handlers') if isinstance(note, dict) else 0
  if not isinstance(handlers, dict | str | None):
    raise damaged(path, f'{NOTE} holds no checkpoint')
  for field in ('custom_metadata', 'metrics'):
    if not isinstance(note.get(field), dict | None):
      raise damaged(path, f'{NOTE} has {field} that is no object')
  items = {path.name: path} if root != path else _items(path, handlers)
  arrays, values, documents, ranks, warnings = [], {}, {}, {}, []
  for name, folder in items.items():
    if (folder / TREE).is_file():
      found, others = _tree(folder, name)
      arrays += found
      values |= {f'{name}.{k}' if name else k: v for k, v in others.items()}
      ranks[name] = _processes(folder)
    elif (document := _document(folder)) is not None:
      documents[name] = read_json(document)
    else:
      warnings.append(f'item {name} is of a kind that is not shown')
  if not note:
    if any(ranks.values()) and '' not in items:
      raise damaged(path, f'{NOTE} is missing')
    warnings.append(f'{NOTE} is missing: an item by itself, or of an old orbax')
  count = max((rank for rank in ranks.values() if rank), default=None)
  return Folder(path, note, arrays, values, documents, count, warnings)


def _items(path, handlers) -> dict[str, pathlib.Path]:
  """{name: folder}; '' is the checkpoint itself, where it is one tree."""
  if (path / TREE).is_file():
    return {'': path}
  if isinstance(handlers, str) or (path / MANIFEST).is_file():
    raise damaged(path, f'{TREE} is missing')
  items = {
    folder.name: folder for folder in sorted(path.iterdir()) if folder.is_dir()
  }
  for name, handler in (handlers or {}).items():
    if not isinstance(handler, str):
      raise damaged(path, f'{NOTE} names no handler of {name}')
    if name not in items:
      raise damaged(path, f'its item {name} is missing')
    trees = re.search('pytree|standard', handler, re.IGNORECASE)
    if trees and not (items[name] / TREE).is_file():
      raise damaged(path, f'{name}/{TREE} is missing')
    if 'json' in handler.lower() and _document(items[name]) is None:
      raise damaged(path, f'its item {name} holds nothing')
  for name, folder in items.items():
    if (folder / MANIFEST).is_file() and not (folder / TREE).is_file():
      raise damaged(path, f'{name}/{TREE} is missing')
  return items


def _document(folder: pathlib.Path) -> pathlib.Path | None:
  """The file of an item that is JSON, which orbax names as it likes."""
  names = ('metadata', 'metrics', folder.name, f'{folder.name}.json')
  files = [folder / name for name in names if (folder / name).is_file()]
  return files[0] if files else None


def _processes(folder: pathlib.Path) -> int | None:
  """How many processes wrote an item.

  Raises:
    ValueError: the note of one of them is missing or cut.
  """
  if not (folder / PROCESSES).is_dir():
    return None
  ranks = []
  for file in (folder / PROCESSES).iterdir():
    if rank := re.fullmatch(r'process_(\d+)', file.name):
      read_json(file)
      ranks.append(int(rank[1]))
  wrote = [x.name for x in folder.glob('ocdbt.process_*')]
  wanted = {int(name.rpartition('_')[2]) for name in wrote} | {0, *ranks}
  if len(ranks) != max(wanted) + 1:
    raise damaged(folder, f'{PROCESSES} lacks one of the processes')
  return len(ranks)


def _tree(folder, item) -> tuple[list[Array], dict[str, Any]]:
  """The leaves of an item: arrays, and values by name."""
  said = read_json(folder / TREE)
  try:
    leaves = {
      '.'.join(str(key['key']) for key in leaf['key_metadata']): leaf[
        'value_metadata'
      ]
      for leaf in said['tree_metadata'].values()
    }
    kinds = {
      name: (leaf['value_type'], leaf.get('skip_deserialize', False))
      for name, leaf in leaves.items()
    }
  except (KeyError, TypeError, AttributeError) as error:
    raise damaged(folder, f'{TREE} has no tree ({error})') from error
  database = said.get('use_ocdbt', (folder / MANIFEST).is_file())
  if not database:
    stored = dict(_folders(folder))
  elif (folder / MANIFEST).is_file():
    stored = ocdbt.database(folder)
  else:
    stored = {}
  sharded = _shardings(folder / SHARDING)
  strings = {}
  if any(kind == 'string' for kind, _ in kinds.values()):
    strings = read_json(folder / f'{STRINGS}.json')
    if not isinstance(strings, dict):
      raise damaged(folder, f'{STRINGS}.json holds no object')
  full = said.get('store_array_data_equal_to_fill_value', False)
  arrays, values = [], {}
  for name, (kind, skipped) in kinds.items():
    if kind == 'string':
      if name not in strings:
        raise damaged(folder, f'the string {name} is missing')
      values[name] = strings[name]
    elif skipped or kind in ('None', 'Dict', 'List', 'Tuple', 'NamedTuple'):
      values[name] = None if kind == 'None' else kind
    elif name in stored:
      arrays.append(_array(folder, item, name, stored[name], sharded, full))
    elif database and not (folder / MANIFEST).is_file():
      raise damaged(folder, f'{MANIFEST} is missing')
    else:
      raise damaged(folder, f'the array {name} is missing')
  return arrays, values


def _array(folder, item, name, stored, sharded, full) -> Array:
  try:
    meta = json.loads(stored.meta)
    shape = tuple(meta['shape'])
    if stored.driver == 'zarr':
      dtype, chunks = meta['dtype'], tuple(meta['chunks'])
    else:
      dtype = meta['data_type']
      chunks = tuple(meta['chunk_grid']['configuration']['chunk_shape'])
    dtype = np.dtype(dtype).name
    if not all(type(side) is int and side >= 0 for side in (*shape, *chunks)):
      raise ValueError(f'shape {shape} in chunks of {chunks}')
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise damaged(folder, f'{name} has no zarr metadata ({error})') from error
  if full:
    parts = zip(shape, chunks, strict=True)
    wanted = math.prod(-(-side // part) for side, part in parts if part)
    if stored.chunks != wanted and math.prod(shape):
      raise damaged(
        folder, f'{name} has {stored.chunks} of its {wanted} chunks'
      )
  base = {'driver': 'file', 'path': f'{folder}/'}
  kvstore = {**base, 'path': f'{folder}/{name}/'}
  if (folder / MANIFEST).is_file():
    kvstore = {'driver': 'ocdbt', 'base': base, 'path': f'{name}/'}
  spec = {'driver': stored.driver, 'kvstore': kvstore}
  return Array(
    name,
    shape,
    dtype,
    stored.size,
    lambda: _Opened(folder, spec),
    item,
    chunks,
    sharded.get(name),
  )


class _Opened:
  """A tensorstore whose errors name the checkpoint; `[start:stop]` reads."""

  def __init__(self, folder: pathlib.Path, spec: dict[str, Any]):
    self._folder = folder
    try:
      self._store = ts.open(spec, open=True, read=True).result()
    except ValueError as error:
      raise damaged(folder, error) from error

  def __getitem__(self, part: slice) -> np.ndarray:
    return self._read(self._store[part])

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del dtype, copy
    return self._read(self._store)

  def _read(self, store) -> np.ndarray:
    try:
      return store.read().result()
    except ValueError as error:
      raise damaged(self._folder, error) from error


def _folders(folder: pathlib.Path) -> Iterator[tuple[str, ocdbt.Stored]]:
  """{name: what is stored} where every array has a folder."""
  for meta in folder.rglob('*'):
    if meta.name not in ocdbt.META or not meta.is_file():
      continue
    files = [f for f in meta.parent.rglob('*') if f.is_file() and f != meta]
    for file in files:
      if not file.stat().st_size:
        raise damaged(folder, f'{file.relative_to(folder)} is empty')
    yield (
      str(meta.parent.relative_to(folder)),
      ocdbt.Stored(
        ocdbt.META[meta.name],
        meta.read_bytes(),
        sum(file.stat().st_size for file in files),
        len(files),
      ),
    )


def _shardings(file: pathlib.Path) -> dict[str, dict[str, Any]]:
  """{name: sharding} of an item, see `sharding`."""
  if not file.is_file():
    return {}
  try:
    return {
      base64.b64decode(name).decode(): sharding(json.loads(text))
      for name, text in read_json(file).items()
    }
  except (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
  ) as error:
    raise damaged(file.parent, f'{SHARDING}: {error}') from error


def sharding(said: dict[str, Any]) -> dict[str, Any]:
  """How an array lay on devices when it was written.

  {'mesh': {axis: devices}, 'spec': [axis, axes or None a dimension]}, or
  {'device': name}, or {'type': of another kind}.
  """
  if said['sharding_type'] == 'NamedSharding':
    axes = zip(said['axis_names'], said['shape'], strict=True)
    return {'mesh': dict(axes), 'spec': said['partition_spec']}
  if said['sharding_type'] == 'SingleDeviceSharding':
    return {'device': said['device_str']}
  return {'type': said['sharding_type']}
