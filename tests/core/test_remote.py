"""The client: it waits for a server, retries, and says what is wrong."""

import http.server
import json
import threading

import numpy as np
import pytest
from PIL import Image

from lmm_sae.core import wire
from lmm_sae.core.records import Edit
from lmm_sae.core.remote import GenerateRow, SubjectClient


class Script(http.server.BaseHTTPRequestHandler):
  """Answers with the statuses in order; keeps what it was sent."""

  statuses: list[int]
  seen: list[tuple[str, dict, dict]]

  def do_POST(self):
    body = self.rfile.read(int(self.headers['Content-Length']))
    self.seen.append((self.headers.get('Authorization'), *wire.unpack(body)))
    status = self.statuses.pop(0)
    answer = json.dumps({'error': 'layer 9: no such layer'}).encode()
    if status == 200:
      answer = wire.pack({'texts': ['red'] * len(self.seen[-1][1]['rows'])}, {})
    self.send_response(status)
    self.send_header('Content-Length', str(len(answer)))
    self.end_headers()
    self.wfile.write(answer)

  def log_message(self, *_):
    pass


@pytest.fixture
def serve():
  """Starts a server with a list of statuses; gives its URL and what it saw."""
  servers = []

  def start(statuses):
    fields = {'statuses': list(statuses), 'seen': []}
    handler = type('Handler', (Script,), fields)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,)).start()
    servers.append(server)
    return f'http://127.0.0.1:{server.server_port}', handler.seen

  yield start
  for server in servers:
    server.shutdown()
    server.server_close()


IMAGE = Image.new('RGB', (3, 2), 'red')
ROW = GenerateRow(0, 'what is it?')


def test_a_full_queue_is_asked_again(serve):
  url, seen = serve([503, 503, 200])
  with SubjectClient(url, token='abc') as client:
    assert client.generate([ROW], [IMAGE], 4) == ['red']
  assert [token for token, _, _ in seen] == ['Bearer abc'] * 3


def test_a_queue_that_stays_full_is_given_up(serve):
  url, _ = serve([503] * 20)
  with pytest.raises(ConnectionError, match='stayed busy'):
    SubjectClient(url, timeout_s=0.2).generate([ROW], [IMAGE], 4)


def test_a_refusal_is_a_value_error_with_the_servers_words(serve):
  url, _ = serve([400])
  with pytest.raises(ValueError, match='layer 9: no such layer'):
    SubjectClient(url).generate([ROW], [IMAGE], 4)


def test_a_failure_of_the_server_is_not_the_callers_fault(serve):
  url, _ = serve([500])
  with pytest.raises(RuntimeError, match='failed at /generate'):
    SubjectClient(url).generate([ROW], [IMAGE], 4)


def test_no_server_says_how_to_start_one():
  client = SubjectClient('http://127.0.0.1:9', connect_s=0.1)
  assert not client.health()
  with pytest.raises(ConnectionError, match='lmm-sae serve'):
    client.info()


@pytest.mark.parametrize('url', ['127.0.0.1:80', 'ftp://there', ''])
def test_what_is_no_url_is_refused(url):
  with pytest.raises(ValueError, match=r'server\.url'):
    SubjectClient(url).info()


def test_only_the_peaks_that_are_used_are_sent(serve):
  url, seen = serve([200])
  rows = [
    GenerateRow(0, 'a?', (Edit(3, 2.0, unit='peak'),), layer=1),
    GenerateRow(0, 'b?', (Edit(0, 1.0),), layer=1),
    GenerateRow(None, 'c?', (Edit(2, 1.0, unit='peak'),), layer=4),
  ]
  peaks = {1: np.array([0.5, 1, 2, 4], np.float32), 4: {2: 8.0}}
  assert len(SubjectClient(url).generate(rows, [IMAGE], 4, peaks=peaks)) == 3
  _, header, arrays = seen[0]
  assert header['peaks'] == {'1': {'3': 4.0}, '4': {'2': 8.0}}
  assert header['rows'][1]['edits'][0]['unit'] == 'absolute'
  assert arrays.keys() == {'image_0'}


def test_a_peak_that_nobody_gives_is_refused_before_sending():
  client = SubjectClient('http://127.0.0.1:9')
  row = GenerateRow(None, 'a?', (Edit(3, 2.0, unit='peak'),), layer=1)
  for peaks in (None, {2: {3: 1.0}}, {1: {4: 1.0}}, {1: np.ones(3)}):
    with pytest.raises(ValueError, match='peak'):
      client.generate([row], [], 4, peaks=peaks)


def test_pairs_must_be_of_equal_length():
  with pytest.raises(ValueError, match='do not pair'):
    SubjectClient('http://127.0.0.1:9').clip([IMAGE], ['a', 'b'])
