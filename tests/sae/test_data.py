import dataclasses
import itertools
import json

import numpy as np
import pytest

from lmm_sae.core.store import ActivationStore
from lmm_sae.core.tokens import Kind
from lmm_sae.sae import data, mesh
from tests import processes
from tests.sae import small
from tests.sae.small import LAYER, TRAIN

PER_SAMPLE = len(small.SAMPLE)


@pytest.fixture
def store(tmp_path) -> ActivationStore:
  """40 samples of 10 rows, in groups of 16, 16 and 8."""
  return small.write_store(tmp_path / 'train')


def make(store, kinds=('all',), block_rows=8):
  return data.Rows(store, LAYER, kinds, block_rows)


def stream(store_rows, seed=0, places_S2=None, devices=1, **options):
  """(batch, places) as they come, on a mesh of (devices, 1)."""
  options = dataclasses.replace(TRAIN, **options)
  on = mesh.make(devices)
  return data.batches(store_rows, options, seed, on, places_S2)


def batches(rows, seed=0, batch=16, pool_blocks=4):
  sizes = {'rows': batch, 'pool_blocks': pool_blocks, 'data_shares': 1}
  found = stream(rows, seed, **sizes)
  return (np.asarray(x_ND) for x_ND, _ in found)


def all_rows(store, kinds):
  """Rows of the store of some kinds, as tuples, in order."""
  rows = []
  for start, stop in store.ranges:
    x_ND = store.read(LAYER, start, stop).astype(np.float32)
    kind_N = store.tokens(start, stop, names=('kind',))['kind']
    rows += x_ND[np.isin(kind_N, kinds)].tolist()
  return [tuple(row) for row in rows]


def as_tuples(x_ND):
  return [tuple(row) for row in x_ND.astype(np.float32).tolist()]


def test_blocks_hold_every_wanted_row_once(store):
  rows = make(store)
  read = [row for at in range(rows.blocks) for row in as_tuples(rows.read(at))]
  wanted = [kind for kind in Kind if kind is not Kind.BOS]
  assert read == all_rows(store, wanted)
  assert rows.count == len(read) == 40 * (PER_SAMPLE - 1)


def test_counting_in_several_pieces_changes_nothing(store, monkeypatch):
  whole = make(store)
  monkeypatch.setattr(data, 'READ_ROWS', 20)  # 16 rows: two blocks
  pieces = make(store)
  assert (pieces.blocks, pieces.count) == (whole.blocks, whole.count)
  for at in range(whole.blocks):
    assert as_tuples(pieces.read(at)) == as_tuples(whole.read(at))


def test_only_the_kinds_asked_for_are_read(store):
  rows = make(store, kinds=('base', 'newline'))
  read = [row for at in range(rows.blocks) for row in as_tuples(rows.read(at))]
  assert read == all_rows(store, [Kind.BASE, Kind.NEWLINE])


def test_blocks_without_a_wanted_row_are_left_out(store):
  rows = make(store, kinds=('answer',), block_rows=4)
  assert rows.blocks == rows.count == 40


def test_a_kind_that_is_not_there_is_refused(store):
  with pytest.raises(ValueError, match=r'no row of the kinds.*padding'):
    make(store, kinds=('padding',))


def test_a_bos_row_is_never_in_a_batch(tmp_path):
  store = small.write_store(tmp_path / 'train', bos=1e6)
  for x_ND in itertools.islice(batches(make(store)), 60):
    assert np.abs(x_ND.astype(np.float32)).max() < 1e4
  assert np.abs(make(store).sample(100, seed=0).astype(np.float32)).max() < 1e4


def test_an_epoch_holds_every_row_once_and_the_next_has_another_order(store):
  rows = make(store)
  blocks_an_epoch = rows.blocks
  # One pool is one epoch; a batch of 1 row shows the order.
  it = batches(rows, batch=1, pool_blocks=blocks_an_epoch)
  epochs = [
    [as_tuples(next(it))[0] for _ in range(rows.count)] for _ in range(2)
  ]
  wanted = [kind for kind in Kind if kind is not Kind.BOS]
  for epoch in epochs:
    assert sorted(epoch) == sorted(all_rows(store, wanted))
  assert epochs[0] != epochs[1]


def test_a_batch_mixes_rows_of_several_groups(store):
  owner = {}
  for group, (start, stop) in enumerate(store.ranges):
    for row in as_tuples(store.read(LAYER, start, stop)):
      owner[row] = group
  x_ND = next(batches(make(store), batch=32, pool_blocks=16))
  assert len({owner[row] for row in as_tuples(x_ND)}) == 3


def test_a_batch_mixes_rows_of_hundreds_of_samples(tmp_path, config):
  store = small.write_store(tmp_path / 'train', samples=400)
  owner = {
    row: at // PER_SAMPLE
    for start, stop in store.ranges
    for at, row in enumerate(as_tuples(store.read(LAYER, start, stop)), start)
  }
  mixed = {name: config.train[name] for name in ('pool_blocks', 'data_shares')}
  x_ND, _ = next(stream(make(store), rows=512, **mixed))
  assert len({owner[row] for row in as_tuples(np.asarray(x_ND))}) >= 200


def test_batches_follow_from_the_seed(store):
  rows = make(store)
  one, again, other = (
    np.stack([x.astype(np.float32) for x in itertools.islice(it, 5)])
    for it in (batches(rows, 7), batches(rows, 7), batches(rows, 8))
  )
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()


@pytest.mark.parametrize('done', [0, 1, 5, 23])
def test_batches_go_on_from_a_state(store, done):
  rows = make(store)
  it = stream(rows, data_shares=4, devices=4)
  places_S2 = None
  for _ in range(done):
    _, places_S2 = next(it)
  rest = [np.asarray(next(it)[0]) for _ in range(6)]
  resumed = stream(rows, places_S2=places_S2, data_shares=4, devices=4)
  for x_ND in rest:
    again_ND = np.asarray(next(resumed)[0])
    np.testing.assert_array_equal(
      again_ND.view(np.uint16), x_ND.view(np.uint16)
    )


@pytest.mark.parametrize('devices', [2, 4])
def test_batches_do_not_depend_on_the_devices(store, devices):
  rows = make(store)
  one = stream(rows, data_shares=4)
  many = stream(rows, data_shares=4, devices=devices)
  for (x_ND, x_S2), (y_ND, y_S2) in itertools.islice(
    zip(one, many, strict=True), 30
  ):
    assert len(y_ND.sharding.device_set) == devices
    np.testing.assert_array_equal(x_ND, y_ND)
    np.testing.assert_array_equal(x_S2, y_S2)


def test_shares_hold_every_row_of_an_epoch_once(store):
  rows = make(store)
  shares = [
    data.Share(
      data.pools(rows, share=share, shares=5, pool_blocks=rows.blocks, seed=0)
    )
    for share in range(5)
  ]
  assert rows.blocks % 5 == 0
  read = []
  for share in shares:
    while share.pool == 0:
      read += as_tuples(share.read(1))
  wanted = [kind for kind in Kind if kind is not Kind.BOS]
  assert sorted(read) == sorted(all_rows(store, wanted))


def test_a_process_reads_the_blocks_of_its_own_shares_only(tmp_path):
  small.write_store(tmp_path / 'train')
  words = [str(tmp_path), str(tmp_path)]
  done = processes.together(2, words, devices=2, module='tests.sae.read_shares')
  assert [x.code for x in done] == [0, 0], done
  for process, own in ((0, '01'), (1, '23')):
    read, of_share = json.loads((tmp_path / f'{process}.json').read_text())
    mine, others = set(), set()
    for share, blocks in of_share.items():
      (mine if share in own else others).update(blocks)
    assert len(mine) == len(others) == 6  # blocks of one epoch
    assert mine <= {*read}  # and those of a pool that is read ahead
    assert not others & {*read}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'data_shares': 3}, r'train.rows is 16, which the 3 shares'),
    ({'data_shares': 8}, r'train.pool_blocks is 4, which the 8 shares'),
    ({'data_shares': 2}, r'data_shares is 2, which 4 devices.*multiple of 4'),
  ],
)
def test_shares_that_do_not_divide_are_refused(changes, message):
  options = dataclasses.replace(TRAIN, **changes)
  with pytest.raises(ValueError, match=message):
    data.check(options, mesh.make(4))


def test_batches_have_the_size_asked_for_whatever_the_pools_hold(store):
  it = batches(make(store, kinds=('base',)), batch=13, pool_blocks=3)
  assert {next(it).shape for _ in range(20)} == {(13, small.D)}


def test_the_start_sample_is_drawn_from_many_blocks(store):
  rows = make(store)
  sample = as_tuples(rows.sample(60, seed=1))
  assert 60 <= len(sample) == len(set(sample)) <= 2 * rows.blocks
  assert sample == as_tuples(rows.sample(60, seed=1))
