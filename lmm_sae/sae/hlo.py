"""What a compiled program does, read from the text of its HLO.

    found = hlo.read(compiled.as_text(), cost.DEVICES['v5p'])
    found.collectives, found.seconds

No API of jax tells this: `cost_analysis` counts the body of a loop once, prices
what it does not know at -1 s, and says nothing of what chips send. Here a loop
counts as often as it runs, and of a conditional the branch that takes longest
is taken, or the one that takes least.
"""

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

from lmm_sae.kernels import cost

KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
BITS = re.compile(r'(?:f|bf|s|u|c)(\d+)')  # of a dtype's name, as in bf16
MOST_CYCLES = 2**60  # more stands for: unknown


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind in a step, on one chip.

  Attributes:
    kind: one of KINDS.
    count: how often it runs.
    bytes: of its results.
    sent: bytes over the chip's links, in and out, as a ring moves them.
  """

  kind: str
  count: int
  bytes: int
  sent: float


@dataclasses.dataclass(frozen=True)
class Program:
  """What one run of a program does on one chip.

  Attributes:
    collectives: by kind.
    own_s: of the compiler's own operations, by the cycles that it estimates;
      those that it gives none for (sorts, copies beside others) are left out.
    kernels_s: of Pallas kernels, by the CostEstimate that each carries.
    links_s: of collectives, at the bandwidth of the links.
    unpriced: sorts and scatters that have no cycles.
  """

  collectives: tuple[Collective, ...]
  own_s: float
  kernels_s: float
  links_s: float
  unpriced: int

  @property
  def seconds(self) -> float:
    """Of all of it, one after the other."""
    return self.own_s + self.kernels_s + self.links_s


@dataclasses.dataclass(frozen=True)
class _Line:
  """An instruction: the type of its result, what it does, and the rest."""

  type: str
  name: str
  rest: str
  extra: str  # backend_config

  def called(self, *names: str) -> list[str]:
    """Computations that it names under these attributes."""
    found = []
    for name in names:
      for match in re.finditer(
        rf'\b{name}=(\{{[^}}]*\}}|%?[\w.\-]+)', self.rest
      ):
        found += re.findall(r'[\w.\-]+', match[1])
    return found


def read(text: str, device: cost.Device, *, most: bool = True) -> Program:
  """What the program does on a chip.

  Args:
    text: `compiled.as_text()`.
    device: the chip.
    most: whether conditionals take the branch that takes longest.
  """
  bodies, entry = _computations(text)
  shares = int(m[1]) if (m := re.search(r'num_partitions=(\d+)', text)) else 1
  shares *= int(m[1]) if (m := re.search(r'replica_count=(\d+)', text)) else 1
  price = functools.partial(_seconds, device=device)

  @functools.cache
  def walk(name: str, fused: bool = False) -> collections.Counter:
    total = collections.Counter()
    for line in bodies[name]:
      total.update(_own(line, shares, device, fused))
      if line.name == 'while':
        body = walk(*line.called('body'))
        times = _trips(line, bodies)
        total.update({key: times * n for key, n in body.items()})
      elif line.name == 'conditional':
        branches = line.called(
          'branch_computations', 'true_computation', 'false_computation'
        )
        pick = max if most else min
        total.update(pick(map(walk, branches), key=lambda x: sum(price(x))))
      elif line.name in ('call', 'fusion', 'async-start', 'call-start'):
        inside = fused or line.name == 'fusion'
        for one in line.called('calls', 'to_apply'):
          total.update(walk(one, inside))
    return total

  total = walk(entry)
  own_s, kernels_s, links_s = price(total)
  return Program(
    tuple(
      Collective(
        kind,
        round(total['count', kind]),
        round(total['bytes', kind]),
        total['sent', kind],
      )
      for kind in KINDS
      if total['count', kind]
    ),
    own_s,
    kernels_s,
    links_s,
    round(total['unpriced', '']),
  )


def _seconds(total: collections.Counter, *, device: cost.Device):
  """(own, kernels, links) of a tally."""
  cycles, sent = total['cycles', ''], 0.0
  for kind in KINDS:
    sent += total['sent', kind]
  return (
    cycles / device.clock if device.clock else 0.0,
    total['kernels', ''],
    sent / device.link if device.link else 0.0,
  )


def _own(line, shares, device, fused) -> dict[tuple[str, str], float]:
  """What one instruction adds to the tally, without what it calls."""
  kind = line.name.removesuffix('-start')
  if kind in KINDS:
    chips = _group(line, shares)
    size = _results(line, kind, chips)
    sent = _sent(kind, size, chips)
    return {('count', kind): 1, ('bytes', kind): size, ('sent', kind): sent}
  if fused:  # the fusion as a whole has cycles
    return {}
  if found := re.search(r'"cost_estimate":(\{[^}]*\})', line.extra):
    flops, moved = (
      float(json.loads(found[1])[key]) for key in ('flops', 'bytes_accessed')
    )
    unit = 'bfloat16'  # a kernel does not say which unit its arithmetic is for
    spent = cost.seconds(cost.Cost('', flops, moved, unit), device)
    return {('kernels', ''): spent}
  found = re.search(r'"estimated_cycles":"(\d+)"', line.extra)
  if found and int(found[1]) < MOST_CYCLES:
    return {('cycles', ''): int(found[1])}
  return {('unpriced', ''): 1} if line.name in ('sort', 'scatter') else {}


def _computations(text: str) -> tuple[dict[str, list[_Line]], str]:
  """{name: its instructions}, and the name of the first one that runs."""
  bodies: dict[str, list[_Line]] = {}
  entry, own = '', None
  for line in text.splitlines():
    if found := re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{$', line):
      own = bodies.setdefault(found[2], [])
      entry = found[2] if found[1] else entry
    elif found := re.match(
      r'\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z\-]*)\((.*)', line
    ):
      rest, _, extra = found[3].partition('backend_config=')
      own.append(_Line(found[1], found[2], rest, extra))
  return bodies, entry


def _trips(loop: _Line, bodies: dict[str, list[_Line]]) -> int:
  """How often a loop's body runs; 1 where its text does not tell."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.extra)
  if known:
    return int(known[1])
  (name,) = loop.called('condition')
  found = [
    int(line.rest.partition(')')[0])
    for line in _deep(name, bodies)
    if line.name == 'constant' and line.type.startswith('s32[]')
  ]
  below = any('direction=LT' in line.rest for line in _deep(name, bodies))
  return found[0] if below and len(found) == 1 else 1


def _deep(name: str, bodies: dict[str, list[_Line]]) -> Iterator[_Line]:
  """The instructions of a computation and of the fusions in it."""
  for line in bodies[name]:
    yield line
    for inner in line.called('calls'):
      yield from _deep(inner, bodies)


def _arrays(text: str) -> list[int]:
  """Bytes of each array of a type."""
  return [
    math.prod(int(size) for size in axes.split(',') if size)
    * max(int(BITS.fullmatch(dtype)[1]) if BITS.fullmatch(dtype) else 8, 8)
    // 8
    for dtype, axes in re.findall(r'(\w+)\[([\d,]*)\]', text)
  ]


def _results(line: _Line, kind: str, chips: int) -> float:
  """Bytes of the results; the type of a start has the operands before them."""
  size = sum(_arrays(line.type))
  if line.name == kind or kind == 'all-reduce':
    return size
  return size * chips / (chips + 1) if kind == 'all-gather' else size / 2


def _group(line: _Line, shares: int) -> int:
  """How many chips take part in one of the groups of a collective."""
  if found := re.search(r'replica_groups=\{\{([\d,]+)\}', line.rest):
    return found[1].count(',') + 1
  if found := re.search(r'replica_groups=\[\d+,(\d+)\]', line.rest):
    return int(found[1])
  return shares


def _sent(kind: str, size: int, chips: int) -> float:
  """Bytes in and out of a chip, of a collective whose results have `size`."""
  if kind == 'collective-permute':
    return 2 * size
  share = (chips - 1) / chips
  if kind == 'all-reduce':
    return 4 * size * share
  if kind == 'reduce-scatter':
    return 2 * size * (chips - 1)
  return 2 * size * share
