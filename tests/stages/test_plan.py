"""stages/plan.py against sums done by hand."""

import dataclasses
import importlib.util
import json

import pytest

from experiments import llava_next_8b
from lmm_sae.core import forecast, host
from lmm_sae.core.workdir import Workdir
from lmm_sae.kernels import cost
from lmm_sae.sae import meshes
from lmm_sae.sae.model import SaeConfig
from lmm_sae.stages import plan
from tests.sae import small

OPTS = plan.PlanConfig(
  samples=3,
  tokens=10,
  width=4,
  layers=2,
  stored='bfloat16',
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
  assert found.store_bytes == 30 * (2 * 4 * 2 + forecast.TOKEN_BYTES)
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
  config.lmm.path = 'small'
  assert plan.PlanConfig.of(config).width == 192


def test_no_path_is_no_model_whatever_lies_here(tmp_path, monkeypatch):
  model = {'text_config': {'hidden_size': 24}}
  (tmp_path / 'config.json').write_text(json.dumps(model))
  monkeypatch.chdir(tmp_path)
  assert host.language_model('') == {}
  assert host.language_model(str(tmp_path)) == {'hidden_size': 24}


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


@pytest.fixture
def paper():
  """The paper's config, on a GPU that is described."""
  config = llava_next_8b.get_config()
  config.plan.topology = 'gpu:8'
  config.plan.gpu_memory = 40.0
  config.plan.gpu_bandwidth = 2000.0
  config.plan.gpu_tflops = 300.0
  return config


def planned(config, capsys) -> str:
  plan.run(config, Workdir.of('unused'))
  return capsys.readouterr().out


def test_a_gpu_is_planned_for_by_arithmetic_and_said_so(
  paper, capsys, tmp_path
):
  paper.plan.out = str(tmp_path / 'plan.json')
  text = planned(paper, capsys)
  assert 'no: there is no compiler for a GPU that is not here' in text
  found = json.loads((tmp_path / 'plan.json').read_text())
  own, *others = found['shares']
  assert (own['data'], own['latent'], own['compiled']) == (1, 8, None)
  assert [one['latent'] for one in others] == [1, 2, 4]
  chip = plan.gpu(paper.plan)
  costs = cost.train_step(
    73_600, 4096, 2**17, 256, device=chip, data=1, latent=8
  )
  assert own['roofline_s'] == cost.total_seconds(costs, chip)
  assert own['dead_s'] > own['roofline_s']
  speed = 73_600 / own['roofline_s']
  assert f'{speed:,.0f}' in text
  assert forecast.span(24_000 * own['roofline_s']) in text
  assert 'tokens       1,791,700,000 (779,000 samples' in text


def test_a_mesh_that_needs_more_than_a_chip_has_does_not_fit(paper, capsys):
  paper.sae.latents = 2**20
  text = planned(paper, capsys)
  assert '*    1 x 8   may fit' in text
  assert '     8 x 1   no: ' in text


def test_a_step_that_does_not_fit_is_an_error_after_the_plan(paper, capsys):
  paper.train.latent_shards = 1
  paper.sae.latents = 2**20
  with pytest.raises(ValueError, match='does not fit on gpu:8 as the config'):
    plan.run(paper, Workdir.of('unused'))
  text = capsys.readouterr().out
  assert '*    8 x 1   no: ' in text
  assert '     1 x 8   may fit' in text


@pytest.mark.tpu_compile
def test_a_kernel_that_refuses_its_shard_is_heard(config, capsys):
  config.plan.topology = 'v5p:2x2x1'
  config.sae.latents = 2**18
  with pytest.raises(ValueError, match='does not fit on v5p:2x2x1'):
    plan.run(config, Workdir.of('unused'))
  assert 'no: the kernel backend tpu takes up to' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'plan.gpu_memory': 0.0}, 'give --config.plan.gpu_memory'),
    ({'plan.topology': 'v5p'}, 'it is KIND:CHIPS'),
    ({'plan.topology': 'h100:9'}, 'latent_shards is 8, which does not divide'),
    ({'train.devices': 16}, r'but 8 chip\(s\) are here: set it to 0..8'),
    ({'train.rows': 73_601, 'train.latent_shards': 4}, 'train.rows is 73601'),
    ({'train.data_shares': 1, 'train.latent_shards': 4}, 'data_shares is 1,'),
    ({'sae.latents': 2**17 + 4}, 'sae.latents is 131076'),
    ({'plan.meshes': 'few'}, 'plan.meshes is .few.; it is one of one, all'),
  ],
)
def test_what_chips_cannot_share_is_refused_before_any_work(
  paper, fields, message
):
  paper.update_from_flattened_dict(fields)
  with pytest.raises(ValueError, match=message):
    plan.run(paper, Workdir.of('unused'))


def test_the_compiler_that_is_missing_is_named(paper, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  paper.plan.topology = 'v5p:4x4x4'
  with pytest.raises(ValueError, match=r'lmm_sae\[tpu-plan\]'):
    plan.run(paper, Workdir.of('unused'))


def test_bytes_that_a_chip_cannot_do_without():
  options = dataclasses.replace(small.TRAIN, rows=64, accumulate=1)
  own, width = small.M // 4, small.D
  parameters = 2 * own * width + 2 * own + width
  # Parameters, two moments, a gradient; idle counts; rows twice.
  want = 4 * (4 * parameters + own) + 64 // 2 * width * 6
  assert meshes.least_bytes(small.CONFIG, options, (2, 4)) == want
  bf16 = dataclasses.replace(options, compute='bfloat16', accumulate=2)
  more = 4 * parameters + 2 * (2 * own * width)
  assert meshes.least_bytes(small.CONFIG, bf16, (2, 4)) == want + more


def test_a_float32_step_of_a_tpu_is_priced_by_its_sparse_kernels():
  config = SaeConfig(layer=0, width=64, latents=512, k=256)
  chip = cost.DEVICES['v5p']
  dense, sparse = (
    meshes.roofline(
      config,
      dataclasses.replace(small.TRAIN, rows=64, compute=compute),
      (1, 1),
      chip,
      dead=False,
    )
    for compute in ('bfloat16', 'float32')
  )
  units = [{x.name: x.unit for x in one}['spmm'] for one in (dense, sparse)]
  assert units == ['bfloat16', cost.VECTOR]


@pytest.mark.tpu_compile
def test_a_tpu_is_planned_for_by_its_compiler(config, capsys, tmp_path):
  config.update_from_flattened_dict(
    {
      'plan.topology': 'v5p:2x2x1',
      'plan.meshes': 'all',
      'plan.out': str(tmp_path / 'plan.json'),
      'train.devices': 0,
      'train.latent_shards': 2,
      'train.compute': 'bfloat16',
    }
  )
  text = planned(config, capsys)
  own, *others = json.loads((tmp_path / 'plan.json').read_text())['shares']
  assert [one['latent'] for one in (own, *others)] == [2, 1, 4]
  for one in (own, *others):
    assert one['compiled']['memory']['total'] >= one['least_bytes']
  assert 'all-reduce:' in text
  assert 'compiler     roofline' in text
