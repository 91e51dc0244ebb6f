"""A layer's latents as an export that a Neuronpedia takes in.

    <root>/<model>/<source>/
      release.jsonl model.jsonl sourceset.jsonl source.jsonl
      features/batch-N.jsonl.gz       a latent a line, with its decoder row
      activations/batch-N.jsonl.gz    texts and images that fire it, by token
      explanations/batch-N.jsonl.gz   what the explainers said

The layout is that of https://docs.neuronpedia.org/api-and-data/exports, lines
are rows of the tables of hijohnnylin/neuronpedia, whose
apps/webapp/prisma/schema.prisma has their fields and whose admin page imports
such a folder. The importer takes the columns of a file from its first line, so
all lines of a file have the same fields.

Neuronpedia shows text. Each patch of an image's base view stands as a pseudo-
token `<img row,column>`, in reading order; nothing is said of an image's tiles.
Explainers are named in `notes`: the column for them takes only those that the
importer's own tables hold. Token logits and histograms of activations are left
empty: a run does not have them.
"""

import dataclasses
import gzip
import hashlib
import itertools
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from lmm_sae.core.index import LatentIndex
from lmm_sae.core.records import Explanation

BATCH = 1024  # latents a file, as in Neuronpedia's own exports
CREATOR = 'clkht01d40000jv08hvalcvly'  # the user that a new Neuronpedia has

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Source:
  """What the latents are of; a Neuronpedia shows it above them.

  Attributes:
    model: the subject's id, letters, digits, `_` and `-`, lower case.
    layer: decoder layer whose output is read.
    name: of the source set, without the layer: `res-mine`.
    split: half whose exemplars are shown.
    layers: of the subject; neurons: width of its MLP; 0 where not known.
    width: D.
    prompts: samples that exemplars were chosen from.
    rows: tokens that a latent could fire on, BOS left out.
  """

  model: str
  layer: int
  name: str
  split: str
  layers: int
  neurons: int
  width: int
  prompts: int
  rows: int

  @property
  def id(self) -> str:
    return f'{self.layer}-{self.name}'

  def __post_init__(self):
    for field in ('model', 'name'):
      value = getattr(self, field)
      if not re.fullmatch(r'[a-z0-9_-]{1,100}', value):
        raise ValueError(
          f'{value!r} is no {field} for Neuronpedia: letters (lower case), '
          'digits, _ and -'
        )


def slug(name: str) -> str:
  """The name of a model, or of a folder, as an id."""
  last = name.rstrip('/').rpartition('/')[2].lower()
  return re.sub(r'[^a-z0-9_-]+', '-', last).strip('-') or 'model'


def write(
  root: pathlib.Path,
  source: Source,
  index: LatentIndex,
  vectors: Callable[[int, int], np.ndarray],
  said: Iterable[Explanation],
) -> pathlib.Path:
  """Writes <root>/<model>/<source>, whole or not at all, and returns it.

  One batch of latents is held at a time, and what was said.

  Args:
    root: the folder of all exports.
    source: what the latents are of.
    index: of the layer and the split.
    vectors: (start, stop) to those latents' decoder rows, float32 [n, D].
    said: explanations; those of other layers and outcomes are left out.
  """
  folder = root / source.model / source.id
  part = folder.with_name(folder.name + '.part')
  shutil.rmtree(part, ignore_errors=True)
  by_latent: dict[int, list[Explanation]] = {}
  for one in said:
    if one.layer == source.layer and one.outcome == 'explained':
      by_latent.setdefault(one.latent, []).append(one)
  part.mkdir(parents=True)
  for name, row in _about(source, index).items():
    _lines(part / f'{name}.jsonl', [row], open)
  for start in range(0, index.num_latents, BATCH):
    batch = range(start, min(start + BATCH, index.num_latents))
    rows_MD = vectors(batch.start, batch.stop)
    tables = {
      'features': (
        _feature(source, index, latent, row_D)
        for latent, row_D in zip(batch, rows_MD, strict=True)
      ),
      'activations': (
        row for latent in batch for row in _activations(source, index, latent)
      ),
      'explanations': (
        row
        for latent in batch
        for row in _explanations(source, by_latent.get(latent, []))
      ),
    }
    for table, rows in tables.items():
      name = f'batch-{start // BATCH}.jsonl.gz'
      _lines(part / table / name, rows, _gzip)
  shutil.rmtree(folder, ignore_errors=True)
  part.rename(folder)
  return folder


def _gzip(path: pathlib.Path, mode: str) -> gzip.GzipFile:
  """As bytes that depend on the content alone."""
  return gzip.GzipFile(path, mode, compresslevel=5, mtime=0)


def _lines(path: pathlib.Path, rows: Iterable[Row], opened) -> None:
  """A JSON-lines file; an importer reads its first line, so none is empty."""
  rows = iter(rows)
  first = next(rows, None)
  if first is None:
    return
  path.parent.mkdir(exist_ok=True)
  with opened(path, 'wb') as file:
    for row in itertools.chain([first], rows):
      file.write(json.dumps(row, allow_nan=False).encode() + b'\n')


def _about(source: Source, index: LatentIndex) -> dict[str, Row]:
  """The rows of the four files of one line."""
  what = f'SAE of layer {source.layer}, {index.num_latents} latents'
  shown = {'creatorId': CREATOR, 'visibility': 'PUBLIC'}
  by = {'creatorName': 'lmm_sae', 'urls': []}
  return {
    'release': shown
    | by
    | {
      'name': f'{source.model}-{source.name}',
      'description': f'{what}, of {source.model}',
      'descriptionShort': what,
      'creatorNameShort': 'lmm_sae',
    },
    'model': shown
    | {
      'id': source.model,
      'displayName': source.model,
      'displayNameShort': source.model,
      'owner': 'lmm_sae',
      'instruct': True,
      'dimension': source.width,
      'layers': source.layers,
      'neuronsPerLayer': source.neurons,
    },
    'sourceset': shown
    | by
    | {
      'modelId': source.model,
      'name': source.name,
      'description': f'Residual stream, {index.num_latents} latents',
      'type': 'residual stream',
      'releaseName': f'{source.model}-{source.name}',
      'allowInferenceSearch': False,
      'hasDashboards': True,
    },
    'source': shown
    | {
      'id': source.id,
      'modelId': source.model,
      'setName': source.name,
      'hasDashboards': True,
      'inferenceEnabled': False,
      'num_prompts': source.prompts,
      'notes': 'Image tokens stand as <img row,column> of the base view.',
    },
  }


def _feature(
  source: Source, index: LatentIndex, latent: int, row_D: np.ndarray
) -> Row:
  """A row of the table Neuron."""
  peak = _digits(index.stats['peak'][latent])
  fired = int(index.stats['rows_fired'][latent])
  return {
    'modelId': source.model,
    'layer': source.id,
    'index': str(latent),
    'sourceSetName': source.name,
    'creatorId': CREATOR,
    'maxActApprox': peak,
    'frac_nonzero': _digits(fired / max(source.rows, 1)),
    'hasVector': True,
    'vector': row_D.astype(np.float64).round(7).tolist(),
    'vectorLabel': None,
    'vectorDefaultSteerStrength': peak,
    'hookName': f'blocks.{source.layer}.hook_resid_post',
    **{name: [] for name in EMPTY},
  }


EMPTY = (
  'topkCosSimIndices',
  'topkCosSimValues',
  'neuron_alignment_indices',
  'neuron_alignment_l1',
  'neuron_alignment_values',
  'correlated_neurons_indices',
  'correlated_neurons_l1',
  'correlated_neurons_pearson',
  'decoder_weights_dist',
  'neg_str',
  'neg_values',
  'pos_str',
  'pos_values',
  'freq_hist_data_bar_heights',
  'freq_hist_data_bar_values',
  'logits_hist_data_bar_heights',
  'logits_hist_data_bar_values',
)


def _activations(
  source: Source, index: LatentIndex, latent: int
) -> Iterator[Row]:
  """Rows of the table Activation: texts, then images, strongest first."""
  for at, text in enumerate(index.texts(latent)):
    yield _activation(
      source, latent, f'text {at}', text.sample, text.tokens, text.acts, text.at
    )
  for at, image in enumerate(index.exemplars(latent)):
    rows, cols = image.heat_HW.shape
    tokens = [
      f'<img {row},{col}>' for row in range(rows) for col in range(cols)
    ]
    acts = image.heat_HW.ravel()
    yield _activation(
      source, latent, f'image {at}', image.sample, tokens, acts, acts.argmax()
    )


def _activation(source, latent, name, sample, tokens, acts, at) -> Row:
  values = [_digits(value) for value in acts]
  top = max(values)
  return {
    'id': _id(source, latent, name),
    'modelId': source.model,
    'layer': source.id,
    'index': str(latent),
    'creatorId': CREATOR,
    'tokens': [_shown(token) for token in tokens],
    'values': values,
    'maxValue': top,
    'maxValueTokenIndex': values.index(top),
    'minValue': min(values),
    'qualifyingTokenIndex': int(at),
    'dataSource': name.partition(' ')[0],
    'dataIndex': f'{source.split}/{sample}',
    'binMin': None,
    'binMax': None,
    'binContains': None,
    'dfaValues': [],
    'dfaTargetIndex': None,
    'dfaMaxValue': None,
    'lossValues': [],
    'logitContributions': None,
  }


def _explanations(source: Source, said: Iterable[Explanation]) -> Iterator[Row]:
  """Rows of the table Explanation: the short label, the whole text beside."""
  for at, one in enumerate(said):
    yield {
      'id': _id(source, one.latent, f'explanation {at}'),
      'modelId': source.model,
      'layer': source.id,
      'index': str(one.latent),
      'authorId': CREATOR,
      'description': _shown(one.label or one.text),
      'notes': _shown(f'{one.explainer}: {one.text}'),
      'typeName': None,
      'explanationModelName': None,
      'embedding': None,
      'umap_x': 0.0,
      'umap_y': 0.0,
      'umap_cluster': 0,
      'umap_log_feature_sparsity': 0.0,
    }


def _id(source: Source, latent: int, name: str) -> str:
  """25 letters and digits, the same for the same thing."""
  key = f'{source.model} {source.id} {latent} {name}'
  return 'c' + hashlib.sha256(key.encode()).hexdigest()[:24]


def _shown(text: str) -> str:
  """Text that Postgres takes: no NUL, no half of a surrogate pair."""
  return text.replace('\0', ' ').encode('utf-8', 'replace').decode()


def _digits(value: float) -> float:
  return float(f'{float(value):.5g}')
