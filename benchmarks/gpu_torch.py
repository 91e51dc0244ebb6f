"""The torch process of `gpu.py`: sparsify's method, written in PyTorch.

    python benchmarks/gpu_torch.py JOB VARIANT

What EleutherAI's sparsify does in a step of a TopK SAE, without its package:
one product with bias and relu, torch.topk, decoding by gathered rows, the
decoder's rows brought to unit norm before the step and their gradient's part
along them taken away after it, Adam.

shipped  bfloat16 autocast, float32 products at `high`, torch.optim.Adam as it
         comes, embedding_bag to decode, index_add of rows to the encoder
tuned    copies of the weights in bfloat16, both gradients and the decoding as
         CSR products, fused Adam, float32 products at `medium`
dense    the same, with the code spread out to [N, M] and dense products
"""

import json
import sys
import time
import traceback

import torch
from torch.nn import functional

RATE = 7e-5
BF16 = torch.bfloat16
FAILURES = (  # XLA's and torch's, memory's too, are RuntimeErrors
  *(RuntimeError, TypeError, ValueError, KeyError, AttributeError),
  *(AssertionError, ImportError, ArithmeticError),
)


def main() -> None:
  job, variant = json.loads(sys.argv[1]), sys.argv[2]
  out, sys.stdout = sys.stdout, sys.stderr
  made = None
  for line in sys.stdin:
    what, *rest = line.split()
    try:
      if what == 'start':
        made = Sae(job, variant)
        made.step()
        answer = {'fvu': made.step(), 'torch': torch.__version__}
      else:
        found = []
        for _ in range(int(rest[0])):
          start = time.perf_counter()
          fvu = made.step()
          found.append(1e3 * (time.perf_counter() - start))
        answer = {'ms': found, 'fvu': fvu}
    except FAILURES as error:
      traceback.print_exc()
      answer = {'error': f'{type(error).__name__}: {error}'[:600]}
    out.write(json.dumps(answer) + '\n')
    out.flush()


class Sae:
  """The state, a batch, and the step."""

  def __init__(self, job: dict, variant: str):
    self.tiny, self.variant, self.k = job['tiny'], variant, job['k']
    if not self.tiny and not torch.cuda.is_available():
      raise RuntimeError('torch sees no GPU')
    device = 'cpu' if self.tiny else 'cuda'
    tuned = variant != 'shipped'
    torch.set_float32_matmul_precision('medium' if tuned else 'high')
    torch.manual_seed(0)
    shape = (job['latents'], job['width'])
    self.x = torch.randn(job['rows'], job['width'], device=device)
    w = torch.randn(shape, device=device) * job['width'] ** -0.5
    self.w_enc = w.clone().requires_grad_()
    self.w_dec = w.requires_grad_()
    self.b_enc = torch.zeros(shape[0], device=device, requires_grad=True)
    self.b_dec = torch.zeros(shape[1], device=device, requires_grad=True)
    params = [self.w_enc, self.b_enc, self.w_dec, self.b_dec]
    options = {'fused': True} if tuned else {}
    self.adam = torch.optim.Adam(params, lr=RATE, **options)

  def step(self) -> float:
    with torch.no_grad():
      self.w_dec /= self.w_dec.norm(dim=1, keepdim=True)
    variance = (self.x - self.x.mean(0)).pow(2).sum()
    if self.variant == 'shipped':
      device = 'cpu' if self.tiny else 'cuda'
      with torch.autocast(device, BF16):
        y = self.shipped()
    else:
      y = self.tuned()
    fvu = (self.x - y).pow(2).sum() / variance
    fvu.backward()
    with torch.no_grad():
      along = (self.w_dec.grad * self.w_dec).sum(1, keepdim=True)
      self.w_dec.grad -= along * self.w_dec
    self.adam.step()
    self.adam.zero_grad()
    return float(fvu.detach())

  def shipped(self) -> torch.Tensor:
    centred = self.x - self.b_dec
    vals, idx = Encode.apply(centred, self.w_enc, self.b_enc, self.k)
    with torch.autocast(self.x.device.type, enabled=False):
      y = functional.embedding_bag(
        idx, self.w_dec, mode='sum', per_sample_weights=vals.float()
      )
    return y + self.b_dec

  def tuned(self) -> torch.Tensor:
    centred = (self.x - self.b_dec).to(BF16)
    dense = self.variant == 'dense'
    vals, idx = Encode16.apply(centred, self.w_enc, self.b_enc, self.k, dense)
    return Decode16.apply(vals, idx, self.w_dec, dense) + self.b_dec


class Encode(torch.autograd.Function):
  """relu and topk; the weight's gradient by index_add of scaled rows."""

  @staticmethod
  def forward(ctx, x, w, b, k):
    pre = functional.relu(functional.linear(x, w, b))
    vals, idx = pre.topk(k, dim=-1, sorted=False)
    ctx.save_for_backward(x, w, b, vals, idx)
    return vals, idx

  @staticmethod
  def backward(ctx, dv, _):
    x, w, b, vals, idx = ctx.saved_tensors
    dv = (dv * (vals > 0)).float()
    db = torch.zeros_like(b).index_add_(0, idx.flatten(), dv.flatten())
    dw = torch.zeros_like(w)
    for j in range(idx.shape[1]):  # all of it at once would be [N·K, D]
      dw.index_add_(0, idx[:, j], dv[:, j, None] * x)
    # x needs a gradient for the sake of b_dec, which gets it from db.
    return _through(x, w, db), dw, db, None


class Encode16(torch.autograd.Function):
  """The same in bfloat16; the weight's gradient as one product."""

  @staticmethod
  def forward(ctx, x, w, b, k, dense):
    low = w.to(BF16)
    pre = functional.relu_(functional.linear(x, low, b.to(BF16)))
    vals, idx = pre.topk(k, dim=-1, sorted=False)
    ctx.save_for_backward(x, low, vals, idx)
    ctx.dense = dense
    return vals.float(), idx

  @staticmethod
  def backward(ctx, dv, _):
    x, w, vals, idx = ctx.saved_tensors
    dv = dv * (vals > 0)
    db = torch.zeros(len(w), device=w.device)
    db.index_add_(0, idx.flatten(), dv.flatten())
    dw = _transposed(dv, idx, x, len(w), ctx.dense)
    return _through(x, w, db), dw, db, None, None


class Decode16(torch.autograd.Function):
  """z w in bfloat16, by CSR or dense products; so are its gradients."""

  @staticmethod
  def forward(ctx, vals, idx, w, dense):
    low = w.to(BF16)
    ctx.save_for_backward(vals, idx, low)
    ctx.dense = dense
    if dense:
      return (_spread(vals, idx, len(w)) @ low).float()
    n, k = idx.shape
    starts = torch.arange(0, n * k + 1, k, device=idx.device)
    at, order = idx.sort(1)
    values = vals.gather(1, order).to(BF16)
    return _csr(starts, at.flatten(), values.flatten(), (n, len(w)), low)

  @staticmethod
  def backward(ctx, dy):
    vals, idx, w = ctx.saved_tensors
    low = dy.to(BF16)
    dw = _transposed(vals, idx, low, len(w), ctx.dense)
    if ctx.dense:
      dv = (low @ w.T).gather(1, idx).float()
    else:
      parts = [
        torch.einsum('nd,nkd->nk', low[at], w[idx[at]])
        for at in torch.arange(len(idx), device=idx.device).split(256)
      ]
      dv = torch.cat(parts).float()
    return dv, None, dw, None


def _spread(vals, idx, latents):
  code = torch.zeros(len(idx), latents, dtype=BF16, device=vals.device)
  return code.scatter_(1, idx, vals.to(BF16))


def _transposed(vals, idx, x, latents, dense):
  """zᵀ x, float32 [M, D]."""
  if dense:
    return (_spread(vals, idx, latents).T @ x).float()
  n, k = idx.shape
  at, order = idx.flatten().sort(stable=True)
  bounds = torch.arange(latents + 1, device=idx.device)
  starts = torch.searchsorted(at, bounds)
  values = vals.flatten()[order].to(BF16)
  rows = torch.div(order, k, rounding_mode='floor')
  return _csr(starts, rows, values, (latents, n), x)


def _csr(starts, at, values, shape, right):
  """A sparse product, float32; torch has none of bfloat16 on a CPU."""
  if right.device.type == 'cpu':
    values, right = values.float(), right.float()
  code = torch.sparse_csr_tensor(starts, at, values, shape)
  return (code @ right).float()


def _through(x, w, db):
  """A gradient of x whose sum over rows is db w: all that b_dec is given."""
  along = db.to(w.dtype) @ w / len(x)
  return along.to(x.dtype).expand_as(x)


if __name__ == '__main__':
  main()
