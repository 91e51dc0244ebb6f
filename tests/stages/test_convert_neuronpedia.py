"""A made-up run as a Neuronpedia takes it in."""

import dataclasses
import gzip
import json

import numpy as np
import pytest

from lmm_sae.core import neuronpedia, records
from lmm_sae.core.index import LatentIndex
from lmm_sae.core.neuronpedia import Source
from lmm_sae.core.records import Explanation
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.tokens import Kind
from lmm_sae.sae import exports, share
from lmm_sae.sae.model import SaeConfig
from lmm_sae.stages import convert
from tests.core import neuronpedia_schema as schema
from tests.sae import small
from tests.stages import fake_run
from tests.stages.fake_run import LAYER, K

M, WIDTH = 64, 6
ABOUT = ('release', 'model', 'sourceset', 'source')
TABLES = ('features', 'activations', 'explanations')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(config, workdir, SAE) of a run with everything that is exported."""
  config, workdir = fake_run.make(tmp_path_factory.mktemp('run'), M, 12)
  sae = small.random_sae(SaeConfig(LAYER, WIDTH, M, K))
  exports.write(sae, workdir.export(LAYER))
  config.lmm.layers = (LAYER,)
  config.convert.to = 'neuronpedia'
  convert.run(config, workdir)
  return config, workdir, sae


def folder(workdir):
  return workdir.file('neuronpedia') / 'small' / f'{LAYER}-res-lmm-sae'


def lines(path) -> list[dict]:
  opened = gzip.open if path.suffix == '.gz' else open
  with opened(path, 'rt') as file:
    return [json.loads(line) for line in file]


def table(workdir, name) -> list[dict]:
  paths = sorted((folder(workdir) / name).glob('batch-*.jsonl.gz'))
  return [row for path in paths for row in lines(path)]


def test_every_row_is_one_of_its_table_as_published(run):
  _, workdir, _ = run
  for name in ABOUT:
    [row] = lines(folder(workdir) / f'{name}.jsonl')
    assert not schema.wrong(name, row), name
  for name in TABLES:
    rows = table(workdir, name)
    assert len(rows) > M // 2
    for row in rows:
      assert not schema.wrong(name, row), name
      assert row.keys() == rows[0].keys()  # the importer reads the first's
  ids = [row['id'] for row in table(workdir, 'activations')]
  assert len(set(ids)) == len(ids)


def test_the_check_of_the_schema_finds_what_is_wrong(run):
  _, workdir, _ = run
  row = table(workdir, 'features')[0]
  for name, value, what in (
    ('index', 3, 'index: 3 is no text'),
    ('vector', ['a'], 'is no numbers'),
    ('layer', None, 'layer: null'),
    ('other', 1, 'other: no such column'),
  ):
    assert what in str(schema.wrong('features', row | {name: value}))
  row.pop('modelId')
  assert schema.wrong('features', row) == ['modelId: missing']


def test_rows_refer_to_one_another(run):
  _, workdir, _ = run
  about = {n: lines(folder(workdir) / f'{n}.jsonl')[0] for n in ABOUT}
  assert about['sourceset']['releaseName'] == about['release']['name']
  assert about['source']['setName'] == about['sourceset']['name']
  assert about['source']['modelId'] == about['model']['id'] == 'small'
  assert about['model']['layers'] == 6  # of the packaged subject
  latents = [row['index'] for row in table(workdir, 'features')]
  assert latents == [str(m) for m in range(M)]
  for name in TABLES:
    for row in table(workdir, name):
      assert row['layer'] == about['source']['id'] == folder(workdir).name
      assert row['modelId'] == 'small'


def test_vectors_are_the_decoders_and_density_counts_all_tokens_but_bos(run):
  _, workdir, sae = run
  index = LatentIndex.open(workdir.index(LAYER, 'b'))
  store = ActivationStore.open(workdir.acts('b'))
  kind_N = store.tokens(0, store.num_rows, ['kind'])['kind']
  rows = table(workdir, 'features')
  got_MD = np.array([row['vector'] for row in rows])
  np.testing.assert_allclose(got_MD, sae.w_dec_MD, atol=1e-7)
  fired_M = sum(
    index.stats[f'fired_{kind.name.lower()}']
    for kind in Kind
    if kind not in (Kind.BOS, Kind.PADDING)
  )
  np.testing.assert_allclose(
    [row['frac_nonzero'] for row in rows],
    fired_M / np.sum(kind_N != Kind.BOS),
    rtol=1e-4,
  )
  np.testing.assert_allclose(
    [row['maxActApprox'] for row in rows], index.stats['peak'], rtol=1e-4
  )


def test_exemplars_stand_token_by_token(run):
  _, workdir, _ = run
  index = LatentIndex.open(workdir.index(LAYER, 'b'))
  rows = table(workdir, 'activations')
  for latent in range(M):
    mine = [row for row in rows if row['index'] == str(latent)]
    texts = [row for row in mine if row['dataSource'] == 'text']
    images = [row for row in mine if row['dataSource'] == 'image']
    for row, text in zip(texts, index.texts(latent), strict=True):
      assert row['tokens'] == text.tokens
      assert row['dataIndex'] == f'b/{text.sample}'
      assert row['values'] == pytest.approx(text.acts, rel=1e-4)
      assert row['qualifyingTokenIndex'] == text.at
    for row, image in zip(images, index.exemplars(latent), strict=True):
      assert row['dataIndex'] == f'b/{image.sample}'
      for token, value in zip(row['tokens'], row['values'], strict=True):
        r, c = map(int, token.removeprefix('<img ').rstrip('>').split(','))
        assert value == pytest.approx(image.heat_HW[r, c], rel=1e-4)
    for row in mine:
      at = row['maxValueTokenIndex']
      assert row['values'][at] == row['maxValue'] == max(row['values']) > 0
  assert not [row for row in rows if row['index'] == str(M - 1)]  # dead


def test_explanations_of_every_explainer_are_there(run):
  _, workdir, _ = run
  said = [
    one
    for one in records.read(Explanation, workdir.file('explanations.jsonl'))
    if one.outcome == 'explained' and not one.dictionary
  ]
  want = {(str(m.latent), m.label, f'{m.explainer}: {m.text}') for m in said}
  rows = table(workdir, 'explanations')
  got = [(row['index'], row['description'], row['notes']) for row in rows]
  assert set(got) == want
  assert len(got) == len(said)


def snapshot(workdir) -> dict[str, bytes]:
  root = workdir.file('neuronpedia')
  return {
    str(path.relative_to(root)): path.read_bytes()
    for path in root.rglob('*')
    if path.is_file()
  }


def test_batches_of_few_latents_hold_the_same_rows(run, monkeypatch):
  config, workdir, _ = run
  before = {name: table(workdir, name) for name in TABLES}
  monkeypatch.setattr(neuronpedia, 'BATCH', 8)
  convert.run(config, workdir)
  names = {path.name for path in (folder(workdir) / 'features').iterdir()}
  assert names == {f'batch-{i}.jsonl.gz' for i in range(M // 8)}
  after = {name: table(workdir, name) for name in TABLES}
  monkeypatch.undo()
  convert.run(config, workdir)
  assert before == after == {name: table(workdir, name) for name in TABLES}


def test_what_stood_there_stays_until_all_is_written(run, monkeypatch):
  config, workdir, _ = run
  before = snapshot(workdir)
  monkeypatch.setattr(neuronpedia, 'BATCH', 8)
  whole = neuronpedia._explanations

  def killed(source, said):
    if said and said[0].latent > M // 2:
      raise KeyboardInterrupt
    return whole(source, said)

  monkeypatch.setattr(neuronpedia, '_explanations', killed)
  with pytest.raises(KeyboardInterrupt):
    convert.run(config, workdir)
  inside = {k: v for k, v in snapshot(workdir).items() if '.part/' not in k}
  assert inside == before
  monkeypatch.undo()
  convert.run(config, workdir)
  assert snapshot(workdir) == before


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('to', 'neurons', r"convert\.to is 'neurons'"),
    ('source', 'somewhere', 'run it apart'),
    ('upload', 'owner/name', 'run it apart'),
    ('name', 'My Set!', 'is no name for Neuronpedia'),
    ('name', '../out', 'is no name for Neuronpedia'),
    ('split', 'c', 'lmm-sae index'),
  ],
)
def test_what_cannot_be_is_refused(run, field, value, message):
  config, workdir, _ = run
  before = snapshot(workdir)
  config = config.copy_and_resolve_references()
  config.convert[field] = value
  with pytest.raises(ValueError, match=message):
    convert.run(config, workdir)
  assert snapshot(workdir) == before


def test_an_index_of_another_sae_is_refused(run, tmp_path):
  config, workdir, _ = run
  before = snapshot(workdir)
  kept = workdir.export(LAYER).rename(tmp_path / 'kept')
  exports.write(
    small.random_sae(SaeConfig(LAYER, WIDTH, M - 1, K)), workdir.export(LAYER)
  )
  with pytest.raises(ValueError, match=f'{M} latents.* of {M - 1}'):
    convert.run(config, workdir)
  assert snapshot(workdir) == before
  exports.write(exports.load(kept), workdir.export(LAYER))


@pytest.mark.parametrize(
  ('name', 'slug'),
  [
    ('small', 'small'),
    ('llava-hf/llama3-LLaVA-next-8b-hf', 'llama3-llava-next-8b-hf'),
    ('/models/My model (2)/', 'my-model-2'),
    ('???', 'model'),
  ],
)
def test_a_model_has_an_id_that_neuronpedia_takes(name, slug):
  assert neuronpedia.slug(name) == slug
  assert Source(slug, 1, 'res', 'b', 0, 0, 6, 1, 1).id == '1-res'


def test_text_that_postgres_refuses_is_mended():
  assert neuronpedia._shown('a\0b\ud83d') == 'a b?'
  json.dumps(neuronpedia._shown('\ud83d')).encode()


@pytest.mark.parametrize(
  ('field', 'value'),
  [('source', 'sae 0123456789ab, store and settings 0'), ('k', K + 1)],
)
def test_an_index_of_other_weights_or_k_is_refused(run, field, value):
  config, workdir, _ = run
  file = workdir.index(LAYER, 'b') / 'meta.json'
  before = file.read_text()
  file.write_text(json.dumps(json.loads(before) | {field: value}))
  try:
    with pytest.raises(ValueError, match='is of another SAE than'):
      convert.run(config, workdir)
  finally:
    file.write_text(before)
  convert.run(config, workdir)


def test_what_decides_which_latents_fire_tells_saes_apart():
  config = SaeConfig(LAYER, WIDTH, M, K, activation='jumprelu')
  one = small.random_sae(config)
  other = dataclasses.replace(one, theta_M=one.theta_M + 1)
  assert share.firing(one) == share.firing(exports.source(one))
  assert share.firing(one) != share.firing(other)


def test_a_damaged_explanation_is_refused(run):
  config, workdir, _ = run
  file = workdir.file('explanations.jsonl')
  before = file.read_bytes()
  file.write_bytes(before + b'{"latent": 1}\n')
  try:
    with pytest.raises(ValueError, match=r'explanations\.jsonl has a line'):
      convert.run(config, workdir)
  finally:
    file.write_bytes(before)
