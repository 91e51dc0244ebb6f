"""Every TPU kernel through Mosaic, for chips that are not here."""

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from lmm_sae.sae import topology
from tests.kernels import tpu_cases

CHIPS = ('v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1')


@pytest.mark.tpu_compile
@pytest.mark.parametrize('case', tpu_cases.cases(), ids=lambda case: case.name)
@pytest.mark.parametrize('chip', CHIPS)
def test_the_kernel_compiles_and_says_what_it_costs(chip, case):
  device = topology.devices(topology.parse(chip))[0]
  args = [
    jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=SingleDeviceSharding(device)
    )
    for x in case.args
  ]
  text = jax.jit(case.function).lower(*args).compile().as_text()
  kernels = text.count('custom_call_target="tpu_custom_call"')
  assert kernels > 0
  assert text.count('"cost_estimate":{"flops"') == kernels
