"""A subject whose logits are linear in the residual, with an SAE that is exact.

Its answers follow from arithmetic, so that steering, attribution, EQ and
mistakes can be reckoned by hand. Latents 0 to 3 write the words red, blue,
happy and sad; latent 4 is called red but writes nothing; latent 5 writes red
too, and fires on some blue things: there the subject errs; 6 to 8 are idle
talk. Each true latent fires at 1.0 on two of the four image tokens.
"""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
from PIL import Image

from lmm_sae.core import records, remote
from lmm_sae.core.index import ImageExemplar, LatentIndex
from lmm_sae.core.store import ActivationStore, StoreMeta
from lmm_sae.core.tokens import Kind, TokenMap
from lmm_sae.core.workdir import Workdir

LAYER = 2
WORDS = ('red', 'blue', 'happy', 'sad')
COLOUR, FEEL = 'what colour is it?', 'how does it feel?'
D, M, K = 11, 9, 5
KINDS_T = np.array(
  [Kind.BOS, *[Kind.BASE] * 4, Kind.TEMPLATE, Kind.QUESTION], np.uint8
)
T = len(KINDS_T)
W_MD = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0][:M].astype(
  np.float32
)
READ_VD = W_MD[:4].copy()
READ_VD[0] += W_MD[5]
PEAKS_M = np.array([1, 1, 1, 1, 1, 3, 0.5, 0.5, 0.5], np.float32)
CONCEPTS = ('red', 'blue', 'happy', 'sad', 'red', '', '', '', '')


@dataclasses.dataclass(frozen=True)
class Code:
  vals_NK: np.ndarray
  idx_NK: np.ndarray


class Sae:
  """The exact dictionary."""

  w_dec_MD = W_MD

  def encode(self, x_ND):
    pre_NM = x_ND @ W_MD.T
    pre_NM[pre_NM < 1e-5] = 0  # W is orthonormal but for rounding
    idx_NK = np.argsort(-pre_NM, 1, kind='stable')[:, :K].astype(np.int32)
    return Code(np.take_along_axis(pre_NM, idx_NK, 1), idx_NK)


def truth(sample):
  """(colour, emotion) of a sample, as indices into WORDS."""
  return sample % 2, 2 + sample // 2 % 2


def errs(sample):
  """Whether latent 5 makes the subject say red of a blue thing."""
  return sample % 10 == 5


def code_TM(sample):
  z_TM = np.zeros((T, M), np.float32)
  z_TM[1:3, truth(sample)[0]] = 1
  z_TM[2:4, truth(sample)[1]] = 1
  if errs(sample):
    z_TM[4, 5] = 3
  z_TM[4:, 6 + sample % 3] = 0.5
  return z_TM


class Client:
  """What `remote.SubjectClient` does, for this subject; counts its requests."""

  def __init__(self, fail_after=10**9):
    self.requests = 0
    self.rows = []
    self._fail_after = fail_after

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def generate(self, rows, images, max_new_tokens, seed=None, peaks=None):
    self._count()
    self.rows.append(len(rows))
    texts = []
    for row in rows:
      logits_V = self._logits(
        None if row.image is None else images[row.image],
        row.edits,
        None if peaks is None else peaks[row.layer],
      )
      word = WORDS[self._ranked(logits_V, row.prompt)[0]]
      texts.append(f'{word} then' if row.sae else f' {word}')
    return texts

  def next(self, image, prompt, top=10):
    self._count()
    logits_V = self._logits(image, ())
    return [
      remote.NextToken(v, f' {WORDS[v]}', float(logits_V[v]), 0.0)
      for v in self._ranked(logits_V, prompt)[:top]
    ]

  def gradient(self, layer, image, prompt, answer, baseline, points=1):
    assert points >= 1  # of a linear subject all gradients are equal
    self._count()
    none_T, box_T4 = np.full(T, -1, np.int16), np.zeros((T, 4), np.float32)
    token_T = np.zeros(T, np.int32)
    row_T, col_T = np.array(
      [[-1, 0, 0, 1, 1, -1, -1], [-1, 0, 1, 0, 1, -1, -1]]
    )
    map_ = TokenMap(token_T, KINDS_T, none_T, row_T, col_T, box_T4, (2, 2))
    grad_D = READ_VD[answer] - READ_VD[baseline]
    logits_V = self._logits(image, ())
    return {
      'x_TD': code_TM(_id(image)) @ W_MD,
      'grad_TD': np.tile(grad_D, (T, 1)),
      'kind_T': KINDS_T,
      'map': map_,
      'difference': float(logits_V[answer] - logits_V[baseline]),
    }

  def difference(self, layer, image, prompt, answer, baseline, edit_sets):
    self._count()
    logits = [self._logits(image, edits) for edits in edit_sets]
    return [float(row_V[answer] - row_V[baseline]) for row_V in logits]

  def _count(self):
    self.requests += 1
    if self.requests > self._fail_after:
      raise ConnectionError('killed')

  def _ranked(self, logits_V, prompt):
    words = (0, 1) if prompt == COLOUR else (2, 3)
    return sorted(words, key=lambda v: -logits_V[v])

  def _logits(self, image, edits, peaks_M=None):
    z_TM = np.zeros((T, M), np.float32)
    if image is not None:
      z_TM = code_TM(_id(image))
    for edit in edits:
      where = {'image': KINDS_T == Kind.BASE, 'all': KINDS_T != Kind.BOS}
      value = {'clamp': edit.value, 'ablate': 0.0}[edit.mode]
      if edit.unit == 'peak' and edit.mode == 'clamp':
        value *= peaks_M[edit.latent]
      z_TM[where[edit.where], edit.latent] = value
    return (z_TM @ W_MD @ READ_VD.T).sum(0).round(4)  # draws are draws


class Index:
  """What `LatentIndex` tells, of this subject."""

  def __init__(self):
    always_M = np.arange(M) == 7
    self.stats = {'peak_image': PEAKS_M, 'always_on': always_M}

  def sample(self, sample):
    latents = np.flatnonzero(code_TM(sample)[1:5].any(0))
    return latents, np.ones(len(latents), np.float32)

  def exemplars(self, latent):
    return [ImageExemplar(latent, 1.0, np.ones((2, 2), np.float32), None)]


def make(root, samples=40, known=True):
  """A workdir with the stores of both halves, and what the stages ask for."""
  workdir = Workdir.of(root)
  for half in ('a', 'b'):
    _store(workdir.acts(half), half, samples, known)
    workdir.index(LAYER, half).mkdir(parents=True)
  workdir.export(LAYER).mkdir(parents=True)
  if known:
    rows = [_concept(latent) for latent in range(M)]
    records.write_json(workdir.file('concepts.json'), {str(LAYER): rows})
  return workdir


def patch(monkeypatch, client):
  """Puts this subject in the place of server and index."""
  from lmm_sae.core import asking

  monkeypatch.setattr(asking, 'connect', lambda *_: client)
  monkeypatch.setattr(LatentIndex, 'open', lambda _: Index())


def _concept(latent):
  return {
    'latent': latent,
    'concept': CONCEPTS[latent],
    'threshold': 0.1,
    'f1_a': 0.9 if latent == 4 else 0.8 if latent < 4 else 0.0,
    'f1_b': 0.8,
    'precision_b': 0.95,
    'objects': 0.9,
    'peak': 1.0,
    'clean': latent < 4,
  }


def _id(image):
  return image.getpixel((0, 0))[0]


def _store(path, half, count, known):
  meta = StoreMeta(half, 'toy', 'f', (LAYER,), {}, D, (2, 2), 'pil')
  store = ActivationStore.create(path, meta, 1, count * 8, count * 8, 8)
  path = pathlib.Path(path)
  (path / 'images').mkdir()
  samples = []
  for i in range(count):
    Image.new('RGB', (2, 2), (i, 0, 0)).save(path / f'images/{i:06d}.png')
    colour, feeling = (WORDS[v] for v in truth(i))
    turns = (
      records.Turn('emotion', FEEL, feeling, feeling),
      records.Turn('colour', COLOUR, colour, colour),
    )
    if not known:
      turns = (records.Turn('', 'what is it?', 'it is a long story'),)
    image = f'images/{i:06d}.png'
    samples.append(
      records.Sample(
        i,
        0,
        f's{i}',
        image,
        2,
        2,
        '',
        turns,
        i * T,
        (i + 1) * T,
        {'concepts': {}} if known else None,
      )
    )
  rows = count * T
  zeros = np.zeros(rows, np.int32)
  store.write_group(
    0,
    {LAYER: np.zeros((rows, D), ml_dtypes.bfloat16)},
    {
      **dict.fromkeys(
        ('sample', 'position', 'token', 'kind', 'row', 'col'), zeros
      ),
      'image': np.zeros(rows, np.int16),
      'box': np.zeros((rows, 4), np.int16),
    },
    samples,
    [],
  )
  (path / 'vocab.json').write_text(json.dumps(WORDS))
