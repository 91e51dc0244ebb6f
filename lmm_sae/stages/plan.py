"""What a run would take, before anything is run: arithmetic, no model.

lmm-sae plan --config=experiments/llava_next_8b.py

Counts, each from the config alone: rows and bytes of the store, parameters and
memory of the SAE, floating-point operations of its training. Hours need
plan.tflops, what one device SUSTAINS here: measure it, a data sheet's peak is
two or three times as much.
"""

import dataclasses
import json
import pathlib

from ml_collections import ConfigDict

from lmm_sae.core import host
from lmm_sae.core.workdir import Workdir

TOKEN_BYTES = 25  # sample, position, token 4 each; kind 1; row, col 2; box 8
STATE_BYTES = 16  # float32 a parameter: itself, its gradient, two moments
KEPT_BYTES = 12  # of those, what a checkpoint holds


@dataclasses.dataclass(frozen=True)
class PlanConfig:
  """What the arithmetic starts from.

  Attributes:
    samples: samples captured; tokens: rows of each, on average.
    width: D; layers: how many layers are stored, each with an SAE of its own.
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
      width=plan.width or model_width(config.lmm.path),
      layers=len(config.lmm.layers),
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
    store_bytes=rows * (2 * d * opts.layers + TOKEN_BYTES),
    parameters=parameters,
    state_bytes=parameters * STATE_BYTES // opts.devices,
    batch_bytes=4 * n * (m + 2 * d) // opts.devices,
    checkpoint_bytes=parameters * KEPT_BYTES * opts.keep,
    step_flops=flops,
    hours=hours,
    epochs=n * opts.steps / rows,
  )


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Prints the plan."""
  del workdir  # nothing is read or written
  opts = PlanConfig.of(config)
  plan = reckon(opts)
  lines = [
    ('rows', f'{plan.rows:,} ({opts.samples:,} samples, {opts.tokens} each)'),
    ('store', f'{size(plan.store_bytes)} (bf16, layers: {opts.layers})'),
    ('SAE', f'{plan.parameters:,} parameters a layer'),
    ('', f'D={opts.width}, M={opts.latents}, K={opts.k}'),
    ('memory', f'{size(plan.state_bytes)} a device for parameters and Adam,'),
    ('', f'{size(plan.batch_bytes)} for a batch (devices: {opts.devices})'),
    ('checkpoints', f'{size(plan.checkpoint_bytes)} ({opts.keep} kept)'),
    ('training', f'{opts.steps:,} steps of {opts.rows:,} rows,'),
    ('', f'{plan.epochs:.2f} times the store'),
    ('work', f'{plan.step_flops:.3g} FLOP a step'),
  ]
  if plan.hours is None:
    lines.append(('hours', 'unknown: --config.plan.tflops=N, of one device'))
  else:
    at = f'{opts.devices} x {opts.tflops:g} TFLOP/s sustained'
    lines.append(('hours', f'{plan.hours:.3g} of training at {at}'))
  for name, text in lines:
    print(f'{name:<12} {text}')


def size(count: float) -> str:
  """Bytes in the unit that people read."""
  for unit in ('B', 'KiB', 'MiB', 'GiB'):
    if count < 1024:
      return f'{count:.3g} {unit}'
    count /= 1024
  return f'{count:.3g} TiB'


def model_width(path: str) -> int:
  """D of a LLaVA-NeXT folder, from its config.json; 0 where it has none."""
  packaged = host.weights() / path
  folder = packaged if '/' not in path and packaged.is_dir() else None
  file = (folder or pathlib.Path(path)) / 'config.json'
  if not file.is_file():
    return 0
  model = json.loads(file.read_text())
  return model.get('text_config', model).get('hidden_size', 0)
