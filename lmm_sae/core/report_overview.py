"""The report's overview: facts, figures beside baselines, fates, tables."""

import collections
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmm_sae.core.findings import FATES, Findings
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir

WHY = {
  'explained': 'an explainer described what its images share',
  'no_pattern': 'the explainer saw its images and found nothing in common',
  'failed': 'no answer could be had',
  'not_asked': 'it fires, but no explainer was asked',
  'always_on': 'it fires on most images, so it tells none apart',
  'tiles_only': 'the base view never fires it, so there is no mask to show',
  'text_only': 'it fires on words, never on an image',
  'dead': 'nothing in this half of the data fires it',
}

# name, title, what it says, baselines and their names, least top of its axis;
# an axis that ends at 0 ends at the count n.
FIGURES = (
  (
    'fvu',
    'Variance left unexplained',
    'What the SAE loses of the residual stream (FVU). Lower is better.',
    {},
    0.2,
  ),
  (
    'clean_concepts',
    'Concepts with a clean latent of their own',
    'Of the '
    'concepts met in the data, those with a latent that means nothing else.',
    {'clean_concepts_neurons': 'raw neurons'},
    0,
  ),
  (
    'explained_right',
    'Explanations that name the true concept',
    'Over all '
    'latents that speak of objects; right means the answer contains the '
    'concept.',
    {'explained_right_shuffled': 'shuffled'},
    1,
  ),
  (
    'iou',
    'Overlap of explanation and activation (IoU)',
    'Where the label is found in the image, against where the latent fires.',
    {'iou_shuffled': 'shuffled label', 'iou_random': 'random images'},
    1,
  ),
  (
    'clip',
    'CLIP score of label and images',
    '100 times the cosine. The '
    "packaged judge shares the subject's trunk, so trust the masks first.",
    {'clip_shuffled': 'shuffled label', 'clip_random': 'random images'},
    30,
  ),
  (
    'steer_colour',
    'Answers steered to another colour',
    'Share of answers that name the target once its latent is clamped.',
    {'steer_random': 'random latent'},
    1,
  ),
  (
    'steer_emotion',
    'Answers steered to another emotion',
    'The same for faces: happy, sad, angry, surprised.',
    {'steer_random': 'random latent'},
    1,
  ),
  (
    'attribution_correlation',
    'First-order price against real ablation',
    'Correlation over the top latents of each attributed answer.',
    {},
    1,
  ),
)
SKIP = {'seconds', 'layers', 'format_version'}
KIND_ORDER = (
  'base', 'tile', 'newline', 'template', 'question', 'answer', 'bos', 'all',
)  # fmt: skip
COLUMNS = {'fvu': 'FVU', 'l0': 'L0', 'dead': 'Dead', 'rows': 'Tokens'}


def number(value: float | int | None) -> str:
  """A number as the page writes it."""
  if value is None:
    return '–'
  if isinstance(value, int) or float(value).is_integer() and abs(value) >= 10:
    return f'{int(value):,}'
  size = abs(value)
  places = 0 if size >= 100 else 1 if size >= 10 else 2
  return f'{value:.{3 if 0 < size < 0.1 else places}f}'


def percent(share: float) -> str:
  return f'{100 * share:.{1 if 0 < share < 0.1 else 0}f}%'


def interval(ci: Sequence[float] | None) -> str:
  return f'{number(ci[0])} to {number(ci[1])}' if ci else ''


def figures(summary: dict[str, Any]) -> list[dict[str, Any]]:
  """The headline figures, each with its baselines and its plot."""
  beside = {name for row in FIGURES for name in row[3]}
  known = {row[0] for row in FIGURES}
  others = [
    (name, name.replace('_', ' ').capitalize(), '', {}, 0)
    for name, figure in summary.items()
    if name not in known | beside | SKIP and isinstance(figure, dict)
  ]
  return [
    _figure(summary, *row) for row in (*FIGURES, *others) if row[0] in summary
  ]


def _figure(
  summary: dict[str, Any],
  name: str,
  title: str,
  note: str,
  baselines: dict[str, str],
  top: float,
) -> dict[str, Any]:
  figure = summary[name]
  made = {'name': name, 'title': title, 'note': note, 'text': None}
  if figure['value'] is None:
    return made | {'reason': figure.get('reason', 'not run')}
  bases = [
    {
      'name': word,
      'text': number(summary[base]['value']),
      'ci': _brackets(summary[base]['ci']),
      'mark': mark,
    }
    for (base, word), mark in zip(
      baselines.items(), ('circle', 'diamond'), strict=False
    )
    if summary[base]['value'] is not None
  ]
  points = [(figure, 'dot')] + [
    (summary[base], mark)
    for base, mark in zip(baselines, ('circle', 'diamond'), strict=False)
    if summary[base]['value'] is not None
  ]
  ends = [
    end for one, _ in points for end in (one['value'], *(one['ci'] or ()))
  ]
  high = max([top or figure['n'] or 1, *ends])
  low = min([0.0, *ends])
  return made | {
    'text': number(figure['value']),
    'ci': interval(figure['ci']),
    'n': f'n {number(figure["n"])}' if figure['n'] else '',
    'baselines': bases,
    'plot': {
      'domain': [low, high],
      'points': [
        {'value': one['value'], 'ci': one['ci'], 'mark': mark}
        for one, mark in points
      ],
    },
  }


def _brackets(ci: Sequence[float] | None) -> str:
  return f'({interval(ci)})' if ci else ''


def fates(findings: Findings) -> list[dict[str, Any]]:
  """How many latents met each fate; every latent is counted once."""
  counts = collections.Counter(
    findings.fate(latent) for latent in range(findings.index.num_latents)
  )
  return [
    {
      'key': key,
      'name': name[0].lower() + name[1:],
      'count': counts[key],
      'text': number(counts[key]),
      'why': WHY[key],
    }
    for key, name in FATES.items()
    if counts[key] or key in ('explained', 'no_pattern', 'dead')
  ]


def quality(
  table: dict[str, dict[str, float]],
) -> tuple[list[str], list[dict[str, Any]]]:
  """Column titles and rows of evaluation.json for one layer."""
  kinds = [kind for kind in KIND_ORDER if kind in table]
  kinds += [kind for kind in table if kind not in KIND_ORDER]
  fields = [
    name
    for name in dict.fromkeys(
      [*COLUMNS, *(name for kind in kinds for name in table[kind])]
    )
    if any(_is_number(table[kind].get(name)) for kind in kinds)
  ]
  rows = []
  for kind in kinds:
    cells = []
    for name in fields:
      value = table[kind].get(name)
      if not _is_number(value):
        cells.append(None)
        continue
      tops = [table[k][name] for k in kinds if _is_number(table[k].get(name))]
      text = percent(value) if name == 'dead' else number(value)
      share = None
      if name in ('fvu', 'dead'):
        top = 1 if name == 'dead' else max(*tops, 1e-9)
        share = round(100 * value / top, 1)
      cells.append({'text': text, 'share': share})
    rows.append({'kind': kind, 'name': kind.capitalize(), 'cells': cells})
  titles = [
    COLUMNS.get(name, name.replace('_', ' ').upper()) for name in fields
  ]
  return titles, rows


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def explainers(
  findings: Findings, right: dict[str, Any]
) -> tuple[list[str], list[dict[str, Any]]]:
  """Column titles and a row for each model that was asked.

  `right` is the summary's explained_right of this layer, by explainer.
  """
  rows = [
    _explainer(findings, name, right.get(name, {}))
    for name in findings.explainers
  ]
  titles = ['Asked', 'Explained', 'Names the concept', 'IoU', 'CLIP score']
  return titles, rows


def _explainer(
  findings: Findings, name: str, right: dict[str, Any]
) -> dict[str, Any]:
  said = [
    one
    for lines in findings.explained.values()
    for one in lines
    if one.explainer == name
  ]
  asked = [one for one in said if one.outcome not in ('dead', 'always_on')]
  explained = [one for one in asked if one.outcome == 'explained']
  return {
    'name': name or 'explainer',
    'cells': [
      {'text': number(len(asked)), 'note': ''},
      {
        'text': number(len(explained)),
        'note': percent(len(explained) / len(asked)) if asked else '',
      },
      _right(right),
      _scored(findings, name, findings.iou_scorer),
      _scored(findings, name, 'clip'),
    ],
  }


def _right(right: dict[str, Any]) -> dict[str, str] | None:
  figure = right.get('explained_right', {'value': None})
  if figure['value'] is None:
    return None
  shuffled = right['explained_right_shuffled']['value']
  return {
    'text': f'{number(figure["value"])} ({interval(figure["ci"])})',
    'note': f'n {number(figure["n"])}, shuffled {number(shuffled)}',
  }


def _scored(
  findings: Findings, explainer: str, scorer: str
) -> dict[str, str] | None:
  table: dict[str, list[float]] = {}
  for latent in findings.scores:
    scores = findings.scored(latent, explainer).get(scorer, {})
    if '' in scores and scores[''].explainer == explainer:
      for baseline, one in scores.items():
        table.setdefault(baseline, []).append(one.value)
  if '' not in table:
    return None
  names = {name: name.split('_')[0] for name in sorted(table) if name}
  return {
    'text': number(float(np.mean(table['']))),
    'note': ', '.join(
      f'{short} {number(float(np.mean(table[name])))}'
      for name, short in names.items()
    ),
  }


def context(
  workdir: Workdir,
  title: str,
  found: list[Findings],
  summary: dict[str, Any],
  stores: dict[str, ActivationStore],
) -> dict[str, Any]:
  """All that the page's template shows; `title` '' makes one."""
  store = stores[found[0].split]
  model = pathlib.PurePath(store.meta.model).name
  names = ' and '.join(str(one.layer) for one in found)
  plural = 's' if len(found) > 1 else ''
  seconds = summary['seconds']
  return {
    'title': title or f'Inside {model}, layer{plural} {names}',
    'eyebrow': 'What a larger multimodal model sees in a smaller one',
    'lead': _lead(found, model),
    'facts': _facts(workdir, found, stores, model),
    'figures': figures(summary),
    'layers': [_layer(workdir, one, summary) for one in found],
    'made': _made(workdir),
    'seconds': _seconds(seconds) if seconds['value'] is not None else [],
  }


def _lead(found: list[Findings], model: str) -> str:
  first = found[0]
  latents = number(first.index.meta.latents)
  count = sum(
    first.fate(m) == 'explained' for m in range(first.index.num_latents)
  )
  text = (
    f'A sparse autoencoder split what the model {model} carries after decoder '
    f'layer {first.layer} into {latents} latents, of which at most '
    f'{first.index.meta.k} speak on any one token.'
  )
  if not first.explainers:
    return f'{text} No explainer has been asked about them yet.'
  return (
    f'{text} Another model, {first.explainers[0]}, looked at the images that '
    f'fire each latent and put {number(count)} of them into words.'
  )


def _facts(
  workdir: Workdir,
  found: list[Findings],
  stores: dict[str, ActivationStore],
  model: str,
) -> list[dict[str, str]]:
  meta, first = stores[found[0].split].meta, found[0].index.meta
  facts = [
    _fact('Subject', model, f'images by {meta.image_backend}'),
    _fact(
      'Decoder layer' if len(found) == 1 else 'Decoder layers',
      ', '.join(str(one.layer) for one in found),
      f'counted from 0; width {number(meta.width)}',
    ),
    _fact('SAE', f'{number(first.latents)} latents', f'TopK, k = {first.k}'),
  ]
  train = workdir.acts('train')
  if (train / 'meta.json').exists():
    store = ActivationStore.open(train, partial=True)
    count = sum(line['samples'] for line in store.manifest)
    facts.append(
      _fact(
        'Trained on',
        f'{number(store.num_rows)} tokens',
        f'of {number(count)} samples',
      )
    )
  facts.append(
    _fact(
      'Looked at',
      f'{number(first.samples)} samples',
      f'half {found[0].split}, {number(first.rows)} tokens',
    )
  )
  explainers = found[0].explainers
  if explainers:
    beside = ', '.join(explainers[1:])
    facts.append(
      _fact('Explainer', explainers[0], f'beside {beside}' if beside else '')
    )
  return facts


def _fact(name: str, value: str, note: str = '') -> dict[str, str]:
  return {'name': name, 'value': value, 'note': note}


def _layer(
  workdir: Workdir, findings: Findings, summary: dict[str, Any]
) -> dict[str, Any]:
  path = workdir.file('evaluation.json')
  table = json.loads(path.read_text()) if path.exists() else {}
  titles, rows = quality(table.get(str(findings.layer), {}))
  figure = summary['layers'][str(findings.layer)]['explained_right']
  explainer_titles, explainer_rows = explainers(findings, figure['explainers'])
  count = number(findings.index.num_latents)
  best = 'IoU with the truth' if findings.concepts else 'score'
  return {
    'layer': findings.layer,
    'count_text': count,
    'fates': fates(findings),
    'fate_line': f'{count} latents, each counted once.',
    'first_line': f'The explained latents of highest {best}, no two alike.',
    'quality_columns': titles,
    'quality': rows,
    'explainer_columns': explainer_titles,
    'explainers': explainer_rows,
  }


def _made(workdir: Workdir) -> str:
  path = workdir.file('config.json')
  if not path.exists():
    return 'The settings of this run were not kept.'
  line = json.loads(path.read_text())
  commit = line.get('commit') or 'not known'
  versions = ', '.join(
    f'{name} {version}' for name, version in line.get('versions', {}).items()
  )
  text = f'Every setting stands in config.json of the workdir. Commit {commit}.'
  return f'{text} {versions}.' if versions else text


def _seconds(seconds: dict[str, Any]) -> list[dict[str, Any]]:
  top = max(seconds['stages'].values())
  return [
    {
      'name': name.capitalize(),
      'text': number(float(value)),
      'share': round(100 * value / max(top, 1e-9), 1),
    }
    for name, value in seconds['stages'].items()
  ]
