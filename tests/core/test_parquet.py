"""Local parquet: every row in its place, and little read for it."""

import collections
import concurrent.futures
import pickle

import numpy as np
import pyarrow as pa
import pytest
from huggingface_hub import errors

from lmm_sae.core import parquet, remote_files, sources
from lmm_sae.core.parquet import ParquetFiles
from lmm_sae.core.sources import DataConfig
from tests.core import parquet_files


@pytest.fixture
def folder(tmp_path):
  """12 rows in two files of row groups of 3, and one of a test split."""
  rows = [parquet_files.row(at) for at in range(12)]
  for name, part in (
    ('train-00000-of-00002', rows[:7]),
    ('train-00001-of-00002', rows[7:]),
    ('test-00000-of-00001', rows[:2]),
  ):
    data = parquet_files.data(part, 3)
    (tmp_path / f'{name}.parquet').write_bytes(data)
  return tmp_path


def opened(path, **fields):
  return sources.open_source(DataConfig('hub', str(path), **fields))


@pytest.mark.parametrize('stream', [False, True])
def test_a_folder_is_read_in_row_groups(folder, stream):
  source = opened(folder, stream=stream)
  assert isinstance(source, ParquetFiles)
  assert len(source) == 12
  assert source.blocks == [0, 3, 6, 7, 10]
  for at in np.random.default_rng(0).permutation(12).tolist():
    item = source[at]
    assert item.source == f'n{at}'
    assert item.images[0].image.size == (at + 1, 2)
    assert item.images[0].path == ''
    assert item.turns[0].answer == f'it is {at}'
  assert len(opened(folder, split='test', stream=stream)) == 2


def test_a_file_is_the_split_train(folder):
  path = folder / 'train-00001-of-00002.parquet'
  assert opened(path)[0].source == 'n7'
  with pytest.raises(ValueError, match=r"data\.split 'test' is not .*: train"):
    opened(path, split='test')
  with pytest.raises(ValueError, match=r"data\.subset 'b' is not .*: none"):
    opened(path, subset='b')


def test_what_is_not_there_is_refused_with_what_is(folder):
  with pytest.raises(ValueError, match=r"data\.split 'val' .*: train, test"):
    opened(folder, split='val')
  with pytest.raises(ValueError, match=r"'other' not found.*'default'"):
    opened(folder, subset='other')
  (folder / 'empty').mkdir()
  with pytest.raises(ValueError, match='cannot be had'):
    opened(folder / 'empty')
  (folder / 'no.parquet').write_bytes(b'PAR1 no')
  with pytest.raises(ValueError, match=r'no\.parquet is no parquet file'):
    opened(folder / 'no.parquet')
  (folder / 'a.json').write_text('[]')
  with pytest.raises(ValueError, match=r'is data\.source=llava'):
    opened(folder / 'a.json')
  with pytest.raises(ValueError, match=r'data\.path is empty'):
    opened('')


def test_only_the_columns_of_rows_are_read_and_two_groups_held(folder):
  source = opened(folder)
  for at in range(12):
    source[at]
  assert len(source._held) == parquet.KEPT
  tables = list(source._held.values())
  assert set(tables[0].column_names) == {'id', 'image', 'conversations'}
  assert [table.num_rows for table in tables] == [3, 2]
  again = pickle.loads(pickle.dumps(source))
  assert not again._held
  assert again[5].source == 'n5'


def test_rows_that_are_bad_move_no_other(tmp_path):
  rows = [parquet_files.row(at) for at in range(6)]
  rows[1]['image']['bytes'] = rows[1]['image']['bytes'][:50]
  rows[2]['conversations'] = None
  rows[3]['image'] = None
  rows[4]['image'] = {'bytes': None, 'path': '../x.png'}
  (tmp_path / 'a.parquet').write_bytes(parquet_files.data(rows, 4))
  source = opened(tmp_path / 'a.parquet')
  for at, reason in (
    (1, 'cannot be read'),
    (2, 'no conversations'),
    (3, '1 <image> for 0'),
    (4, 'lies outside'),
  ):
    with pytest.raises(ValueError, match=reason):
      source[at]
  assert (source[0].source, source[5].source) == ('n0', 'n5')
  assert source.name(4) == 'row 4'


def test_a_broken_row_group_moves_no_other(folder):
  path = folder / 'train-00000-of-00002.parquet'
  data = bytearray(path.read_bytes())
  data[20:400] = bytes(380)  # of the first row group's pages
  path.write_bytes(data)
  source = opened(path)
  for at in range(3):
    with pytest.raises(ValueError, match=r'row group 0 of .* is broken'):
      source[at]
  assert source[3].source == 'n3'


def test_spoilt_files_are_refused_or_have_rows_and_reasons(folder):
  whole = (folder / 'test-00000-of-00001.parquet').read_bytes()
  path = folder / 'spoilt.parquet'
  rng = np.random.default_rng(5)
  outcomes = collections.Counter()
  for _ in range(150):
    data = bytearray(whole)
    for at in rng.integers(1, len(data), 3):
      data[-at] = rng.choice([0, 1, 127, 255])
    path.write_bytes(data)
    try:
      source = opened(path)
    except ValueError:
      outcomes['refused'] += 1
      continue
    for at in range(min(len(source), 5)):
      try:
        outcomes[source[at].source] += 1
      except ValueError:
        outcomes['rejected'] += 1
  assert {'refused', 'rejected', 'n0', 'n1'} <= set(outcomes)


def test_a_file_that_is_gone_stops_the_run(folder):
  source = opened(folder / 'train-00000-of-00002.parquet')
  (folder / 'train-00000-of-00002.parquet').unlink()
  with pytest.raises(OSError, match=r'cannot be read: .*No such file'):
    source[0]


def test_files_of_other_columns_are_refused(folder):
  data = parquet_files.data([{'id': 'a', 'image': None}], 1)
  (folder / 'train-00001-of-00002.parquet').write_bytes(data)
  with pytest.raises(ValueError, match='no column conversations, which'):
    opened(folder)


@pytest.mark.parametrize('column', ['conversations', 'image'])
def test_files_of_more_columns_than_the_first_are_refused(folder, column):
  row = parquet_files.row(0)
  del row[column]
  first = folder / 'train-00000-of-00002.parquet'
  first.write_bytes(parquet_files.data([row], 1))
  with pytest.raises(ValueError, match=f'00000-.* has no column {column}, wh'):
    opened(folder)


def test_content_tells_files_apart_wherever_they_lie(tmp_path):
  found = []
  for at, rows in enumerate(([0, 1], [0, 1], [0, 22])):
    (tmp_path / f'{at}').mkdir()
    (tmp_path / f'{at}' / 'x.parquet').write_bytes(
      parquet_files.data([parquet_files.row(row) for row in rows], 1)
    )
    found.append(opened(tmp_path / f'{at}').content)
  assert found[0] == found[1] != found[2]


HUGGINGFACE = (
  b'{"info": {"features": {"pic": {"_type": "Image"}, "z": {"dtype": "x"}}}}'
)


@pytest.mark.parametrize(
  ('name', 'value', 'schema'),
  [
    ('image', {'bytes': parquet_files.png(3), 'path': None}, None),
    ('images', [{'bytes': parquet_files.png(3)}], None),
    ('jpg', {'bytes': parquet_files.png(3), 'path': None}, None),
    ('content', parquet_files.png(3), None),
    ('shots', [parquet_files.png(3)], None),
    (
      'pic',
      {'path': 'x.png'},
      pa.schema(
        [('a', 'int64'), ('pic', pa.struct([('path', 'string')]))],
        {b'huggingface': HUGGINGFACE},
      ),
    ),
  ],
)
def test_data_of_images_alone_have_bare_prompts(tmp_path, name, value, schema):
  rows = [{'a': 1, 'id': 7, name: value, 'text': 'a caption'}]
  rows.append({'a': 2, 'id': 8, name: None, 'text': ''})
  (tmp_path / 'x.png').write_bytes(parquet_files.png(3))
  data = parquet_files.data(rows, 1, **({'schema': schema} if schema else {}))
  (tmp_path / 'a.parquet').write_bytes(data)
  source = opened(tmp_path / 'a.parquet')
  item = source[0]
  assert item.conversation == ()
  assert item.source == ('0' if schema else '7')
  assert item.images[0].image.size == (4, 2)
  with pytest.raises(ValueError, match='neither conversations nor an image'):
    source[1]


def test_data_of_texts_are_raw(tmp_path):
  data = parquet_files.data([{'text': 'a'}, {'text': 'b'}], 2)
  (tmp_path / 'a.parquet').write_bytes(data)
  item = opened(tmp_path / 'a.parquet')[1]
  assert (item.raw, item.conversation) == (True, (('user', 'b'),))


def test_data_of_neither_are_refused(tmp_path):
  data = parquet_files.data([{'label': 3, 'name': 'x'}], 1)
  (tmp_path / 'a.parquet').write_bytes(data)
  with pytest.raises(ValueError, match='their columns are label, name'):
    opened(tmp_path / 'a.parquet')


def test_large_row_groups_go_through_datasets(
  folder, tmp_path_factory, monkeypatch
):
  import datasets

  cache = tmp_path_factory.mktemp('cache')
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', cache)
  monkeypatch.setattr(parquet, 'MAX_GROUP', 500)
  source = opened(folder)
  assert source.blocks is None
  assert len(source) == 12
  assert source[11].source == 'n11'
  assert source[11].images[0].image.size == (12, 2)
  assert opened(folder / 'test-00000-of-00001.parquet')[1].source == 'n1'
  for path, split in (
    (folder, 'test'),
    (folder / 'test-00000-of-00001.parquet', 'train'),
  ):
    with pytest.raises(ValueError, match=r'set data\.stream=False'):
      opened(path, split=split, stream=True)


def test_what_datasets_saved_is_read(tmp_path):
  import datasets

  rows = datasets.Dataset.from_list([parquet_files.row(at) for at in range(4)])
  rows = rows.cast_column('image', datasets.Image())
  rows.save_to_disk(tmp_path / 'one')
  datasets.DatasetDict(val=rows).save_to_disk(tmp_path / 'parts')
  assert opened(tmp_path / 'one')[3].images[0].image.size == (4, 2)
  source = opened(tmp_path / 'parts', split='val')
  assert [source[at].source for at in range(4)] == ['n0', 'n1', 'n2', 'n3']
  again = pickle.loads(pickle.dumps(source))
  assert again[2].conversation == source[2].conversation
  with pytest.raises(ValueError, match=r"'train' is not .*: val"):
    opened(tmp_path / 'parts')
  with pytest.raises(ValueError, match='was written by save_to_disk'):
    opened(tmp_path / 'one', stream=True)


@pytest.fixture
def waits(monkeypatch):
  found = []
  monkeypatch.setattr(remote_files.time, 'sleep', found.append)
  return found


def failing(*errors):
  """A read that raises these, one a call, and then returns 'read'."""
  left = list(errors)

  def read():
    if left:
      raise left.pop(0)
    return 'read'

  return read


def test_networks_are_asked_again_and_again(waits):
  errors = [ConnectionError('gone'), TimeoutError('slow'), OSError(5, 'no')]
  assert remote_files.patiently('hf://a', failing(*errors)) == 'read'
  assert waits == [1, 5, 15]
  with pytest.raises(ConnectionError, match=r'gone\. When it is back'):
    remote_files.patiently('hf://a', failing(*[ConnectionError('gone')] * 7))
  assert waits[3:] == list(remote_files.WAITS_S)


def test_what_cannot_pass_is_not_asked_again(waits):
  with pytest.raises(OSError, match='cannot be read'):
    remote_files.patiently('hf://a', failing(FileNotFoundError('no')))
  with pytest.raises(OSError, match='cannot be read'):
    remote_files.patiently('/a', failing(OSError(5, 'disk')))
  with pytest.raises(ValueError, match='spoilt'):
    remote_files.patiently('/a', failing(ValueError('spoilt')))
  twice = [OSError('spoilt'), ValueError('spoilt')]
  with pytest.raises(ValueError, match='spoilt'):
    remote_files.patiently('hf://a', failing(*twice))
  assert remote_files.patiently('hf://a', failing(*twice[:1])) == 'read'
  assert not waits


def test_many_threads_may_read_a_source(folder):
  source = opened(folder)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    found = list(pool.map(lambda at: source[at].source, [*range(12)] * 9))
  assert found == [f'n{at}' for at in range(12)] * 9


class _Refused(errors.HfHubHTTPError, ValueError):
  """A client's error that is a ValueError by accident."""

  def __init__(self):
    ValueError.__init__(self, 'refused')
    self.response = None


def test_what_a_hub_says_is_never_the_row_s_fault(waits):
  with pytest.raises(ConnectionError, match='refused'):
    remote_files.patiently('hf://a', failing(*[_Refused()] * 7))
