"""Which arrays on disk are those of an SAE, whoever named them."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from lmm_sae.sae import stored
from lmm_sae.sae.stored import Array

# Names of the SAE's arrays: ours, sparsify's, SAELens's, and
# dictionary_learning's, whose decoder.weight is [D, M].
_NAMES = {
  'w_enc_MD': ('w_enc_MD', 'encoder.weight', 'W_enc'),
  'b_enc_M': ('b_enc_M', 'encoder.bias', 'b_enc'),
  'w_dec_MD': ('w_dec_MD', 'W_dec', 'decoder.weight'),
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
  turned = {'w_dec_MD': decoder.name.endswith('decoder.weight')}
  latents, width = decoder.shape[:: -1 if turned['w_dec_MD'] else 1]
  wide = {'w_enc_MD': (latents, width), 'w_dec_MD': (latents, width)}
  parameters = {}
  for name, array in fitting.items():
    shape = wide.get(name, (width,) if name == 'b_dec_D' else (latents,))
    if name == 'w_enc_MD':  # SAELens's is [D, M]; by name where D is M
      other = array.shape != shape or array.name.split('.')[-1] == 'W_enc'
      turned[name] = other and array.shape == shape[::-1]
    if array.shape == shape[:: -1 if turned.get(name) else 1]:
      divisor = 1.0 if name in wide else scale
      parameters[name] = Parameter(array, turned.get(name, False), divisor)
  return parameters
