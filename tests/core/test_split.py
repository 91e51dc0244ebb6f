import dataclasses
import itertools
import json
import os
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from lmm_sae.core import sources
from lmm_sae.core.sources import DataConfig


@dataclasses.dataclass(frozen=True)
class Rows:
  """As much of a source as `split` looks at."""

  count: int
  blocks: list[int] | None = None

  def __len__(self):
    return self.count


def joined(lengths):
  """A source whose blocks have these lengths."""
  starts = np.cumsum([0, *lengths])
  return Rows(int(starts[-1]), starts[:-1].tolist())


@pytest.mark.parametrize(
  ('count', 'limit', 'heldout', 'sizes'),
  [
    (40, 0, 0.25, (30, 5, 5)),
    (40, 8, 0.5, (4, 2, 2)),
    (3, 0, 0.01, (1, 1, 1)),
    (5, 0, 0.99, (1, 2, 2)),
    (40, 99, 0.1, (36, 2, 2)),
  ],
)
def test_splits_have_the_sizes_asked_for(count, limit, heldout, sizes):
  config = DataConfig(limit=limit, heldout=heldout, seed=4)
  for source in (Rows(count), joined([1, 2] + [1] * (count - 3))):
    parts = sources.split(source, config)
    assert tuple(len(parts[name]) for name in sources.SPLITS) == sizes


lengths = st.lists(st.integers(1, 300), min_size=3, max_size=12)


@hypothesis.given(
  lengths=lengths,
  limit=st.integers(3, 900) | st.just(0),
  heldout=st.floats(0.01, 0.99),
  seed=st.integers(0, 2**40),
  known=st.booleans(),
)
@hypothesis.settings(deadline=None, max_examples=100)
def test_each_row_taken_is_in_one_split_and_blocks_stay_together(
  lengths, limit, heldout, seed, known
):
  source = joined(lengths)
  if not known:
    source = Rows(source.count)
  config = DataConfig(limit=limit, heldout=heldout, seed=seed)
  parts = sources.split(source, config)
  order = [row for name in sources.SPLITS for row in parts[name]]
  taken = min(limit or source.count, source.count)
  assert len(order) == len(set(order)) == taken
  assert set(order) <= set(range(source.count))
  assert all(parts.values())
  assert parts == sources.split(source, config)
  if known:
    longest = max(1, source.count // sources.PIECES)
    block_of = np.repeat(np.arange(len(lengths)), lengths)
    blocks = block_of[order]
    whole = [lengths[at] for at in set(blocks.tolist())]
    assert sum(whole) - max(whole) < taken  # one fewer would not have done
    jumps = sum(
      after != before + 1 for before, after in itertools.pairwise(order)
    )
    pieces = sum(-(-count // longest) for count in np.bincount(blocks))
    assert jumps < pieces  # rows of a piece lie together, ascending


def test_another_seed_splits_otherwise():
  for source in (Rows(40), joined([5] * 8)):
    parts = [sources.split(source, DataConfig(seed=seed)) for seed in (4, 5)]
    assert parts[0] != parts[1]


def test_a_limit_touches_few_blocks_of_many():
  source = joined([100] * 7790)
  parts = sources.split(source, DataConfig(limit=1000, seed=3))
  rows = np.concatenate([parts[name] for name in sources.SPLITS])
  assert len(set((rows // 100).tolist())) == 10
  assert np.count_nonzero(np.diff(rows // 100)) == 9  # each is read once


def test_few_blocks_are_cut_and_mixed():
  source = joined([1000, 1000])
  train = sources.split(source, DataConfig(heldout=0.1))['train']
  first = np.asarray(train[:600])
  assert 0.25 < (first < 1000).mean() < 0.75


def test_any_process_splits_alike(root):
  script = (
    'import json; from tests.core.test_split import *;'
    'print(json.dumps(sources.split(joined([7, 90, 4]), DataConfig(seed=9))))'
  )
  told = subprocess.run(
    [sys.executable, '-c', script],
    cwd=root,
    env=os.environ | {'PYTHONHASHSEED': '7', 'PYTHONPATH': str(root)},
    check=True,
    capture_output=True,
  )
  here = sources.split(joined([7, 90, 4]), DataConfig(seed=9))
  assert json.loads(told.stdout) == here


@pytest.mark.parametrize('source', [Rows(2), joined([1, 1]), Rows(0, [])])
def test_too_few_samples_are_refused(source):
  with pytest.raises(ValueError, match='at least 3 are needed'):
    sources.split(source, DataConfig())


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'source': 'tfds'}, "data.source 'tfds' is none of scenes, llava"),
    ({'template': 'jinja'}, "data.template 'jinja' is none of chat, raw"),
    ({'limit': -1}, 'data.limit is -1; it must be at least 0'),
    ({'seed': -3}, 'data.seed is -3; it must be at least 0'),
    ({'train': 0}, 'data.train is 0; it must be at least 1'),
    ({'half': 0}, 'data.half is 0; it must be at least 1'),
    ({'heldout': 1.0}, 'data.heldout is 1.0; it must lie'),
    ({'heldout': float('nan')}, 'data.heldout is nan; it must lie'),
    ({'limit': '5'}, "data.limit is '5'; it must be of type int"),
    ({'limit': True}, 'data.limit is True; it must be of type int'),
    ({'path': None}, 'data.path is None; it must be of type str'),
    ({'stream': True, 'source': 'llava'}, 'data.stream is for'),
    ({'subset': 'x', 'source': 'images'}, "data.subset 'x' is for"),
    ({'image_root': '/x', 'source': 'images'}, "data.image_root '/x' is for"),
  ],
)
def test_a_field_without_meaning_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    DataConfig(**fields)
