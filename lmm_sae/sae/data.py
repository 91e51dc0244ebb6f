"""Rows of the store, mixed: what an SAE is trained on.

    blocks   runs of rows of one committed group, read in one piece, since a
             random read of single rows is some thirty times slower
    pools    many blocks from all over the store, their rows shuffled together
    batches  pools cut to size; what is left of a pool opens the next batch

A row of a kind that is not trained on (BOS, padding) leaves when its block is
read. The order follows from the seed, every epoch has its own, and the
iterator's state is a small JSON value from which it goes on exactly.
"""

from collections.abc import Sequence

import grain
import grain.experimental
import numpy as np

from lmm_sae.core import tokens
from lmm_sae.core.store import ActivationStore

READ_ROWS = 2**18  # kinds read at a time while blocks are counted


class Rows:
  """The rows of one layer that are of some kinds, in blocks.

  Which rows of a block are wanted is kept as bits: 13 MB for 100 M rows.

  Attributes:
    blocks: how many blocks hold a wanted row.
    count: wanted rows.

  Raises:
    ValueError: no row is of these kinds, or there is no such kind.
  """

  def __init__(
    self,
    store: ActivationStore,
    layer: int,
    kinds: Sequence[str],
    block_rows: int,
  ):
    self._store = store
    self._layer = layer
    wanted = np.zeros(256, bool)
    for name in kinds:
      wanted[[int(kind) for kind in tokens.kinds(name)]] = True
    piece = max(READ_ROWS // block_rows, 1) * block_rows
    parts = [
      self._cut(start, min(start + piece, last), wanted, block_rows)
      for first, last in store.ranges
      for start in range(first, last, piece)
    ]
    if not sum(len(starts) for starts, _, _ in parts):
      raise ValueError(
        f'{store.path} holds no row of the kinds {tuple(kinds)}: change '
        'train.kinds, or capture more'
      )
    starts, stops, bits = zip(*parts, strict=True)
    self._starts = np.concatenate(starts)
    self._stops = np.concatenate(stops)
    self._bits = np.concatenate(bits)
    self.blocks = len(self._starts)
    self.count = int(np.bitwise_count(self._bits).sum())

  def _cut(self, start: int, stop: int, wanted: np.ndarray, block_rows: int):
    """(starts, stops, bits) of the blocks between two rows."""
    kind_N = self._store.tokens(start, stop, names=('kind',))['kind']
    kept = np.pad(wanted[kind_N], (0, -len(kind_N) % block_rows))
    kept = kept.reshape(-1, block_rows)
    starts = start + block_rows * np.arange(len(kept))
    stops = np.minimum(starts + block_rows, stop)
    some = kept.any(1)
    return starts[some], stops[some], np.packbits(kept[some], axis=1)

  def read(self, block: int) -> np.ndarray:
    """The wanted rows of a block, bfloat16 [N, D]."""
    start, stop = int(self._starts[block]), int(self._stops[block])
    x_ND = self._store.read(self._layer, start, stop)
    kept_N = np.unpackbits(self._bits[block], count=stop - start)
    return x_ND if kept_N.all() else take(x_ND, np.flatnonzero(kept_N))

  def sample(self, count: int, seed: int) -> np.ndarray:
    """About `count` rows, a few from each of many blocks, bfloat16 [N, D]."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(self.blocks)[:256]
    each = -(-count // len(chosen))
    parts = []
    for block in chosen:
      x_ND = self.read(block)
      parts.append(take(x_ND, rng.permutation(len(x_ND))[:each]))
    return np.concatenate(parts)


def batches(
  rows: Rows, *, batch: int, pool_blocks: int, seed: int
) -> grain.DatasetIterator:
  """An endless iterator over batches, bfloat16 [batch, D].

  Its `get_state` and `set_state` are what a checkpoint needs.
  """

  def read(blocks, rng: np.random.Generator) -> np.ndarray:
    x_ND = np.concatenate([rows.read(block) for block in blocks])
    return take(x_ND, rng.permutation(len(x_ND)))

  pools = (
    grain.MapDataset.range(rows.blocks)
    .seed(seed)
    .shuffle()
    .repeat(None)
    .batch(pool_blocks, batch_fn=list)
    .random_map(read)
    .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
  )
  return iter(grain.experimental.RebatchIterDataset(pools, batch))


def take(x_ND: np.ndarray, at_N: np.ndarray, /) -> np.ndarray:
  """x[at]; through uint16, since numpy copies bfloat16 element by element."""
  if x_ND.dtype.itemsize != 2:
    return x_ND[at_N]
  return x_ND.view(np.uint16)[at_N].view(x_ND.dtype)
