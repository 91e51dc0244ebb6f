"""Puts all that a run found on one page: report/index.html.

The page is one file with its style and scripts inside; what is large stands
beside it, data in data/*.js (a page opened from disk cannot fetch, but it can
run a script) and pictures in img/, each sample's once. Heat maps and masks are
drawn by the page from a few letters a patch. What was not run says so.

Also writes summary.json and prints the table of headline figures. The same
inputs give the same bytes; the folder is replaced as a whole.
"""

import collections
import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Iterable
from typing import Any

import jinja2
from absl import logging
from markupsafe import Markup
from ml_collections import ConfigDict

import lmm_sae
from lmm_sae.core import (
  pictures,
  progress,
  records,
  report_latents,
  report_overview,
  report_studies,
  summary,
  tables,
)
from lmm_sae.core.findings import FATES, FLAGS, Findings
from lmm_sae.core.report_latents import Shown
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir

ASSETS = pathlib.Path(__file__).parent / 'report_assets'
STYLES = ('page.css', 'latents.css')
SCRIPTS = (
  'dom.js',
  'pictures.js',
  'charts.js',
  'grid.js',
  'latent.js',
  'studies.js',
  'results.js',
  'main.js',
)
CHUNK = 32  # latents in one file of details
THUMBS = 128  # latents in one file of card pictures
HALVES = ('a', 'b')


@dataclasses.dataclass(frozen=True)
class ReportConfig:
  """The section `report` of the config; its fields are explained there."""

  title: str
  latents: int
  image_px: int

  def __post_init__(self):
    if self.latents < 0:
      raise ValueError(f'report.latents is {self.latents}; 0 means all')
    if self.image_px < 1:
      raise ValueError(
        f'report.image_px is {self.image_px}; a picture needs at least 1 pixel'
      )


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Writes summary.json and the report, and prints the headline figures."""
  opts = ReportConfig(**config.report)
  layers, split = tuple(config.lmm.layers), config.explain.split
  shown = Shown(
    threshold=config.explain.threshold,
    style=config.explain.mask,
    count=config.explain.exemplars,
  )
  found = [Findings.of(workdir, layer, split) for layer in layers]
  figures = summary.compute(workdir, layers)
  figures['tables'] = tables.of(found, workdir)
  records.write_json(workdir.file('summary.json'), figures)
  folder = workdir.file('report')
  build(workdir, folder, opts, shown, found, figures)
  sys.stdout.write(
    f'{summary.table(figures)}\n\nreport: {folder / "index.html"}\n'
  )


def build(
  workdir: Workdir,
  folder: pathlib.Path,
  opts: ReportConfig,
  shown: Shown,
  found: list[Findings],
  figures: dict[str, Any],
) -> None:
  """Writes the page and what stands beside it, then puts it in its place."""
  part = folder.with_name(f'{folder.name}.part')
  shutil.rmtree(part, ignore_errors=True)
  out = Folder(part)
  stores = {
    half: ActivationStore.open(workdir.acts(half))
    for half in dict.fromkeys((*HALVES, found[0].split))
    if (workdir.acts(half) / 'meta.json').exists()
  }
  layers = [_layer(out, opts, shown, one, stores) for one in found]
  out.put(
    'steering.js',
    'steering',
    {'studies': [s for one in found for s in report_studies.steering(one)]},
    samples=True,
  )
  out.put(
    'causes.js',
    'causes',
    {'cases': [c for one in found for c in report_studies.causes(one)]},
    samples=True,
  )
  for name in ('eq', 'mistakes'):
    out.put(f'{name}.js', name, _study(workdir, name), samples=True)
  _pictures(out, opts, stores)
  _page(out, workdir, opts, shown, found, figures, stores, layers)
  shutil.rmtree(folder, ignore_errors=True)
  part.rename(folder)


class Folder:
  """The report in the making: files of data, and the samples they speak of."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.samples: dict[str, set[int]] = collections.defaultdict(set)
    (path / 'data').mkdir(parents=True)
    (path / 'img').mkdir()

  def put(self, file: str, key: str, value: Any, samples: bool = False) -> None:
    """Writes data for the page; notes the samples in it if asked."""
    path = self.path / 'data' / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'lmmSae.put({_json(key)},{_json(value)})\n')
    if samples:
      for half, sample in _samples_of(value):
        self.samples[half].add(sample)


def _json(value: Any) -> str:
  return json.dumps(
    value, ensure_ascii=False, allow_nan=False, separators=(',', ':')
  )


def _samples_of(value: Any) -> Iterable[tuple[str, int]]:
  """(half, sample) of every dict with a `sample`, however deep."""
  if isinstance(value, dict):
    sample = value.get('sample')
    if isinstance(sample, int) and sample >= 0:
      yield value.get('split') or value.get('half') or 'b', sample
  if isinstance(value, (dict, list)):
    items = value.values() if isinstance(value, dict) else value
    for item in items:
      yield from _samples_of(item)


def _study(workdir: Workdir, name: str) -> dict[str, Any] | None:
  """eq.json or mistakes.json by layer; None where it was not made."""
  path = workdir.file(f'{name}.json')
  if not path.exists():
    return None
  table = json.loads(path.read_text())
  version = table.pop('format_version', None)
  if version != records.FORMAT_VERSION:
    raise ValueError(
      f'{path} has format_version {version}; this version reads '
      f'{records.FORMAT_VERSION}: run `lmm-sae attribute` again'
    )
  return table


def _layer(
  out: Folder,
  opts: ReportConfig,
  shown: Shown,
  findings: Findings,
  stores: dict[str, ActivationStore],
) -> dict[str, Any]:
  """Writes the data of one layer's latents; says what the scripts need."""
  layer = findings.layer
  kinds: collections.Counter[str] = collections.Counter()
  for line in stores[findings.split].manifest:
    kinds.update(line['kinds'])
  latents = findings.shown(opts.latents)
  thumbs: dict[int, Any] = {}
  details: dict[int, Any] = {}
  pages = progress.track(latents, len(latents), f'pages of layer {layer}')
  for row, latent in enumerate(pages):
    exemplars = findings.index.exemplars(latent)
    out.samples[findings.split].update(one.sample for one in exemplars)
    thumbs[latent] = report_latents.thumbs(findings, latent, exemplars, shown)
    details[latent] = report_latents.detail(
      findings, latent, exemplars, shown, dict(kinds)
    )
    last = row + 1 == len(latents)
    if last or (row + 1) % CHUNK == 0:
      at = row // CHUNK
      out.put(
        f'{layer}/latents_{at:04d}.js',
        f'latents/{layer}/{at}',
        details,
        samples=True,
      )
      details = {}
    if last or (row + 1) % THUMBS == 0:
      at = row // THUMBS
      out.put(f'{layer}/thumbs_{at:04d}.js', f'thumbs/{layer}/{at}', thumbs)
      thumbs = {}
  fields = report_latents.columns(findings, latents)
  out.put(f'layer_{layer}.js', f'layer/{layer}', {'fields': fields})
  return {
    'layer': layer,
    'chunk': CHUNK,
    'thumbs': THUMBS,
    'first': report_latents.first_look(fields),
  }


def _pictures(
  out: Folder, opts: ReportConfig, stores: dict[str, ActivationStore]
) -> None:
  """Writes each sample's picture once, and the list of them."""
  wanted = [
    (half, sample)
    for half in sorted(stores)
    for sample in sorted(out.samples[half])
  ]
  table: dict[str, dict[int, tuple[str, str]]] = {half: {} for half in stores}
  lost = 0
  for half, sample in progress.track(wanted, len(wanted), 'pictures'):
    known = stores[half].sample(sample)
    if not known.image:
      continue
    name = f'{half}_{sample:06d}.webp'
    try:
      image = stores[half].image(sample)
    except ValueError as error:  # a source's file may be gone since capture
      lost += 1
      logging.warning('%s: shown without picture', error)
      continue
    data = pictures.thumbnail(image, opts.image_px)
    (out.path / 'img' / name).write_bytes(data)
    table[half][sample] = (name, _alt(half, known))
  if lost:
    logging.warning('%d of %d pictures are missing', lost, len(wanted))
  out.put('samples.js', 'samples', table)


def _alt(half: str, sample: records.Sample) -> str:
  """What a picture shows, in words, as far as it is known."""
  regions = (sample.truth or {}).get('concepts', {})
  things = [
    ' '.join(names)
    for region, names in sorted(regions.items())
    if region != '0'
  ]
  about = f': {", ".join(things)}' if things else ''
  return f'Sample {sample.sample} of half {half}{about}'


def _page(
  out: Folder,
  workdir: Workdir,
  opts: ReportConfig,
  shown: Shown,
  found: list[Findings],
  figures: dict[str, Any],
  stores: dict[str, ActivationStore],
  layers: list[dict[str, Any]],
) -> None:
  """Writes index.html."""
  env = jinja2.Environment(
    loader=jinja2.FileSystemLoader(ASSETS),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  context = report_overview.context(workdir, opts.title, found, figures, stores)
  data = {
    'title': context['title'],
    'split': found[0].split,
    'style': shown.style,
    'outcomes': FATES,
    'flags': FLAGS,
    'layers': layers,
  }
  html = env.get_template('page.html.j2').render(
    **context,
    version=lmm_sae.__version__,
    css=_inline(STYLES, '</style'),
    js=_inline(SCRIPTS, '</script', "'use strict';\n(() => {\n", '})();\n'),
    # inside a script element only `<` could end it
    run_json=Markup(_json(data).replace('<', '\\u003c')),
  )
  (out.path / 'index.html').write_text(html)


def _inline(
  names: Iterable[str], end: str, before: str = '', after: str = ''
) -> Markup:
  """Our own style and script files, as they stand."""
  text = '\n'.join((ASSETS / name).read_text() for name in names)
  if end in text:
    raise ValueError(f'{end} inside the report assets would end the element')
  return Markup(before + text + after)
