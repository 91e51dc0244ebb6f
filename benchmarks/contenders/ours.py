"""lmm_sae; the variant is the kernels' backend."""

import jax
import jax.numpy as jnp
import numpy as np

from lmm_sae.sae import mesh as mesh_lib
from lmm_sae.sae import trainer
from lmm_sae.sae.model import Params, SaeConfig
from lmm_sae.sae.options import TrainConfig
from lmm_sae.sae.trainer import TrainState


class Contender:
  def __init__(self, job, variant):
    config = SaeConfig(
      layer=0, width=job['width'], latents=job['latents'], k=job['k']
    )
    options = TrainConfig(
      steps=10**9,
      rows=job['rows'],
      lr=job['lr'],
      warmup=0,
      decay_from=1.0,
      clip=1e30,
      accumulate=1,
      max_skipped=0,
      auxk=0.0,
      multi_topk=0.0,
      kinds=('all',),
      normalise=False,
      backend=variant,
      devices=1,
      latent_shards=1,
      save_every=1,
      keep=1,
      keep_best=0,
      block_rows=1,
      pool_blocks=1,
      data_shares=1,
    )
    init = np.load(job['init'])
    params = Params(
      *(jnp.array(init[n]) for n in ('w_enc', 'b_enc', 'w_dec')),
      jnp.array(init['b_dec']),
    )
    self.state = TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=trainer.adam().init(params),
      idle_M=jnp.zeros(config.latents, jnp.int32),
      scale=jnp.ones(()),
      skipped=jnp.zeros((), jnp.int32),
    )
    self.take = trainer.make_step(config, options, mesh_lib.make(1))

  def step(self, x_ND: np.ndarray) -> None:
    self.state, _ = self.take(self.state, jnp.asarray(x_ND))

  def wait(self) -> None:
    jax.block_until_ready(self.state)

  def params(self) -> dict[str, np.ndarray]:
    p = self.state.params
    return {
      'w_enc': np.asarray(p.w_enc_MD),
      'b_enc': np.asarray(p.b_enc_M),
      'w_dec': np.asarray(p.w_dec_MD),
      'b_dec': np.asarray(p.b_dec_D),
    }
