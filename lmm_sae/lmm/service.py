"""What the subject server answers, without HTTP: header and arrays, in and out.

Every method of `Service` named in METHODS takes the header and the arrays of a
request (`core.remote.SubjectClient` says what they mean) and raises ValueError
where the request is at fault. They run the model, so one at a time.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import pydantic
import torch
from PIL import Image

from lmm_sae.core import records, remote, wire
from lmm_sae.lmm import edits as edits_lib
from lmm_sae.lmm import forward, words
from lmm_sae.lmm.forward import Asked, Job
from lmm_sae.lmm.judges import Clip, Grounder
from lmm_sae.lmm.llava import Subject
from lmm_sae.lmm.sae import Sae

METHODS = ('residual', 'gradient', 'logits', 'generate', 'ground', 'clip')
MAX_ROWS = 4096

Arrays = dict[str, np.ndarray]
Answer = tuple[dict[str, Any], Arrays]
Peaks = dict[str, dict[str, float]]
Word = str | int


def _message(kind: type) -> type:
  """A frozen dataclass that takes the fields it has, and of their types."""
  config = pydantic.ConfigDict(extra='forbid', strict=True)
  return pydantic.dataclasses.dataclass(kind, config=config, frozen=True)


_Edit = _message(records.Edit)
_Count = Annotated[int, pydantic.Field(ge=1)]
_Index = Annotated[int, pydantic.Field(ge=0)]


@_message
class _Row(remote.GenerateRow):
  edits: tuple[_Edit, ...] = ()


@_message
class _Generate:
  rows: Annotated[tuple[_Row, ...], pydantic.Field(max_length=MAX_ROWS)]
  max_new_tokens: Annotated[int, pydantic.Field(ge=1, le=4096)]
  seed: _Index | None = None
  peaks: Peaks = dataclasses.field(default_factory=dict)


@_message
class _Question:
  image: int | None
  prompt: str


@_message
class _Residual:
  layer: int
  rows: Annotated[tuple[_Question, ...], pydantic.Field(max_length=MAX_ROWS)]


@_message
class _Gradient:
  layer: int
  image: int | None
  prompt: str
  answer: Word
  baseline: Word


@_message
class _Logits:
  layer: int
  image: int | None
  prompt: str
  edit_sets: Annotated[
    tuple[tuple[_Edit, ...], ...], pydantic.Field(max_length=MAX_ROWS)
  ]
  answer: Word | None = None
  baseline: Word | None = None
  top: _Index = 0
  peaks: Peaks = dataclasses.field(default_factory=dict)


@_message
class _Pairs:
  images: tuple[_Index, ...]
  texts: tuple[str, ...]

  def __post_init__(self):
    if len(self.images) != len(self.texts):
      raise ValueError(
        f'{len(self.images)} images and {len(self.texts)} texts do not pair'
      )


@_message
class _Ground(_Pairs):
  judge: str = ''
  box_threshold: float = 0.3


def _read(kind: type, header: dict[str, Any]) -> Any:
  """The header as that message.

  Raises:
    ValueError: it has other fields, or values of other types.
  """
  try:
    return pydantic.TypeAdapter(kind).validate_json(json.dumps(header))
  except pydantic.ValidationError as error:
    first = error.errors(include_url=False)[0]
    place = '.'.join(str(part) for part in first['loc'])
    said = first['msg'].removeprefix('Value error, ')
    raise ValueError(f'{place}: {said}' if place else said) from error


class Service:
  """Answers requests with one subject, its SAEs and its judges.

  Args:
    saes: by layer.
    clip: None: `clip` is refused.
    grounders: by name; the first is the default.
  """

  def __init__(
    self,
    subject: Subject,
    saes: dict[int, Sae],
    clip: Clip | None = None,
    grounders: dict[str, Grounder] | None = None,
  ):
    self.subject = subject
    self.saes = saes
    self.clip_judge = clip
    self.grounders = grounders or {}
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
    if method == 'generate':
      return self._generate(header, arrays, check)
    return handlers[method](header, arrays)

  def _generate(self, header, arrays, check) -> Answer:
    request = _read(_Generate, header)
    images = _images(arrays)
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

  def _edits(self, row: remote.GenerateRow, peaks: Peaks):
    edits = row.edits
    if not edits and row.sae:
      edits = edits_lib.control(row.where, row.when)
    return self._resolve(row.layer, edits, peaks)

  def _resolve(self, layer: int, edits, peaks: Peaks):
    self.subject.layer(layer)
    if not edits:
      return ()
    if layer not in self.saes:
      raise ValueError(
        f'no SAE of layer {layer} is served, only of {sorted(self.saes)}: run '
        '`lmm-sae train`, then start the server again'
      )
    sae = self.saes[layer]
    return edits_lib.resolve(edits, peaks.get(str(layer), {}), sae.latents)

  def _ask(
    self,
    images: Sequence[Image.Image],
    questions: Sequence[tuple[int | None, str]],
  ) -> list[Asked]:
    """The prompts; equal questions share one object, and so its lower half."""
    made: dict[tuple[int | None, str], Asked] = {}
    for index, text in questions:
      if (index, text) not in made:
        image = None if index is None else _at(images, index)
        chat = self.subject.chat(text, image is not None)
        made[index, text] = forward.ask(self.subject, chat, image)
    return [made[question] for question in questions]

  def _residual(self, header, arrays) -> Answer:
    request = _read(_Residual, header)
    self.subject.layer(request.layer)
    questions = [(row.image, row.prompt) for row in request.rows]
    out: Arrays = {}
    grids = []
    for i, asked in enumerate(self._ask(_images(arrays), questions)):
      x_BTD = self.subject.residuals(asked.inputs, [request.layer])
      out[f'x_{i}'] = _numpy(x_BTD[request.layer][0])
      out |= remote.token_arrays(asked.map, str(i))
      grids.append(list(asked.map.grid))
    return {'grids': grids}, out

  def _gradient(self, header, arrays) -> Answer:
    request = _read(_Gradient, header)
    self.subject.layer(request.layer)
    asked, tokens = self._contrast(request, _images(arrays))
    found = forward.gradient(self.subject, asked, request.layer, tokens)
    return {
      'grid': list(asked.map.grid),
      'logits': list(found.logits),
      'tokens': list(tokens),
      'difference': found.logits[0] - found.logits[1],
    }, {
      'x': _numpy(found.x_TD.float()),
      'grad': _numpy(found.grad_TD.float()),
      **remote.token_arrays(asked.map, '0'),
    }

  def _contrast(self, request, images) -> tuple[Asked, tuple[int, int]]:
    """The prompt up to where answer and baseline part, and the two tokens."""
    (plain,) = self._ask(images, [(request.image, request.prompt)])
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

    has_image = request.image is not None
    chat = self.subject.chat(request.prompt, has_image)
    shared, tokens = words.contrast(self.subject, chat, pair, likely)
    if not shared:
      return plain, tokens
    image = images[request.image] if has_image else None
    return forward.ask(self.subject, chat, image, shared), tokens

  def _logits(self, header, arrays) -> Answer:
    request = _read(_Logits, header)
    self.subject.layer(request.layer)
    images, tokens = _images(arrays), None
    if request.answer is None and request.baseline is None:
      (asked,) = self._ask(images, [(request.image, request.prompt)])
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

  def _ground(self, header, arrays) -> Answer:
    request = _read(_Ground, header)
    names = list(self.grounders)
    name = request.judge or (names[0] if names else 'clip')
    if name not in self.grounders:
      raise ValueError(
        f'judge {name!r} is not served, only {names}: start the server with '
        f'score.grounder={name}'
      )
    images = _images(arrays)
    for index in request.images:
      _at(images, index)
    if not request.texts:
      return {}, {}
    found = self.grounders[name].masks(
      images, request.images, request.texts, request.box_threshold
    )
    return {}, {f'mask_{i}': mask_HW for i, mask_HW in enumerate(found)}

  def _clip(self, header, arrays) -> Answer:
    request = _read(_Pairs, header)
    if self.clip_judge is None:
      raise ValueError('no CLIP is served: give its folder as score.clip_path')
    images = _images(arrays)
    for index in request.images:
      _at(images, index)
    if not request.texts:
      return {}, {'score_B': np.zeros(0, np.float32)}
    score_B = self.clip_judge.score(images, request.images, request.texts)
    return {}, {'score_B': score_B}


def _images(arrays: Arrays) -> list[Image.Image]:
  """The images image_0, image_1, ... of a request."""
  wanted = [f'image_{i}' for i in range(len(arrays))]
  if sorted(wanted) != sorted(arrays):
    raise ValueError(f'the arrays are {sorted(arrays)[:4]}, not image_0, ...')
  return [wire.picture(arrays[name]) for name in wanted]


def _at(images: Sequence[Image.Image], index: int) -> Image.Image:
  if not 0 <= index < len(images):
    raise ValueError(f'image {index}, but the request has {len(images)}')
  return images[index]


def _numpy(x: torch.Tensor) -> np.ndarray:
  """A tensor as an array; bfloat16 stays bfloat16."""
  x = x.detach().cpu()
  if x.dtype == torch.bfloat16:
    raw = x.contiguous().view(torch.int16).numpy()
    return raw.view(wire.DTYPES['BF16'])
  return x.numpy()
