"""What capture stores, and in which order."""

import json

import numpy as np
import pytest

from lmm_sae.core.tokens import Kind
from lmm_sae.core.workdir import Workdir
from lmm_sae.lmm.llava import Subject
from lmm_sae.stages import capture
from tests.lmm import tiny_llava
from tests.stages import captures
from tests.stages.captures import LAYERS, stores

ROWS = 60


@pytest.fixture(scope='module')
def settings(tmp_path_factory):
  folder = tmp_path_factory.mktemp('capture')
  model = tiny_llava.make(folder / 'tiny')
  config = captures.config_of(model, captures.make_data(folder, ROWS))
  config.data.heldout = 0.1
  config.capture.group = 40  # two groups
  config.capture.batch = 8
  return config.lock()


def run(settings, folder, **fields):
  """The stores of a capture with other fields."""
  config = settings.copy_and_resolve_references().unlock()
  for name, value in fields.items():
    section, _, field = name.rpartition('__')
    with config.ignore_type():
      config[section or 'capture'][field] = value
  workdir = Workdir.of(folder)
  capture.run(config, workdir)
  return stores(workdir)


@pytest.fixture(scope='module', params=['bfloat16', 'int8'])
def pair(settings, tmp_path_factory, request):
  """The train split in the order of the samples, and mixed."""
  return [
    run(
      settings,
      tmp_path_factory.mktemp('pair'),
      mix=mix,
      store=request.param,
    )['train']
    for mix in (False, True)
  ]


@pytest.fixture(scope='module')
def plain(settings, tmp_path_factory):
  """Every token of every split, in the order of the samples."""
  return run(settings, tmp_path_factory.mktemp('plain'))


def rows(store):
  """{field or layer: all rows}, layers as integers."""
  parts = []
  for start, stop in store.ranges:
    part = store.tokens(start, stop)
    for layer in LAYERS:
      part[layer] = store.read(layer, start, stop).view(np.uint16)
    parts.append(part)
  return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def in_order(found):
  order = np.lexsort((found['position'], found['sample']))
  return {name: field[order] for name, field in found.items()}


def test_a_block_of_a_mixed_store_has_rows_of_nearly_all_samples(pair):
  _, mixed = pair
  for start, stop in mixed.ranges:
    own = np.unique(mixed.tokens(start, stop, ('sample',))['sample'])
    assert len(own) >= 10
    for at in range(start, stop - 255, 256):
      block = mixed.tokens(at, at + 256, ('sample',))['sample']
      assert len(np.unique(block)) > 0.85 * len(own)


def test_mixing_moves_rows_and_changes_none(pair):
  plain, mixed = map(rows, pair)
  assert (np.diff(plain['sample']) >= 0).all()
  assert abs(np.corrcoef(mixed['sample'], mixed['position'])[0, 1]) < 0.2
  assert (np.diff(mixed['sample']) < 0).mean() > 0.3
  back = in_order(mixed)
  assert plain.keys() == back.keys()
  for name, field in plain.items():
    np.testing.assert_array_equal(field, back[name], err_msg=str(name))


def test_a_mixed_sample_has_no_range_and_else_is_what_it_was(pair):
  plain, mixed = pair
  assert (plain.meta.mixed, mixed.meta.mixed) == (False, True)
  for one, other in zip(plain.samples(), mixed.samples(), strict=True):
    assert (other.start, other.stop) == (-1, -1)
    assert one.stop - one.start == one.tokens == other.tokens
    assert (one.sample, one.prompt, one.image, one.grid) == (
      other.sample,
      other.prompt,
      other.image,
      other.grid,
    )


def test_halves_keep_the_order_of_their_samples(settings, plain, tmp_path):
  found = run(settings, tmp_path, mix=True)
  for name in ('a', 'b'):
    assert not found[name].meta.mixed
    for wanted, got in zip(
      rows(plain[name]).values(), rows(found[name]).values(), strict=True
    ):
      np.testing.assert_array_equal(wanted, got)


@pytest.mark.parametrize('mix', [False, True])
def test_only_what_is_chosen_is_stored(settings, plain, tmp_path, mix):
  """Rows of what is left are those of a store of everything, bit for bit."""
  keep = ('question', 'image:0.5', 'newline')
  found = run(
    settings, tmp_path, keep=keep, keep_halves=('base', 'bos'), mix=mix
  )
  for name, store in found.items():
    whole, some = in_order(rows(plain[name])), in_order(rows(store))
    key = whole['sample'] * 1000 + whole['position']
    at = np.flatnonzero(np.isin(key, some['sample'] * 1000 + some['position']))
    for field in whole:
      np.testing.assert_array_equal(whole[field][at], some[field])
    kept = {
      kind.name.lower(): (some['kind'] == kind).sum()
      / max(1, (whole['kind'] == kind).sum())
      for kind in Kind
    }
    if name == 'train':
      assert kept['question'] == kept['newline'] == 1
      assert 0.4 < kept['base'] < 0.6
      assert 0.4 < kept['tile'] < 0.6
      assert kept['answer'] == kept['bos'] == kept['template'] == 0
    else:
      assert kept['base'] == kept['bos'] == 1
      assert sum(kept.values()) == 2
    if not store.meta.mixed:
      for sample in store.samples():
        own = store.tokens(sample.start, sample.stop, ('sample', 'position'))
        assert (own['sample'] == sample.sample).all()
        assert (np.diff(own['position']) > 0).all()


def test_rows_that_are_not_stored_never_leave_the_device(
  settings, tmp_path, monkeypatch
):
  asked = []
  found = Subject.rows

  def watched(self, inputs, layers, keep=None):
    asked.extend(len(each) for each in keep)
    return found(self, inputs, layers, keep)

  monkeypatch.setattr(Subject, 'rows', watched)
  made = run(settings, tmp_path, keep=('answer',), keep_halves=('answer:0.5',))
  assert sum(asked) == sum(store.num_rows for store in made.values())


def test_a_sample_without_stored_tokens_stays_listed(settings, tmp_path):
  """Texts without an image have no tokens of it; nothing is run for them."""
  found = run(settings, tmp_path, keep=('tile',), keep_halves=('tile',))
  for store in found.values():
    for sample in store.samples():
      if not sample.image:
        assert sample.start == sample.stop
      else:
        assert sample.stop > sample.start
  assert any(
    not sample.image for store in found.values() for sample in store.samples()
  )


def write(folder, settings, lines):
  path = folder / 'data.json'
  path.write_text(json.dumps(lines))
  root = settings.data.path.rpartition('/')[0]
  return {'data__path': str(path), 'data__image_root': root}


def say(value, **fields):
  return {
    'conversations': [
      {'from': 'human', 'value': value},
      {'from': 'gpt', 'value': 'a red cat'},
    ],
    **fields,
  }


def test_a_group_of_rejects_alone_is_committed_and_empty(settings, tmp_path):
  lines = [say('how?')] * 30 + [{'conversations': []}] * 30
  found = run(
    settings, tmp_path / 'run', group=1, **write(tmp_path, settings, lines)
  )
  for store in found.values():
    empty = [line for line in store.manifest if line['start'] == line['stop']]
    assert len(empty) == len(store.rejects())
    assert all(line['rejects'] == 1 for line in empty)
  assert sum(len(store.rejects()) for store in found.values()) == 30


def test_several_images_are_told_apart(settings, tmp_path):
  lines = [
    say('<image> and <image>\nwhich?', image=['0.png', '1.png'], id=f'{at}')
    for at in range(4)
  ]
  found = run(settings, tmp_path / 'run', **write(tmp_path, settings, lines))
  for store in found.values():
    for sample in store.samples():
      assert len(sample.more) == 1
      fields = store.tokens(sample.start, sample.stop)
      base_view = fields['kind'] == Kind.BASE
      assert sorted(set(fields['image'][base_view])) == [0, 1]
      for number in (0, 1):
        image = store.image(sample.sample, number)
        box = fields['box'][base_view & (fields['image'] == number)]
        assert tuple(box.max(0)[2:]) == image.size


def test_raw_prompts_have_no_template(settings, tmp_path):
  lines = [say('<image>\nwhat is this?', image='2.png')] * 2
  lines += [{'text': 'a story of a red cat'}, say('how?')]
  found = run(
    settings,
    tmp_path / 'run',
    data__template='raw',
    **write(tmp_path, settings, lines),
  )
  prompts = {s.prompt for store in found.values() for s in store.samples()}
  assert 'a story of a red cat' in prompts
  assert not any('<|start|>' in prompt for prompt in prompts)


def test_a_text_that_is_no_talk_is_raw_under_any_template(settings, tmp_path):
  lines = [{'text': f'a story of {at} cats'} for at in range(4)]
  found = run(settings, tmp_path / 'run', **write(tmp_path, settings, lines))
  prompts = {s.prompt for store in found.values() for s in store.samples()}
  assert prompts == {f'a story of {at} cats' for at in range(4)}


def test_images_that_do_not_fit_the_memory_are_read_again(
  settings, plain, tmp_path, monkeypatch
):
  from lmm_sae.lmm import reading

  monkeypatch.setattr(reading, 'WAITING_BYTES', 20_000)
  found = run(settings, tmp_path)
  for name, store in found.items():
    for wanted, got in zip(
      rows(plain[name]).values(), rows(store).values(), strict=True
    ):
      np.testing.assert_array_equal(wanted, got)


def test_kinds_that_the_data_lack_are_an_error(settings, tmp_path):
  lines = [say('how?')] * 5
  with pytest.raises(ValueError, match=r'none of the tokens .* is of a kind'):
    run(
      settings,
      tmp_path / 'run',
      keep=('tile',),
      keep_halves=('tile',),
      **write(tmp_path, settings, lines),
    )


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('keep', ('words',), r"capture\.keep: token kind 'words'"),
    ('keep_halves', ('text', 'text'), r"capture\.keep_halves names 'text'"),
    ('keep', ('tile:2',), 'must be above 0 and at most 1'),
    ('keep', (), r'capture\.keep is empty'),
    ('store', 'int4', r"capture\.store 'int4' is none of bfloat16, int8"),
    ('workers', 'slurm', r"capture\.workers 'slurm' is none of local, ray"),
    ('share', '3/3', r"capture\.share '3/3' is no i/n"),
    ('share', 'third', r"capture\.share 'third' is no i/n"),
    ('share', '-1/3', r"capture\.share '-1/3' is no i/n"),
    ('processes', -1, r'capture\.processes is -1'),
    ('ray_cpus', 0.0, 'must take something'),
    ('group', 0, r'capture\.group is 0'),
  ],
)
def test_a_setting_without_meaning_is_refused(
  settings, tmp_path, field, value, message
):
  with pytest.raises(ValueError, match=message):
    run(settings, tmp_path, **{field: value})
  assert not (tmp_path / 'acts').exists()


def test_a_store_of_other_settings_is_refused(settings, plain):
  root = plain['train'].path.url.rpartition('/acts/')[0]
  for field, value, message in (
    ('batch', 7, r'config\.capture\.batch: 8, now 7'),
    ('keep', ('text',), r'config\.capture\.keep'),
    ('store', 'int8', 'dtype'),
    ('mix', True, 'mix'),
  ):
    with pytest.raises(ValueError, match=message):
      run(settings, root, **{field: value})


def test_how_a_store_is_made_may_be_another_each_time(settings, plain):
  root = plain['train'].path.url.rpartition('/acts/')[0]
  before = captures.digest(Workdir.of(root))
  run(settings, root, processes=3, share='1/2', ray_gpus=2.0, lmm__threads=5)
  assert captures.digest(Workdir.of(root)) == before


def test_too_much_for_the_memory_is_told(settings, plain, caplog):
  from absl import logging

  root = plain['train'].path.url.rpartition('/acts/')[0]
  logging.get_absl_logger().addHandler(caplog.handler)
  try:
    with pytest.raises(ValueError, match='other settings'):
      run(settings, root, group=10**6, max_tokens=10**6)
  finally:
    logging.get_absl_logger().removeHandler(caplog.handler)
  assert 'lower capture.group' in caplog.text
