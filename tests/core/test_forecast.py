"""core/forecast.py against sums by hand, and against what a store takes."""

import dataclasses
import math

import numpy as np
import pytest

from lmm_sae.core import forecast, grid
from lmm_sae.core.forecast import Expected
from lmm_sae.core.grid import TOKENS
from lmm_sae.core.store import ActivationStore
from tests.core.store_cases import META


def test_what_was_counted_whole_is_exact():
  assert forecast.expect([3, 4, 9], of=3) == Expected(16.0, 0.0)


def test_what_nothing_is_of_holds_nothing():
  assert forecast.expect([], of=0) == Expected(0.0, 0.0)


def test_one_of_many_says_nothing_of_the_spread():
  assert forecast.expect([5], of=7) == Expected(35.0, math.inf)


def test_the_truth_lies_within_the_spread_as_often_as_is_said():
  rng = np.random.default_rng(0)
  all_S = rng.exponential(50.0, 400)
  within = 0
  for _ in range(300):
    found = forecast.expect(rng.choice(all_S, 120, replace=False), of=400)
    within += abs(found.total - all_S.sum()) <= found.spread
  assert 0.9 < within / 300 < 0.985


def test_spreads_of_independent_totals_add_as_squares():
  both = Expected(10.0, 3.0) + Expected(1.0, 4.0)
  assert both == Expected(11.0, 5.0)
  assert both.times(2) == Expected(22.0, 10.0)


def test_a_row_is_its_layers_and_its_token_arrays():
  # sample, position, token; kind; image, row, col; box.
  assert forecast.TOKEN_BYTES == 3 * 4 + 1 + 3 * 2 + 8
  assert forecast.row_bytes(6, 2) == 2 * 6 * 2 + 27


@pytest.mark.parametrize(
  ('bytes_', 'text'),
  [(1023, '1.02e+03 B'), (3 * 2**30, '3 GiB'), (2**41, '2 TiB')],
)
def test_sizes_are_told_in_the_unit_that_people_read(bytes_, text):
  assert forecast.size(bytes_) == text


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [
    (4.25, '4.25 s'),
    (90, '1.5 min'),
    (5400, '1.5 h'),
    (3600 * 47.9, '47.9 h'),
    (3600 * 60, '2.5 days'),
  ],
)
def test_a_time_is_told_in_the_unit_that_people_read(seconds, text):
  assert forecast.span(seconds) == text


def test_an_int8_row_has_a_byte_a_number_and_a_scale():
  assert forecast.row_bytes(6, 2, 'int8') == (6 + 4) * 2 + 27


@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
@pytest.mark.parametrize('rows', [0, 1, 8, 15, 40])
def test_a_group_takes_the_bytes_that_are_told(tmp_path, dtype, rows):
  meta = dataclasses.replace(META, mixed=True, dtype=dtype)
  store = ActivationStore.create(
    tmp_path, meta, groups=3, group_rows=40, shard_rows=20, chunk_rows=4
  )
  rng = np.random.default_rng(0)
  tokens = {
    name: np.ones((rows, columns) if columns else rows, kind)
    for name, (kind, columns) in TOKENS.items()
  }
  x_ND = rng.normal(size=(rows, 6)).astype(np.float32)
  store.write_group(1, {1: x_ND, 4: x_ND}, tokens, [], [])
  (line,) = store.manifest
  fields = grid.fields((1, 4), 6, dtype)
  for name, (kind, columns) in fields.items():
    row = np.dtype(kind).itemsize * (columns or 1)
    assert forecast.shard_bytes(rows, row, 20, 4) == line['bytes'][name]
  paths = [path for path in tmp_path.glob('*/c/**/*') if path.name != 'c']
  found = forecast.group_bytes(rows, fields, 20, 4)
  assert found == sum(path.stat().st_blocks * 512 for path in paths)
