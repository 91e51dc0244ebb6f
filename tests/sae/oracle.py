"""Training in plain float64 NumPy, from the papers' formulas alone.

Dense, one term after the other, gradients by hand: it shares no code with the
program, whose step must do what this one does.
"""

import ml_dtypes
import numpy as np

B1, B2, EPS = 0.9, 0.999, 1e-8


def top(z_NM, k):
  """The k largest of each row, ties to the lower index; 0 elsewhere."""
  z_NM = z_NM.copy()
  order_NM = np.argsort(-z_NM, 1, kind='stable')
  np.put_along_axis(z_NM, order_NM[:, k:], 0, 1)
  return z_NM


class Oracle:
  """An SAE in training: parameters, Adam's moments, counters.

  Args:
    config: SaeConfig.
    options: TrainConfig.
    state: TrainState to begin from, with empty moments.
  """

  def __init__(self, config, options, state):
    self.config, self.options = config, options
    self.p = {
      name: np.asarray(value, np.float64)
      for name, value in vars(state.params).items()
    }
    self.m = {name: np.zeros_like(x) for name, x in self.p.items()}
    self.v = {name: np.zeros_like(x) for name, x in self.p.items()}
    self.idle_M = np.asarray(state.idle_M, np.int64)
    self.scale = float(state.scale)
    self.steps = 0

  def low(self, x):
    """What the products see of their factors."""
    if self.options.compute == 'float32':
      return x
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)

  def k(self):
    """Of this step."""
    o, k = self.options, self.config.k
    if self.steps >= o.k_steps:
      return k
    return int(np.ceil(k + (o.k_from - k) * (1 - self.steps / o.k_steps)))

  def lr(self):
    o = self.options
    up = min(1, (self.steps + 1) / o.warmup)
    down = (o.steps - self.steps) / (o.steps - o.decay_from * o.steps)
    return o.lr * min(up, down, 1)

  def step(self, x_ND):
    """One optimiser step on raw rows; what it found."""
    x_ND = np.asarray(x_ND, np.float64) * self.scale
    variance = np.square(x_ND - x_ND.mean(0)).sum()
    dead_M = self.idle_M > self.config.dead_after
    rows, pieces = len(x_ND), self.options.accumulate
    self.grads = {name: np.zeros_like(x) for name, x in self.p.items()}
    fired_M = np.zeros(len(dead_M), bool)
    found = {'fvu': 0.0, 'auxk': 0.0, 'multi': 0.0, 'least': 0.0, 'l0': 0.0}
    for at in range(pieces):  # every pieces-th row
      part_ND = x_ND[at::pieces]
      some, z_NM = self._piece(part_ND, variance, dead_M, rows)
      fired_M |= (z_NM > 0).any(0)
      for name, value in some.items():
        found[name] += value
    w_MD = self.p['w_dec_MD']
    along_M1 = (self.grads['w_dec_MD'] * w_MD).sum(1, keepdims=True)
    self.grads['w_dec_MD'] -= along_M1 * w_MD
    norm = np.sqrt(sum(np.square(g).sum() for g in self.grads.values()))
    found |= {'grad_norm': norm, 'lr': self.lr(), 'dead': dead_M.mean()}
    self._adam(min(1, self.options.clip / norm), found)
    self.idle_M = np.where(fired_M, 0, self.idle_M + rows)
    self.steps += 1
    return found

  def _piece(self, x_ND, variance, dead_M, rows):
    c, o, p, g = self.config, self.options, self.p, self.grads
    w_enc_MD, w_dec_MD = self.low(p['w_enc_MD']), self.low(p['w_dec_MD'])
    centred_ND = self.low(x_ND - p['b_dec_D'])
    all_NM = np.maximum(centred_ND @ w_enc_MD.T + p['b_enc_M'], 0)
    k = self.k()
    some = {'least': 0.0}
    theta_M = np.zeros(len(dead_M))
    near_NM = np.zeros_like(all_NM)
    if c.activation == 'topk':
      z_NM = top(all_NM, k)
    else:
      z_NM = top(all_NM, c.row_k or min(4 * c.k, c.latents))
      if c.activation == 'batchtopk':
        least = np.sort(z_NM, None)[-len(x_ND) * k]
        z_NM[z_NM < least] = 0
        some['least'] = least * len(x_ND) / rows
      else:
        theta_M = p['theta_M']
        width = c.bandwidth * c.width**0.5
        near_NM = (z_NM > 0) & (np.abs(z_NM - theta_M) < width / 2)
        z_NM = np.where(z_NM > theta_M, z_NM, 0)
    some['l0'] = (z_NM > 0).sum() / rows

    def backward(z_NM, dy_NMD, *, bias):
      """dy_NMD: of each latent's part of x̂, on each row."""
      pull_NM = np.einsum('nmd,md->nm', dy_NMD, w_dec_MD)
      dz_NM = np.where(z_NM > 0, pull_NM, 0)
      g['w_dec_MD'] += np.einsum('nm,nmd->md', z_NM, dy_NMD)
      g['w_enc_MD'] += dz_NM.T @ centred_ND
      g['b_enc_M'] += dz_NM.sum(0)
      if bias:
        g['b_dec_D'] -= dz_NM.sum(0) @ w_enc_MD
      return pull_NM

    edges = (*c.prefixes, c.latents)
    dy_NMD = np.zeros((*all_NM.shape, c.width))
    for edge in edges:
      x_hat_ND = z_NM[:, :edge] @ w_dec_MD[:edge] + p['b_dec_D']
      error_ND = x_ND - x_hat_ND
      dy_ND = -2 * error_ND / variance / len(edges)
      dy_NMD[:, :edge] += dy_ND[:, None]
      g['b_dec_D'] += dy_ND.sum(0)
    some['fvu'] = np.square(error_ND).sum() / variance
    pull_NM = backward(z_NM, dy_NMD, bias=True)
    if c.activation == 'jumprelu':
      g['theta_M'] += -(theta_M / width) * (near_NM * pull_NM).sum(0)
      over = (z_NM > 0).sum() / len(x_ND) / k - 1
      slope_M = -near_NM.sum(0) / width / rows
      g['theta_M'] += o.sparsity * 2 * over / k * slope_M

    def side(z_NM, of_ND, weight, *, bias):
      """Another prediction, of `of_ND`, its part of the loss unweighted."""
      slip_ND = of_ND - z_NM @ w_dec_MD
      dy_ND = -2 * weight * slip_ND / variance
      if bias:
        g['b_dec_D'] += dy_ND.sum(0)
      backward(z_NM, np.repeat(dy_ND[:, None], c.latents, 1), bias=bias)
      return np.square(slip_ND).sum() / variance

    some['auxk'] = some['multi'] = 0.0
    if o.auxk and dead_M.any():
      answer_NM = top(np.where(dead_M, all_NM, 0), c.aux or c.width // 2)
      some['auxk'] = side(answer_NM, error_ND, o.auxk, bias=False)
    if o.multi_topk:
      wide_NM = top(all_NM, min(4 * c.k, c.latents))
      of_ND = x_ND - p['b_dec_D']
      some['multi'] = side(wide_NM, of_ND, o.multi_topk, bias=True)
    return some, z_NM

  def _adam(self, shrink, found):
    done = self.steps + 1
    for name, p in self.p.items():
      g = self.grads[name] * shrink
      self.m[name] = B1 * self.m[name] + (1 - B1) * g
      self.v[name] = B2 * self.v[name] + (1 - B2) * g**2
      m, v = self.m[name] / (1 - B1**done), self.v[name] / (1 - B2**done)
      self.p[name] = p - self.lr() * m / (np.sqrt(v) + EPS)
    w_MD = self.p['w_dec_MD']
    self.p['w_dec_MD'] = w_MD / np.linalg.norm(w_MD, axis=1, keepdims=True)
    if self.config.activation == 'jumprelu':
      self.p['theta_M'] = np.maximum(self.p['theta_M'], 0)
    if self.config.activation == 'batchtopk':
      theta_M = self.p['theta_M']
      share = 1 / min(done, 100)
      self.p['theta_M'] = theta_M + (found['least'] - theta_M) * share
