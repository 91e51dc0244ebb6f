"""Writes concepts.json: what each latent stands for, where the truth is known.

By the rule of `core.truth`; of a sample's first image.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from absl import logging

from lmm_sae.core import concepts, records, truth
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import dictionaries, exports, share
from lmm_sae.sae.baseview import BaseView


def write(
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
