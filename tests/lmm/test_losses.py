"""The SAE in the loop, against the whole model with hooks of the test's own."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from lmm_sae.core.remote import SubjectClient, Text
from lmm_sae.core.tokens import Kind
from lmm_sae.lmm import forward, losses
from lmm_sae.lmm.service import Service
from tests.lmm import tiny_llava
from tests.lmm.conftest import random_sae
from tests.lmm.serving import running

LAYER, D = 1, tiny_llava.WIDTH
TALKS = (
  ([('user', 'what is this?'), ('assistant', 'a red cat sits.')], 0),
  ([('user', 'how does the face feel?'), ('assistant', 'happy')], 1),
  ([('user', 'you and the mat, yes or no?'), ('assistant', 'no')], None),
)
MEAN_D = np.linspace(-1, 1, D).astype(np.float32)


@pytest.fixture(scope='module')
def texts(subject, images):
  """Two conversations with images of their own, one without."""
  made = []
  for turns, index in TALKS:
    chosen = [] if index is None else [images[index]]
    prompt = subject.conversation(turns, len(chosen))
    tokens = subject.encode(prompt, chosen)
    image = chosen[0] if chosen else None
    made.append(Text(tokens.token_T, tokens.kind_T, image))
  return made


def oracle(subject, text, change=None, where=lambda kind_T: kind_T != Kind.BOS):
  """(logits [T - 1, V] in float64, residual [T, D]) of the whole model.

  `change` makes a new residual of the old at the chosen tokens.
  """
  ids = torch.from_numpy(text.token_T.astype(np.int64))[None]
  inputs = {'input_ids': ids, 'attention_mask': torch.ones_like(ids)}
  if text.image is not None:
    inputs |= subject.pixels([text.image], return_tensors='pt')
  seen = []
  mask_T = torch.from_numpy(where(text.kind_T))

  def hook(module, args, output):
    seen.append(output[0].clone())
    if change is None:
      return None
    new = output.clone()
    new[0, mask_T] = change(output[0, mask_T])
    return new

  handle = subject.model.model.language_model.layers[
    LAYER
  ].register_forward_hook(hook)
  with torch.no_grad():
    logits = subject.model(**inputs).logits[0, :-1].double()
  handle.remove()
  return logits, seen[0]


def figures(logits_TV, clean_TV, text):
  """Cross-entropy and KL by their definitions."""
  p, q = clean_TV.softmax(1), logits_TV.softmax(1)
  targets = text.token_T[1:]
  ce_T = [-math.log(q[t, token]) for t, token in enumerate(targets)]
  return np.array(ce_T), (p * (p / q).log()).sum(1).numpy()


def changes(sae):
  def rebuilt(x_ND):
    pre = (x_ND - sae.b_dec_D) @ sae.w_enc_MD.T + sae.b_enc_M
    act = pre.relu()
    kept = act.topk(sae.k, dim=1)
    z = torch.zeros_like(act).scatter(1, kept.indices, kept.values)
    return z @ sae.w_dec_MD + sae.b_dec_D

  return {
    'clean': None,
    'sae': rebuilt,
    'zero': lambda x_ND: 0 * x_ND,
    'mean': lambda x_ND: torch.from_numpy(MEAN_D).expand_as(x_ND),
  }


@pytest.mark.parametrize(
  'kinds', [('all',), ('image', 'answer'), ('question',)]
)
def test_losses_equal_those_of_the_whole_model_with_a_hook(
  subject, sae, texts, kinds
):
  sets = {
    ('all',): set(Kind) - {Kind.BOS},
    ('image', 'answer'): {Kind.BASE, Kind.TILE, Kind.NEWLINE, Kind.ANSWER},
    ('question',): {Kind.QUESTION},
  }[kinds]

  def where(kind_T):
    return np.array([kind in sets for kind in kind_T])

  wanted = changes(sae)
  got = losses.losses(subject, LAYER, sae, texts, list(wanted), kinds, MEAN_D)
  for text, loss in zip(texts, got, strict=True):
    clean_TV, _ = oracle(subject, text)
    assert loss.ce_RT.shape == (len(wanted), len(text.token_T) - 1)
    for r, change in enumerate(wanted.values()):
      logits_TV, _ = oracle(subject, text, change, where)
      ce_T, kl_T = figures(logits_TV, clean_TV, text)
      np.testing.assert_allclose(loss.ce_RT[r], ce_T, rtol=2e-4, atol=2e-4)
      np.testing.assert_allclose(loss.kl_RT[r], kl_T, rtol=2e-3, atol=2e-4)
  zero_T = got[0].kl_RT[list(wanted).index('zero')]
  assert zero_T.max() > 0.05 or kinds == ('question',)


def test_with_the_error_term_the_loss_is_the_clean_one(subject, sae, texts):
  for loss in losses.losses(
    subject, LAYER, sae, texts, ['clean', 'error', 'sae']
  ):
    clean_T, error_T, sae_T = loss.ce_RT
    np.testing.assert_allclose(error_T, clean_T, atol=1e-4)
    np.testing.assert_allclose(loss.kl_RT[1], 0, atol=1e-5)
    assert np.abs(sae_T - clean_T).max() > 0.1
    np.testing.assert_array_equal(loss.kl_RT[0], 0)


def test_an_identity_sae_changes_nothing(subject, texts):
  """2 D latents, e_d and -e_d: each row is the sum of what fires."""
  eye = torch.eye(D)
  whole = dataclasses.replace(
    random_sae(2 * D, D, 2 * D),
    w_enc_MD=torch.cat([eye, -eye]),
    b_enc_M=torch.zeros(2 * D),
    w_dec_MD=torch.cat([eye, -eye]),
    b_dec_D=torch.zeros(D),
  )
  for loss in losses.losses(subject, LAYER, whole, texts, ['clean', 'sae']):
    np.testing.assert_array_equal(loss.ce_RT[1], loss.ce_RT[0])
    np.testing.assert_array_equal(loss.kl_RT, 0)


def test_given_rows_stand_in_for_the_residual(subject, sae, texts):
  """What the SAE makes of the residual, given, does what the SAE does."""
  given = []
  for text in texts:
    _, x_TD = oracle(subject, text)
    x_hat_TD = sae.decode(sae.encode(x_TD)).numpy()
    given.append(dataclasses.replace(text, given=(x_hat_TD, 0 * x_hat_TD)))
  for loss in losses.losses(subject, LAYER, sae, given, ['sae', 'zero']):
    np.testing.assert_allclose(loss.ce_RT[2], loss.ce_RT[0], atol=2e-4)
    np.testing.assert_allclose(loss.ce_RT[3], loss.ce_RT[1], atol=1e-5)


def test_small_batches_and_small_chunks_change_nothing(
  subject, sae, texts, monkeypatch
):
  want = losses.losses(subject, LAYER, sae, texts, ['clean', 'sae'])
  monkeypatch.setattr(forward, 'BATCH_TOKENS', 1)
  monkeypatch.setattr(losses, 'LOGITS', 3 * 400)
  got = losses.losses(subject, LAYER, sae, texts, ['clean', 'sae'])
  for one, other in zip(got, want, strict=True):
    np.testing.assert_allclose(one.ce_RT, other.ce_RT, atol=2e-4)
    np.testing.assert_allclose(one.kl_RT, other.kl_RT, atol=2e-4)


def test_the_last_layer_can_be_replaced(subject, texts):
  last = subject.num_layers - 1
  zero = losses.losses(subject, last, None, texts, ['zero'])[0].ce_RT[0]
  vocabulary = subject.model.config.get_text_config().vocab_size
  kind_T = texts[0].kind_T[:-1]
  np.testing.assert_allclose(
    zero[kind_T != Kind.BOS], math.log(vocabulary), rtol=1e-5
  )


def test_the_client_gets_the_losses_over_http(subject, sae, texts):
  texts = [
    dataclasses.replace(text, given=(np.ones((len(text.token_T), D)),))
    for text in texts
  ]
  with (
    running(Service(subject, {LAYER: sae})) as url,
    SubjectClient(url, timeout_s=60) as client,
  ):
    names = ['clean', 'sae', 'mean']
    got = client.loss(LAYER, texts, names, ('text',), MEAN_D)
    assert client.loss(LAYER, [], names, mean_D=MEAN_D) == []
  want = losses.losses(subject, LAYER, sae, texts, names, ('text',), MEAN_D)
  for one, other in zip(got, want, strict=True):
    assert one.ce_RT.shape[0] == 4
    np.testing.assert_array_equal(one.ce_RT, other.ce_RT)
    np.testing.assert_array_equal(one.kl_RT, other.kl_RT)


def bad(**changes):
  """A request for one text of three tokens, with something wrong."""
  header = {'layer': LAYER, 'images': [None], 'variants': ['clean']}
  arrays = {
    'token_0': np.array([0, 9, 8], np.int32),
    'kind_0': np.array([0, 2, 3], np.uint8),
  }
  for name, value in changes.items():
    (header if name in ('layer', 'variants', 'kinds', 'given') else arrays)[
      name
    ] = value
  return header, {k: v for k, v in arrays.items() if v is not None}


@pytest.mark.parametrize(
  ('changes', 'match'),
  [
    ({'layer': 7}, 'layer 7 is not in'),
    ({'variants': ['half']}, "variant 'half' is none of"),
    ({'variants': ['mean']}, 'needs the array `mean`'),
    ({'variants': ['mean'], 'mean': np.zeros(3)}, 'mean has shape'),
    ({'kinds': ['verb']}, "token kind 'verb'"),
    ({'token_0': None}, 'lacks the array token_0'),
    ({'token_0': np.zeros(3)}, 'token ids of float64'),
    ({'token_0': np.array([0, 9])}, 'do not pair'),
    ({'token_0': np.array([0, 9, 10**6])}, 'token ids end at'),
    (
      {'token_0': np.array([0]), 'kind_0': np.array([0])},
      'has 1 tokens; tiny reads 2 to',
    ),
    ({'given': 1}, 'lacks the array given_0_0'),
    ({'given': 1, 'given_0_0': np.zeros((2, D))}, r'rows \(2, 24\) are given'),
    ({'variants': ['sae'], 'layer': 0}, 'no SAE of layer 0 is served'),
  ],
)  # fmt: skip
def test_a_bad_request_is_refused(subject, sae, changes, match):
  service = Service(subject, {LAYER: sae})
  with pytest.raises(ValueError, match=match):
    service.answer('loss', *bad(**changes))


def test_an_image_that_does_not_fit_its_tokens_is_refused(
  subject, texts, images
):
  wrong = dataclasses.replace(texts[0], image=images[1])
  with pytest.raises(ValueError, match=r'[Ii]mage'):
    losses.losses(subject, LAYER, None, [wrong], ['clean'])


def test_between_batches_the_work_can_be_cancelled(subject, texts, monkeypatch):
  monkeypatch.setattr(forward, 'BATCH_TOKENS', 1)
  calls = []

  def check():
    calls.append(1)
    if len(calls) == 2:
      raise forward.Cancelled

  with pytest.raises(forward.Cancelled):
    losses.losses(subject, LAYER, None, texts, ['clean'], check=check)
  assert len(calls) == 2
