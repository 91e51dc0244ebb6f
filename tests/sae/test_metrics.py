import json
from fractions import Fraction

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
  """The figures, the rows seen in so many pieces."""
  parts = np.array_split(np.arange(len(rows[0])), pieces)
  seen = metrics.Rows(D)
  x_ND, x_hat_ND, code, kind_N = rows
  for part in parts:
    seen.add(x_ND[part], kind_N[part])
  quality = metrics.Quality(M, seen)
  for part in parts:
    quality.add(
      x_ND[part],
      x_hat_ND[part],
      SparseCode(code.vals_NK[part], code.idx_NK[part]),
      kind_N[part],
    )
  return quality.table()


def oracle(rows, kinds):
  """Every figure by its formula, dense, in float64."""
  x, x_hat, code, kind_N = rows
  of_N = np.isin(kind_N, kinds)
  x, x_hat = x[of_N].astype(np.float64), x_hat[of_N].astype(np.float64)
  # A mean without rounding: sums of exact fractions.
  mean = [float(sum(map(Fraction, column)) / len(x)) for column in x.T.tolist()]
  error, centred = x - x_hat, x - np.array(mean)
  z_NM = np.zeros((len(x), M))
  np.put_along_axis(z_NM, code.idx_NK[of_N], code.vals_NK[of_N], 1)
  rate_M = (z_NM > 0).mean(0)
  norms = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
  fvu = (error**2).sum() / (centred**2).sum()
  drift = error - error.mean(0)
  return {
    'fvu': fvu,
    'explained_variance': 1 - fvu,
    'explained_variance_rows': np.mean(
      1 - (error**2).sum(1) / (centred**2).sum(1)
    ),
    'explained_variance_centred': 1 - (drift**2).sum() / (centred**2).sum(),
    'mse': (error**2).sum(1).mean(),
    'cosine': np.mean((x * x_hat).sum(1) / (norms[0] * norms[1])),
    'shrinkage': (x_hat**2).sum() / (x * x_hat).sum(),
    'norm_ratio': np.mean(norms[1] / norms[0]),
    'l0': (z_NM > 0).sum(1).mean(),
    'dead': (rate_M == 0).mean(),
    'rows': len(x),
  }, rate_M


SETS = {
  'bos': [Kind.BOS],
  'question': [Kind.QUESTION],
  'base': [Kind.BASE],
  'tile': [Kind.TILE],
  'image': [Kind.BASE, Kind.TILE],
  'text': [Kind.QUESTION],
  'all': [Kind.QUESTION, Kind.BASE, Kind.TILE],
}


@pytest.mark.parametrize('pieces', [1, 3, N])
def test_figures_equal_those_of_a_dense_oracle(rows, pieces):
  got = table(rows, pieces)
  assert set(got) == set(SETS)
  for name, kinds in SETS.items():
    want, rate_M = oracle(rows, kinds)
    firing = got[name].pop('firing')
    assert set(got[name]) == set(want)
    for key, value in want.items():
      np.testing.assert_allclose(got[name][key], value, rtol=1e-9, err_msg=key)
    alive = np.log10(rate_M[rate_M > 0])
    counts, _ = np.histogram(alive, firing['edges'])
    assert firing['latents'] == counts.tolist()
    assert firing['never'] == (rate_M == 0).sum()
    assert sum(firing['latents']) + firing['never'] == M


@pytest.mark.parametrize('offset', [0.0, 1e6, -1e9])
@pytest.mark.parametrize('pieces', [1, 7])
def test_a_giant_mean_takes_nothing_from_the_figures(rows, offset, pieces):
  """In float64 a row of 1e9 keeps 7 digits of what varies: as many must hold.

  Σx² - (Σx)²/n would keep none.
  """
  x_ND, x_hat_ND, code, kind_N = rows
  error_ND = (x_hat_ND - x_ND).astype(np.float64)
  moved_ND = x_ND.astype(np.float64) + offset
  # A kind of its own far away, as BOS is.
  moved_ND[kind_N == Kind.BASE] -= offset
  moved = moved_ND, moved_ND + error_ND, code, kind_N
  got = table(moved, pieces)
  for name, kinds in SETS.items():
    want, _ = oracle(moved, kinds)
    for key, value in want.items():
      np.testing.assert_allclose(
        got[name][key], value, rtol=1e-6, atol=1e-9, err_msg=f'{name} {key}'
      )


def test_the_mean_of_any_set_of_kinds_is_that_of_its_rows(rows):
  x_ND, _, _, kind_N = rows
  seen = metrics.Rows(D)
  for part in np.array_split(np.arange(N), 5):
    seen.add(x_ND[part], kind_N[part])
  of_N = np.isin(kind_N, [Kind.QUESTION, Kind.TILE])
  got = seen.of('question', 'tile')
  assert got.rows == of_N.sum()
  np.testing.assert_allclose(got.mean_D, x_ND[of_N].astype(float).mean(0))
  np.testing.assert_allclose(
    got.spread, np.square(x_ND[of_N] - got.mean_D).sum()
  )


def test_planted_dead_latents_are_counted_by_kind(rows):
  x_ND, x_hat_ND, _, kind_N = rows
  idx_NK = np.tile([0, 1, 2], (N, 1))
  idx_NK[kind_N == Kind.BASE] = [3, 4, 5]
  vals_NK = np.ones((N, K))
  vals_NK[:, 2] = 0  # 2 and 5 are named and do not fire
  planted = x_ND, x_hat_ND, SparseCode(vals_NK, idx_NK), kind_N
  got = table(planted, 2)
  assert got['all']['dead'] == (M - 4) / M
  assert got['base']['dead'] == got['tile']['dead'] == (M - 2) / M
  assert got['all']['firing']['never'] == M - 4
  assert got['tile']['firing']['latents'][-1] == 2  # on every row


def test_rates_below_the_first_bin_are_counted_in_it():
  got = metrics.firing(np.array([1, 10**10, 0]), 10**10)
  assert got['latents'][0] == 1
  assert got['latents'][-1] == 1
  assert got['never'] == 1


def test_rows_that_do_not_vary_have_no_fvu():
  x_ND = np.full((4, D), 0.1, np.float32)
  code = SparseCode(np.ones((4, K)), np.tile(np.arange(K), (4, 1)))
  rows = x_ND, x_ND, code, np.full(4, Kind.NEWLINE)
  line = table(rows, 2)['newline']
  for key in ('fvu', 'explained_variance', 'explained_variance_rows'):
    assert line[key] is None
  assert (line['l0'], line['dead'], line['rows']) == (3.0, 0.75, 4)
  json.dumps(line, allow_nan=False)


def test_a_reconstruction_that_is_not_finite_is_refused(rows):
  x_ND, x_hat_ND, code, kind_N = rows
  x_hat_ND[kind_N == Kind.TILE] = np.nan
  with pytest.raises(ValueError, match='of tile rows is not finite'):
    table((x_ND, x_hat_ND, code, kind_N), 2)


def test_rows_of_zeros_have_no_direction():
  x_ND = np.zeros((3, D), np.float32)
  x_ND[0, 0] = 2
  code = SparseCode(np.zeros((3, K)), np.tile(np.arange(K), (3, 1)))
  line = table((x_ND, 0.5 * x_ND, code, np.full(3, Kind.TILE)), 1)['tile']
  assert line['cosine'] == 1
  assert line['norm_ratio'] == 0.5
  assert line['shrinkage'] == 0.5
  nothing = table((x_ND, 0 * x_ND, code, np.full(3, Kind.TILE)), 1)['tile']
  assert nothing['cosine'] is None
  assert nothing['shrinkage'] is None
  assert nothing['norm_ratio'] == 0


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
