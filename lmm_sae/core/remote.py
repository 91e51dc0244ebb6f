"""The client of the subject server, `lmm-sae serve`.

  client = SubjectClient('http://127.0.0.1:8000')
  rows = [GenerateRow(0, 'how does the face feel?', layer=2,
                      edits=(Edit(17, 3.0, unit='peak', where='image'),))]
  texts = client.generate(rows, [image], 6, peaks={2: index.stats['peak']})

Nothing here knows of torch: bodies are `core.wire`, the answers numpy.
"""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import numpy as np
from PIL import Image

from lmm_sae.core import wire
from lmm_sae.core.records import Edit
from lmm_sae.core.tokens import ARRAYS, TokenMap

# {layer: peak activation of a latent, by index}; an array [M] or a dict.
Peaks = Mapping[int, Mapping[int, float] | np.ndarray]


logging.getLogger('httpx').setLevel(logging.WARNING)  # a line a request


@dataclasses.dataclass(frozen=True)
class GenerateRow:
  """One answer that is asked for.

  Attributes:
    image: index into the images of the request; None: no image.
    prompt: the user's words; the server applies the chat template.
    edits: made together while the model reads and writes; (): none. At the
      tokens they name the SAE's reconstruction, edited, takes the residual's
      place (or its change is added, `Edit.keep_error`); elsewhere the model is
      left alone.
    layer: 0-based decoder layer whose output is edited.
    sae: without edits: True is the SAE-only control (the reconstruction takes
      the residual's place), False the plain model. With edits it says nothing.
    where, when: the tokens and the phase of that control, as in `Edit`.
  """

  image: int | None
  prompt: str
  edits: tuple[Edit, ...] = ()
  layer: int = 0
  sae: bool = False
  where: str = 'all'
  when: str = 'prompt'


@dataclasses.dataclass(frozen=True)
class NextToken:
  """A token that may come next, its text, logit and log-probability."""

  token: int
  text: str
  logit: float
  logprob: float


class SubjectClient:
  """Talks to one subject server; may be shared by threads.

  Args:
    url: of the server, `http://HOST:PORT`.
    token: bearer token, where the server has one.
    timeout_s: of one request, its wait in the server's queue included.
    connect_s: how long a server that does not answer is given to come up.

  Every method raises:
    ConnectionError: the server does not answer, or went away.
    ValueError: the server refuses the request; the message says why.
    RuntimeError: the server failed.
  """

  def __init__(
    self,
    url: str,
    token: str = '',
    timeout_s: float = 600.0,
    connect_s: float = 10.0,
  ):
    self.url = url.rstrip('/')
    self.timeout_s = timeout_s
    self.connect_s = connect_s
    headers = {'Authorization': f'Bearer {token}'} if token else {}
    limits = httpx.Timeout(timeout_s, connect=min(connect_s, timeout_s))
    try:
      self._http = httpx.Client(
        base_url=self.url, headers=headers, timeout=limits, trust_env=False
      )
    except httpx.InvalidURL as error:
      raise ValueError(f'server.url {url!r} is not a URL: {error}') from error

  def close(self) -> None:
    self._http.close()

  def __enter__(self) -> 'SubjectClient':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def health(self) -> bool:
    """Whether the server answers, asked once."""
    try:
      return self._http.get('/health', timeout=5.0).status_code == 200
    except httpx.TransportError:
      return False

  def info(self) -> dict[str, Any]:
    """What is served.

    Returns:
      {model: name, layers: number of decoder layers, width: D, grid: [rows,
      cols] of the base view, saes: {layer (int): {latents, k}}, judges: names
      that `ground` takes, clip: bool}.
    """
    info = self._send('GET', '/info').json()
    info['saes'] = {int(layer): sae for layer, sae in info['saes'].items()}
    return info

  def generate(
    self,
    rows: Sequence[GenerateRow],
    images: Sequence[Image.Image],
    max_new_tokens: int,
    seed: int | None = None,
    peaks: Peaks | None = None,
  ) -> list[str]:
    """One answer a row, special tokens left out; greedy unless seeded.

    Rows of one image and prompt share the work below the edited layer, and all
    rows of equal length are decoded together: send many in one call.

    Args:
      seed: None: greedy; else the seed of sampling at temperature 1. A row's
        draws depend on the seed and its place in the request alone.
      peaks: needed where an edit has unit `peak`; only what is used is sent.
    """
    header = {
      'rows': [dataclasses.asdict(row) for row in rows],
      'max_new_tokens': max_new_tokens,
      'seed': seed,
      'peaks': _used(peaks, [(row.layer, row.edits) for row in rows]),
    }
    answer, _ = self._post('/generate', header, _images(images))
    return answer['texts']

  def residual(
    self, layer: int, rows: Sequence[tuple[Image.Image | None, str]]
  ) -> list[tuple[np.ndarray, TokenMap]]:
    """Residual x_TD (bfloat16 or float32) and map of each (image, prompt)."""
    images, indices = _distinct([image for image, _ in rows])
    asked = [
      {'image': index, 'prompt': prompt}
      for index, (_, prompt) in zip(indices, rows, strict=True)
    ]
    header = {'layer': layer, 'rows': asked}
    answer, arrays = self._post('/residual', header, _images(images))
    return [
      (arrays[f'x_{i}'], wire.token_map(arrays, f'{i}', grid))
      for i, grid in enumerate(answer['grids'])
    ]

  def gradient(
    self,
    layer: int,
    image: Image.Image | None,
    prompt: str,
    answer: str | int,
    baseline: str | int,
    points: int = 1,
  ) -> dict[str, Any]:
    """Residual of the layer and the gradient of a logit difference to it.

    Args:
      points: of which the gradient is the mean, on the path along which the
        latents grow from nothing to what they are; 1: at the residual alone.
      answer, baseline: words, or token ids. Of words the first token that
        differs is compared, at the position where it would be generated: what
        they share before it is appended to the prompt.

    Returns:
      x_TD, grad_TD: float32, the gradient of difference.
      token_T, kind_T, image_T, row_T, col_T, box_T4: as in TokenMap.
      map: the same as a TokenMap.
      logits: (of the answer, of the baseline); tokens: their ids.
      difference: logit(answer) - logit(baseline), float.
    """
    compared = {'answer': answer, 'baseline': baseline, 'points': points}
    got, arrays = self._ask('/gradient', layer, image, prompt, compared)
    token_map = wire.token_map(arrays, '0', got['grid'])
    return {
      'x_TD': arrays['x'],
      'grad_TD': arrays['grad'],
      **{name: getattr(token_map, name) for name in ARRAYS},
      'map': token_map,
      'logits': tuple(got['logits']),
      'tokens': tuple(got['tokens']),
      'difference': got['difference'],
    }

  def difference(
    self,
    layer: int,
    image: Image.Image | None,
    prompt: str,
    answer: str | int,
    baseline: str | int,
    edit_sets: Sequence[tuple[Edit, ...]],
    peaks: Peaks | None = None,
  ) -> list[float]:
    """logit(answer) - logit(baseline) under each edit set; () is the plain one.

    Answer and baseline as in `gradient`.
    """
    compared = {
      'answer': answer,
      'baseline': baseline,
      'edit_sets': [[dataclasses.asdict(e) for e in s] for s in edit_sets],
      'peaks': _used(peaks, [(layer, edits) for edits in edit_sets]),
    }
    got, _ = self._ask('/logits', layer, image, prompt, compared)
    return got['differences']

  def next(
    self,
    image: Image.Image | None,
    prompt: str,
    top: int = 10,
    layer: int = 0,
    edits: tuple[Edit, ...] = (),
    peaks: Peaks | None = None,
  ) -> list[NextToken]:
    """The tokens most likely to come next, best first; plain without edits."""
    wanted = {
      'edit_sets': [[dataclasses.asdict(edit) for edit in edits]],
      'top': top,
      'peaks': _used(peaks, [(layer, edits)]),
    }
    got, _ = self._ask('/logits', layer, image, prompt, wanted)
    return [NextToken(**token) for token in got['top'][0]]

  def ground(
    self,
    images: Sequence[Image.Image],
    phrases: Sequence[str],
    box_threshold: float = 0.3,
    judge: str = '',
  ) -> list[np.ndarray]:
    """Where each phrase is in its image: bool [H, W] a pair, image-sized.

    Args:
      images, phrases: of equal length, taken in pairs; an image given several
        times (the same object) is sent and read once.
      box_threshold: of Grounding DINO; other judges have their own.
      judge: clip, dino or clipseg; '': the one that the server was given.
    """
    header = {
      'box_threshold': box_threshold,
      'judge': judge,
      **_pairs(images, phrases),
    }
    sent, header['images'] = _distinct(images)
    _, arrays = self._post('/ground', header, _images(sent))
    return [arrays[f'mask_{i}'] for i in range(len(phrases))]

  def clip(
    self, images: Sequence[Image.Image], texts: Sequence[str]
  ) -> np.ndarray:
    """100 * cos(image, text) of each pair, float32 [B]."""
    header = _pairs(images, texts)
    sent, header['images'] = _distinct(images)
    _, arrays = self._post('/clip', header, _images(sent))
    return arrays['score_B']

  def _ask(
    self,
    path: str,
    layer: int,
    image: Image.Image | None,
    prompt: str,
    rest: dict[str, Any],
  ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Posts a question about one prompt, with a picture or without."""
    index = None if image is None else 0
    header = {'layer': layer, 'image': index, 'prompt': prompt, **rest}
    return self._post(path, header, _images([] if image is None else [image]))

  def _post(
    self, path: str, header: dict[str, Any], arrays: dict[str, np.ndarray]
  ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return wire.unpack(
      self._send('POST', path, wire.pack(header, arrays)).content
    )

  def _send(self, method: str, path: str, body: bytes | None = None):
    """The good answer to one request; waits out a start-up and a full queue."""
    start, pause_s = time.monotonic(), 0.05
    while True:
      spent_s = time.monotonic() - start
      try:
        answer = self._http.request(method, path, content=body)
      except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        if spent_s >= self.connect_s:
          raise ConnectionError(
            f'the subject server at {self.url} does not answer: start it with '
            '`lmm-sae serve` and the same --config and --workdir, and give '
            f'its URL as server.url ({error})'
          ) from error
      except httpx.UnsupportedProtocol as error:
        raise ValueError(f'server.url {self.url!r}: {error}') from error
      except httpx.TimeoutException as error:
        raise ConnectionError(
          f'the subject server at {self.url} gave no answer to {path} within '
          f'{self.timeout_s:g} s: raise server.timeout_s or send less at once'
        ) from error
      except httpx.TransportError as error:
        raise ConnectionError(
          f'the subject server at {self.url} went away during {path}: {error}'
        ) from error
      else:
        if answer.status_code != 503:
          return _checked(answer, path)
        if spent_s >= self.timeout_s:
          raise ConnectionError(
            f'the subject server at {self.url} stayed busy for '
            f'{self.timeout_s:g} s: raise server.queue or server.timeout_s'
          )
      time.sleep(pause_s)
      pause_s = min(1.6 * pause_s, 2.0)


def _checked(answer: httpx.Response, path: str) -> httpx.Response:
  """The answer if it is good, else its message as an exception."""
  if answer.status_code == 200:
    return answer
  try:
    message = answer.json()['error']
  except (ValueError, KeyError, TypeError):
    message = answer.text[:200]
  message = f'the subject server refused {path}: {message}'
  if 400 <= answer.status_code < 500:
    raise ValueError(message)
  raise RuntimeError(message.replace('refused', 'failed at'))


def _images(images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
  return {f'image_{i}': wire.png(image) for i, image in enumerate(images)}


def _distinct(
  images: Sequence[Image.Image | None],
) -> tuple[list[Image.Image], list[int | None]]:
  """The images without repeats (by identity), and the index of each in them."""
  place: dict[int, int] = {}
  kept, indices = [], []
  for image in images:
    if image is not None and id(image) not in place:
      place[id(image)] = len(kept)
      kept.append(image)
    indices.append(None if image is None else place[id(image)])
  return kept, indices


def _pairs(images: Sequence, texts: Sequence[str]) -> dict[str, Any]:
  if len(images) != len(texts):
    raise ValueError(f'{len(images)} images and {len(texts)} texts do not pair')
  return {'texts': list(texts)}


def _used(
  peaks: Peaks | None, edits: Sequence[tuple[int, tuple[Edit, ...]]]
) -> dict[str, dict[str, float]]:
  """The peaks that edits of unit `peak` need, {layer: {latent: peak}}."""
  used: dict[str, dict[str, float]] = {}
  for layer, edit in ((layer, e) for layer, es in edits for e in es):
    if edit.unit != 'peak':
      continue
    if peaks is None or layer not in peaks:
      raise ValueError(
        f'the edit of latent {edit.latent} counts in its peak: give the peaks '
        f'of layer {layer}, from the index, to the client'
      )
    try:
      peak = float(peaks[layer][edit.latent])
    except (IndexError, KeyError) as error:
      raise ValueError(
        f'no peak of latent {edit.latent} of layer {layer}'
      ) from error
    used.setdefault(str(layer), {})[str(edit.latent)] = peak
  return used
