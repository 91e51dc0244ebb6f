"""The benchmarks of capturing and of reading a store, at tiny shapes."""

import argparse
import dataclasses
import json
import math
import sys

import ml_dtypes
import numpy as np
import pytest
import torch

from benchmarks import (
  capture,
  capture_rival,
  int8_cost,
  random_llava,
  store_read,
)
from lmm_sae.core.grid import TOKENS
from lmm_sae.core.store import ActivationStore, StoreMeta
from lmm_sae.core.tokens import Kind
from lmm_sae.lmm.llava import Subject

READ = argparse.Namespace(
  gib=0.0, shard_rows=1024, turns=2, shares='2,1', pool_blocks=2
)


@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
def test_every_way_of_reading_reads_the_layer_once(
  tmp_path, monkeypatch, dtype
):
  dropped = []
  monkeypatch.setattr(store_read, 'drop', dropped.append)
  found = store_read.measure(tmp_path, 12, dtype, READ)
  found = json.loads(json.dumps(found))
  (line,) = ActivationStore.open(tmp_path / 'store').manifest
  layer = [line['bytes'][f'layer_{store_read.LAYER}']]
  if dtype == 'int8':
    layer.append(line['bytes'][f'scale_{store_read.LAYER}'])
  assert found['settings']['layer_bytes'] == sum(map(sum, layer))
  assert found['settings']['rows'] == 1024
  ways = {'sequential', 'blocks', 'trainer, 2 shares', 'trainer, 1 shares'}
  assert set(found['read_mb_per_s']) == ways
  assert len(dropped) == 2 * len(ways)
  assert found['of_sequential']['sequential'] == 1.0
  for name, seconds in found['read_seconds'].items():
    rate = found['settings']['layer_bytes'] / 1e6 / seconds[1]
    assert math.isclose(found['read_mb_per_s'][name], rate)
  assert set(found['write_mb_per_s']) == {'group', 'one file'}
  assert f'D=12 {dtype}: 1,024 rows' in store_read.table(found)


def test_the_trainer_is_timed_until_every_block_was_read(tmp_path, monkeypatch):
  monkeypatch.setattr(store_read, 'drop', lambda folder: None)
  store_read.write(tmp_path / 'store', 12, 'bfloat16', 3, 1024)
  store = ActivationStore.open(tmp_path / 'store')
  rows = store_read.Counted(store, store_read.LAYER, ('all',), 256)
  assert rows.blocks == 12
  store_read.trainer(rows, 2, 4)
  assert rows.read_blocks >= rows.blocks


def small_store(path, x_ND, kind_N, dtype='bfloat16', position=0):
  meta = StoreMeta(
    split='b',
    model='m',
    fingerprint='f',
    layers=(3,),
    layer_paths={'3': 'a'},
    width=x_ND.shape[1],
    grid=(0, 0),
    image_backend='p',
    dtype=dtype,
  )
  store = ActivationStore.create(path, meta, 1, 16, 16, 4)
  count = len(x_ND)
  tokens = {
    name: np.zeros((count, columns) if columns else count, kind)
    for name, (kind, columns) in TOKENS.items()
  }
  tokens |= {'kind': kind_N.astype(np.uint8)}
  tokens['position'] = np.arange(position, position + count, dtype=np.int32)
  store.write_group(0, {3: x_ND}, tokens, [], [])
  return ActivationStore.open(path)


def test_the_rounding_is_the_fvu_by_kind(tmp_path):
  rng = np.random.default_rng(0)
  x_ND = rng.normal(2.0, 1.0, (11, 6)).astype(ml_dtypes.bfloat16)
  kind_N = np.array([Kind.BASE] * 7 + [Kind.ANSWER] * 3 + [Kind.BOS])
  exact = small_store(tmp_path / 'a', x_ND, kind_N)
  rounded = small_store(tmp_path / 'b', x_ND, kind_N, 'int8')
  found = int8_cost.rounding(exact, rounded, 3)
  assert list(found) == ['base', 'image', 'answer', 'text', 'all']  # one BOS
  x, back = (s.read(3, 0, 11).astype(np.float64) for s in (exact, rounded))
  for name, at in (('base', slice(0, 7)), ('all', slice(0, 10))):
    spread = ((x[at] - x[at].mean(0)) ** 2).sum()
    want = ((x[at] - back[at]) ** 2).sum() / spread
    assert 0 < want < 1e-3
    assert math.isclose(found[name], want, rel_tol=1e-9)


def test_stores_of_other_tokens_are_not_compared(tmp_path):
  x_ND, kind_N = np.ones((5, 6), np.float32), np.full(5, Kind.BASE)
  one = small_store(tmp_path / 'a', x_ND, kind_N)
  other = small_store(tmp_path / 'b', x_ND, kind_N, position=1)
  with pytest.raises(ValueError, match='not hold the same tokens'):
    int8_cost.rounding(one, other, 3)


WORKER = """
import itertools, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / 'groups').mkdir(parents=True)
for group in itertools.count():
  (folder / 'groups' / f'{group}.json').touch()
  if group == int(sys.argv[2]):
    sys.exit('that is all')
  time.sleep(0.01)
"""


def contender(folder, groups=10_000) -> capture.Contender:
  command = [sys.executable, '-c', WORKER, str(folder), str(groups)]
  return capture.Contender('one', [command], folder, 1)


def test_who_does_not_have_its_turn_does_nothing(tmp_path):
  one = contender(tmp_path / 'a')
  try:
    one.warm(3)
    before = one.done()
    other = contender(tmp_path / 'b')
    try:
      other.warm(20)  # time goes by
    finally:
      other.close()
    assert one.done() <= before + 1  # a stop may come a moment late
    one.turn(5)
    assert one.groups[0] >= 5
    assert one.seconds[0] > 0
  finally:
    one.close()


def test_a_contender_that_ends_is_told_with_what_it_said(tmp_path):
  one = contender(tmp_path / 'a', groups=2)
  with pytest.raises(RuntimeError, match=r'one did 3 groups and then ended'):
    one.warm(50)
  one.close()


def test_the_table_sets_ours_beside_each_rival():
  one = {'cpu_ms_a_sample': 2.0}
  run = {
    'settings': {'does': 'this'},
    'results': {
      'ours': {**one, 'samples_per_s': 9.5},
      'plain': {**one, 'samples_per_s': 8.0},
      'tuned': {**one, 'samples_per_s': 10.0},
    },
    'share_of': {'plain': 9.5 / 8, 'tuned': 9.5 / 10},
  }
  lines = capture.table(run).splitlines()
  assert lines[-1] == '  ours is 118.8% of plain and 95.0% of tuned'


@pytest.fixture(scope='module')
def subject(tmp_path_factory):
  folder = tmp_path_factory.mktemp('random') / 'model'
  return Subject.load(random_llava.make(folder, 64, 3, view=28), threads=1)


def test_the_rival_runs_the_same_forward(subject, tmp_path):
  file = random_llava.pictures(tmp_path / 'data', 2, 5, scale=0.1)
  rows = json.loads(file.read_text())
  assert [row['image'] for row in rows] == [f'{i}.jpg' for i in (0, 1, 0, 1, 0)]
  from PIL import Image

  images = [[Image.open(file.parent / f'{at}.jpg')] for at in (0, 1)]
  prompts = [subject.chat(text, 1) for text in ('what?', 'where is it?')]
  inputs = subject.inputs(prompts, images)
  modules = [subject.layer(at) for at in (0, 2)]
  with torch.no_grad():
    found = capture_rival.forward(subject.model, modules, inputs)
  want = subject.residuals(inputs, (0, 2))
  for x_BTD, layer in zip(found, (0, 2), strict=True):
    torch.testing.assert_close(x_BTD, want[layer])


@pytest.mark.slow
def test_capture_is_measured_beside_its_rivals(tmp_path):
  case = dataclasses.replace(
    capture.CASES['anyres'],
    threads=1,
    group=3,
    batch=2,
    distinct=2,
    layers=(1,),
    width=64,
    depth=3,
    view=28,
    scale=0.1,
  )
  run = json.loads(json.dumps(capture.compare(case, tmp_path, turns=2)))
  assert set(run['results']) == {'ours', *capture.RIVALS}
  for one in run['results'].values():
    assert len(one['seconds']) == 2
    assert one['samples_per_s'] > 0
    assert one['cpu_ms_a_sample'] > 0


@pytest.mark.slow
def test_the_cost_of_int8_is_measured_from_capture_to_evaluation(tmp_path):
  words = ('data.train=40', 'data.half=12', 'train.steps=30', 'train.rows=256')
  config = str(int8_cost.ROOT / 'experiments' / 'tiny.py')
  overrides = [f'--config.{word}' for word in words]
  found = int8_cost.compare(tmp_path, config, overrides)
  kinds = found['layers']['1']
  assert {'base', 'tile', 'answer', 'all'} <= set(kinds)
  for one in kinds.values():
    assert 0 < one['rounding'] < 1e-3
    assert 0 < one['sae_bfloat16'] < 2
    assert 0 < one['sae_int8'] < 2
  assert found['store_bytes']['int8'] < found['store_bytes']['bfloat16']
  assert 'rounding' in int8_cost.table(found)
