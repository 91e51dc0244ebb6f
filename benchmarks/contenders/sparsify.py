"""EleutherAI's sparsify: its SparseCoder, stepped as its Trainer.fit does.

shipped   matmul precision `high`, torch.optim.Adam, float32
tuned     matmul precision `medium`, fused Adam, and freed memory is kept
autocast  bfloat16 autocast, which its forward has on CUDA alone
compile   torch.compile of its forward

A variant is one of these words or several, with `-` between.
"""

import contextlib

import numpy as np
import torch
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig


class Contender:
  def __init__(self, job, variant, init):
    words = variant.split('-')
    tuned = 'tuned' in words
    torch.set_float32_matmul_precision('medium' if tuned else 'high')
    config = SparseCoderConfig(num_latents=job['latents'], k=job['k'])
    self.sae = SparseCoder(job['width'], config)
    with torch.no_grad():
      for mine, name in self.named():
        mine.copy_(torch.from_numpy(init[name]))
    self.adam = torch.optim.Adam(
      self.sae.parameters(), lr=job['lr'], fused=tuned
    )
    self.idle = torch.zeros(job['latents'], dtype=torch.long)
    self.fired = torch.zeros(job['latents'], dtype=torch.bool)
    self.cast = 'autocast' in words
    self.forward = self.sae
    if 'compile' in words:
      self.forward = torch.compile(self.sae)

  def named(self):
    yield self.sae.encoder.weight, 'w_enc'
    yield self.sae.encoder.bias, 'b_enc'
    yield self.sae.W_dec, 'w_dec'
    yield self.sae.b_dec, 'b_dec'

  def step(self, x_ND: np.ndarray) -> None:
    x = torch.from_numpy(x_ND)
    self.sae.set_decoder_norm_to_unit_norm()
    variance = (x - x.mean(0)).pow(2).sum()
    cast = torch.autocast('cpu', torch.bfloat16)
    with cast if self.cast else contextlib.nullcontext():
      out = self.forward(x, total_variance=variance)
    self.fired[out.latent_indices.flatten()] = True
    float(out.fvu.detach())
    out.fvu.backward()
    self.sae.remove_gradient_parallel_to_decoder_directions()
    self.adam.step()
    self.adam.zero_grad()
    self.idle += len(x)
    self.idle[self.fired] = 0
    self.fired.zero_()

  def wait(self) -> None:
    pass

  def params(self) -> dict[str, np.ndarray]:
    self.sae.set_decoder_norm_to_unit_norm()
    return {name: mine.detach().numpy() for mine, name in self.named()}
