"""The cost rule against figures worked out by hand."""

import dataclasses
import subprocess
import sys

import pytest

from lmm_sae.kernels import cost

PAPER = (8192, 4096, 131_072, 256)  # N, D, M, K
CHIP = cost.Device(
  'chip', 'Chip', {'bfloat16': 100.0, 'float32': 50.0}, 10.0, 1e9, 5.0
)


def test_seconds_are_those_of_the_slowest_part():
  one = cost.Cost('x', flops=600, bytes=50, unit='bfloat16', sent=20)
  assert cost.seconds(one, CHIP) == 6.0
  assert cost.limit(one, CHIP) == 'arithmetic'
  assert cost.seconds(dataclasses.replace(one, bytes=70), CHIP) == 7.0
  assert cost.seconds(dataclasses.replace(one, sent=40), CHIP) == 8.0
  assert cost.seconds(dataclasses.replace(one, unit='vector'), CHIP) == 5.0


def test_costs_are_those_counted_by_hand():
  s = cost.Shape(3, 5, 7, 2, 'bfloat16')  # N, D, M, K
  assert cost.encode(s).flops == 2 * 3 * 7 * 5
  assert cost.encode(s).bytes == 2 * 15 + 2 * 35 + 4 * 7 + 8 * 6
  assert cost.spmm(s).flops == 2 * 3 * 2 * 5
  assert cost.spmm(s).bytes == 8 * 6 + 2 * 30 + 4 * 15
  dense = cost.spmm(s, 'dense')  # z written and read, w read, y written
  assert dense.flops == 2 * 3 * 7 * 5
  assert dense.bytes == 8 * 6 + 2 * 2 * 21 + 2 * 35 + 4 * 15
  assert cost.sddmm(s).bytes == 8 * 6 + 2 * 15 + 2 * 30
  assert cost.spmm_t(s).bytes == 8 * 8 * 6 + 2 * 30 + 4 * 35
  assert cost.project(s).bytes == 12 * 35 + 4 * 7
  assert cost.adam(s).bytes == 28 * 35


def test_the_papers_step_on_an_h200_is_the_arithmetic_of_the_data_sheet():
  device = cost.DEVICES['h200']
  by_name = {x.name: x for x in cost.train_step(*PAPER, device=device)}
  # 2 · 8192 · 131072 · 4096 = 8.80 TFLOP at 989.4 TFLOP/s: 8.89 ms.
  assert cost.seconds(by_name['encode'], device) == pytest.approx(
    8.89e-3, rel=1e-3
  )
  # 8192 · 256 rows of 8 KiB: 17.2 GB and y at 4.8 TB/s: 3.61 ms.
  assert cost.seconds(by_name['spmm'], device) == pytest.approx(
    3.61e-3, rel=3e-3
  )
  # 28 · 131072 · 4096 = 15.0 GB a matrix.
  assert by_name['adam w_dec'].bytes == pytest.approx(15.03e9, rel=1e-3)
  assert all(name.count('gather') == 0 for name in by_name)


def test_the_rule_is_about_the_ratio_that_it_names():
  *_, m, k = PAPER
  for name in ('a100', 'h100', 'h200', 'v4', 'v5e', 'v5p'):
    device = cost.DEVICES[name]
    one = cost.choices(device, *PAPER)['spmm']
    ratio = 2 * m * device.bandwidth / (k * 2 * device.flops['bfloat16'])
    assert one.dense_s / one.sparse_s == pytest.approx(ratio, rel=0.02)
    assert one.form == 'sparse', name


def test_few_latents_and_many_active_ones_are_dense():
  found = cost.choices(cost.DEVICES['h100'], 8192, 4096, 8192, 256)
  assert {one.form for one in found.values()} == {'dense'}
  assert 'dense at least' in found['spmm'].why


def test_shards_divide_the_work_and_send_what_they_exchange():
  alone = {x.name: x for x in cost.train_step(*PAPER)}
  split = {x.name: x for x in cost.train_step(*PAPER, data=2, latent=4)}
  assert split['encode'].flops * 8 == alone['encode'].flops
  assert split['adam w_enc'].bytes * 4 == alone['adam w_enc'].bytes
  assert split['spmm'].flops * 2 == alone['spmm'].flops  # K columns a shard
  assert split['gather of values'].sent == 2 * 4 * 4096 * 256 * 3
  grads = 4 * (2 * 32_768 * 4096 + 3 * 32_768 + 4096)
  assert split['sum over rows'].sent == 2 * grads
  assert not any(x.sent for x in alone.values())


def test_float32_casts_nothing_and_dead_latents_cost_more():
  plain = {x.name: x for x in cost.train_step(4, 6, 10, 3, 'float32')}
  assert plain['cast of w'].bytes == 0
  dead = {x.name: x for x in cost.train_step(4, 6, 10, 3, dead=5)}
  assert dead['auxk'].flops == 10 * 4 * 5 * 6


def test_devices_are_found_by_what_jax_calls_them():
  assert cost.find('NVIDIA H100 80GB HBM3').name == 'h100'
  assert cost.find('NVIDIA A100-SXM4-80GB').name == 'a100'
  assert cost.find('TPU v5 lite').name == 'v5e'
  assert cost.find('TPU v5').name == 'v5p'
  assert cost.find('cpu') is None


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((4, 6, 10, 3, 'float8'), 'dtype is'),
    ((4, 6, 10, 0), 'k is 0'),
  ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    cost.train_step(*arguments)


def test_shares_that_are_not_even_are_refused():
  with pytest.raises(ValueError, match='latents is 10'):
    cost.train_step(4, 6, 10, 3, latent=4)


def test_every_line_of_the_description_is_there():
  lines = cost.describe(cost.DEVICES['h200'], *PAPER)
  assert lines[0].startswith('h200 (data sheet): N=8192')
  assert lines[-1].startswith('step: at least')
  assert sum('sparse at least' in line for line in lines) == 3


def test_the_rule_needs_no_jax():
  code = 'import sys, lmm_sae.kernels.cost; print("jax" in sys.modules)'
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == 'False'
