"""evaluate: says how good each SAE is on held-out rows, by token kind.

  lmm-sae evaluate --config=DIR/config.json --workdir=DIR

Prints tables and writes evaluation.json (`core.evaluation`): the figures of
`sae.metrics` over the rows of a split; with server.url, what the model's own
predictions lose with the SAE in the loop (`core.recovered`); and with
evaluate.others, other SAEs measured on the same rows, and how alike their
decoders are (`sae.matching`).
"""

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lmm_sae.core import evaluation, progress, records, recovered, tokens
from lmm_sae.core.recovered import Loop
from lmm_sae.core.remote import SubjectClient
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import exports, layouts, matching
from lmm_sae.sae.exports import Sae
from lmm_sae.sae.metrics import Quality, Rows

READ_ROWS = 4096
NO_SERVER = (
  'server.url is empty: start `lmm-sae serve` with the same --config and '
  '--workdir and give its URL, or run `lmm-sae all`, which starts one'
)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """The section `evaluate` of the config; its fields are explained there."""

  split: str
  rows: int
  samples: int
  kinds: tuple[str, ...]
  others: tuple[str, ...]
  batch: int
  bootstrap: int

  def __post_init__(self):
    for name, least in (
      *(('rows', 0), ('samples', 0)),
      *(('batch', 1), ('bootstrap', 1)),
    ):
      if getattr(self, name) < least:
        raise ValueError(
          f'evaluate.{name} is {getattr(self, name)}; it must be at least '
          f'{least}'
        )
    for name in ('kinds', 'others'):
      if isinstance(getattr(self, name), str):
        raise ValueError(
          f'evaluate.{name} is {getattr(self, name)!r}: give a tuple, '
          f'--config.evaluate.{name}="(\'{getattr(self, name)}\',)"'
        )
      if not all(isinstance(item, str) for item in getattr(self, name)):
        raise ValueError(
          f'evaluate.{name} is {getattr(self, name)!r}: each must be text'
        )
    if not self.kinds:
      raise ValueError('evaluate.kinds is empty: name a kind of token, or all')
    for kind in self.kinds:
      tokens.kinds(kind)


@dataclasses.dataclass(frozen=True)
class _Named:
  """An SAE to be measured; it is read when it is its turn."""

  name: str
  load: Callable[[], Sae]


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Measures the SAE of every layer, and those beside it."""
  opts = EvaluateConfig(
    **{
      **config.evaluate,
      'kinds': _tuple(config.evaluate.kinds),
      'others': _tuple(config.evaluate.others),
    }
  )
  store = ActivationStore.open(
    workdir.require(workdir.acts(opts.split), 'capture')
  )
  layers = tuple(config.lmm.layers)
  found: dict[str, Any] = {
    'format_version': evaluation.FORMAT_VERSION,
    'about': {
      'split': opts.split,
      'rows': sum(b - a for a, b in chosen(store.ranges, opts.rows)),
      'samples': opts.samples,
      'kinds': list(opts.kinds),
    },
  }
  loss, compared = {}, {}
  with _server(config.server) as client:
    saes = {layer: _saes(workdir, layer, layers, opts) for layer in layers}
    for layer, named in saes.items():
      _check(store, layer, named, client)
    for layer, named in saes.items():
      entries, alive = _measure(store, layer, named, opts, client, config.seed)
      found[str(layer)] = entries[0]['kinds']
      loss[str(layer)] = entries[0]['loss']
      if len(entries) > 1:
        pairs = list(_pairs(named, alive, config.seed))
        compared[str(layer)] = {'saes': entries, 'pairs': pairs}
  found |= {'loss': loss, 'compared': compared}
  records.write_json(workdir.file(evaluation.FILE), found)
  print(evaluation.text(found))


def _tuple(value) -> Any:
  return value if isinstance(value, str) else tuple(value)


@contextlib.contextmanager
def _server(config: ConfigDict) -> Iterator[SubjectClient | None]:
  if not config.url:
    yield None
    return
  with SubjectClient(config.url, config.token, config.timeout_s) as client:
    yield client


def _saes(
  workdir: Workdir, layer: int, layers: tuple[int, ...], opts: EvaluateConfig
) -> list[_Named]:
  """The workdir's SAE, then the others that are for this layer.

  Raises:
    ValueError: there is none.
  """
  own = workdir.require(workdir.export(layer), 'train')
  found = [_Named(evaluation.OWN, lambda: exports.load(own))]
  for path in opts.others:
    folder = path.replace('{layer}', str(layer))
    if folder == path and len(layers) > 1:
      of = exports.load(folder).config.layer
      if of not in layers:
        raise ValueError(
          f'evaluate.others {path!r} is of layer {of}; lmm.layers has '
          f'{layers}: write {{layer}} in the path where there is one for each'
        )
      if of != layer:
        continue
    found.append(_Named(folder, lambda at=folder: exports.load(at, layer)))
  if len({sae.name for sae in found}) < len(found):
    raise ValueError(f'evaluate.others {opts.others} names an SAE twice')
  return found


def _check(
  store: ActivationStore,
  layer: int,
  saes: list[_Named],
  client: SubjectClient | None,
) -> None:
  """Refuses what does not fit together, before anything lasts.

  Raises:
    ValueError: an SAE cannot be read, is of another layer or width, or the
      server serves another one.
  """
  configs = [named.load().config for named in saes]
  for named in saes[1:]:
    said = layouts.find(layouts.locate(pathlib.Path(named.name), layer)[0])
    if said.config.layer not in (-1, layer):
      raise ValueError(
        f'evaluate.others {named.name!r} is of layer {said.config.layer}; here '
        f'it would read the rows of layer {layer}'
      )
  for named, sae in zip(saes, configs, strict=True):
    if store.meta.width != sae.width:
      raise ValueError(
        f'{store.path} holds rows of width {store.meta.width}; the SAE of '
        f'layer {layer}, {named.name}, reads {sae.width}: it is of another '
        'model'
      )
  if client is None:
    return
  own, info = configs[0], client.info()
  served = info['saes'].get(layer)
  wanted = {'latents': own.latents, 'k': own.most}
  if info['width'] != store.meta.width or served != wanted:
    raise ValueError(
      f'the server at {client.url} has width {info["width"]} and, of layer '
      f'{layer}, the SAE {served}; here they are {store.meta.width} and '
      f'{wanted}: start it again with this --config and --workdir'
    )


def _measure(
  store: ActivationStore,
  layer: int,
  saes: list[_Named],
  opts: EvaluateConfig,
  client: SubjectClient | None,
  seed: int,
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
  """An entry for each SAE, and which latents [M] of each fire.

  One SAE is in memory at a time: two of 131,072 latents may not fit.
  """
  pieces = chosen(store.ranges, opts.rows)
  rows = Rows(store.meta.width)
  for x_ND, kind_N in read(store, layer, pieces, 'evaluate: means'):
    rows.add(x_ND, kind_N)
  loop, base = None, []
  if client is not None and opts.samples:
    mean_D = rows.of(*opts.kinds).mean_D
    loop = Loop(
      *(client, store, layer, opts.samples),
      *(opts.kinds, mean_D, opts.batch),
    )
    base = loop.served()
  entries, alive = [], []
  for named in saes:
    sae = named.load()
    quality = measure(store, layer, sae, rows, pieces)
    losses, variants = base, recovered.VARIANTS
    if loop is not None and named.name != evaluation.OWN:
      losses, variants = _instead(
        base, loop.given(lambda x_ND, sae=sae: sae.decode(sae.encode(x_ND)))
      )
    entries.append(
      {
        'name': named.name,
        'latents': sae.config.latents,
        'k': sae.config.k,
        'activation': sae.config.activation,
        'kinds': quality.table(),
        'loss': _loss(loop, losses, variants, opts, seed),
      }
    )
    alive.append(quality.fired('all') > 0)
  return entries, alive


def _instead(base, given):
  """The losses of another SAE, the ablations those of the first pass."""
  variants = ('sae', 'clean', 'zero', 'mean')
  at = [recovered.VARIANTS.index(name) for name in variants[1:]]
  losses = [
    recovered.Loss(
      np.concatenate([own.ce_RT, one.ce_RT[at]]),
      np.concatenate([own.kl_RT, one.kl_RT[at]]),
    )
    for own, one in zip(given, base, strict=True)
  ]
  return losses, variants


def _loss(loop: Loop | None, losses, variants, opts, seed) -> dict[str, Any]:
  if loop is None:
    reason = NO_SERVER if opts.samples else 'evaluate.samples is 0'
    return {'reason': reason, 'samples': 0, 'skipped': 0, 'kinds': {}}
  reason = ''
  if not loop.samples:
    reason = f'the split {opts.split} keeps no image that its samples look at'
  return {
    'reason': reason,
    'samples': len(loop.samples),
    'skipped': loop.skipped,
    'kinds': recovered.table(
      loop.kinds_T, losses, variants, seed, opts.bootstrap
    ),
  }


def measure(
  store: ActivationStore,
  layer: int,
  sae: Sae,
  rows: Rows,
  pieces: list[tuple[int, int]],
) -> Quality:
  """What the SAE makes of the pieces that `rows` has seen."""
  quality = Quality(sae.config.latents, rows)
  for x_ND, kind_N in read(store, layer, pieces, 'evaluate: pieces'):
    code = sae.encode(x_ND)
    quality.add(x_ND, sae.decode(code), code, kind_N)
  return quality


def read(
  store: ActivationStore,
  layer: int,
  pieces: list[tuple[int, int]],
  what: str,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Rows in float32 and their kinds, piece by piece."""
  for start, stop in progress.track(pieces, what=what):
    kind_N = store.tokens(start, stop, names=('kind',))['kind']
    yield store.read(layer, start, stop).astype(np.float32), kind_N


def chosen(ranges: list[tuple[int, int]], rows: int) -> list[tuple[int, int]]:
  """Pieces of the ranges, evenly spread, of `rows` rows in all; 0: all."""
  pieces = [
    (at, min(at + READ_ROWS, stop))
    for start, stop in ranges
    for at in range(start, stop, READ_ROWS)
  ]
  total = sum(stop - start for start, stop in pieces)
  if not rows or rows >= total:
    return pieces
  count = -(-rows * len(pieces) // total)
  at = np.linspace(0, len(pieces) - 1, count).round().astype(int)
  return [pieces[i] for i in dict.fromkeys(at.tolist())]


def _pairs(
  saes: list[_Named], alive: list[np.ndarray], seed: int
) -> Iterator[dict[str, Any]]:
  """How alike each two are: of the latents that fire here, and of all."""
  for i, j in itertools.combinations(range(len(saes)), 2):
    a_MD, b_MD = (saes[at].load().w_dec_MD for at in (i, j))
    yield {
      'saes': [saes[i].name, saes[j].name],
      'alive': matching.stability(a_MD[alive[i]], b_MD[alive[j]], seed),
      'all': matching.stability(a_MD, b_MD, seed),
    }
