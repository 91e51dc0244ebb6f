"""Finds, for every latent, the images and tokens that fire it.

Streams acts/<split> through the SAE's encoder and writes index/<layer>/<split>
(see `core.index`). Done in parts of consecutive samples: run it again and the
finished parts are kept. Where masks and labels are exact, it also writes
concepts.json: what each latent stands for, by the rule of `core.truth`. Maps
and concepts are of a sample's first image.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from lmm_sae.core import (
  concepts,
  duplicates,
  index_build,
  index_merge,
  progress,
  records,
  truth,
)
from lmm_sae.core.index import IndexMeta, read_meta
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import dictionaries, exports, share
from lmm_sae.sae.baseview import BaseView, check_one_grid

PART_SAMPLES = 256  # samples a part, unless that makes more than MAX_PARTS
MAX_PARTS = 64
FREE = (
  'splits',
  'rows',
  'memory_mb',
  'processes',
  'share',
  'dictionaries',
  'latent',
  'sample',
)  # of the config: do not decide what an index holds
TOKENS = ('sample', 'position', 'token', 'kind', 'image', 'row', 'col')


@dataclasses.dataclass(frozen=True)
class IndexConfig:
  """The section `index` of the config; its fields are explained there."""

  splits: tuple[str, ...]
  rows: int
  exemplars: int
  text_exemplars: int
  context: int
  threshold: float
  always_on: float
  spread: int
  seed: int
  memory_mb: int
  processes: int
  share: str
  dictionaries: tuple[str, ...]
  latent: int
  sample: int

  def __post_init__(self):
    if self.rows < 1:
      raise ValueError(f'index.rows is {self.rows}; it must be at least 1')
    if not 0 < self.always_on <= 1:
      raise ValueError(
        f'index.always_on is {self.always_on}; it is a share: above 0, up to 1'
      )


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Indexes every configured split of every hooked layer: of the SAE, and of
  each of index.dictionaries."""
  opts = IndexConfig(**config.index)
  if {'a', 'b'} <= set(opts.splits):
    write_concepts(
      workdir, tuple(config.lmm.layers), opts.dictionaries, config.seed
    )
  for layer in config.lmm.layers:
    for dictionary in ('', *dict.fromkeys(opts.dictionaries)):
      sae = dictionaries.load(workdir, layer, dictionary, config.seed)
      for split in opts.splits:
        store = ActivationStore.open(
          workdir.require(workdir.acts(split), 'capture')
        )
        path = workdir.index(layer, split, dictionary)
        build(path, store, layer, opts, sae)


def build(
  path: pathlib.Path,
  store: ActivationStore,
  layer: int,
  opts: IndexConfig,
  sae: exports.Sae,
) -> None:
  """Builds the index of one split at `path`, or what is left to do of it.

  Raises:
    ValueError: an index of something else stands there, there is nothing to
      index, a sample's rows are mixed or not all there, or its images have
      grids of their own.
  """
  samples = store.samples()
  if not samples:
    raise ValueError(f'{store.path} holds no sample: there is nothing to index')
  check_one_grid(store)
  spans = [store.span(sample) for sample in samples]
  meta = IndexMeta(
    layer=layer,
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
    source=_source(store, opts, sae),
  )
  if _finished(path, meta):
    logging.info('index: %s is complete', path)
    return
  shape = index_build.Shape(
    latents=meta.latents,
    grid=meta.grid,
    exemplars=opts.exemplars,
    texts=opts.text_exemplars,
    context=opts.context,
    threshold=opts.threshold,
  )
  duplicate_S = _duplicates(store, meta.samples)
  size = max(PART_SAMPLES, -(-len(samples) // MAX_PARTS))
  parts = []
  for at in progress.track(
    range(0, len(samples), size), what=f'index {layer}/{meta.split}: parts'
  ):
    parts.append(path / 'parts' / f'{at:08d}.npz')
    if parts[-1].exists():
      continue
    part = index_build.Part(shape, duplicate_S)
    for start, stop in _chunks(spans[at : at + size], opts.rows):
      tokens = store.tokens(start, stop, TOKENS)
      part.add(tokens, *sae.encode(store.read(layer, start, stop)))
    part.save(parts[-1])
  keep = (opts.exemplars, opts.text_exemplars)
  done = index_merge.merge(path, parts, meta, keep, duplicate_S, store.vocab)
  shutil.rmtree(path / 'parts')
  logging.info(
    'index: %s: %d firings of %d rows', path, done.firings, done.rows
  )


def _finished(path: pathlib.Path, meta: IndexMeta) -> bool:
  """Whether the index stands; notes what it is made of where it does not.

  Raises:
    ValueError: what stands there was made of something else.
  """
  found, note = read_meta(path), path / 'parts' / 'source.json'
  if found is not None:
    made_of = found.source
  elif note.exists():
    made_of = json.loads(note.read_text())
  else:
    records.write_json(note, meta.source)
    return False
  if found is not None and found.k != meta.k:
    made_of += f', {found.k} a row instead of {meta.k}'
  if made_of != meta.source:
    raise ValueError(
      f'{path} was made of other activations, another SAE or other settings '
      f'({made_of}, now {meta.source}): delete that folder to make it again'
    )
  if found is not None:  # a run may be killed between the two
    shutil.rmtree(path / 'parts', ignore_errors=True)
  return found is not None


def _source(store: ActivationStore, opts: IndexConfig, sae: exports.Sae) -> str:
  """What an index is made of, as a short text; equal text, equal index."""
  rest = hashlib.blake2b(digest_size=6)
  meta = records.to_json(store.meta) | {
    'samples': len(store.samples()),
    'rows': store.num_rows,
    'index': {
      name: value
      for name, value in dataclasses.asdict(opts).items()
      if name not in FREE
    },
  }
  rest.update(json.dumps(meta, sort_keys=True).encode())
  return f'sae {share.firing(sae)}, store and settings {rest.hexdigest()}'


def _duplicates(store: ActivationStore, size: int) -> np.ndarray:
  """For each sample, the first one whose image is nearly the same."""
  duplicate_S = np.arange(size)
  samples, thumbnails = [], []
  for sample in store.samples():
    if sample.image:
      samples.append(sample.sample)
      thumbnails.append(duplicates.thumbnail(store.image(sample.sample)))
  if samples:
    places = np.array(samples)
    duplicate_S[places] = places[duplicates.firsts(thumbnails)]
  return duplicate_S


def _chunks(
  spans: Sequence[tuple[int, int]], rows: int
) -> Iterator[tuple[int, int]]:
  """(start, stop) of runs of whole, adjoining samples, about `rows` long."""
  start = stop = spans[0][0]
  for first, last in spans:
    if first != stop or (stop > start and last - start > rows):
      if stop > start:
        yield start, stop
      start = first
    stop = last
  if stop > start:
    yield start, stop


# Concepts, where the truth is known.


def write_concepts(
  workdir: Workdir,
  layers: Sequence[int],
  beside: Sequence[str] = (),
  seed: int = 0,
) -> None:
  """Writes concepts.json unless it stands, or the truth is not known.

  {layer: [concepts.Concept], neurons: {layer: concepts with a clean neuron},
  counted: concepts of objects, dictionaries: {name: {layer: as above}}, source:
  what it was made of}.

  Args:
    workdir: of the run.
    layers: whose SAEs are looked at.
    beside: dictionaries that are, too.
    seed: of theirs.
  """
  stores = {
    split: ActivationStore.open(workdir.require(workdir.acts(split), 'capture'))
    for split in ('a', 'b')
  }
  samples = {split: store.samples() for split, store in stores.items()}
  if not all(s.truth for split in samples for s in samples[split]):
    logging.info('index: masks and labels are not known; no concepts.json')
    return
  saes = {
    layer: exports.load(workdir.require(workdir.export(layer), 'train'))
    for layer in layers
  }
  path = workdir.file(concepts.FILE)
  others = {
    name: {
      layer: dictionaries.load(workdir, layer, name, seed) for layer in layers
    }
    for name in dict.fromkeys(beside)
  }
  every = [pair for some in (saes, *others.values()) for pair in some.items()]
  source = _concepts_source(stores, every)
  if path.exists() and json.loads(path.read_text()).get('source') == source:
    return
  vocabulary = truth.Vocabulary.of(samples['a'] + samples['b'])
  table = {
    'format_version': records.FORMAT_VERSION,
    'source': source,
    'counted': list(vocabulary.counted),
    'neurons': {},
    'dictionaries': {name: {} for name in others},
  }
  for layer, sae in saes.items():
    half_a, half_b = (
      BaseView(store, layer, sae).half(vocabulary) for store in stores.values()
    )
    units = truth.Latents(sae.config.latents)
    rows = truth.concept_table(units, half_a, half_b, vocabulary)
    raw = truth.concept_table(truth.Neurons(half_a), half_a, half_b, vocabulary)
    table[str(layer)] = [dataclasses.asdict(row) for row in rows]
    table['neurons'][str(layer)] = truth.clean_count(raw)
    logging.info(
      'index: layer %d: %d of %d concepts have a clean latent, %d a neuron',
      layer,
      truth.clean_count(rows),
      len(vocabulary.counted),
      truth.clean_count(raw),
    )
  for name, some in others.items():
    for layer, sae in some.items():
      halves = [
        BaseView(store, layer, sae).half(vocabulary)
        for store in stores.values()
      ]
      units = truth.Latents(sae.config.latents)
      rows = truth.concept_table(units, *halves, vocabulary)
      table['dictionaries'][name][str(layer)] = [
        dataclasses.asdict(row) for row in rows
      ]
  records.write_json(path, table)


def _concepts_source(stores, saes) -> str:
  """What the concepts are made of, as a short text."""
  mark = hashlib.blake2b(digest_size=6)
  for store in stores.values():
    note = records.to_json(store.meta), store.num_rows
    mark.update(json.dumps(note, sort_keys=True).encode())
  for layer, sae in saes:
    mark.update(f'{layer}'.encode())
    share.firing(sae, mark)
  return mark.hexdigest()
