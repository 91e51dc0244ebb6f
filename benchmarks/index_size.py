"""An index of the paper's size at one tenth: memory, disk, time to answer.

    python -m benchmarks.index_size --folder=DIR     # 4,668 images

Synthetic codes (`codes.py`) are streamed into an index by one process: the
paper's 46,684 images of 576 base tokens, k=256, M=131,072, at one tenth. With
--tiles=48 each has AnyRes tiles as well. Run it again after it was killed: the
parts that stand are kept. Ends with 1 where a bound is broken: the process'
peak over what it held when it began, --memory_mb; the whole in 24 GB of memory
and 100 GB of disk; 50 ms for an answer, also by an index just opened.

Disk of the whole: the index is multiplied, though statistics, exemplars and
texts do not grow once each latent has its number. While it is merged its parts
stand as well: those made here, and for each further one as much as the largest
of the last three took. A part leaves out what others outdo, so they get smaller
as the work goes on, never larger but for chance.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import logging

from benchmarks import index_stream, machine
from benchmarks.codes import TEXT_VOCAB, Codes
from benchmarks.worker import peak_mb

IMAGES = 46_684  # the paper's
MEMORY_MB, DISK_GB, ANSWER_MS = 24_000, 100, 50
ASK = 40  # latents and samples asked for


def main() -> int:
  args = _arguments()
  logging.set_verbosity(logging.INFO)
  codes = Codes(
    args.latents, args.k, args.drawn, args.side, args.tiles, args.text
  )
  folder = args.folder or pathlib.Path(tempfile.gettempdir()) / 'index_size'
  if args.ask:
    print(json.dumps(answers(folder)))
    return 0
  found = machine.facts() | {'settings': vars(args) | {'folder': None}}
  found['settings'] = {
    name: value for name, value in found['settings'].items() if name != 'out'
  }
  found |= build(codes, args, folder)
  found['answers'] = ask(folder)
  found['whole'] = whole(found, args)
  print(json.dumps(found, indent=1))
  machine.save(found, args.out)
  broken = bounds(found, args)
  for line in broken:
    print(f'index_size: {line}', file=sys.stderr)
  return bool(broken)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--images', type=int, default=IMAGES // 10)
  parser.add_argument('--latents', type=int, default=131_072)
  parser.add_argument('--k', type=int, default=256)
  parser.add_argument('--drawn', type=int, default=16, help='of k, a sample')
  parser.add_argument('--side', type=int, default=24)
  parser.add_argument('--tiles', type=int, default=0, help='side of their grid')
  parser.add_argument('--text', type=int, default=24)
  parser.add_argument('--rows', type=int, default=4096)
  parser.add_argument('--part_samples', type=int, default=256)
  parser.add_argument('--memory_mb', type=int, default=2048)
  parser.add_argument('--folder', type=pathlib.Path, help='stays; to resume')
  parser.add_argument('--ask', action='store_true', help='an index that stands')
  parser.add_argument('--out', type=pathlib.Path, help='a JSON')
  return parser.parse_args()


def build(codes: Codes, args: argparse.Namespace, folder: pathlib.Path) -> dict:
  """Makes the index, or what is left of it."""
  folder.mkdir(parents=True, exist_ok=True)
  shape = index_stream.shape(codes.latents, codes.side)
  each = index_stream.chunk_samples(
    codes.latents, codes.k, codes.tokens, args.rows, args.memory_mb
  )
  begins = range(0, args.images, args.part_samples)
  _same(codes, args, folder)
  start_mb, spent, made, rest = peak_mb(), [0.0], 0, 0

  def told(first, stop):
    start = time.perf_counter()
    found = codes.samples(first, stop)
    spent[0] += time.perf_counter() - start
    return found

  start = time.perf_counter()
  parts_bytes = []
  if not (folder / 'meta.json').exists():
    for at in begins:
      stop = min(at + args.part_samples, args.images)
      spans = [(i, min(i + each, stop)) for i in range(at, stop, each)]
      stood = index_stream.part_file(folder, at).exists()
      index_stream.make_part(
        folder, at, shape, args.images, told, spans, args.memory_mb
      )
      made += 0 if stood else stop - at
      rest += stood
      logging.info('index_size: %d of %d images', stop, args.images)
    parts_bytes = [_bytes(index_stream.part_file(folder, at)) for at in begins]
    merging = time.perf_counter()
    index_stream.merge(
      folder,
      begins,
      shape,
      codes.k,
      args.images,
      TEXT_VOCAB,
      args.memory_mb,
    )
    merging = time.perf_counter() - merging
  else:
    merging = 0.0
  seconds = time.perf_counter() - start
  return {
    'images_added': made,
    'parts_found': rest,
    'tokens_per_s': made * codes.tokens / max(seconds - spent[0], 1e-9),
    'seconds': {'all': seconds, 'codes': spent[0], 'merge': merging},
    'start_mb': start_mb,
    'peak_mb': peak_mb(),
    'index_bytes': _bytes(folder),
    'parts_bytes': parts_bytes,
  }


def _same(codes: Codes, args: argparse.Namespace, folder: pathlib.Path) -> None:
  """Refuses to go on with other codes.

  Raises:
    ValueError: the folder was begun with others.
  """
  note = folder / 'codes.json'
  told = json.dumps(vars(codes) | {'images': args.images})
  if note.exists() and note.read_text() != told:
    raise ValueError(
      f'{folder} was begun with {note.read_text()}, now {told}: give another '
      '--folder, or delete it'
    )
  note.write_text(told)


def _bytes(folder: pathlib.Path) -> int:
  return sum(f.stat().st_size for f in folder.rglob('*') if f.is_file())


def ask(folder: pathlib.Path) -> dict:
  """Asks twice, from processes of their own: files not in memory, and in."""
  _drop(folder)
  words = [sys.executable, '-m', 'benchmarks.index_size', '--ask']
  words.append(f'--folder={folder}')
  found = {}
  for name in ('cold', 'warm'):
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    found[name] = json.loads(done.stdout)
  return found


def _drop(folder: pathlib.Path) -> None:
  """Drops what the page cache holds of the files, and of no others."""
  for path in folder.rglob('*.np[yz]'):
    with path.open('rb') as file:
      os.fsync(file.fileno())
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def answers(folder: pathlib.Path) -> dict:
  """Milliseconds to open an index, and for each thing asked of it."""
  from lmm_sae.core.index import LatentIndex

  start = time.perf_counter()
  index = LatentIndex.open(folder)
  opened = time.perf_counter() - start
  rng = np.random.default_rng(1)
  took = {'latent': [], 'sample': []}
  # The latents with the longest lists, and others that fire on images.
  images_M = index.stats['images_fired']
  most = np.argsort(-images_M, kind='stable')[: ASK // 4]
  some = rng.choice(np.flatnonzero(images_M), ASK - len(most))
  for latent in rng.permutation(np.concatenate([most, some])):
    start = time.perf_counter()
    for view in ('base', 'tile', 'text'):
      for array in index.postings(int(latent), view):
        array.sum()  # a mapped file is read where it is touched
    index.exemplars(int(latent))
    index.spread(int(latent))
    index.texts(int(latent))
    index.text_spread(int(latent))
    took['latent'].append(time.perf_counter() - start)
  for sample in rng.integers(0, index.num_samples, ASK):
    start = time.perf_counter()
    for array in index.sample(int(sample)):
      array.sum()
    took['sample'].append(time.perf_counter() - start)
  return {'open_ms': 1e3 * opened} | {
    f'{name}_ms': {
      'first': 1e3 * each[0],
      'median': 1e3 * float(np.median(each)),
      'most': 1e3 * max(each),
    }
    for name, each in took.items()
  }


def whole(found: dict, args: argparse.Namespace) -> dict:
  """The paper's size, by arithmetic: bytes an image, times its images."""
  factor = IMAGES / args.images
  index, parts = found['index_bytes'] * factor, found['parts_bytes']
  further = -(-max(IMAGES - args.images, 0) // args.part_samples)
  full = parts[:-1] or parts  # the last one may hold fewer images
  parts_whole = sum(parts) + further * max(full[-3:], default=0)
  return {
    'factor': factor,
    'index_gb': index / 1e9,
    'with_parts_gb': (index + parts_whole) / 1e9 if parts else None,
    'memory_mb': found['peak_mb'],
  }


def bounds(found: dict, args: argparse.Namespace) -> list[str]:
  """What is not as it must be, a line each."""
  broken = []
  own = found['peak_mb'] - found['start_mb']
  if own > args.memory_mb:
    broken.append(f'held {own:.0f} MB more; memory_mb is {args.memory_mb}')
  if found['peak_mb'] > MEMORY_MB:
    broken.append(f'held {found["peak_mb"]:.0f} MB of {MEMORY_MB}')
  disk_gb = found['whole']['with_parts_gb']
  if disk_gb is None:
    broken.append('the index stood: what its parts took is not known any more')
  elif disk_gb > DISK_GB:
    broken.append(
      f'the whole would take {disk_gb:.0f} GB while it is merged, of {DISK_GB}'
    )
  for name in ('cold', 'warm'):
    one = found['answers'][name]
    for what in ('latent_ms', 'sample_ms'):
      if (took := one['open_ms'] + one[what]['most']) > ANSWER_MS:
        broken.append(f'{name}: {what} {took:.0f} with opening')
  return broken


if __name__ == '__main__':
  sys.exit(main())
