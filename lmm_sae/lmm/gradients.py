"""Gradients of a difference of logits with regard to a layer's output."""

from typing import NamedTuple

import torch

from lmm_sae.lmm import forward
from lmm_sae.lmm.llava import Subject
from lmm_sae.lmm.sae import Sae


class Gradient(NamedTuple):
  """Residual, gradient of logit[token a] - logit[token b], and both logits.

  Over several points the gradient is their mean.
  """

  x_TD: torch.Tensor
  grad_TD: torch.Tensor
  logits: tuple[float, float]


def gradient(
  subject: Subject,
  of: forward.Asked,
  layer: int,
  tokens: tuple[int, int],
  sae: Sae | None = None,
  points: int = 1,
) -> Gradient:
  """Backward from the logits to the layer's output; at x, or integrated.

  Of more than one point it is the mean over the path on which the latents of
  every token but BOS grow from nothing to what they are (integrated gradients,
  Sundararajan et al. 2017, arXiv 1703.01365, by the midpoint rule). Latents
  whose effect is used up at x, or begins only there, are so priced truly.
  """
  lower = forward.below(subject, [of], layer)
  x_TD = lower[0].x_TD
  latents_TD = torch.zeros_like(x_TD)
  shares = [1.0]
  if points > 1:
    where_T = torch.from_numpy(of.map.where('all')).to(x_TD.device)
    code = sae.encode(x_TD[where_T])
    latents_TD[where_T] = (sae.decode(code) - sae.b_dec_D).to(x_TD)
    shares = [(i + 0.5) / points for i in range(points)]
  grad_TD = torch.zeros_like(x_TD, dtype=torch.float32)
  for share in shares:
    x_1TD = (x_TD - (1 - share) * latents_TD)[None].requires_grad_()
    with torch.enable_grad():
      logits_V = forward.above(subject, lower, x_1TD)[0][0]
      wanted = logits_V[tokens[0]] - logits_V[tokens[1]]
      (grad_1TD,) = torch.autograd.grad(wanted, x_1TD)
    grad_TD += grad_1TD[0] / points
  if points > 1:  # the path's last point is not x itself
    with torch.no_grad():
      logits_V = forward.above(subject, lower, x_TD[None])[0][0]
  pair = logits_V[list(tokens)].tolist()
  return Gradient(x_TD, grad_TD, (pair[0], pair[1]))
