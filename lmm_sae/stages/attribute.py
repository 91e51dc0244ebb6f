"""Finds which latents caused an answer, and checks that by ablation.

For answers of half B, a few forwards and backwards price every latent at every
token for logit(answer) - logit(runner-up); see `core.causes`. The latents of
largest absolute price are taken out one by one, which gives the exact change:

  attributions.jsonl  one answer a line. effect: the price; exact: the margin
                      with the latent minus the margin without; both positive
                      where the latent pushed the answer
  eq.json             what causes the answers about emotions, see `core.eq`
  mistakes.json       wrong answers, mended by a rule, see `core.mistakes`

The last two need known answers; without, they say so. Latents that are always
on are flagged, not hidden.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from lmm_sae.core import (
  asking,
  causes,
  concepts,
  eq,
  mistakes,
  progress,
  records,
)
from lmm_sae.core.asking import Ask, Asker
from lmm_sae.core.causes import Priced
from lmm_sae.core.index import LatentIndex
from lmm_sae.core.records import Attribution, Effect, Sample, Turn
from lmm_sae.core.remote import NextToken, SubjectClient
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from lmm_sae.kernels import ops
from lmm_sae.sae import exports

STUDIES = ('emotion', 'colour')  # asked first, in equal parts, where known
PAD = 128  # rows are padded to a multiple, so that few shapes are compiled

_slopes = jax.jit(ops.sddmm)


@dataclasses.dataclass(frozen=True)
class AttributeConfig:
  """The fields of config.attribute; their meaning: experiments/base.py."""

  samples: int
  points: int
  top: int
  mistakes: int
  max_new_tokens: int
  batch: int

  def __post_init__(self):
    for name in ('samples', 'points', 'top', 'max_new_tokens', 'batch'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'attribute.{name} is {getattr(self, name)}, must be >= 1'
        )


def run(config: ml_collections.ConfigDict, workdir: Workdir) -> None:
  opts = AttributeConfig(**config.attribute)
  layers, seed, server = tuple(config.lmm.layers), config.seed, config.server
  stores = {
    half: ActivationStore.open(workdir.require(workdir.acts(half), 'capture'))
    for half in ('a', 'b')
  }
  with asking.connect(server.url, server.token, server.timeout_s) as client:
    for layer in layers:
      bench = Bench.of(workdir, layer, opts, client, stores)
      answers = attribute(bench, workdir)
      known = any(s.truth for s in stores['b'].samples())
      for name, study in (('eq', _eq), ('mistakes', _mistakes)):
        path = workdir.file(f'{name}.json')
        found = json.loads(path.read_text()) if path.exists() else {}
        if str(layer) in found:
          continue
        found['format_version'] = records.FORMAT_VERSION
        found[str(layer)] = (
          study(bench, answers, seed)
          if known
          else {'reason': 'the right answers are not known'}
        )
        records.write_json(path, found)


class Pricer:
  """Prices the subject's own answers at one layer.

  Args:
    client: of the subject server.
    sae: with `encode`, and the decoder's rows.
    points: of the path over which a price is the mean.
  """

  def __init__(self, client: SubjectClient, sae: Any, layer: int, points: int):
    self._client, self._points = client, points
    self._sae = sae
    self._w_dec_MD = jnp.asarray(sae.w_dec_MD)
    self._layer = layer

  def within(
    self, image: Image.Image | None, prompt: str, widest: float
  ) -> Priced | None:
    """The prices; None where the answer leads by more than `widest`."""
    top, second = self._client.next(image, prompt, top=2)[:2]
    if top.logit - second.logit > widest:
      return None
    return self._price(image, prompt, top, second)

  def __call__(self, image: Image.Image | None, prompt: str) -> Priced:
    """The prices for the subject's top token against the runner-up."""
    top, second = self._client.next(image, prompt, top=2)[:2]
    return self._price(image, prompt, top, second)

  def _price(
    self,
    image: Image.Image | None,
    prompt: str,
    top: NextToken,
    second: NextToken,
  ) -> Priced:
    tokens = (top.token, second.token)
    got = self._client.gradient(
      self._layer, image, prompt, *tokens, points=self._points
    )
    where_T = got['map'].where('all')
    effect_NK, idx_NK = self.effects(
      got['x_TD'][where_T], got['grad_TD'][where_T]
    )
    latents = len(self._w_dec_MD)
    price_T = np.zeros(len(where_T), np.float32)
    price_T[where_T] = effect_NK.sum(1)
    heat_HW, words = causes.spread(price_T, got['map'])
    return Priced(
      answer=top.text.strip(),
      baseline=second.text.strip(),
      tokens=tokens,
      margin=float(got['difference']),
      effect_KM=causes.table(
        effect_NK, idx_NK, got['kind_T'][where_T], latents
      ),
      heat_HW=heat_HW,
      words=words,
    )

  def effects(
    self, x_ND: np.ndarray, grad_ND: np.ndarray, /
  ) -> tuple[np.ndarray, np.ndarray]:
    """vals * <grad, W_dec[idx]> of each active latent: (effect_NK, idx_NK)."""
    rows = len(x_ND)
    more = ((0, -rows % PAD), (0, 0))
    code = self._sae.encode(np.pad(x_ND.astype(np.float32), more))
    slope_NK = _slopes(
      jnp.asarray(np.pad(grad_ND.astype(np.float32), more)),
      jnp.asarray(code.idx_NK),
      self._w_dec_MD,
    )
    effect_NK = np.asarray(code.vals_NK) * np.asarray(slope_NK)
    return effect_NK[:rows], np.asarray(code.idx_NK)[:rows]


@dataclasses.dataclass(frozen=True)
class Bench:
  """All that attributing one layer needs."""

  layer: int
  opts: AttributeConfig
  client: SubjectClient
  stores: dict[str, ActivationStore]
  askers: dict[str, Asker]
  index: LatentIndex  # of half B
  names: dict[int, str]
  pricer: Pricer

  @classmethod
  def of(
    cls,
    workdir: Workdir,
    layer: int,
    opts: AttributeConfig,
    client: SubjectClient,
    stores: dict[str, ActivationStore],
  ) -> 'Bench':
    index = LatentIndex.open(
      workdir.require(workdir.index(layer, 'b'), 'index')
    )
    export = workdir.require(workdir.export(layer), 'train')
    peaks_M = index.stats['peak_image']
    askers = {
      half: Asker(
        client, store, layer, peaks_M, opts.batch, opts.max_new_tokens
      )
      for half, store in stores.items()
    }
    pricer = Pricer(client, exports.load(export), layer, opts.points)
    names = _names(workdir, layer)
    return cls(layer, opts, client, stores, askers, index, names, pricer)

  def fired(self, sample: int) -> np.ndarray:
    return self.index.sample(sample)[0]


def attribute(bench: Bench, workdir: Workdir) -> list[tuple[Turn, Attribution]]:
  """Appends what is missing of the layer's attributions, and returns them all.

  Raises:
    ValueError: attributions.jsonl holds answers to other questions.
  """
  asked = questions(bench.stores['b'].samples(), bench.opts.samples)
  with records.Appender(workdir.file('attributions.jsonl')) as out:
    done = [
      records.from_json(Attribution, line)
      for line in out.existing
      if line['layer'] == bench.layer
    ]
    keys = [(sample, turn.question) for sample, turn in asked]
    if [(one.sample, one.prompt) for one in done] != keys[: len(done)]:
      raise ValueError(
        f'{out.path} was made with other settings: remove it, eq.json and '
        'mistakes.json to attribute again'
      )
    rest = asked[len(done) :]
    asks = [Ask(sample, turn.question) for sample, turn in asked]
    texts = bench.askers['b'].answers(asks)[len(done) :] if rest else []
    pairs = zip(rest, texts, strict=True)
    for (sample, turn), text in progress.track(pairs, len(rest), 'answers'):
      done.append(attributed(bench, sample, turn, text))
      out.add(done[-1])
  return [(turn, one) for (_, turn), one in zip(asked, done, strict=True)]


def attributed(bench: Bench, sample: int, turn: Turn, text: str) -> Attribution:
  """Prices one answer and re-checks its strongest latents by ablation."""
  image = bench.askers['b'].image(sample)
  priced = bench.pricer(image, turn.question)
  checked = priced.strongest(bench.opts.top)
  margins = exact(bench, image, turn.question, priced, checked)
  more = priced.pushers(max(eq.SIZES))  # what the EQ study ablates
  latents = sorted(
    {*checked, *more}, key=lambda m: (-abs(priced.effect_M[m]), m)
  )
  always_M = bench.index.stats['always_on']
  vocab = bench.stores['b'].vocab
  return Attribution(
    layer=bench.layer,
    sample=sample,
    answer=priced.answer,
    baseline=priced.baseline,
    latents=tuple(
      Effect(
        latent=m,
        effect=float(priced.effect_M[m]),
        exact=margins.get(m),
        kinds=priced.kinds(m),
        concept=bench.names.get(m, ''),
        always_on=bool(always_M[m]),
      )
      for m in latents
    ),
    prompt=turn.question,
    text=text,
    target=turn.target,
    correct=mistakes.right(text, turn) if turn.type else None,
    heat=tuple(map(tuple, priced.heat_HW.astype(float).round(4).tolist())),
    words=tuple(
      (vocab[token], round(float(x), 4)) for token, x in priced.words
    ),
  )


def exact(
  bench: Bench,
  image: Image.Image | None,
  prompt: str,
  priced: Priced,
  latents: Sequence[int],
) -> dict[int, float]:
  """The margin lost when each latent alone is ablated, by latent."""
  found: dict[int, float] = {}
  for start in range(0, len(latents), bench.opts.batch):
    part = latents[start : start + bench.opts.batch]
    sets = [causes.ablation([latent]) for latent in part]
    plain, *without = bench.client.difference(
      bench.layer, image, prompt, *priced.tokens, [(), *sets]
    )
    found |= {m: plain - w for m, w in zip(part, without, strict=True)}
  return found


def questions(samples: Sequence[Sample], count: int) -> list[tuple[int, Turn]]:
  """What is asked: emotions and colours in equal parts where such turns are.

  Else, and to fill up, the first question of each sample.
  """

  def asked(study: str) -> list[tuple[int, Turn]]:
    firsts = (
      (sample.sample, next((t for t in sample.turns if t.type == study), None))
      for sample in samples
      if sample.image
    )
    return [(sample, turn) for sample, turn in firsts if turn]

  found = [one for study in STUDIES for one in asked(study)[: count // 2]]
  for sample in samples:
    if sample.turns and (sample.sample, sample.turns[0]) not in found:
      found.append((sample.sample, sample.turns[0]))
  return found[:count]


def _eq(
  bench: Bench, answers: Sequence[tuple[Turn, Attribution]], seed: int
) -> dict[str, Any]:
  felt = [answer for turn, answer in answers if turn.type == 'emotion']
  return eq.study(felt, bench.names, bench.askers['b'], bench.fired, seed)


def _mistakes(
  bench: Bench, answers: Sequence[tuple[Turn, Attribution]], seed: int
) -> dict[str, Any]:
  del answers
  if not bench.opts.mistakes:
    return {'reason': 'attribute.mistakes is 0'}
  samples = {half: store.samples() for half, store in bench.stores.items()}

  def price(half: str, sample: int, prompt: str, widest: float):
    return bench.pricer.within(bench.askers[half].image(sample), prompt, widest)

  return mistakes.study(
    samples, bench.askers, price, bench.fired, bench.opts.mistakes, seed
  )


def _names(workdir: Workdir, layer: int) -> dict[int, str]:
  """Latent -> concept; where no truth is known, the first explainer's label."""
  table = concepts.load(workdir, layer)
  if table:
    return concepts.names(table)
  labels: dict[int, str] = {}
  for one in records.read(
    records.Explanation, workdir.file('explanations.jsonl')
  ):
    about = one.layer, one.outcome, one.dictionary
    if about == (layer, 'explained', ''):
      labels.setdefault(one.latent, one.label)
  return labels
