"""Latents over devices: one top-k, few bytes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lmm_sae.kernels import ops, sharded


def mesh(data: int, latent: int):
  return jax.make_mesh(
    (data, latent),
    ('data', 'latent'),
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=jax.devices()[: data * latent],
  )


def over(mesh, work, ins, outs):
  return jax.jit(
    jax.shard_map(
      work, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False
    )
  )


@pytest.mark.parametrize('shards', [1, 2, 4, 8])
@pytest.mark.parametrize('k', [1, 5, 16, 64])
def test_selected_values_are_those_of_one_device(shards, k):
  """Integers, so that many are tied; zeros, so that some rows have too few."""
  rng = np.random.default_rng(k)
  z_NM = np.maximum(rng.integers(-6, 5, size=(33, 64)), 0).astype('f')
  vals_NK, idx_NK = jax.lax.top_k(z_NM, k)
  want_NM = np.zeros_like(z_NM)
  np.put_along_axis(want_NM, np.asarray(idx_NK), np.asarray(vals_NK), 1)

  def work(z_Nm):
    vals_NK, idx_NK = jax.lax.top_k(z_Nm, min(k, z_Nm.shape[1]))
    vals_NK = sharded.select(vals_NK, k=k, axis='latent')
    rows = jnp.arange(len(z_Nm))[:, None]
    return jnp.zeros_like(z_Nm).at[rows, idx_NK].add(vals_NK)

  run = over(mesh(1, shards), work, P(None, 'latent'), P(None, 'latent'))
  np.testing.assert_array_equal(run(z_NM), want_NM)


def test_reduce_and_spread_have_the_gradients_of_one_device():
  def work(w_MD, b_D):
    def loss(w_MD, b_D):
      y_D = sharded.reduce(
        jnp.sum(w_MD * sharded.spread(b_D, 'latent'), 0), 'latent'
      )
      return jnp.sum((y_D + b_D) ** 3)

    return jax.grad(loss, (0, 1))(w_MD, b_D)

  def plain(w_MD, b_D):
    return jnp.sum((jnp.sum(w_MD * b_D, 0) + b_D) ** 3)

  rng = np.random.default_rng(0)
  args = rng.normal(size=(8, 3)).astype('f'), rng.normal(size=3).astype('f')
  specs = (P('latent'), P())
  got = over(mesh(1, 4), work, specs, specs)(*args)
  want = jax.grad(plain, (0, 1))(*args)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    got,
    want,
  )


SIZES = {'f32': 4, 's32': 4, 'u32': 4, 'pred': 1, 'bf16': 2, 's64': 8, 'f64': 8}


def gathered(compiled) -> int:
  """Bytes that the all-gathers of a compiled program put out, a device."""
  total = 0
  for line in compiled.as_text().splitlines():
    found = re.search(r'= (.*?) all-gather(-start)?\(', line)
    for kind, shape in re.findall(
      r'(\w+)\[([\d,]*)\]', found[1] if found else ''
    ):
      total += SIZES[kind] * int(
        np.prod([int(d) for d in shape.split(',') if d])
      )
  return total


def test_all_gathers_move_under_two_percent_of_what_gspmd_moves():
  rows, width, latents, k = 512, 128, 4096, 32
  devices = mesh(2, 4)
  shapes = [(rows, width), (latents, width), (latents,)]
  specs = [P('data'), P('latent'), P('latent')]
  args = [
    jax.ShapeDtypeStruct(
      shape, jnp.float32, sharding=jax.NamedSharding(devices, spec)
    )
    for shape, spec in zip(shapes, specs, strict=True)
  ]

  def ours(x_ND, w_MD, b_M):
    vals_NK, idx_NK = ops.encode(x_ND, w_MD, b_M, k=k, backend='cpu')
    vals_NK = sharded.select(vals_NK, k=k, axis='latent')
    return sharded.reduce(
      ops.spmm(vals_NK, idx_NK, w_MD, backend='cpu'), 'latent'
    )

  def theirs(x_ND, w_MD, b_M):
    vals_NK, idx_NK = jax.lax.top_k(jax.nn.relu(x_ND @ w_MD.T + b_M), k)
    return jnp.einsum('nk,nkd->nd', vals_NK, w_MD[idx_NK])

  mine = over(devices, ours, tuple(specs), P('data')).lower(*args).compile()
  out = jax.NamedSharding(devices, P('data'))
  rival = jax.jit(theirs, out_shardings=out).lower(*args).compile()
  assert 0 < gathered(mine) < 0.02 * gathered(rival)
