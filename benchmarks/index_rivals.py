"""One way to index codes, in a process of its own.

    python -m benchmarks.index_rivals ours|paper|tuned JOB.json FOLDER

Reads the codes of all samples from mapped files, some samples at a time, and
leaves files under FOLDER from which a latent's images can be told. Prints
{seconds, peak_mb, start_mb, bytes} as JSON.

  paper  the method of arXiv 2411.14982 written plainly: each image's code is
         scattered to a dense [tokens, M], `nonzero` gives the places and
         values that are held in memory for all images, cut by latents into
         safetensors at the end; then each latent's mean by image, and its
         5 strongest images
  half   the same from float16
  tuned  never dense by token: the code added up straight into [M] an image;
         by image what fires, sorted by latent at the end. It has means and
         strongest images alone: no heat maps, texts, tiles or quantiles
  ours   the index of this package, whole: parts, merge, removal of parts
"""

import json
import pathlib
import sys
import time

import numpy as np

from benchmarks.worker import peak_mb
from lmm_sae.core.tokens import Kind

BEST = 5
SPLITS = 5  # files that the paper's cache is cut into
FIELDS = ('sample', 'position', 'token', 'kind', 'image', 'row', 'col')


def main() -> None:
  name, job, folder = sys.argv[1:]
  job, folder = json.loads(pathlib.Path(job).read_text()), pathlib.Path(folder)
  folder.mkdir(parents=True)
  way = WAYS[name]()
  start_mb, start = peak_mb(), time.perf_counter()
  way(job, folder)
  seconds = time.perf_counter() - start
  size = sum(f.stat().st_size for f in folder.rglob('*') if f.is_file())
  found = {'seconds': seconds, 'peak_mb': peak_mb(), 'start_mb': start_mb}
  print(json.dumps(found | {'bytes': size}))


def read(job: dict, first: int, stop: int):
  """(tokens, vals_NK, idx_NK) of some samples, from files."""
  each, k = job['tokens'], job['k']
  rows = (stop - first) * each

  def part(name, dtype, columns=1):
    return np.fromfile(
      pathlib.Path(job['codes']) / name,
      dtype,
      rows * columns,
      offset=first * each * columns * np.dtype(dtype).itemsize,
    )

  tokens = {name: part(name, np.int32) for name in FIELDS}
  vals_NK = part('vals', np.float32, k).reshape(rows, k)
  return tokens, vals_NK, part('idx', np.int32, k).reshape(rows, k)


def by_image(job: dict):
  """The codes of one sample after the other."""
  for sample in range(job['samples']):
    yield read(job, sample, sample + 1)


def ours():
  from benchmarks import index_stream

  def run(job: dict, folder: pathlib.Path) -> None:
    samples, latents, memory = job['samples'], job['latents'], job['memory_mb']
    shape = index_stream.shape(latents, job['side'])
    each = index_stream.chunk_samples(
      latents, job['k'], job['tokens'], job['rows'], memory
    )
    begins = range(0, samples, job['part_samples'])
    for at in begins:
      stop = min(at + job['part_samples'], samples)
      spans = [(i, min(i + each, stop)) for i in range(at, stop, each)]

      def codes(first, stop):
        return read(job, first, stop)

      index_stream.make_part(folder, at, shape, samples, codes, spans, memory)
    index_stream.merge(
      folder, begins, shape, job['k'], samples, job['vocab'], memory
    )

  return run


def paper(half: bool = False):
  import torch
  from safetensors.torch import save_file

  dtype = torch.float16 if half else torch.float32

  def run(job: dict, folder: pathlib.Path) -> None:
    latents, places, values = job['latents'], [], []
    for at, (tokens, vals_NK, idx_NK) in enumerate(by_image(job)):
      base = tokens['kind'] == Kind.BASE
      dense_PM = torch.zeros(int(base.sum()), latents, dtype=dtype)
      dense_PM.scatter_(
        1,
        torch.from_numpy(idx_NK[base]).long(),
        torch.from_numpy(vals_NK[base]).to(dtype),
      )
      place = dense_PM.nonzero()
      values.append(dense_PM[place[:, 0], place[:, 1]])
      image = torch.full((len(place), 1), at)
      places.append(torch.cat([image, place], dim=1))
    places, values = torch.cat(places), torch.cat(values)
    best = {}
    edges = torch.linspace(0, latents, SPLITS + 1).long()
    for i in range(SPLITS):
      inside = (places[:, 2] >= edges[i]) & (places[:, 2] < edges[i + 1])
      save_file(
        {'locations': places[inside], 'activations': values[inside]},
        folder / f'{i}.safetensors',
      )
      best |= _best(places[inside], values[inside].float(), job)
    (folder / 'best.json').write_text(json.dumps(best))

  return run


def _best(places, values, job: dict) -> dict[int, list]:
  """{latent: [(image, mean)]}, of every latent that fires."""
  import torch

  order = torch.argsort(places[:, 2], stable=True)
  image, latent = places[order, 0], places[order, 2]
  values = values[order]
  found, counts = torch.unique_consecutive(latent, return_counts=True)
  best, at = {}, 0
  for one, count in zip(found.tolist(), counts.tolist(), strict=True):
    mean = torch.zeros(job['samples']).index_add_(
      0, image[at : at + count], values[at : at + count]
    )
    top = torch.topk(mean / job['side'] ** 2, min(BEST, job['samples']))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    best[one] = [pair for pair in pairs if pair[1] > 0]
    at += count
  return best


def tuned():
  from safetensors.numpy import save_file

  def run(job: dict, folder: pathlib.Path) -> None:
    latents, images, means = [], [], []
    for at, (tokens, vals_NK, idx_NK) in enumerate(by_image(job)):
      base = tokens['kind'] == Kind.BASE
      total_M = np.bincount(
        idx_NK[base].reshape(-1),
        weights=vals_NK[base].reshape(-1),
        minlength=job['latents'],
      )
      found = np.flatnonzero(total_M)
      latents.append(found.astype(np.int32))
      means.append((total_M[found] / base.sum()).astype(np.float32))
      images.append(np.full(len(found), at, np.int32))
    latent, image, mean = map(np.concatenate, (latents, images, means))
    order = np.lexsort((-mean, latent))
    counts = np.bincount(latent, minlength=job['latents'])
    save_file(
      {
        'offset': np.concatenate([[0], np.cumsum(counts)]),
        'image': image[order],
        'mean': mean[order],
      },
      folder / 'index.safetensors',
    )

  return run


WAYS = {
  'ours': ours,
  'paper': paper,
  'half': lambda: paper(half=True),
  'tuned': tuned,
}


if __name__ == '__main__':
  main()
