"""The two halves against the whole model, run slowly and plainly."""

import numpy as np
import pytest
import torch

from lmm_sae.core.records import Edit
from lmm_sae.core.tokens import Kind
from lmm_sae.lmm import edits as edits_lib
from lmm_sae.lmm import forward, gradients, words
from lmm_sae.lmm.forward import Cancelled, Job

LAYER = 1
NEW = 5
EDIT_SETS = {
  'none': (),
  'control': edits_lib.control('all', 'prompt'),
  'paper': (Edit(3, 6.0),),
  'text': (Edit(3, 6.0, where='text', keep_error=True),),
  'span': (Edit(8, 4.0, where='span:feel'),),
  'written': (Edit(3, 6.0, when='generated'),),
  'both': (Edit(3, 6.0, when='both'), Edit(4, mode='ablate', when='both')),
  'mixed': (
    Edit(3, 6.0),
    Edit(5, 2.0, mode='add', when='generated', keep_error=True),
  ),
}


@pytest.fixture(scope='module')
def asked(subject, images):
  """Two prompts with images of different sizes, and one without."""
  question = 'how does the face feel?'
  return [
    forward.ask(subject, subject.chat(question, 1), images[0]),
    forward.ask(subject, subject.chat(question, 1), images[1]),
    forward.ask(subject, subject.chat(question, 0), None),
  ]


def slowly(subject, sae, job: Job, count: int) -> list[int]:
  """Greedy tokens without cache or halves: every step runs the whole model.

  Edits are made by one hook over the whole sequence. The written tokens follow
  the prompt, so an edit of the prompt must leave them alone, and the reverse.
  """
  token_map = job.prompt.map
  length, written = len(token_map.token_T), []

  def change(x_1TD):
    total = x_1TD.shape[1]
    where_ET = torch.zeros(len(job.edits), total, dtype=bool)
    for edit, where_T in zip(job.edits, where_ET, strict=True):
      where_T[:length] = torch.from_numpy(
        edits_lib.prompt_mask(
          edit,
          token_map,
          lambda: words.pieces(subject.tokenizer, token_map),
        )
      )
      where_T[length:] = edits_lib.on_generated(edit)
    if not where_ET.any():
      return None
    wide = sae.top(x_1TD[0], sae.latents)
    return edits_lib.edited(sae, x_1TD[0], wide, job.edits, where_ET)[None]

  for _ in range(count):
    inputs = dict(job.prompt.inputs)
    more = torch.tensor([written], dtype=torch.long)
    inputs['input_ids'] = torch.cat([inputs['input_ids'], more], 1)
    inputs['attention_mask'] = torch.ones_like(inputs['input_ids'])
    with torch.no_grad(), edits_lib.hooked(subject.layer(LAYER), change):
      logits_V = subject.model(**inputs, use_cache=False).logits[0, -1]
    token = int(logits_V.argmax())
    if token in words.end_tokens(subject):
      break
    written.append(token)
  return written


@pytest.mark.parametrize('name', EDIT_SETS)
def test_the_halves_write_what_the_whole_model_writes(
  subject, sae, asked, name
):
  for prompt in asked[::2]:
    job = Job(prompt, LAYER, EDIT_SETS[name])
    (got,) = forward.write(subject, {LAYER: sae}, [job], NEW)
    assert got == slowly(subject, sae, job, NEW)


def test_the_edit_sets_of_these_tests_change_what_is_written(
  subject, sae, asked
):
  jobs = [Job(asked[0], LAYER, edits) for edits in EDIT_SETS.values()]
  texts = forward.write(subject, {LAYER: sae}, jobs, NEW)
  assert len({tuple(text) for text in texts}) > len(texts) // 2


def test_batched_edits_write_what_single_ones_write(
  subject, sae, asked, monkeypatch
):
  jobs = [
    Job(prompt, layer, edits)
    for layer, edits in zip((LAYER, 0) * 4, EDIT_SETS.values(), strict=True)
    for prompt in asked[::2]
  ]
  saes = {LAYER: sae, 0: sae}
  batched = forward.write(subject, saes, jobs, NEW)
  single = [forward.write(subject, saes, [job], NEW)[0] for job in jobs]
  assert batched == single
  monkeypatch.setattr(forward, 'BATCH_TOKENS', 100)
  assert forward.write(subject, saes, jobs, NEW) == single


def test_without_edits_the_answer_is_that_of_plain_generate(
  subject, sae, asked
):
  keep = (Edit(3, 1.0, mode='scale', keep_error=True, when='both'),)
  for prompt in asked:
    whole = subject.model.generate(
      **prompt.inputs, max_new_tokens=NEW, do_sample=False
    )
    ends = words.end_tokens(subject)
    want = [
      token
      for token in whole[0, len(prompt.map.token_T) :].tolist()
      if token not in ends
    ]
    for edits in ((), keep):
      job = Job(prompt, LAYER, edits)
      assert forward.write(subject, {LAYER: sae}, [job], NEW) == [want]


@pytest.mark.parametrize('layer', [0, 1, 2])
def test_every_layer_can_be_the_split(subject, asked, layer):
  jobs = [Job(prompt, layer, ()) for prompt in asked]
  got_BV = forward.next_logits(subject, {}, jobs)
  for prompt, got_V in zip(asked, got_BV, strict=True):
    with torch.no_grad():
      want_V = subject.model(**prompt.inputs).logits[0, -1]
    torch.testing.assert_close(got_V, want_V, atol=1e-5, rtol=1e-5)


def test_an_answer_ends_before_its_end_token(subject, sae, asked, monkeypatch):
  jobs = [Job(prompt, LAYER, ()) for prompt in asked]
  whole = forward.write(subject, {}, jobs, NEW)
  end = whole[0][2]
  monkeypatch.setattr(words, 'end_tokens', lambda _: {end})
  short = forward.write(subject, {}, jobs, NEW)
  for text, full in zip(short, whole, strict=True):
    assert text == full[: full.index(end) if end in full else NEW]
  assert len(short[0]) <= 2


def test_sampling_follows_its_seed_and_place_alone(subject, sae, asked):
  saes = {LAYER: sae}
  jobs = [Job(asked[0], LAYER, ()) for _ in range(4)]
  first = forward.write(subject, saes, jobs, NEW, seed=3)
  assert first == forward.write(subject, saes, jobs, NEW, seed=3)
  assert len({tuple(text) for text in first}) == 4
  assert first != forward.write(subject, saes, jobs, NEW, seed=4)
  others = [*jobs[:2], *[Job(p, LAYER, EDIT_SETS['both']) for p in asked]]
  assert forward.write(subject, saes, others, NEW, seed=3)[:2] == first[:2]


def test_a_lower_half_runs_once_in_the_life_of_its_prompt(
  subject, sae, images, monkeypatch
):
  text = subject.chat('what is this?', 1)
  prompts = [forward.ask(subject, text, image) for image in images]
  jobs = [
    Job(prompt, LAYER, (Edit(latent, 5.0),))
    for latent in range(3)
    for prompt in prompts
  ]
  runs = []
  run = subject.model.forward
  monkeypatch.setattr(
    subject.model, 'forward', lambda **inputs: runs.append(1) or run(**inputs)
  )
  monkeypatch.setattr(forward, 'BATCH_TOKENS', 100)  # one job a batch
  first = forward.write(subject, {LAYER: sae}, jobs, NEW)
  assert len(runs) == 2
  assert forward.write(subject, {LAYER: sae}, jobs, NEW) == first
  assert len(runs) == 2
  assert all(prompt.nbytes > 24 * 4 * 50 for prompt in prompts)
  monkeypatch.setattr(forward, 'KEEP_BYTES', 0)
  assert forward.write(subject, {LAYER: sae}, jobs, NEW) == first
  assert not any(prompt.below for prompt in prompts)
  assert forward.write(subject, {LAYER: sae}, jobs, NEW) == first
  assert len(runs) == 4


def bare(subject) -> bool:
  """Whether no hook and no replacement is left on any layer."""
  layers = [subject.layer(i) for i in range(subject.num_layers)]
  return not any(
    module._forward_hooks or 'forward' in module.__dict__
    for layer in layers
    for module in layer.modules()
  )


def test_hooks_come_off_when_generation_fails(subject, sae, asked, monkeypatch):
  jobs = [Job(asked[0], LAYER, EDIT_SETS['both'])]
  assert forward.write(subject, {LAYER: sae}, jobs, NEW)
  assert bare(subject)
  calls = []

  def fail(*_):
    calls.append(1)
    if len(calls) == 2:
      raise KeyError
    return {}

  with pytest.raises(Cancelled):
    forward.write(subject, {LAYER: sae}, jobs, NEW, check=cancel_after(2))
  assert bare(subject)
  monkeypatch.setattr(subject.model.lm_head, 'forward', fail)
  with pytest.raises((KeyError, AttributeError)):
    forward.write(subject, {LAYER: sae}, jobs, NEW)
  assert bare(subject)
  monkeypatch.undo()
  monkeypatch.setattr(edits_lib, 'edited', fail)
  with pytest.raises((KeyError, TypeError)):
    forward.write(subject, {LAYER: sae}, jobs, NEW)
  assert bare(subject)


def cancel_after(count):
  left = [count]

  def check():
    left[0] -= 1
    if left[0] < 0:
      raise Cancelled

  return check


def test_the_gradient_is_that_of_the_whole_model(subject, asked):
  tokens = (7, 30)
  for prompt in asked:
    caught = []

    def catch(x_1TD, caught=caught):
      caught.append(x_1TD.detach().requires_grad_())
      return caught[0]

    with edits_lib.hooked(subject.layer(LAYER), catch):
      logits_V = subject.model(**prompt.inputs).logits[0, -1]
    wanted = logits_V[tokens[0]] - logits_V[tokens[1]]
    (want_1TD,) = torch.autograd.grad(wanted, caught[0])
    got = gradients.gradient(subject, prompt, LAYER, tokens)
    assert want_1TD.abs().max() > 1e-3
    torch.testing.assert_close(got.grad_TD, want_1TD[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.x_TD, caught[0].detach()[0])
    assert got.logits[0] - got.logits[1] == pytest.approx(
      float(wanted.detach()), abs=1e-4
    )


def test_of_the_last_layer_a_small_ablation_costs_its_price(
  subject, sae, asked
):
  tokens, prompt = (7, 30), asked[2]
  last = subject.num_layers - 1
  found = gradients.gradient(subject, prompt, last, tokens)
  code = sae.encode(found.x_TD)
  latent = int(code.idx_NK[-1, 0])
  price = -float(
    sum(
      val * grad_D @ sae.w_dec_MD[latent]
      for vals_K, idx_K, grad_D in zip(*code, found.grad_TD, strict=True)
      for val, idx in zip(vals_K, idx_K, strict=True)
      if idx == latent
    )
  )
  share = 1e-3
  edit = Edit(latent, 1 - share, mode='scale', keep_error=True)
  jobs = [Job(prompt, last, edits) for edits in ((), (edit,))]
  plain_V, less_V = forward.next_logits(subject, {last: sae}, jobs)
  change_V = (less_V - plain_V) / share
  change = float(change_V[tokens[0]] - change_V[tokens[1]])
  assert abs(price) > 1e-2
  assert change == pytest.approx(price, rel=0.05)


def test_prices_of_many_points_add_up_to_what_all_latents_do(
  subject, sae, asked
):
  """Completeness: the path's ends differ by the sum of the prices."""
  tokens, prompt = (7, 30), asked[2]
  found = gradients.gradient(subject, prompt, LAYER, tokens, sae, 64)
  where_T = torch.from_numpy(prompt.map.where('all'))
  part_TD = torch.zeros_like(found.x_TD)
  code = sae.encode(found.x_TD[where_T])
  part_TD[where_T] = sae.decode(code) - sae.b_dec_D
  lower = forward.below(subject, [prompt], LAYER)
  with torch.no_grad():
    ends = [
      forward.above(subject, lower, x_TD[None])[0][0]
      for x_TD in (found.x_TD, found.x_TD - part_TD)
    ]
  full, none = (float(v[tokens[0]] - v[tokens[1]]) for v in ends)
  assert abs(full - none) > 1e-2
  total = float((found.grad_TD * part_TD).sum())
  assert total == pytest.approx(full - none, rel=0.02)
  assert found.logits[0] - found.logits[1] == pytest.approx(full, abs=1e-4)
  once = gradients.gradient(subject, prompt, LAYER, tokens)
  assert not torch.allclose(once.grad_TD, found.grad_TD, rtol=0.01)


def test_a_prompt_goes_on_with_the_tokens_of_its_answer(subject, images, asked):
  text = subject.chat('how does the face feel?', 1)
  longer = forward.ask(subject, text, images[0], [11, 12])
  assert longer.map.token_T[-2:].tolist() == [11, 12]
  assert longer.map.kind_T[-2:].tolist() == [Kind.ANSWER] * 2
  assert longer.map.grid == asked[0].map.grid
  (after_V,) = forward.next_logits(subject, {}, [Job(longer, LAYER, ())])
  inputs = dict(asked[0].inputs)
  inputs['input_ids'] = torch.cat(
    [inputs['input_ids'], torch.tensor([[11, 12]])], 1
  )
  inputs['attention_mask'] = torch.ones_like(inputs['input_ids'])
  want_V = subject.model(**inputs).logits[0, -1]
  torch.testing.assert_close(after_V, want_V, atol=1e-5, rtol=1e-5)


def test_a_prompt_that_is_too_long_is_refused(subject):
  text = subject.chat('red ' * 2100, 0)
  with pytest.raises(ValueError, match='shorten the text'):
    forward.ask(subject, text, None)


def test_the_pieces_of_a_prompt_make_its_text(subject, asked):
  for prompt in asked:
    pieces = words.pieces(subject.tokenizer, prompt.map)
    image_T = prompt.map.where('image')
    assert not any(np.array(pieces)[image_T])
    assert 'how does the face feel?' in ''.join(pieces)


def test_words_part_at_their_first_differing_token(subject):
  text = subject.chat('what is this?', 0)
  tokenizer, ends = subject.tokenizer, words.end_tokens(subject)

  def ids(word):
    return tokenizer(word, add_special_tokens=False)['input_ids']

  def likely(token):
    logits_V = torch.zeros(len(tokenizer))
    logits_V[token] = 9
    return lambda: logits_V

  for space in ('', ' '):
    pair = (space + 'red', space + 'blue')
    shared, tokens = words.contrast(
      subject, text, ('red', 'blue'), likely(ids(pair[0])[0])
    )
    assert shared == []
    assert tokens == (ids(pair[0])[0], ids(pair[1])[0])
  shared, tokens = words.contrast(
    subject, text, ('cat sits', 'cat looks'), likely(ids('cat')[0])
  )
  assert tokenizer.decode(shared).strip() == 'cat'
  assert tokens == (ids(' sits')[0], ids(' looks')[0])
  shared, tokens = words.contrast(
    subject, text, ('cat', 'cat sits'), likely(ids('cat')[0])
  )
  assert tokenizer.decode(shared).strip() == 'cat'
  assert tokens[0] in ends
  for pair in (('red', 'red'), ('', 'red'), ('red', ' ')):
    with pytest.raises(ValueError, match='do not part'):
      words.contrast(subject, text, pair, likely(0))
