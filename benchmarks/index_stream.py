"""Codes into the parts of an index and their merge, as the stage does it.

Only the encoder is left out: `codes` gives what it would. What is bounded by
memory_mb is bounded here as there.
"""

import pathlib
import shutil
from collections.abc import Callable, Sequence

import numpy as np

from lmm_sae.core import index_build, index_merge
from lmm_sae.core.index import IndexMeta

MB = 1 << 20
CHUNK_BYTES = 800  # a firing, while it is added; as in sae/index_parts.py
COPIES = 3  # of what a part holds, while it is sorted
EXEMPLARS, TEXTS, SPREAD = 10, 8, 10


def part_file(folder: pathlib.Path, at: int) -> pathlib.Path:
  return folder / 'parts' / f'{at:08d}'


def shape(latents: int, side: int) -> index_build.Shape:
  return index_build.Shape(
    latents=latents,
    grid=(side, side),
    exemplars=EXEMPLARS,
    texts=TEXTS,
    context=12,
    threshold=1e-5,
    spread=SPREAD,
  )


def chunk_samples(
  latents: int, k: int, tokens: int, rows: int, memory_mb: int
) -> int:
  """Whole samples that are added at a time.

  Raises:
    ValueError: the memory does not do for one sample.
  """
  free = max(memory_mb * MB - latents * index_build.LATENT_BYTES, 0)
  most = free // 2 // (k * CHUNK_BYTES) // tokens
  if most < 1:
    raise ValueError(
      f'memory_mb is {memory_mb}: too little for a sample of {tokens} tokens '
      f'with {k} latents each; give more'
    )
  return min(most, max(1, rows // tokens))


def make_part(
  folder: pathlib.Path,
  at: int,
  of: index_build.Shape,
  samples: int,
  codes: Callable,
  spans: Sequence[tuple[int, int]],
  memory_mb: int,
) -> None:
  """Makes the part that begins with sample `at`, unless it stands.

  Args:
    codes: (first, stop) -> (tokens, vals_NK, idx_NK) of those samples.
    spans: (first, stop) of the samples of the part that are added at a time.
  """
  path = part_file(folder, at)
  if path.exists():
    return
  floors = {}
  for other in folder.glob('parts/*'):
    if other.is_dir() and other.name.isdigit():
      for name in of.keeps():
        floor_M = np.load(other / f'floor.{name}.npy')
        floors[name] = np.maximum(floors.get(name, floor_M), floor_M)
  free = max(memory_mb * MB - of.latents * index_build.LATENT_BYTES, 0)
  part = index_build.Part(
    of, np.arange(samples), floors, path, free // 2 // COPIES
  )
  for span in spans:
    part.add(*codes(*span))
  part.save(path)


def merge(
  folder: pathlib.Path,
  begins: Sequence[int],
  of: index_build.Shape,
  k: int,
  samples: int,
  vocab: int,
  memory_mb: int,
) -> IndexMeta:
  """Merges the parts and removes them."""
  meta = IndexMeta(
    layer=0,
    split='b',
    latents=of.latents,
    k=k,
    samples=samples,
    images=0,
    grid=of.grid,
    rows=0,
    firings=0,
    threshold=of.threshold,
    always_on=0.5,
    source='synthetic',
  )
  done = index_merge.merge(
    folder,
    [part_file(folder, at) for at in begins],
    meta,
    (EXEMPLARS, TEXTS),
    np.arange(samples),
    [str(i) for i in range(vocab)],
    SPREAD,
    memory_mb,
  )
  shutil.rmtree(folder / 'parts')
  return done
