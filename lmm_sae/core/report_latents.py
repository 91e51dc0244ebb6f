"""What the report's page shows of each latent, as JSON types.

Keys are short where they stand thousands of times; the page's scripts
(stages/report_assets) are the only reader.
"""

import dataclasses
from typing import Any

import numpy as np

from lmm_sae.core import masks, pictures
from lmm_sae.core.findings import Findings
from lmm_sae.core.index import ImageExemplar, TextExemplar
from lmm_sae.core.records import Attribution, Steering

THUMBS = 5  # exemplars on a card
CASES = 6  # steered answers of half B on a latent's page, and of half A
EFFECTS = 10  # attributed answers on a latent's page

SCORERS = {
  'iou_exact': 'IoU, exact mask',
  'iou': "IoU, model's mask",
  'iou_paper': "IoU, paper's rule",
  'clip': 'CLIP score',
  'detection': 'Detection',
  'fuzzing': 'Fuzzing',
  'intruder': 'Intruder',
  'detection_text': 'Detection in text',
  'fuzzing_text': 'Fuzzing in text',
  'intruder_text': 'Intruder in text',
  'consistency': 'Second judge agrees',
}
BASELINES = {
  'random': 'random images',
  'random_images': 'random images',
  'shuffled': 'shuffled label',
  'shuffled_label': 'shuffled label',
}


@dataclasses.dataclass(frozen=True)
class Shown:
  """How exemplars are drawn.

  Attributes:
    threshold: share of the latent's peak above which a patch is lit.
    style: of the mask: `exact` or `paper`.
    count: exemplars that the explainer saw, at most.
  """

  threshold: float
  style: str
  count: int


def digits(value: float, places: int = 4) -> float:
  """The number at `places` significant digits: what a page needs of it."""
  return float(f'{float(value):.{places}g}')


def columns(findings: Findings, latents: list[int]) -> dict[str, list]:
  """The grid of latents: one list a field, all in the order of `latents`."""
  images = max(findings.index.meta.images, 1)
  stats = findings.index.stats
  first = findings.explainers[0] if findings.explainers else ''
  fields: dict[str, list] = {}

  def add(**row):
    for name, value in row.items():
      fields.setdefault(name, []).append(value)

  for latent in latents:
    said = findings.main(latent)
    truth = findings.stands_for(latent)
    scored = findings.scored(latent, first)
    iou = scored.get(findings.iou_scorer, {})
    clip = scored.get('clip', {})
    add(
      latent=latent,
      outcome=findings.fate(latent),
      label=(said.label or said.text) if said else '',
      text=said.text if said else '',
      category=said.category if said else '',
      concept=truth.concept if truth else '',
      f1=digits(truth.f1_b) if truth else None,
      iou=_value(iou, ''),
      iou_base=_value(iou, 'random', 'random_images'),
      clip=_value(clip, ''),
      clip_base=_value(clip, 'random', 'random_images'),
      rate=digits(stats['images_fired'][latent] / images),
      peak=digits(stats['peak'][latent]),
      flags=findings.flags(latent),
    )
  return fields


def _value(scored: dict, *names: str) -> float | None:
  for name in names:
    if name in scored:
      return digits(scored[name].value)
  return None


def first_look(fields: dict[str, list], count: int = 12) -> list[int]:
  """Rows for the overview: the best explained latents, no two of one kind.

  Those that are known to name their concept come first, then by IoU.
  """
  best = 'iou' if any(v is not None for v in fields['iou']) else 'clip'
  rows = [
    row
    for row, outcome in enumerate(fields['outcome'])
    if outcome == 'explained'
    and fields['rate'][row] > 0
    and 'wrong' not in fields['flags'][row]
  ]
  rows.sort(
    key=lambda row: (
      'right' not in fields['flags'][row],
      -(fields[best][row] or 0),
      row,
    )
  )
  seen: set[str] = set()
  picked = []
  for row in rows:
    names = {fields['label'][row], fields['concept'][row]} - {''}
    if names & seen:
      continue
    seen |= names
    picked.append(row)
  return picked[:count]


def heat(
  findings: Findings, latent: int, heat_HW: np.ndarray, shown: Shown
) -> str:
  """An exemplar's heat map; capitals are what the explainer's mask lights."""
  peak = float(findings.index.stats['peak_base'][latent])
  lit_HW = masks.lit(heat_HW, peak, shown.threshold)
  return pictures.encode_heat(heat_HW, lit_HW, peak=peak)


def thumbs(
  findings: Findings,
  latent: int,
  exemplars: list[ImageExemplar],
  shown: Shown,
) -> list | dict[str, Any]:
  """[sample, heat map] of a card's pictures; where there is none, a text."""
  if not exemplars:
    return next(map(_text, findings.index.texts(latent)), [])
  return [
    [one.sample, heat(findings, latent, one.heat_HW, shown)]
    for one in exemplars[:THUMBS]
  ]


def _text(one: TextExemplar) -> dict[str, Any]:
  return {
    'x': digits(one.strength),
    'tokens': one.tokens,
    'acts': [digits(act, 3) for act in one.acts],
    'at': one.at,
  }


def detail(
  findings: Findings,
  latent: int,
  exemplars: list[ImageExemplar],
  shown: Shown,
  kinds: dict[str, int],
) -> dict[str, Any]:
  """The page of one latent. `kinds`: the half's tokens, by kind."""
  said = findings.main(latent)
  seen = {one.sample for one in said.exemplars} if said else set()
  if not said:
    seen = {one.sample for one in exemplars[: shown.count]}
  return {
    'explanations': _explanations(findings, latent),
    'exemplars': [
      {
        's': one.sample,
        'x': digits(one.strength),
        'e': one.sample in seen,
        'h': heat(findings, latent, one.heat_HW, shown),
        't': None
        if one.tiles_HW is None
        else heat(findings, latent, one.tiles_HW, shown),
      }
      for one in exemplars
    ],
    'texts': [_text(one) for one in findings.index.texts(latent)],
    'stats': _stats(findings, latent, kinds),
    'truth': _truth(findings, latent),
    'steering': [case(one) for one in _steered(findings, latent)],
    'effects': [
      _effect(answer, rank)
      for answer, rank in findings.caused.get(latent, [])[:EFFECTS]
    ],
  }


def _explanations(findings: Findings, latent: int) -> list[dict[str, Any]]:
  said = []
  for one in findings.explained.get(latent, []):
    scored = findings.scored(latent, one.explainer)
    said.append(
      {
        'explainer': one.explainer,
        'outcome': findings.fate(latent)
        if one.outcome == 'dead'
        else one.outcome,
        'text': one.text,
        'label': one.label,
        'category': one.category,
        'right': findings.right(latent, one.explainer),
        'scores': [
          {
            'name': SCORERS.get(scorer, scorer.replace('_', ' ')),
            'value': digits(table[''].value),
            'n': table[''].n,
            'top': 40 if scorer == 'clip' else 1,
            'bases': [
              {
                'name': BASELINES.get(name, name.replace('_', ' ')),
                'value': digits(base.value),
                'n': base.n,
              }
              for name, base in sorted(table.items())
              if name
            ],
          }
          for scorer, table in sorted(scored.items(), key=_order)
          if '' in table and scorer != 'right'
        ],
      }
    )
  return said


def _order(item: tuple[str, Any]) -> tuple[int, str]:
  """Scorers in the order of SCORERS, then the others by name."""
  names = list(SCORERS)
  return (names.index(item[0]) if item[0] in names else len(names), item[0])


def _stats(
  findings: Findings, latent: int, kinds: dict[str, int]
) -> dict[str, Any]:
  stats, meta = findings.index.stats, findings.index.meta
  rows = sum(count for kind, count in kinds.items() if kind != 'bos')
  return {
    'images_share': digits(stats['images_fired'][latent] / max(meta.images, 1)),
    'rows_share': digits(stats['rows_fired'][latent] / max(rows, 1)),
    'peak': digits(stats['peak'][latent]),
    'peak_image': digits(stats['peak_image'][latent]),
    'mean': digits(stats['mean'][latent]),
    'kinds': [
      [kind, int(stats[f'fired_{kind}'][latent]), count]
      for kind, count in kinds.items()
    ],
  }


def _truth(findings: Findings, latent: int) -> dict[str, Any] | None:
  one = findings.concepts.get(latent)
  if one is None:
    return None
  return {
    'concept': one.concept,
    'f1_a': digits(one.f1_a),
    'f1_b': digits(one.f1_b),
    'precision_b': digits(one.precision_b),
    'objects': digits(one.objects),
    'clean': one.clean,
  }


def _steered(findings: Findings, latent: int) -> list[Steering]:
  """Some answers of half B, and one question of half A at every dose."""
  lines = findings.steered.get(latent, [])
  later = [one for one in lines if one.half != 'a'][:CASES]
  swept = [one for one in lines if one.half == 'a']
  swept = [
    one
    for one in swept
    if (one.sample, one.prompt) == (swept[0].sample, swept[0].prompt)
  ]
  return later + swept[: 2 * CASES]


def case(one: Steering) -> dict[str, Any]:
  """A steered answer, for the page."""
  edit = one.edits[0]
  return {
    'layer': one.layer,
    'study': one.study,
    'split': one.half or 'b',
    'sample': one.sample,
    'control': one.control,
    'latents': [edit.latent for edit in one.edits],
    'mode': edit.mode,
    'dose': edit.value,
    'unit': edit.unit,
    'where': edit.where,
    'prompt': one.prompt,
    'target': one.target,
    'plain': one.text_plain,
    'sae': one.text_sae,
    'edited': one.text_edited,
  }


def _effect(answer: Attribution, rank: int) -> dict[str, Any]:
  effect = answer.latents[rank - 1]
  return {
    'split': 'b',
    'sample': answer.sample,
    'prompt': answer.prompt,
    'answer': answer.answer,
    'baseline': answer.baseline,
    'effect': digits(effect.effect),
    'exact': None if effect.exact is None else digits(effect.exact),
    'rank': rank,
  }
