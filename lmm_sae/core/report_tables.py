"""Tables of the report: scores beside all their baselines, groups, layers.

A cell is {text, note, count}, or None where there is nothing to tell; a row may
have a `note` of its own, and a `reason` instead of cells.
"""

from collections.abc import Sequence
from typing import Any

from lmm_sae.core.findings import FATES
from lmm_sae.core.report_figures import interval, number
from lmm_sae.core.tables import COLUMNS, SAE

Cell = dict[str, str] | None

NAMES = {
  'explained_right': 'Names the true concept',
  'iou': 'IoU',
  'iou_paper': "IoU, the paper's mask",
  'clip': 'CLIP score',
  'detection': 'Detection',
  'fuzzing': 'Fuzzing',
  'intruder': 'Intruder',
  'detection_text': 'Detection in text',
  'fuzzing_text': 'Fuzzing in text',
  'intruder_text': 'Intruder in text',
  'consistency': 'Second judge agrees',
}
WHAT = {
  'explained_right': 'share of the latents that speak of objects',
  'iou': 'where the label is found, against what is lit',
  'iou_paper': 'the same, against all that fires, dilated',
  'clip': '100 times the cosine',
  'detection': 'is the label in a picture that fires, or a silent one?',
  'fuzzing': 'is it what a dimmed picture leaves bright?',
  'intruder': "which picture is another latent's?",
  'consistency': 'of the same questions',
}
BESIDE = {
  'random': 'Random images',
  'shuffled': 'Shuffled label',
  'untrained': 'Untrained SAE',
  'neurons': 'Raw neurons',
}
DICTIONARIES = {SAE: 'SAE', 'untrained': 'Untrained SAE',
                'neurons': 'Raw neurons'}  # fmt: skip
TITLES = {
  'right': 'Names the concept',
  'iou': 'IoU',
  'clip': 'CLIP score',
  'detection': 'Detection',
  'fuzzing': 'Fuzzing',
  'intruder': 'Intruder',
}
LAYER_COLUMNS = (
  'fvu',
  'ce_recovered',
  'explained_right',
  'iou',
  'clip',
  'detection',
)
LAYER_TITLES = ('FVU', 'Answers kept', *(NAMES[x] for x in LAYER_COLUMNS[2:]))


def scores(summary: dict[str, Any]) -> dict[str, Any]:
  """Titles and rows: each score by both explainers, beside its baselines."""
  explainers = list(summary['explained_right']['explainers'])
  second = explainers[1] if len(explainers) > 1 else ''
  titles = [explainers[0] or 'Explainer']
  if second:
    titles += [second, f'{explainers[0]} less {second}']
  rows = []
  for name, title in NAMES.items():
    figure = summary[name]
    cells = [_cell(figure)]
    if second:
      cells += [_cell(_of(figure, second)), _cell(_difference(summary, name))]
    cells += [_cell(summary.get(f'{name}_{beside}')) for beside in BESIDE]
    if figure['value'] is None and all(cell is None for cell in cells[1:]):
      rows.append({'name': title, 'reason': figure['reason'], 'cells': []})
      continue
    rows.append(
      {
        'name': title,
        'note': WHAT.get(name, ''),
        'about': judge(figure),
        'warning': figure.get('warning', ''),
        'cells': cells,
      }
    )
  return {'titles': [*titles, *BESIDE.values()], 'rows': rows}


def judge(figure: dict[str, Any]) -> str:
  """What is known of the judge behind a figure; '' where there is none."""
  if 'judges' in figure:
    return ' and '.join(figure['judges'])
  if 'judge' not in figure:
    return ''
  text = f'guessing: {number(figure["chance"])}'
  known = figure['calibration']
  if known['value'] is not None:
    text += (
      f'; judge {figure["judge"]} where answers are known: '
      f'{number(known["value"])} ({interval(known["ci"])})'
    )
  return text


def _of(figure: dict[str, Any], explainer: str) -> dict[str, Any]:
  own = figure['explainers'][explainer]
  return own.get('explained_right', own)  # of that figure a table of two


def _difference(summary: dict[str, Any], name: str) -> dict[str, Any]:
  if name == 'explained_right':
    return summary['explained_difference']
  return summary[name]['difference']


def _cell(figure: dict[str, Any] | None) -> Cell:
  if figure is None or figure['value'] is None:
    return None
  return {
    'text': number(figure['value']),
    'note': interval(figure['ci']),
    'count': f'n {number(figure["n"])}',
  }


def beside(tables: dict[str, Any]) -> list[dict[str, Any]]:
  """How many latents of each dictionary met each fate."""
  fates = [
    name for name in FATES if any(one['fates'][name] for one in tables.values())
  ]
  return [
    {
      'name': DICTIONARIES[name],
      'total': number(one['latents']),
      'fates': [
        {
          'key': fate,
          'name': FATES[fate][0].lower() + FATES[fate][1:],
          'count': one['fates'][fate],
          'text': number(one['fates'][fate]),
        }
        for fate in fates
      ],
    }
    for name, one in tables.items()
  ]


def groups(rows: dict[str, Any]) -> dict[str, Any]:
  """Titles and rows of one grouping of the SAE's latents."""
  used = [
    name
    for name in COLUMNS
    if any(row[name]['value'] is not None for row in rows.values())
  ]
  return {
    'titles': ['Latents', 'Explained', *(TITLES[name] for name in used)],
    'rows': [
      {
        'name': name[0].upper() + name[1:],
        'cells': [
          {'text': number(row['latents']), 'note': ''},
          {'text': number(row['explained']), 'note': ''},
          *(_cell(row[column]) for column in used),
        ],
      }
      for name, row in rows.items()
    ],
  }


def layers(summary: dict[str, Any]) -> dict[str, Any] | None:
  """A row for each layer; None of a single one."""
  by_layer: dict[str, Any] = summary['layers']
  if len(by_layer) < 2:
    return None
  return {
    'titles': [*LAYER_TITLES, 'Explained', 'Dead'],
    'rows': [
      {
        'name': f'Layer {layer}',
        'cells': [
          *(_cell(figures[name]) for name in LAYER_COLUMNS),
          *_fates(summary['tables'][layer][SAE], ('explained', 'dead')),
        ],
      }
      for layer, figures in by_layer.items()
    ],
  }


def _fates(table: dict[str, Any], names: Sequence[str]) -> list[Cell]:
  note = f'of {number(table["latents"])}'
  return [{'text': number(table['fates'][x]), 'note': note} for x in names]
