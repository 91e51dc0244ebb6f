"""lmm_sae: the variant is the kernels' backend, and after a `-` the dtype.

Options and state are those of the package wherever the comparison does not ask
for others, so that a new field needs no word here.
"""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import base
from lmm_sae.core import host
from lmm_sae.sae import mesh as mesh_lib
from lmm_sae.sae import trainer
from lmm_sae.sae.model import SaeConfig
from lmm_sae.sae.options import TrainConfig

LIKE_PEERS = {  # a plain TopK SAE: constant rate, no clipping, the FVU alone
  'steps': 10**9,
  'warmup': 0,
  'decay_from': 1.0,
  'clip': 1e30,
  'auxk': 0.0,
  'normalise': False,
}


class Contender:
  def __init__(self, job, variant, init):
    host.keep_freed_memory()  # as the stage `train` does
    backend, _, dtype = variant.partition('-')
    config = SaeConfig(
      layer=0, width=job['width'], latents=job['latents'], k=job['k']
    )
    changes = {'rows': job['rows'], 'lr': job['lr'], 'backend': backend}
    changes['compute'] = dtype or 'float32'
    fields = {**base.get_config().train, **LIKE_PEERS, **changes}
    options = TrainConfig(**fields)
    like = trainer.shapes(config)
    params = like.params.replace(
      w_enc_MD=jnp.array(init['w_enc']),
      b_enc_M=jnp.array(init['b_enc']),
      w_dec_MD=jnp.array(init['w_dec']),
      b_dec_D=jnp.array(init['b_dec']),
    )
    state = like.replace(params=params, scale=jnp.ones(()))
    self.state = jax.tree.map(
      lambda x: x if isinstance(x, jax.Array) else jnp.zeros(x.shape, x.dtype),
      state,
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
