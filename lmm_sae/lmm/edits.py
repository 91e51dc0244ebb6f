"""Edits of latents, applied to the residual stream at one layer.

An edit set is a tuple of `records.Edit`. Clamps set PRE-activations, before
TopK, so a clamped latent takes a place among the k from another; add, scale and
ablate change the activations after TopK, so no other latent comes in. At the
edited tokens the decoded result replaces the residual (`keep_error` False, the
paper's way), or what decoding changed is added to it (True).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from lmm_sae.core.records import Edit
from lmm_sae.core.tokens import Kind, TokenMap, kinds
from lmm_sae.lmm.sae import Code, Sae, ordered


def control(where: str, when: str) -> tuple[Edit, ...]:
  """The edit set that changes nothing but passes tokens through the SAE."""
  return (Edit(0, 1.0, mode='scale', where=where, when=when),)


def resolve(
  edits: Sequence[Edit], peaks: Mapping[str, float], latents: int
) -> tuple[Edit, ...]:
  """The edits with absolute values; `peaks` is {str(latent): peak}.

  Raises:
    ValueError: a latent that the SAE lacks, BOS, or a peak that is missing.
  """
  resolved = []
  for edit in edits:
    if edit.latent >= latents:
      raise ValueError(
        f'edit: latent {edit.latent}, but the SAE has {latents} (from 0)'
      )
    if edit.where == 'bos':
      raise ValueError('edit: the SAE is not trained on BOS: leave it alone')
    if not edit.where.startswith('span:'):
      kinds(edit.where)
    if edit.when == 'generated' and not on_generated(edit):
      raise ValueError(f'edit: no generated token is of {edit.where!r}')
    if edit.unit == 'peak' and edit.mode == 'scale':
      raise ValueError('edit: scale takes a factor: its unit is absolute')
    if edit.unit == 'peak' and edit.mode != 'ablate':
      if str(edit.latent) not in peaks:
        raise ValueError(
          f'edit: latent {edit.latent} counts in its peak, and the request '
          'gives none in `peaks`'
        )
      peak = peaks[str(edit.latent)]
      edit = dataclasses.replace(edit, value=edit.value * peak, unit='absolute')
    resolved.append(edit)
  return tuple(resolved)


def prompt_mask(
  edit: Edit, token_map: TokenMap, pieces: Callable[[], list[str]]
) -> np.ndarray:
  """Boolean [T]: the prompt's tokens that the edit changes.

  `pieces` gives the text of each token, '' for the image's; only asked for
  spans.

  Raises:
    ValueError: the edit is for the prompt and no token of it is meant.
  """
  if edit.when == 'generated':
    return np.zeros(len(token_map.token_T), bool)
  if edit.where.startswith('span:'):
    mask_T = span_mask(pieces(), edit.where.removeprefix('span:'))
    mask_T &= token_map.kind_T != Kind.BOS
  else:
    mask_T = token_map.where(edit.where)
  if not mask_T.any() and not (edit.when == 'both' and on_generated(edit)):
    raise ValueError(f'edit: the prompt has no token of {edit.where!r}')
  return mask_T


def span_mask(pieces: Sequence[str], words: str) -> np.ndarray:
  """Boolean [T]: tokens whose text overlaps an occurrence of `words`."""
  mask_T = np.zeros(len(pieces), bool)
  ends_T = np.cumsum([len(piece) for piece in pieces])
  starts_T = ends_T - [len(piece) for piece in pieces]
  text, at = ''.join(pieces), -1
  while words and (at := text.find(words, at + 1)) >= 0:
    mask_T |= (starts_T < at + len(words)) & (ends_T > at)
  return mask_T


def on_generated(edit: Edit) -> bool:
  """Whether the edit changes tokens that the model writes."""
  if edit.when == 'prompt' or edit.where.startswith('span:'):
    return False
  return Kind.ANSWER in kinds(edit.where)


def wide_k(sae: Sae, edit_sets: Sequence[Sequence[Edit]]) -> int:
  """How many activations a row suffice to make any of the edit sets exactly.

  Clamping c latents can bring in at most c of those behind the k-th.
  """
  clamped = [
    len({edit.latent for edit in edits if edit.mode == 'clamp'})
    for edits in edit_sets
  ]
  return min(sae.k + max(clamped, default=0), sae.latents)


def edited(
  sae: Sae,
  x_ND: torch.Tensor,
  wide: Code,
  edits: Sequence[Edit],
  where_EN: torch.Tensor,
  /,
) -> torch.Tensor:
  """The residual with the edits made; rows that none touches stay bit by bit.

  Args:
    x_ND: residual.
    wide: `sae.top(x_ND, wide_k(...))`, shared by the edit sets of one prompt.
    edits: resolved; later ones of a latent act on the outcome of earlier ones.
    where_EN: boolean, the rows that each edit changes.
  """
  any_N = where_EN.any(0)
  x_nD = x_ND[any_N].to(sae.b_dec_D)
  where_En = where_EN[:, any_N]
  before = Code(wide.vals_NK[any_N], wide.idx_NK[any_N])
  plain = sae.fire(before)
  code = _changed(
    sae, _clamped(sae, x_nD, before, edits, where_En), edits, where_En
  )
  y_nD = sae.decode(code)
  keep_E = torch.tensor([e.keep_error for e in edits], device=x_ND.device)
  replaced_n = where_En[~keep_E].any(0)
  if not replaced_n.all():
    kept_nD = x_nD + (y_nD - sae.decode(plain))
    y_nD = torch.where(replaced_n[:, None], y_nD, kept_nD)
  y_ND = x_ND.clone()
  y_ND[any_N] = y_nD.to(x_ND.dtype)
  return y_ND


def _clamped(sae, x_ND, wide, edits, where_EN) -> Code:
  """The k largest once the pre-activations of the clamped latents are set."""
  latents = sorted({e.latent for e in edits if e.mode == 'clamp'})
  if not latents:
    return sae.fire(wide)
  latents_L = torch.tensor(latents, device=x_ND.device)
  own_NL = sae.pre(x_ND, latents_L)
  for edit, where_N in zip(edits, where_EN, strict=True):
    if edit.mode == 'clamp':
      own_NL[where_N, latents.index(edit.latent)] = edit.value
  others_NK = wide.vals_NK.masked_fill(
    torch.isin(wide.idx_NK, latents_L), -1.0
  )  # behind every activation, all of which are >= 0
  code = ordered(
    torch.cat([others_NK, own_NL.relu()], 1),
    torch.cat([wide.idx_NK, latents_L.expand(len(x_ND), -1)], 1),
  )
  code = sae.fire(code)
  return code._replace(vals_NK=code.vals_NK.relu())


def _changed(sae, code, edits, where_EN) -> Code:
  """The code after add, scale and ablate, their latents in own columns.

  An activation may end below zero: a negative `add` pushes away.
  """
  latents = sorted({e.latent for e in edits if e.mode != 'clamp'})
  if not latents:
    return code
  latents_L = torch.tensor(latents, device=code.idx_NK.device)
  place_M = torch.full((sae.latents,), len(latents), device=latents_L.device)
  place_M[latents_L] = torch.arange(len(latents), device=latents_L.device)
  place_NK = place_M[code.idx_NK]
  own_NL = code.vals_NK.new_zeros(len(code.vals_NK), len(latents) + 1)
  own_NL = own_NL.scatter_add_(1, place_NK, code.vals_NK)[:, :-1]
  for edit, where_N in zip(edits, where_EN, strict=True):
    if edit.mode == 'clamp':
      continue
    column_N = own_NL[:, latents.index(edit.latent)]
    after_N = {
      'add': column_N + edit.value,
      'scale': column_N * edit.value,
      'ablate': torch.zeros_like(column_N),
    }[edit.mode]
    own_NL[:, latents.index(edit.latent)] = torch.where(
      where_N, after_N, column_N
    )
  others_NK = code.vals_NK.masked_fill(place_NK < len(latents), 0.0)
  return Code(
    torch.cat([others_NK, own_NL], 1),
    torch.cat([code.idx_NK, latents_L.expand(len(own_NL), -1)], 1),
  )


@contextlib.contextmanager
def hooked(
  module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
  """Within it the module's output is `change` of it, unless that is None.

  The hook comes off however the block ends. Decoder layers return a tensor, in
  older models a tuple that starts with it; the same kind is handed on.
  """

  def hook(module, args, output):
    del module, args
    if not isinstance(output, tuple):
      return change(output)
    new = change(output[0])
    return None if new is None else (new, *output[1:])

  handle = module.register_forward_hook(hook)
  try:
    yield
  finally:
    handle.remove()


@contextlib.contextmanager
def replaced(
  modules: Sequence[nn.Module], forward: Callable[..., torch.Tensor]
) -> Iterator[None]:
  """Within it the modules' forward is `forward`; put back however it ends."""
  before = [module.__dict__.get('forward') for module in modules]
  try:
    for module in modules:
      module.forward = forward
    yield
  finally:
    for module, own in zip(modules, before, strict=True):
      if own is None:
        module.__dict__.pop('forward', None)
      else:
        module.forward = own
