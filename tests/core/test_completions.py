"""What servers send, and what is made of it."""

import datetime
import email.utils
import json

import pytest

from lmm_sae.core import completions
from lmm_sae.core.completions import Answer, ChatError


def body(**changes) -> bytes:
  """A good completion, with changes to its choice."""
  choice = {
    'index': 0,
    'message': {'role': 'assistant', 'content': ' red '},
    'finish_reason': 'stop',
  }
  usage = {'prompt_tokens': 7, 'completion_tokens': 3}
  return json.dumps({'choices': [choice | changes], 'usage': usage}).encode()


def test_an_answer_and_its_tokens_are_read():
  assert completions.read(body(), 5) == (Answer('red', False), (7, 3))


def test_an_answer_of_all_tokens_was_cut():
  assert completions.read(body(finish_reason='length'), 3)[0].cut


def test_an_answer_that_the_server_broke_off_is_none():
  with pytest.raises(ChatError, match='3 tokens of 5') as caught:
    completions.read(body(finish_reason='length'), 5)
  assert (caught.value.fault, caught.value.tokens) == ('cut', (7, 3))


@pytest.mark.parametrize(
  ('data', 'fault'),
  [
    (b'', 'nonsense'),
    (b'<html>', 'nonsense'),
    (b'\xff\xfe{}', 'nonsense'),
    (b'[' * 200_000, 'nonsense'),
    (b'9' * 5000, 'nonsense'),
    (b'null', 'nonsense'),
    (b'[]', 'nonsense'),
    (b'{"choices": "red"}', 'nonsense'),
    (b'{"choices": {"0": 1}}', 'nonsense'),
    (b'{"choices": [3]}', 'nonsense'),
    (b'{"choices": []}', 'empty'),
    (b'{"error": {"message": "no"}}', 'nonsense'),
    (body(message=None), 'nonsense'),
    (body(message='red'), 'empty'),
    (body(message={'content': None}), 'empty'),
    (body(message={'content': ['red']}), 'empty'),
    (body(message={'content': ' \n'}), 'empty'),
    (body(message={'content': 'red \ud800'}), 'nonsense'),
    (body()[:-9], 'nonsense'),
  ],
)
def test_what_is_no_completion_is_a_fault(data, fault):
  with pytest.raises(ChatError) as caught:
    completions.read(data, 5)
  assert caught.value.fault == fault


@pytest.mark.parametrize(
  'usage',
  [None, 'many', {}, {'prompt_tokens': -1, 'completion_tokens': True},
   {'prompt_tokens': 1e30, 'completion_tokens': 'x'}],
)  # fmt: skip
def test_a_count_that_is_none_is_nothing(usage):
  line = json.loads(body()) | {'usage': usage}
  found = completions.read(json.dumps(line).encode(), 5)
  assert found == (Answer('red', False), (0, 0))


@pytest.mark.parametrize(
  ('headers', 'wanted'),
  [
    ({}, 0.0),
    ({'retry-after': '2'}, 2.0),
    ({'retry-after': ' 0.5 '}, 0.5),
    ({'retry-after-ms': '250', 'retry-after': '1'}, 0.25),
    ({'retry-after': '-3'}, 0.0),
    ({'retry-after': 'inf'}, 0.0),
    ({'retry-after': 'nan'}, 0.0),
    ({'retry-after': 'soon'}, 0.0),
    ({'retry-after': 'Wed, 21 Oct 2015 07:28:00 GMT'}, 0.0),
    ({'retry-after': '9' * 400}, 0.0),
  ],
)
def test_how_long_a_server_rests_is_read(headers, wanted):
  assert completions.rest_s(headers) == wanted


def test_a_date_says_how_long_a_server_rests():
  when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90)
  text = email.utils.format_datetime(when, usegmt=True)
  assert 80 < completions.rest_s({'retry-after': text}) <= 90
