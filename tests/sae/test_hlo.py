"""sae/hlo.py on programs whose collectives are known, and on a TPU's text."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from lmm_sae.kernels import cost
from lmm_sae.sae import hlo, mesh

CHIP = cost.Device(
  'chip',
  'TPU chip',
  {'bfloat16': 100.0, 'float32': 50.0},
  bandwidth=10.0,
  memory=1e9,
  link=5.0,
  clock=20.0,
)
ROWS, WIDTH, TURNS = 7, 12, 5
SIZE = ROWS * WIDTH * 4


def program(work):
  """HLO of a function of one array on 2 x 4 devices."""
  over = jax.shard_map(
    work, mesh=mesh.make(8, 4), in_specs=P(), out_specs=P(), check_vma=False
  )
  shape = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
  return jax.jit(over).lower(shape).compile().as_text()


def looped(x):
  """A sum over `latent` in each of TURNS turns."""
  return lax.fori_loop(0, TURNS, lambda i, x: jnp.sin(lax.psum(x, 'latent')), x)


def chosen(x):
  """A gather over `data` where x begins above 0; nothing otherwise."""
  return lax.cond(
    x[0, 0] > 0,
    lambda x: lax.all_gather(x, 'data', axis=1, tiled=True),
    lambda x: jnp.concatenate([x, x], 1),
    x,
  )


@pytest.mark.parametrize(
  ('work', 'kind', 'count', 'size', 'sent'),
  [
    # A ring of n sends and receives 2 (n - 1) / n of a sum, each way.
    (lambda x: lax.psum(x, 'data'), 'all-reduce', 1, SIZE, 2 * SIZE),
    (lambda x: lax.psum(x, 'latent'), 'all-reduce', 1, SIZE, 3 * SIZE),
    # Three pieces come in and go out.
    (
      lambda x: lax.all_gather(x, 'latent'),
      'all-gather',
      1,
      4 * SIZE,
      6 * SIZE,
    ),
    (
      lambda x: lax.psum_scatter(x, 'latent', scatter_dimension=1, tiled=True),
      'reduce-scatter',
      1,
      SIZE // 4,
      1.5 * SIZE,
    ),
    (
      lambda x: lax.ppermute(x, 'latent', [(0, 1), (1, 2), (2, 3), (3, 0)]),
      'collective-permute',
      1,
      SIZE,
      2 * SIZE,
    ),
    (looped, 'all-reduce', TURNS, TURNS * SIZE, TURNS * 3 * SIZE),
    (chosen, 'all-gather', 1, 2 * SIZE, 2 * SIZE),
  ],
)
def test_bytes_are_those_that_a_known_collective_moves(
  work, kind, count, size, sent
):
  found = hlo.read(program(work), CHIP)
  assert found.collectives == (hlo.Collective(kind, count, size, sent),)
  assert found.links_s == pytest.approx(sent / CHIP.link)


def test_the_quickest_branch_of_a_conditional_may_be_asked_for():
  assert hlo.read(program(chosen), CHIP, most=False).collectives == ()


TPU = """HloModule jit_step, is_scheduled=true, num_partitions=6

%turn (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.1 = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %k = f32[4]{0:T(128)} custom-call(%g), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"TUz=","cost_estimate":{"flops":\
"300","transcendentals":"0","bytes_accessed":"20","remote_bytes_transferred":\
"0"}}}
  ROOT %t = (s32[]{:T(128)}, f32[4]{0:T(128)}) tuple(%i, %k)
}

%go (p: (s32[], f32[4])) -> pred[] {
  %p.2 = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %c = s32[]{:T(128)} constant(3), metadata={op_name="x"}
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
}

%fused (q: f32[4]) -> f32[4] {
  ROOT %a = f32[4]{0:T(128)} add(%q, %q), \
backend_config={"window_config":{"estimated_cycles":"7"}}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0:T(128)} parameter(0)
  %f = f32[4]{0:T(128)} fusion(%x), kind=kLoop, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"40"}}
  %u = f32[4]{0:T(128)} copy(%f), \
backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  %s = (f32[4]{0:T(128)}, s32[4]{0:T(128)}) sort(%u, %n), dimensions={0}
  %w = (s32[]{:T(128)}, /*index=1*/f32[4]{0:T(128)}) while(%t.1), \
condition=%go, body=%turn
  %g-start = (bf16[2,4]{1,0:T(8,128)(2,1)}, bf16[12,4]{1,0:T(8,128)(2,1)}) \
all-gather-start(%b), channel_id=2, replica_groups=[1,6]<=[6], dimensions={0}
  ROOT %r = f32[4]{0:T(128)} all-reduce(%y), channel_id=1, replica_groups={}
}
"""


def test_cycles_kernels_and_loops_of_a_tpu_program_are_added_up():
  found = hlo.read(TPU, CHIP)
  assert found.own_s == 40 / 20  # of the fusion, not of what is in it
  assert found.kernels_s == 3 * 300 / 100  # three turns; 20 bytes take 2 s
  assert found.unpriced == 1
  assert found.collectives == (
    hlo.Collective('all-reduce', 1, 16, 4 * 16 * 5 / 6),
    hlo.Collective('all-gather', 1, 96, 2 * 96 * 5 / 6),
  )
  links_s = (4 * 16 + 2 * 96) * 5 / 6 / 5
  assert found.seconds == pytest.approx(2 + 9 + links_s)


def test_without_a_clock_cycles_are_no_time():
  chip = dataclasses.replace(CHIP, clock=0.0)
  assert hlo.read(TPU, chip).own_s == 0
