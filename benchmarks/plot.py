"""Lines over two logarithmic axes, as SVG: what a sweep needs and no more."""

import dataclasses
import html
import math
import pathlib

COLOURS = (
  *('#d62728', '#ff9896', '#1f77b4', '#17becf', '#2ca02c', '#9467bd'),
  *('#8c564b', '#7f7f7f', '#bcbd22', '#e377c2'),
)
WIDE, HIGH = 340, 260  # of a panel, within its axes, in px
LEFT, TOP, GAP = 70, 40, 60


@dataclasses.dataclass(frozen=True)
class Panel:
  """One pair of axes.

  Attributes:
    title, x, y: what stands above it and beside its axes.
    lines: points (x, y) by name, all above 0.
  """

  title: str
  x: str
  y: str
  lines: dict[str, list[tuple[float, float]]]


def write(path: pathlib.Path, panels: list[Panel]) -> None:
  """The panels, two beside one another, and one legend for all."""
  names = list(dict.fromkeys(name for p in panels for name in p.lines))
  colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
  parts = []
  for i, panel in enumerate(panels):
    x0 = LEFT + (i % 2) * (WIDE + LEFT + 20)
    y0 = TOP + (i // 2) * (HIGH + TOP + GAP)
    parts += _panel(panel, colours, x0, y0)
  columns = min(len(panels), 2)
  right = columns * (WIDE + LEFT + 20) + 10
  for i, name in enumerate(names):
    y = TOP + 18 * i
    parts.append(
      f'<path d="M{right} {y}h22" stroke="{colours[name]}" stroke-width="2"/>'
    )
    parts.append(_text(right + 28, y + 4, name, 'start'))
  wide = right + 190
  high = -(-len(panels) // 2) * (HIGH + TOP + GAP)
  path.write_text(
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" '
    f'width="{wide}" height="{high}" font-family="sans-serif" font-size="12">\n'
    f'<rect width="{wide}" height="{high}" fill="white"/>\n'
    + '\n'.join(parts)
    + '\n</svg>\n'
  )


def _panel(panel: Panel, colours: dict, x0: int, y0: int) -> list[str]:
  points = [point for line in panel.lines.values() for point in line]
  at_x = _scale([x for x, _ in points], x0, x0 + WIDE, 0.03)
  at_y = _scale([y for _, y in points], y0 + HIGH, y0, 0.05)
  parts = [
    f'<rect x="{x0}" y="{y0}" width="{WIDE}" height="{HIGH}" fill="none" '
    'stroke="#888"/>',
    _text(x0 + WIDE / 2, y0 - 10, panel.title, 'middle', 'font-weight="bold"'),
    _text(x0 + WIDE / 2, y0 + HIGH + 36, panel.x, 'middle'),
    _text(
      *(x0 - 52, y0 + HIGH / 2, panel.y, 'middle'),
      f'transform="rotate(-90 {x0 - 52} {y0 + HIGH / 2})"',
    ),
  ]
  for x in sorted({x for x, _ in points}):
    parts.append(f'<path d="M{at_x(x):.1f} {y0}v{HIGH}" stroke="#eee"/>')
    parts.append(_text(at_x(x), y0 + HIGH + 16, f'{x:g}', 'middle'))
  for y in _ticks([y for _, y in points]):
    parts.append(f'<path d="M{x0} {at_y(y):.1f}h{WIDE}" stroke="#eee"/>')
    parts.append(_text(x0 - 6, at_y(y) + 4, f'{y:,.10g}', 'end'))
  for name, line in panel.lines.items():
    path = ' '.join(f'{at_x(x):.1f},{at_y(y):.1f}' for x, y in sorted(line))
    look = f'stroke="{colours[name]}" stroke-width="2" fill="none"'
    parts.append(f'<polyline points="{path}" {look}/>')
    parts += [
      f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3" '
      f'fill="{colours[name]}"/>'
      for x, y in line
    ]
  return parts


def _scale(values: list[float], start: float, stop: float, margin: float):
  low, high = math.log(min(values)), math.log(max(values))
  span = (high - low) or 1.0
  low, span = low - margin * span, span * (1 + 2 * margin)
  return lambda value: start + (math.log(value) - low) / span * (stop - start)


def _ticks(values: list[float]) -> list[float]:
  """1, 2 and 5 times powers of ten within the values."""
  low, high = min(values), max(values)
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  found = [m * 10.0**p for p in powers for m in (1, 2, 5)]
  return [y for y in found if low <= y <= high]


def _text(x: float, y: float, text: str, anchor: str, more: str = '') -> str:
  return (
    f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>'
    f'{html.escape(text)}</text>'
  )
