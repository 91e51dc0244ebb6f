"""What the small LLaVA-NeXTs are trained to: patches, answers, and gazes."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lmm_sae.scenes import batches, lean, model
from lmm_sae.scenes.batches import Batch

# Answers that are learned slowly, those that say where something is: they
# weigh more.
SLOW = {
  'where': 2.0,
  'relation': 2.0,
  'describe': 2.0,
  'nth picture': 1.5,
  'intruder': 4.0,
  'common': 4.0,
}
WATCHED = {6: 3, 8: 4}  # the layer whose heads are told where to look


class Answers(NamedTuple):
  """What a model says to a batch's questions.

  Attributes:
    logits, targets: [n, V] and [n], at the positions of the answers.
    turn: [n], which turn a position is of, over all groups in order.
    weights: one a turn.
    gaze: how far the watched heads are from looking at what a question is
      about, see `gaze`.
  """

  logits: Tensor
  targets: Tensor
  turn: Tensor
  weights: Tensor
  gaze: Tensor


def features(lmm, batch: Batch) -> Tensor:
  """Patch features of every view, [views, 64, width]."""
  pixels = torch.from_numpy(batch.pixels_B3HW)
  return lean.vision(lmm.model.vision_tower, pixels)[:, 1:]


def dense(guesses: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
  """Cross-entropy of the patch heads, objects weighing as much as background.

  Args:
    guesses: [views, 64, classes], the logits of all heads side by side.

  Returns:
    The loss and the accuracy on object patches by head.
  """
  parts = guesses.split(
    [len(classes) for classes in batches.HEADS.values()], -1
  )
  inside = torch.from_numpy(batch.labels['name'] > 0)
  weight = torch.where(inside, 0.5 / inside.float().mean().clamp(min=0.02), 0.5)
  found, right = [], {}
  for logits, head in zip(parts, batches.HEADS, strict=True):
    target = torch.from_numpy(batch.labels[head])
    asked = target >= 0
    loss = F.cross_entropy(
      logits.flatten(0, 1), target.clamp(min=0).flatten(), reduction='none'
    ).view(target.shape)
    found.append((loss * weight)[asked].mean())
    hit = (logits.argmax(-1) == target) & inside & asked
    right[head] = float(hit.sum() / (inside & asked).sum().clamp(min=1))
  return sum(found) / len(found), right


def gaze(
  scores: Tensor, regions: Tensor, group: batches.Group, weights: Tensor
) -> tuple[Tensor, Tensor]:
  """-log of the attention on what is asked about, of all on the pictures.

  A question is about one region or two, and one head looks at each. Without
  this a model of this size finds out what a thing is long before it learns to
  look for the thing and say where it is (attention supervision: Liu et al.
  2017, arXiv 1609.04186).

  Args:
    scores: [B, heads, Q, T, P] attention logits; heads 0 and 1 are watched.
    regions: [B, P], the region of each position of the prefix, 0 for none.
    weights: [B, Q], of the turns.

  Returns:
    (sum over the positions of answers and heads, how many they are), each
    counted as often as its turn weighs.
  """
  wanted = torch.from_numpy(group.about).permute(0, 2, 1)
  on = regions[:, None, None, :] == wanted[..., None]
  asked = torch.from_numpy(group.targets)
  asked = ((asked >= 0) & (asked != model.EOS))[:, None]
  asked = asked & on.any(-1)[..., None]
  share = scores[:, :2].log_softmax(-1)
  mass = share.masked_fill(~on[..., None, :], -1e9).logsumexp(-1)
  weight = weights[:, None, :, None] * asked
  return -(mass.masked_fill(~asked, 0) * weight).sum(), weight.sum()


def answers(lmm, features_BPD: Tensor | None, batch: Batch) -> Answers:
  """Runs the LMM over the batch; `features_BPD` is its `features`."""
  inner = lmm.model
  embed = inner.language_model.embed_tokens
  items = len(batch.groups[0].ids)
  prefix = embed(torch.tensor([[model.BOS, model.USER]])).expand(items, -1, -1)
  regions = torch.zeros(items, 2, dtype=torch.int64)
  if batch.images:
    tokens, shown = _images(lmm, features_BPD, batch)
    prefix = torch.cat([prefix, tokens], 1)
    regions = torch.cat([regions, shown], 1)
  groups = [embed(torch.from_numpy(group.ids)) for group in batch.groups]
  lm = inner.language_model
  watched = WATCHED[len(lm.layers)]
  hidden, scores = lean.language(lm, prefix, groups, watched)
  far, looks = torch.zeros(()), 0.0
  found, wanted, turn, weights, offset = [], [], [], [], 0
  for h, score, group in zip(hidden, scores, batch.groups, strict=True):
    weight = torch.tensor([[SLOW.get(x, 1.0) for x in y] for y in group.types])
    more, count = gaze(score, regions, group, weight)
    far, looks = far + more, looks + float(count)
    targets = torch.from_numpy(group.targets)
    asked = targets >= 0
    found.append(h[asked])
    wanted.append(targets[asked])
    number = torch.arange(weight.numel()).view(weight.shape)
    turn.append((number[..., None].expand_as(targets) + offset)[asked])
    weights.append(weight.flatten())
    offset += weight.numel()
  return Answers(
    torch.cat(found) @ embed.weight.T,
    torch.cat(wanted),
    torch.cat(turn),
    torch.cat(weights),
    far / max(looks, 1.0),
  )


def _images(lmm, features_BPD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
  """Each item's image tokens [B, n, D] and the regions they show [B, n]."""
  inner = lmm.model
  shown = torch.from_numpy(batch.regions)[..., None]
  if batch.tiles == 1:
    features_BPD = features_BPD.repeat_interleave(2, 0)
    shown = shown.repeat_interleave(2, 0)
  tokens = lean.image_tokens(inner, features_BPD, batch.tiles)
  tokens = tokens.unflatten(0, (-1, batch.images))
  shown = lean.in_order(shown, shown.new_zeros(1), batch.tiles)[..., 0]
  shown = shown.unflatten(0, (-1, batch.images))
  if batch.images > 1:
    names = torch.from_numpy(batches.names(batch.images))
    words = inner.language_model.embed_tokens(names)
    words = words.expand(len(tokens), *words.shape)
    tokens = torch.cat([words, tokens], 2)
    shown = F.pad(shown, (words.shape[2], 0))
  return tokens.flatten(1, 2), shown.flatten(1, 2)


def spoken(said: Answers) -> Tensor:
  """Cross-entropy; a turn weighs its weight times the root of its length."""
  turn = said.turn
  weight = said.weights[turn] * turn.bincount()[turn].rsqrt()
  losses = F.cross_entropy(said.logits, said.targets, reduction='none')
  return (losses * weight).sum() / weight.sum()


def right_by_turn(said: Answers) -> Tensor:
  """Whether every token of a turn's answer is the greedy one."""
  wrong = torch.zeros(len(said.weights))
  miss = said.logits.detach().argmax(-1) != said.targets
  wrong.index_add_(0, said.turn, miss.float())
  return wrong == 0
