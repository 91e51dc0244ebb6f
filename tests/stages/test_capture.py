import json
import pathlib

import numpy as np
import pytest
import torch
import transformers

from lmm_sae.core.tokens import Kind
from lmm_sae.core.workdir import Workdir
from lmm_sae.stages import capture
from tests.lmm import tiny_llava
from tests.stages import captures
from tests.stages.captures import (
  BAD,
  LAYERS,
  ROWS,
  config_of,
  digest,
  stores,
)


@pytest.fixture(scope='module')
def model_folder(tmp_path_factory):
  return tiny_llava.make(tmp_path_factory.mktemp('capture') / 'tiny')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return captures.make_data(tmp_path_factory.mktemp('data'))


@pytest.fixture
def settings(model_folder, data):
  return config_of(model_folder, data)


@pytest.fixture(scope='module')
def whole(model_folder, data, tmp_path_factory):
  """A workdir captured without interruption."""
  workdir = Workdir.of(tmp_path_factory.mktemp('whole'))
  capture.run(config_of(model_folder, data), workdir)
  return workdir


def test_every_row_is_in_one_split_or_rejected(whole):
  sources, rejected = [], []
  for name, store in stores(whole).items():
    found = store.samples()
    sources += [sample.source for sample in found]
    rejected += [reject['source'] for reject in store.rejects()]
    taken = {sample.sample for sample in found}
    assert len(taken) + len(store.rejects()) == {'train': 15}.get(name, 4)
  assert sorted(rejected) == sorted(f'row {at}' for at in BAD)
  good = [f'id{at}' for at in range(ROWS) if at not in BAD]
  assert sorted(sources) == sorted(good)


def test_a_reject_shifts_no_other_row(model_folder, data, whole, tmp_path):
  rows = json.loads(data.read_text())
  for at in BAD:
    rows[at] = {'conversations': [{'from': 'human', 'value': 'a mended row'}]}
  for row in rows:
    if 'image' in row:
      row['image'] = str(data.parent / row['image'])
  mended = tmp_path / 'mended.json'
  mended.write_text(json.dumps(rows))
  workdir = Workdir.of(tmp_path / 'run')
  config = config_of(model_folder, mended)
  config.data.image_root = str(data.parent)
  capture.run(config, workdir)
  for before, after in zip(
    stores(whole).values(), stores(workdir).values(), strict=True
  ):
    assert not after.rejects()
    for sample in before.samples():
      same = after.sample(sample.sample)
      assert (same.source, same.prompt) == (sample.source, sample.prompt)
      np.testing.assert_allclose(
        before.read(2, sample.start, sample.stop).astype(np.float32),
        after.read(2, same.start, same.stop).astype(np.float32),
        rtol=2e-2,
      )


def test_rows_are_those_of_a_hook_of_the_test(whole, model_folder):
  """One sample at a time, by transformers alone."""
  model = transformers.LlavaNextForConditionalGeneration.from_pretrained(
    model_folder
  ).eval()
  processor = transformers.AutoProcessor.from_pretrained(
    model_folder, backend='pil'
  )
  for store in stores(whole).values():
    for sample in store.samples():
      kept = {}
      handles = [
        model.model.language_model.layers[layer].register_forward_hook(
          lambda m, a, out, layer=layer, kept=kept: kept.update({layer: out[0]})
        )
        for layer in LAYERS
      ]
      images = [store.image(sample.sample)] if sample.image else None
      inputs = processor(text=sample.prompt, images=images, return_tensors='pt')
      with torch.no_grad():
        model(**inputs)
      for handle in handles:
        handle.remove()
      tokens = store.tokens(sample.start, sample.stop)
      np.testing.assert_array_equal(tokens['token'], inputs['input_ids'][0])
      for layer in LAYERS:
        found = store.read(layer, sample.start, sample.stop)
        np.testing.assert_allclose(
          found.astype(np.float32), kept[layer].numpy(), rtol=1e-2, atol=1e-4
        )


def test_tokens_say_what_they_are(whole):
  for store in stores(whole).values():
    for sample in store.samples():
      tokens = store.tokens(sample.start, sample.stop)
      assert (tokens['sample'] == sample.sample).all()
      count = sample.stop - sample.start
      np.testing.assert_array_equal(tokens['position'], np.arange(count))
      base_view = tokens['kind'] == Kind.BASE
      assert base_view.sum() == (16 if sample.image else 0)
      words = ''.join(
        store.vocab[token]
        for token in tokens['token'][tokens['kind'] == Kind.QUESTION]
      )
      assert words == sample.turns[0].question
      if sample.image:
        box = tokens['box'][base_view]
        assert tuple(box.max(0)[2:]) == (sample.width, sample.height)
        assert store.image(sample.sample).size == (sample.width, sample.height)


def test_kinds_add_up_in_the_manifest(whole):
  for store in stores(whole).values():
    kinds = {}
    for line in store.manifest:
      for name, count in line['kinds'].items():
        kinds[name] = kinds.get(name, 0) + count
    assert sum(kinds.values()) == store.num_rows
    assert kinds['bos'] == len(store.samples())


def test_meta_says_where_the_rows_come_from(whole):
  meta = stores(whole)['a'].meta
  assert meta.layer_paths == {
    '0': 'model.language_model.layers.0',
    '2': 'model.language_model.layers.2',
  }
  assert (meta.width, meta.grid) == (tiny_llava.WIDTH, (4, 4))
  assert meta.image_backend == 'LlavaNextImageProcessorPil'


def test_a_second_run_changes_nothing_and_loads_nothing(
  whole, settings, monkeypatch
):
  before = digest(whole)
  monkeypatch.setattr(capture, 'make_group', None)
  capture.run(settings, whole)
  assert digest(whole) == before


def test_a_vocabulary_that_was_dropped_is_written_again(settings, tmp_path):
  settings.data.limit = 9
  workdir = Workdir.of(tmp_path / 'run')
  capture.run(settings, workdir)
  before = digest(workdir)
  (workdir.acts('a') / 'vocab.json').delete()
  capture._opened.cache_clear()  # as in a process of its own
  capture.run(settings, workdir)
  assert digest(workdir) == before


def test_a_folder_of_images_is_captured_with_a_bare_prompt(
  settings, data, tmp_path
):
  settings.data.source = 'images'
  settings.data.path = str(data.parent)
  capture.run(settings, Workdir.of(tmp_path))
  for store in stores(Workdir.of(tmp_path)).values():
    for sample in store.samples():
      assert sample.prompt == '<image>'
      assert sample.source == pathlib.Path(sample.image).name
      kinds = store.tokens(sample.start, sample.stop, ('kind',))['kind']
      text = kinds[~np.isin(kinds, [Kind.BASE, Kind.TILE, Kind.NEWLINE])]
      assert text.tolist() == [Kind.BOS]


def test_scenes_keep_their_pictures_and_their_truth(settings, tmp_path):
  settings.data.source = 'scenes'
  settings.data.train, settings.data.half = 3, 2
  workdir = Workdir.of(tmp_path)
  capture.run(settings, workdir)
  found = stores(workdir)
  assert [len(store.samples()) for store in found.values()] == [3, 2, 2]
  assert not found['train'].sample(0).image
  assert found['train'].sample(0).truth is None
  for name in ('a', 'b'):
    for sample in found[name].samples():
      assert found[name].image(sample.sample).size == (128, 128)
      regions = np.unique(found[name].regions(sample.sample))
      concepts = sample.truth['concepts']
      assert set(concepts) == {str(region) for region in regions}
      assert sample.turns
  prompts = [s.prompt for store in found.values() for s in store.samples()]
  assert len(set(prompts)) > 2


def refuse(settings, tmp_path, message):
  with pytest.raises(ValueError, match=message):
    capture.run(settings, Workdir.of(tmp_path))


def test_what_cannot_be_captured_is_refused_at_once(settings, tmp_path):
  for field, value, message in (
    ('lmm.path', '/no/where', 'is no folder: give `small`'),
    ('lmm.layers', (), 'name each layer once'),
    ('lmm.layers', (1, 1), 'name each layer once'),
    ('lmm.layers', (1.0,), r'lmm.layers is \(1.0,\): give whole numbers'),
    ('lmm.layers', ('a',), 'give whole numbers'),
    ('lmm.layers', (True,), 'give whole numbers'),
    ('data.path', '/no/where.json', 'is no file'),
    ('data.source', 'tfds', 'none of scenes, llava'),
    ('data.limit', 2, 'at least 3 are needed'),
    ('capture.batch', 0, r'capture\.batch is 0'),
    ('capture.shard_rows', 100, 'no multiple of chunk_rows'),
  ):
    changed = settings.copy_and_resolve_references()
    section, name = field.split('.')
    with changed.ignore_type():
      changed[section][name] = value
    refuse(changed, tmp_path, message)
    assert not (tmp_path / 'acts').exists(), field


def test_a_layer_outside_the_model_is_refused(settings, tmp_path):
  settings.lmm.layers = (0, 3)
  refuse(settings, tmp_path, '3 layers are 0 to 2: change lmm.layers')
  assert not (tmp_path / 'acts').exists()


def test_other_data_in_the_same_workdir_is_refused(settings, whole):
  settings.data.seed = 9
  refuse(settings, whole.root, r'config\.data\.seed: 0, now 9')


@pytest.mark.parametrize('done', ['0/2', ''])
def test_data_that_changed_under_a_capture_are_refused(
  settings, tmp_path, capsys, done
):
  path = captures.make_data(tmp_path)
  settings.data.path = str(path)
  settings.capture.share = done
  capture.run(settings, Workdir.of(tmp_path / 'run'))
  path.write_text(path.read_text().replace('a red cat', 'a bad cat'))
  settings.capture.share = '1/2'
  if done:
    capture._opened.cache_clear()  # as in a process of its own
    capture._capturers.cache_clear()
    refuse(settings, tmp_path / 'run', r'other settings .*config\.content: ')
    capture.dry_run(settings, Workdir.of(tmp_path / 'run'))
    told = ' '.join(capsys.readouterr().out.split())
    assert 'was captured of data that have changed since' in told
    assert told.endswith('capture cannot start here; missing: store')
  else:  # nothing is owed, so the data need not be there any more
    path.unlink()
    capture.run(settings, Workdir.of(tmp_path / 'run'))


def test_a_split_of_which_nothing_can_be_read_is_an_error(settings, tmp_path):
  rows = [{'conversations': []}] * 6
  path = tmp_path / 'bad.json'
  path.write_text(json.dumps(rows))
  settings.data.path = str(path)
  for _ in range(2):  # and still is when it is run again
    refuse(settings, tmp_path, r'no sample .* row \d: it has no conversations')


def test_samples_that_are_too_long_are_rejects(settings, data, tmp_path):
  settings.capture.max_tokens = 90
  capture.run(settings, Workdir.of(tmp_path))
  found = stores(Workdir.of(tmp_path))
  reasons = [r['reason'] for s in found.values() for r in s.rejects()]
  long = [reason for reason in reasons if 'at most 90 are taken' in reason]
  assert 0 < len(long) < ROWS - len(BAD)
  for store in found.values():
    assert all(s.stop - s.start <= 90 for s in store.samples())
