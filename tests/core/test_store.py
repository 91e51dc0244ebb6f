import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from lmm_sae.core import grid, records
from lmm_sae.core.store import ActivationStore, StoreMeta
from lmm_sae.core.tokens import Kind

META = StoreMeta(
  split='train',
  model='toy',
  fingerprint='f00',
  layers=(1, 4),
  layer_paths={'1': 'model.layers.1', '4': 'model.layers.4'},
  width=6,
  grid=(2, 3),
  image_backend='pil',
  config={'data': {'seed': 3}},
)
SIZES = {'groups': 5, 'group_rows': 24, 'shard_rows': 12, 'chunk_rows': 4}


def create(path, meta=META):
  return ActivationStore.create(path, meta, **SIZES)


def group(index, lengths=(7, 6), rejects=0, seed=0):
  """Arguments of write_group for samples of the given lengths."""
  rng = np.random.default_rng([seed, index])
  count = sum(lengths)
  layers = {
    layer: rng.normal(size=(count, 6)).astype(ml_dtypes.bfloat16)
    for layer in (1, 4)
  }
  ids = [10 * index + at for at in range(len(lengths))]
  tokens = {
    'sample': np.repeat(ids, lengths).astype(np.int32),
    'position': np.concatenate([np.arange(n) for n in lengths] or [[]]),
    'token': rng.integers(0, 500, count),
    'kind': rng.integers(0, 7, count),
    'row': rng.integers(-1, 9, count),
    'col': rng.integers(-1, 9, count),
    'image': rng.integers(-1, 3, count),
    'box': rng.integers(0, 128, (count, 4)),
  }
  stops = np.cumsum(lengths)
  samples = [
    records.Sample(
      sample=i,
      group=-1,
      source=f'row {i}',
      image='',
      width=0,
      height=0,
      prompt='é <image>',
      turns=(records.Turn('colour', 'which?', 'red', 'red'),),
      start=int(stop - n),
      stop=int(stop),
    )
    for i, n, stop in zip(ids, lengths, stops, strict=True)
  ]
  bad = [{'source': f'bad {i}', 'reason': 'torn'} for i in range(rejects)]
  return {
    'group': index,
    'layers': layers,
    'tokens': tokens,
    'samples': samples,
    'rejects': bad,
  }


GROUPS = [
  group(0),
  group(1, (5,), rejects=2),
  group(2, ()),
  group(3, (24,)),
  group(4, (1, 2, 3), rejects=1),
]


def digest(path):
  """{relative path: sha256} of every file under a folder."""
  return {
    str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted(pathlib.Path(path).rglob('*'))
    if file.is_file()
  }


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  path = tmp_path_factory.mktemp('whole') / 'train'
  made = create(path)
  for each in GROUPS:
    made.write_group(**each)
  made.seal()
  return path


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


def test_what_a_killed_writer_left_is_replaced(whole, tmp_path):
  made = create(tmp_path / 's')
  made.write_group(**GROUPS[0])
  made.write_group(**group(2, (9, 9), rejects=3, seed=1))
  (tmp_path / 's' / 'groups' / '000002.json').unlink()
  again = create(tmp_path / 's')
  assert again.committed() == {0}
  for each in GROUPS[1:]:
    again.write_group(**each)
  again.seal()
  assert digest(tmp_path / 's') == digest(whole)


def test_a_corrupt_chunk_is_an_error(tmp_path):
  made = create(tmp_path / 's')
  made.write_group(**GROUPS[0])
  shard = tmp_path / 's' / 'layer_4' / 'c' / '0' / '0'
  data = bytearray(shard.read_bytes())
  data[0] ^= 1
  shard.write_bytes(data)
  with pytest.raises(ValueError, match=r'layer_4/c/0/0 is damaged \(Digest'):
    ActivationStore.open(tmp_path / 's', partial=True).read(4, 0, 13)


@pytest.mark.parametrize('writes', [1, 2, 12, 22, 66, 67, 68, 69])
def test_a_killed_writer_resumes_byte_for_byte(whole, tmp_path, writes):
  script = textwrap.dedent(
    f"""
    import os, signal, sys
    sys.path[:0] = [{str(pathlib.Path(__file__).parent)!r}]
    import test_store
    from lmm_sae.core.places import Place
    left = {writes}
    def counted(method):
      def inner(*args):
        global left
        left -= 1
        if left == 0:
          os.kill(os.getpid(), signal.SIGKILL)
        return method(*args)
      return inner
    Place.write = counted(Place.write)
    made = test_store.create(sys.argv[1])
    for each in test_store.GROUPS:
      if each['group'] not in made.committed():
        made.write_group(**each)
    made.seal()
    """
  )
  path = tmp_path / 's'
  root = pathlib.Path(__file__).parents[2]
  done = subprocess.run(
    [sys.executable, '-c', script, str(path)],
    cwd=root,
    env={**os.environ, 'PYTHONPATH': str(root)},
    check=False,
    capture_output=True,
  )
  assert done.returncode == -signal.SIGKILL, done.stderr.decode()
  made = create(path)
  for each in GROUPS:
    if each['group'] not in made.committed():
      made.write_group(**each)
  made.seal()
  assert digest(path) == digest(whole)


def test_images_and_regions_are_read_back(tmp_path):
  made = create(tmp_path / 's')
  each = group(0)
  rng = np.random.default_rng(0)
  regions = rng.integers(0, 4, (5, 7)).astype(np.uint8)
  Image.fromarray(regions).save(tmp_path / 's' / 'r.png')
  Image.new('CMYK', (7, 5), (255, 0, 0, 0)).save(tmp_path / 'far.jpg')
  truth = {'regions': 'r.png', 'concepts': {'1': ['red']}}
  first = dataclasses.replace(
    each['samples'][0], image=str(tmp_path / 'far.jpg'), truth=truth
  )
  made.write_group(**{**each, 'samples': [first, each['samples'][1]]})
  assert made.image(0).mode == 'RGB'
  assert made.image(0).size == (7, 5)
  np.testing.assert_array_equal(made.regions(0), regions)
  with pytest.raises(ValueError, match='no image of sample 1'):
    made.image(1)
  with pytest.raises(ValueError, match='no regions of sample 1'):
    made.regions(1)
