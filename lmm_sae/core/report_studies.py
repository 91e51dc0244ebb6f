"""What the report's page shows of steering and of causes, as JSON types."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmm_sae.core import concepts, pictures, stats
from lmm_sae.core.findings import Findings
from lmm_sae.core.records import Attribution, Steering
from lmm_sae.core.report_latents import case, digits

CASES = 12  # steered answers shown a target; a third as many of the control
ANSWERS = 200  # attributed answers shown a layer
NONE = 'no case'


def steering(findings: Findings) -> list[dict[str, Any]]:
  """The studies of one layer: dose curves, flip rates, answers."""
  names = dict.fromkeys(one.study for one in findings.steering)
  return [
    _study(
      name, [one for one in findings.steering if one.study == name], findings
    )
    for name in names
  ]


def _study(
  name: str, lines: Sequence[Steering], findings: Findings
) -> dict[str, Any]:
  swept = [one for one in lines if one.half == 'a' and one.target]
  taken = [one for one in lines if one.half == 'b' and one.target]
  chosen = {
    one.target: one.edits[0].latent
    for one in [*swept, *taken]
    if not one.control
  }
  doses = sorted({one.edits[0].value for one in swept})
  curves = []
  for target in sorted(chosen):
    mine = [
      one
      for one in swept
      if one.target == target
      and one.edits[0].latent == chosen[target]
      and not one.control
    ]
    points = _points(mine, doses)
    if points:
      curves.append(
        {'target': target, 'latent': chosen[target], 'points': points}
      )
  rows = [
    {
      'target': target,
      'latent': latent,
      'figure': _flips(taken, target, control=False),
      'random': _flips(taken, target, control=True),
    }
    for target, latent in sorted(chosen.items())
  ]
  fixed = {one.edits[0].value for one in taken if not one.control}
  edit = lines[0].edits[0]
  return {
    'name': name or 'open',
    'layer': findings.layer,
    'how': _how(lines[0]),
    'unit': "the latent's peak" if edit.unit == 'peak' else 'activation',
    'doses': doses,
    'curves': curves,
    'mean': _mean(curves, doses),
    'control': _points([one for one in swept if one.control], doses),
    'chosen': fixed.pop() if len(fixed) == 1 else None,
    'rows': rows,
    'total': {
      'target': '',
      'latent': None,
      'figure': _flips(taken, None, control=False),
      'random': _flips(taken, None, control=True),
    }
    if len(rows) > 1
    else None,
    'cases': [case(one) for one in _cases(lines)],
  }


def _how(one: Steering) -> str:
  edit = one.edits[0]
  where = 'all tokens' if edit.where == 'all' else f'{edit.where} tokens'
  when = {
    'prompt': 'while the prompt is read',
    'generated': 'while the answer is written',
    'both': 'from beginning to end',
  }[edit.when]
  error = (
    'what the SAE misses is added back'
    if edit.keep_error
    else 'the reconstruction replaces the residual'
  )
  return f'{edit.mode.capitalize()} at {where}, {when}; {error}.'


def _usable(lines: Sequence[Steering]) -> list[Steering]:
  """Those whose plain answer does not name the target already."""
  return [one for one in lines if not concepts.says(one.text_plain, one.target)]


def _points(lines: Sequence[Steering], doses: Sequence[float]) -> list:
  """[dose, share of flips, n] at each dose that was tried."""
  points = []
  for dose in doses:
    hits = [
      concepts.says(one.text_edited, one.target)
      for one in _usable(lines)
      if one.edits[0].value == dose
    ]
    if hits:
      points.append([dose, digits(sum(hits) / len(hits)), len(hits)])
  return points


def _mean(curves: Sequence[dict], doses: Sequence[float]) -> list:
  points = []
  for dose in doses:
    shares = [p[1] for curve in curves for p in curve['points'] if p[0] == dose]
    if shares:
      points.append([dose, digits(sum(shares) / len(shares)), len(shares)])
  return points


def _flips(
  taken: Sequence[Steering], target: str | None, control: bool
) -> dict[str, Any]:
  hits = [
    concepts.says(one.text_edited, one.target)
    for one in _usable(taken)
    if bool(one.control) == control and target in (None, one.target)
  ]
  return stats.share_figure(hits, NONE)


def _cases(lines: Sequence[Steering]) -> list[Steering]:
  """Answers of half B (of any half where there is no B), so many a target."""
  lines = [one for one in lines if one.half == 'b'] or list(lines)
  counts: dict[tuple[str, str], int] = {}
  picked = []
  for one in lines:
    key = (one.target, one.control)
    counts[key] = counts.get(key, 0) + 1
    if counts[key] <= (CASES // 3 if one.control else CASES) or not one.target:
      picked.append(one)
  return picked[: 40 * CASES]


def causes(findings: Findings) -> list[dict[str, Any]]:
  """The attributed answers of one layer."""
  return [_cause(one, findings) for one in findings.attributions[:ANSWERS]]


def _cause(one: Attribution, findings: Findings) -> dict[str, Any]:
  return {
    'layer': one.layer,
    'split': 'b',
    'sample': one.sample,
    'prompt': one.prompt,
    'text': one.text,
    'answer': one.answer,
    'baseline': one.baseline,
    'target': one.target,
    'correct': one.correct,
    'heat': _heat(one),
    'words': [[word, digits(price)] for word, price in one.words],
    'latents': [
      {
        'latent': effect.latent,
        'name': _name(effect.latent, effect.concept, findings),
        'effect': digits(effect.effect),
        'exact': None if effect.exact is None else digits(effect.exact),
      }
      for effect in one.latents
    ],
  }


def _heat(one: Attribution) -> str | None:
  """Prices by patch; capitals count against the answer."""
  if not one.heat:
    return None
  heat_HW = np.array(one.heat)
  peak = float(np.abs(heat_HW).max())
  return pictures.encode_heat(heat_HW, heat_HW < 0, peak=peak)


def _name(latent: int, concept: str, findings: Findings) -> str:
  said = findings.main(latent)
  label = concept or (said.label if said else '')
  return f'#{latent} {label}'.strip()
