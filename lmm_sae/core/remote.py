"""The client of the subject server, `lmm-sae serve`.

  client = SubjectClient('http://127.0.0.1:8000')
  rows = [GenerateRow(0, 'how does the face feel?', layer=2,
                      edits=(Edit(17, 3.0, unit='peak', where='image'),))]
  texts = client.generate(rows, [image], 6, peaks={2: index.stats['peak']})

Nothing here knows of torch: bodies are `core.wire`, the answers numpy.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lmm_sae.core import wire
from lmm_sae.core.connection import Connection
from lmm_sae.core.records import Edit
from lmm_sae.core.tokens import ARRAYS, TokenMap

# {layer: peak activation of a latent, by index}; an array [M] or a dict.
Peaks = Mapping[int, Mapping[int, float] | np.ndarray]


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


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
  """One conversation, as it was captured.

  Attributes:
    token_T, kind_T: of the store, the image's tokens among them.
    image: None where it has none.
    given: rows [T, D] that stand in for the residual, an array a variant.
  """

  token_T: np.ndarray
  kind_T: np.ndarray
  image: Image.Image | None
  given: tuple[np.ndarray, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
  """Of R variants of the residual, at every token but the last, in nats.

  Attributes:
    ce_RT: -log p of the token that comes next, float32 [R, T - 1].
    kl_RT: KL(clean, variant) of what may come next.
  """

  ce_RT: np.ndarray
  kl_RT: np.ndarray


class SubjectClient(Connection):
  """Talks to one subject server; may be shared by threads.

  Every method raises:
    ConnectionError: the server does not answer, or went away.
    ValueError: the server refuses the request; the message says why.
    RuntimeError: the server failed.
  """

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

  def loss(
    self,
    layer: int,
    texts: Sequence[Text],
    variants: Sequence[str],
    kinds: Sequence[str] = ('all',),
    mean_D: np.ndarray | None = None,
  ) -> list[Loss]:
    """What the predictions lose while something stands in for the residual.

    Args:
      variants: of the layer's output: `clean`, `sae` (the reconstruction),
        `error` (the reconstruction and what it misses, so clean but for
        rounding), `zero`, `mean` (`mean_D`). A loss has a row for each, then
        one for each array that the texts give.
      kinds: tokens that are replaced, as in `tokens.kinds`.
    """
    images, indices = _distinct([text.image for text in texts])
    arrays = _images(images)
    for i, text in enumerate(texts):
      arrays[f'token_{i}'] = text.token_T.astype(np.int32)
      arrays[f'kind_{i}'] = text.kind_T.astype(np.uint8)
      arrays |= {f'given_{i}_{j}': x for j, x in enumerate(text.given)}
    if mean_D is not None:
      arrays['mean'] = mean_D.astype(np.float32)
    header = {
      'layer': layer,
      'images': indices,
      'given': len(texts[0].given) if texts else 0,
      'variants': list(variants),
      'kinds': list(kinds),
    }
    _, got = self._post('/loss', header, arrays)
    return [Loss(got[f'ce_{i}'], got[f'kl_{i}']) for i in range(len(texts))]

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
