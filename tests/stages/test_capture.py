import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from experiments import base
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.tokens import Kind
from lmm_sae.core.workdir import Workdir
from lmm_sae.stages import capture
from tests.lmm import tiny_llava

LAYERS = (0, 2)
ROWS = 23
BAD = (4, 11, 12)  # torn image, no conversation, role unknown


@pytest.fixture(scope='module')
def model_folder(tmp_path_factory):
  return tiny_llava.make(tmp_path_factory.mktemp('capture') / 'tiny')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """A LLaVA-format file of odd images, texts without image and bad rows."""
  folder = tmp_path_factory.mktemp('data')
  rng = np.random.default_rng(3)
  rows = []
  for at in range(ROWS):
    width, height = (int(n) for n in rng.integers(20, 140, 2))
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f'{at}.png')
    value = ('<image>\nwhat is this?', 'where?\n<image>')[at % 2]
    row = {
      'id': f'id{at}',
      'image': f'{at}.png',
      'conversations': [
        {'from': 'human', 'value': value},
        {'from': 'gpt', 'value': 'a red cat ' * int(rng.integers(1, 5))},
      ],
    }
    if at % 7 == 6:
      del row['image']
      row['conversations'][0]['value'] = 'how does it feel?'
    rows.append(row)
  (folder / f'{BAD[0]}.png').write_bytes(b'torn')
  rows[BAD[1]]['conversations'] = []
  rows[BAD[2]]['conversations'][0]['from'] = 'system'
  path = folder / 'data.json'
  path.write_text(json.dumps(rows))
  return path


@pytest.fixture
def settings(model_folder, data):
  return config_of(model_folder, data)


def config_of(model_folder, data):
  config = base.get_config()
  config.lmm.path = str(model_folder)
  config.lmm.layers = LAYERS
  config.lmm.threads = 1
  config.data.source = 'llava'
  config.data.path = str(data)
  config.data.heldout = 0.4
  config.capture.batch = 3
  config.capture.group = 5
  config.capture.max_tokens = 300
  config.capture.shard_rows = 256
  config.capture.chunk_rows = 32
  return config


@pytest.fixture(scope='module')
def whole(model_folder, data, tmp_path_factory):
  """A workdir captured without interruption."""
  workdir = Workdir.of(tmp_path_factory.mktemp('whole'))
  capture.run(config_of(model_folder, data), workdir)
  return workdir


def stores(workdir):
  return {
    name: ActivationStore.open(workdir.acts(name)) for name in capture.SPLITS
  }


def digest(workdir):
  return {
    str(file.relative_to(workdir.root)): hashlib.sha256(
      file.read_bytes()
    ).hexdigest()
    for file in sorted(workdir.root.rglob('*'))
    if file.is_file()
  }


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
  capture.run(config_of(model_folder, mended), workdir)
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
  monkeypatch.setattr(capture, '_subject', None)
  capture.run(settings, whole)
  assert digest(whole) == before


def test_a_process_a_core_gives_the_same_bytes(whole, settings, tmp_path):
  workdir = Workdir.of(tmp_path)
  settings.lmm.threads = 2
  capture.run(settings, workdir)
  assert digest(workdir) == digest(whole)


def test_a_killed_capture_resumes_byte_for_byte(
  whole, settings, tmp_path, root
):
  script = textwrap.dedent(
    """
    import json, os, signal, sys
    from ml_collections import ConfigDict
    from lmm_sae.core.store import ActivationStore
    from lmm_sae.core.workdir import Workdir
    from lmm_sae.stages import capture
    left = 2
    append = ActivationStore._append
    def counted(self, name, lines):
      global left
      end = append(self, name, lines)
      left -= name == 'samples'
      if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
      return end
    ActivationStore._append = counted
    config = ConfigDict(json.loads(sys.argv[1]))
    capture.run(config, Workdir.of(sys.argv[2]))
    """
  )
  config = settings.to_json()
  done = subprocess.run(
    [sys.executable, '-c', script, config, str(tmp_path)],
    env=os.environ | {'PYTHONPATH': str(root)},
    check=False,
    capture_output=True,
    text=True,
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  workdir = Workdir.of(tmp_path)
  partial = ActivationStore.open(workdir.acts('train'), partial=True)
  assert len(partial.committed()) == 1
  capture.run(settings, workdir)
  assert digest(workdir) == digest(whole)


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
