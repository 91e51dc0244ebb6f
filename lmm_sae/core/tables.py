"""What became of the latents of a run, and how their labels score, in groups.

Of each layer, the SAE's latents and those of the dictionaries beside it: every
latent is counted once, under its fate; once more under the kind of token that
it fires on most often; and each explained one under its category. A figure is
{value, n, ci}, over the latents of the group that have the score, by the first
explainer.
"""

import collections
from collections.abc import Iterable, Sequence
from typing import Any

from lmm_sae.core import scored, stats
from lmm_sae.core.explaining import CATEGORIES
from lmm_sae.core.findings import FATES, Findings
from lmm_sae.core.records import DICTIONARIES
from lmm_sae.core.tokens import kinds
from lmm_sae.core.workdir import Workdir

SAE = 'sae'
KINDS = tuple(kind.name.lower() for kind in kinds('all'))
NEVER = 'never fires'
UNNAMED = 'none of these'
COLUMNS = ('right', 'iou', 'clip', 'detection', 'fuzzing', 'intruder')


def of(found: Sequence[Findings], workdir: Workdir) -> dict[str, Any]:
  """{layer: {`sae` or a dictionary: its table}} of the dictionaries that are
  indexed; a table has `latents`, `fates`, and rows `by_category`, `by_kind`."""
  tables: dict[str, Any] = {}
  for findings in found:
    mine = tables.setdefault(str(findings.layer), {})
    mine[SAE] = table(findings)
    for name in DICTIONARIES:
      layer, split = findings.layer, findings.split
      if (workdir.index(layer, split, name) / 'meta.json').exists():
        mine[name] = table(Findings.of(workdir, layer, split, name))
  return tables


def table(findings: Findings) -> dict[str, Any]:
  """One dictionary's."""
  latents = range(findings.index.num_latents)
  fate = {m: findings.fate(m) for m in latents}
  counts = collections.Counter(fate.values())
  explained = [m for m in latents if fate[m] == 'explained']
  category = {m: findings.main(m).category or UNNAMED for m in explained}
  kind = {m: findings.kind(m) or NEVER for m in latents}
  return {
    'latents': len(latents),
    'explainer': findings.explainers[0] if findings.explainers else '',
    'fates': {name: counts[name] for name in FATES},
    'by_category': _rows(findings, category, (*CATEGORIES, UNNAMED), fate),
    'by_kind': _rows(findings, kind, (*KINDS, NEVER), fate),
  }


def _rows(
  findings: Findings,
  group: dict[int, str],
  names: Iterable[str],
  fate: dict[int, str],
) -> dict[str, Any]:
  """A row for each group that has a latent, in the order of `names`."""
  by_name: dict[str, list[int]] = {}
  for latent, name in group.items():
    by_name.setdefault(name, []).append(latent)
  return {
    name: _row(findings, by_name[name], fate)
    for name in names
    if name in by_name
  }


def _row(
  findings: Findings, latents: list[int], fate: dict[int, str]
) -> dict[str, Any]:
  first = findings.explainers[0] if findings.explainers else ''
  own = {
    latent: findings.scored(latent, first)
    for latent in latents
    if latent in findings.scores
  }
  figures = {}
  for name in COLUMNS:
    scorer = (findings.iou_scorer or name) if name == 'iou' else name
    values = [
      table[scorer][''].value
      for table in own.values()
      if '' in table.get(scorer, {})
    ]
    make = stats.share_figure if name == 'right' else scored.mean
    figures[name] = make(values, f'no latent of these has a score `{scorer}`')
  return {
    'latents': len(latents),
    'explained': sum(fate[m] == 'explained' for m in latents),
    **figures,
  }
