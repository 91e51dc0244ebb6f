"""The chat client against a server that answers, stalls, breaks and babbles."""

import contextlib
import functools
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from PIL import Image

from lmm_sae.core.chat import Answer, ChatClient, ChatError
from tests import loopback
from tests.fake_chat import FakeChat, text_of


@pytest.fixture
def server():
  with FakeChat(lambda request: f'you said: {text_of(request)}') as server:
    yield server


def client(server: FakeChat, tmp_path, **more) -> ChatClient:
  options = {'cache': tmp_path / 'cache', 'usage': tmp_path / 'usage.json'}
  options |= {'retries': 2, 'backoff_s': 0.001, 'timeout_s': 0.5, **more}
  return ChatClient(server.url, 'tiny', **options)


def used(tmp_path) -> dict:
  total = json.loads((tmp_path / 'usage.json').read_text())
  return total['used']['explainer']['tiny']


def test_images_come_in_order_and_numbered_before_the_text(server, tmp_path):
  images = [Image.new('RGB', (3, 2), colour) for colour in ('red', 'blue')]
  with client(server, tmp_path) as chat:
    assert chat.ask('what?', images).text == 'you said: what?'
  (request,) = server.requests
  (message,) = request['messages']
  assert message['role'] == 'user'
  assert [part.get('text', part['type']) for part in message['content']] == [
    'Picture 1:',
    'image_url',
    'Picture 2:',
    'image_url',
    'what?',
  ]
  assert [i.getpixel((0, 0)) for i in server.images(request)] == [
    (255, 0, 0),
    (0, 0, 255),
  ]
  assert (request['model'], request['temperature']) == ('tiny', 0)


def test_an_answer_is_asked_for_once_and_tokens_are_counted(server, tmp_path):
  for _ in range(2):
    with client(server, tmp_path) as chat:
      assert chat.ask('one').text == 'you said: one'
  assert len(server.requests) == 1
  assert used(tmp_path) == {
    'requests': 1,
    'cached': 1,
    'prompt_tokens': 7,
    'completion_tokens': 3,
    'cost': 0.0,
  }


@pytest.mark.parametrize('fault', ['500', 'drop', 'stall', 'torn', 'nonsense'])
def test_a_fault_is_tried_again(server, tmp_path, fault):
  server.faults = [fault]
  with client(server, tmp_path) as chat:
    assert chat.ask('one').text == 'you said: one'
  assert len(server.requests) == 2


@pytest.mark.parametrize('fault', ['500', 'drop', 'torn', 'nonsense', 'empty'])
def test_a_server_that_stays_at_fault_is_a_failure_of_that_request(
  server, tmp_path, fault
):
  server.faults = [fault] * 3
  with client(server, tmp_path) as chat:
    with pytest.raises(ChatError, match='3 attempts failed'):
      chat.ask('one')
    assert chat.ask('one').text == 'you said: one'  # a failure is not kept
  assert used(tmp_path)['failed'] == 1
  assert sum(used(tmp_path)['faults'].values()) == 3


def test_a_refused_request_is_not_tried_again(server, tmp_path):
  server.faults = ['400']
  with (
    client(server, tmp_path) as chat,
    pytest.raises(ChatError, match='refuse'),
  ):
    chat.ask('one')
  assert len(server.requests) == 1


def test_an_unknown_model_and_a_wrong_key_stop_the_run(server, tmp_path):
  for fault in ('404', '401'):
    server.faults = [fault]
    with (
      client(server, tmp_path) as chat,
      pytest.raises(ValueError, match=r'explain\.model'),
    ):
      chat.ask('one')


def test_a_server_that_refuses_everything_stops_the_run(server, tmp_path):
  server.faults = ['400'] * 30
  with client(server, tmp_path) as chat:
    for i in range(7):
      with pytest.raises(ChatError, match='as asked'):
        chat.ask(str(i))
    with pytest.raises(ValueError, match=r'explain\.model'):
      chat.ask('7')


def test_nobody_listening_stops_the_run(tmp_path):
  with FakeChat(str) as gone:
    url = gone.url
  chat = ChatClient(url, 'tiny', retries=1, backoff_s=0.001)
  with chat, pytest.raises(ConnectionError, match=r'explain\.base_url'):
    chat.ask('one')


def test_an_answer_cut_short_says_so(server, tmp_path):
  server.faults = ['cut']
  with client(server, tmp_path) as chat:
    assert chat.ask('one') == Answer('you said: one', cut=True)


def test_several_servers_share_the_work_and_stand_in_for_one_another(
  server, tmp_path
):
  with FakeChat(lambda request: 'other') as other:
    urls = f'{server.url},{other.url}'
    with ChatClient(urls, 'tiny', retries=1, backoff_s=0.001) as chat:
      for i in range(12):
        chat.ask(str(i))
      assert min(len(server.requests), len(other.requests)) > 0
      other.faults = ['500'] * 20
      for i in range(12, 20):
        assert chat.ask(str(i)).text.startswith('you said')


def test_a_url_without_http_is_refused():
  with pytest.raises(ValueError, match='not an http'):
    ChatClient('localhost:8000', 'tiny')


GOOD = {'choices': [{'message': {'content': 'red'}, 'finish_reason': 'stop'}]}


@contextlib.contextmanager
def scripted(*script: Callable) -> Iterator[tuple[str, list]]:
  """A server whose n-th answer is script[n](handler), then good ones; yields
  its URL and what was sent: (time, body, headers)."""
  came, lock = [], threading.Lock()

  class Handler(loopback.Handler):
    def do_POST(self):
      body = self.rfile.read(int(self.headers['Content-Length']))
      with lock:
        number = len(came)
        came.append((time.monotonic(), body, dict(self.headers)))
      if number < len(script):
        script[number](self)
      else:
        say(self, 200, json.dumps(GOOD).encode())

  with loopback.serve(Handler) as url:
    yield f'{url}/v1', came


def say(handler, status: int, body: bytes = b'{}', **headers) -> None:
  handler.send_response(status)
  for name, value in headers.items():
    handler.send_header(name.replace('_', '-'), value)
  handler.send_header('Content-Length', str(len(body)))
  handler.end_headers()
  handler.wfile.write(body)


@pytest.mark.parametrize('status', [429, 503])
def test_a_server_is_left_alone_for_as_long_as_it_asks(status):
  busy = functools.partial(say, status=status, Retry_After='0.4')
  with (
    scripted(busy) as (url, came),
    ChatClient(url, 'tiny', retries=1, backoff_s=0.001) as chat,
  ):
    assert chat.ask('one').text == 'red'
  assert came[1][0] - came[0][0] >= 0.4


def test_a_wish_for_rest_is_kept_by_those_who_wait_already():
  broken = functools.partial(say, status=500)
  busy = functools.partial(say, status=429, Retry_After='0.8')
  with (
    scripted(broken, busy) as (url, came),
    ChatClient(url, 'tiny', retries=2, backoff_s=0.2) as chat,
  ):
    first = threading.Thread(target=chat.ask, args=('one',))
    first.start()
    while not came:
      time.sleep(0.001)
    chat.ask('two')  # is told to rest while the first one pauses
    first.join()
  times = [at for at, _, _ in came]
  assert min(times[2:]) - times[1] >= 0.8


def test_all_requests_leave_it_alone_and_another_server_answers():
  busy = functools.partial(say, status=429, Retry_After='600')
  with (
    scripted(*[busy] * 99) as (url, came),
    scripted() as (other, came_other),
    ChatClient(f'{url},{other}', 'tiny', retries=1) as chat,
  ):
    for i in range(20):
      assert chat.ask(str(i)).text == 'red'
  assert len(came) == 1
  assert len(came_other) == 20


def test_a_server_that_asks_for_an_hour_ends_the_run_and_is_not_asked_again():
  busy = functools.partial(say, status=429, Retry_After='3600')
  with (
    scripted(busy) as (url, came),
    ChatClient(url, 'tiny', backoff_s=0.001) as chat,
    pytest.raises(ConnectionError, match=r'left alone for 3[56]\d\d s'),
  ):
    chat.ask('one')
  assert len(came) == 1


def test_pauses_grow_where_the_server_names_none():
  broken = functools.partial(say, status=500)
  with (
    scripted(*[broken] * 3) as (url, came),
    ChatClient(url, 'tiny', retries=3, backoff_s=0.05) as chat,
  ):
    assert chat.ask('one').text == 'red'
  times = [at for at, _, _ in came]
  pauses = [b - a for a, b in itertools.pairwise(times)]
  for pause, least in zip(pauses, (0.05, 0.1, 0.2), strict=True):
    assert pause >= least


def test_a_request_is_the_same_bytes_whichever_server_answers():
  broken = functools.partial(say, status=500)
  image = Image.new('RGB', (3, 2), 'red')
  with (
    scripted(*[broken] * 9) as (one, came),
    scripted(*[broken] * 9) as (two, came_two),
    ChatClient(f'{one},{two}/', 'tiny', retries=3, backoff_s=0.001) as chat,
    pytest.raises(ChatError, match='4 attempts failed'),
  ):
    chat.ask('what?', [image, image])
  assert len(came) == len(came_two) == 2
  assert len({body for _, body, _ in came + came_two}) == 1


def test_a_server_that_is_away_costs_no_attempt_while_another_is_there():
  with FakeChat(str) as gone:
    url = gone.url
  with (
    scripted() as (other, came),
    ChatClient(f'{url},{other}', 'tiny', retries=0, backoff_s=60) as chat,
  ):
    for i in range(12):
      assert chat.ask(str(i)).text == 'red'
  assert len(came) == 12


def test_a_body_that_never_ends_is_given_up(tmp_path):
  def drip(handler):
    handler.send_response(200)
    handler.send_header('Content-Length', '100000')
    handler.end_headers()
    with contextlib.suppress(ConnectionError):
      for _ in range(400):
        handler.wfile.write(b' ')
        handler.wfile.flush()
        time.sleep(0.01)

  with (
    scripted(drip) as (url, _),
    ChatClient(
      url, 'tiny', retries=1, timeout_s=0.2, backoff_s=0.001,
      usage=tmp_path / 'usage.json',
    ) as chat,
  ):  # fmt: skip
    began = time.monotonic()
    assert chat.ask('one').text == 'red'
  assert time.monotonic() - began < 3
  assert used(tmp_path)['faults'] == {'timeout': 1}


def test_a_body_without_bound_is_not_read(tmp_path, monkeypatch):
  monkeypatch.setattr('lmm_sae.core.chat.LARGEST', 1000)
  large = functools.partial(say, status=200, body=b' ' * 100_000)
  with (
    scripted(large) as (url, _),
    ChatClient(
      url, 'tiny', retries=1, backoff_s=0.001, usage=tmp_path / 'usage.json'
    ) as chat,
  ):
    assert chat.ask('one').text == 'red'
  assert used(tmp_path)['faults'] == {'too large': 1}


def test_an_answer_sent_twice_is_not_taken_for_the_next_one():
  def poison(handler):
    bodies = [json.dumps(GOOD).encode(), b'{"choices": "false"}']
    handler.wfile.write(
      b''.join(
        b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s' % (len(b), b)
        for b in bodies
      )
    )

  with (
    scripted(*[poison] * 5) as (url, came),
    ChatClient(url, 'tiny', retries=0) as chat,
  ):
    for i in range(5):
      assert chat.ask(str(i)).text == 'red'
  assert len(came) == 5


def test_no_key_is_sent_where_there_is_none(monkeypatch):
  monkeypatch.delenv('OPENAI_API_KEY', raising=False)
  with scripted() as (url, came):
    for key in ('', 'secret\n'):
      with ChatClient(url, 'tiny', api_key=key) as chat:
        chat.ask('one')
  keys = [headers.get('Authorization') for _, _, headers in came]
  assert keys == [None, 'Bearer secret']


def test_a_message_names_the_fields_of_the_role():
  with pytest.raises(ValueError, match=r'explain\.refine_url'):
    ChatClient('ftp://x', 'tiny', role='refiner')
  with (
    scripted(lambda handler: say(handler, 404)) as (url, _),
    ChatClient(url, 'tiny', role='category') as chat,
    pytest.raises(ValueError, match=r'check explain\.category_model'),
  ):
    chat.ask('one')


@pytest.mark.parametrize('text', ['', '{"te', '{"word": 3}', '[1]'])
def test_a_spoilt_cache_entry_is_asked_anew(server, tmp_path, text):
  for count in (1, 2):
    with client(server, tmp_path) as chat:
      assert chat.ask('one').text == 'you said: one'
    assert len(server.requests) == count
    (path,) = (tmp_path / 'cache').glob('*/*.json')
    path.write_text(text)


def test_a_fatal_error_wakes_those_who_wait():
  busy = functools.partial(say, status=500)
  unknown = functools.partial(say, status=404)
  failures = []

  def ask(chat, text):
    try:
      chat.ask(text)
    except ValueError as error:
      failures.append(str(error))

  with (
    scripted(busy, unknown) as (url, came),
    ChatClient(url, 'tiny', backoff_s=60) as chat,
  ):
    waiting = threading.Thread(target=ask, args=(chat, 'one'))
    waiting.start()
    while not came:
      time.sleep(0.001)
    ask(chat, 'two')
    waiting.join(10)
    assert not waiting.is_alive()
  assert len(failures) == 2


def test_a_server_that_hangs_is_asked_last():
  release = threading.Event()

  def hang(handler):
    handler.close_connection = True
    release.wait(20)

  with (
    scripted(*[hang] * 99) as (url, came),
    scripted() as (other, came_other),
    ChatClient(f'{url},{other}', 'tiny', retries=1, timeout_s=0.3) as chat,
  ):
    for i in range(20):
      assert chat.ask(str(i)).text == 'red'
    release.set()
  assert len(came) == 1
  assert len(came_other) == 20
