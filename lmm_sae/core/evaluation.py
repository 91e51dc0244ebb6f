"""evaluation.json: how good the SAEs of a workdir are.

{format_version,
 about: {split, rows, samples, kinds},
 <layer>: {kind: figures},                     of `sae.metrics`
 loss: {<layer>: {reason, samples, skipped, kinds: {kind: figures}}},
                                               of `core.recovered`
 compared: {<layer>: {saes: [...], pairs: [...]}}}

`saes` has this workdir's SAE first, then evaluate.others, each {name, latents,
k, activation, kinds, loss}; `pairs` is how alike each two are
(`sae.matching`). Where the losses were not had, `reason` says why.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from lmm_sae.core.workdir import Workdir

FILE = 'evaluation.json'
FORMAT_VERSION = 2  # 1 had the layers alone
OWN = 'this one'  # the workdir's SAE among others
ORDER = (
  *('base', 'tile', 'newline', 'image'),
  *('template', 'question', 'answer', 'text'),
  *('bos', 'all'),
)
# Of the printed tables: title, and the figure by its path.
COLUMNS = (
  ('rows', ('rows',)),
  ('FVU', ('fvu',)),
  ('EV rows', ('explained_variance_rows',)),
  ('EV centred', ('explained_variance_centred',)),
  ('L0', ('l0',)),
  ('dead', ('dead',)),
  ('cosine', ('cosine',)),
  ('shrinkage', ('shrinkage',)),
)
LOSSES = (
  ('CE', ('ce', 'clean')),
  ('CE sae', ('ce', 'sae')),
  ('KL', ('kl', 'sae')),
  ('kept/zero', ('ce_recovered', 'zero', 'value')),
  ('kept/mean', ('ce_recovered', 'mean', 'value')),
)


def read(workdir: Workdir) -> dict[str, Any]:
  """The file; {} where there is none.

  Raises:
    ValueError: its format is not known, or it is damaged.
  """
  path = workdir.file(FILE)
  if not path.exists():
    return {}
  try:
    found = json.loads(path.read_text())
  except ValueError as error:
    raise damaged(path, error) from error
  if not isinstance(found, dict):
    raise damaged(path, 'it is no JSON object')
  version = found.get('format_version', 1)
  if version not in (1, FORMAT_VERSION):
    raise ValueError(
      f'{path} has format_version {version}; this program reads '
      f'{FORMAT_VERSION}'
    )
  return found


def damaged(path: pathlib.Path, why: Any) -> ValueError:
  """The error of a file that is not what `evaluate` writes."""
  return ValueError(
    f'{path} is damaged ({why}): remove it, or run `lmm-sae evaluate` again'
  )


def losses(found: dict[str, Any], layer: int) -> dict[str, dict[str, Any]]:
  """{kind: figures of the SAE in the loop} of a layer; {} where not had."""
  return found.get('loss', {}).get(str(layer), {}).get('kinds', {})


def headline(kinds: dict[str, dict[str, Any]]) -> str:
  """The kind whose loss speaks for the SAE: `answer`, else `all`.

  A model that was tuned on answers alone never learned to say the questions.
  """
  return 'answer' if 'answer' in kinds else 'all'


def text(found: dict[str, Any]) -> str:
  """What was found, as tables for people."""
  layers = [key for key in found if key.isdigit()]
  return '\n\n'.join(part for key in layers for part in _layer(found, key))


def _layer(found: dict[str, Any], key: str) -> Iterator[str]:
  loss = found['loss'][key]
  yield f'layer {key}, by kind of token\n' + _by_kind(found[key], loss['kinds'])
  if loss['reason']:
    yield f'no loss of predictions: {loss["reason"]}'
  compared = found['compared'].get(key)
  if compared is None:
    return
  head = headline(found['loss'][key]['kinds'])
  title = f'layer {key}, SAEs beside one another, over all tokens'
  if found['loss'][key]['kinds']:
    title += f'; from CE on, over predicted tokens of kind `{head}`'
  rows = [
    [
      *(sae['name'], str(sae['latents']), str(sae['k']), sae['activation']),
      *_cells(sae['kinds'].get('all', {}), COLUMNS),
      *_cells(sae['loss']['kinds'].get(head, {}), LOSSES),
    ]
    for sae in compared['saes']
  ]
  names = ['SAE', 'latents', 'k', 'activation']
  names += [name for name, _ in COLUMNS + LOSSES]
  yield f'{title}\n{grid([names, *rows])}'
  names = ['SAE', 'and', 'latents', 'pairs', 'cosine', '> .7', 'random', '> .7']
  rows = [
    [
      *(pair['saes'][0], pair['saes'][1], which),
      *_cells(
        pair[which],
        (
          ('', ('pairs',)),
          *(('', ('mean',)), ('', ('share',))),
          *(('', ('random', 'mean')), ('', ('random', 'share'))),
        ),
      ),
    ]
    for pair in compared['pairs']
    for which in ('alive', 'all')
  ]
  yield f'layer {key}, matched decoder directions\n' + grid([names, *rows])


def _by_kind(table: dict[str, Any], loss: dict[str, Any]) -> str:
  names = [name for name in ORDER if name in table or name in loss]
  rows = [
    [
      name,
      *_cells(table.get(name, {}), COLUMNS),
      *_cells(loss.get(name, {}), LOSSES),
    ]
    for name in names
  ]
  return grid([['kind', *(name for name, _ in COLUMNS + LOSSES)], *rows])


def _cells(figures: dict[str, Any], columns) -> list[str]:
  cells = []
  for _, path in columns:
    value: Any = figures
    for part in path:
      value = value.get(part) if value else None
    cells.append(_number(value))
  return cells


def _number(value: Any) -> str:
  if value is None:
    return '-'
  return str(value) if isinstance(value, int) else f'{value:.4g}'


def grid(rows: Sequence[Sequence[str]]) -> str:
  """Rows in columns, the first to the left, the others to the right.

  The first row has the titles; columns without a figure are left out.
  """
  some = [
    i
    for i, (_, *cells) in enumerate(zip(*rows, strict=True))
    if set(cells) != {'-'}
  ]
  rows = [[row[i] for i in some] for row in rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for first, *rest in rows:
    cells = [first.ljust(widths[0])]
    cells += [cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True)]
    lines.append('  '.join(cells).rstrip())
  return '\n'.join(lines)
