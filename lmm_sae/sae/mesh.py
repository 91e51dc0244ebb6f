"""Devices and what lies on them: the one place that speaks of sharding.

Two axes: `data`, over which the rows of a batch are split, and `latent`, over
which latents may be. Today parameters are whole on every device and `latent`
has size 1.
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = 'data'
LATENT = 'latent'

ROWS = PartitionSpec(DATA)  # a batch [N, ...]
WHOLE = PartitionSpec()  # parameters, counters, metrics


def make(devices: int = 1) -> Mesh:
  """A (data, latent) mesh over the first `devices` devices; 0: all of them.

  Raises:
    ValueError: there are fewer.
  """
  found = jax.devices()
  if not 0 <= devices <= len(found):
    raise ValueError(
      f'train.devices is {devices}, but {len(found)} '
      f'{found[0].platform} device(s) are here: set it to 0..{len(found)}'
    )
  devices = devices or len(found)
  return jax.make_mesh(
    (devices, 1),
    (DATA, LATENT),
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=found[:devices],
  )


def sharding(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
  """How arrays of that spec lie on the mesh."""
  return NamedSharding(mesh, spec)
