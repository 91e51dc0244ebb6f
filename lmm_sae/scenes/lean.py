"""The forward pass of the small LLaVA-NeXTs, laid out for training on a CPU.

Same parameters and same numbers as the Hugging Face modules (a test holds the
two together), three times their speed: the image prefix is computed once for
all questions about it, questions never see one another, and nothing is
computed that no loss reads (the last ViT layer, the prefix's last MLP).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def vision(tower, pixels_B3HW: Tensor) -> Tensor:
  """Hidden states [B, 1 + P, D] after all ViT layers but the last.

  That is what the LMM reads (`vision_feature_layer` -2).
  """
  x = tower.pre_layrnorm(tower.embeddings(pixels_B3HW))
  for layer in tower.encoder.layers[:-1]:
    x = vision_layer(layer, x)
  return x


def vision_layer(layer, x_BTD: Tensor) -> Tensor:
  batch, tokens, width = x_BTD.shape
  attention = layer.self_attn
  heads = attention.num_heads

  def split(y):
    return y.view(batch, tokens, heads, width // heads).transpose(1, 2)

  y = layer.layer_norm1(x_BTD)
  mixed = attend(
    split(attention.q_proj(y)),
    split(attention.k_proj(y)),
    split(attention.v_proj(y)),
  )
  mixed = mixed.transpose(1, 2).reshape(batch, tokens, width)
  x_BTD = x_BTD + attention.out_proj(mixed)
  y = layer.mlp.fc1(layer.layer_norm2(x_BTD))
  return x_BTD + layer.mlp.fc2(layer.mlp.activation_fn(y))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None):
  """Plain attention; on a CPU its backward beats the fused kernel's."""
  scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]))
  if mask is not None:
    scores = scores + mask
  return scores.softmax(-1) @ v


def image_tokens(model, features_BP: Tensor, tiles: int) -> Tensor:
  """Projected patch features as the LMM's image tokens.

  Args:
    features_BP: [images * (1 + tiles), 64, width], base view first.
    tiles: 1 (64 px), 4 (128 px, 2 x 2), or 0: the base view alone, which no
      processor makes, for cheap early steps.

  Returns:
    [images, 64 + rows * (columns + 1), D]: the base view, then the tiles' rows,
    each closed by the newline embedding.
  """
  x = model.multi_modal_projector(features_BP)
  return in_order(x, model.image_newline, tiles)


def in_order(x: Tensor, newline: Tensor, tiles: int) -> Tensor:
  """One vector a patch, as the LMM reads them.

  Args:
    x: [images * (1 + tiles), 64, width], base view first.
    newline: [width], what closes a row of the tiles.
    tiles: see `image_tokens`.

  Returns:
    [images, 64 + rows * (columns + 1), width].
  """
  width = x.shape[-1]
  side = math.isqrt(x.shape[1])
  x = x.view(-1, 1 + tiles, side, side, width)
  base = x[:, 0].reshape(x.shape[0], side * side, width)
  if not tiles:
    return base
  across = math.isqrt(tiles)
  grid = x[:, 1:].view(-1, across, across, side, side, width)
  grid = grid.transpose(2, 3).reshape(-1, across * side, across * side, width)
  newline = newline.expand(grid.shape[0], across * side, 1, width)
  rows = torch.cat([grid, newline], 2).flatten(1, 2)
  return torch.cat([base, rows], 1)


def rms(norm, x: Tensor) -> Tensor:
  return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
  """Rotary positions; x [N, heads, d], cos and sin [N, 1, d / 2]."""
  a, b = x.chunk(2, -1)
  return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def language(
  lm, prefix_BPD: Tensor, groups: list[Tensor], watched: int = -1
) -> tuple[list[Tensor], list[Tensor]]:
  """Final normed hidden states of question groups that share a prefix.

  Args:
    lm: a Llama model.
    prefix_BPD: embedded prefix of each of B items.
    groups: embedded questions, each [B, Q, T, D] with a Q and a T of its own;
      each question sees its item's prefix and itself, right-padded.
    watched: a layer whose attention scores are wanted as well, or -1.

  Returns:
    The hidden states [B, Q, T, D] of each group, and how much each question
    attends to the prefix at the watched layer, [B, heads, Q, T, P] logits of
    each group.
  """
  batch, prefix, width = prefix_BPD.shape
  config = lm.config
  heads, kv = config.num_attention_heads, config.num_key_value_heads
  size = width // heads
  device = prefix_BPD.device
  shapes = [g.shape for g in groups]
  flat = torch.cat(
    [prefix_BPD.reshape(-1, width), *(g.reshape(-1, width) for g in groups)]
  )
  counts = [batch * prefix, *(b * q * t for b, q, t, _ in shapes)]
  positions = torch.cat(
    [torch.arange(prefix, device=device).repeat(batch)]
    + [
      torch.arange(prefix, prefix + t, device=device).repeat(b * q)
      for b, q, t, _ in shapes
    ]
  )
  angles = positions[:, None].float() * lm.rotary_emb.inv_freq[None].float()
  cos, sin = angles.cos()[:, None], angles.sin()[:, None]
  causal = _causal(prefix, device)
  seen = []
  for number, layer in enumerate(lm.layers):
    last = number == len(lm.layers) - 1
    attention = layer.self_attn
    y = rms(layer.input_layernorm, flat)
    k = _rotate(attention.k_proj(y).view(-1, kv, size), cos, sin)
    v = attention.v_proj(y).view(-1, kv, size)
    k = k.repeat_interleave(heads // kv, 1).split(counts)
    v = v.repeat_interleave(heads // kv, 1).split(counts)
    start = counts[0] if last else 0
    q = attention.q_proj(y[start:]).view(-1, heads, size)
    q = _rotate(q, cos[start:], sin[start:]).split(
      counts[1:] if last else counts
    )

    def rows(x):  # [B * P, heads, d] -> [B, heads, P, d]
      return x.view(batch, -1, heads, size).transpose(1, 2)

    kp, vp = rows(k[0]), rows(v[0])
    mixed = []
    if not last:
      out = attend(rows(q[0]), kp, vp, causal)
      mixed.append(out.transpose(1, 2).reshape(-1, width))
    offset = 0 if last else 1
    for i, (_, many, length, _) in enumerate(shapes):
      qi = q[i + offset].view(batch, many, length, heads, size)
      ki = k[i + 1].view(batch, many, length, heads, size)
      vi = v[i + 1].view(batch, many, length, heads, size)
      qi, ki, vi = (x.permute(0, 3, 1, 2, 4) for x in (qi, ki, vi))
      far = qi.reshape(batch, heads, many * length, size) @ kp.transpose(-1, -2)
      far = far.view(batch, heads, many, length, prefix)
      far = far * (1 / math.sqrt(size))
      if number == watched:
        seen.append(far)
      near = qi @ ki.transpose(-1, -2) * (1 / math.sqrt(size))
      scores = torch.cat([far, near + _causal(length, device)], -1)
      weights = scores.softmax(-1)
      far, near = weights.split([prefix, length], -1)
      out = far.reshape(batch, heads, many * length, prefix) @ vp
      out = out.view(batch, heads, many, length, size) + near @ vi
      mixed.append(out.permute(0, 2, 3, 1, 4).reshape(-1, width))
    x = flat[start:] + attention.o_proj(torch.cat(mixed))
    y = rms(layer.post_attention_layernorm, x)
    mlp = layer.mlp
    flat = x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
  flat = rms(lm.norm, flat)
  parts = flat.split(counts[1:])
  parts = [p.view(shape) for p, shape in zip(parts, shapes, strict=True)]
  return parts, seen


def _causal(length: int, device) -> Tensor:
  mask = torch.full((length, length), -1e9, device=device)
  return mask.triu(1)
