"""Devices and what lies on them: the one place that speaks of sharding.

Two axes: `data`, over which the rows of a batch are split, and `latent`, over
which latents are: the parameters, the optimiser's moments and the counters.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = 'data'
LATENT = 'latent'

ROWS = PartitionSpec(DATA)  # a batch [N, ...]
LATENTS = PartitionSpec(LATENT)  # what has latents first [M, ...]
WHOLE = PartitionSpec()  # b_dec, step, metrics


def make(
  devices: int = 1, latent: int = 1, found: Sequence[jax.Device] = ()
) -> Mesh:
  """A (data, latent) mesh over the first `devices` devices; 0: all of them.

  Devices of one process stand together, so that latents are shared within a
  process before they are shared over the network; those of TPUs as their links
  run, where an axis of the mesh may take a part of an axis of the torus.

  Args:
    devices: how many.
    latent: how many of them share the latents.
    found: what to take them from; (): what this run has.

  Raises:
    ValueError: there are fewer, `latent` does not divide them, some process of
      several would have none, or those of TPUs do not make a torus.
  """
  found = found or jax.devices()
  sides = shape(devices, latent, len(found), f'{found[0].platform} device')
  devices = math.prod(sides)
  if jax.process_count() > 1 and devices != len(found):
    raise ValueError(
      f'train.devices is {devices}, but the {jax.process_count()} processes of '
      f'this run have {len(found)}: set it to 0, all of them'
    )
  try:
    grid = mesh_utils.create_device_mesh(
      sides, found[:devices], allow_split_physical_axes=True
    )
  except AssertionError as error:  # jax's, of TPUs
    raise ValueError(
      f'train.devices is {devices}, but the first {devices} of these '
      f'{len(found)} chips are no torus: set it to 0, all of them'
    ) from error
  return Mesh(grid, (DATA, LATENT), axis_types=(AxisType.Auto, AxisType.Auto))


def shape(
  devices: int, latent: int, count: int, what: str = 'device'
) -> tuple[int, int]:
  """(data, latent) of a mesh over `devices` of `count` devices; 0: over all.

  Raises:
    ValueError: there are fewer, or `latent` does not divide them.
  """
  if not 0 <= devices <= count:
    raise ValueError(
      f'train.devices is {devices}, but {count} {what}(s) are here: set it to '
      f'0..{count}'
    )
  devices = devices or count
  if latent < 1 or devices % latent:
    raise ValueError(
      f'train.latent_shards is {latent}, which does not divide the {devices} '
      'device(s) of train.devices'
    )
  return devices // latent, latent


def sharding(mesh: Mesh, specs: Any) -> Any:
  """How arrays of that spec, or of a tree of specs, lie on the mesh."""
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    specs,
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )


def put(tree: Any, shardings: Any) -> Any:
  """Arrays that every process has whole, laid on the mesh."""
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)

  def lay(x, sharding: NamedSharding) -> jax.Array:
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])

  return jax.tree.map(lay, tree, shardings)
