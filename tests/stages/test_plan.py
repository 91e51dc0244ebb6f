"""stages/plan.py against sums done by hand."""

import dataclasses
import json

import pytest

from lmm_sae.stages import plan

OPTS = plan.PlanConfig(
  samples=3,
  tokens=10,
  width=4,
  layers=2,
  latents=8,
  k=2,
  rows=5,
  steps=12,
  keep=3,
  auxk=False,
  devices=2,
  tflops=0.0,
)


def test_rows_and_bytes_of_the_store():
  found = plan.reckon(OPTS)
  assert found.rows == 30
  # 2 layers of 4 bf16 numbers and the token arrays, each row.
  assert found.store_bytes == 30 * (2 * 4 * 2 + plan.TOKEN_BYTES)
  assert found.epochs == 2.0


def test_parameters_and_memory_of_the_sae():
  found = plan.reckon(OPTS)
  assert found.parameters == 8 * 4 + 8 + 8 * 4 + 4
  assert found.state_bytes == 76 * 16 // 2
  assert found.checkpoint_bytes == 76 * 12 * 3


def test_operations_of_a_step():
  dense = 2 * 5 * 8 * 4
  sparse = 4 * (2 * 5 * 2 * 4)
  assert plan.reckon(OPTS).step_flops == dense + sparse
  auxk = dataclasses.replace(OPTS, auxk=True)
  assert plan.reckon(auxk).step_flops == dense + sparse + 4 * 2 * 5 * 2 * 4


def test_hours_are_told_only_where_the_speed_is_given():
  assert plan.reckon(OPTS).hours is None
  found = plan.reckon(dataclasses.replace(OPTS, tflops=1e-12))
  # 640 operations, 12 steps, 2 SAEs; 2 devices of one operation a second.
  assert found.hours == pytest.approx(640 * 12 * 2 / 2 / 3600)


def test_the_width_is_read_off_a_model_folder(tmp_path, config):
  model = {'text_config': {'hidden_size': 24}}
  (tmp_path / 'config.json').write_text(json.dumps(model))
  config.lmm.path = str(tmp_path)
  assert plan.PlanConfig.of(config).width == 24


def test_an_unknown_width_names_the_field_to_give(config):
  config.lmm.path = '/no/such/model'
  with pytest.raises(ValueError, match=r'--config.plan.width=N'):
    plan.PlanConfig.of(config)


def test_more_active_latents_than_latents_are_refused():
  with pytest.raises(ValueError, match='k=9 is more than'):
    dataclasses.replace(OPTS, k=9)


def test_the_limit_bounds_the_samples_of_a_source(config):
  config.plan.width = 4
  config.data.source = 'llava'
  config.plan.samples, config.data.limit = 100, 30
  assert plan.PlanConfig.of(config).samples == 30


def test_sizes_are_told_in_the_unit_that_people_read():
  assert plan.size(1023) == '1.02e+03 B'
  assert plan.size(3 * 2**30) == '3 GiB'
  assert plan.size(2**41) == '2 TiB'
