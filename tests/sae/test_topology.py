"""sae/topology.py: names of chips, and the step compiled for a TPU."""

import dataclasses
import importlib.util

import pytest

from lmm_sae.kernels import cost
from lmm_sae.sae import mesh as mesh_lib
from lmm_sae.sae import topology
from lmm_sae.sae.model import SaeConfig
from tests.sae.small import TRAIN

OPTIONS = dataclasses.replace(
  TRAIN, rows=512, compute='bfloat16', devices=0, latent_shards=2
)
CONFIG = SaeConfig(layer=0, width=128, latents=2048, k=4)
SHAPES = {'v4:2x2x2': 8, 'v5e:2x2': 4, 'v5p:2x2x2': 8, 'v6e:2x4': 8}


def test_a_name_gives_the_chip_and_how_many_there_are():
  chips = topology.parse('v5p:4x4x8')
  assert (chips.chip, chips.chips) == (cost.DEVICES['v5p'], 128)
  assert chips.tpu
  assert topology.parse('h100:6').chips == 6
  assert not topology.parse('h100:6').tpu


def test_a_gpu_is_what_it_is_described_as():
  one = cost.Device('gpu', 'GPU', {'bfloat16': 9.0}, 2.0, 3.0)
  assert topology.parse('gpu:5', one).chip == one


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('v5p', 'it is KIND:CHIPS, as in v5p:4x4x4'),
    ('v5p:4x', 'it is KIND:CHIPS'),
    ('v5p:4x0x4', 'it is KIND:CHIPS'),
    ('v9:2x2', 'v9 is not known: it is one of a100,'),
    ('gpu:8', 'give --config.plan.gpu_memory'),
    ('v5p:2x2x2x2', '4 sides, too many for v5p'),
    ('h100:2x4', '2 sides, too many for h100'),
  ],
)
def test_another_name_is_refused(name, message):
  with pytest.raises(ValueError, match=message):
    topology.parse(name)


def test_without_the_compiler_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r'pip install "lmm_sae\[tpu-plan\]"'):
    topology.devices(topology.parse('v5p:2x2x1'))


@pytest.mark.tpu_compile
def test_chips_that_make_no_torus_are_refused():
  with pytest.raises(ValueError, match='refused by the TPU compiler'):
    topology.devices(topology.parse('v5p:3x5x7'))


@pytest.mark.tpu_compile
@pytest.mark.parametrize('name', SHAPES)
def test_the_step_compiles_and_sends_what_the_arithmetic_says(name):
  chips = topology.parse(name)
  devices = topology.devices(chips)
  assert len(devices) == SHAPES[name]
  assert cost.find(devices[0].device_kind) == chips.chip
  mesh = mesh_lib.make(0, 2, devices)
  step = topology.trace(CONFIG, OPTIONS, mesh)
  found = topology.compile_step(step, chips.chip)
  held, shares = found.memory, SHAPES[name] // 2
  own, width = CONFIG.latents // 2, CONFIG.width
  state = 4 * (3 * (2 * own * width + 2 * own + width) + own)
  batch = 2 * OPTIONS.rows // shares * width
  assert held.arguments == pytest.approx(state + batch, rel=0.01)
  assert held.total >= held.arguments + held.temporaries
  costs = cost.train_step(
    OPTIONS.rows,
    width,
    CONFIG.latents,
    CONFIG.k,
    'bfloat16',
    data=shares,
    latent=2,
  )
  sent = sum(one.sent for one in found.least.collectives)
  assert sent == pytest.approx(sum(one.sent for one in costs), rel=0.05)
  assert found.least.kernels_s > 0
  assert found.least.seconds <= found.most.seconds


@pytest.mark.tpu_compile
def test_a_mesh_may_split_a_side_of_the_torus():
  devices = topology.devices(topology.parse('v5p:4x4x4'))
  assert mesh_lib.make(0, 8, devices).shape == {'data': 8, 'latent': 8}


@pytest.mark.tpu_compile
def test_chips_of_a_mesh_must_be_a_torus_of_their_own():
  devices = topology.devices(topology.parse('v5e:2x2'))
  assert mesh_lib.make(2, 1, devices).size == 2
  with pytest.raises(ValueError, match='the first 3 of these 4 chips'):
    mesh_lib.make(3, 1, devices)


@pytest.mark.tpu_compile
def test_what_does_not_fit_is_said_in_the_compilers_words():
  chips = topology.parse('v5e:1x1')
  mesh = mesh_lib.make(1, 1, topology.devices(chips))
  config = dataclasses.replace(CONFIG, latents=2**17, width=8192)
  step = topology.trace(config, OPTIONS, mesh)
  found = topology.compile_step(step, chips.chip)
  assert found.memory is None
  assert 'out of memory' in found.refusal
  assert 'HBM' in found.refusal.upper()
