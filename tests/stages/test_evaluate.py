import dataclasses
import json

import numpy as np
import pytest

from lmm_sae.core.store import ActivationStore
from lmm_sae.core.tokens import Kind
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import exports
from lmm_sae.stages import evaluate
from tests.sae import small
from tests.sae.small import CONFIG, LAYER


@pytest.fixture
def workdir(tmp_path) -> Workdir:
  """A store `b` and an SAE that was never trained."""
  small.write_store(tmp_path / 'acts' / 'b', seed=50)
  workdir = Workdir.of(tmp_path)
  exports.write(small.random_sae(), workdir.export(LAYER))
  return workdir


def oracle(workdir, kinds):
  """fvu, l0, dead and rows by a dense computation in float64."""
  sae = exports.load(workdir.export(LAYER))
  store = ActivationStore.open(workdir.acts('b'))
  parts = [
    store.read(LAYER, *span).astype(np.float64)[
      np.isin(store.tokens(*span)['kind'], kinds)
    ]
    for span in store.ranges
  ]
  x_ND = np.concatenate(parts)
  z_NM = np.maximum((x_ND - sae.b_dec_D) @ sae.w_enc_MD.T + sae.b_enc_M, 0)
  order_NM = np.argsort(-z_NM, axis=1, kind='stable')
  np.put_along_axis(z_NM, order_NM[:, CONFIG.k :], 0, 1)
  x_hat_ND = z_NM @ sae.w_dec_MD + sae.b_dec_D
  spread = np.square(x_ND - x_ND.mean(0)).sum()
  return {
    'fvu': np.square(x_ND - x_hat_ND).sum() / spread,
    'l0': (z_NM > 0).sum(1).mean(),
    'dead': 1 - (z_NM > 0).any(0).mean(),
    'rows': len(x_ND),
  }


def test_the_table_equals_an_independent_oracle(workdir, config):
  evaluate.run(small.run_config(config, evaluate__rows=0), workdir)
  table = json.loads(workdir.file('evaluation.json').read_text())
  assert list(table) == [str(LAYER)]
  table = table[str(LAYER)]
  sets = {kind.name.lower(): [kind] for kind in Kind if kind != Kind.PADDING}
  sets['image'] = [Kind.BASE, Kind.TILE, Kind.NEWLINE]
  sets['text'] = [Kind.TEMPLATE, Kind.QUESTION, Kind.ANSWER]
  sets['all'] = sets['image'] + sets['text']
  assert set(table) == set(sets)
  for name, kinds in sets.items():
    want = oracle(workdir, kinds)
    assert table[name]['rows'] == want['rows']
    for key in ('fvu', 'l0', 'dead'):
      np.testing.assert_allclose(table[name][key], want[key], rtol=1e-5)


def test_fewer_rows_are_spread_over_the_split(monkeypatch):
  monkeypatch.setattr(evaluate, 'READ_ROWS', 10)
  ranges = [(0, 95), (128, 223)]
  pieces = evaluate.chosen(ranges, 60)
  assert pieces[0] == (0, 10)
  assert pieces[-1] == (218, 223)
  assert 50 <= sum(stop - start for start, stop in pieces) <= 70
  assert sum(b - a for a, b in evaluate.chosen(ranges, 0)) == 190
  assert len(evaluate.chosen(ranges, 1)) == 1


def test_an_sae_of_another_width_is_refused(workdir, config):
  wide = small.random_sae(dataclasses.replace(CONFIG, width=7))
  exports.write(wide, workdir.export(LAYER))
  with pytest.raises(ValueError, match=r'rows of width 6.*reads 7'):
    evaluate.run(small.run_config(config), workdir)


def test_a_missing_sae_names_the_stage_that_makes_it(tmp_path, config):
  small.write_store(tmp_path / 'acts' / 'b')
  with pytest.raises(ValueError, match='run `lmm-sae train`'):
    evaluate.run(small.run_config(config), Workdir.of(tmp_path))
