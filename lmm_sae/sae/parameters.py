"""Which arrays on disk are those of an SAE, whoever named them."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from lmm_sae.sae import stored
from lmm_sae.sae.stored import Array

# Names of the SAE's arrays: ours, sparsify's, SAELens's.
_NAMES = {
  'w_enc_MD': ('w_enc_MD', 'encoder.weight', 'W_enc'),
  'b_enc_M': ('b_enc_M', 'encoder.bias', 'b_enc'),
  'w_dec_MD': ('w_dec_MD', 'W_dec'),
  'b_dec_D': ('b_dec_D', 'b_dec'),
  'theta_M': ('theta_M', 'threshold'),
}


@dataclasses.dataclass(frozen=True)
class Parameter:
  """An array of an SAE, in float32, for rows as the store holds them.

  Attributes:
    array: on disk.
    transposed: whether it stands there as [D, M].
    divisor: what is stored is so many times as large.
  """

  array: Array
  transposed: bool = False
  divisor: float = 1.0

  @property
  def shape(self) -> tuple[int, ...]:
    return self.array.shape[:: -1 if self.transposed else 1]

  def blocks(
    self, elements: int = stored.BLOCK
  ) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of pieces, see `Array.blocks`."""
    for at, block in self.array.blocks(elements, int(self.transposed)):
      yield at, block.astype(np.float32) / np.float32(self.divisor)

  def read(self) -> np.ndarray:
    """All of it."""
    return np.concatenate([block for _, block in self.blocks()])


def found(arrays: list[Array], scale: float = 1.0) -> dict[str, Parameter]:
  """The SAE's arrays by `Params` names; {} where there is no decoder.

  Args:
    arrays: of one checkpoint or export.
    scale: what the rows were multiplied by in training: biases are as long.
  """
  fitting = {}
  for name, names in _NAMES.items():
    ends = tuple(f'.{x}' for x in names)
    fits = [x for x in arrays if f'.{x.name}'.endswith(ends)]
    if fits:  # the shortest name: moments of an optimiser lie deeper
      fitting[name] = min(fits, key=lambda x: x.name.count('.'))
  decoder = fitting.get('w_dec_MD')
  if decoder is None or len(decoder.shape) != 2:
    return {}
  latents, width = decoder.shape
  wanted = {'w_enc_MD': (latents, width), 'b_dec_D': (width,)}
  parameters = {}
  for name, array in fitting.items():
    shape = wanted.get(name, (latents,) if name != 'w_dec_MD' else array.shape)
    turned = array.shape != shape or array.name.split('.')[-1] == 'W_enc'
    turned = turned and name == 'w_enc_MD' and array.shape == shape[::-1]
    if turned or array.shape == shape:
      own = 1.0 if name.startswith('w_') else scale
      parameters[name] = Parameter(array, turned, own)
  return parameters
