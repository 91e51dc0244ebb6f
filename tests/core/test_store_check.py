"""Damage is found, named, dropped, and nothing else."""

import dataclasses
import json

import numpy as np
import pytest

from lmm_sae.core import records, store_check
from lmm_sae.core.places import Place
from lmm_sae.core.store import ActivationStore
from tests.core.store_cases import (
  GROUPS,
  META,
  create,
  digest,
  finish,
  group,
  mixed,
)


def found(path, checksums=True) -> list[tuple[int | None, str]]:
  """(group, file below the store) of what is wrong."""
  place = Place.of(path)
  report = store_check.check(place, checksums)
  return [
    (damage.group, str(damage.file).removeprefix(f'{place}/'))
    for damage in report.damage
  ]


def change(path, name, **fields):
  """Changes fields of the first line of a JSON-lines file."""
  file = Place.of(path) / name
  first, *rest = file.read().splitlines()
  first = json.dumps(json.loads(first) | fields, ensure_ascii=False).encode()
  file.write(b'\n'.join([first, *rest, b'']))


def test_a_whole_store_has_no_damage(place):
  made = create(place)
  for each in GROUPS[:3]:
    made.write_group(**each)
  report = store_check.check(place, checksums=True)
  assert (report.damage, report.notes) == ((), ())
  assert (report.groups, report.committed, report.rows) == (5, 3, 18)
  finish(place)
  report = store_check.check(place, checksums=True)
  assert (report.damage, report.notes, report.committed) == ((), (), 5)
  files = [x for x in place.list() if '/c/' in x]
  assert report.bytes == sum(len((place / x).read()) for x in files)


def test_a_mixed_int8_store_has_no_damage(tmp_path):
  meta = dataclasses.replace(META, mixed=True, dtype='int8')
  made = create(tmp_path / 's', meta)
  rng = np.random.default_rng(0)
  for each in GROUPS:
    order = rng.permutation(len(each['tokens']['kind']))
    tokens = {name: field[order] for name, field in each['tokens'].items()}
    made.write_group(**mixed(each) | {'tokens': tokens})
  made.seal()
  assert found(tmp_path / 's') == []


@pytest.mark.parametrize('sealed', [True, False])
@pytest.mark.parametrize(
  ('harm', 'checksums'),
  [('flip', True), ('cut', False), ('gone', False), ('longer', False)],
)
def test_a_damaged_shard_costs_its_group(
  whole, tmp_path, sealed, harm, checksums
):
  path = tmp_path / 's'
  made = create(path)
  for each in GROUPS:
    made.write_group(**each)
  if sealed:
    made.seal()
  shard = path / 'layer_4/c/7/0'
  data = shard.read_bytes()
  if harm == 'gone':
    shard.unlink()
  else:
    flipped = bytes([data[0] ^ 4]) + data[1:]
    changed = {'flip': flipped, 'cut': data[:-1], 'longer': data + b'x'}
    shard.write_bytes(changed[harm])
  before = digest(path)
  if harm == 'flip':
    assert found(path, checksums=False) == []
  assert found(path, checksums) == [(3, 'layer_4/c/7/0')]
  assert digest(path) == before
  store_check.drop(Place.of(path), store_check.check(Place.of(path), checksums))
  assert found(path) == []
  left = ActivationStore.open(path, partial=True)
  assert left.committed() == {0, 1, 2, 4}
  assert [s.sample for s in left.samples()] == [0, 1, 10, 40, 41, 42]
  after = digest(path)
  gone = {name for name in before if name not in after}
  shards = {x for x in before if '/c/6' in x or '/c/7' in x}
  assert shards <= gone | {'layer_4/c/7/0'}
  assert gone - shards == (set() if sealed else {'groups/000003.json'})
  finish(path)
  assert digest(path) == digest(whole)


def test_a_damaged_shard_in_a_bucket_costs_its_group(whole, s3):
  finish(s3)
  place = Place.of(s3)
  data = (place / 'kind/c/0').read()
  (place / 'kind/c/0').write(data[:-1])
  (place / 'box/c/2/0').delete()
  assert found(place, checksums=False) == [(0, 'kind/c/0'), (1, 'box/c/2/0')]
  assert found(place) == [(0, 'kind/c/0'), (1, 'box/c/2/0')]
  store_check.drop(place, store_check.check(place, checksums=False))
  assert ActivationStore.open(place, partial=True).committed() == {2, 3, 4}
  finish(place)
  assert digest(place) == digest(whole)


def cut_line(place, name):
  file = place / f'{name}.jsonl'
  lines = file.read().splitlines(keepends=True)
  file.write(b''.join([lines[0][:9] + b'\n', *lines[1:]]))


@pytest.mark.parametrize(
  ('harm', 'groups'),
  [
    (lambda place: cut_line(place, 'manifest'), {1, 2, 3, 4}),
    (lambda place: cut_line(place, 'samples'), {1, 2, 3, 4}),
    (lambda place: cut_line(place, 'rejects'), {0, 2, 3, 4}),
    (lambda place: (place / 'samples.jsonl').write(b''), {2}),
    (lambda place: (place / 'samples.jsonl').delete(), {2}),
    (lambda place: change(place, 'samples.jsonl', stop=8), {1, 2, 3, 4}),
    (lambda place: change(place, 'samples.jsonl', sample=40), {1, 2, 3}),
    (lambda place: change(place, 'samples.jsonl', group=[]), {1, 2, 3, 4}),
    (lambda place: change(place, 'manifest.jsonl', kinds={}), {1, 2, 3, 4}),
    (lambda place: change(place, 'manifest.jsonl', start='0'), {1, 2, 3, 4}),
    (lambda place: change(place, 'manifest.jsonl', bytes={}), {1, 2, 3, 4}),
    (lambda place: change(place, 'manifest.jsonl', group=-3), {1, 2, 3, 4}),
    (lambda place: (place / 'sample/zarr.json').write(b'{}'), {0, 1, 2, 3, 4}),
    (lambda place: (place / 'box/zarr.json').delete(), {0, 1, 2, 3, 4}),
  ],
)
def test_damaged_records_cost_their_groups(whole, tmp_path, harm, groups):
  finish(tmp_path / 's')
  place = Place.of(tmp_path / 's')
  harm(place)
  report = store_check.check(place, checksums=True)
  assert report.damage
  store_check.drop(place, report)
  assert found(place) == []
  left = ActivationStore.open(place, partial=True)
  assert left.committed() == groups
  finish(place)
  assert digest(place) == digest(whole)


@pytest.mark.parametrize(
  ('data', 'said'),
  [
    (None, 'missing'),
    (b'["a"', 'damaged'),
    (b'["a", 1]', 'no list of strings'),
  ],
)
def test_a_damaged_vocabulary_costs_no_group(whole, tmp_path, data, said):
  finish(tmp_path / 's')
  place = Place.of(tmp_path / 's')
  (place / 'vocab.json').delete()
  if data is not None:
    (place / 'vocab.json').write(data)
  report = store_check.check(place, checksums=False)
  (damage,) = report.damage
  assert (damage.file, damage.group) == (place / 'vocab.json', None)
  assert said in damage.text
  store_check.drop(place, report)
  assert not (place / 'vocab.json').exists()
  finish(place)
  assert digest(place) == digest(whole)


def test_a_torn_commit_is_dropped(whole, tmp_path):
  made = create(tmp_path / 's')
  for each in GROUPS:
    made.write_group(**each)
  place = Place.of(tmp_path / 's')
  for group_, data in ((1, b'{"manifest": {'), (4, b'[]')):
    (place / f'groups/{group_:06d}.json').write(data)
  with pytest.raises(ValueError, match=r'000001.json is damaged.*doctor.drop'):
    made.refresh() or ActivationStore.open(place).ranges
  assert found(place) == [(1, 'groups/000001.json'), (4, 'groups/000004.json')]
  store_check.drop(place, store_check.check(place, checksums=True))
  finish(place)
  assert digest(place) == digest(whole)


def test_rows_that_contradict_their_samples_are_damage(tmp_path):
  first = group(0)
  for name, at, value in (
    ('sample', 2, 1),  # a row of another sample, out of order
    ('sample', 2, 30),  # of another group
    ('position', 3, 2),  # a token twice
    ('position', 3, 77),  # past the end
  ):
    each = group(0)
    each['tokens'][name][at] = value
    each['samples'] = [
      dataclasses.replace(s, tokens=s.stop - s.start) for s in first['samples']
    ]
    path = tmp_path / f'{name}{value}'
    create(path).write_group(**each)
    assert {group_ for group_, _ in found(path)} == {0}
    assert found(path, checksums=False) == []


def test_a_kept_picture_that_is_gone_costs_its_group(place):
  each = group(1, (5,))
  sample = dataclasses.replace(
    each['samples'][0],
    image='images/000010.png',
    truth={'regions': 'images/000010.regions.png', 'concepts': {}},
    more=(
      records.Picture('images/000010.1.png', 3, 2),
      records.Picture('/far/away.jpg', 3, 2),
    ),
  )
  made = create(place)
  made.write_group(**group(0))
  made.write_group(**each | {'samples': [sample]})
  names = ['images/000010.png', 'images/000010.regions.png']
  for name in (*names, 'images/000010.1.png'):
    made.keep(name, b'png')
  assert found(place) == []
  for name in names:
    (place / name).delete()
  assert found(place, checksums=False) == [(1, name) for name in names]


def test_what_is_harmless_is_no_damage(place, whole):
  made = create(place)
  made.write_group(**GROUPS[0])
  stray = (place / 'groups/000000.json').read()
  made.write_group(**GROUPS[3])
  (place / 'groups/000003.json').delete()
  report = store_check.check(place, checksums=True)
  assert (report.damage, len(report.notes)) == ((), 1)
  assert '2 shards of no committed group' in report.notes[0]
  finish(place)
  (place / 'groups/000000.json').write(stray)
  report = store_check.check(place, checksums=True)
  assert (report.damage, len(report.notes)) == ((), 1)
  assert '1 commits that are sealed' in report.notes[0]
  create(place).seal()
  assert digest(place) == digest(whole)


def test_a_store_without_a_meta_that_is_known_cannot_be_checked(tmp_path):
  create(tmp_path / 's')
  (tmp_path / 's/meta.json').write_text('{"format_version": 1}')
  with pytest.raises(ValueError, match=r'format_version 1.*reads 2'):
    found(tmp_path / 's')
  (tmp_path / 's/meta.json').write_text('{"format')
  with pytest.raises(ValueError, match=r'delete that folder and capture again'):
    found(tmp_path / 's')
