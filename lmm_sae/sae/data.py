"""Rows of the store, mixed: what an SAE is trained on.

    blocks   runs of rows of one committed group, read in one piece, since a
             random read of single rows is some thirty times slower
    shares   every S-th block of the shuffled order each; a batch holds as many
             rows of one share as of another
    pools    many blocks of a share, from all over the store, their rows
             shuffled together
    batches  pools cut to size; what is left of a pool opens the next batch

A row of a kind that is not trained on (BOS, padding) leaves when its block is
read. The order follows from the seed, every epoch has its own. How many shares
there are is a setting of the run: a process reads those that its devices hold,
so batches are the same however many processes and devices share the work, and
two numbers a share, its pool and the row in it, say where to go on exactly.
"""

from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np

from lmm_sae.core import tokens
from lmm_sae.core.store import ActivationStore
from lmm_sae.sae import mesh as mesh_lib
from lmm_sae.sae.options import TrainConfig

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
    (x_ND,) = self.read_many([block])
    return x_ND

  def read_many(self, blocks: Sequence[int]) -> Iterator[np.ndarray]:
    """The wanted rows of each of these blocks, some read at a time."""
    spans = [(int(self._starts[at]), int(self._stops[at])) for at in blocks]
    read = self._store.read_many(self._layer, spans)
    for block, x_ND in zip(blocks, read, strict=True):
      kept_N = np.unpackbits(self._bits[block], count=len(x_ND))
      yield x_ND if kept_N.all() else take(x_ND, np.flatnonzero(kept_N))

  def mixed(
    self, blocks: Sequence[int], rng: np.random.Generator
  ) -> np.ndarray:
    """The wanted rows of these blocks in a random order, bfloat16 [N, D].

    Each row is copied once, from its block to its place.
    """
    count = int(np.bitwise_count(self._bits[list(blocks)]).sum())
    place_N = np.empty(count, np.int64)
    place_N[rng.permutation(count)] = np.arange(count)
    out_ND, at = None, 0
    for x_ND in self.read_many(blocks):
      if out_ND is None:
        out_ND = np.empty((count, x_ND.shape[1]), x_ND.dtype)
      bits_ND = out_ND.view(np.uint16) if x_ND.dtype.itemsize == 2 else out_ND
      bits_ND[place_N[at : at + len(x_ND)]] = x_ND.view(bits_ND.dtype)
      at += len(x_ND)
    return out_ND

  def sample(self, count: int, seed: int) -> np.ndarray:
    """About `count` rows, a few from each of many blocks, bfloat16 [N, D].

    Rows with NaN or Inf are left out: a step skips them, a start could not.

    Raises:
      ValueError: nothing is left.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(self.blocks)[:256]
    each = -(-count // len(chosen))
    parts = []
    for block in chosen:
      x_ND = self.read(block)
      parts.append(take(x_ND, rng.permutation(len(x_ND))[:each]))
    x_ND = np.concatenate(parts)
    finite_N = np.isfinite(x_ND.astype(np.float32)).all(1)
    if not finite_N.any():
      raise ValueError(
        f'no row of layer {self._layer} in {self._store.path} is finite, of '
        f'{len(x_ND)} that were looked at: capture it again'
      )
    return x_ND if finite_N.all() else take(x_ND, np.flatnonzero(finite_N))


class Share:
  """The rows of one share, endless, from a place in it on.

  Attributes:
    pool, row: the pool that is being read and the first row of it not yet read.
  """

  def __init__(self, pools: grain.MapDataset, pool: int = 0, row: int = 0):
    self.pool = pool
    self.row = row
    # The pool after the one in use is read meanwhile.
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    self._pools = iter(pools[pool:].to_iter_dataset(ahead))
    self._rows_ND: np.ndarray | None = None

  def read(self, count: int) -> np.ndarray:
    """The next `count` rows, bfloat16 [N, D]."""
    parts = []
    while count:
      if self._rows_ND is None:
        self._rows_ND = next(self._pools)
      part_ND = self._rows_ND[self.row : self.row + count]
      parts.append(part_ND)
      count -= len(part_ND)
      self.row += len(part_ND)
      if self.row == len(self._rows_ND):
        self.pool, self.row, self._rows_ND = self.pool + 1, 0, None
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def pools(
  rows: Rows, *, share: int, shares: int, pool_blocks: int, seed: int
) -> grain.MapDataset:
  """The pools of a share, endless, bfloat16 [N, D] each.

  Args:
    rows: of the store.
    share: which, of `shares`.
    shares: how many there are.
    pool_blocks: blocks in one pool of every share together.
    seed: of the order.
  """

  order = grain.MapDataset.range(rows.blocks).seed(seed).shuffle().repeat(None)
  return (
    order[share::shares]
    .batch(pool_blocks // shares, batch_fn=list)
    .random_map(rows.mixed)
  )


def batches(
  rows: Rows,
  options: TrainConfig,
  seed: int,
  mesh: jax.sharding.Mesh,
  places_S2: jax.Array | None = None,
) -> Iterator[tuple[jax.Array, jax.Array]]:
  """Endless (batch, places after it), both on the mesh, split by share.

  Args:
    rows: of the store.
    options: of the run.
    seed: of the order.
    mesh: where batches are wanted.
    places_S2: the pool and the row at which each share goes on, int32 [S, 2],
      as they came with the last batch; None to begin.

  Yields:
    A batch, bfloat16 [train.rows, D], on the devices, and the places.
  """
  count = options.data_shares
  sharding = mesh_lib.sharding(mesh, mesh_lib.ROWS)
  shares = {
    share: Share(
      pools(
        rows,
        share=share,
        shares=count,
        pool_blocks=options.pool_blocks,
        seed=seed,
      ),
      *place,
    )
    for share, place in _begin(count, sharding, places_S2).items()
  }
  each = options.rows // count
  while True:
    read = {at: share.read(each) for at, share in shares.items()}
    after = {
      at: np.array([[share.pool, share.row]], np.int32)
      for at, share in shares.items()
    }
    yield jax.block_until_ready(
      (_whole(read, count, sharding), _whole(after, count, sharding))
    )


def check(options: TrainConfig, mesh: jax.sharding.Mesh) -> None:
  """Refuses shares that batches, pools or devices cannot be made of.

  Raises:
    ValueError: one of them is no multiple of the other.
  """
  shares = options.data_shares
  for field in ('rows', 'pool_blocks'):
    if getattr(options, field) % shares:
      raise ValueError(
        f'train.{field} is {getattr(options, field)}, which the {shares} '
        f'shares of train.data_shares do not divide: make it a multiple'
      )
  parts = mesh.shape[mesh_lib.DATA]
  if shares % parts:
    raise ValueError(
      f'train.data_shares is {shares}, which {parts} devices (or groups of '
      'train.latent_shards devices) cannot divide among them: make it a '
      f'multiple of {parts}; runs that go on from one another have the same'
    )


def _begin(
  count: int, sharding: jax.sharding.Sharding, places_S2: jax.Array | None
) -> dict[int, tuple[int, int]]:
  """{share: its pool and row} of the shares on this process's devices."""
  if places_S2 is None:
    held = sharding.addressable_devices_indices_map((count, 2)).values()
    return {
      share: (0, 0) for at in held for share in range(*at[0].indices(count))
    }
  return {
    (shard.index[0].start or 0) + at: (int(pool), int(row))
    for shard in places_S2.addressable_shards
    for at, (pool, row) in enumerate(np.asarray(shard.data))
  }


def _whole(
  parts: dict[int, np.ndarray], count: int, sharding: jax.sharding.Sharding
) -> jax.Array:
  """The array whose `count` equal parts lie where their devices want them."""
  each, *tail = next(iter(parts.values())).shape

  def of(index: tuple[slice, ...]) -> np.ndarray:
    start, stop, _ = index[0].indices(count * each)
    found = [parts[at] for at in range(start // each, stop // each)]
    return found[0] if len(found) == 1 else np.concatenate(found)

  return jax.make_array_from_callback((count * each, *tail), sharding, of)


def take(x_ND: np.ndarray, at_N: np.ndarray, /) -> np.ndarray:
  """x[at]; through uint16, since numpy copies bfloat16 element by element."""
  if x_ND.dtype.itemsize != 2:
    return x_ND[at_N]
  return x_ND.view(np.uint16)[at_N].view(x_ND.dtype)
