"""The SAE in Torch, for the server: the same numbers as `lmm_sae.sae`.

Read from the sparsify layout: a folder with cfg.json {k, ...} and
sae.safetensors {encoder.weight [M, D], encoder.bias [M], W_dec [M, D],
b_dec [D]}; the published SAEs of arXiv 2411.14982 have it too. What was trained
with another activation than TopK has a threshold [M] beside them.
"""

import dataclasses
import json
import pathlib
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch.nn import functional

# Pre-activations held at once: 2**26 in float32 are 256 MB, at M = 131,072
# latents 512 rows.
_PRE_ACTIVATIONS = 2**26


class Code(NamedTuple):
  """Activations and latents of each row, the largest first; rest zero."""

  vals_NK: torch.Tensor
  idx_NK: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Sae:
  """z = A(relu((x - b_dec) W_encᵀ + b_enc)), x̂ = z W_dec + b_dec.

  A keeps the k largest of a row, and of those what is above theta.
  All in float32 whatever the subject's dtype: rounding the pre-activations
  changes which latents are among the k. At M = 131,072 and D = 4096 the two
  matrices take 4.3 GB.
  """

  w_enc_MD: torch.Tensor
  b_enc_M: torch.Tensor
  w_dec_MD: torch.Tensor
  b_dec_D: torch.Tensor
  k: int
  theta_M: torch.Tensor | None = None  # None: 0

  @property
  def latents(self) -> int:
    return self.w_enc_MD.shape[0]

  @property
  def width(self) -> int:
    return self.w_enc_MD.shape[1]

  def top(self, x_ND: torch.Tensor, /, k: int) -> Code:
    """The k largest activations of each row, ties to the lower latent."""
    rows = max(1, _PRE_ACTIVATIONS // self.latents)
    k = min(k, self.latents)
    parts = [self._top(x, k) for x in x_ND.split(rows)]
    if not parts:
      parts = [self._top(x_ND, k)]
    vals, idx = zip(*parts, strict=True)
    return Code(torch.cat(vals), torch.cat(idx))

  def _top(self, x_ND: torch.Tensor, k: int) -> Code:
    x_ND = x_ND.to(self.w_enc_MD) - self.b_dec_D
    act_NM = torch.relu_(torch.addmm(self.b_enc_M, x_ND, self.w_enc_MD.mT))
    vals_NK, idx_NK = act_NM.topk(k, dim=1)
    # topk leaves open which of equal activations it takes; those that straddle
    # its edge are rare, so only their rows are sorted whole. Zeros do not fire.
    least_N = vals_NK[:, -1]
    torn_N = ((act_NM >= least_N[:, None]).sum(1) > k) & (least_N > 0)
    if torn_N.any():
      sort = act_NM[torn_N].sort(dim=1, descending=True, stable=True)
      vals_NK[torn_N], idx_NK[torn_N] = sort[0][:, :k], sort[1][:, :k]
    return ordered(vals_NK, idx_NK)

  def encode(self, x_ND: torch.Tensor, /) -> Code:
    """The sparse code of each row."""
    return self.fire(self.top(x_ND, self.k))

  def fire(self, code: Code, /) -> Code:
    """The k largest of a code, with 0 for what is not above its threshold."""
    vals_NK, idx_NK = code.vals_NK[:, : self.k], code.idx_NK[:, : self.k]
    if self.theta_M is not None:
      vals_NK = vals_NK * (vals_NK > self.theta_M[idx_NK])
    return Code(vals_NK, idx_NK)

  def pre(self, x_ND: torch.Tensor, latents_L: torch.Tensor, /) -> torch.Tensor:
    """The pre-activations [N, L] of some latents, before relu and TopK."""
    w_LD = self.w_enc_MD[latents_L]
    x_ND = x_ND.to(w_LD) - self.b_dec_D
    return torch.addmm(self.b_enc_M[latents_L], x_ND, w_LD.mT)

  def decode(self, code: Code, /) -> torch.Tensor:
    """The reconstruction x̂_ND in float32; no [N, K, D] is made."""
    if not code.vals_NK.numel():
      return self.b_dec_D.expand(code.vals_NK.shape[0], -1)
    sum_ND = functional.embedding_bag(
      code.idx_NK, self.w_dec_MD, per_sample_weights=code.vals_NK, mode='sum'
    )
    return sum_ND + self.b_dec_D


def ordered(vals_NK: torch.Tensor, idx_NK: torch.Tensor) -> Code:
  """The entries of each row by falling value, of equal ones by latent."""
  idx_NK, order_NK = idx_NK.sort(dim=1)
  vals_NK, by_NK = vals_NK.gather(1, order_NK).sort(
    dim=1, descending=True, stable=True
  )
  return Code(vals_NK, idx_NK.gather(1, by_NK))


def load(path: str | pathlib.Path, device: str = 'cpu') -> Sae:
  """The SAE of a folder in sparsify layout.

  Raises:
    ValueError: no such folder, a missing tensor, or shapes that do not agree.
  """
  path = pathlib.Path(path)
  for name in ('cfg.json', 'sae.safetensors'):
    if not (path / name).is_file():
      raise ValueError(f'{path} has no {name}: it is no SAE in sparsify layout')
  config = json.loads((path / 'cfg.json').read_text())
  tensors = load_file(path / 'sae.safetensors', device)
  names = ('encoder.weight', 'encoder.bias', 'W_dec', 'b_dec')
  missing = [name for name in names if name not in tensors]
  if missing or 'k' not in config:
    raise ValueError(f'{path} lacks {", ".join(missing) or "k in cfg.json"}')
  w_enc, b_enc, w_dec, b_dec = (
    tensors[name].to(torch.float32).contiguous() for name in names
  )
  latents, width = w_enc.shape
  shapes = [tuple(t.shape) for t in (b_enc, w_dec, b_dec)]
  if shapes != [(latents,), (latents, width), (width,)]:
    raise ValueError(f'{path}: encoder {tuple(w_enc.shape)} against {shapes}')
  if not 0 < config['k'] <= latents:
    raise ValueError(f'{path}: k {config["k"]} of {latents} latents')
  theta = tensors.get('threshold')
  if theta is None and config.get('activation', 'topk') != 'topk':
    raise ValueError(f'{path}: a {config["activation"]} SAE has a threshold')
  if theta is not None:
    theta = theta.to(torch.float32)
    if tuple(theta.shape) != (latents,):
      raise ValueError(f'{path}: threshold {tuple(theta.shape)}')
  return Sae(w_enc, b_enc, w_dec, b_dec, int(config['k']), theta)
