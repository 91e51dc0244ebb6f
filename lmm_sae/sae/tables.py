"""The facts of `looking`, as lines of at most 100 columns for people.

Only a path may be longer: it is never cut.
"""

import json
from collections.abc import Iterator
from typing import Any

WIDTH = 100
_SHOWN = 40  # items of a long list


def lines(facts: dict[str, Any]) -> Iterator[str]:
  """The table of anything that was looked at."""
  yield facts['path']
  if facts['kind'] == 'workdir':
    yield from _workdir(facts)
    return
  yield from _head(facts)
  yield from _settings(facts)
  if facts['kind'] == 'store':
    yield from _store(facts)
  yield from _arrays(facts['arrays'])
  for warning in facts.get('warnings', ()):
    yield f'note: {warning}'[:WIDTH]
  if 'stats' in facts:
    of = _store_stats if facts['kind'] == 'store' else _stats
    yield from of(facts['stats'])
  if 'against' in facts:
    yield from _against(facts['against'])


def _workdir(facts) -> Iterator[str]:
  yield f'  workdir, {size(facts["bytes"])}'
  for part in facts['parts']:
    yield ''
    yield part['path']
    yield from _head(part)
    if part['kind'] == 'store':
      yield from _store(part)
    elif part['kind'] == 'checkpoint' and part['step'] == max(part['steps']):
      yield from _settings(part)
      yield from _arrays(part['arrays'])
  if facts['files']:
    yield ''
    rows = [
      (name, '' if of['lines'] is None else f'{of["lines"]} lines', of['bytes'])
      for name, of in facts['files'].items()
    ]
    yield from table([(a, b, size(c)) for a, b, c in rows])


def _head(facts) -> Iterator[str]:
  words = [facts['kind'], size(facts['bytes'])]
  if facts['kind'] == 'export':
    words[0] = f'SAE in the layout of {" and ".join(facts["layouts"])}'
  if facts['writer'] == 'lmm_sae':
    words.append(f'format {facts["format"]} of lmm_sae')
  else:
    words.append('written by another program')
  yield '  ' + ', '.join(words)
  if facts['kind'] == 'store':
    return
  words = []
  if facts['step'] is not None:
    words.append(f'step {facts["step"]}')
  if facts['fvu'] is not None:
    words.append(f'fvu {number(facts["fvu"])}')
  if facts.get('processes'):
    words.append(f'written by {facts["processes"]} process(es)')
  if facts.get('saved'):
    words.append(f'saved {facts["saved"]}')
  yield f'  {", ".join(words) or "no step"}'
  if len(facts.get('steps', ())) > 1:
    yield from wrap('checkpoints here', map(str, facts['steps']))
  latents = _sae(facts['sae'])
  if latents:
    yield cut(f'  {latents}')


def _sae(said) -> str:
  """`6 -> 12 latents, k 3, topk` where the settings say so."""
  if not {'width', 'latents'} <= set(said):
    return ''
  words = [f'{said["width"]} -> {said["latents"]} latents']
  words += [f'k {said["k"]}'] if 'k' in said else []
  return ', '.join([*words, str(said.get('activation', ''))]).rstrip(', ')


def _settings(facts) -> Iterator[str]:
  for title, said in (
    ('settings', facts['settings']),
    ('metadata', facts.get('metadata')),
    ('scalars', facts.get('scalars')),
    ('values', facts.get('values')),
  ):
    if not said:
      continue
    plain = {k: v for k, v in said.items() if not (isinstance(v, dict) and v)}
    if plain:
      yield from wrap(title, _pairs(plain))
    for section in said:
      if section not in plain:
        yield from wrap(f'{title} {section}', _pairs(said[section]))
  if facts.get('position'):
    places = facts['position']
    words = [
      f'share {share}: pool {place["pool"]} row {place["row"]}'
      for share, place in enumerate(places)
    ]
    yield from wrap('data position', words[:_SHOWN], ', ')
    if len(words) > _SHOWN:
      yield f'    and {len(words) - _SHOWN} more'


def _pairs(said: dict[str, Any]) -> Iterator[str]:
  for name, value in said.items():
    if isinstance(value, float):
      text = number(value)
    elif isinstance(value, str):
      text = value
    else:
      text = json.dumps(value, default=str)
    yield f'{name}={text}'


def _store(facts) -> Iterator[str]:
  yield (
    f'  {facts["committed"]} of {facts["groups"]} groups, {facts["samples"]} '
    f'samples, {facts["rows"]} rows, {facts["rejects"]} rejected; '
    f'{facts["dtype"]}, {"mixed" if facts["mixed"] else "in order of samples"}'
  )
  if facts['rounding']:
    costs = (f'layer {at} {fvu:.2g}' for at, fvu in facts['rounding'].items())
    yield from wrap('FVU of int8', costs)
  yield from wrap('rows by kind', _pairs(facts['kinds']))


def _arrays(arrays) -> Iterator[str]:
  """The tree, indented, with a line an array."""
  meshes = {
    _mesh(x['sharding']) for x in arrays if 'mesh' in (x['sharding'] or {})
  }
  for mesh in sorted(meshes):
    yield f'  mesh {mesh}'
  heads = 'array', 'shape', 'dtype', 'bytes', 'on disk', 'sharding'
  known = any(x['sharding'] for x in arrays)
  rows = [heads if known else heads[:-1]]
  before: list[str] = []
  for x in arrays:
    path = [x['item']] * bool(x['item']) + x['name'].split('.')
    folders = path[:-1]
    for depth, folder in enumerate(folders):
      if before[: depth + 1] != folders[: depth + 1]:
        rows.append(('  ' * depth + folder,))
        before = folders[: depth + 1]
    before = folders
    split = _split(x['sharding'])
    if len(meshes) > 1 and 'mesh' in (x['sharding'] or {}):
      split += f' of {_mesh(x["sharding"])}'
    rows.append(
      (
        '  ' * len(folders) + path[-1],
        ' x '.join(map(str, x['shape'])) or '-',
        x['dtype'],
        size(x['bytes']),
        size(x['stored_bytes']),
        *[split] * known,
      )
    )
  total = [sum(x[key] for x in arrays) for key in ('bytes', 'stored_bytes')]
  rows.append(('all', '', '', *map(size, total)))
  yield from table(rows)


def _mesh(sharding) -> str:
  return ' '.join(f'{axis}={n}' for axis, n in sharding['mesh'].items())


def _split(sharding) -> str:
  """`latent,-`: over which axes each dimension is split; `whole`, a device."""
  if sharding is None:
    return 'not stored'
  if 'spec' not in sharding:
    return sharding.get('device', sharding.get('type', ''))
  parts = [
    '+'.join(axes) if isinstance(axes, list) else axes or '-'
    for axes in sharding['spec']
  ]
  return ','.join(parts) if any(x != '-' for x in parts) else 'whole'


def _stats(stats) -> Iterator[str]:
  yield ''
  rows = [('figures', 'norm', 'min', 'max', 'not finite')]
  for name, of in stats['arrays'].items():
    cells = [number(of[key]) for key in ('norm', 'min', 'max')]
    rows.append((name, *cells, str(of['nonfinite'])))
  yield from table(rows)
  rows = [('norms of rows', 'min', 'median', 'max')]
  for name, of in stats['rows'].items():
    rows.append((name, *(number(of[key]) for key in ('min', 'median', 'max'))))
  if stats['b_dec_norm'] is not None:
    rows.append(
      ('b_dec_D, of stored rows', '', number(stats['b_dec_norm']), '')
    )
  yield from table(rows)
  dead = stats['dead']
  if dead is None:
    yield '  dead latents: unknown, nothing here counts rows without firing'
  else:
    yield (
      f'  dead: {dead["count"]} of {dead["latents"]} latents '
      f'({dead["share"]:.1%}) are silent for over {dead["dead_after"]} rows'
    )
  if stats['idle']:
    yield from bars('rows since each latent fired', stats['idle'])
  for rates in stats['rates']:
    yield from bars(
      f'firing rates by {rates["source"]}, {rates["rows"]} rows: '
      f'{rates["never"]} latents never',
      rates,
    )
  if not stats['rates']:
    yield '  firing rates: unknown, no workdir around it has an index of it'
  near = stats['neighbours']
  if near is None:
    return
  yield from bars('largest cosine of a decoder row with another', near)
  words = [
    f'{a} and {b} {cosine:.3f}'
    for (a, b), cosine in ((x['latents'], x['cosine']) for x in near['pairs'])
  ]
  yield from wrap('nearest pairs', words, ', ')


def _store_stats(stats) -> Iterator[str]:
  yield ''
  rows = [('norms of rows', 'rows', 'min', 'median', 'max', 'not finite')]
  for name, of in stats.items():
    norms = of['norm'] or dict.fromkeys(('min', 'median', 'max'))
    cells = (number(norms[key]) for key in ('min', 'median', 'max'))
    rows.append((name, str(of['rows']), *cells, str(of['nonfinite'])))
  yield from table(rows)


def _against(found) -> Iterator[str]:
  yield ''
  yield f'against {found["path"]}'
  settings = found['settings']
  for name, value in settings['added'].items():
    yield cut(f'  setting {name}: {json.dumps(value)}, not there before')
  for name, value in settings['removed'].items():
    yield cut(f'  setting {name}: gone, was {json.dumps(value)}')
  for name, (old, new) in settings['changed'].items():
    yield cut(f'  setting {name}: {json.dumps(new)}, was {json.dumps(old)}')
  if not any(settings.values()):
    yield '  the same settings'
  arrays = found['arrays']
  for name in arrays['added']:
    yield cut(f'  array {name}: not there before')
  for name in arrays['removed']:
    yield cut(f'  array {name}: gone')
  for name, (old, new) in arrays['reshaped'].items():
    yield cut(f'  array {name}: {new}, was {old}')
  rows = [('changes', 'largest', 'relative', 'not finite')]
  for name, of in arrays['changes'].items():
    cells = [number(of['max_abs']), number(of['relative'])]
    rows.append((name, *cells, str(of['nonfinite'])))
  yield from table(rows)
  if found['decoder']:
    least = found['decoder']
    yield (
      f'  decoder rows: cosine {least["min"]:.3f} at least, '
      f'{least["median"]:.3f} in the middle; {least["elsewhere"]} below 0.9'
    )
    yield from bars('cosine of decoder rows, by index', least)
  if found['latents']:
    yield '  latents: {died} died, {woke} woke'.format(**found['latents'])


def table(rows: list[tuple[str, ...]]) -> Iterator[str]:
  """Aligned columns; the first one is cut where a line would be too long."""
  count = max(map(len, rows))
  full = [(*row, *[''] * (count - len(row))) for row in rows]
  widths = [max(len(row[at]) for row in full) for at in range(count)]
  rest = sum(widths[1:]) + 2 * (count - 1) + 2
  widths[0] = max(12, min(widths[0], WIDTH - rest))
  for row in full:
    first = row[0]
    if len(first) > widths[0]:
      first = f'{first[: widths[0] - 13]}…{first[-12:]}'
    cells = [first.ljust(widths[0])]
    last = count - 1
    cells += [
      cell if at == last and count > 5 else cell.rjust(widths[at])
      for at, cell in enumerate(row)
      if at
    ]
    yield cut('  ' + '  '.join(cells).rstrip())


def bars(title: str, histogram: dict[str, Any]) -> Iterator[str]:
  """A histogram: a line a bin that is not empty, with a bar."""
  yield cut(f'  {title}')
  edges, counts = histogram['edges'], histogram['counts']
  most = max(counts, default=0)
  for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
    if count:
      bar = '#' * max(1, round(40 * count / most))
      yield f'    {low:>8.3g} to {high:<8.3g} {count:>9}  {bar}'


def wrap(title: str, words, between: str = '  ') -> Iterator[str]:
  """`title: word  word`, over as many lines as it takes."""
  line = f'  {title}: '
  empty = True
  for word in words:
    word = word if len(word) <= WIDTH - 4 else word[: WIDTH - 5] + '…'
    if not empty and len(line) + len(between) + len(word) > WIDTH:
      yield line
      line, empty = '    ', True
    elif empty and len(line) + len(word) > WIDTH:
      yield line.rstrip()
      line = '    '
    line += word if empty else between + word
    empty = False
  yield line.rstrip()


def cut(line: str) -> str:
  """The line, within the width."""
  return line if len(line) <= WIDTH else line[: WIDTH - 1] + '…'


def number(value: float | None) -> str:
  """A figure in four digits."""
  return '-' if value is None else f'{value:.4g}'


def size(count: float) -> str:
  """Bytes, for people."""
  for unit in ('B', 'kB', 'MB', 'GB'):
    if count < 1000:
      return f'{count:.3g} {unit}'
    count /= 1000
  return f'{count:.3g} TB'
