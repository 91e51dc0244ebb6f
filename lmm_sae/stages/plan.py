"""What a run would take, before anything is run.

lmm-sae plan --config=experiments/llava_next_8b.py
lmm-sae plan --config=experiments/llava_next_8b.py \\
  --config.plan.topology=v5p:4x4x4 --config.sae.latents=1048576

Counts, each from the config alone: rows and bytes of the store, parameters and
memory of the SAE, floating-point operations of its training. Hours need
plan.tflops, what one device SUSTAINS here: measure it, a data sheet's peak is
two or three times as much.

With plan.topology the trainer's own step is compiled for those chips, which
need not be here: what it holds and sends, and how long the compiler thinks it
takes, beside the least time of the data sheet (`kernels.cost`). For GPUs there
is that arithmetic alone.
"""

import dataclasses
import json
import pathlib

from ml_collections import ConfigDict

from lmm_sae.core import forecast, host
from lmm_sae.core.forecast import size, span
from lmm_sae.core.workdir import Workdir
from lmm_sae.kernels import cost
from lmm_sae.sae import meshes, topology
from lmm_sae.sae.hlo import Program
from lmm_sae.sae.meshes import Share
from lmm_sae.sae.model import SaeConfig
from lmm_sae.sae.options import TrainConfig
from lmm_sae.sae.topology import Topology

STATE_BYTES = 16  # float32 a parameter: itself, its gradient, two moments
KEPT_BYTES = 12  # of those, what a checkpoint holds


@dataclasses.dataclass(frozen=True)
class PlanConfig:
  """What the arithmetic starts from.

  Attributes:
    samples: samples captured; tokens: rows of each, on average.
    width: D; layers: how many layers are stored, each with an SAE of its own.
    stored: dtype of the rows, bfloat16 or int8.
    latents, k: of the SAE.
    rows: a step; steps: of the training; keep: checkpoints kept.
    auxk: whether dead latents are trained on the residual.
    devices: that share the SAE and its rows.
    tflops: TFLOP/s that one device sustains; 0: unknown.
  """

  samples: int
  tokens: int
  width: int
  layers: int
  stored: str
  latents: int
  k: int
  rows: int
  steps: int
  keep: int
  auxk: bool
  devices: int
  tflops: float

  def __post_init__(self):
    for field in ('samples', 'tokens', 'width', 'devices'):
      if getattr(self, field) < 1:
        raise ValueError(
          f'plan.{field} is {getattr(self, field)}: give it, '
          f'--config.plan.{field}=N'
        )
    if self.k > self.latents:
      raise ValueError(
        f'sae.k={self.k} is more than sae.latents={self.latents}'
      )

  @classmethod
  def of(cls, config: ConfigDict) -> 'PlanConfig':
    plan, data = config.plan, config.data
    samples = plan.samples
    if data.source == 'scenes':
      samples = data.train + 2 * data.half
    elif data.limit:
      samples = min(data.limit, samples or data.limit)
    return cls(
      samples=samples,
      tokens=plan.tokens or config.capture.max_tokens,
      width=plan.width
      or host.language_model(config.lmm.path).get('hidden_size', 0),
      layers=len(config.lmm.layers),
      stored=config.capture.store,
      latents=config.sae.latents,
      k=config.sae.k,
      rows=config.train.rows,
      steps=config.train.steps,
      keep=config.train.keep,
      auxk=config.train.auxk > 0,
      devices=plan.devices,
      tflops=plan.tflops,
    )


@dataclasses.dataclass(frozen=True)
class Plan:
  """What comes out; bytes and operations are for one layer's SAE."""

  rows: int
  store_bytes: int
  parameters: int
  state_bytes: int
  batch_bytes: int
  checkpoint_bytes: int
  step_flops: int
  hours: float | None
  epochs: float


def reckon(opts: PlanConfig) -> Plan:
  """The plan: exact counts, but for `hours`, which trusts `tflops`."""
  m, d, k, n = opts.latents, opts.width, opts.k, opts.rows
  rows = opts.samples * opts.tokens
  parameters = 2 * m * d + m + d
  # A dense encode; decode, its two gradients and the encoder's are sparse.
  flops = 2 * n * m * d + 8 * n * k * d
  if opts.auxk:
    flops += 8 * n * (d // 2) * d  # k_aux = D / 2, while latents are dead
  hours = None
  if opts.tflops > 0:
    rate = opts.tflops * 1e12 * opts.devices
    hours = flops * opts.steps * opts.layers / rate / 3600
  return Plan(
    rows=rows,
    store_bytes=rows * forecast.row_bytes(d, opts.layers, opts.stored),
    parameters=parameters,
    state_bytes=parameters * STATE_BYTES // opts.devices,
    batch_bytes=4 * n * (m + 2 * d) // opts.devices,
    checkpoint_bytes=parameters * KEPT_BYTES * opts.keep,
    step_flops=flops,
    hours=hours,
    epochs=n * opts.steps / rows,
  )


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Prints the plan; plan.out names a JSON file for it.

  Raises:
    ValueError: the chips cannot share the step, or it does not fit on them;
      then what is known is printed first.
  """
  del workdir  # nothing in it is read or written
  opts = PlanConfig.of(config)
  plan = reckon(opts)
  found = {'config': opts, 'plan': plan}
  lines = store_lines(opts, plan)
  if config.plan.topology:
    sae = SaeConfig(layer=0, width=opts.width, **config.sae)
    options = TrainConfig(**config.train)
    if config.plan.meshes not in meshes.WHICH:
      raise ValueError(
        f'plan.meshes is {config.plan.meshes!r}; it is one of '
        f'{", ".join(meshes.WHICH)}'
      )
    chips = topology.parse(config.plan.topology, gpu(config.plan))
    shares = meshes.share(sae, options, chips, config.plan.meshes)
    lines += chip_lines(opts, chips, shares)
    found |= {'chips': chips, 'shares': shares}
  else:
    lines += device_lines(opts, plan)
  for name, text in lines:
    print(f'{name:<12} {text}')
  if config.plan.out:
    text = json.dumps(found, default=dataclasses.asdict, indent=1)
    pathlib.Path(config.plan.out).write_text(text + '\n')
  if 'shares' in found and not found['shares'][0].fits(chips.chip):
    raise ValueError(
      f'the step does not fit on {chips.name} as the config shares it: take '
      'one of the meshes above that do, by train.devices and '
      'train.latent_shards, or more chips'
    )


def gpu(plan: ConfigDict) -> cost.Device | None:
  """The chip that the fields plan.gpu_* describe; None where they do not."""
  if not (plan.gpu_memory and plan.gpu_bandwidth and plan.gpu_tflops):
    return None
  peak = plan.gpu_tflops * 1e12
  return cost.Device(
    'gpu',
    'GPU',
    {'bfloat16': peak, 'float32': peak / 2},
    plan.gpu_bandwidth * 1e9,
    plan.gpu_memory * 1e9,
    plan.gpu_link * 1e9,
  )


def store_lines(opts: PlanConfig, plan: Plan) -> list[tuple[str, str]]:
  """What the data set and the SAE are."""
  return [
    ('tokens', f'{plan.rows:,} ({opts.samples:,} samples, {opts.tokens} each)'),
    (
      'store',
      f'{size(plan.store_bytes)} ({opts.stored}, layers: {opts.layers})',
    ),
    ('SAE', f'{plan.parameters:,} parameters a layer'),
    ('', f'D={opts.width}, M={opts.latents}, K={opts.k}'),
    ('checkpoints', f'{size(plan.checkpoint_bytes)} ({opts.keep} kept)'),
    ('training', f'{opts.steps:,} steps of {opts.rows:,} rows,'),
    ('', f'{plan.epochs:.2f} times the store'),
    ('work', f'{plan.step_flops:.3g} FLOP a step'),
  ]


def device_lines(opts: PlanConfig, plan: Plan) -> list[tuple[str, str]]:
  """Memory and hours on devices of which nothing else is known."""
  lines = [
    ('memory', f'{size(plan.state_bytes)} a device for parameters and Adam,'),
    ('', f'{size(plan.batch_bytes)} for a batch (devices: {opts.devices})'),
  ]
  if plan.hours is None:
    lines.append(('hours', 'unknown: --config.plan.tflops=N, of one device'))
    lines.append(('', 'or --config.plan.topology=v5p:4x4x4, of what chips'))
  else:
    at = f'{opts.devices} x {opts.tflops:g} TFLOP/s sustained'
    lines.append(('hours', f'{plan.hours:.3g} of training at {at}'))
  return lines


def chip_lines(
  opts: PlanConfig, chips: Topology, shares: list[Share]
) -> list[tuple[str, str]]:
  """What the run's own mesh takes, and how others compare."""
  own, chip = shares[0], chips.chip
  used = own.data * own.latent
  lines = [
    ('chips', f'{used} of {chips.chips} x {chip.name} ({chips.name})'),
    ('mesh', f'data={own.data} x latent={own.latent}: a chip has'),
    (
      '',
      f'{opts.rows // own.data:,} rows and {opts.latents // own.latent:,} '
      'latents of a step',
    ),
  ]
  if own.compiled is None:
    lines += [
      ('compiled', 'no: there is no compiler for a GPU that is not here;'),
      ('', 'what follows is arithmetic with figures of a data sheet'),
      ('bytes/chip', f'at least {of(own.least_bytes, chip)}'),
      ('FLOP/chip', f'{own.flops:.3g} a step'),
    ]
  elif own.compiled.refusal:
    lines += [
      ('compiled', f'no: {own.compiled.refusal}'),
      ('bytes/chip', f'at least {of(own.least_bytes, chip)} by arithmetic'),
    ]
  else:
    lines += compiled_lines(own, chip)
  return lines + time_lines(opts, own) + mesh_lines(shares, chip)


def compiled_lines(own: Share, chip: cost.Device) -> list[tuple[str, str]]:
  """What the compiler says of the run's own mesh."""
  made = own.compiled
  held, least, most = made.memory, made.least, made.most
  lines = [
    ('compiled', f'in {made.compile_s:.0f} s by the TPU compiler'),
    ('bytes/chip', f'{size(held.arguments)} state and batch,'),
    ('', f'{size(held.temporaries)} temporaries, {size(held.code)} code:'),
    ('', f'{of(held.total, chip)}'),
    ('FLOP/chip', f'{made.flops:.3g} by the compiler (of a loop: one turn),'),
    ('', f'{own.flops:.3g} by our count'),
  ]
  lines += sent_lines('collectives', least)
  if most.collectives != least.collectives:
    lines += sent_lines('AuxK, most', most)
  lines += [
    ('compiler', f'{1e3 * least.own_s:.3g} ms its own operations,'),
    ('', f'{1e3 * least.kernels_s:.3g} kernels, by their CostEstimate,'),
    ('', f'{1e3 * least.links_s:.3g} links, at their bandwidth;'),
    ('', f'{least.unpriced} sorts and scatters have no estimate'),
    ('', f'optimal_seconds: {made.optimal_s:.4g}, with -1 for each unknown'),
  ]
  if not chip.clock:
    lines.append(('', f'(cycles of unknown length on {chip.name}: left out)'))
  return lines


def sent_lines(title: str, found: Program) -> list[tuple[str, str]]:
  """The collectives of a step."""
  told = [
    f'{one.kind}: {one.count} a step, {size(one.bytes)} of results, '
    f'{size(one.sent)} over links'
    for one in found.collectives
  ] or ['none']
  return [('' if at else title, text) for at, text in enumerate(told)]


def time_lines(opts: PlanConfig, own: Share) -> list[tuple[str, str]]:
  """A step, and all of them: the compiler's estimate beside the roofline.

  `AuxK, most` is a step in which so many latents are dead that it has to
  select among them.
  """
  columns = {'roofline': (own.roofline_s, own.dead_s)}
  if own.compiled and own.compiled.memory:
    made = own.compiled
    columns = {'compiler': (made.least.seconds, made.most.seconds)} | columns

  def row(name, told):
    return name, ''.join(f'{told(*x):>13}' for x in columns.values())

  return [
    ('time', ''.join(f'{name:>13}' for name in columns)),
    row('a step', lambda few, _: f'{1e3 * few:.3g} ms'),
    row('AuxK, most', lambda _, many: f'{1e3 * many:.3g} ms'),
    row('tokens/s', lambda few, _: f'{opts.rows / few:,.0f}'),
    row('training', lambda few, _: span(few * opts.steps * opts.layers)),
  ]


def mesh_lines(shares: list[Share], chip: cost.Device) -> list[tuple[str, str]]:
  """The meshes that divide rows and latents, and which of them fit."""
  lines = [('meshes', 'data x latent, bytes/chip, ms a step; * is the above')]
  for at, one in enumerate(shares):
    made, text = one.compiled, f'{one.data:>4} x {one.latent:<4}'
    roofline = f'{1e3 * one.roofline_s:.3g} roofline'
    if made and made.refusal:
      text += f'no: {made.refusal.partition(":")[0]}'
    elif made:
      text += (
        f'fits: {size(made.memory.total)} compiled, '
        f'{1e3 * made.least.seconds:.3g} compiler, {roofline}'
      )
    else:
      told = 'may fit' if one.fits(chip) else 'no'
      text += f'{told}: {size(one.least_bytes)} at least, {roofline}'
    lines.append(('', f'{" " if at else "*"} {text}'))
  return lines


def of(count: float, chip: cost.Device) -> str:
  """Bytes of a chip's memory."""
  told = 'fits' if count <= chip.memory else 'does not fit'
  return f'{size(count)} of {size(chip.memory)}: {told}'
