"""Questions about texts, of latents and of words."""

import re

import numpy as np
import pytest

from lmm_sae.core import text_trials
from lmm_sae.core.index import TextExemplar
from lmm_sae.core.text_trials import Marked, OfTextLatent, OfWord, TextAsker
from lmm_sae.core.trial_sources import rng_of
from lmm_sae.core.trials import Style

RNG = rng_of(3, 1)
STYLE = Style(6, 3, 'fuzz', 0, 'exact')


def context(sample: int, words: str, at: int, acts: dict[int, float]):
  tokens = words.split(' ')
  tokens = [tokens[0], *(f' {word}' for word in tokens[1:])]
  values = [acts.get(i, 0.0) for i in range(len(tokens))]
  return TextExemplar(sample, at, max(values), tokens, values, at)


class Index:
  """Latent 0 fires on red, 1 on blue, 2 on both, of text samples of theirs."""

  def __init__(self):
    red = [context(s, f'the red hat {s} here', 1, {1: 2.0}) for s in range(5)]
    blue = [
      context(s, f'one blue sky {s} there', 1, {1: 4.0, 2: 0.5})
      for s in range(5, 10)
    ]
    self._texts = {0: red, 1: blue, 2: [*red, *blue]}
    self.stats = {'samples_fired': np.array([5, 5, 10, 0])}

  def texts(self, latent):
    return self._texts.get(latent, [])

  def text_spread(self, latent):
    return self.texts(latent)[::-1]

  def postings(self, latent, view):
    assert view == 'text'
    return (np.array([one.sample for one in self.texts(latent)]),)


def source(latent=0, others=(0, 1, 2)):
  return OfTextLatent(Index(), latent, others, 0.25, RNG)


@pytest.mark.parametrize(
  ('tokens', 'marks', 'text'),
  [
    (('a', ' red', ' hat'), (False, True, True), 'a <<red hat>>'),
    (('a', ' red', ' hat'), (True, False, True), '<<a>> red <<hat>>'),
    (('x\n', '<<y'), (False, True), 'x <<< <y>>'),
  ],
)
def test_runs_of_marked_tokens_stand_between_brackets(tokens, marks, text):
  assert Marked(tokens, marks).text == text


def test_marks_move_to_words_that_were_silent():
  rng = np.random.default_rng(0)
  one = Marked(('the', ' red', ' ', ' hat', '!'), (0, 1, 0, 0, 0))
  for _ in range(20):
    moved = text_trials.moved(one, rng)
    assert np.flatnonzero(moved.marks).tolist() in ([0], [3])
  full = Marked(('the', ' red', ' hat'), (0, 1, 1))
  assert text_trials.moved(full, rng) is None


def test_silent_texts_are_of_samples_that_do_not_fire():
  silent = source().silent(3)
  assert len(set(silent)) == 3
  assert all('blue' in text and '<<' not in text for text in silent)
  assert source(2).silent(3) == []
  assert source(0, others=(0,)).odd() is None


def test_detection_of_text_is_of_plain_contexts_half_of_which_fire():
  one, other = TextAsker(STYLE, source(), RNG).questions(
    'detection_text', ['red', 'blue']
  )
  assert [q.expected for q in one] == ['yes'] * 3 + ['no'] * 3
  for q, q_other in zip(one, other, strict=True):
    text = q.prompt.split('\n')[1]
    assert ('red' in text) == (q.expected == 'yes')
    assert q_other.prompt.split('\n')[1] == text
    assert q.images == ()


def test_fuzzing_of_text_marks_what_fires_and_what_does_not():
  (asked,) = TextAsker(STYLE, source(), RNG).questions('fuzzing_text', ['red'])
  assert [q.expected for q in asked] == ['yes', 'no'] * 3
  for q in asked:
    (marked,) = re.findall(r'<<(\w+)>>', q.prompt.split('\n')[1])
    assert (marked == 'red') == (q.expected == 'yes')


def test_the_intruder_is_the_text_marked_by_another_latent():
  (asked,) = TextAsker(STYLE, source(), RNG).questions('intruder_text', ['red'])
  assert len(asked) == 2
  for q in asked:
    lines = q.prompt.split('\n')[1:]
    assert len(lines) == 3
    assert q.choices == 3
    odd = [i for i, line in enumerate(lines, 1) if '<<blue' in line]
    assert odd == [int(q.expected)]


def test_a_word_is_marked_where_it_stands_and_lacking_elsewhere():
  every = text_trials.contexts(Index(), RNG)
  assert len(every) == 10
  word = OfWord(every, 'blue', RNG)
  assert all(re.findall('<<(.*?)>>', x.text) == ['blue'] for x in word.firing())
  assert len(word.firing()) == 5
  assert len(word.silent(9)) == 5
  assert not any('blue' in text for text in word.silent(9))
  odd = word.odd()
  assert 'blue' not in odd.text
  assert sum(odd.marks) == 1
