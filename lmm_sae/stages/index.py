"""Finds, for every latent, the images and tokens that fire it.

Streams acts/<split> through the SAE's encoder and writes index/<layer>/<split>
(see `core.index`). Done in parts of consecutive samples, by index.processes of
this machine or by several commands with index.share=i/n on one workdir: run it
again and the finished parts are kept; who ends last merges them. Where masks
and labels are exact, it also writes concepts.json: what each latent stands for,
by the rule of `core.truth`. Maps and concepts are of a sample's first image.

With index.latent=M or index.sample=S it prints what the index of each layer
knows of that latent or sample, and makes nothing.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

from absl import logging
from ml_collections import ConfigDict

from lmm_sae.core import index_merge, index_text
from lmm_sae.core.index import IndexMeta, LatentIndex, read_meta
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import concept_table, exports, index_parts, index_plan
from lmm_sae.sae.baseview import check_one_grid
from lmm_sae.sae.index_plan import IndexConfig, Job


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Indexes every configured split of every hooked layer."""
  opts = IndexConfig(**config.index)
  if opts.latent >= 0 or opts.sample >= 0:
    for text in answers(workdir, tuple(config.lmm.layers), opts):
      print(text)
    return
  if {'a', 'b'} <= set(opts.splits):
    layers = tuple(config.lmm.layers)
    concept_table.write(workdir, layers, opts.dictionaries, config.seed)
  for layer in config.lmm.layers:
    for dictionary in ('', *opts.dictionaries):
      sae = None
      for split in opts.splits:
        acts = workdir.require(workdir.acts(split), 'capture')
        path = workdir.index(layer, split, dictionary)
        job = Job(path, acts, workdir, layer, dictionary, opts, config.seed)
        sae = sae or job.sae()
        build(job, ActivationStore.open(acts), sae)


def answers(
  workdir: Workdir, layers: tuple[int, ...], opts: IndexConfig
) -> Iterator[str]:
  """What each index knows of the latent and the sample asked about."""
  for layer in layers:
    for dictionary in ('', *opts.dictionaries):
      for split in opts.splits:
        index = LatentIndex.open(
          workdir.require(workdir.index(layer, split, dictionary), 'index')
        )
        if opts.latent >= 0:
          yield index_text.latent(index, opts.latent)
        if opts.sample >= 0:
          yield index_text.sample(index, opts.sample)


def build(job: Job, store: ActivationStore, sae: exports.Sae) -> None:
  """Builds the index of one split, or what is left to do of this share.

  Raises:
    ValueError: an index of something else stands there, there is nothing to
      index, a sample's rows are mixed or not all there, its images have grids
      of their own, or the memory does not do for one sample.
  """
  samples, opts = store.samples(), job.opts
  if not samples:
    raise ValueError(f'{store.path} holds no sample: there is nothing to index')
  check_one_grid(store)
  spans = [store.span(sample) for sample in samples]
  meta = IndexMeta(
    layer=job.layer,
    split=store.meta.split,
    latents=sae.config.latents,
    k=sae.config.most,
    samples=samples[-1].sample + 1,
    images=0,
    grid=store.meta.grid,
    rows=0,
    firings=0,
    threshold=opts.threshold,
    always_on=opts.always_on,
    source=index_plan.source(store, opts, sae),
  )
  if _finished(job.path, meta):
    logging.info('index: %s is complete', job.path)
    return
  job.shape(store, meta.latents)  # refuses settings before work begins
  plan = index_plan.draft(meta.source, spans, meta.latents, meta.k, opts)
  plan = index_plan.agree(job, plan)
  index_parts.near_duplicates(job, store)
  index_parts.make(job, plan, sae)
  with _alone(job.path):
    if _finished(job.path, meta):
      logging.info('index: another command has merged %s', job.path)
      return
    parts = [job.part(at) for at in plan.begins]
    missing = sum(not part.exists() for part in parts)
    if missing:
      logging.info(
        'index: %s: %d of %d parts are left to other shares',
        job.path,
        missing,
        len(parts),
      )
      return
    done = index_merge.merge(
      job.path,
      parts,
      meta,
      (opts.exemplars, opts.text_exemplars),
      index_parts.near_duplicates(job, store),
      store.vocab,
      opts.spread,
      opts.memory_mb,
    )
    shutil.rmtree(job.path / 'parts')
  logging.info(
    'index: %s: %d firings of %d rows', job.path, done.firings, done.rows
  )


def _finished(path: pathlib.Path, meta: IndexMeta) -> bool:
  """Whether the index stands.

  Raises:
    ValueError: what stands there was made of something else.
  """
  found = read_meta(path)
  if found is None:
    return False
  made_of = found.source
  if found.k != meta.k:
    made_of += f', {found.k} a row instead of {meta.k}'
  if made_of != meta.source:
    raise ValueError(
      f'{path} was made of other activations, another SAE or other settings '
      f'({made_of}, now {meta.source}): delete that folder to make it again'
    )
  # A run may be killed between the two.
  shutil.rmtree(path / 'parts', ignore_errors=True)
  return True


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
  """Holds the folder against other commands that would merge it."""
  folder = os.open(path, os.O_RDONLY)
  try:
    fcntl.flock(folder, fcntl.LOCK_EX)
    yield
  finally:
    os.close(folder)
