import dataclasses

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from lmm_sae.core import records, recovered
from lmm_sae.core.recovered import Loop
from lmm_sae.core.remote import Loss
from lmm_sae.core.store import ActivationStore, StoreMeta
from lmm_sae.core.tokens import IMAGE, TEXT, Kind

D, LAYER = 6, 3
KINDS = (
  Kind.BOS,
  Kind.BASE,
  Kind.TILE,
  Kind.QUESTION,
  Kind.QUESTION,
  Kind.ANSWER,
)
V = recovered.VARIANTS


def made(samples=7, seed=0):
  """Losses of samples of unlike lengths; the ablations lose most."""
  rng = np.random.default_rng(seed)
  kinds, losses = [], []
  for s in range(samples):
    kind_T = np.array((*KINDS[1:], *([Kind.ANSWER] * s)), np.uint8)
    shape = len(V), len(kind_T)
    worse = np.array([0, 1, 0, 5, 3])[:, None]
    ce_RT = worse + rng.uniform(0.1, 1, shape)
    kl_RT = worse * rng.uniform(0.1, 1, shape)
    losses.append(Loss(ce_RT.astype(np.float32), kl_RT.astype(np.float32)))
    kinds.append(kind_T)
  return kinds, losses


def pooled(kinds, values, wanted):
  """Mean by variant over every token of these kinds."""
  parts = [
    value_RT[:, np.isin(kind_T, wanted)]
    for kind_T, value_RT in zip(kinds, values, strict=True)
  ]
  return dict(
    zip(V, np.concatenate(parts, 1).astype(float).mean(1), strict=True)
  )


def test_the_table_equals_means_over_all_tokens():
  kinds, losses = made()
  got = recovered.table(kinds, losses, V, 0, 50)
  sets = {
    'question': [Kind.QUESTION],
    'answer': [Kind.ANSWER],
    'base': [Kind.BASE],
    'tile': [Kind.TILE],
    'text': list(TEXT),
    'image': list(IMAGE),
    'all': list(TEXT + IMAGE),
  }
  assert set(got) == set(sets)
  for name, wanted in sets.items():
    row = got[name]
    kl = pooled(kinds, [loss.kl_RT for loss in losses], wanted)
    assert row['kl'] == pytest.approx(kl)
    assert row['tokens'] == sum(np.isin(k, wanted).sum() for k in kinds)
    for ablation in ('zero', 'mean'):
      figure = row['kl_recovered'][ablation]
      assert figure['value'] == pytest.approx(1 - kl['sae'] / kl[ablation])
      assert figure['n'] == len(kinds)
      assert figure['ci'][0] <= figure['value'] <= figure['ci'][1]
    text = [kind for kind in wanted if kind in TEXT]
    if not text:
      assert row['ce'] is None
      assert row['ce_recovered']['zero']['reason'] == recovered.NO_TEXT
      continue
    ce = pooled(kinds, [loss.ce_RT for loss in losses], text)
    assert row['ce'] == pytest.approx(ce)
    for ablation in ('zero', 'mean'):
      want = (ce[ablation] - ce['sae']) / (ce[ablation] - ce['clean'])
      assert row['ce_recovered'][ablation]['value'] == pytest.approx(want)


def test_an_sae_that_changes_nothing_recovers_everything():
  kinds, losses = made()
  for loss in losses:
    loss.ce_RT[1], loss.kl_RT[1] = loss.ce_RT[0], 0
  row = recovered.table(kinds, losses, V, 0, 50)['all']
  for name in ('ce_recovered', 'kl_recovered'):
    for ablation in ('zero', 'mean'):
      assert row[name][ablation]['value'] == 1
      assert row[name][ablation]['ci'] == [1, 1]


def test_an_ablation_that_does_no_harm_gives_no_share():
  kinds, losses = made()
  for loss in losses:
    loss.ce_RT[3] = loss.ce_RT[0] - 0.05
  row = recovered.table(kinds, losses, V, 0, 50)['answer']
  assert row['ce_recovered']['zero']['value'] is None
  assert row['ce_recovered']['zero']['reason'] == recovered.NO_ROOM
  assert row['ce_recovered']['mean']['value'] is not None


def test_a_loss_that_is_not_finite_is_named():
  kinds, losses = made()
  losses[2].kl_RT[4, 0] = np.nan
  with pytest.raises(ValueError, match='`mean` in the loop is not finite'):
    recovered.table(kinds, losses, V, 0, 50)


def test_no_samples_make_an_empty_table():
  assert recovered.table([], [], V, 0, 50) == {}


class Client:
  """Remembers what it was asked; a loss is the given row's sum."""

  def __init__(self):
    self.asked = []

  def loss(self, layer, texts, variants, kinds, mean_D):
    self.asked.append((layer, texts, variants, kinds, mean_D))
    count = len(variants) + len(texts[0].given)
    out = []
    for text in texts:
      ce_RT = np.zeros((count, len(text.token_T) - 1), np.float32)
      if text.given:
        ce_RT[-1] = text.given[0].sum(1)[:-1]
      out.append(Loss(ce_RT, 2 * ce_RT))
    return out


@pytest.fixture
def store(tmp_path):
  """Five samples; 1 has lost its image, 3 has none and needs none."""
  path = tmp_path / 'b'
  meta = StoreMeta('b', 'toy', 'f', (LAYER,), {}, D, (1, 1), 'pil')
  store = ActivationStore.create(path, meta, 1, 64, 64, 8)
  (path / 'images').mkdir()
  rng = np.random.default_rng(0)
  samples, kinds, start = [], [], 0
  for s in range(5):
    own = KINDS if s != 3 else (Kind.BOS, Kind.QUESTION, Kind.ANSWER)
    image = '' if s == 3 else f'images/{s}.png'
    if image and s != 1:
      Image.new('RGB', (4, 4 + s), (s, 0, 0)).save(path / image)
    stop = start + len(own)
    samples.append(
      records.Sample(s, 0, str(s), image, 4, 4, '', (), start, stop)
    )
    kinds += own
    start = stop
  zeros = np.zeros(start, np.int32)
  fields = dict.fromkeys(('sample', 'position', 'image', 'row', 'col'), zeros)
  fields |= {'token': np.arange(start), 'kind': np.array(kinds, np.uint8)}
  fields['box'] = np.zeros((start, 4), np.int16)
  x_ND = rng.normal(size=(start, D)).astype(ml_dtypes.bfloat16)
  store.write_group(0, {LAYER: x_ND}, fields, samples, [])
  return store


def test_the_loop_sends_what_was_captured(store):
  client, mean_D = Client(), np.ones(D)
  loop = Loop(client, store, LAYER, 5, ('image',), mean_D, batch=3)
  assert [s.sample for s in loop.samples] == [0, 2, 3, 4]
  assert loop.skipped == 1
  assert len(loop.served()) == 4
  assert [len(asked[1]) for asked in client.asked] == [3, 1]
  layer, texts, variants, kinds, mean = client.asked[0]
  assert (layer, variants, kinds) == (LAYER, V, ('image',))
  assert mean is mean_D
  np.testing.assert_array_equal(texts[1].token_T, np.arange(12, 18))
  np.testing.assert_array_equal(texts[1].kind_T, KINDS)
  assert texts[1].image.size == (4, 6)
  assert texts[2].image is None
  np.testing.assert_array_equal(loop.kinds_T[2], [Kind.QUESTION, Kind.ANSWER])


def test_given_rows_are_made_of_the_stored_ones(store):
  client = Client()
  loop = Loop(client, store, LAYER, 5, ('all',), np.ones(D), batch=2)
  got = loop.given(lambda x_ND: 2 * x_ND)
  x_TD = store.read(LAYER, 0, 6).astype(np.float32)
  np.testing.assert_allclose(got[0].ce_RT[0], 2 * x_TD.sum(1)[:-1], rtol=1e-5)
  assert client.asked[0][2] == ()


def test_samples_are_spread_over_the_store(store):
  samples = [dataclasses.replace(store.sample(0), sample=i) for i in range(101)]
  picked = [s.sample for s in recovered.spread(samples, 3)]
  assert picked == [0, 50, 100]
  assert len(recovered.spread(samples, 500)) == 101
  assert recovered.spread([], 4) == []
