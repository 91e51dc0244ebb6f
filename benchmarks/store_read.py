"""Reading a store in mixed blocks beside the disk's own sequential rate.

    python -m benchmarks.store_read --folder=DIR_ON_THE_DISK --out=FILE.json

For each width and dtype a store is written, and read again in turns, each from
a page cache that was dropped:

  sequential  the files of the layer, one after the other, in large pieces, as
              fast as the disk and the kernel's readahead give them
  blocks      `ActivationStore.read_many` of every block, in shuffled order
  trainer     `sae.data.batches`, as a training step asks for them: shares that
              read in threads of their own, pools whose rows are mixed, arrays
              on the device; until every block was read once

A rate is the layer's bytes over seconds, medians over the turns but the first,
which warms what lies below the machine. Of writing, a committed group stands
beside as many bytes written to one file, each synced.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np

from benchmarks import machine, worker
from lmm_sae.core import forecast, grid, host
from lmm_sae.core.grid import TOKENS
from lmm_sae.core.store import ActivationStore, StoreMeta
from lmm_sae.core.tokens import Kind
from lmm_sae.sae import data
from lmm_sae.sae import mesh as mesh_lib
from lmm_sae.sae.options import TrainConfig

DROP = pathlib.Path('/proc/sys/vm/drop_caches')
PIECE = 2**23  # bytes a sequential read asks for
BLOCK_ROWS = 256
LAYER = 24


class Counted(data.Rows):
  """Rows that count how many of their blocks were read."""

  read_blocks = 0

  def read_many(self, blocks):
    for x_ND in super().read_many(blocks):
      self.read_blocks += 1  # a turn ends at or just after the last of them
      yield x_ND


def main() -> None:
  args = _arguments()
  host.keep_freed_memory()  # as the stage `train` does
  found = {
    **machine.facts(),
    'versions': worker.versions(),
    'folder': {'disk': _disk(args.folder), 'caches': _how()},
    'runs': [],
  }
  for width in map(int, args.widths.split(',')):
    for dtype in args.dtypes.split(','):
      with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = measure(pathlib.Path(folder), width, dtype, args)
      found['runs'].append(run)
      print(table(run), flush=True)
  machine.save(found, args.out)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--folder', default=tempfile.gettempdir(), help='on the disk that is meant'
  )
  parser.add_argument('--gib', type=float, default=1.0, help='of a bf16 layer')
  parser.add_argument('--widths', default='4096,192')
  parser.add_argument('--dtypes', default='bfloat16,int8')
  parser.add_argument('--shard_rows', type=int, default=32_768)
  parser.add_argument('--turns', type=int, default=6)
  parser.add_argument('--shares', default='8,1', help='train.data_shares')
  parser.add_argument('--pool_blocks', type=int, default=64)
  parser.add_argument('--out', type=pathlib.Path, help='a JSON')
  return parser.parse_args()


def measure(
  folder: pathlib.Path, width: int, dtype: str, args: argparse.Namespace
) -> dict:
  """One store, written and read: what each way took, by turn."""
  groups = max(1, round(args.gib * 2**30 / (2 * width * args.shard_rows)))
  writes = write(folder / 'store', width, dtype, groups, args.shard_rows)
  store = ActivationStore.open(folder / 'store')
  files = layer_files(folder / 'store')
  size = sum(file.stat().st_size for file in files)
  rows = Counted(store, LAYER, ('all', 'bos'), BLOCK_ROWS)
  ways: dict[str, Callable[[], None]] = {
    'sequential': lambda: sequential(files),
    'blocks': lambda: blocks(rows),
  }
  for shares in map(int, args.shares.split(',')):
    ways[f'trainer, {shares} shares'] = lambda shares=shares: trainer(
      rows, shares, args.pool_blocks
    )
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for turn in range(args.turns):
    names = list(ways)
    for name in names if turn % 2 else names[::-1]:
      drop(folder)
      start = time.perf_counter()
      ways[name]()
      seconds[name].append(time.perf_counter() - start)
  rates = {
    name: size / 1e6 / float(np.median(each[1:] or each))
    for name, each in seconds.items()
  }
  return {
    'settings': {
      'width': width,
      'dtype': dtype,
      'rows': store.num_rows,
      'layer_bytes': size,
      'block_rows': BLOCK_ROWS,
      'shard_rows': args.shard_rows,
      'pool_blocks': args.pool_blocks,
      'turns': args.turns,
    },
    'read_mb_per_s': rates,
    'of_sequential': {
      name: rate / rates['sequential'] for name, rate in rates.items()
    },
    'read_seconds': seconds,
    'write_mb_per_s': writes,
  }


# Writing.


def write(
  path: pathlib.Path, width: int, dtype: str, groups: int, shard_rows: int
) -> dict[str, float]:
  """Writes the store; MB/s of its groups, and of one file of as many bytes."""
  rng = np.random.default_rng(0)
  x_ND = rng.standard_normal((shard_rows, width), np.float32)
  x_ND = x_ND.astype(ml_dtypes.bfloat16)
  meta = StoreMeta(
    split='train',
    model='none',
    fingerprint='none',
    layers=(LAYER,),
    layer_paths={str(LAYER): 'none'},
    width=width,
    grid=(0, 0),
    image_backend='none',
    mixed=True,
    dtype=dtype,
  )
  store = ActivationStore.create(
    path,
    meta,
    groups=groups,
    group_rows=shard_rows,
    shard_rows=shard_rows,
    chunk_rows=BLOCK_ROWS,
  )
  fields = grid.fields((LAYER,), width, dtype)
  size = forecast.group_bytes(shard_rows, fields, shard_rows, BLOCK_ROWS)
  plain = memoryview(x_ND.view(np.uint8).reshape(-1))[:size]
  ours, beside = [], []
  for group in range(groups):
    tokens = _tokens(shard_rows)
    start = time.perf_counter()
    store.write_group(group, {LAYER: x_ND}, tokens, [], [])
    ours.append(time.perf_counter() - start)
    start = time.perf_counter()
    _plain(path.with_name('plain.bin'), plain)
    beside.append(time.perf_counter() - start)
  store.seal()
  return {
    'group': size / 1e6 / float(np.median(ours)),
    'one file': len(plain) / 1e6 / float(np.median(beside)),
  }


def _tokens(count: int) -> dict[str, np.ndarray]:
  """Token arrays that hold something in every field."""
  found = {}
  for name, (dtype, columns) in TOKENS.items():
    shape = (count, columns) if columns else (count,)
    found[name] = np.full(shape, 1, dtype)
  found['kind'][:] = Kind.BASE
  return found


def _plain(file: pathlib.Path, content: memoryview) -> None:
  with file.open('wb') as out:
    for at in range(0, len(content), PIECE):
      out.write(content[at : at + PIECE])
    out.flush()
    os.fsync(out.fileno())
  file.unlink()


# Reading.


def layer_files(path: pathlib.Path) -> list[pathlib.Path]:
  """The shards of the layer, with its scales where it has some, in order."""
  found = [
    file
    for folder in path.iterdir()
    if folder.is_dir() and folder.name.endswith(f'_{LAYER}')
    for file in (folder / 'c').rglob('*')
    if file.is_file()
  ]
  return sorted(found, key=lambda file: (len(str(file)), file))


def sequential(files: list[pathlib.Path]) -> None:
  piece = memoryview(bytearray(PIECE))
  for file in files:
    with file.open('rb', buffering=0) as data_in:
      os.posix_fadvise(data_in.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
      while data_in.readinto(piece):
        pass


def blocks(rows: data.Rows) -> None:
  """Every block once, in shuffled order."""
  for _ in rows.read_many(np.random.default_rng(1).permutation(rows.blocks)):
    pass


def trainer(rows: Counted, shares: int, pool_blocks: int) -> None:
  """Batches as the trainer gets them, until all blocks were read once."""
  options = dataclasses.replace(
    _train_options(), data_shares=shares, pool_blocks=pool_blocks
  )
  last = rows.read_blocks + rows.blocks
  batches = data.batches(rows, options, 0, mesh_lib.make(1))
  while rows.read_blocks < last:
    next(batches)
  batches.close()


def _train_options() -> TrainConfig:
  from experiments import base

  return TrainConfig(**base.get_config().train)


def drop(folder: pathlib.Path) -> None:
  """Drops what the page cache holds of the files below a folder."""
  os.sync()
  if os.access(DROP, os.W_OK):
    DROP.write_text('1\n')
    return
  for file in folder.rglob('*'):
    if file.is_file():
      with file.open('rb') as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _how() -> str:
  if os.access(DROP, os.W_OK):
    return 'dropped through /proc/sys/vm/drop_caches'
  return 'dropped by posix_fadvise, file by file'


def _disk(folder: str) -> str:
  """What the folder lies on, as far as the system says."""
  device = os.stat(folder).st_dev
  name = pathlib.Path(f'/sys/dev/block/{os.major(device)}:{os.minor(device)}')
  free = shutil.disk_usage(folder).free / 2**30
  if not name.exists():
    return f'unknown, {free:.0f} GiB free'
  queue = name / 'queue'
  if not queue.exists():  # a partition: its disk stands above it
    queue = name.resolve().parent / 'queue'
  ahead = (queue / 'read_ahead_kb').read_text().strip()
  return f'{name.resolve().name}, {ahead} KiB readahead, {free:.0f} GiB free'


def table(run: dict) -> str:
  """In words, a line a way."""
  settings = run['settings']
  lines = [
    f'D={settings["width"]} {settings["dtype"]}: '
    f'{settings["rows"]:,} rows, {settings["layer_bytes"] / 1e6:.0f} MB'
  ]
  lines += [
    f'  {name:<20}{rate:>8.0f} MB/s {run["of_sequential"][name]:>7.0%}'
    for name, rate in run['read_mb_per_s'].items()
  ]
  writes = run['write_mb_per_s']
  return '\n'.join(
    [
      *lines,
      f'  {"write: one file":<20}{writes["one file"]:>8.0f} MB/s',
      f'  {"write: groups":<20}{writes["group"]:>8.0f} MB/s '
      f'{writes["group"] / writes["one file"]:>7.0%}',
    ]
  )


if __name__ == '__main__':
  main()
