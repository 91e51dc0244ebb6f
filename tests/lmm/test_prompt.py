import dataclasses

import numpy as np
import pytest
import transformers

from lmm_sae.core.tokens import Kind
from lmm_sae.lmm import prompt as prompts
from lmm_sae.lmm.prompt import Prompt, Template
from tests.lmm import tiny_llava

VICUNA = (  # of strings, with words of its own before the first turn
  'A chat with a user. {% for m in messages %}'
  "{{ m['role'].upper() + ': ' + m['content'] + ' ' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEMPLATES = {'llama3': tiny_llava.CHAT, 'vicuna': VICUNA}


@pytest.fixture(scope='module', params=TEMPLATES)
def template(request, model_folder):
  tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
  return Template(tokenizer, TEMPLATES[request.param], '<image>', '<image>')


def words(prompt):
  return [(prompt[start:stop], kind) for start, stop, kind in prompt.spans]


def test_spans_are_the_turns_words(template):
  turns = [
    ('user', ' a user, a chat '),  # words of the templates too
    ('assistant', 'yes'),
    ('user', 'yes'),
    ('assistant', ''),
  ]
  made = prompts.render(template, turns)
  assert words(made) == [
    ('a user, a chat', Kind.QUESTION),
    ('yes', Kind.ANSWER),
    ('yes', Kind.QUESTION),
    ('', Kind.ANSWER),
  ]
  assert made.spans[1][0] > made.spans[0][1]
  assert '<image>' not in made


@pytest.mark.parametrize(
  ('first', 'second'),
  [
    ('what is this?', 'where?'),
    ('<image>\nwhat is this?', 'where?'),
    ('what is this? <image>', 'where?'),
    ('what is <image> this?', 'where?'),
  ],
)
def test_the_image_comes_first_in_its_turn(template, first, second):
  turns = [('user', first), ('assistant', 'a cat'), ('user', second)]
  made = prompts.render(template, turns, 1, generate=True)
  assert made.count('<image>') == 1
  assert made.index('<image>') < made.index('what is')
  assert words(made)[0] == ('what is this?', Kind.QUESTION)
  assert made[made.spans[-1][1] :].lower().count('assistant') == 1


def test_an_image_stays_in_the_turn_that_names_it(template):
  turns = [('user', 'hi'), ('assistant', 'yes'), ('user', '<image> what?')]
  made = prompts.render(template, turns, 1)
  assert made.spans[1][1] < made.index('<image>') < made.spans[2][0]


def test_several_images_come_first(template):
  made = prompts.render(template, [('user', 'what?')], 3)
  assert made.count('<image>') == 3
  assert made.rindex('<image>') < made.index('what?')


def test_several_images_of_a_turn_stay_among_its_words(template):
  turns = [
    ('user', 'is <image> like <image>?'),
    ('assistant', 'yes'),
    ('user', 'and <image>'),
  ]
  made = prompts.render(template, turns, 3, generate=True)
  assert words(made)[0] == ('is <image> like <image>?', Kind.QUESTION)
  assert words(made)[2] == ('and', Kind.QUESTION)
  last = made[made.spans[1][1] : made.spans[2][0]]
  assert last.count('<image>') == 1


def test_a_system_turn_is_template(template):
  turns = [('system', 'be brief'), ('user', 'what?'), ('assistant', 'a cat')]
  made = prompts.render(template, turns, 1)
  assert words(made)[0] == ('be brief', Kind.TEMPLATE)
  assert made.index('be brief') < made.index('<image>') < made.index('what?')


def test_raw_turns_stand_a_line_each_with_their_images_in_place(template):
  qwen = dataclasses.replace(template, wrapped='[<image>]')
  turns = [('user', ' a <image> b '), ('assistant', 'c'), ('system', 'd')]
  made = prompts.raw(qwen, turns, 1)
  assert made == 'a [<image>] b\nc\nd'
  assert [kind for _, kind in words(made)] == [
    Kind.QUESTION,
    Kind.ANSWER,
    Kind.TEMPLATE,
  ]
  made = prompts.raw(qwen, [('assistant', 'c'), ('user', 'a')], 2)
  assert made == 'c\n[<image>]\n[<image>]\na'
  assert words(made) == [('c', Kind.ANSWER), ('a', Kind.QUESTION)]
  with pytest.raises(ValueError, match='1 <image> for 2 images'):
    prompts.raw(qwen, turns, 2)


def test_what_does_not_fit_is_refused(template):
  with pytest.raises(ValueError, match='2 <image> for 1 images'):
    prompts.render(template, [('user', '<image> <image>')], 1)
  with pytest.raises(ValueError, match='1 <image> for 0 images'):
    prompts.render(template, [('user', '<image> hi')])
  with pytest.raises(ValueError, match='0 <image> for 1 images'):
    prompts.render(template, [('assistant', 'hi')], 1)
  with pytest.raises(ValueError, match="role 'robot' is none of user"):
    prompts.render(template, [('robot', 'hi')])


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    ("{{ raise_exception('not like this') }}", 'renders no image'),
    ('hello', 'renders no image'),
    ("{{ messages[0]['content'] }}", 'drops or repeats turns'),
    (
      "{% for m in messages %}{{ m['content'].upper() }}{% endfor %}",
      'renders no image',
    ),
    (
      "{% for m in messages %}{{ m['content'].replace('b', '') }}{% endfor %}",
      "changes the turns' words",
    ),
  ],
)
def test_templates_that_spoil_the_turns_are_refused(template, source, message):
  spoilt = dataclasses.replace(template, source=source)
  with pytest.raises(ValueError, match=message):
    prompts.render(spoilt, [('user', 'abc'), ('assistant', 'b')])


def test_a_model_without_chat_template_says_so(template):
  silent = dataclasses.replace(template, source=None)
  with pytest.raises(ValueError, match='no chat template'):
    prompts.render(silent, [('user', 'abc')])


def test_kinds_follow_the_spans():
  text = Prompt('[ab|cd]', [(1, 3, Kind.QUESTION), (4, 6, Kind.ANSWER)])
  offsets = np.array([(0, 0), (0, 1), (1, 3), (3, 5), (5, 6), (6, 7)])
  token_T = np.array([9, 1, 2, 3, 4, 5])
  kind_T = prompts.kinds(text, offsets, token_T, bos=9)
  assert kind_T.tolist() == [
    Kind.BOS,
    Kind.TEMPLATE,
    Kind.QUESTION,
    Kind.ANSWER,  # a token on the border belongs to the turn
    Kind.ANSWER,
    Kind.TEMPLATE,
  ]


def test_a_plain_string_is_one_question():
  kind_T = prompts.kinds('ab', np.array([(0, 1), (1, 2)]), np.array([1, 2]), 1)
  assert kind_T.tolist() == [Kind.BOS, Kind.QUESTION]
