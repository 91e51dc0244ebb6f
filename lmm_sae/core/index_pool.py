"""Pools the firings of some rows by sample and latent."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lmm_sae.core.ragged import Ragged
from lmm_sae.core.tokens import Kind


@dataclasses.dataclass(frozen=True)
class Firings:
  """Every firing of some rows, one entry each: which row, latent and value."""

  row: np.ndarray
  latent: np.ndarray
  value: np.ndarray

  def take(self, chosen: np.ndarray) -> 'Firings':
    return Firings(self.row[chosen], self.latent[chosen], self.value[chosen])


@dataclasses.dataclass(frozen=True)
class Pooled:
  """The firings of one view, pooled by sample and latent.

  `pair` = sample * M + latent, rising; total, most and count are over its
  firings, which stand in `cells` from `start`.
  """

  pair: np.ndarray
  start: np.ndarray
  count: np.ndarray
  total: np.ndarray
  most: np.ndarray
  cells: dict[str, np.ndarray]

  def lists(self, wanted: np.ndarray) -> Ragged:
    """{cell, value} of each wanted pair; no list where it does not fire."""
    if not len(self.pair):
      nowhere = np.zeros(len(wanted), np.int64)
      return Ragged.cut(self.cells, nowhere, nowhere)
    place = np.minimum(np.searchsorted(self.pair, wanted), len(self.pair) - 1)
    count = np.where(self.pair[place] == wanted, self.count[place], 0)
    return Ragged.cut(self.cells, self.start[place], count)


def pool(
  tokens: dict[str, np.ndarray],
  fired: Firings,
  cell: np.ndarray,
  kinds: Sequence[Kind],
  latents: int,
) -> Pooled:
  """The firings of some kinds; `cell` says where each row stands."""
  some = fired.take(np.isin(tokens['kind'][fired.row], kinds))
  pair = tokens['sample'][some.row] * latents + some.latent
  order = np.lexsort((cell[some.row], pair))
  pair, value = pair[order], some.value[order]
  start = np.flatnonzero(np.diff(pair, prepend=-1))
  cells = {'cell': cell[some.row][order].astype(np.int32), 'value': value}
  if not len(pair):
    empty = np.zeros(0, np.int64)
    return Pooled(empty, empty, empty, empty, empty, cells)
  return Pooled(
    pair[start],
    start,
    np.diff(start, append=len(pair)),
    np.add.reduceat(value.astype(np.float64), start),
    np.maximum.reduceat(value, start),
    cells,
  )


def tile_grids(tokens: dict[str, np.ndarray]) -> np.ndarray:
  """(rows, cols) of the tiles' grid, [S, 2] from the lowest sample on."""
  sample, tile = tokens['sample'], tokens['kind'] == Kind.TILE
  low = sample.min()
  grids = np.zeros((sample.max() - low + 1, 2), np.int32)
  for axis, name in enumerate(('row', 'col')):
    np.maximum.at(
      grids[:, axis],
      sample[tile] - low,
      tokens[name][tile].astype(np.int32) + 1,
    )
  return grids


def context_keys(
  token_T: np.ndarray, begin_T: np.ndarray, reach: int
) -> np.ndarray:
  """A 64-bit hash of each token and up to `reach` tokens before it."""
  place = np.arange(len(token_T))
  key = np.zeros(len(token_T), np.uint64)
  for back in range(reach, -1, -1):
    before = place - back
    inside = before >= begin_T
    token = np.where(inside, token_T[np.maximum(before, 0)] + 1, 0)
    key = (key ^ token.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    key ^= key >> np.uint64(29)
  return key.view(np.int64)


def look_up(
  keys: np.ndarray, values: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
  """The value of each wanted key, 0 where it is not among the keys."""
  order = np.argsort(keys)
  place = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
  found = keys[order[place]] == wanted
  return np.where(found, values[order[place]], 0).astype(np.float32)
