"""Serves exemplars and labels to people, and measures how far they agree.

lmm-sae label --config=WORKDIR/config.json --workdir=WORKDIR \\
  --config.label.rater=ann,bob
lmm-sae label --config=WORKDIR/config.json --workdir=WORKDIR

The first serves a page until it is stopped; answers are kept one by one in
WORKDIR/ratings. The second prints what was said, beside the controls and the
LMM judge, and writes WORKDIR/agreement.json. See `core.ratings`.
"""

import dataclasses
import functools
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from lmm_sae.core import (
  explaining,
  host,
  label_page,
  masks,
  pictures,
  ratings,
  records,
  wire,
)
from lmm_sae.core.index import LatentIndex
from lmm_sae.core.ratings import Case
from lmm_sae.core.records import Explanation
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir

PIXELS = 336  # of the longer side of a picture, at least


@dataclasses.dataclass(frozen=True)
class LabelConfig:
  """The section `label` of the config; its fields are explained there."""

  rater: str
  host: str
  port: int
  latents: int
  images: int

  def __post_init__(self):
    for name in ('latents', 'images'):
      if getattr(self, name) < 1:
        raise ValueError(f'label.{name} must be at least 1')


@dataclasses.dataclass(frozen=True)
class Seen:
  """How the explainer saw pictures, from config.explain."""

  split: str
  mask: str
  threshold: float


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Serves the page, or measures where no rater is named.

  Raises:
    ValueError: nothing is explained, or nobody has rated.
    OSError: the port is taken.
  """
  opts, raters = LabelConfig(**config.label), ratings.raters(config.label.rater)
  if not raters:
    found = ratings.measure(workdir, config.seed)
    records.write_json(workdir.file(ratings.FILE), found)
    print(table(found))
    return
  token = config.server.token
  host.check_address('label.host', opts.host, token)
  file = workdir.require(workdir.file('explanations.jsonl'), 'explain')
  cases = ratings.cases(
    records.read(Explanation, file), opts.latents, config.seed
  )
  seen = Seen(
    config.explain.split, config.explain.mask, config.explain.threshold
  )
  sheets = {
    name: ratings.Sheet(workdir, name, ratings.order(cases, name, config.seed))
    for name in raters
  }
  desk = label_page.Desk(
    sheets, functools.partial(show, workdir, seen, opts.images)
  )
  with label_page.server(desk, opts.host, opts.port, token) as server:
    name, port = server.server_address[:2]
    end = '#TOKEN, the token being server.token' if token else ''
    print(f'serving on http://{name}:{port}/{end}', flush=True)
    logging.info('label: %d cases for %s', len(cases), ', '.join(raters))
    server.serve_forever()


def show(
  workdir: Workdir, seen: Seen, count: int, case: Case
) -> dict[str, Any]:
  """What a rater sees of a latent: {images: [{seen, heat}], texts}."""
  index = _index(workdir, case.layer, seen.split)
  store = _store(workdir, seen.split)
  if explaining.from_text(index, case.latent):
    texts = index.texts(case.latent)[:count]
    return {
      'images': [],
      'texts': [explaining.mark(one, seen.threshold) for one in texts],
    }
  peak = float(index.stats['peak_base'][case.latent])
  images = []
  for one in index.exemplars(case.latent)[:count]:
    image = store.image(one.sample)
    image = masks.shrink(image, max(PIXELS, max(image.size)))
    active_HW = explaining.bright(
      index, case.latent, one.heat_HW, seen.mask, seen.threshold
    )
    both = {
      'seen': masks.masked(image, active_HW, seen.mask),
      'heat': pictures.overlay(image, one.heat_HW, peak=peak),
    }
    images.append({name: wire.png(x).tobytes() for name, x in both.items()})
  return {'images': images, 'texts': []}


@functools.lru_cache(8)
def _index(workdir: Workdir, layer: int, split: str) -> LatentIndex:
  return LatentIndex.open(workdir.require(workdir.index(layer, split), 'index'))


@functools.lru_cache(8)
def _store(workdir: Workdir, split: str) -> ActivationStore:
  return ActivationStore.open(workdir.require(workdir.acts(split), 'capture'))


def table(found: dict[str, Any]) -> str:
  """What was measured, for a terminal."""
  names = [
    ('own labels fit', found['fits']),
    ('controls fit', found['control']),
  ]
  names.append(("Krippendorff's alpha", found['alpha']))
  names += [(f"Cohen's kappa, {k}", v) for k, v in found['kappa'].items()]
  names += [(f'correlation with {k}', v) for k, v in found['judge'].items()]
  width = max(len(name) for name, _ in names)
  counts = ', '.join(f'{name} {n}' for name, n in found['raters'].items())
  lines = [f'answers: {counts}']
  lines += [f'{name:<{width}}  {_figure(one)}' for name, one in names]
  return '\n'.join(lines)


def _figure(one: dict[str, Any]) -> str:
  if one['value'] is None:
    return f'- ({one["reason"]})'
  low, high = one['ci']
  return f'{one["value"]:.3f} [{low:.3f}, {high:.3f}] n {one["n"]}'
