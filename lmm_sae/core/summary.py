"""The headline figures of a run, each computed from the run's own files.

Every figure is {value, n, ci}, beside its baselines; what a run cannot give
(no truth, stage not run) is {value: None, reason}. Thresholds, latents and
doses were fixed on half A by the stages; what is counted here is of half B.

fvu                     evaluation.json, over all tokens but BOS
ce_recovered            the same, of the answers' tokens: the share of the loss
                        beside zero ablation that the SAE in the loop spares
clean_concepts          concepts with a clean latent; n: concepts of objects
clean_concepts_neurons  the same rule on the raw neurons
clean_concepts_untrained  and on the SAE before its first step
explained_right         share of the latents with >= 80% of their firings on
                        objects and F1 > .2 on A whose explanation contains
                        their concept; every explainer in `explainers`
explained_right_shuffled  the same, each latent given the text of another:
                        the mean over all other texts, not one shuffle
explained_right_untrained, explained_right_neurons  the same of the latents of
                        those dictionaries
explained_difference    explained_right of the first explainer less that of the
                        second, over the latents of both, in pairs
iou, clip, detection, ...  every score: see `core.scored`
steer_colour, steer_emotion  share of the answers that contain the target once
                        the target's latent is clamped, where they did not
steer_random            the same under random live latents
attribution_correlation price by gradients against exact ablation, pooled over
                        the re-checked latents of all answers
seconds                 wall time, by stage
"""

import json
from typing import Any

from lmm_sae.core import concepts, evaluation, records, scored, stats
from lmm_sae.core.records import DICTIONARIES
from lmm_sae.core.workdir import Workdir

Figure = dict[str, Any]

WALL = 'all'  # in seconds.json, beside the stages: some of them overlap
NO_TRUTH = 'the images of this run have no known masks and labels'

BASELINES = {
  'clean_concepts': ('clean_concepts_neurons', 'clean_concepts_untrained'),
  'explained_right': (
    'explained_right_shuffled',
    *(f'explained_right_{name}' for name in DICTIONARIES),
  ),
  **scored.BASELINES,
  'steer_colour': ('steer_random',),
  'steer_emotion': ('steer_random',),
}


def compute(workdir: Workdir, layers: tuple[int, ...]) -> dict[str, Any]:
  """The figures of the first layer, and of every layer under `layers`."""
  by_layer = {str(layer): _layer(workdir, layer) for layer in layers}
  headline = dict(by_layer[str(layers[0])])
  headline['seconds'] = _seconds(workdir)
  headline['layers'] = by_layer
  headline['format_version'] = records.FORMAT_VERSION
  return headline


def _layer(workdir: Workdir, layer: int) -> dict[str, Figure]:
  truth = concepts.load(workdir, layer)
  said = _of_layer(
    records.Explanation, workdir.file('explanations.jsonl'), layer
  )
  explained = [one for one in said if not one.dictionary]
  explainers = tuple(dict.fromkeys(one.explainer for one in explained))
  scores = _of_layer(records.Score, workdir.file('scores.jsonl'), layer)
  steered = _of_layer(records.Steering, workdir.file('steering.jsonl'), layer)
  attributed = _of_layer(
    records.Attribution, workdir.file('attributions.jsonl'), layer
  )
  first = explainers[0] if explainers else ''
  return {
    'fvu': _fvu(workdir, layer),
    'ce_recovered': _recovered(workdir, layer),
    **_clean(workdir, layer, truth),
    **_explained(truth, explained, first),
    **{
      f'explained_right_{name}': _right_of(workdir, layer, name, said, first)
      for name in DICTIONARIES
    },
    **scored.figures(workdir, scores, explainers),
    **_steered(steered),
    'attribution_correlation': stats.correlation_figure(
      [
        [
          (one.effect, one.exact)
          for one in answer.latents
          if one.exact is not None
        ]
        for answer in attributed
      ],
      'no answer was attributed: run `lmm-sae attribute`',
    ),
  }


def _of_layer(kind, path, layer: int) -> list:
  return [
    record for record in records.read(kind, path) if record.layer == layer
  ]


def _fvu(workdir: Workdir, layer: int) -> Figure:
  row = evaluation.read(workdir).get(str(layer), {}).get('all')
  if row is None:
    return stats.missing('not measured: run `lmm-sae evaluate`')
  return {'value': row['fvu'], 'n': row.get('rows', 0), 'ci': row.get('fvu_ci')}


def _recovered(workdir: Workdir, layer: int) -> Figure:
  found = evaluation.read(workdir)
  by_kind = evaluation.losses(found, layer)
  kind = evaluation.headline(by_kind)
  if kind not in by_kind:
    loss = found.get('loss', {}).get(str(layer), {})
    reason = loss.get('reason') or 'not measured: run `lmm-sae evaluate`'
    return stats.missing(reason)
  return {**by_kind[kind]['ce_recovered']['zero'], 'kind': kind}


def _clean(
  workdir: Workdir, layer: int, truth: list[concepts.Concept]
) -> dict[str, Figure]:
  if not truth:
    gone = stats.missing(NO_TRUTH)
    names = ('clean_concepts', *BASELINES['clean_concepts'])
    return {name: dict(gone) for name in names}
  counted = len(concepts.counted(workdir))
  clean = len({row.concept for row in truth if row.clean})
  untrained = concepts.load(workdir, layer, 'untrained')
  by_chance = len({row.concept for row in untrained if row.clean})
  neurons = concepts.neurons(workdir, layer)
  return {
    'clean_concepts': {'value': clean, 'n': counted, 'ci': None},
    'clean_concepts_neurons': (
      {'value': neurons, 'n': counted, 'ci': None}
      if neurons is not None
      else stats.missing('raw neurons were not measured')
    ),
    'clean_concepts_untrained': (
      {'value': by_chance, 'n': counted, 'ci': None}
      if untrained
      else stats.missing('not measured: name untrained in index.dictionaries')
    ),
  }


def _explained(
  truth: list[concepts.Concept],
  explained: list[records.Explanation],
  first: str,
) -> dict[str, Figure]:
  """explained_right of the first explainer, and of each beside it."""
  by_explainer: dict[str, dict[int, str]] = {}
  for one in explained:
    text = one.text if one.outcome == 'explained' else ''
    by_explainer.setdefault(one.explainer, {})[one.latent] = text
  each = {
    name: _right(truth, texts) for name, texts in by_explainer.items()
  } or {first: _right(truth, {})}
  headline = each[first]
  return {
    'explained_right': {
      **headline['explained_right'],
      'explainer': first,
      'explainers': each,
    },
    'explained_right_shuffled': headline['explained_right_shuffled'],
    'explained_difference': _right_difference(truth, by_explainer),
  }


def _right_difference(
  truth: list[concepts.Concept], by_explainer: dict[str, dict[int, str]]
) -> Figure:
  """By how much the first explainer is right more often than the second."""
  if len(by_explainer) < 2:
    return stats.missing('there is no second explainer')
  names = list(by_explainer)[:2]
  right = [
    {
      row.latent: concepts.says(texts[row.latent], row.concept)
      for row in concepts.of_objects(truth, texts)
    }
    for texts in (by_explainer[name] for name in names)
  ]
  reason = 'no such latent has both explanations' if truth else NO_TRUTH
  return {**scored.share_difference(*right, reason), 'of': names}


def _right_of(
  workdir: Workdir,
  layer: int,
  dictionary: str,
  said: list[records.Explanation],
  first: str,
) -> Figure:
  """explained_right of a dictionary beside the SAE, by the first explainer."""
  texts = {
    one.latent: one.text if one.outcome == 'explained' else ''
    for one in said
    if (one.dictionary, one.explainer) == (dictionary, first)
  }
  if not texts:
    return stats.missing(
      f'the dictionary {dictionary} was not explained: name it in '
      'index.dictionaries and explain.dictionaries'
    )
  table = concepts.load(workdir, layer, dictionary)
  return _right(table, texts)['explained_right']


def _right(
  truth: list[concepts.Concept], texts: dict[int, str]
) -> dict[str, Figure]:
  """The share of explanations that name the concept, and by other texts."""
  chosen = concepts.of_objects(truth, texts)
  reason = NO_TRUTH if not truth else 'no such latent has an explanation'
  right_SS = [
    [concepts.says(texts[other.latent], row.concept) for other in chosen]
    for row in chosen
  ]
  right = [row[i] for i, row in enumerate(right_SS)]
  others = [
    (sum(row) - row[i]) / (len(row) - 1)
    for i, row in enumerate(right_SS)
    if len(row) > 1
  ]
  return {
    'explained_right': stats.share_figure(right, reason),
    'explained_right_shuffled': stats.mean_figure(others, reason),
  }


def _steered(steered: list[records.Steering]) -> dict[str, Figure]:
  """Flip rates of half B; only cases whose plain answer lacks the target."""
  flips: dict[str, list[bool]] = {'colour': [], 'emotion': [], 'random': []}
  by_target: dict[str, dict[str, list[bool]]] = {'colour': {}, 'emotion': {}}
  doses: dict[str, float] = {}
  for one in steered:
    if one.study not in by_target or one.half != 'b':
      continue
    if concepts.says(one.text_plain, one.target):
      continue
    flip = concepts.says(one.text_edited, one.target)
    if one.control:
      flips['random'].append(flip)
      continue
    flips[one.study].append(flip)
    by_target[one.study].setdefault(one.target, []).append(flip)
    doses[one.study] = one.edits[0].value
  reason = NO_TRUTH if steered else 'nothing was steered: run `lmm-sae steer`'
  figures = {
    f'steer_{name}': stats.share_figure(hits, reason)
    for name, hits in flips.items()
  }
  for study, targets in by_target.items():
    figures[f'steer_{study}']['dose'] = doses.get(study)
    figures[f'steer_{study}']['targets'] = {
      target: stats.share_figure(hits, reason)
      for target, hits in targets.items()
    }
  return figures


def _seconds(workdir: Workdir) -> Figure:
  path = workdir.file('seconds.json')
  if not path.exists():
    return stats.missing('stages were run one by one, and not timed')
  stages = json.loads(path.read_text())
  total = stages.pop(WALL, sum(stages.values()))
  return {'value': total, 'n': len(stages), 'ci': None, 'stages': stages}


def table(summary: dict[str, Any]) -> str:
  """The summary as a text table, every figure beside its baselines."""
  rows = [('figure', 'value', '95% CI', 'n', 'beside it')]
  beside = {name for names in BASELINES.values() for name in names}
  for name, figure in summary.items():
    if name in beside or name in (
      'layers',
      'format_version',
      'seconds',
      'tables',
    ):
      continue
    others = ', '.join(
      f'{other.removeprefix(name + "_")} {_number(summary[other])}'
      for other in BASELINES.get(name, ())
    )
    rows.append(
      (name, _number(figure), _interval(figure), _count(figure), others)
    )
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  lines = [
    '  '.join(
      [*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]
    )
    for row in rows
  ]
  lines.extend(
    f'{name}: {figure["warning"]}'
    for name, figure in summary.items()
    if name in BASELINES and figure['value'] is not None and 'warning' in figure
  )
  lines.extend(
    f'{name}: {figure["reason"]}'
    for name, figure in summary.items()
    if name in BASELINES and figure['value'] is None
  )
  seconds = summary['seconds']
  if seconds['value'] is not None:
    stages = ', '.join(f'{k} {v:.0f}' for k, v in seconds['stages'].items())
    lines.append(f'seconds: {seconds["value"]:.0f} ({stages})')
  return '\n'.join(line.rstrip() for line in lines)


def _number(figure: Figure) -> str:
  value = figure['value']
  if value is None:
    return '-'
  return str(value) if isinstance(value, int) else f'{value:.3f}'


def _interval(figure: Figure) -> str:
  ci = figure['ci']
  return f'[{ci[0]:.3f}, {ci[1]:.3f}]' if ci else ''


def _count(figure: Figure) -> str:
  return str(figure['n']) if figure['n'] else ''
