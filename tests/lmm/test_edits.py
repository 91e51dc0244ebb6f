"""Edit sets against their definition, written densely in numpy."""

import dataclasses

import numpy as np
import pytest
import torch

from lmm_sae.core.records import Edit
from lmm_sae.core.tokens import Kind, text_map
from lmm_sae.lmm import edits as edits_lib
from tests.lmm.conftest import random_sae

N, D, M, K = 7, 6, 12, 3

SETS = {
  'clamp': [Edit(2, 5.0)],
  'clamp low': [Edit(2, -1.0)],
  'clamp, error kept': [Edit(2, 5.0, keep_error=True)],
  'clamp many': [Edit(m, 2.0 + m) for m in (1, 4, 7, 11)],
  'clamp twice': [Edit(3, 9.0), Edit(3, 0.5)],
  'add': [Edit(5, 1.5, mode='add')],
  'add less than nothing': [Edit(5, -1.5, mode='add', keep_error=True)],
  'scale': [Edit(0, 2.0, mode='scale'), Edit(6, 0.5, mode='scale')],
  'ablate': [Edit(m, mode='ablate') for m in range(8)],
  'ablate, error kept': [
    Edit(m, mode='ablate', keep_error=True) for m in range(M)
  ],
  'mixed': [
    Edit(1, 4.0),
    Edit(1, 2.0, mode='scale'),
    Edit(8, mode='ablate', keep_error=True),
    Edit(9, 0.25, mode='add'),
  ],
  'control': list(edits_lib.control('all', 'prompt')),
}


def brute(sae, x_ND, edits, where_EN):
  """The residual after the edits, by their definition."""
  w_enc_MD, b_enc_M, w_dec_MD, b_dec_D = (
    t.numpy() for t in (sae.w_enc_MD, sae.b_enc_M, sae.w_dec_MD, sae.b_dec_D)
  )
  pre_NM = (x_ND - b_dec_D) @ w_enc_MD.T + b_enc_M

  def top(pre_NM):
    act_NM = np.maximum(pre_NM, 0)
    order_NM = np.argsort(-act_NM, 1, kind='stable')
    np.put_along_axis(act_NM, order_NM[:, sae.k :], 0, 1)
    if sae.theta_M is not None:
      act_NM[act_NM <= sae.theta_M.numpy()] = 0
    return act_NM

  def decode(act_NM):
    return act_NM @ w_dec_MD + b_dec_D

  plain_NM = top(pre_NM)
  for edit, where_N in zip(edits, where_EN, strict=True):
    if edit.mode == 'clamp':
      pre_NM[where_N, edit.latent] = edit.value
  act_NM = top(pre_NM)
  for edit, where_N in zip(edits, where_EN, strict=True):
    column_N = act_NM[:, edit.latent]
    if edit.mode != 'clamp':
      column_N[where_N] = {
        'add': column_N + edit.value,
        'scale': column_N * edit.value,
        'ablate': 0 * column_N,
      }[edit.mode][where_N]
  y_ND = x_ND.copy()
  for n in range(len(x_ND)):
    here = [e for e, where_N in zip(edits, where_EN, strict=True) if where_N[n]]
    if any(not edit.keep_error for edit in here):
      y_ND[n] = decode(act_NM[n])
    elif here:
      y_ND[n] += decode(act_NM[n]) - decode(plain_NM[n])
  return y_ND


@pytest.fixture
def x_ND() -> np.ndarray:
  return np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)


@pytest.mark.parametrize('jumps', [False, True])
@pytest.mark.parametrize('k', [1, K, M])
@pytest.mark.parametrize('places', ['all', 'own'])
@pytest.mark.parametrize('name', SETS)
def test_edits_do_what_their_definition_says(name, places, k, jumps, x_ND):
  sae, edits = random_sae(M, D, k), SETS[name]
  if jumps:
    sae = dataclasses.replace(sae, theta_M=torch.linspace(0.2, 2.2, M))
  where_EN = np.random.default_rng(1).random((len(edits), N)) < 0.5
  where_EN |= places == 'all'
  x = torch.from_numpy(x_ND)
  wide = sae.top(x, edits_lib.wide_k(sae, [edits]))
  got_ND = edits_lib.edited(sae, x, wide, edits, torch.from_numpy(where_EN))
  want_ND = brute(sae, x_ND, edits, where_EN)
  np.testing.assert_allclose(got_ND, want_ND, atol=2e-5)
  untouched_N = ~where_EN.any(0)
  np.testing.assert_array_equal(got_ND[untouched_N], x_ND[untouched_N])


def test_a_wider_code_than_needed_changes_nothing(x_ND):
  sae, edits = random_sae(M, D, K), SETS['mixed']
  where_EN = torch.ones(len(edits), N, dtype=bool)
  x = torch.from_numpy(x_ND)
  narrow = sae.top(x, edits_lib.wide_k(sae, [edits]))
  torch.testing.assert_close(
    edits_lib.edited(sae, x, narrow, edits, where_EN),
    edits_lib.edited(sae, x, sae.top(x, M), edits, where_EN),
  )


def test_ablation_lets_no_other_latent_in(x_ND):
  sae = random_sae(M, D, 1)
  x = torch.from_numpy(x_ND)
  fired = sorted(set(sae.encode(x).idx_NK.flatten().tolist()))
  edits = [Edit(m, mode='ablate') for m in fired]
  where_EN = torch.ones(len(edits), N, dtype=bool)
  got_ND = edits_lib.edited(sae, x, sae.top(x, 1), edits, where_EN)
  torch.testing.assert_close(got_ND, sae.b_dec_D.expand(N, -1))


def test_a_peak_is_what_a_value_counts_in():
  edits = (
    Edit(3, 2.0, unit='peak'),
    Edit(4, 2.0, unit='peak', mode='add'),
    Edit(5, 2.0, mode='scale'),
  )
  got = edits_lib.resolve(edits, {'3': 1.5, '4': 0.25}, M)
  assert [edit.value for edit in got] == [3.0, 0.5, 2.0]
  assert {edit.unit for edit in got} == {'absolute'}


@pytest.mark.parametrize(
  ('edit', 'says'),
  [
    (Edit(M), 'latent 12'),
    (Edit(1, 1.0, unit='peak'), 'peak'),
    (Edit(1, 1.0, unit='peak', mode='scale'), 'scale'),
    (Edit(1, 1.0, where='bos'), 'BOS'),
    (Edit(1, 1.0, where='sky'), "'sky'"),
    (Edit(1, 1.0, where='image', when='generated'), 'generated'),
    (Edit(1, 1.0, where='span:red', when='generated'), 'generated'),
  ],
)
def test_an_edit_that_cannot_be_made_is_refused(edit, says):
  with pytest.raises(ValueError, match=says):
    edits_lib.resolve([edit], {}, M)


TOKENS = text_map(
  np.arange(7, dtype=np.int32),
  np.array(
    [
      Kind.BOS,
      Kind.TEMPLATE,
      Kind.BASE,
      Kind.QUESTION,
      Kind.QUESTION,
      Kind.QUESTION,
      Kind.TEMPLATE,
    ],
    np.uint8,
  ),
)
PIECES = ['<s>', 'user ', '', 'is ', 'Boli', 'via', ' is']


@pytest.mark.parametrize(
  ('where', 'marked'),
  [
    ('all', [1, 2, 3, 4, 5, 6]),
    ('text', [1, 3, 4, 5, 6]),
    ('image', [2]),
    ('question', [3, 4, 5]),
    ('span:Bolivia', [4, 5]),
    ('span:is', [3, 6]),
    ('span:<s>user', [1]),
  ],
)
def test_where_names_the_prompts_tokens(where, marked):
  mask_T = edits_lib.prompt_mask(Edit(0, where=where), TOKENS, lambda: PIECES)
  assert np.flatnonzero(mask_T).tolist() == marked


def test_an_edit_of_no_token_is_refused():
  for where in ('tile', 'span:Peru', 'span:', 'answer'):
    with pytest.raises(ValueError, match='no token'):
      edits_lib.prompt_mask(Edit(0, where=where), TOKENS, lambda: PIECES)
  both = Edit(0, where='answer', when='both')
  assert not edits_lib.prompt_mask(both, TOKENS, lambda: PIECES).any()


def test_the_phase_says_whether_written_tokens_are_edited():
  edit = Edit(0, where='answer', when='both')
  assert edits_lib.on_generated(edit)
  assert edits_lib.on_generated(dataclasses.replace(edit, where='all'))
  assert not edits_lib.on_generated(dataclasses.replace(edit, where='image'))
  assert not edits_lib.on_generated(dataclasses.replace(edit, when='prompt'))


def test_hooks_and_replacements_come_off_when_the_block_fails():
  layer = torch.nn.Linear(2, 2)
  x = torch.ones(1, 2)
  before = layer(x)

  def fail():
    with (
      edits_lib.hooked(layer, lambda y: y + 1),
      edits_lib.replaced([layer], lambda x: x),
    ):
      torch.testing.assert_close(layer(x), x + 1)
      raise KeyError

  with pytest.raises(KeyError):
    fail()
  assert 'forward' not in layer.__dict__
  assert torch.equal(layer(x), before)


def test_a_hook_hands_on_the_kind_it_was_given():
  class Pair(torch.nn.Module):
    def forward(self, x):
      return x, 'cache'

  pair = Pair()
  with edits_lib.hooked(pair, lambda y: 2 * y):
    assert pair(torch.ones(1)) == (torch.tensor([2.0]), 'cache')
