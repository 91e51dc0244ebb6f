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
Of a repository, owner/name[:subfolder][@revision], no pickle is fetched unless
convert.pickles says so.

convert.upload=owner/name sends the export, with its card, to the hub.
convert.to=neuronpedia writes WORKDIR/neuronpedia from the export, the index and
the explanations, for a Neuronpedia to import (`core.neuronpedia`).
"""

import dataclasses
import pathlib
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from lmm_sae.core import evaluation
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import checkpoint, exports, hub, layouts, share
from lmm_sae.sae.checkpoint import Checkpoints
from lmm_sae.sae.layouts import Source
from lmm_sae.sae.model import SaeConfig


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
  """What is read and what is made; see experiments/base.py."""

  source: str
  layer: int
  pickles: bool
  to: str
  name: str
  split: str
  upload: str

  def __post_init__(self):
    if self.to not in ('', 'neuronpedia'):
      raise ValueError(
        f"convert.to is {self.to!r}; it is neuronpedia, or '' for the layouts "
        'of sparsify and SAELens'
      )
    if self.to and (self.source or self.upload):
      raise ValueError(
        f'convert.to={self.to} takes the export that is there: run it apart '
        'from convert.source and convert.upload'
      )


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Exports, or imports where a source is given."""
  opts = ConvertConfig(**config.convert)
  layers = tuple(config.lmm.layers)
  if opts.to:
    for layer in layers:
      folder = share.neuronpedia(
        workdir, layer, split=opts.split, name=opts.name, model=config.lmm.path
      )
      logging.info('written %s', folder)
    return
  sent = only(opts.layer, layers) if opts.upload else None
  if opts.source:
    bring(opts, layers, workdir)
  else:
    for layer in layers:
      write(layer, workdir)
  if sent is not None:
    url = hub.send(workdir.export(sent), opts.upload)
    logging.info('uploaded %s to %s', workdir.export(sent), url)


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
  # A card may be published: it names a folder, not where that is.
  repo = hub.is_repo(opts.source)
  origin = opts.source if repo else pathlib.Path(opts.source).resolve().name
  exports.write(sae, workdir.export(layer), origin=origin)
  logging.info('imported %s as %s', opts.source, workdir.export(layer))


def _found(opts: ConvertConfig, layer: int) -> Source:
  """The SAE of the source, of `layer` where it holds several."""
  path = hub.place(opts.source, opts.pickles)
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
  exports.write(
    sae,
    workdir.export(layer),
    step=note.step,
    settings=note.settings,
    figures=figures(layer, workdir),
  )
  logging.info('step %d exported as %s', note.step, workdir.export(layer))


def figures(layer: int, workdir: Workdir) -> dict[str, Any] | None:
  """What `evaluate` found of a layer; None before it ran on what is there.

  Raises:
    ValueError: its format is not known, or it is damaged.
  """
  file = workdir.file(evaluation.FILE)
  at = max(checkpoint.steps(workdir.sae(layer)))
  made = (workdir.sae(layer) / str(at)).stat().st_mtime
  if not file.exists() or file.stat().st_mtime < made:
    return None
  found = evaluation.read(workdir).get(str(layer))
  if not isinstance(found, dict | None):
    raise evaluation.damaged(file, f'layer {layer} has no figures')
  return found
