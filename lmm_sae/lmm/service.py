"""What the subject server answers, without HTTP: header and arrays, in and out.

Every method of `Service` named in METHODS takes the header and the arrays of a
request (`core.remote.SubjectClient` says what they mean) and raises ValueError
where the request is at fault. They run the model, so one at a time.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from lmm_sae.core import remote, wire
from lmm_sae.lmm import edits as edits_lib
from lmm_sae.lmm import forward, gradients, losses, messages, words
from lmm_sae.lmm.forward import Asked, Job
from lmm_sae.lmm.judges import Clip, Grounder
from lmm_sae.lmm.llava import Subject
from lmm_sae.lmm.sae import Sae

METHODS = (
  *('residual', 'gradient', 'logits', 'generate', 'loss'),
  *('ground', 'clip'),
)

Arrays = dict[str, np.ndarray]
Answer = tuple[dict[str, Any], Arrays]


class _Images:
  """The images image_0, image_1, ... of a request, opened when wanted."""

  def __init__(self, arrays: Arrays):
    names = [f'image_{i}' for i in range(len(arrays))]
    if sorted(names) != sorted(arrays):
      raise ValueError(f'the arrays are {sorted(arrays)[:4]}, not image_0, ...')
    self._data = [arrays[name] for name in names]

  def digest(self, index: int) -> bytes:
    """Tells images apart by their bytes."""
    return hashlib.blake2b(self._at(index), digest_size=16).digest()

  def open(self, index: int) -> Image.Image:
    return wire.picture(self._at(index))

  def all(self) -> list[Image.Image]:
    return [wire.picture(data) for data in self._data]

  def _at(self, index: int) -> np.ndarray:
    if not 0 <= index < len(self._data):
      raise ValueError(f'image {index}, but the request has {len(self._data)}')
    return self._data[index]


class Service:
  """Answers requests with one subject, its SAEs and its judges.

  Args:
    saes: by layer.
    clip: None: `clip` is refused.
    grounders: by name; the first is the default.
    max_bytes: of prompts kept between requests, lower halves included: what is
      asked of one image again and again is then read once.
  """

  def __init__(
    self,
    subject: Subject,
    saes: dict[int, Sae],
    clip: Clip | None = None,
    grounders: dict[str, Grounder] | None = None,
    max_bytes: int = 2**29,
  ):
    self.subject = subject
    self.saes = saes
    self.clip_judge = clip
    self.grounders = grounders or {}
    self._max_bytes = max_bytes
    self._asked: OrderedDict[tuple, Asked] = OrderedDict()
    for layer, sae in saes.items():
      subject.layer(layer)
      if sae.width != subject.width:
        raise ValueError(
          f'the SAE of layer {layer} has width {sae.width}, {subject.name} '
          f'has {subject.width}: it was trained on another model'
        )

  def info(self) -> dict[str, Any]:
    """See SubjectClient.info."""
    return {
      'model': self.subject.name,
      'layers': self.subject.num_layers,
      'width': self.subject.width,
      'grid': list(self.subject.grid),
      'saes': {
        str(layer): {'latents': sae.latents, 'k': sae.k}
        for layer, sae in self.saes.items()
      },
      'judges': list(self.grounders),
      'clip': self.clip_judge is not None,
    }

  def answer(
    self,
    method: str,
    header: dict[str, Any],
    arrays: Arrays,
    check: Callable[[], None] = lambda: None,
  ) -> Answer:
    """The answer to one request; `check` may raise forward.Cancelled."""
    handlers = {
      'residual': self._residual,
      'gradient': self._gradient,
      'logits': self._logits,
      'ground': self._ground,
      'clip': self._clip,
    }
    try:
      if method == 'generate':
        return self._generate(header, arrays, check)
      if method == 'loss':
        return self._loss(header, arrays, check)
      return handlers[method](header, arrays)
    finally:
      self._forget()

  def _generate(self, header, arrays, check) -> Answer:
    request = messages.read(messages.Generate, header)
    images = _Images(arrays)
    asked = self._ask(images, [(r.image, r.prompt) for r in request.rows])
    jobs = [
      Job(prompt, row.layer, self._edits(row, request.peaks))
      for prompt, row in zip(asked, request.rows, strict=True)
    ]
    written = forward.write(
      self.subject,
      self.saes,
      jobs,
      request.max_new_tokens,
      request.seed,
      check,
    )
    decode = self.subject.tokenizer.decode
    texts = [decode(ids, skip_special_tokens=True).strip() for ids in written]
    return {'texts': texts}, {}

  def _edits(self, row: remote.GenerateRow, peaks: messages.Peaks):
    edits = row.edits
    if not edits and row.sae:
      edits = edits_lib.control(row.where, row.when)
    return self._resolve(row.layer, edits, peaks)

  def _resolve(self, layer: int, edits, peaks: messages.Peaks):
    self.subject.layer(layer)
    if not edits:
      return ()
    latents = self._sae(layer).latents
    return edits_lib.resolve(edits, peaks.get(str(layer), {}), latents)

  def _sae(self, layer: int) -> Sae:
    if layer not in self.saes:
      raise ValueError(
        f'no SAE of layer {layer} is served, only of {sorted(self.saes)}: run '
        '`lmm-sae train`, then start the server again'
      )
    return self.saes[layer]

  def _ask(
    self, images: _Images, questions: Sequence[tuple[int | None, str]]
  ) -> list[Asked]:
    """The prompts; equal ones are one object, and share its lower half."""
    return [self._one(images, index, text) for index, text in questions]

  def _one(
    self,
    images: _Images,
    index: int | None,
    text: str,
    more: Sequence[int] = (),
  ) -> Asked:
    """One prompt, and the tokens `more` after it."""
    key = (None if index is None else images.digest(index), text, tuple(more))
    if key not in self._asked:
      chat = self.subject.chat(text, index is not None)
      image = None if index is None else images.open(index)
      self._asked[key] = forward.ask(self.subject, chat, image, more)
    self._asked.move_to_end(key)
    return self._asked[key]

  def _forget(self) -> None:
    """Drops the prompts asked longest ago until the others fit."""
    size = sum(asked.nbytes for asked in self._asked.values())
    while size > self._max_bytes:
      _, oldest = self._asked.popitem(last=False)
      size -= oldest.nbytes

  def _residual(self, header, arrays) -> Answer:
    request = messages.read(messages.Residual, header)
    self.subject.layer(request.layer)
    questions = [(row.image, row.prompt) for row in request.rows]
    out: Arrays = {}
    grids = []
    for i, asked in enumerate(self._ask(_Images(arrays), questions)):
      x_BTD = self.subject.residuals(asked.inputs, [request.layer])
      out[f'x_{i}'] = _numpy(x_BTD[request.layer][0])
      out |= wire.token_arrays(asked.map, str(i))
      grids.append(list(asked.map.grid))
    return {'grids': grids}, out

  def _gradient(self, header, arrays) -> Answer:
    request = messages.read(messages.Gradient, header)
    self.subject.layer(request.layer)
    asked, tokens = self._contrast(request, _Images(arrays))
    sae = self._sae(request.layer) if request.points > 1 else None
    found = gradients.gradient(
      self.subject, asked, request.layer, tokens, sae, request.points
    )
    return {
      'grid': list(asked.map.grid),
      'logits': list(found.logits),
      'tokens': list(tokens),
      'difference': found.logits[0] - found.logits[1],
    }, {
      'x': _numpy(found.x_TD.float()),
      'grad': _numpy(found.grad_TD.float()),
      **wire.token_arrays(asked.map, '0'),
    }

  def _contrast(self, request, images) -> tuple[Asked, tuple[int, int]]:
    """The prompt up to where answer and baseline part, and the two tokens."""
    plain = self._one(images, request.image, request.prompt)
    pair = (request.answer, request.baseline)
    if isinstance(pair[0], int) and isinstance(pair[1], int):
      size = self.subject.model.config.get_text_config().vocab_size
      if not all(0 <= token < size for token in pair):
        raise ValueError(f'answer and baseline {pair}: the ids end at {size}')
      return plain, pair
    if not (isinstance(pair[0], str) and isinstance(pair[1], str)):
      raise ValueError(f'answer and baseline {pair}: give two words or two ids')

    def likely() -> torch.Tensor:
      job = Job(plain, request.layer, ())
      return forward.next_logits(self.subject, self.saes, [job])[0]

    chat = self.subject.chat(request.prompt, request.image is not None)
    shared, tokens = words.contrast(self.subject, chat, pair, likely)
    return self._one(images, request.image, request.prompt, shared), tokens

  def _logits(self, header, arrays) -> Answer:
    request = messages.read(messages.Logits, header)
    self.subject.layer(request.layer)
    images, tokens = _Images(arrays), None
    if request.answer is None and request.baseline is None:
      asked = self._one(images, request.image, request.prompt)
    else:
      asked, tokens = self._contrast(request, images)
    jobs = [
      Job(
        asked,
        request.layer,
        self._resolve(request.layer, edits, request.peaks),
      )
      for edits in request.edit_sets
    ]
    rows = forward.next_logits(self.subject, self.saes, jobs)
    answer: dict[str, Any] = {}
    if tokens is not None:
      wanted_B = rows[:, tokens[0]] - rows[:, tokens[1]]
      answer |= {'differences': wanted_B.tolist(), 'tokens': list(tokens)}
    if request.top:
      answer['top'] = [self._top(row_V, request.top) for row_V in rows]
    return answer, {}

  def _top(self, logits_V: torch.Tensor, count: int) -> list[dict[str, Any]]:
    best = logits_V.topk(min(count, len(logits_V)))
    all_V = logits_V.log_softmax(0)
    return [
      {
        'token': token,
        'text': self.subject.tokenizer.decode([token]),
        'logit': logit,
        'logprob': float(all_V[token]),
      }
      for logit, token in zip(*map(torch.Tensor.tolist, best), strict=True)
    ]

  def _loss(self, header, arrays, check) -> Answer:
    request = messages.read(messages.Loss, header)
    self.subject.layer(request.layer)
    images = _Images(
      {name: x for name, x in arrays.items() if name.startswith('image_')}
    )
    texts = [
      remote.Text(
        _named(arrays, f'token_{i}'),
        _named(arrays, f'kind_{i}'),
        None if index is None else images.open(index),
        tuple(_named(arrays, f'given_{i}_{j}') for j in range(request.given)),
      )
      for i, index in enumerate(request.images)
    ]
    wanted = {'sae', 'error'} & set(request.variants)
    found = losses.losses(
      self.subject,
      request.layer,
      self._sae(request.layer) if wanted else None,
      texts,
      request.variants,
      request.kinds,
      arrays.get('mean'),
      check,
    )
    out = {f'ce_{i}': loss.ce_RT for i, loss in enumerate(found)}
    return {}, out | {f'kl_{i}': loss.kl_RT for i, loss in enumerate(found)}

  def _ground(self, header, arrays) -> Answer:
    request = messages.read(messages.Ground, header)
    names = list(self.grounders)
    name = request.judge or (names[0] if names else 'clip')
    if name not in self.grounders:
      raise ValueError(
        f'judge {name!r} is not served, only {names}: start the server with '
        f'score.grounder={name}'
      )
    images = _paired(arrays, request.images)
    if not request.texts:
      return {}, {}
    found = self.grounders[name].masks(
      images, request.images, request.texts, request.box_threshold
    )
    return {}, {f'mask_{i}': mask_HW for i, mask_HW in enumerate(found)}

  def _clip(self, header, arrays) -> Answer:
    request = messages.read(messages.Pairs, header)
    if self.clip_judge is None:
      raise ValueError('no CLIP is served: give its folder as score.clip_path')
    images = _paired(arrays, request.images)
    if not request.texts:
      return {}, {'score_B': np.zeros(0, np.float32)}
    score_B = self.clip_judge.score(images, request.images, request.texts)
    return {}, {'score_B': score_B}


def _paired(arrays: Arrays, index: Sequence[int]) -> list[Image.Image]:
  images = _Images(arrays).all()
  if max(index, default=-1) >= len(images):
    raise ValueError(f'image {max(index)}, but the request has {len(images)}')
  return images


def _named(arrays: Arrays, name: str) -> np.ndarray:
  if name not in arrays:
    raise ValueError(f'the request lacks the array {name}')
  return arrays[name]


def _numpy(x: torch.Tensor) -> np.ndarray:
  """A tensor as an array; bfloat16 stays bfloat16."""
  x = x.detach().cpu()
  if x.dtype == torch.bfloat16:
    raw = x.contiguous().view(torch.int16).numpy()
    return raw.view(wire.DTYPES['BF16'])
  return x.numpy()
