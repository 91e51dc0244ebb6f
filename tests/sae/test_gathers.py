"""What devices that share the latents send in a whole training step."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lmm_sae.sae import mesh as mesh_lib
from lmm_sae.sae import trainer
from lmm_sae.sae.model import SaeConfig
from tests.kernels.test_sharded import gathered
from tests.sae.small import TRAIN

ROWS, WIDTH, LATENTS, K, AUX = 512, 128, 4096, 32, 64
CONFIG = SaeConfig(layer=0, width=WIDTH, latents=LATENTS, k=K, aux=AUX)


def gspmd(multi: float):
  """The gradients of the same losses, as GSPMD splits lax.top_k."""

  def loss(w_enc_MD, b_enc_M, w_dec_MD, b_dec_D, dead_M, x_ND):
    z_NM = jax.nn.relu((x_ND - b_dec_D) @ w_enc_MD.T + b_enc_M)

    def decode(z_NM, k):
      vals_NK, idx_NK = lax.top_k(z_NM, k)
      return jnp.einsum('nk,nkd->nd', vals_NK, w_dec_MD[idx_NK])

    error_ND = x_ND - b_dec_D - decode(z_NM, K)
    aux_ND = decode(jnp.where(dead_M, z_NM, 0), AUX)
    total = jnp.sum(error_ND**2)
    total += jnp.sum((lax.stop_gradient(error_ND) - aux_ND) ** 2) / 32
    if multi:
      slip_ND = x_ND - b_dec_D - decode(z_NM, 4 * K)
      total += multi * jnp.sum(slip_ND**2)
    return total

  return jax.grad(loss, (0, 1, 2, 3))


@pytest.mark.parametrize(
  ('multi', 'share'), [(0.0, 0.02), pytest.param(1 / 8, 0.04)]
)
def test_a_whole_step_gathers_little_of_what_gspmd_does(multi, share):
  """AuxK among it; Multi-TopK's 4 k values cost four times those of k."""
  mesh = mesh_lib.make(8, 4)
  options = dataclasses.replace(
    TRAIN, rows=ROWS, multi_topk=multi, backend='cpu'
  )

  def shaped(tree, specs):
    return jax.tree.map(
      lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
      tree,
      mesh_lib.sharding(mesh, specs),
    )

  state = shaped(trainer.shapes(CONFIG), trainer.specs())
  row = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
  x_ND = shaped(row, mesh_lib.ROWS)
  step = trainer.make_step(CONFIG, options, mesh)
  mine = gathered(step.lower(state, x_ND).compile())
  p = state.params
  dead_M = shaped(jax.ShapeDtypeStruct((LATENTS,), bool), mesh_lib.LATENTS)
  weights = (p.w_enc_MD, p.b_enc_M, p.w_dec_MD, p.b_dec_D)
  rival = jax.jit(
    gspmd(multi), out_shardings=tuple(x.sharding for x in weights)
  )
  theirs = gathered(rival.lower(*weights, dead_M, x_ND).compile())
  assert 0 < mine < share * theirs
