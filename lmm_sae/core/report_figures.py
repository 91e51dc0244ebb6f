"""The headline figures as the report's page shows them, beside baselines."""

import math
from collections.abc import Sequence
from typing import Any

from lmm_sae.core.scored import BASELINES

MARKS = ('circle', 'diamond', 'square', 'triangle')  # of baselines


def _dictionaries(name: str) -> dict[str, str]:
  return {
    f'{name}_untrained': 'untrained SAE',
    f'{name}_neurons': 'raw neurons',
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
    'ce_recovered',
    'Answers kept with the SAE in the loop',
    'Of the loss that '
    'nothing in its place would bring (cross-entropy of the answers).',
    {},
    1,
  ),
  (
    'clean_concepts',
    'Concepts with a clean latent of their own',
    'Of the '
    'concepts met in the data, those with a latent that means nothing else.',
    {
      'clean_concepts_neurons': 'raw neurons',
      'clean_concepts_untrained': 'untrained SAE',
    },
    0,
  ),
  (
    'explained_right',
    'Explanations that name the true concept',
    'Over all '
    'latents that speak of objects; right means the answer contains the '
    'concept.',
    {
      'explained_right_shuffled': 'shuffled',
      **_dictionaries('explained_right'),
    },
    1,
  ),
  (
    'iou',
    'Overlap of explanation and activation (IoU)',
    'Where the label is found in the image, against where the latent fires.',
    {
      'iou_shuffled': 'shuffled label',
      'iou_random': 'random images',
      **_dictionaries('iou'),
    },
    1,
  ),
  (
    'clip',
    'CLIP score of label and images',
    '100 times the cosine. The '
    "packaged judge shares the subject's trunk, so trust the masks first.",
    {
      'clip_shuffled': 'shuffled label',
      'clip_random': 'random images',
      **_dictionaries('clip'),
    },
    30,
  ),
  (
    'detection',
    'A judge tells by the label what fires',
    'Balanced accuracy on pictures that fire the latent and silent ones.',
    {'detection_shuffled': 'shuffled label', **_dictionaries('detection')},
    1,
  ),
  (
    'fuzzing',
    'A judge tells by the label where it fires',
    'Balanced accuracy on pictures dimmed rightly and wrongly.',
    {'fuzzing_shuffled': 'shuffled label', **_dictionaries('fuzzing')},
    1,
  ),
  (
    'intruder',
    "A judge finds another latent's picture",
    'Accuracy among pictures of which one is out of place.',
    {'intruder_shuffled': 'shuffled label', **_dictionaries('intruder')},
    1,
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
SKIP = {'seconds', 'layers', 'format_version', 'tables'}
SKIP |= {  # they stand in the table of scores
  'explained_difference',
  'iou_paper',
  'detection_text',
  'fuzzing_text',
  'intruder_text',
  'consistency',
}


def number(value: float | int | None) -> str:
  """A number as the page writes it."""
  if value is None:
    return '-'
  if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 10):
    return f'{int(value):,}'
  size = abs(value)
  places = 0 if size >= 100 else 1 if size >= 10 else 2
  text = f'{value:.{3 if 0 < size < 0.1 else places}f}'
  return text if float(text) else text.removeprefix('-')


def percent(share: float) -> str:
  return f'{100 * share:.{1 if 0 < share < 0.1 else 0}f}%'


def interval(ci: Sequence[float] | None) -> str:
  return f'{number(ci[0])} to {number(ci[1])}' if ci else ''


def figures(summary: dict[str, Any]) -> list[dict[str, Any]]:
  """The headline figures, each with its baselines and its plot."""
  beside = {name for row in FIGURES for name in row[3]}
  beside |= {name for names in BASELINES.values() for name in names}
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
  if 'chance' in figure:
    note += f' Guessing: {number(figure["chance"])}.'
  if figure.get('warning'):
    note += f' Take care: {figure["warning"]}.'
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
    for (base, word), mark in zip(baselines.items(), MARKS, strict=False)
    if summary[base]['value'] is not None
  ]
  points = [(figure, 'dot')] + [
    (summary[base], mark)
    for base, mark in zip(baselines, MARKS, strict=False)
    if summary[base]['value'] is not None
  ]
  ends = [
    end for one, _ in points for end in (one['value'], *(one['ci'] or ()))
  ]
  high = max([top or figure['n'] or 1, *ends])
  if high > 1 and top:
    high = 10 * math.ceil(high / 10)
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
