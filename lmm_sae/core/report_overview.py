"""The report's overview: facts, fates, tables, and the headline figures."""

import collections
import json
import pathlib
from typing import Any

import numpy as np

from lmm_sae.core import evaluation, report_tables
from lmm_sae.core.findings import FATES, Findings
from lmm_sae.core.report_figures import figures, interval, number, percent
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

GROUPS = {'image': 'All of the image', 'text': 'All of the text', 'all': 'All'}
COLUMNS = {
  'fvu': 'FVU',
  'cosine': 'Cosine',
  'shrinkage': 'Length',
  'l0': 'L0',
  'dead': 'Dead',
  'rows': 'Tokens',
  'kl': 'KL',
  'kept': 'Loss kept',
}


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
  table: dict[str, dict[str, Any]], losses: dict[str, dict[str, Any]]
) -> tuple[list[str], list[dict[str, Any]]]:
  """Column titles and rows of evaluation.json for one layer.

  Args:
    table: figures by kind; losses: those with the SAE in the loop, {} without.
  """
  kinds = [kind for kind in evaluation.ORDER if kind in table]
  kinds += [kind for kind in table if kind not in evaluation.ORDER]
  table = {kind: table[kind] | _kept(losses.get(kind)) for kind in kinds}
  fields = [
    name
    for name in COLUMNS
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
    rows.append(
      {
        'kind': kind,
        'name': GROUPS.get(kind, kind.capitalize()),
        'cells': cells,
      }
    )
  return [COLUMNS[name] for name in fields], rows


def _kept(loss: dict[str, Any] | None) -> dict[str, Any]:
  """Columns of the loss of one kind, beside zero ablation."""
  if loss is None:
    return {}
  kept = loss['ce_recovered']['zero']['value']
  return {'kl': loss['kl']['sae'], 'kept': kept}


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
      _names_concept(right),
      _scored(findings, name, findings.iou_scorer),
      _scored(findings, name, 'clip'),
    ],
  }


def _names_concept(right: dict[str, Any]) -> dict[str, str] | None:
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
    'by_layer': report_tables.layers(summary),
    'made': _made(workdir),
    'seconds': _seconds(seconds) if seconds['value'] is not None else [],
    'wall': number(seconds['value']),
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
    _fact('Subject', model, f'{meta.grid[0]} × {meta.grid[1]} patches'),
    _fact(
      'Decoder layer' if len(found) == 1 else 'Decoder layers',
      ', '.join(str(one.layer) for one in found),
      f'counted from 0; width {number(meta.width)}',
    ),
    _fact(
      'SAE',
      f'{number(first.latents)} latents',
      f'at most {first.k} fire on a token',
    ),
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
  found = evaluation.read(workdir)
  titles, rows = quality(
    found.get(str(findings.layer), {}),
    evaluation.losses(found, findings.layer),
  )
  own = summary['layers'][str(findings.layer)]
  tables = summary['tables'][str(findings.layer)]
  figure = own['explained_right']
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
    'scores': report_tables.scores(own),
    'beside': report_tables.beside(tables) if len(tables) > 1 else [],
    'groups': [
      ('By category', report_tables.groups(tables['sae']['by_category'])),
      ('By kind of token', report_tables.groups(tables['sae']['by_kind'])),
    ],
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
