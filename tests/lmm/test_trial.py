"""What a trial draws, and what is expected of the rest by it."""

import struct
import types

import numpy as np
import pytest

from lmm_sae.core import grid
from lmm_sae.core.sources import Split
from lmm_sae.core.tokens import Kind
from lmm_sae.lmm import estimate, needs, trial
from lmm_sae.lmm.trial import Counted


def split_of(blocks):
  source = types.SimpleNamespace(blocks=blocks)
  return Split('train', source, range(1000))


def test_all_are_drawn_where_there_are_few():
  drawn = trial.draw(split_of(None), range(3, 20), most=17, seed=0)
  assert drawn.ravel().tolist() == list(range(3, 20))


def test_some_are_drawn_once_each_by_the_seed():
  left = np.arange(0, 1000, 2)
  drawn = trial.draw(split_of(None), left, most=40, seed=5)
  assert drawn.shape == (40, 1)
  assert len(set(drawn.ravel())) == 40
  assert set(drawn.ravel()) <= set(left)
  again = trial.draw(split_of(None), left, most=40, seed=5)
  np.testing.assert_array_equal(drawn, again)
  other = trial.draw(split_of(None), left, most=40, seed=6)
  assert not np.array_equal(drawn, other)


def test_of_a_source_in_blocks_neighbours_are_drawn():
  drawn = trial.draw(split_of([0, 500]), np.arange(1000), most=40, seed=5)
  assert drawn.shape == (5, trial.NEIGHBOURS)
  np.testing.assert_array_equal(np.diff(drawn, axis=1), 1)
  assert len(set(drawn.ravel())) == 40


def test_neighbours_that_are_alike_count_as_one():
  """Eight equal neighbours tell no more than one of them."""
  rng = np.random.default_rng(0)
  units = np.repeat(rng.integers(50, 150, 12), 8)
  rows_SK = np.zeros((96, len(Kind)), np.int64)
  rows_SK[:, Kind.BASE] = units
  one = Counted(
    *('train', tuple(range(96)), rows_SK, rows_SK, np.zeros(96), (), 1.0, 0)
  )
  job = types.SimpleNamespace(
    capture=types.SimpleNamespace(group=16, shard_rows=4096, chunk_rows=64)
  )
  fields = grid.fields((1,), 6, 'bfloat16')
  left = np.arange(960)
  single, neighbours = (
    estimate.part(job, [one], left, unit, fields, 0) for unit in (1, 8)
  )
  assert single.rows.total == pytest.approx(units.sum() * 10)
  assert neighbours.rows.total == pytest.approx(units.sum() * 10)
  # sqrt(8), but for the degrees of freedom.
  ratio = neighbours.rows.spread / single.rows.spread
  assert ratio == pytest.approx(8**0.5, rel=0.1)


@pytest.mark.parametrize(
  'content',
  [b'', b'abc', struct.pack('<Q', 2**60), struct.pack('<Q', 3) + b'{"a'],
)
def test_a_damaged_file_of_weights_is_named(tmp_path, content):
  (tmp_path / 'model.safetensors').write_bytes(content)
  with pytest.raises(ValueError, match=r'model\.safetensors is'):
    needs.parameters(tmp_path)
