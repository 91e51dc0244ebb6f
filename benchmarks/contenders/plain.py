"""A TopK SAE in plain PyTorch, as one writes it in an evening: dense."""

import numpy as np
import torch
from torch.nn import functional as F


class Contender:
  def __init__(self, job, variant):
    del variant
    init = np.load(job['init'])
    self.own = {
      name: torch.from_numpy(init[name]).clone().requires_grad_()
      for name in ('w_enc', 'b_enc', 'w_dec', 'b_dec')
    }
    self.k = job['k']
    self.adam = torch.optim.Adam(self.own.values(), lr=job['lr'])

  def step(self, x_ND: np.ndarray) -> None:
    x, own = torch.from_numpy(x_ND), self.own
    pre = F.relu((x - own['b_dec']) @ own['w_enc'].T + own['b_enc'])
    vals, idx = pre.topk(self.k)
    z = torch.zeros_like(pre).scatter(1, idx, vals)
    error = x - (z @ own['w_dec'] + own['b_dec'])
    (error.pow(2).sum() / (x - x.mean(0)).pow(2).sum()).backward()
    w = own['w_dec']
    with torch.no_grad():
      w.grad -= (w.grad * w).sum(1, keepdim=True) * w
      self.adam.step()
      self.adam.zero_grad()
      w /= w.norm(dim=1, keepdim=True)

  def wait(self) -> None:
    pass

  def params(self) -> dict[str, np.ndarray]:
    return {name: mine.detach().numpy() for name, mine in self.own.items()}
