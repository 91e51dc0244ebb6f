import errno
import os
import subprocess
import sys
import textwrap
import threading

import pytest

from lmm_sae.core import local_files, places
from lmm_sae.core.places import Place
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from tests import loopback


def test_what_is_written_is_read_listed_and_deleted(place):
  file = place / 'groups' / '000001.json'
  assert not file.exists()
  assert file.read_if_there() is None
  assert place.list() == []
  assert file.write(b'one') == 3
  assert (place / 'b').write(iter([b'12', b'', b'345'])) == 5
  assert (file.exists(), file.read(), file.name) == (
    True,
    b'one',
    '000001.json',
  )
  assert place.list() == ['b', 'groups/000001.json']
  assert (place / 'groups').list() == ['000001.json']
  file.write(b'another')
  assert list(places.read_all([file, place / 'c', place / 'b'])) == [
    b'another',
    None,
    b'12345',
  ]
  file.delete()
  file.delete()
  assert place.list() == ['b']
  (place / 'x' / 'y').write(b'')
  assert (place / 'x' / 'y').exists()
  (place / 'x').delete_below()
  (place / 'x').delete_below()
  assert place.list() == ['b']
  with pytest.raises(ValueError, match=r'/c does not exist'):
    (place / 'c').read()


def test_a_size_is_told_without_reading(place):
  file = place / 'shard'
  assert not file.holds(4)
  file.write(b'12345')
  assert [file.holds(size) for size in (4, 5, 6)] == [False, True, False]


@pytest.mark.parametrize(
  ('path', 'url'),
  [
    ('s3://b/x//y/', 's3://b/x/y'),
    ('S3://b', 's3://b'),
    ('gs://b/run', 'gs://b/run'),
    ('/tmp/a/../b', '/tmp/b'),
    ('file:///tmp/b', '/tmp/b'),
    ('runs/demo', os.path.abspath('runs/demo')),
    ('~/acts', os.path.expanduser('~/acts')),
  ],
)
def test_a_place_is_a_url_or_an_absolute_path(path, url):
  place = Place.of(path)
  assert str(place) == url
  assert Place.of(place) == place
  assert str(place / 'a' / 'b') == f'{url}/a/b'


@pytest.mark.parametrize(
  ('path', 'said'),
  [
    ('http://host/x', r'local folder, or at s3:// or gs://'),
    ('s3://', 'names no bucket'),
    ('gs://b/../x', 'mean nothing in a bucket'),
  ],
)
def test_what_is_no_place_is_refused(path, said):
  with pytest.raises(ValueError, match=said):
    Place.of(path)


def test_a_place_in_a_bucket_is_no_local_path(tmp_path):
  assert os.fspath(Place.of(tmp_path) / 'x') == str(tmp_path / 'x')
  with pytest.raises(ValueError, match='a local path is needed'):
    os.fspath(Place.of('s3://b/x'))


def test_a_workdir_keeps_the_address_of_its_store(tmp_path, place):
  workdir = Workdir.of(tmp_path / 'run', str(place))
  assert workdir.acts('a') == place / 'a'
  assert Workdir.of(tmp_path / 'run').acts('b') == Place.of(
    tmp_path / 'run' / 'acts' / 'b'
  )
  with pytest.raises(ValueError, match=r'/a is missing: run `lmm-sae capture`'):
    workdir.require(workdir.acts('a'), 'capture')
  (place / 'a' / 'meta.json').write(b'{}')
  assert workdir.require(workdir.acts('a'), 'capture') == place / 'a'


def test_a_bucket_that_is_not_there_is_named(s3):
  with pytest.raises(ValueError, match=r's3://none does not exist: make it'):
    Place.of('s3://none/x').write(b'')
  with pytest.raises(ValueError, match=r's3://none does not exist'):
    Place.of('s3://none/x').list()
  with pytest.raises(ValueError, match=r's3://none does not exist'):
    ActivationStore.open('s3://none/x')
  workdir = Workdir.of('run', 's3://none/x')
  with pytest.raises(ValueError, match=r's3://none does not exist'):
    workdir.require(workdir.acts('a'), 'capture')
  with pytest.raises(ValueError, match=r'run `lmm-sae capture` first'):
    ActivationStore.open(s3)


def test_a_bucket_of_googles_that_is_not_there_is_named_when_written(gs):
  with pytest.raises(ValueError, match=r'gs://none does not exist: make it'):
    Place.of('gs://none/x').write(b'')


def test_refused_credentials_say_what_to_set(s3_refuses):
  for use in (lambda x: x.write(b'1'), lambda x: x.read(), Place.list):
    with pytest.raises(
      ValueError, match=r'refused.*set AWS_ACCESS_KEY_ID'
    ) as e:
      use(Place.of('s3://acts/x'))
    assert len(str(e.value)) < 400


@pytest.mark.parametrize('answers', [501])
def test_what_a_server_cannot_do_is_told_with_the_place(s3_refuses):
  for use in (lambda x: x.write(b'1'), lambda x: x.read(), Place.list):
    with pytest.raises(ValueError, match=r's3://acts/x: '):
      use(Place.of('s3://acts/x'))


@pytest.fixture
def answers():
  return 403


@pytest.fixture
def s3_refuses(s3, monkeypatch, answers):
  """A server that answers as Amazon's does to a key it does not know."""
  body = b'<Error><Code>InvalidAccessKeyId</Code><Message>no</Message></Error>'

  class Refuses(loopback.Handler):
    def do_GET(self):
      self.rfile.read(int(self.headers.get('Content-Length') or 0))
      self.send_response(answers)
      self.send_header('Content-Length', str(len(body)))
      self.end_headers()
      if self.command != 'HEAD':
        self.wfile.write(body)

    do_PUT = do_HEAD = do_GET

  with loopback.serve(Refuses) as url:
    monkeypatch.setenv('AWS_ENDPOINT_URL', url)
    yield


def test_a_server_that_is_not_there_is_named(s3, monkeypatch):
  monkeypatch.setenv('AWS_ENDPOINT_URL', 'http://127.0.0.1:9')
  monkeypatch.setattr(
    places, 'CONTEXT', places.context({'max_retries': 1, 'max_delay': '1ms'})
  )
  places._open.cache_clear()
  with pytest.raises(ValueError, match=r'no server answers.*AWS_ENDPOINT_URL'):
    Place.of('s3://acts/x').read()
  places._open.cache_clear()


def test_a_full_disk_names_the_file_and_leaves_no_part(tmp_path):
  """A file may have 4,096 bytes, as if the disk ended there."""
  script = """
    import resource, sys
    from lmm_sae.core.places import Place
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
      Place.of(sys.argv[1]).write(iter([bytes(4000), bytes(4000)]))
    except ValueError as error:
      print(error)
  """
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(script), str(tmp_path / 'a' / 'b')],
    capture_output=True,
    text=True,
    check=True,
  )
  reason = os.strerror(errno.EFBIG).lower()
  assert f'{tmp_path}/a/b cannot be written, {reason}: make room' in done.stdout
  assert list((tmp_path / 'a').iterdir()) == []


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.EROFS, 'no')

  monkeypatch.setattr(local_files.os, 'open', refuse)
  with pytest.raises(ValueError, match=r'/a: read-only file system: make its'):
    Place.of(tmp_path / 'a').write(b'')


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path):
  place = Place.of(tmp_path / 'f')
  data = [bytes([n]) * 200_000 for n in range(4)]

  def write(n):
    for _ in range(8):
      place.write(data[n][i : i + 999] for i in range(0, 200_000, 999))

  threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert place.read() in data
  assert [x.name for x in tmp_path.iterdir()] == ['f']


def test_the_part_of_a_killed_writer_is_taken_up(tmp_path):
  (tmp_path / f'f{local_files.LOCK}').write_bytes(b'torn, and longer')
  place = Place.of(tmp_path)
  assert place.list() == []
  (place / 'f').write(b'whole')
  assert {x.name: x.read_bytes() for x in tmp_path.iterdir()} == {'f': b'whole'}


def test_a_folder_that_others_remove_is_made_again(tmp_path, monkeypatch):
  place, make = Place.of(tmp_path), os.mkdir

  def removed(path):
    monkeypatch.setattr(os, 'mkdir', make)
    make(path)
    os.rmdir(path)

  monkeypatch.setattr(os, 'mkdir', removed)
  (place / 'groups' / '000004.json').write(b'late')
  assert place.list() == ['groups/000004.json']


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / 'a').symlink_to(tmp_path / 'none')
  with pytest.raises(ValueError, match=r'/a/b: no such file or directory'):
    Place.of(tmp_path / 'a' / 'b').write(b'')
