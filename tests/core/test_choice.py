import numpy as np
import pytest

from lmm_sae.core import choice, tokens
from lmm_sae.core.choice import Choice
from lmm_sae.core.tokens import Kind


def parse(*entries):
  return Choice.parse(entries, 'capture.keep')


def shares(*entries):
  found = parse(*entries).shares
  return {kind.name.lower(): found[kind] for kind in Kind if found[kind]}


def test_an_entry_alone_takes_all_tokens_of_its_kinds():
  assert shares('image') == {'base': 1, 'tile': 1, 'newline': 1}
  assert shares('bos', 'answer') == {'bos': 1, 'answer': 1}
  everything = shares('all', 'bos')
  assert everything.keys() == {k.name.lower() for k in Kind} - {'padding'}


def test_the_more_special_entry_wins_wherever_it_stands():
  wanted = {
    'template': 0.5, 'question': 0.5, 'answer': 1.0,
    'base': 0.25, 'tile': 0.25, 'newline': 0.25,
  }  # fmt: skip
  entries = ('all:0.25', 'text:0.5', 'answer:1.0')
  assert shares(*entries) == shares(*entries[::-1]) == wanted


@pytest.mark.parametrize(
  ('entries', 'message'),
  [
    ((), 'capture.keep is empty: nothing would be stored'),
    (('words',), "token kind 'words' is none of all, text"),
    (('Text',), "token kind 'Text' is none of"),
    (('',), "token kind '' is none of"),
    (('padding',), 'padding is never stored'),
    (('text', 'text:0.5'), "names 'text' twice"),
    (('base:0',), "'base:0' has the share '0'; it must be above 0"),
    (('base:-0.5',), 'must be above 0 and at most 1'),
    (('base:1.5',), 'must be above 0 and at most 1'),
    (('base:nan',), 'must be above 0 and at most 1'),
    (('base:',), "the share ''"),
    (('base:half',), "the share 'half'"),
    ((3,), '3 is no token kind'),
  ],
)
def test_what_means_nothing_is_refused(entries, message):
  with pytest.raises(ValueError, match=message):
    Choice.parse(entries, 'capture.keep')


def test_one_word_is_one_entry():
  assert Choice.parse('bos', 'x') == parse('bos')


def kinds(count, seed=0):
  return np.random.default_rng(seed).integers(0, 7, count).astype(np.uint8)


def test_a_share_is_kept_without_bias_in_every_place():
  kind_T = np.full(50, Kind.TILE, np.uint8)
  kept = np.zeros(50)
  samples = 4000
  for sample in range(samples):
    kept[parse('tile:0.3').keep(7, 'train', sample, kind_T)] += 1
  spread = np.sqrt(0.3 * 0.7 / samples)
  assert abs(kept.mean() / samples - 0.3) < 4 * spread / np.sqrt(50)
  assert np.abs(kept / samples - 0.3).max() < 5 * spread
  assert 0.7 < (kept / samples).std() / spread < 1.4


def test_kinds_are_drawn_each_with_its_own_share():
  kind_T = kinds(20_000)
  chosen = parse('image:0.1', 'answer', 'question:0.8')
  found = kind_T[chosen.keep(1, 'a', 5, kind_T)]
  for kind, share in ((Kind.BASE, 0.1), (Kind.ANSWER, 1), (Kind.QUESTION, 0.8)):
    total = (kind_T == kind).sum()
    assert abs((found == kind).sum() / total - share) < 0.03
  assert not np.isin(found, [Kind.BOS, Kind.TEMPLATE]).any()
  assert (found == Kind.ANSWER).sum() == (kind_T == Kind.ANSWER).sum()


def test_a_smaller_share_is_a_part_of_a_larger_one():
  kind_T = kinds(900)
  few = parse('all:0.2').keep(0, 'b', 3, kind_T)
  many = parse('all:0.6').keep(0, 'b', 3, kind_T)
  assert 0 < len(few) < len(many) < 900
  assert np.isin(few, many).all()


def test_a_share_of_one_keeps_every_token():
  kind_T = kinds(400)
  np.testing.assert_array_equal(
    parse('all:1', 'bos:1.0').keep(0, 'b', 3, kind_T), np.arange(400)
  )


@pytest.mark.parametrize(
  'other', [(1, 'train', 3), (0, 'a', 3), (0, 'train', 4)]
)
def test_the_draw_depends_on_seed_split_and_sample(other):
  kind_T = np.full(2000, Kind.BASE, np.uint8)
  half = parse('base:0.5')
  one = np.isin(np.arange(2000), half.keep(0, 'train', 3, kind_T))
  two = np.isin(np.arange(2000), half.keep(*other, kind_T))
  assert abs(np.corrcoef(one, two)[0, 1]) < 0.1


def test_what_is_drawn_stays_what_it_was():
  """Another hash would give a resumed store rows of two draws."""
  found = choice.draws(
    choice.KEEP, 42, 'a', np.array([0, 0, 9]), np.array([0, 1, 4096])
  )
  assert found.tolist() == [  # the last: again, by hand, in Python's integers
    6680442510744015715,
    14120629436477185540,
    14942810824319996939,
  ]


def test_any_seed_can_be_drawn_from():
  for seed in (0, 2**31, 2**64 - 1):
    draws = choice.draws(
      choice.MIX, seed, 'train', np.arange(99), np.zeros(99, np.int32)
    )
    assert len(np.unique(draws)) == 99


def test_rows_are_mixed_evenly_and_each_once():
  sample_N = np.repeat(np.arange(64), 40)
  position_N = np.tile(np.arange(40), 64)
  order = choice.mixed(3, 'train', sample_N, position_N)
  assert sorted(order) == list(range(len(order)))
  block = sample_N[order[:256]]
  assert len(np.unique(block)) > 55  # of 64; 62.9 are expected
  assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.1


def test_the_order_of_two_rows_depends_on_them_alone():
  sample_N, position_N = np.divmod(np.arange(300), 30)
  order = choice.mixed(3, 'train', sample_N, position_N)
  some = np.sort(np.random.default_rng(0).permutation(300)[:77])
  fewer = choice.mixed(3, 'train', sample_N[some], position_N[some])
  np.testing.assert_array_equal(some[fewer], order[np.isin(order, some)])


def test_what_is_kept_says_nothing_of_where_it_goes():
  """One draw for both would put the rarer kinds of a group first."""
  sample_N, position_N = np.divmod(np.arange(6000), 60)
  kept = choice.unit(
    choice.draws(choice.KEEP, 3, 'train', sample_N, position_N)
  )
  order = choice.mixed(3, 'train', sample_N, position_N)
  assert abs(np.corrcoef(kept[order], np.arange(6000))[0, 1]) < 0.05


def test_a_token_map_is_chosen_from_by_its_kinds():
  text = tokens.text_map(
    np.arange(4, dtype=np.int32), np.array([0, 1, 2, 3], np.uint8)
  )
  found = parse('question', 'bos').keep(0, 'a', 0, text.kind_T)
  assert found.tolist() == [0, 2]
