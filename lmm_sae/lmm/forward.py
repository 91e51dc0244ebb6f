"""Runs the subject in two halves, split at the edited layer.

What lies below the layer does not feel an edit of its output. So the lower half
(image encoder, decoder layers up to and including the edited one) runs once for
each image and prompt, and the upper half once for each edit set, from the
edited residual on; tokens are then written by the whole model, one by one, with
the keys and values of both halves. Prompts of equal length share a batch: no
padding, so a batch gives what single runs give.
"""

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import DynamicCache

from lmm_sae.core.records import Edit
from lmm_sae.core.tokens import Kind, TokenMap, concatenate, text_map
from lmm_sae.lmm import edits as edits_lib
from lmm_sae.lmm import words
from lmm_sae.lmm.llava import Subject
from lmm_sae.lmm.sae import Code, Sae

# Tokens in one batch: 2**14 rows of keys and values of an 8 B model are 2 GB.
BATCH_TOKENS = 2**14
# Lower halves kept beyond their batch, for later ones of the same prompts.
KEEP_BYTES = 2**28


class Cancelled(Exception):
  """Nobody waits for the answer any more."""


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
  """One image and text, ready for the model; T tokens.

  Attributes:
    inputs: the model's keyword arguments, of batch 1.
    map: what each token is.
    below: the lower halves that have been run, by layer; it grows.
  """

  inputs: dict[str, torch.Tensor]
  map: TokenMap
  below: dict[int, 'Below'] = dataclasses.field(default_factory=dict)

  @property
  def nbytes(self) -> int:
    """Memory of the inputs and of the lower halves."""
    tensors = list(self.inputs.values())
    for half in self.below.values():
      tensors.append(half.x_TD)
      tensors += [t for entry in half.cache for t in (entry.keys, entry.values)]
    return sum(tensor.nbytes for tensor in tensors)


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """One run of the model that is asked for: edits are resolved."""

  prompt: Asked
  layer: int
  edits: tuple[Edit, ...]


class Below(NamedTuple):
  """One prompt's lower half: residual of the layer, and its cache layers."""

  x_TD: torch.Tensor
  cache: list[Any]


class Batch(NamedTuple):
  """Jobs that run together: same layer, equal lengths."""

  places: list[int]
  jobs: list[Job]
  logits_BV: torch.Tensor
  cache: DynamicCache


def ask(
  subject: Subject,
  text: str,
  image: Image.Image | None,
  more: Sequence[int] = (),
) -> Asked:
  """The text (chat template applied), then the tokens `more`, as answer.

  Raises:
    ValueError: it is longer than the model reads.
  """
  images = [[] if image is None else [image]]
  inputs = dict(subject.inputs([text], images, 'left'))
  token_map = subject.token_maps([text], images, inputs)[0]
  if more:
    tail = torch.tensor([list(more)], device=inputs['input_ids'].device)
    for name, extra in (
      ('input_ids', tail),
      ('attention_mask', torch.ones_like(tail)),
    ):
      inputs[name] = torch.cat([inputs[name], extra], 1)
    answer = text_map(
      np.array(more, np.int32), np.full(len(more), Kind.ANSWER, np.uint8)
    )
    token_map = concatenate([token_map, answer], token_map.grid)
  limit = subject.model.config.get_text_config().max_position_embeddings
  if len(token_map.token_T) >= limit:
    raise ValueError(
      f'the prompt has {len(token_map.token_T)} tokens, {subject.name} reads '
      f'{limit}: shorten the text or the image'
    )
  return Asked(inputs, token_map)


def below(
  subject: Subject, prompts: Sequence[Asked], layer: int
) -> list[Below]:
  """The lower halves of prompts of equal length, each run once in its life."""
  missing = [p for p in dict.fromkeys(prompts) if layer not in p.below]
  if missing:
    x_BTD, cache = _run_below(subject, missing, layer)
    for row, prompt in enumerate(missing):
      index = torch.tensor([row], device=x_BTD.device)
      own = [copy.copy(entry) for entry in cache]
      for entry in own:
        entry.batch_select_indices(index.to(entry.keys.device))
      prompt.below[layer] = Below(x_BTD[row].clone(), own)
  return [prompt.below[layer] for prompt in prompts]


def _run_below(subject: Subject, prompts: Sequence[Asked], layer: int):
  caught: list[torch.Tensor] = []
  inputs = {
    name: torch.cat([p.inputs[name] for p in prompts])
    for name in prompts[0].inputs
  }
  cache = _cache(subject)
  upper = [subject.layer(i) for i in range(layer + 1, subject.num_layers)]
  with (
    torch.no_grad(),
    edits_lib.replaced(upper, lambda hidden_states, *_, **__: hidden_states),
    edits_lib.hooked(subject.layer(layer), caught.append),
  ):
    subject.model(
      **inputs, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
  return caught[0], cache.layers[: layer + 1]


def above(
  subject: Subject, lower: Sequence[Below], x_BTD: torch.Tensor
) -> tuple[torch.Tensor, DynamicCache]:
  """Runs the layers above the split from the residual x_BTD.

  Args:
    lower: the lower half that each x belongs to.

  Returns:
    The next token's logits [B, V] in float32, and a cache to go on from.
  """
  cache = _cache(subject)
  split = len(lower[0].cache)
  lower_layers = [subject.layer(i) for i in range(split)]
  with (
    edits_lib.replaced(lower_layers, lambda *_, **__: x_BTD),
    _last_token_only(subject, split),
  ):
    out = subject.model.model.language_model(
      inputs_embeds=x_BTD, past_key_values=cache, use_cache=True
    )
  logits_BV = subject.model.lm_head(out.last_hidden_state[:, -1]).float()
  for i in range(split):
    entries = [half.cache[i] for half in lower]
    cache.layers[i] = copy.copy(entries[0])
    cache.layers[i].keys = torch.cat([entry.keys for entry in entries])
    cache.layers[i].values = torch.cat([entry.values for entry in entries])
  return logits_BV, cache


def _last_token_only(subject: Subject, split: int):
  """Within it the last layer's MLP runs for the last token alone.

  Nothing else of that layer is read. What the MLP returns, [B, 1, D], is spread
  over the other tokens when it is added to the residual, where nobody looks.
  With 6 layers split after the third it spares a quarter of the upper half.
  """
  if split == subject.num_layers:
    return contextlib.nullcontext()
  mlp = subject.layer(subject.num_layers - 1).mlp
  run = mlp.forward
  return edits_lib.replaced([mlp], lambda x: run(x[:, -1:]))


def _cache(subject: Subject) -> DynamicCache:
  return DynamicCache(config=subject.model.config.get_text_config())


def batches(
  subject: Subject,
  saes: dict[int, Sae],
  jobs: Sequence[Job],
  check: Callable[[], None] = lambda: None,
) -> Iterator[Batch]:
  """Runs every job's prompt with its edits; `check` may raise Cancelled."""

  def alike(place: int) -> tuple:
    job = jobs[place]
    pixels = job.prompt.inputs.get('pixel_values')
    shape = () if pixels is None else tuple(pixels.shape)
    return job.layer, len(job.prompt.map.token_T), shape

  kept = 0
  first: dict[Asked, int] = {}
  for place, job in enumerate(jobs):
    first.setdefault(job.prompt, place)
  order = sorted(
    range(len(jobs)), key=lambda i: (alike(i), first[jobs[i].prompt])
  )
  for (layer, length, _), group in itertools.groupby(order, alike):
    chunk, rows = list(group), max(1, BATCH_TOKENS // length)
    for start in range(0, len(chunk), rows):
      check()
      places = chunk[start : start + rows]
      chosen = [jobs[place] for place in places]
      yield Batch(places, chosen, *_batch(subject, saes.get(layer), chosen))
      ahead = [jobs[place].prompt for place in chunk[start + rows :][:1]]
      for prompt in {job.prompt for job in chosen}.difference(ahead):
        kept += prompt.nbytes
        if kept > KEEP_BYTES:
          prompt.below.clear()


def _batch(subject: Subject, sae: Sae | None, jobs: Sequence[Job]):
  """Logits and cache of jobs of one layer and length."""
  lower = below(subject, [job.prompt for job in jobs], jobs[0].layer)
  x_BTD = torch.stack([half.x_TD for half in lower])
  k = edits_lib.wide_k(sae, [job.edits for job in jobs]) if sae else 0
  wide: dict[Asked, Code] = {}
  for row, job in enumerate(jobs):
    if not any(edit.when != 'generated' for edit in job.edits):
      continue
    x_TD = lower[row].x_TD
    if job.prompt not in wide:
      wide[job.prompt] = sae.top(x_TD, k)
    masks_ET = [_mask(subject, job.prompt, edit) for edit in job.edits]
    where_ET = torch.from_numpy(np.stack(masks_ET)).to(x_TD.device)
    x_BTD[row] = edits_lib.edited(
      sae, x_TD, wide[job.prompt], job.edits, where_ET
    )
  return above(subject, lower, x_BTD)


def _mask(subject: Subject, of: Asked, edit: Edit) -> np.ndarray:
  return edits_lib.prompt_mask(
    edit, of.map, lambda: words.pieces(subject.tokenizer, of.map)
  )


def write(
  subject: Subject,
  saes: dict[int, Sae],
  jobs: Sequence[Job],
  max_new_tokens: int,
  seed: int | None = None,
  check: Callable[[], None] = lambda: None,
) -> list[list[int]]:
  """The tokens that the model writes to each job, its end token left out.

  Greedy without a seed; with one, drawn at temperature 1 from a stream that
  depends on the seed and the job's place alone.
  """
  written: list[list[int]] = [[] for _ in jobs]
  ends = words.end_tokens(subject)
  with torch.no_grad():
    for batch in batches(subject, saes, jobs, check):
      draws = [_stream(seed, place) for place in batch.places]
      sae = saes.get(batch.jobs[0].layer)
      steps = _steps(subject, sae, batch, max_new_tokens, draws, ends, check)
      for tokens in steps:
        for place, token in zip(batch.places, tokens, strict=True):
          if token is not None:
            written[place].append(token)
  return written


def _steps(subject, sae, batch, max_new_tokens, draws, ends, check):
  """Yields, step by step, each job's new token; None once it has ended."""
  logits_BV, layer = batch.logits_BV, subject.layer(batch.jobs[0].layer)
  edits = [
    tuple(e for e in job.edits if edits_lib.on_generated(e))
    for job in batch.jobs
  ]
  alive = [True] * len(batch.jobs)

  def change(x_B1D: torch.Tensor) -> torch.Tensor | None:
    if not any(edits):
      return None
    y_B1D, x_BD = x_B1D.clone(), x_B1D[:, 0]
    wide = sae.top(x_BD, edits_lib.wide_k(sae, edits))
    for row, own in enumerate(edits):
      if own and alive[row]:
        one = Code(wide.vals_NK[row : row + 1], wide.idx_NK[row : row + 1])
        where_E1 = torch.ones(len(own), 1, dtype=bool, device=x_BD.device)
        y_B1D[row] = edits_lib.edited(
          sae, x_BD[row : row + 1], one, own, where_E1
        )
    return y_B1D

  for step in range(max_new_tokens):
    tokens = _pick(logits_BV, draws)
    alive = [a and t not in ends for a, t in zip(alive, tokens, strict=True)]
    yield [t if a else None for a, t in zip(alive, tokens, strict=True)]
    if step == max_new_tokens - 1 or not any(alive):
      return
    check()
    with edits_lib.hooked(layer, change):
      out = subject.model.model.language_model(
        input_ids=torch.tensor(tokens, device=logits_BV.device)[:, None],
        past_key_values=batch.cache,
        use_cache=True,
      )
    logits_BV = subject.model.lm_head(out.last_hidden_state[:, -1]).float()


def _stream(seed: int | None, place: int) -> torch.Generator | None:
  if seed is None:
    return None
  state = np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)
  return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def _pick(logits_BV: torch.Tensor, draws) -> list[int]:
  if draws[0] is None:
    return logits_BV.argmax(1).tolist()
  p_BV = logits_BV.softmax(1).cpu()
  return [
    int(torch.multinomial(p_V, 1, generator=draw))
    for p_V, draw in zip(p_BV, draws, strict=True)
  ]


def next_logits(
  subject: Subject, saes: dict[int, Sae], jobs: Sequence[Job]
) -> torch.Tensor:
  """The logits [B, V] of each job's next token, on the CPU."""
  rows: list[torch.Tensor] = [torch.empty(0)] * len(jobs)
  with torch.no_grad():
    for batch in batches(subject, saes, jobs):
      for place, logits_V in zip(batch.places, batch.logits_BV, strict=True):
        rows[place] = logits_V.cpu()
  return torch.stack(rows)
