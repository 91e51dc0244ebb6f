import json

import numpy as np
import pytest

from lmm_sae.core import records
from lmm_sae.core.tokens import Kind
from lmm_sae.sae import metrics
from lmm_sae.sae.model import SparseCode

N, D, M, K = 40, 6, 12, 3


@pytest.fixture
def rows():
  """(x, x̂, code, kinds): some codes hold zeros, some kinds are missing."""
  rng = np.random.default_rng(0)
  x_ND = (rng.normal(size=(N, D)) + 100).astype(np.float32)
  x_hat_ND = (x_ND + 0.1 * rng.normal(size=(N, D))).astype(np.float32)
  vals_NK = np.sort(np.maximum(rng.normal(size=(N, K)), 0))[:, ::-1]
  idx_NK = np.stack([rng.permutation(M)[:K] for _ in range(N)])
  kind_N = rng.choice([Kind.BOS, Kind.QUESTION, Kind.BASE, Kind.TILE], N)
  return x_ND, x_hat_ND, SparseCode(vals_NK, idx_NK), kind_N


def table(rows, pieces):
  quality = metrics.Quality(M, D)
  x_ND, x_hat_ND, code, kind_N = rows
  for part in np.array_split(np.arange(N), pieces):
    quality.add(
      x_ND[part],
      x_hat_ND[part],
      SparseCode(code.vals_NK[part], code.idx_NK[part]),
      kind_N[part],
    )
  return quality.table()


@pytest.mark.parametrize('pieces', [1, 3, N])
def test_figures_equal_those_of_a_dense_oracle(rows, pieces):
  got = table(rows, pieces)
  x_ND, x_hat_ND, code, kind_N = rows
  sets = {
    'bos': [Kind.BOS],
    'question': [Kind.QUESTION],
    'base': [Kind.BASE],
    'tile': [Kind.TILE],
    'image': [Kind.BASE, Kind.TILE],
    'text': [Kind.QUESTION],
    'all': [Kind.QUESTION, Kind.BASE, Kind.TILE],
  }
  assert set(got) == set(sets)
  for name, kinds in sets.items():
    of_N = np.isin(kind_N, kinds)
    x = x_ND[of_N].astype(np.float64)
    error = np.square(x - x_hat_ND[of_N]).sum()
    spread = np.square(x - x.mean(0)).sum()
    fired = code.vals_NK[of_N] > 0
    alive = np.unique(code.idx_NK[of_N][fired])
    assert got[name]['rows'] == of_N.sum()
    np.testing.assert_allclose(got[name]['fvu'], error / spread, rtol=1e-9)
    np.testing.assert_allclose(got[name]['l0'], fired.sum(1).mean())
    np.testing.assert_allclose(got[name]['dead'], 1 - len(alive) / M)


def test_rows_that_do_not_vary_have_no_fvu():
  quality = metrics.Quality(M, D)
  x_ND = np.full((4, D), 0.1, np.float32)
  code = SparseCode(np.ones((4, K)), np.tile(np.arange(K), (4, 1)))
  quality.add(x_ND, x_ND, code, np.full(4, Kind.NEWLINE))
  line = quality.table()['newline']
  assert line == {'fvu': None, 'l0': 3.0, 'dead': 0.75, 'rows': 4}
  json.dumps(line, allow_nan=False)


def test_cut_drops_the_steps_that_are_done_again(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  with records.Appender(path) as out:
    for layer in (2, 4):
      for step in (1, 2, 3):
        out.add({'layer': layer, 'step': step, 'fvu': 0.5})
  with path.open('ab') as file:
    file.write(b'{"layer": 4, "st')  # a kill left this
  metrics.cut(path, layer=4, step=1)
  left = [(x['layer'], x['step']) for x in records.read_lines(path)]
  assert left == [(2, 1), (2, 2), (2, 3), (4, 1)]
  assert sorted(p.name for p in tmp_path.iterdir()) == ['metrics.jsonl']


def test_cut_of_no_file_makes_none(tmp_path):
  metrics.cut(tmp_path / 'metrics.jsonl', layer=4, step=1)
  assert not list(tmp_path.iterdir())
