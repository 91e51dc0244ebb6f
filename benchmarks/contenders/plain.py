"""The recipe of arXiv 2411.14982 in plain PyTorch, as one writes it: dense.

Dense ReLU, topk, the code scattered to [N, M] and decoded by a dense product,
FVU, the gradient of W_dec without its part along each row, Adam, rows of unit
norm. Left out for all alike: warm-up, clipping, AuxK.

shipped  torch as it comes
tuned    matmul precision `medium`, fused Adam, and freed memory is kept
"""

import numpy as np
import torch
from torch.nn import functional as F


class Contender:
  def __init__(self, job, variant, init):
    tuned = variant == 'tuned'
    torch.set_float32_matmul_precision('medium' if tuned else 'highest')
    self.own = {
      name: torch.from_numpy(one).clone().requires_grad_()
      for name, one in init.items()
    }
    self.k = job['k']
    self.adam = torch.optim.Adam(self.own.values(), lr=job['lr'], fused=tuned)

  def step(self, x_ND: np.ndarray) -> None:
    x, own = torch.from_numpy(x_ND), self.own
    pre = F.relu(F.linear(x - own['b_dec'], own['w_enc'], own['b_enc']))
    vals, idx = pre.topk(self.k, sorted=False)
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
