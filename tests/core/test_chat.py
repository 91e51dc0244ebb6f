"""The chat client against a server that answers, stalls, breaks and babbles."""

import json

import pytest
from PIL import Image

from lmm_sae.core.chat import Answer, ChatClient, ChatError
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
