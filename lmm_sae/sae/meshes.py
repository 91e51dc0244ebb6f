"""The ways to share a training step over chips, and what each then takes."""

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from lmm_sae.kernels import cost
from lmm_sae.sae import data, topology, trainer
from lmm_sae.sae import mesh as mesh_lib
from lmm_sae.sae.model import SaeConfig
from lmm_sae.sae.options import DTYPES, TrainConfig
from lmm_sae.sae.topology import Compiled, Topology

WHICH = ('one', 'all')  # meshes that are compiled


@dataclasses.dataclass(frozen=True)
class Share:
  """A way to share the step over chips, and what it then takes.

  Attributes:
    data, latent: chips that share the rows, and the latents.
    least_bytes: that a chip cannot do without, by arithmetic.
    flops: of a chip, counted by `kernels.cost`.
    roofline_s: least seconds of a step by the data sheet; dead_s: the same
      while AuxK trains dead latents.
    compiled: what a compiler or a kernel says; None where none was asked.
  """

  data: int
  latent: int
  least_bytes: int
  flops: float
  roofline_s: float
  dead_s: float
  compiled: Compiled | None

  def fits(self, chip: cost.Device) -> bool:
    """Whether a chip's memory is enough, as far as is known."""
    if self.compiled:
      return not self.compiled.refusal
    return self.least_bytes <= chip.memory


def share(
  sae: SaeConfig, options: TrainConfig, chips: Topology, which: str
) -> list[Share]:
  """Ways to share the step: the run's own first, then the others.

  Compiled is, with `which` one, the own mesh, and with all each that divides;
  for a GPU none is.

  Raises:
    ValueError: the chips cannot share the step as the config asks for.
  """
  own = grid(options, chips.chips)
  check(sae, options, own)
  devices = topology.devices(chips) if chips.tpu else []
  count = own[0] * own[1]
  found = []
  for sides in (own, *grids(sae, options, count)):
    if sides == own and found:
      continue
    compiled = None
    if chips.tpu:
      mesh = mesh_lib.make(count, sides[1], devices)
      every = which == 'all' or sides == own
      compiled = make(sae, options, mesh, chips.chip if every else None)
    costs, dead = (
      roofline(sae, options, sides, chips.chip, dead=dead)
      for dead in (False, True)
    )
    found.append(
      Share(
        *sides,
        least_bytes(sae, options, sides),
        sum(one.flops for one in costs),
        cost.total_seconds(costs, chips.chip),
        cost.total_seconds(dead, chips.chip),
        compiled,
      )
    )
  return found


def make(
  sae: SaeConfig, options: TrainConfig, mesh: Mesh, chip: cost.Device | None
) -> Compiled | None:
  """The step compiled for a chip; without one, None unless it is refused."""
  try:
    step = topology.trace(sae, options, mesh)
  except NotImplementedError as error:  # of a kernel
    return Compiled(refusal=str(error))
  return topology.compile_step(step, chip) if chip else None


def grid(options: TrainConfig, count: int) -> tuple[int, int]:
  """(data, latent) of a run's mesh on so many chips.

  Raises:
    ValueError: they are too few, or train.latent_shards does not divide them.
  """
  return mesh_lib.shape(options.devices, options.latent_shards, count, 'chip')


def check(config: SaeConfig, options: TrainConfig, sides: tuple[int, int]):
  """Refuses a step that chips cannot share so: see `trainer`, `data`.

  Raises:
    ValueError: rows, shares or latents do not divide.
  """
  mesh = AbstractMesh(sides, (mesh_lib.DATA, mesh_lib.LATENT))
  trainer.check(config, options, mesh)
  data.check(options, mesh)


def grids(
  config: SaeConfig, options: TrainConfig, count: int
) -> Iterator[tuple[int, int]]:
  """Every (data, latent) in which so many chips can share the step."""
  for latent in range(1, count + 1):
    if count % latent == 0:
      sides = count // latent, latent
      try:
        check(config, options, sides)
      except ValueError:
        continue
      yield sides


def least_bytes(
  config: SaeConfig, options: TrainConfig, sides: tuple[int, int]
) -> int:
  """Bytes that a chip cannot do without, by arithmetic.

  Parameters, two moments and gradients in float32 (twice where pieces are
  added up), copies of both matrices for the products, the batch as it came and
  as float32.
  """
  data_axis, latent = sides
  own, width = config.latents // latent, config.width
  parameters = 2 * own * width + 2 * own + width
  gradients = 2 if options.accumulate > 1 else 1
  size = jnp.dtype(DTYPES[options.compute]).itemsize
  copies = 2 * own * width * size if size < 4 else 0
  batch = options.rows // data_axis * width * (2 + 4)
  return 4 * ((3 + gradients) * parameters + own) + copies + batch


def roofline(
  config: SaeConfig,
  options: TrainConfig,
  sides: tuple[int, int],
  chip: cost.Device,
  *,
  dead: bool,
) -> list[cost.Cost]:
  """The costs of a step on a chip, without and with AuxK's dead latents.

  Products take the form that is cheaper on the chip, as the kernels do, but
  for those of float32 on a TPU, which are sparse.
  """
  data_axis, latent = sides
  aux = min(config.k_aux, config.latents // latent) if options.auxk else 0
  tpu = chip.kind.startswith('TPU')
  return cost.train_step(
    options.rows,
    config.width,
    config.latents,
    config.most,
    options.compute,
    device=None if tpu and options.compute == 'float32' else chip,
    data=data_axis,
    latent=latent,
    dead=aux if dead else 0,
  )
