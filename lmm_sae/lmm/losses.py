"""What the model's predictions lose while something stands in for a residual.

The conversations are those that were captured, token by token. The decoder
layers up to the one that is replaced run once; those above it run once for
each variant of the residual:

  clean  as it is
  sae    the SAE's reconstruction
  error  the reconstruction plus what it misses: equals clean but for rounding
  zero   0
  mean   one row that the request gives
  given  rows that the request gives, of an SAE that is not served

at the tokens of the chosen kinds; the other tokens keep what the model made.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from lmm_sae.core import tokens
from lmm_sae.core.remote import Loss, Text
from lmm_sae.core.tokens import text_map
from lmm_sae.lmm import edits as edits_lib
from lmm_sae.lmm import forward
from lmm_sae.lmm.llava import Subject
from lmm_sae.lmm.sae import Sae

VARIANTS = ('clean', 'sae', 'error', 'zero', 'mean')
# Logits held at once: 2**24 in float32 are 64 MB, 128 tokens of a vocabulary
# of 131,072.
LOGITS = 2**24


def losses(
  subject: Subject,
  layer: int,
  sae: Sae | None,
  texts: Sequence[Text],
  variants: Sequence[str],
  kinds: Sequence[str] = ('all',),
  mean_D: np.ndarray | None = None,
  check: Callable[[], None] = lambda: None,
) -> list[Loss]:
  """The losses of each text: rows are `variants`, then what it gives.

  Args:
    sae: of the layer; needed for `sae` and `error`.
    kinds: tokens that are replaced, as in `tokens.kinds`.
    mean_D: needed for `mean`.
    check: called between batches; may raise forward.Cancelled.

  Raises:
    ValueError: a variant that is unknown or lacks what it needs, or a text
      that the model cannot read.
  """
  unknown = set(variants) - set(VARIANTS)
  if unknown:
    raise ValueError(f'variant {unknown.pop()!r} is none of {VARIANTS}')
  if mean_D is None and 'mean' in variants:
    raise ValueError('the variant mean needs the array `mean`')
  replaced = {kind for name in kinds for kind in tokens.kinds(name)}
  _check(subject, texts, mean_D)
  found: list[Loss | None] = [None] * len(texts)
  with torch.no_grad():
    for places in _batches(texts):
      check()
      members = [texts[place] for place in places]
      x_BTD = _below(subject, layer, members)
      where_BT = torch.zeros(x_BTD.shape[:2], dtype=bool, device=x_BTD.device)
      for row, text in enumerate(members):
        mask_T = np.isin(text.kind_T, [int(kind) for kind in replaced])
        where_BT[row, : len(mask_T)] = torch.from_numpy(mask_T)
      made = _variants(sae, x_BTD, where_BT, members, variants, mean_D)
      clean_BTD = _above(subject, layer, x_BTD)
      tops = [
        clean_BTD if y_BTD is None else _above(subject, layer, y_BTD)
        for y_BTD in made
      ]
      for row, (place, text) in enumerate(zip(places, members, strict=True)):
        count = len(text.token_T)
        found[place] = _loss(
          subject,
          clean_BTD[row, : count - 1],
          [top_BTD[row, : count - 1] for top_BTD in tops],
          text.token_T[1:],
        )
  return found


def _check(subject: Subject, texts: Sequence[Text], mean_D) -> None:
  vocabulary = subject.model.config.get_text_config().vocab_size
  for number, text in enumerate(texts):
    shape = (len(text.token_T), subject.width)
    if text.token_T.ndim != 1 or text.kind_T.shape != text.token_T.shape:
      raise ValueError(
        f'text {number}: tokens {text.token_T.shape} and kinds '
        f'{text.kind_T.shape} do not pair'
      )
    if not np.issubdtype(text.token_T.dtype, np.integer):
      raise ValueError(f'text {number}: token ids of {text.token_T.dtype}')
    if not 2 <= shape[0] <= subject.max_tokens:
      raise ValueError(
        f'text {number} has {shape[0]} tokens; {subject.name} reads 2 to '
        f'{subject.max_tokens}'
      )
    if not ((text.token_T >= 0) & (text.token_T < vocabulary)).all():
      raise ValueError(f'text {number}: token ids end at {vocabulary}')
    for rows_TD in text.given:
      if rows_TD.shape != shape:
        raise ValueError(
          f'text {number}: rows {rows_TD.shape} are given, not {shape}'
        )
  if mean_D is not None and mean_D.shape != (subject.width,):
    raise ValueError(f'mean has shape {mean_D.shape}, not ({subject.width},)')


def _batches(texts: Sequence[Text]) -> Iterator[list[int]]:
  """Texts of like length, with or without image, at most BATCH_TOKENS."""

  def alike(place: int) -> tuple[bool, int]:
    text = texts[place]
    return text.image is not None, len(text.token_T)

  order = sorted(range(len(texts)), key=alike)
  for _, group in itertools.groupby(order, lambda place: alike(place)[0]):
    batch: list[int] = []
    for place in group:
      longest = len(texts[place].token_T)  # they come in order of length
      if batch and (len(batch) + 1) * longest > forward.BATCH_TOKENS:
        yield batch
        batch = []
      batch.append(place)
    yield batch


def _below(subject: Subject, layer: int, texts: Sequence[Text]) -> torch.Tensor:
  """The layer's output; shorter texts are padded on the right."""
  inputs = subject.batch(
    [text_map(text.token_T, text.kind_T) for text in texts],
    [[] if text.image is None else [text.image] for text in texts],
  )
  return subject.residuals(inputs, [layer])[layer]


def _above(subject: Subject, layer: int, x_BTD: torch.Tensor) -> torch.Tensor:
  """What the layers above make of it, [B, T, D] after the last norm.

  Attention looks back alone, so the padding on the right is not seen.
  """
  lower = [subject.layer(i) for i in range(layer + 1)]
  with edits_lib.replaced(lower, lambda *_, **__: x_BTD):
    out = subject.model.model.language_model(
      inputs_embeds=x_BTD, use_cache=False
    )
  return out.last_hidden_state


def _variants(
  sae, x_BTD, where_BT, texts, variants, mean_D
) -> Iterator[torch.Tensor | None]:
  """The residual of each variant; None for the clean one."""
  x_nD = x_BTD[where_BT].float()

  def put(y_nD: torch.Tensor) -> torch.Tensor:
    y_BTD = x_BTD.clone()
    y_BTD[where_BT] = y_nD.to(x_BTD.dtype)
    return y_BTD

  if {'sae', 'error'} & set(variants):
    x_hat_nD = sae.decode(sae.encode(x_nD))
  for name in variants:
    if name == 'clean':
      yield None
    elif name == 'sae':
      yield put(x_hat_nD)
    elif name == 'error':
      yield put(x_hat_nD + (x_nD - x_hat_nD))
    elif name == 'zero':
      yield put(torch.zeros_like(x_nD))
    else:
      row_D = torch.from_numpy(mean_D.astype(np.float32)).to(x_nD)
      yield put(row_D.expand_as(x_nD))
  for rows in zip(*(text.given for text in texts), strict=True):
    y_BTD = x_BTD.clone()
    for row, rows_TD in enumerate(rows):
      where_T = where_BT[row, : len(rows_TD)]
      new_TD = torch.from_numpy(rows_TD.astype(np.float32)).to(x_BTD)
      y_BTD[row, : len(rows_TD)][where_T] = new_TD[where_T]
    yield y_BTD


def _loss(
  subject: Subject,
  clean_TD: torch.Tensor,
  tops: Sequence[torch.Tensor],
  next_T: np.ndarray,
) -> Loss:
  """Cross-entropy and KL of one text, some tokens at a time."""
  head = subject.model.lm_head
  size = max(1, LOGITS // head.out_features)
  next_T1 = torch.from_numpy(next_T.astype(np.int64))[:, None]
  ce_RT = np.zeros((len(tops), len(next_T)), np.float32)
  kl_RT = np.zeros_like(ce_RT)
  for start in range(0, len(next_T), size):
    part = slice(start, start + size)
    clean_tV = head(clean_TD[part]).float().log_softmax(1)
    p_tV, target_t1 = clean_tV.exp(), next_T1[part].to(clean_tV.device)
    for r, top_TD in enumerate(tops):
      log_tV = clean_tV
      if top_TD.data_ptr() != clean_TD.data_ptr():
        log_tV = head(top_TD[part]).float().log_softmax(1)
        kl_RT[r, part] = (p_tV * (clean_tV - log_tV)).sum(1).cpu().numpy()
      ce_RT[r, part] = -log_tV.gather(1, target_t1)[:, 0].cpu().numpy()
  return Loss(ce_RT, kl_RT)
