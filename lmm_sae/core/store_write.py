"""How a group of rows becomes the shards of a store, and its manifest line."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lmm_sae.core import records, store_rows
from lmm_sae.core.grid import Layout
from lmm_sae.core.store_arrays import Arrays
from lmm_sae.core.store_meta import StoreMeta
from lmm_sae.core.tokens import Kind

SHARDS = 2  # that are encoded and written at a time


def check_shapes(
  fields: Mapping[str, tuple[str, int]],
  values: Mapping[str, np.ndarray],
  group_rows: int,
) -> None:
  """Refuses arrays that are not all of the same rows, or too many.

  Raises:
    ValueError: which one, and its shape.
  """
  count = len(values['sample'])
  if count > group_rows:
    raise ValueError(f'{count} rows do not fit a group of {group_rows}')
  for name, rows in values.items():
    _, columns = fields[name]
    shape = (count, columns) if columns else (count,)
    if rows.shape != shape:
      raise ValueError(f'{name} has shape {rows.shape}, not {shape}')


def placed(
  sample: records.Sample,
  meta: StoreMeta,
  layout: Layout,
  group: int,
  count: int,
) -> records.Sample:
  """The sample with its group, its rows counted from the store's first.

  Raises:
    ValueError: its rows are not among the group's `count`, or, of a mixed
      store, are named at all.
  """
  span = (sample.start, sample.stop)
  if meta.mixed:
    if span != (-1, -1):
      raise ValueError(
        f'sample {sample.sample} has rows {span} in a mixed store, where both '
        'are -1'
      )
    return dataclasses.replace(sample, group=group)
  if not 0 <= span[0] <= span[1] <= count:
    raise ValueError(
      f'sample {sample.sample} has rows {span} of a group of {count}'
    )
  base = group * layout.group_rows
  return dataclasses.replace(
    sample, group=group, start=base + span[0], stop=base + span[1]
  )


def write(
  arrays: Arrays,
  values: Mapping[str, np.ndarray],
  meta: StoreMeta,
  layout: Layout,
  group: int,
) -> dict[str, Any]:
  """Writes the shards of a group; what its manifest line says of its rows.

  Args:
    values: of all arrays but the scales, [N] or [N, columns].

  Raises:
    ValueError: int8 is asked of NaN or Inf, or the place cannot be written.
  """
  count = len(values['sample'])
  kept_N = np.asarray(values['kind']) != Kind.BOS
  tasks = [
    (name, shard, slice(start, stop))
    for shard, start, stop in layout.spans(group, count)
    for name in values
  ]

  def one(task) -> tuple[dict[str, int], store_rows.Spread | None]:
    name, shard, at = task
    rows = values[name][at]
    if not name.startswith('layer_') or meta.dtype == 'bfloat16':
      return {name: arrays.write(name, shard, rows)}, None
    try:
      codes_ND, scale_N = store_rows.to_int8(rows)
    except ValueError as error:
      raise ValueError(f'{name}, from row {at.start} on: {error}') from error
    spread = store_rows.Spread.of(rows, codes_ND, scale_N, kept_N[at])
    scale = name.replace('layer_', 'scale_')
    return {
      name: arrays.write(name, shard, codes_ND),
      scale: arrays.write(scale, shard, scale_N),
    }, spread

  sizes: dict[str, list[int]] = {name: [] for name in arrays.fields}
  spreads = {str(layer): store_rows.Spread() for layer in meta.layers}
  for (name, _, _), (written, spread) in zip(
    tasks, _side_by_side(one, tasks), strict=True
  ):
    for each, size in written.items():
      sizes[each].append(size)
    if spread is not None:
      spreads[name.removeprefix('layer_')].add(spread)
  arrays.delete(group, count)  # what an earlier capture may have left
  kinds = np.bincount(values['kind'], minlength=len(Kind))
  base = group * layout.group_rows
  line = {
    'group': group,
    'start': base,
    'stop': base + count,
    'kinds': {
      kind.name.lower(): int(kinds[kind]) for kind in Kind if kinds[kind]
    },
    'bytes': sizes,
  }
  if meta.dtype == 'int8':
    line['rounding'] = {layer: each.sums() for layer, each in spreads.items()}
  return line


def _side_by_side(work: Callable, tasks: list) -> Iterator:
  """What comes of each task, in order; the first error ends it."""
  pool = ThreadPoolExecutor(SHARDS)
  try:
    yield from pool.map(work, tasks)
  finally:
    pool.shutdown(cancel_futures=True)
