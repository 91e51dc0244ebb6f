"""What a training step becomes on chips that are not here.

    chips = topology.parse('v5p:4x4x4')
    mesh = mesh_lib.make(0, 8, topology.devices(chips))
    step = topology.trace(config, options, mesh)
    found = topology.compile_step(step, chips.chip)

The TPU compiler needs a description of the chips, not the chips: libtpu of
PyPI (extra `tpu-plan`) compiles the trainer's own step from shapes, Pallas
kernels and collectives included. There is no such compiler for a GPU without
one; for GPUs only the arithmetic of `kernels.cost` is left.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from lmm_sae.kernels import cost
from lmm_sae.sae import hlo, trainer
from lmm_sae.sae import mesh as mesh_lib
from lmm_sae.sae.model import SaeConfig
from lmm_sae.sae.options import TrainConfig

FORMS = 'v5p:4x4x4, v5e:4x4, v4:2x2x4, v6e:4x4, h100:8 or gpu:8'
QUIET = {  # what libtpu reads: no metadata server, no lock, no complaints
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5p-8',
}
FULL = re.compile(r'out of memory [io]n .*', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Topology:
  """Chips of one kind and how they are arranged.

  Attributes:
    name: as it was given.
    chip: its figures.
    sides: of the torus of a TPU; for GPUs their number.
  """

  name: str
  chip: cost.Device
  sides: tuple[int, ...]

  @property
  def chips(self) -> int:
    """How many there are."""
    return math.prod(self.sides)

  @property
  def tpu(self) -> bool:
    """Whether there is a compiler for it."""
    return self.chip.kind.startswith('TPU')


def parse(name: str, gpu: cost.Device | None = None) -> Topology:
  """The topology of a name, KIND:SIDES.

  Args:
    name: of it: FORMS has examples.
    gpu: what the kind `gpu` is.

  Raises:
    ValueError: it is not such a name, or its kind is unknown.
  """
  found = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)', name)
  known = cost.DEVICES | ({'gpu': gpu} if gpu else {})
  if not found or not all(map(int, found[2].split('x'))):
    raise ValueError(
      f'plan.topology is {name!r}; it is KIND:CHIPS, as in {FORMS}'
    )
  if found[1] not in known:
    hint = (
      'give --config.plan.gpu_memory, gpu_bandwidth and gpu_tflops'
      if found[1] == 'gpu'
      else f'it is one of {", ".join(known)}, or gpu'
    )
    raise ValueError(f'plan.topology={name}: {found[1]} is not known: {hint}')
  sides = tuple(map(int, found[2].split('x')))
  chips = Topology(name, known[found[1]], sides)
  if len(sides) > (3 if chips.tpu else 1):
    raise ValueError(
      f'plan.topology={name} has {len(sides)} sides, too many for '
      f'{found[1]}: write it as in {FORMS}'
    )
  return chips


def devices(chips: Topology) -> list[jax.Device]:
  """Devices to compile for, in place of those of a TPU.

  Raises:
    ValueError: there is no compiler, or no such arrangement of chips.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(
      f'plan.topology={chips.name} needs the TPU compiler, which is not here: '
      'pip install "lmm_sae[tpu-plan]" (0.7 GB)'
    )
  for name, value in QUIET.items():
    os.environ.setdefault(name, value)
  jax.config.update('jax_platforms', 'cpu')  # a TPU that is here is left alone
  more = {}
  if chips.chips == 1:
    more['chips_per_host_bounds'] = (1, 1, 1)
  if chips.chip.name == 'v4':
    more['chip_config_name'] = 'megacore'  # a chip is one device, as on a VM
  try:
    found = topologies.get_topology_desc(chips.name, 'tpu', **more)
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      f'plan.topology={chips.name} is refused by the TPU compiler: '
      f'{str(error).splitlines()[0]}; write it as in {FORMS}'
    ) from error
  return found.devices


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one chip.

  Attributes:
    arguments: parameters, moments and the batch.
    temporaries: what exists within a step.
    code: of the program.
    total: of all that is there at once; the new state takes the place of the
      old one, so results that are aliased count once.
  """

  arguments: int
  temporaries: int
  code: int
  total: int


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A step as a compiler made it; where it does not fit, `refusal` says so.

  Attributes:
    memory, flops: of one chip; FLOPs count the body of a loop once.
    least, most: where conditionals (AuxK) take the quickest branch, and the
      slowest.
    optimal_s: cost_analysis' own figure; a loop's body once, -1 for each
      operation that it does not know.
    compile_s: wall seconds that it took.
    refusal: what the compiler says of the chip's memory, or a kernel of the
      shape of a shard.
  """

  memory: Memory | None = None
  flops: float = 0.0
  least: hlo.Program | None = None
  most: hlo.Program | None = None
  optimal_s: float = 0.0
  compile_s: float = 0.0
  refusal: str = ''


def trace(
  config: SaeConfig, options: TrainConfig, mesh: Mesh
) -> jax.stages.Traced:
  """The trainer's step for the devices of a mesh, from shapes alone.

  Raises:
    ValueError: the mesh cannot share it.
    NotImplementedError: a kernel cannot do the shape of a shard.
  """
  options = dataclasses.replace(options, backend='tpu')
  state = jax.tree.map(
    lambda x, on: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on),
    trainer.shapes(config),
    mesh_lib.sharding(mesh, trainer.specs()),
  )
  batch = jax.ShapeDtypeStruct(
    (options.rows, config.width),
    jnp.bfloat16,
    sharding=mesh_lib.sharding(mesh, mesh_lib.ROWS),
  )
  return trainer.make_step(config, options, mesh).trace(state, batch)


def compile_step(step: jax.stages.Traced, chip: cost.Device) -> Compiled:
  """A step as the TPU compiler makes it for such chips."""
  began = time.monotonic()
  try:
    made = step.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    found = FULL.search(str(error))
    if not found:
      raise
    return Compiled(compile_s=time.monotonic() - began, refusal=found[0])
  compile_s = time.monotonic() - began
  text, costs = made.as_text(), made.cost_analysis()
  return Compiled(
    memory=memory(made),
    flops=costs['flops'],
    least=hlo.read(text, chip, most=False),
    most=hlo.read(text, chip),
    optimal_s=costs['optimal_seconds'],
    compile_s=compile_s,
  )


def memory(made: jax.stages.Compiled) -> Memory:
  """What a compiled program holds on a device."""
  found = made.memory_analysis()
  code = found.generated_code_size_in_bytes
  arguments = found.argument_size_in_bytes
  temporaries = found.temp_size_in_bytes
  fresh = found.output_size_in_bytes - found.alias_size_in_bytes
  return Memory(
    arguments, temporaries, code, arguments + temporaries + code + fresh
  )
