"""convert: reads and writes other programs' SAE layouts.

Without convert.source, writes sae/<layer>/export/{sparsify,saelens} from the
last checkpoint of every layer of lmm.layers, finished or not. With it, imports
an SAE of another program as that of convert.layer, for the stages after train:

    lmm-sae convert --config=... --workdir=DIR --config.lmm.layers='(24,)' \\
      --config.convert.source=lmms-lab/llama3-llava-next-8b-hf-sae-131k

The source is a folder in the layout of sparsify, SAELens or
dictionary_learning, one that holds such folders by hook point, or a repository
of the Hugging Face hub. It goes from file to file a few latents at a time; its
probe is verified where it has one. What is damaged, contradicts itself or
cannot be told in this program's formula is refused, and nothing is written.
"""

import dataclasses

from absl import logging
from ml_collections import ConfigDict

from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import checkpoint, exports, layouts
from lmm_sae.sae.checkpoint import Checkpoints
from lmm_sae.sae.layouts import Source
from lmm_sae.sae.model import SaeConfig


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
  """source: folder or repository to import, '' to export; layer: or -1."""

  source: str
  layer: int


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Exports, or imports where a source is given."""
  opts = ConvertConfig(**config.convert)
  layers = tuple(config.lmm.layers)
  if opts.source:
    bring(opts, layers, workdir)
    return
  for layer in layers:
    write(layer, workdir)


def only(layer: int, layers: tuple[int, ...]) -> int:
  """The layer meant.

  Raises:
    ValueError: it is not clear, or not one that is analysed.
  """
  if layer < 0 and len(layers) == 1:
    return layers[0]
  if layer not in layers:
    raise ValueError(
      f'convert.layer is {layer}; it must be one of lmm.layers {layers}'
    )
  return layer


def bring(
  opts: ConvertConfig, layers: tuple[int, ...], workdir: Workdir
) -> None:
  """Imports the SAE of a folder or a repository.

  Raises:
    ValueError: it cannot be read, is of another layer or does not fit the
      captured rows, or the workdir has a trained SAE for this layer.
  """
  layer = only(opts.layer, layers)
  if checkpoint.steps(workdir.sae(layer)):
    raise ValueError(
      f'{workdir.sae(layer)} holds a trained SAE: import into another workdir'
    )
  sae = _found(opts, layer)
  said = sae.config.layer
  if said not in (-1, layer):
    raise ValueError(
      f'{opts.source} reads layer {said}, but lmm.layers is {layers}: set it, '
      f'or convert.layer={layer} if it is to be taken for that of {layer}'
    )
  config = dataclasses.replace(sae.config, layer=layer)
  sae = dataclasses.replace(sae, config=config)
  acts = workdir.acts('train')
  if acts.exists():
    width = ActivationStore.open(acts, partial=True).meta.width
    if width != config.width:
      raise ValueError(
        f'{opts.source} reads rows of width {config.width}; {acts} holds rows '
        f'of width {width}: it is an SAE of another model'
      )
  exports.check(sae)
  exports.write(sae, workdir.export(layer), origin=opts.source)
  logging.info('imported %s as %s', opts.source, workdir.export(layer))


def _found(opts: ConvertConfig, layer: int) -> Source:
  """The SAE of the source, of `layer` where it holds several."""
  path = layouts.place(opts.source)
  if len(layouts.hooks(path)) > 1:
    path, _ = layouts.locate(path, layer)
  return checkpoint.find(path, layer if opts.layer >= 0 else None)


def write(layer: int, workdir: Workdir) -> None:
  """Exports the last checkpoint of a layer."""
  path = workdir.require(workdir.sae(layer), 'train')
  steps = checkpoint.steps(path)
  if not steps:
    raise ValueError(f'{path} holds no checkpoint: run `lmm-sae train` first')
  with Checkpoints(path) as checkpoints:
    note = checkpoints.note(steps[-1])
    config = SaeConfig(**note.settings['sae'])
    state = checkpoints.restore(config, note.step)
  sae = exports.of(config, state)
  exports.write(sae, workdir.export(layer), step=note.step)
  logging.info('step %d exported as %s', note.step, workdir.export(layer))
