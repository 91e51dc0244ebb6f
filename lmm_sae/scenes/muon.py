"""Muon for matrices, AdamW for the rest, in one small optimiser.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) orthogonalises the
momentum of each matrix by a Newton-Schulz iteration. Matrices of one shape are
iterated as one batch. Its step is scaled by .2 sqrt(max(rows, columns)), so
that its root mean square equals AdamW's (Liu et al. 2025, arXiv 2502.16982).
"""

import torch
from torch import Tensor

from lmm_sae.scenes.team import Team

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(x: Tensor, iterations: int = 4) -> Tensor:
  """Nearest semi-orthogonal matrices of a batch [n, rows, columns]."""
  tall = x.shape[1] > x.shape[2]
  if tall:
    x = x.transpose(1, 2)
  x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
  a, b, c = _QUINTIC
  for _ in range(iterations):
    gram = x @ x.transpose(1, 2)
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x.transpose(1, 2) if tall else x


class Muon:
  """Steps named parameters; `scale` maps a name to a factor of the rate.

  Every member of a team holds all the state and orthogonalises its share.
  """

  def __init__(
    self,
    params: dict[str, Tensor],
    scale,
    team: Team = Team(),  # noqa: B008, it is frozen
    decay: float = 0.02,
  ):
    self.params = params
    self.team = team
    self.scale = {name: scale(name) for name in params}
    self.decay = decay
    self.matrices: dict[tuple, list[str]] = {}
    for name, p in params.items():
      if p.ndim == 2 and 'embed' not in name and not name.startswith('heads'):
        self.matrices.setdefault(tuple(p.shape), []).append(name)
    hidden = {name for names in self.matrices.values() for name in names}
    self.rest = [name for name in params if name not in hidden]
    self.m = {name: torch.zeros_like(p) for name, p in params.items()}
    self.v = {name: torch.zeros_like(params[name]) for name in self.rest}
    self.count = dict.fromkeys(self.rest, 0)

  @torch.no_grad()
  def step(self, muon_rate: float, adam_rate: float) -> None:
    """One update of every parameter that has a gradient; clears gradients."""
    share = slice(self.team.rank, None, self.team.size)
    todo, updates_of = [], []
    for shape, names in self.matrices.items():
      names = [n for n in names if self.params[n].grad is not None]
      if not names:
        continue
      updates = []
      for name in names:
        grad = self.params[name].grad
        self.m[name].lerp_(grad, 0.05)
        updates.append(grad.lerp(self.m[name], 0.95))
      made = torch.zeros(len(names), *shape)
      if mine := updates[share]:
        made[share] = orthogonalise(torch.stack(mine))
      todo.append((shape, names))
      updates_of.append(made)
    self.team.sum(updates_of)
    for (shape, names), updates in zip(todo, updates_of, strict=True):
      size = 0.2 * max(shape) ** 0.5
      for name, update in zip(names, updates, strict=True):
        rate = muon_rate * self.scale[name]
        self.params[name].mul_(1 - rate * self.decay)
        self.params[name].add_(update, alpha=-rate * size)
        self.params[name].grad = None
    for name in self.rest:
      p = self.params[name]
      if p.grad is None:
        continue
      self.count[name] += 1
      t = self.count[name]
      self.m[name].lerp_(p.grad, 0.1)
      self.v[name].lerp_(p.grad.square(), 0.02)
      m = self.m[name] / (1 - 0.9**t)
      v = self.v[name] / (1 - 0.98**t)
      p.addcdiv_(m, v.sqrt() + 1e-8, value=-adam_rate * self.scale[name])
      p.grad = None

  def state(self) -> dict:
    return {'m': self.m, 'v': self.v, 'count': self.count}

  def load(self, state: dict) -> None:
    self.m, self.v, self.count = state['m'], state['v'], state['count']
