"""How an SAE is trained: the section `train` of a config, and schedules."""

import dataclasses

import jax
import jax.numpy as jnp

from lmm_sae.core import tokens
from lmm_sae.kernels import ops

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The section `train` of the config; every field is explained there.

  Raises:
    ValueError: a field is out of bounds.
  """

  steps: int
  rows: int
  lr: float
  warmup: int
  decay_from: float
  clip: float
  accumulate: int
  max_skipped: int
  auxk: float
  multi_topk: float
  sparsity: float
  k_from: int
  k_steps: int
  compute: str
  init: str
  kinds: tuple[str, ...]
  normalise: bool
  backend: str
  devices: int
  latent_shards: int
  save_every: int
  keep: int
  keep_best: int
  block_rows: int
  pool_blocks: int
  data_shares: int

  def __post_init__(self):
    for field, least in (
      ('steps', 1),
      ('rows', 1),
      ('lr', 0),
      ('warmup', 0),
      ('accumulate', 1),
      ('max_skipped', 0),
      ('auxk', 0),
      ('multi_topk', 0),
      ('sparsity', 0),
      ('k_from', 0),
      ('k_steps', 0),
      ('devices', 0),
      ('latent_shards', 1),
      ('save_every', 1),
      ('keep', 1),
      ('block_rows', 1),
      ('keep_best', 0),
      ('pool_blocks', 1),
      ('data_shares', 1),
    ):
      if getattr(self, field) < least:
        raise ValueError(
          f'train.{field} is {getattr(self, field)}; it must be at least '
          f'{least}'
        )
    if not 0 <= self.decay_from <= 1:
      raise ValueError(
        f'train.decay_from is {self.decay_from}; it is a share, in 0..1'
      )
    if not self.clip > 0:
      raise ValueError(f'train.clip is {self.clip}; it must be above 0')
    if self.backend not in ('auto', *ops.BACKENDS):
      raise ValueError(
        f'train.backend is {self.backend!r}; it is one of auto, '
        f'{", ".join(ops.BACKENDS)}'
      )
    if self.compute not in DTYPES:
      raise ValueError(
        f'train.compute is {self.compute!r}; it is one of {", ".join(DTYPES)}'
      )
    if bool(self.k_from) != bool(self.k_steps):
      raise ValueError(
        f'train.k_from is {self.k_from} and train.k_steps is {self.k_steps}: '
        'k falls from the one within the other; set both, or none'
      )
    if not self.kinds:
      raise ValueError("train.kinds is empty; ('all',) trains on every kind")
    for kind in self.kinds:
      tokens.kinds(kind)

  def peak_lr(self, latents: int) -> float:
    """The peak learning rate; the rule of arXiv 2411.14982 where `lr` is 0."""
    return self.lr or 2e-4 / (latents / 2**14) ** 0.5


def learning_rate(
  step: jax.Array, /, *, options: TrainConfig, latents: int
) -> jax.Array:
  """Of the optimiser step `step`, counted from 0.

  Linear warm-up over `warmup` steps, the peak, then from `decay_from` of the
  steps on a line that reaches 0 one step after the last.
  """
  warm = (step + 1) / max(options.warmup, 1)
  falling = options.steps - options.decay_from * options.steps
  decay = (options.steps - step) / max(falling, 1)
  return options.peak_lr(latents) * jnp.clip(jnp.minimum(warm, decay), 0, 1)


def current_k(step: jax.Array, /, *, options: TrainConfig, k: int) -> jax.Array:
  """k of the optimiser step `step`, counted from 0: from k_from down to k.

  On a line over k_steps steps, so that early on every latent learns something.
  """
  left = jnp.clip(1 - step / options.k_steps, 0, 1)
  return jnp.int32(jnp.ceil(k + (options.k_from - k) * left))
