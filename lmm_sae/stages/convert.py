"""convert: reads and writes other programs' SAE layouts.

Without convert.source, writes sae/<layer>/export/{sparsify,saelens} from the
last checkpoint of every layer of lmm.layers, finished or not. With it, imports
that folder (a sparsify or SAELens TopK SAE, such as the published one of arXiv
2411.14982) as the SAE of convert.layer, for the stages after train.
"""

import dataclasses
import pathlib

from absl import logging
from ml_collections import ConfigDict

from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import checkpoint, exports
from lmm_sae.sae.checkpoint import Checkpoints
from lmm_sae.sae.model import SaeConfig


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
  """source: folder to import, '' to export; layer: -1 is that of lmm.layers."""

  source: str
  layer: int


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Exports, or imports where a source is given."""
  opts = ConvertConfig(**config.convert)
  layers = tuple(config.lmm.layers)
  if opts.source:
    bring(pathlib.Path(opts.source), only(opts.layer, layers), workdir)
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


def bring(source: pathlib.Path, layer: int, workdir: Workdir) -> None:
  """Imports the SAE of a folder.

  Raises:
    ValueError: it cannot be read, does not fit the captured rows, or the
      workdir has a trained SAE for this layer.
  """
  if checkpoint.steps(workdir.sae(layer)):
    raise ValueError(
      f'{workdir.sae(layer)} holds a trained SAE: import into another workdir'
    )
  sae = exports.load(source, layer=layer)
  acts = workdir.acts('train')
  if acts.exists():
    width = ActivationStore.open(acts, partial=True).meta.width
    if width != sae.config.width:
      raise ValueError(
        f'{source} reads rows of width {sae.config.width}; {acts} holds rows '
        f'of width {width}: it is an SAE of another model'
      )
  exports.write(sae, workdir.export(layer))
  logging.info('imported %s as %s', source, workdir.export(layer))


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
