"""What an explainer's answer says, however a model writes it."""

import pytest

from lmm_sae.core import prompts


@pytest.mark.parametrize(
  ('answer', 'text'),
  [
    ('CONCEPT: red squares.', 'red squares'),
    ('They are bright. CONCEPT: a\nred square', 'a\nred square'),
    ('**Concept:** red squares', 'red squares'),
    ('concept : red', 'red'),
    ('CONCEPT: or CONCEPT: red', 'red'),
    ('red squares', 'red squares'),
    ('<think>CONCEPT: none?</think> CONCEPT: red', 'red'),
    ('CONCEPT: nothing but sky', 'nothing but sky'),
    ('CONCEPT: nonesuch', 'nonesuch'),
    ('CONCEPT: no entry signs', 'no entry signs'),
  ],
)
def test_an_explanation_follows_the_marker(answer, text):
  assert prompts.parse(answer) == ('explained', text)


@pytest.mark.parametrize(
  'answer',
  [
    'CONCEPT: none',
    'CONCEPT: None.',
    'CONCEPT: **none**',
    '"none"',
    'CONCEPT: none, the pictures differ',
    'CONCEPT: None of them share anything',
    'CONCEPT: no common pattern',
    'CONCEPT: There is no clear concept here',
    'CONCEPT: nothing',
    'CONCEPT: nothing in common.',
    'CONCEPT:',
    '',
  ],
)
def test_no_common_pattern_is_an_outcome_of_its_own(answer):
  assert prompts.parse(answer) == ('no_pattern', '')


def test_what_is_thought_aloud_is_no_marker():
  assert prompts.marked('so CONCEPT: red')
  assert not prompts.marked('<think>I must write CONCEPT: and then')
