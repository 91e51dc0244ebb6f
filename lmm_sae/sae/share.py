"""A run's latents, made ready for those who look at them elsewhere."""

import hashlib
import pathlib
import re

import numpy as np

from lmm_sae.core import host, records
from lmm_sae.core import neuronpedia as format_
from lmm_sae.core.index import LatentIndex
from lmm_sae.core.records import Explanation
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.tokens import Kind
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import layouts, tensors


def firing(sae, mark=None) -> str:
  """A short text of what decides which latents fire; equal text, equal index.

  Args:
    sae: an `exports.Sae` or a `layouts.Source`.
    mark: a hash that goes on with it, if there is one.
  """
  config = sae.config
  mark = hashlib.blake2b(digest_size=6) if mark is None else mark
  jumps = config.activation != 'topk'
  for name in ('w_enc_MD', 'b_enc_M', *(['theta_M'] if jumps else [])):
    for start, stop in tensors.pieces(config.latents, config.width):
      mark.update(np.ascontiguousarray(sae.read(name, start, stop)).tobytes())
  mark.update(np.ascontiguousarray(sae.b_dec_D).tobytes())
  return mark.hexdigest()


def neuronpedia(
  workdir: Workdir, layer: int, *, split: str, name: str, model: str
) -> pathlib.Path:
  """Writes WORKDIR/neuronpedia/<model>/<layer>-<name> and returns it.

  Args:
    workdir: of a run with an export and an index; explanations where there are
      any.
    layer: whose latents they are.
    split: half whose exemplars are shown.
    name: of Neuronpedia's source set.
    model: lmm.path of the run.

  Raises:
    ValueError: one of them is missing, the index is of another SAE, or the name
      is none that Neuronpedia takes.
  """
  index = LatentIndex.open(
    workdir.require(workdir.index(layer, split), 'index')
  )
  export = workdir.require(workdir.export(layer), 'convert')
  sae = layouts.find(export)
  if index.num_latents != sae.config.latents:
    raise ValueError(
      f'{index.path} is of {index.num_latents} latents, {export} of '
      f'{sae.config.latents}: run `lmm-sae index` again'
    )
  made_of = re.match(r'sae (\w+),', index.meta.source)
  if index.meta.k != sae.config.most or (made_of and made_of[1] != firing(sae)):
    raise ValueError(
      f'{index.path} is of another SAE than {export}: delete that folder, and '
      'run `lmm-sae index` again'
    )
  store = ActivationStore.open(workdir.acts(split))
  kinds = [group['kinds'] for group in store.manifest]
  bos = Kind.BOS.name.lower()
  subject = host.language_model(model)
  source = format_.Source(
    model=format_.slug(store.meta.model),
    layer=layer,
    name=name,
    split=split,
    layers=subject.get('num_hidden_layers', 0),
    neurons=subject.get('intermediate_size', 0),
    width=sae.config.width,
    prompts=sum(group['samples'] for group in store.manifest),
    rows=sum(sum(group.values()) - group.get(bos, 0) for group in kinds),
  )
  return format_.write(
    workdir.file('neuronpedia'),
    source,
    index,
    lambda start, stop: sae.read('w_dec_MD', start, stop),
    [
      one
      for one in records.read(Explanation, workdir.file('explanations.jsonl'))
      if not one.dictionary
    ],
  )
