import numpy as np
import pytest
import transformers

from lmm_sae.core.tokens import Kind
from lmm_sae.lmm import prompt as prompts
from lmm_sae.lmm.prompt import Prompt
from tests.lmm import tiny_llava

VICUNA = (  # of strings, with words of its own before the first turn
  'A chat with a user. {% for m in messages %}'
  "{{ m['role'].upper() + ': ' + m['content'] + ' ' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEMPLATES = {'llama3': tiny_llava.CHAT, 'vicuna': VICUNA}


@pytest.fixture(scope='module', params=TEMPLATES)
def processor(request, model_folder):
  made = transformers.AutoProcessor.from_pretrained(model_folder, backend='pil')
  made.chat_template = TEMPLATES[request.param]
  return made


def words(prompt):
  return [(prompt[start:stop], kind) for start, stop, kind in prompt.spans]


def test_spans_are_the_turns_words(processor):
  turns = [
    ('user', ' a user, a chat '),  # words of the templates too
    ('assistant', 'yes'),
    ('user', 'yes'),
    ('assistant', ''),
  ]
  made = prompts.render(processor, turns)
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
def test_the_image_comes_first_in_its_turn(processor, first, second):
  turns = [('user', first), ('assistant', 'a cat'), ('user', second)]
  made = prompts.render(processor, turns, 1, generate=True)
  assert made.count('<image>') == 1
  assert made.index('<image>') < made.index('what is')
  assert words(made)[0] == ('what is this?', Kind.QUESTION)
  assert made[made.spans[-1][1] :].lower().count('assistant') == 1


def test_an_image_stays_in_the_turn_that_names_it(processor):
  turns = [('user', 'hi'), ('assistant', 'yes'), ('user', '<image> what?')]
  made = prompts.render(processor, turns, 1)
  assert made.spans[1][1] < made.index('<image>') < made.spans[2][0]


def test_several_images_come_first(processor):
  made = prompts.render(processor, [('user', 'what?')], 3)
  assert made.count('<image>') == 3
  assert made.rindex('<image>') < made.index('what?')


def test_what_does_not_fit_is_refused(processor):
  with pytest.raises(ValueError, match='2 <image> for 1 images'):
    prompts.render(processor, [('user', '<image> <image>')], 1)
  with pytest.raises(ValueError, match='1 <image> for 0 images'):
    prompts.render(processor, [('user', '<image> hi')])
  with pytest.raises(ValueError, match='0 <image> for 1 images'):
    prompts.render(processor, [('assistant', 'hi')], 1)
  with pytest.raises(ValueError, match="role 'robot' is neither"):
    prompts.render(processor, [('robot', 'hi')])


@pytest.mark.parametrize(
  ('template', 'message'),
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
def test_templates_that_spoil_the_turns_are_refused(
  processor, template, message
):
  processor.chat_template, kept = template, processor.chat_template
  try:
    with pytest.raises(ValueError, match=message):
      prompts.render(processor, [('user', 'abc'), ('assistant', 'b')])
  finally:
    processor.chat_template = kept


def test_a_model_without_chat_template_says_so(processor):
  kept = processor.chat_template
  processor.chat_template = processor.tokenizer.chat_template = None
  try:
    with pytest.raises(ValueError, match='no chat template'):
      prompts.render(processor, [('user', 'abc')])
  finally:
    processor.chat_template = kept


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
