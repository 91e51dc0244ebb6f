"""The scores of explanations as figures, each beside its baselines.

A score's figure is the mean over the latents that have it, with an interval of
latents drawn again; beside it, under the same name and

    _random, _shuffled   the same latents on random images, and under the label
                         of another
    _untrained, _neurons the latents of those dictionaries (sae.dictionaries),
                         explained and scored as the SAE's are

It is the first explainer's. `explainers` has every explainer's; `difference`
is the first's less the second's over the latents that both have, in pairs.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lmm_sae.core import records, stats
from lmm_sae.core.records import DICTIONARIES, Score
from lmm_sae.core.workdir import Workdir

Figure = dict[str, Any]

# Figure and its scorer, in the order of the page. `iou` is on exact masks where
# they are known, else by the masks that a model found.
SCORERS = {
  'iou': 'iou',
  'iou_paper': 'iou_paper',
  'clip': 'clip',
  'detection': 'detection',
  'fuzzing': 'fuzzing',
  'intruder': 'intruder',
  'detection_text': 'detection_text',
  'fuzzing_text': 'fuzzing_text',
  'intruder_text': 'intruder_text',
  'consistency': 'consistency',
}
GROUNDED = ('iou', 'iou_paper', 'clip')
AGREE = 'consistency'
BESIDE = ('random', 'shuffled', *DICTIONARIES)
BASELINES = {
  name: tuple(
    f'{name}_{beside}' for beside in BESIDE if name != AGREE
  )  # two judges answer the same questions: there is nothing beside it
  for name in SCORERS
}
SILENT = (
  'a judge is asked about silent pictures, which are random ones: on those '
  'alone a label is right by chance'
)

Table = Mapping[tuple[str, str, str, str], Mapping[int, float]]


def table_of(scores: Iterable[Score]) -> Table:
  """{(dictionary, explainer, scorer, baseline): {latent: value}}."""
  table: dict[tuple[str, str, str, str], dict[int, float]] = {}
  for one in scores:
    key = one.dictionary, one.explainer, one.scorer, one.baseline
    table.setdefault(key, {})[one.latent] = one.value
  return table


def figures(
  workdir: Workdir, scores: Sequence[Score], explainers: Sequence[str]
) -> dict[str, Figure]:
  """Every score's figure and its baselines; of explainers the first leads."""
  table = table_of(scores)
  told = judges(workdir)
  known = told if scores else None
  scorers = SCORERS | {'iou': iou_scorer(scores)}
  found = {}
  for name, scorer in scorers.items():
    each = {
      who: _mean(table, '', who, scorer, '', known)
      for who in explainers or ('',)
    }
    first = next(iter(each))
    found[name] = {
      **each[first],
      'explainers': each,
      'difference': _difference(table, scorer, explainers),
      **_judge(told, scorer),
    }
    for other in BASELINES[name]:
      beside = other.removeprefix(f'{name}_')
      dictionary = beside if beside in DICTIONARIES else ''
      baseline = '' if dictionary else beside
      found[other] = _mean(table, dictionary, first, scorer, baseline, known)
  return found


def iou_scorer(scores: Iterable[Score]) -> str:
  """The IoU that leads: on exact masks where they are known."""
  return 'iou_exact' if any(s.scorer == 'iou_exact' for s in scores) else 'iou'


def judges(workdir: Workdir) -> dict[str, Any]:
  """judges.json, {} where there is none.

  Raises:
    ValueError: it is of another format.
  """
  path = workdir.file('judges.json')
  if not path.exists():
    return {}
  told = json.loads(path.read_text())
  if told.get('format_version') != records.FORMAT_VERSION:
    raise ValueError(
      f'{path} has format_version {told.get("format_version")}; this program '
      f'reads {records.FORMAT_VERSION}: run `lmm-sae score` again'
    )
  return told


def difference(
  one: Mapping[int, float], other: Mapping[int, float], reason: str
) -> Figure:
  """The mean of one less that of the other, over what both have, in pairs."""
  both = sorted(set(one) & set(other))
  return mean([one[m] - other[m] for m in both], reason)


def share_difference(
  one: Mapping[int, bool], other: Mapping[int, bool], reason: str
) -> Figure:
  """`difference` of shares of latents, with the interval of Agresti and Min
  (Statistics in Medicine 24, 2005), which is one where no pair differs, too."""
  both = sorted(set(one) & set(other))
  if not both:
    return stats.missing(reason)
  n = len(both)
  gained = sum(one[m] and not other[m] for m in both)
  lost = sum(other[m] and not one[m] for m in both)
  value, size = (gained - lost) / n, n + 2  # half a pair in each cell of four
  centre = (gained - lost) / size
  spread = math.sqrt((gained + lost + 1) / size**2 - centre**2 / size)
  low, high = (centre + sign * stats.Z95 * spread for sign in (-1, 1))
  ends = [max(-1.0, min(low, value)), min(1.0, max(high, value))]
  return {'value': value, 'n': n, 'ci': ends}


def mean(values: Sequence[float], reason: str, **more: Any) -> Figure:
  """The figure of a mean; where all values are the same, or there is but one,
  drawing them again would say nothing: there is no interval."""
  figure = stats.mean_figure(values, reason, **more)
  return figure | ({'ci': None} if len(set(values)) == 1 else {})


def _difference(table: Table, scorer: str, explainers: Sequence[str]) -> Figure:
  if len(explainers) < 2:
    return stats.missing('there is no second explainer')
  first, second = (
    table.get(('', who, scorer, ''), {}) for who in explainers[:2]
  )
  return {
    **difference(first, second, 'no latent has the scores of both explainers'),
    'of': list(explainers[:2]),
  }


def _mean(
  table: Table,
  dictionary: str,
  explainer: str,
  scorer: str,
  baseline: str,
  told: Mapping[str, Any] | None,
) -> Figure:
  values = table.get((dictionary, explainer, scorer, baseline), {})
  values = [values[m] for m in sorted(values)]
  of = any(key[0] == dictionary for key in table)
  asked = any(key[2] == scorer for key in table)
  reason = f'no latent has a score `{scorer}`'
  if told is None:
    reason = 'nothing was scored: run `lmm-sae score`'
  elif not of:
    reason = (
      f'the dictionary {dictionary} was not explained and scored: name it in '
      'index.dictionaries and explain.dictionaries'
    )
  elif not asked and scorer not in (*GROUNDED, 'iou_exact'):
    reason = _unasked(told, scorer)
  elif baseline == 'random' and scorer not in (*GROUNDED, 'iou_exact'):
    reason = SILENT
  return mean(values, reason, scorer=scorer)


def _unasked(told: Mapping[str, Any], scorer: str) -> str:
  """Why no latent has a judge's score."""
  if not told:
    return 'no judge was asked: give score.judge_model'
  if scorer == AGREE:
    if not told['second']:
      return 'there is no second judge: give score.second_model'
    return 'there is no question that both judges answered'
  task = told['judges'][told['first']].get(scorer)
  if task is None:
    kind = 'text alone' if scorer.endswith('_text') else 'images'
    return f'none of the latents drawn for the judge fires on {kind}'
  return (
    f'of {task["asked"]} answers of the judge {told["first"]}, '
    f'{task["unread"]} say neither, {task["failed"]} could not be had: no '
    'latent has answers on both sides'
  )


def _judge(told: Mapping[str, Any], scorer: str) -> dict[str, Any]:
  """How far the judge that gave a score is to be trusted, and what is chance.

  `warning` says why it is not, where so.
  """
  first = told.get('first', '')
  if scorer == AGREE and told.get('second'):
    return {'judges': [first, told['second']], 'agreement': told['agreement']}
  task = told.get('judges', {}).get(first, {}).get(scorer)
  if task is None:
    return {}
  known = {
    'judge': first,
    'chance': task['chance'],
    'calibration': task['calibration'],
    'failed': task['failed'],
    'unread': task['unread'],
    'asked': task['asked'],
  }
  if task['trusted'] is None:
    return known | {'warning': 'how often this judge is right is not known'}
  if not task['trusted']:
    return known | {
      'warning': 'this judge does not beat chance where answers are known'
    }
  return known
