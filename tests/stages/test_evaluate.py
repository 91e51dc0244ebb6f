import dataclasses
import json
from typing import ClassVar

import numpy as np
import pytest

from lmm_sae.core import recovered
from lmm_sae.core.remote import Loss
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


SETS = {kind.name.lower(): [kind] for kind in Kind if kind != Kind.PADDING}
SETS['image'] = [Kind.BASE, Kind.TILE, Kind.NEWLINE]
SETS['text'] = [Kind.TEMPLATE, Kind.QUESTION, Kind.ANSWER]
SETS['all'] = SETS['image'] + SETS['text']


def rows(workdir, kinds):
  """The rows of these kinds in float64."""
  store = ActivationStore.open(workdir.acts('b'))
  parts = [
    store.read(LAYER, *span).astype(np.float64)[
      np.isin(store.tokens(*span)['kind'], kinds)
    ]
    for span in store.ranges
  ]
  return np.concatenate(parts)


def oracle(sae, x_ND):
  """The figures by a dense computation in float64."""
  z_NM = np.maximum((x_ND - sae.b_dec_D) @ sae.w_enc_MD.T + sae.b_enc_M, 0)
  order_NM = np.argsort(-z_NM, axis=1, kind='stable')
  np.put_along_axis(z_NM, order_NM[:, CONFIG.k :], 0, 1)
  x_hat_ND = z_NM @ sae.w_dec_MD + sae.b_dec_D
  error_ND = x_ND - x_hat_ND
  error, spread = np.square(error_ND), np.square(x_ND - x_ND.mean(0))
  drift = np.square(error_ND - error_ND.mean(0))
  dot_N = (x_ND * x_hat_ND).sum(1)
  norm_N, hat_N = (np.linalg.norm(x, axis=1) for x in (x_ND, x_hat_ND))
  return {
    'fvu': error.sum() / spread.sum(),
    'explained_variance': 1 - error.sum() / spread.sum(),
    'explained_variance_rows': (1 - error.sum(1) / spread.sum(1)).mean(),
    'explained_variance_centred': 1 - drift.sum() / spread.sum(),
    'mse': error.sum(1).mean(),
    'cosine': (dot_N / norm_N / hat_N).mean(),
    'shrinkage': np.square(x_hat_ND).sum() / dot_N.sum(),
    'norm_ratio': (hat_N / norm_N).mean(),
    'l0': (z_NM > 0).sum(1).mean(),
    'dead': 1 - (z_NM > 0).any(0).mean(),
    'rows': len(x_ND),
  }, (z_NM > 0).sum(0)


def evaluated(workdir):
  return json.loads(workdir.file('evaluation.json').read_text())


def test_the_table_equals_an_independent_oracle(workdir, config):
  evaluate.run(small.run_config(config, evaluate__rows=0), workdir)
  found = evaluated(workdir)
  assert found['format_version'] == 2
  assert found['about']['rows'] == 400
  table = found[str(LAYER)]
  assert set(table) == set(SETS)
  sae = exports.load(workdir.export(LAYER))
  for name, kinds in SETS.items():
    want, fired_M = oracle(sae, rows(workdir, kinds))
    firing = table[name].pop('firing')
    assert set(table[name]) == set(want)
    for key, value in want.items():
      np.testing.assert_allclose(
        table[name][key], value, rtol=1e-5, err_msg=f'{name} {key}'
      )
    rates = np.log10(fired_M[fired_M > 0] / want['rows'])
    counts, _ = np.histogram(rates, firing['edges'])
    assert firing['latents'] == counts.tolist()
    assert firing['never'] == (fired_M == 0).sum()


def test_without_a_server_the_loss_has_a_reason(workdir, config, capsys):
  evaluate.run(small.run_config(config), workdir)
  loss = evaluated(workdir)['loss'][str(LAYER)]
  assert loss['kinds'] == {}
  assert 'server.url is empty' in loss['reason']
  printed = capsys.readouterr().out
  assert 'no loss of predictions: server.url is empty' in printed
  line = next(x for x in printed.splitlines() if x.startswith('question'))
  assert line.split()[1] == '40'


class Client:
  """A server whose model predicts worse by what a stand-in is given as."""

  url = 'http://fake'
  width, k = CONFIG.width, CONFIG.k
  asked: ClassVar[list] = []

  def __init__(self, url, token, timeout_s):
    assert (url, token, timeout_s) == ('http://there', 'key', 9.0)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def info(self):
    served = {LAYER: {'latents': CONFIG.latents, 'k': self.k}}
    return {'width': self.width, 'saes': served}

  def loss(self, layer, texts, variants, kinds, mean_D):
    self.asked.append((layer, texts, variants, kinds, mean_D))
    base = [
      {'clean': 1, 'sae': 2, 'error': 1, 'zero': 5}.get(v, 4) for v in variants
    ]
    base += [3] * len(texts[0].given)
    rows_R1 = np.array(base, np.float32)[:, None]
    return [
      Loss(
        rows_R1 + np.zeros(len(t.token_T) - 1, np.float32),
        rows_R1 - 1 + 0 * t.kind_T[1:],
      )
      for t in texts
    ]


@pytest.fixture
def served(monkeypatch, workdir, config):
  """(workdir, config) of a run with a server; samples have no image tokens."""
  monkeypatch.setattr(evaluate, 'SubjectClient', Client)
  monkeypatch.setattr(Client, 'asked', [])
  monkeypatch.setattr(recovered, 'IMAGE', ())
  config.server.url, config.server.token = 'http://there', 'key'
  config.server.timeout_s = 9.0
  return workdir, small.run_config(
    config, evaluate__samples=10, evaluate__batch=4
  )


def test_the_loss_is_asked_of_the_server(served):
  workdir, config = served
  config.evaluate.kinds = ('question', 'answer')
  evaluate.run(config, workdir)
  loss = evaluated(workdir)['loss'][str(LAYER)]
  assert (loss['reason'], loss['samples'], loss['skipped']) == ('', 10, 0)
  answer = loss['kinds']['answer']
  assert answer['ce'] == {
    'clean': 1,
    'sae': 2,
    'error': 1,
    'zero': 5,
    'mean': 4,
  }
  assert answer['ce_recovered']['zero']['value'] == pytest.approx(3 / 4)
  assert answer['ce_recovered']['mean']['value'] == pytest.approx(2 / 3)
  assert answer['kl_recovered']['zero']['value'] == pytest.approx(3 / 4)
  layer, texts, _, kinds, mean_D = Client.asked[0]
  assert (layer, kinds, len(texts)) == (LAYER, ('question', 'answer'), 4)
  want_D = rows(workdir, [Kind.QUESTION, Kind.ANSWER]).mean(0)
  np.testing.assert_allclose(mean_D, want_D, rtol=1e-12)


def test_a_server_of_another_sae_is_refused(served, monkeypatch):
  workdir, config = served
  monkeypatch.setattr(Client, 'k', 9)
  with pytest.raises(ValueError, match=r"the SAE .*'k': 9.*start it again"):
    evaluate.run(config, workdir)
  assert not workdir.file('evaluation.json').exists()


def test_images_that_were_not_kept_leave_a_reason(served, monkeypatch):
  workdir, config = served
  monkeypatch.setattr(recovered, 'IMAGE', (Kind.BASE,))
  evaluate.run(config, workdir)
  loss = evaluated(workdir)['loss'][str(LAYER)]
  assert 'keeps no image' in loss['reason']
  assert (loss['skipped'], loss['kinds']) == (10, {})


def test_other_saes_stand_beside_on_the_same_rows(served, tmp_path, capsys):
  """One in SAELens' layout with its latents in another order, one untrained."""
  workdir, config = served
  own = exports.load(workdir.export(LAYER))
  order = np.random.default_rng(3).permutation(CONFIG.latents)
  parts = ('w_enc_MD', 'b_enc_M', 'w_dec_MD', 'theta_M')
  again = dataclasses.replace(
    own, **{name: getattr(own, name)[order] for name in parts}
  )
  exports.write(again, tmp_path / 'again')
  wide = dataclasses.replace(CONFIG, latents=20, k=2)
  exports.write(small.random_sae(wide, seed=8), tmp_path / 'wide')
  others = (str(tmp_path / 'again' / 'saelens'), str(tmp_path / 'wide'))
  config.evaluate.others = others
  evaluate.run(config, workdir)
  found = evaluated(workdir)
  compared = found['compared'][str(LAYER)]
  mine, same, other = compared['saes']
  assert [sae['name'] for sae in compared['saes']] == ['this one', *others]
  assert mine['kinds'] == found[str(LAYER)]
  for kind, figures in mine['kinds'].items():
    for key in ('fvu', 'l0', 'dead', 'cosine'):
      np.testing.assert_allclose(
        same['kinds'][kind][key], figures[key], rtol=1e-5
      )
  assert (other['latents'], other['k'], other['kinds']['all']['l0']) == (
    20,
    2,
    2,
  )
  assert other['loss']['kinds']['all']['ce'] == {
    'sae': 3, 'clean': 1, 'zero': 5, 'mean': 4
  }  # fmt: skip
  given = Client.asked[-1][1][0].given[0]
  assert given.shape == (10, CONFIG.width)
  pairs = {tuple(pair['saes']): pair['all'] for pair in compared['pairs']}
  assert len(pairs) == 3
  assert pairs['this one', others[0]]['share'] == 1
  assert pairs['this one', others[0]]['mean'] == pytest.approx(1)
  assert pairs['this one', others[1]]['latents'] == CONFIG.latents
  assert pairs['this one', others[1]]['mean'] < 0.95
  printed = capsys.readouterr().out
  assert 'SAEs beside one another' in printed
  assert 'matched decoder directions' in printed


def test_a_missing_other_sae_is_refused_before_work(workdir, config):
  config = small.run_config(config, evaluate__others=('/nowhere/sae',))
  with pytest.raises(ValueError, match='/nowhere/sae holds no SAE'):
    evaluate.run(config, workdir)


def test_an_other_sae_of_another_layer_is_refused(workdir, config, tmp_path):
  lost = small.random_sae(dataclasses.replace(CONFIG, layer=LAYER + 1))
  exports.write(lost, tmp_path / 'lost')
  config = small.run_config(config)
  config.evaluate.others = (str(tmp_path / 'lost'),)
  with pytest.raises(ValueError, match=f'is of layer {LAYER + 1}; here'):
    evaluate.run(config, workdir)


def test_others_are_given_for_each_layer(tmp_path, config):
  layers = (LAYER, 7)
  small.write_store(tmp_path / 'acts' / 'b', layers=layers)
  workdir = Workdir.of(tmp_path)
  for layer in layers:
    one = small.random_sae(dataclasses.replace(CONFIG, layer=layer), seed=layer)
    exports.write(one, workdir.export(layer))
    exports.write(one, tmp_path / f'copy{layer}')
  config = small.run_config(config)
  config.lmm.layers = layers
  config.evaluate.others = (str(tmp_path / 'copy{layer}'),)
  evaluate.run(config, workdir)
  compared = evaluated(workdir)['compared']
  for layer in layers:
    (pair,) = compared[str(layer)]['pairs']
    assert pair['saes'][1].endswith(f'copy{layer}')
    assert pair['all']['mean'] == pytest.approx(1)
  config.evaluate.others = (str(tmp_path / 'copy7'),)
  evaluate.run(config, workdir)
  assert list(evaluated(workdir)['compared']) == ['7']
  lost = small.random_sae(dataclasses.replace(CONFIG, layer=3))
  exports.write(lost, tmp_path / 'copy3')
  config.evaluate.others = (str(tmp_path / 'copy3'),)
  with pytest.raises(ValueError, match=r'is of layer 3; lmm.layers has'):
    evaluate.run(config, workdir)


@pytest.mark.parametrize(
  ('field', 'value', 'match'),
  [
    ('rows', -1, 'evaluate.rows is -1; it must be at least 0'),
    ('samples', -2, 'evaluate.samples is -2; it must be at least 0'),
    ('batch', 0, 'evaluate.batch is 0; it must be at least 1'),
    ('kinds', ('verb',), "token kind 'verb' is none of"),
    ('kinds', (), 'evaluate.kinds is empty'),
    ('others', ('a', 'a'), 'names an SAE twice'),
    ('others', (3,), r'evaluate.others is \(3,\): each must be text'),
  ],
)
def test_a_bad_setting_is_refused(workdir, config, field, value, match):
  config = small.run_config(config)
  config.evaluate[field] = value
  with pytest.raises(ValueError, match=match):
    evaluate.run(config, workdir)


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
