"""Data sets of a hub on loopback, read by a process that knows only it."""

import concurrent.futures
import multiprocessing
import os
import sys
import time
from unittest import mock

import pytest

from lmm_sae.core import remote_files, sources
from lmm_sae.core.sources import DataConfig
from tests.core import data_hub, parquet_files

CARD = b"""---
configs:
- config_name: first
  default: true
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
- config_name: second
  data_files:
  - {split: train, path: more/*}
---
"""


@pytest.fixture(scope='module')
def hub():
  """20 rows in two files, row groups of 4; another subset has 3."""
  with data_hub.serve() as served:
    rows = [parquet_files.row(at) for at in range(23)]
    served.repos['owner/data'] = {
      'README.md': CARD,
      'data/train-00000-of-00002.parquet': parquet_files.data(rows[:9], 4),
      'data/train-00001-of-00002.parquet': parquet_files.data(rows[9:20], 4),
      'data/test-00000-of-00001.parquet': parquet_files.data(rows[:5], 4),
      'more/x.parquet': parquet_files.data(rows[20:], 4),
    }
    served.repos['owner/lines'] = {
      'train.jsonl': b'{"text": "a"}\n{"text": "b"}\n'
    }
    served.repos['owner/private'] = {
      'train.parquet': parquet_files.data(rows[:1], 4)
    }
    served.private.add('owner/private')
    served.repos['owner/gated'] = {}
    served.gated.add('owner/gated')
    yield served


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  return tmp_path_factory.mktemp('home')


@pytest.fixture(scope='module')
def process(hub, home):
  """Calls a function in a process of that hub; what it raises is raised."""
  with pytest.MonkeyPatch.context() as patch:
    for name, value in hub.environment(home).items():
      patch.setenv(name, value)
    pool = concurrent.futures.ProcessPoolExecutor(
      1, multiprocessing.get_context('spawn'), _start
    )
    with pool:
      yield lambda function, *args: pool.submit(function, *args).result()


def _start():
  time.sleep = lambda _: None  # what the clients wait between attempts


def _read(fields, rows=None):
  """(blocks, {row: id and width of its picture, or why it has none})."""
  source = sources.open_source(DataConfig('hub', **fields))
  found = {}
  for at in range(len(source)) if rows is None else rows:
    try:
      item = source[at]
    except ValueError as error:
      found[at] = str(error)
    else:
      width = item.images[0].image.width if item.images else 0
      found[at] = (item.source, width)
  return source.blocks, found


STREAM = {'path': 'owner/data', 'stream': True}


def test_a_stream_has_every_row_and_keeps_no_file(process, hub, home):
  blocks, found = process(_read, STREAM)
  assert blocks == [0, 4, 8, 9, 13, 17]
  assert found == {at: (f'n{at}', at + 1) for at in range(20)}
  kept = [file for file in home.rglob('*') if file.is_file()]
  assert not [file for file in kept if file.stat().st_size > 2000]


def test_a_row_is_had_for_its_row_group_alone(process, hub):
  hub.sent.clear()
  _, found = process(_read, STREAM, [14, 13, 16])
  assert list(found.values()) == [('n14', 15), ('n13', 14), ('n16', 17)]
  footers, rows = hub.sent[:2], hub.sent[2:]
  assert {name for name, _ in footers} == {
    'data/train-00000-of-00002.parquet',
    'data/train-00001-of-00002.parquet',
  }
  assert {name for name, _ in rows} == {'data/train-00001-of-00002.parquet'}
  whole = len(hub.repos['owner/data']['data/train-00001-of-00002.parquet'])
  assert sum(size for _, size in rows) < whole / 2


@pytest.mark.parametrize(('failing', 'short'), [(2, 0), (0, 9), (40, 0)])
def test_a_network_that_fails_a_while_costs_no_row(
  process, hub, failing, short
):
  hub.failing, hub.short = failing, short
  _, found = process(_read, STREAM, [5, 15])
  assert found == {5: ('n5', 6), 15: ('n15', 16)}
  assert (hub.failing, hub.short) == (0, 0)


def _read_while_failing(fields, url):
  """The message of the error that reading ends with."""
  source = sources.open_source(DataConfig('hub', **fields))
  from huggingface_hub import HfFileSystem

  remote_files.logging.set_verbosity('fatal')
  kept = HfFileSystem.url
  HfFileSystem.url = lambda self, path: url
  try:
    source[0]
  except OSError as error:
    return type(error).__name__, str(error)
  finally:
    HfFileSystem.url = kept
  return None


def test_a_network_that_is_gone_stops_the_run(process):
  # nothing listens on port 9
  name, message = process(
    _read_while_failing, STREAM, 'http://127.0.0.1:9/data'
  )
  assert name == 'ConnectionError'
  assert 'cannot be read over the network' in message
  assert 'run the same command again' in message


@pytest.mark.parametrize('stream', [False, True])
def test_the_token_opens_what_is_private(process, stream):
  fields = {'path': 'owner/private', 'stream': stream}
  assert process(_read, fields)[1] == {0: ('n0', 1)}


@pytest.mark.parametrize('stream', [False, True])
def test_subsets_and_splits_are_chosen(process, stream):
  fields = {'path': 'owner/data', 'stream': stream}
  _, found = process(_read, fields | {'split': 'test'})
  assert found == {at: (f'n{at}', at + 1) for at in range(5)}
  _, found = process(_read, fields | {'subset': 'second'})
  assert found == {at: (f'n{at + 20}', at + 21) for at in range(3)}


def test_without_stream_the_files_are_kept(process):
  blocks, found = process(_read, {'path': 'owner/data'})
  assert blocks is None
  assert found == {at: (f'n{at}', at + 1) for at in range(20)}


def _read_offline(*kinds):
  """What `_read` gives, or raises, in a process that may ask no hub."""
  context = multiprocessing.get_context('spawn')
  with (
    mock.patch.dict(os.environ, {'HF_HUB_OFFLINE': '1'}),
    concurrent.futures.ProcessPoolExecutor(1, context) as pool,
  ):
    found = [pool.submit(_read, fields) for fields in kinds]
    return [each.exception() or each.result() for each in found]


def test_what_was_downloaded_is_read_without_a_hub(process):
  fields = {'path': 'owner/data', 'subset': 'first'}
  online = process(_read, fields)
  offline, split, stream = process(
    _read_offline, fields, fields | {'split': 'val'}, fields | {'stream': True}
  )
  assert offline == online
  assert isinstance(split, ValueError)
  assert "'val' is not in the data; there: train, test" in str(split)
  assert isinstance(stream, ConnectionError)
  assert 'cannot be streamed: the hub is not reached' in str(stream)


def test_what_is_no_parquet_is_converted_and_not_streamed(process):
  _, found = process(_read, {'path': 'owner/lines'})
  assert found == {0: ('0', 0), 1: ('1', 0)}
  with pytest.raises(ValueError, match=r'set data\.stream=False'):
    process(_read, {'path': 'owner/lines', 'stream': True})


def test_a_revision_may_be_named(process, hub):
  commit = hub.commit('owner/data')
  _, found = process(_read, STREAM | {'path': f'owner/data@{commit}'}, [0])
  assert found == {0: ('n0', 1)}
  with pytest.raises(ValueError, match="Revision 'v9' doesn't exist"):
    process(_read, STREAM | {'path': 'owner/data@v9'})


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'path': 'owner/none'}, "owner/none cannot be had: .*doesn't exist"),
    ({'path': 'owner/gated'}, 'owner/gated cannot be had: .*gated'),
    (
      {'path': 'owner/data', 'subset': 'third'},
      r"third.*\['first', 'second'\]",
    ),
    ({'path': 'owner/data', 'split': 'val'}, "'val' is not .*: train, test"),
    ({'path': 'no repo at all'}, 'no repo at all cannot be had'),
  ],
)
def test_what_is_not_there_is_refused(process, fields, message):
  with pytest.raises(ValueError, match=message):
    process(_read, fields | {'stream': True})


def test_the_package_may_be_missing(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'datasets', None)
  for path in ('owner/data', str(tmp_path)):
    with pytest.raises(ValueError, match=r"pip install 'lmm_sae\[data\]'"):
      sources.open_source(DataConfig('hub', path))
