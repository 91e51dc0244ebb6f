"""evaluate: says how good each SAE is on held-out rows, by token kind.

Writes evaluation.json, {layer: {token kind: {fvu, l0, dead, rows}}}; the
figures are defined in `sae.metrics`.
"""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from lmm_sae.core import progress, records
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import exports
from lmm_sae.sae.exports import Sae
from lmm_sae.sae.metrics import Quality

READ_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """split: of the store; rows: read at most, spread over it, 0: all."""

  split: str
  rows: int

  def __post_init__(self):
    if self.rows < 0:
      raise ValueError(f'evaluate.rows is {self.rows}; it must be at least 0')


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Measures the SAE of every layer."""
  opts = EvaluateConfig(**config.evaluate)
  store = ActivationStore.open(
    workdir.require(workdir.acts(opts.split), 'capture')
  )
  table = {}
  for layer in config.lmm.layers:
    sae = exports.load(workdir.require(workdir.export(layer), 'train'))
    table[str(layer)] = measure(store, layer, sae, opts.rows)
  records.write_json(workdir.file('evaluation.json'), table)


def measure(store: ActivationStore, layer: int, sae: Sae, rows: int) -> dict:
  """The table of one layer.

  Raises:
    ValueError: the store's rows are not as wide as the SAE's.
  """
  if store.meta.width != sae.config.width:
    raise ValueError(
      f'{store.path} holds rows of width {store.meta.width}; the SAE of layer '
      f'{layer} reads {sae.config.width}: it is of another model'
    )
  quality = Quality(sae.config.latents, sae.config.width)
  pieces = chosen(store.ranges, rows)
  for start, stop in progress.track(pieces, what='pieces'):
    x_ND = store.read(layer, start, stop).astype(np.float32)
    kind_N = store.tokens(start, stop, names=('kind',))['kind']
    code = sae.encode(x_ND)
    quality.add(x_ND, sae.decode(code), code, kind_N)
  return quality.table()


def chosen(ranges: list[tuple[int, int]], rows: int) -> list[tuple[int, int]]:
  """Pieces of the ranges, evenly spread, of `rows` rows in all; 0: all."""
  pieces = [
    (at, min(at + READ_ROWS, stop))
    for start, stop in ranges
    for at in range(start, stop, READ_ROWS)
  ]
  total = sum(stop - start for start, stop in pieces)
  if not rows or rows >= total:
    return pieces
  count = -(-rows * len(pieces) // total)
  at = np.linspace(0, len(pieces) - 1, count).round().astype(int)
  return [pieces[i] for i in dict.fromkeys(at.tolist())]
