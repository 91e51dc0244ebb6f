"""Shards: how they are encoded, what int8 costs, and what damage does."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from lmm_sae.core import grid, store_rows
from lmm_sae.core.grid import Layout
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.tokens import Kind
from tests.core.store_cases import GROUPS, META, create, group, mixed

INT8 = dataclasses.replace(META, dtype='int8', mixed=True)


def flip(data: bytes, at: int) -> bytes:
  changed = bytearray(data)
  changed[at] ^= 1
  return bytes(changed)


HARM = {
  'data': lambda data: flip(data, 3),
  'last byte of the data': lambda data: flip(data, -60),
  'index': lambda data: flip(data, -10),
  'end': lambda data: data[:-1],
  'start': lambda data: data[1:],
  'empty': lambda data: b'',
  'longer': lambda data: data + b'x',
}


@pytest.mark.parametrize('what', HARM)
def test_a_damaged_shard_is_named(tmp_path, what):
  made = create(tmp_path / 's')
  made.write_group(**GROUPS[3])
  for name in ('layer_4/c/7/0', 'kind/c/7'):
    shard = tmp_path / 's' / name
    shard.write_bytes(HARM[what](shard.read_bytes()))
  read = ActivationStore.open(tmp_path / 's', partial=True)
  said = r'{}/c/7{} is damaged .*doctor.drop=True`, then capture again'
  with pytest.raises(ValueError, match=said.format('layer_4', '/0')):
    read.read(4, 72, 96)
  with pytest.raises(ValueError, match=said.format('kind', '')):
    read.tokens(72, 96, ('position', 'kind'))
  read.read(4, 72, 84)  # the other shard
  read.read(1, 72, 96)  # the other layer


def test_a_missing_shard_is_no_zeros(place):
  made = create(place)
  made.write_group(**GROUPS[3])
  for name in ('layer_1/c/6/0', 'row/c/7'):
    (place / name).delete()
  read = ActivationStore.open(place, partial=True)
  with pytest.raises(ValueError, match=r'layer_1/c/6/0 is missing: run `lmm'):
    read.read(1, 80, 90)
  with pytest.raises(ValueError, match=r'row/c/7 is missing'):
    read.tokens(72, 96)
  read.read(1, 84, 96)


def test_rows_of_zeros_are_rows(tmp_path):
  made = create(tmp_path / 's')
  each = group(0)
  zeros = {k: np.zeros_like(v) for k, v in each['layers'].items()}
  made.write_group(**{**each, 'layers': zeros})
  read = ActivationStore.open(tmp_path / 's', partial=True)
  assert not read.read(1, 0, 13).any()


@pytest.mark.parametrize('narrow', [0, 2**20])
@pytest.mark.parametrize(
  ('dtype', 'columns', 'count'),
  [
    ('int16', 3, 8),
    ('int16', 3, 5),
    ('uint8', 0, 7),
    ('int32', 0, 1),
    ('bfloat16', 5, 8),
    ('int8', 4, 3),
  ],
)
def test_shards_are_those_of_the_sharding_codec(
  dtype, columns, count, narrow, monkeypatch
):
  monkeypatch.setattr(grid, 'NARROW', narrow)
  layout = Layout(groups=1, group_rows=8, shard_rows=8, chunk_rows=2)
  rng = np.random.default_rng(0)
  shape = (count, columns) if columns else (count,)
  rows = rng.integers(0, 99, shape).astype(ts.dtype(dtype).numpy_dtype)
  spec = {
    'driver': 'zarr3',
    'kvstore': {'driver': 'memory'},
    'metadata': grid.metadata(dtype, columns, layout),
    'store_data_equal_to_fill_value': True,
  }
  array = ts.open(spec, context=ts.Context(), create=True).result()
  with ts.Transaction() as transaction:
    array.with_transaction(transaction)[:count] = rows
  wanted = array.kvstore[grid.shard_key('', columns, 0)[1:]]
  pieces = list(grid.Encoder(dtype, columns, layout).pieces(rows))
  assert b''.join(pieces) == wanted
  chunks = -(-count // 2)
  assert len(pieces) == (1 if narrow else chunks + 1)


def test_int8_rows_are_within_half_a_step(place):
  made = create(place, INT8)
  each = mixed(group(0))
  each['layers'][1][2] = 0
  made.write_group(**each)
  read = ActivationStore.open(place, partial=True)
  for layer, x_ND in each['layers'].items():
    got_ND = read.read(layer, 0, 13)
    assert got_ND.dtype == ml_dtypes.bfloat16
    exact_ND = x_ND.astype(np.float64)
    step_N = np.abs(exact_ND).max(1, keepdims=True) / 127
    off_ND = np.abs(got_ND.astype(np.float64) - exact_ND)
    assert (off_ND <= step_N / 2 + np.abs(exact_ND) * 2**-8).all()
  assert not read.read(1, 2, 3).any()
  np.testing.assert_array_equal(read.read(4, 5, 9), read.read(4, 0, 13)[5:9])


def test_what_int8_costs_is_that_of_the_rows_but_bos(tmp_path):
  made = create(tmp_path / 's', INT8)
  groups = [mixed(each) for each in (group(0), group(3, (24,)))]
  for each in groups:
    each['tokens']['kind'][:3] = Kind.BOS
    made.write_group(**each)
  for layer in (1, 4):
    error = variance = 0
    for each in groups:
      start = each['group'] * 24
      got_ND = made.read(layer, start, start + len(each['tokens']['kind']))
      some = each['tokens']['kind'] != Kind.BOS
      x_ND = each['layers'][layer].astype(np.float64)[some]
      error += np.square(got_ND[some].astype(np.float64) - x_ND).sum()
      variance += np.square(x_ND - x_ND.mean(0)).sum()
    assert made.rounding(layer) == pytest.approx(error / variance, rel=1e-6)
    assert 1e-6 < made.rounding(layer) < 1e-4
  with pytest.raises(ValueError, match=r'layer 2 .* holds'):
    made.rounding(2)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_int8_refuses_what_it_cannot_keep(tmp_path, bad):
  made = create(tmp_path / 's', INT8)
  each = mixed(group(0))
  each['layers'][4][7, 2] = bad
  with pytest.raises(ValueError, match=r'layer_4.*row 7 .*capture.store=bfloa'):
    made.write_group(**each)
  assert made.committed() == set()


@pytest.mark.parametrize('scale', [1e-44, 1e-38, 3e38])
def test_int8_keeps_rows_of_any_length(scale):
  rng = np.random.default_rng(0)
  x_ND = (rng.uniform(-1, 1, (5, 7)) * scale).astype(np.float32)
  codes_ND, scale_N = store_rows.to_int8(x_ND)
  got_ND = store_rows.from_int8(codes_ND, scale_N).astype(np.float64)
  assert np.isfinite(got_ND).all()
  assert np.abs(got_ND - x_ND).max() <= np.abs(x_ND).max() / 64 + 1e-40


def test_an_unknown_dtype_is_refused():
  with pytest.raises(ValueError, match=r"capture.store is 'int4'"):
    dataclasses.replace(META, dtype='int4')
