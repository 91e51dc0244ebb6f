"""dictionary_learning: its TopKTrainer as shipped."""

import numpy as np
import torch
from dictionary_learning.trainers.top_k import TopKTrainer


class Contender:
  def __init__(self, job, variant, init):
    del variant
    self.trainer = TopKTrainer(
      steps=10**9,
      activation_dim=job['width'],
      dict_size=job['latents'],
      k=job['k'],
      layer=0,
      lm_name='none',
      lr=job['lr'],
      warmup_steps=0,
      device='cpu',
    )
    ae = self.trainer.ae
    with torch.no_grad():
      ae.encoder.weight.copy_(torch.from_numpy(init['w_enc']))
      ae.encoder.bias.copy_(torch.from_numpy(init['b_enc']))
      ae.decoder.weight.copy_(torch.from_numpy(init['w_dec'].T))
      ae.b_dec.copy_(torch.from_numpy(init['b_dec']))
    self.at = 1  # its step 0 makes b_dec anew

  def step(self, x_ND: np.ndarray) -> None:
    self.trainer.update(self.at, torch.from_numpy(x_ND))
    self.at += 1

  def wait(self) -> None:
    pass

  def params(self) -> dict[str, np.ndarray]:
    ae = self.trainer.ae
    return {
      'w_enc': ae.encoder.weight.detach().numpy(),
      'b_enc': ae.encoder.bias.detach().numpy(),
      'w_dec': ae.decoder.weight.detach().numpy().T,
      'b_dec': ae.b_dec.detach().numpy(),
    }
