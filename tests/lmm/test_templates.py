"""The chat formats of the checkpoints there are, written down by hand.

What is expected of each stands here as text, its turns' words between brackets:
`[q ...]` a question, `[a ...]` an answer, `[s ...]` a system turn. Which token
holds which character is asked of the tokenizer.
"""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from lmm_sae.core.tokens import Kind
from lmm_sae.lmm.llava import Subject
from tests.lmm import tiny_llava

LLAMA3 = (
  '{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n'
  "{% for p in m.content if p.type == 'image' %}<image>\n{% endfor %}"
  "{% for p in m.content if p.type == 'text' %}{{ p.text | trim }}{% endfor %}"
  '<|eot|>{% endfor %}'
  '{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}'
)
MISTRAL = (
  '{{ bos_token }}{% for m in messages %}'
  "{% if m.role == 'user' %}[INST] "
  "{% for p in m.content if p.type == 'image' %}<image>\n{% endfor %}"
  "{% for p in m.content if p.type == 'text' %}{{ p.text }} [/INST]{% endfor %}"
  "{% elif m.role == 'assistant' %} {{ m.content[0].text }}<|eot|>"
  "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}"
  '{% endfor %}'
)
VICUNA = (
  'A chat of a user and an assistant. {% for m in messages %}'
  "{% if m.role != 'system' %}{{ m.role | upper }}: {% endif %}"
  "{% for p in m.content if p.type == 'image' %}<image>\n{% endfor %}"
  "{% for p in m.content if p.type == 'text' %}{{ p.text }} {% endfor %}"
  '{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}'
)
CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
  '<|im_end|>\n{% endfor %}'
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
QWEN = (
  "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>"
  '\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n'
  "{% for p in m.content %}{% if p.type == 'image' %}"
  '<|vision_start|><|image_pad|><|vision_end|>'
  '{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}'
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
TURNS = [
  ('user', 'what is <image> this?'),
  ('assistant', 'a red cat'),
  ('user', ' is <image> like\n<image>?\n'),
  ('assistant', 'no'),
]
SYSTEM = ('system', 'be brief')
PAD = '<|vision_start|><|image_pad|><|vision_end|>'
A_CHAT = 'A chat of a user and an assistant. '
# {format: (its template, how it opens without and with a system turn, TURNS,
# what makes the model go on)}
EXPECTED = {
  'llama3': (
    LLAMA3,
    '',
    '<|start|>system<|end|>\n\n[s be brief]<|eot|>',
    '<|start|>user<|end|>\n\n<image>\n[q what is this?]<|eot|>'
    '<|start|>assistant<|end|>\n\n[a a red cat]<|eot|>'
    '<|start|>user<|end|>\n\n[q is <image> like\n<image>?]<|eot|>'
    '<|start|>assistant<|end|>\n\n[a no]<|eot|>',
    '<|start|>assistant<|end|>\n\n',
  ),
  'mistral': (
    MISTRAL,
    '',
    None,
    '<|bos|>@INST] <image>\n[q what is this?] @/INST] [a a red cat]<|eot|>'
    '@INST] [q is <image> like\n<image>?] @/INST] [a no]<|eot|>',
    '',
  ),
  'vicuna': (
    VICUNA,
    A_CHAT,
    f'{A_CHAT}[s be brief] ',
    'USER: <image>\n[q what is this?] ASSISTANT: [a a red cat] '
    'USER: [q is <image> like\n<image>?] ASSISTANT: [a no] ',
    'ASSISTANT:',
  ),
  'chatml': (
    CHATML,
    '',
    '<|im_start|>system\n[s be brief]<|im_end|>\n',
    '<|im_start|>user\n<image>\n[q what is this?]<|im_end|>\n'
    '<|im_start|>assistant\n[a a red cat]<|im_end|>\n'
    '<|im_start|>user\n[q is <image> like\n<image>?]<|im_end|>\n'
    '<|im_start|>assistant\n[a no]<|im_end|>\n',
    '<|im_start|>assistant\n',
  ),
  'qwen': (
    QWEN,
    '<|im_start|>system\nYou help.<|im_end|>\n',
    '<|im_start|>system\n[s be brief]<|im_end|>\n',
    f'<|im_start|>user\n{PAD}[q what is this?]<|im_end|>\n'
    '<|im_start|>assistant\n[a a red cat]<|im_end|>\n'
    f'<|im_start|>user\n[q is {PAD} like\n{PAD}?]<|im_end|>\n'
    '<|im_start|>assistant\n[a no]<|im_end|>\n',
    '<|im_start|>assistant\n',
  ),
}
KINDS = {'q': Kind.QUESTION, 'a': Kind.ANSWER, 's': Kind.TEMPLATE}


@pytest.fixture(scope='module')
def subjects(tmp_path_factory):
  return {
    name: Subject.load(
      tiny_llava.family(tmp_path_factory.mktemp(name) / name, name), threads=1
    )
    for name in ('llava_next', 'qwen2_5_vl')
  }


@pytest.fixture(params=EXPECTED)
def case(request, subjects):
  """(subject with the template, the other four of EXPECTED)."""
  source, *texts = EXPECTED[request.param]
  name = 'qwen2_5_vl' if request.param == 'qwen' else 'llava_next'
  subject = subjects[name]
  kept = subject.template
  subject.template = dataclasses.replace(kept, source=source)
  yield subject, *texts
  subject.template = kept


@pytest.fixture(scope='module')
def pictures():
  return [Image.new('RGB', size) for size in ((40, 30), (12, 80), (91, 30))]


def parsed(marked):
  """(text, kind of each of its characters) of text with brackets."""
  text, kinds = '', []
  for piece in re.split(r'(\[[qas] [^\]]*\])', marked):
    kind = KINDS[piece[1]] if piece.startswith('[') else Kind.TEMPLATE
    words = piece[3:-1] if piece.startswith('[') else piece.replace('@', '[')
    text += words
    kinds += [kind] * len(words)
  return text, kinds


def wanted_kinds(subject, text, kinds):
  """The kind of every token, images as one, by asking for each character."""
  encoded = subject.tokenizer(
    text, add_special_tokens=not text.startswith('<|bos|>')
  )
  found = [Kind.TEMPLATE] * len(encoded['input_ids'])
  for at, kind in enumerate(kinds):
    if kind != Kind.TEMPLATE:
      found[encoded.char_to_token(at)] = kind
  found[0] = Kind.BOS
  token_T = np.array(encoded['input_ids'])
  around = subject.tokenizer.convert_tokens_to_ids(
    ['<|vision_start|>', '<|vision_end|>']
  )
  return [
    Kind.TEMPLATE if token in around else kind
    for token, kind in zip(token_T, found, strict=True)
  ], token_T


def check(subject, prompt, marked, pictures):
  text, kinds = parsed(marked)
  assert str(prompt) == text
  tokens = subject.encode(prompt, pictures)
  wanted, token_T = wanted_kinds(subject, text, kinds)
  places = np.flatnonzero(token_T == subject.image_token)
  assert len(places) == len(pictures)
  start, before = 0, 0  # of what is compared: in our tokens, in the text's
  for number, at in enumerate([*places, len(token_T)]):
    shown = slice(start, start + at - before)
    assert tokens.kind_T[shown].tolist() == wanted[before:at]
    assert (tokens.image_T[shown] == -1).all()
    start, before = shown.stop, at + 1
    if number < len(pictures):
      seen = subject.family.tokens(*pictures[number].size, len(pictures) == 1)
      shown = slice(start, start + len(seen.kind_T))
      np.testing.assert_array_equal(tokens.kind_T[shown], seen.kind_T)
      np.testing.assert_array_equal(tokens.box_T4[shown], seen.box_T4)
      assert (tokens.image_T[shown] == number).all()
      start = shown.stop
  assert start == len(tokens.kind_T)
  assert (tokens.kind_T == Kind.BOS).sum() == 1


def test_every_token_has_the_kind_of_its_characters(case, pictures):
  subject, opening, _, turns, _ = case
  prompt = subject.conversation(TURNS, 3)
  check(subject, prompt, opening + turns, pictures)


def test_a_system_turn_is_template(case, pictures):
  subject, _, opening, turns, _ = case
  if opening is None:
    with pytest.raises(ValueError, match='only user and assistant'):
      subject.conversation([SYSTEM, *TURNS], 3)
    return
  prompt = subject.conversation([SYSTEM, *TURNS], 3)
  check(subject, prompt, opening + turns, pictures)


def test_a_question_ends_where_the_model_goes_on(case, pictures):
  subject, *_, end = case
  prompt = subject.chat('what is this?', 1)
  assert prompt.endswith(end)
  assert prompt.count(subject.template.image) == 1
  ((start, stop, kind),) = prompt.spans
  assert (prompt[start:stop], kind) == ('what is this?', Kind.QUESTION)
  assert prompt.index(subject.template.image) < start
  subject.encode(prompt, pictures[:1])


def test_raw_turns_have_the_kinds_of_their_roles(subjects, pictures):
  for subject in subjects.values():
    wrapped = subject.template.wrapped
    prompt = subject.raw([SYSTEM, *TURNS], 3)
    check(
      subject,
      prompt,
      f'[s be brief]\n[q what is {wrapped} this?]\n[a a red cat]\n'
      f'[q is {wrapped} like\n{wrapped}?]\n[a no]',
      pictures,
    )


def test_images_in_another_turn_than_the_texts_are_refused(subjects):
  swaps = LLAMA3.replace('messages %}', 'messages | reverse %}', 1)
  late = LLAMA3.replace('<image>\n', '').replace('<|eot|>', '<|eot|><image>')
  for source in (swaps, late):
    subject = subjects['llava_next']
    template = dataclasses.replace(subject.template, source=source)
    before, subject.template = subject.template, template
    try:
      with pytest.raises(ValueError, match='template'):
        subject.conversation(TURNS, 3)
    finally:
      subject.template = before
