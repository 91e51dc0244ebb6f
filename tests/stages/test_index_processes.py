"""One index, whoever makes its parts: processes, shares, in any order."""

import json
import multiprocessing
import time

import numpy as np
import pytest

from experiments import base
from lmm_sae.core.index import LatentIndex
from lmm_sae.sae import exports, index_parts, index_plan
from lmm_sae.sae import mesh as mesh_lib
from lmm_sae.stages import index as stage
from tests import toy
from tests.stages.test_index import tree


def set_up(config):
  config.lmm.layers = (toy.LAYER,)
  config.index.exemplars = 3
  config.index.spread = 2
  config.index.rows = 50
  config.index.processes = 1
  return config


@pytest.fixture
def config(config, monkeypatch):
  monkeypatch.setattr(index_plan, 'PART_SAMPLES', 2)  # 6 parts a split
  return set_up(config)


@pytest.fixture
def workdir(tmp_path):
  return toy.make_workdir(tmp_path / 'run')


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> dict[str, bytes]:
  """The files of an index that one process made at one go."""
  other = toy.make_workdir(tmp_path_factory.mktemp('whole'))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(index_plan, 'PART_SAMPLES', 2)
    stage.run(set_up(base.get_config()), other)
  found = tree(other.root / 'index')
  assert len(found) > 80
  return found


def index_shares(config, workdir, *shares: str) -> None:
  for share in shares:
    config.index.share = share
    stage.run(config, workdir)


def test_two_processes_make_the_index_of_one(config, workdir, whole):
  config.index.splits = ('b',)
  config.index.processes = 2
  stage.run(config, workdir)
  own = {name: data for name, data in whole.items() if name.startswith('2/b/')}
  assert tree(workdir.root / 'index') == own


@pytest.mark.slow
def test_four_processes_make_the_index_of_one(config, workdir, whole):
  config.index.processes = 4
  stage.run(config, workdir)
  assert tree(workdir.root / 'index') == whole


@pytest.mark.parametrize('shares', [('0/2', '1/2'), ('2/3', '0/3', '1/3')])
def test_who_ends_last_of_the_shares_merges(config, workdir, whole, shares):
  index_shares(config, workdir, *shares[:-1])
  for split in ('a', 'b'):
    with pytest.raises(ValueError, match='no finished index'):
      LatentIndex.open(workdir.index(toy.LAYER, split))
  index_shares(config, workdir, shares[-1])
  assert tree(workdir.root / 'index') == whole


def test_a_part_of_another_share_is_made_once(
  config, workdir, whole, monkeypatch
):
  index_shares(config, workdir, '1/2')
  made = []
  save = index_parts.index_build.Part.save
  monkeypatch.setattr(
    index_parts.index_build.Part,
    'save',
    lambda self, path: (made.append(path.name), save(self, path)),
  )
  index_shares(config, workdir, '')  # one command does the rest
  assert made == ['00000000', '00000004', '00000008'] * 2
  assert tree(workdir.root / 'index') == whole


def test_a_plan_that_stands_is_kept_to(config, workdir, whole, monkeypatch):
  index_shares(config, workdir, '0/2')
  monkeypatch.setattr(index_plan, 'PART_SAMPLES', 5)
  index_shares(config, workdir, '1/2')
  assert tree(workdir.root / 'index') == whole


def test_another_seed_amid_the_work_is_refused(config, workdir):
  index_shares(config, workdir, '0/2')
  config.index.seed = 1
  with pytest.raises(ValueError, match='delete that folder'):
    index_shares(config, workdir, '1/2')


@pytest.mark.parametrize('share', ['2/2', '1', '-1/2', '0/0', 'a/b'])
def test_a_share_that_is_none_is_refused(config, workdir, share):
  with pytest.raises(ValueError, match=r'index\.share'):
    index_shares(config, workdir, share)


def test_an_error_of_a_process_is_told_and_the_others_end(
  config, workdir, monkeypatch
):
  config.index.splits = ('a',)
  index_shares(config, workdir, '0/6')  # the plan stands
  (workdir.export(toy.LAYER) / 'sparsify' / 'cfg.json').write_text('{')
  (workdir.export(toy.LAYER) / 'saelens' / 'cfg.json').write_text('{')
  store = stage.ActivationStore.open(workdir.acts('a'))
  opts = index_plan.IndexConfig(
    **(config.index.to_dict() | {'share': '', 'processes': 2})
  )
  job = index_plan.Job(
    workdir.index(toy.LAYER, 'a'), store.path, workdir, toy.LAYER, '', opts
  )
  note = json.loads((job.path / 'parts' / 'plan.json').read_text())
  plan = index_plan.Plan(**note)
  with pytest.raises(ValueError, match=r'cfg\.json'):
    index_parts.make(job, plan, None)
  assert not multiprocessing.active_children()


def test_memory_that_does_not_do_for_one_sample_is_refused(config, workdir):
  config.index.memory_mb = 0
  with pytest.raises(ValueError, match='at least 1'):
    stage.run(config, workdir)
  spans = [(0, 400), (400, 1100)]

  def draft(memory_mb: int) -> index_plan.Plan:
    opts = config.index.to_dict() | {'memory_mb': memory_mb, 'rows': 9999}
    return index_plan.draft('', spans, 1000, 64, index_plan.IndexConfig(**opts))

  with pytest.raises(ValueError, match=r'700 tokens .* needs 52: set it to'):
    draft(51)
  assert 700 <= draft(52).rows < 730
  assert draft(52).encoded == 512
  assert draft(520).encoded == 4096


def test_no_chunk_goes_over_the_edge_of_a_group():
  spans = [(0, 10), (10, 20), (20, 30), (33, 40), (40, 45)]
  found = list(index_plan.chunks(spans, 25, {0, 10, 33}))
  assert found == [(0, 10), (10, 30), (33, 45)]
  found = list(index_plan.chunks(spans, 12, {0, 10, 33}))
  assert found == [(0, 10), (10, 20), (20, 30), (33, 45)]


def test_devices_share_the_rows_and_change_nothing(config, workdir, whole):
  """The suite has 8 devices; here the SAE is on one."""
  job = index_plan.Job(
    workdir.index(toy.LAYER, 'b'),
    workdir.acts('b'),
    workdir,
    toy.LAYER,
    '',
    index_plan.IndexConfig(**config.index),
  )
  assert job.sae().mesh.shape[mesh_lib.DATA] == 8
  store = stage.ActivationStore.open(workdir.acts('b'))
  stage.build(job, store, exports.load(workdir.export(toy.LAYER)))
  for name, data in tree(job.path).items():
    assert data == whole[f'{toy.LAYER}/b/{name}'], name


def test_a_latent_and_a_sample_are_told_at_once(config, workdir, capsys):
  stage.run(config, workdir)
  before = tree(workdir.root / 'index')
  capsys.readouterr()
  config.index.latent, config.index.sample = 0, 2
  stage.run(config, workdir)
  index = LatentIndex.open(workdir.index(toy.LAYER, 'b'))
  out = capsys.readouterr().out
  assert f'of {index.stats["samples_fired"][0]} samples' in out
  best = index.exemplars(0)[0]
  assert f'sample {best.sample}: mean {best.strength:.4g}, ' in out
  latents, mean = index.sample(2)
  assert f'fires {len(latents)} latents' in out
  strongest = int(np.argmax(mean))
  assert f'latent {latents[strongest]}: mean {mean[strongest]:.4g}' in out
  took = []
  for _ in range(5):
    start = time.perf_counter()
    stage.run(config, workdir)
    took.append(time.perf_counter() - start)
  assert min(took) < 0.1  # two splits, each under 50 ms
  assert tree(workdir.root / 'index') == before
  config.index.latent = toy.M
  with pytest.raises(ValueError, match='latent 7 is not in this index'):
    stage.run(config, workdir)
