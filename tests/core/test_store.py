import dataclasses
import io
import json

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from lmm_sae.core import grid, records
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.tokens import Kind
from tests.core.store_cases import (
  GROUPS,
  META,
  create,
  digest,
  group,
  mixed,
)


def test_what_was_written_is_read_back(whole):
  read = ActivationStore.open(whole)
  assert read.meta == META
  assert read.ranges == [(0, 13), (24, 29), (72, 96), (96, 102)]
  assert read.num_rows == 48
  for each in GROUPS:
    start = each['group'] * 24
    stop = start + len(each['tokens']['sample'])
    if start == stop:
      continue
    for layer, rows in each['layers'].items():
      np.testing.assert_array_equal(read.read(layer, start, stop), rows)
    found = read.tokens(start, stop)
    for name, values in each['tokens'].items():
      assert found[name].dtype == grid.TOKENS[name][0]
      np.testing.assert_array_equal(found[name], values)


def test_samples_have_absolute_rows_and_keep_gaps(whole):
  read = ActivationStore.open(whole)
  spans = [(s.sample, s.group, s.start, s.stop) for s in read.samples()]
  assert spans == [
    (0, 0, 0, 7),
    (1, 0, 7, 13),
    (10, 1, 24, 29),
    (30, 3, 72, 96),
    (40, 4, 96, 97),
    (41, 4, 97, 99),
    (42, 4, 99, 102),
  ]
  assert read.sample(10).prompt == 'é <image>'
  assert [r['group'] for r in read.rejects()] == [1, 1, 4]
  with pytest.raises(KeyError):
    read.sample(2)


def test_the_manifest_counts_rows_by_kind(whole):
  lines = ActivationStore.open(whole).manifest
  for line, each in zip(lines, GROUPS, strict=True):
    kinds = np.array(each['tokens']['kind'])
    for name, count in line['kinds'].items():
      assert count == (kinds == Kind[name.upper()]).sum() > 0
    assert sum(line['kinds'].values()) == line['stop'] - line['start']


def test_rows_outside_the_committed_ranges_are_refused(whole):
  read = ActivationStore.open(whole)
  for start, stop in ((0, 14), (13, 24), (25, 30), (48, 48), (96, 95)):
    with pytest.raises(ValueError, match='committed range'):
      read.read(1, start, stop)
  with pytest.raises(ValueError, match=r'layer 2 .* holds'):
    read.read(2, 0, 3)


def test_float32_rows_are_rounded_to_bfloat16(tmp_path):
  made = create(tmp_path / 's')
  each = group(0)
  exact = {k: v.astype(np.float32) * 1.001 for k, v in each['layers'].items()}
  made.write_group(**{**each, 'layers': exact})
  np.testing.assert_array_equal(
    made.read(4, 0, 13), exact[4].astype(ml_dtypes.bfloat16)
  )


def test_unwritten_rows_cost_nothing(tmp_path):
  made = create(tmp_path / 's')
  made.write_group(**group(3, (2,)))
  files = [name for name in digest(tmp_path / 's') if '/c/' in name]
  assert sorted(files) == sorted(
    [f'layer_{layer}/c/6/0' for layer in (1, 4)]
    + [f'{name}/c/6' + '/0' * (name == 'box') for name in grid.TOKENS]
  )


def test_an_incomplete_store_is_refused_unless_asked_for(tmp_path):
  made = create(tmp_path / 's')
  made.write_group(**group(0))
  with pytest.raises(ValueError, match=r'1 of 5 groups.*capture. again'):
    ActivationStore.open(tmp_path / 's')
  partial = ActivationStore.open(tmp_path / 's', partial=True)
  assert partial.committed() == {0}
  assert not partial.complete
  with pytest.raises(ValueError, match='run `lmm-sae capture` first'):
    ActivationStore.open(tmp_path / 'nowhere')


def test_another_format_version_is_refused_naming_both(tmp_path):
  create(tmp_path / 's')
  path = tmp_path / 's' / 'meta.json'
  meta = json.loads(path.read_text())
  path.write_text(json.dumps(meta | {'format_version': 7}))
  for use in (create, ActivationStore.open):
    with pytest.raises(ValueError, match=r'format_version 7.*reads 2'):
      use(tmp_path / 's')


def test_other_settings_are_refused_naming_the_difference(tmp_path):
  create(tmp_path / 's')
  other = dataclasses.replace(META, config={'data': {'seed': 8}})
  with pytest.raises(ValueError, match=r'config.data.seed: 3, now 8'):
    create(tmp_path / 's', other)


def test_sizes_that_do_not_divide_are_refused(tmp_path):
  with pytest.raises(ValueError, match='no multiple of chunk_rows 5'):
    ActivationStore.create(tmp_path / 's', META, 1, 24, 12, 5)
  with pytest.raises(ValueError, match='no multiple of shard_rows 12'):
    ActivationStore.create(tmp_path / 's', META, 1, 25, 12, 4)
  assert not (tmp_path / 's').exists()


def test_wrong_groups_are_refused(tmp_path):
  made = create(tmp_path / 's')
  made.write_group(**group(0))
  for index in (5, -1):
    with pytest.raises(ValueError, match=f'group {index} is none of the 5'):
      made.write_group(**{**group(0), 'group': index})
  with pytest.raises(ValueError, match='25 rows do not fit a group of 24'):
    made.write_group(**group(1, (25,)))
  torn = group(1)
  torn['layers'][4] = torn['layers'][4][:, :5]
  with pytest.raises(ValueError, match=r'layer_4 has shape \(13, 5\)'):
    made.write_group(**torn)
  reader = ActivationStore.open(tmp_path / 's', partial=True)
  with pytest.raises(ValueError, match='open for reading'):
    reader.write_group(**group(1))


def test_mixed_rows_and_missing_tokens_are_refused_where_order_counts(tmp_path):
  made = create(tmp_path / 's', dataclasses.replace(META, mixed=True))
  made.write_group(**mixed(group(0)))
  with pytest.raises(ValueError, match=r'capture.mix=False'):
    made.span(made.sample(0))
  with pytest.raises(
    ValueError, match=r'sample 0 has rows \(0, 7\) in a mixed'
  ):
    made.write_group(**group(0) | {'group': 1})
  for split, field in (('train', 'keep'), ('a', 'keep_halves')):
    meta = dataclasses.replace(META, split=split)
    some = create(tmp_path / split, meta)
    each = group(0)
    part = dataclasses.replace(each['samples'][1], tokens=9)
    some.write_group(**each | {'samples': [each['samples'][0], part]})
    assert some.span(some.sample(0)) == (0, 7)
    with pytest.raises(ValueError, match=rf'6 of the 9 .*capture.{field}='):
      some.span(some.sample(1))


def test_images_and_regions_are_read_back(place, tmp_path):
  made = create(place)
  each = group(0)
  rng = np.random.default_rng(0)
  regions = rng.integers(0, 4, (5, 7)).astype(np.uint8)
  made.keep('r.png', png(Image.fromarray(regions)))
  made.keep('images/000001.png', png(Image.new('L', (4, 3), 9)))
  Image.new('CMYK', (7, 5), (255, 0, 0, 0)).save(tmp_path / 'far.jpg')
  truth = {'regions': 'r.png', 'concepts': {'1': ['red']}}
  first = dataclasses.replace(
    each['samples'][0],
    image=str(tmp_path / 'far.jpg'),
    truth=truth,
    more=(records.Picture('images/000001.png', 4, 3),),
  )
  made.write_group(**{**each, 'samples': [first, each['samples'][1]]})
  made.refresh()
  assert made.image(0).mode == 'RGB'
  assert made.image(0).size == (7, 5)
  assert made.image(0, 1).size == (4, 3)
  np.testing.assert_array_equal(made.regions(0), regions)
  with pytest.raises(ValueError, match='no image of sample 1'):
    made.image(1)
  with pytest.raises(ValueError, match='no image 2 of sample 0'):
    made.image(0, 2)
  with pytest.raises(ValueError, match='no regions of sample 1'):
    made.regions(1)
  with pytest.raises(ValueError, match='open for reading'):
    ActivationStore.open(place, partial=True).keep('x', b'')


def png(image: Image.Image) -> bytes:
  file = io.BytesIO()
  image.save(file, 'PNG')
  return file.getvalue()
