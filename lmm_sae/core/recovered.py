"""How much of the model's predictions an SAE keeps, beside two ablations.

The model reads captured conversations while the SAE's reconstruction, nothing,
or the mean row stands in for the residual; the subject server does that
(`SubjectClient.loss`). What a prediction loses is counted under the kind of the
token that is predicted.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lmm_sae.core import progress, stats, tokens
from lmm_sae.core.records import Sample
from lmm_sae.core.remote import Loss, SubjectClient, Text
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.tokens import IMAGE, TEXT, Kind

VARIANTS = ('clean', 'sae', 'error', 'zero', 'mean')
ABLATIONS = ('zero', 'mean')
NAMES = (*(kind.name.lower() for kind in TEXT + IMAGE), 'text', 'image', 'all')
NO_TEXT = 'no text token is predicted here: those of images are placeholders'
NO_ROOM = 'the ablation does not make the predictions worse'


class Loop:
  """Samples of a store that are read again with an SAE in the loop.

  Args:
    count: samples at most, spread evenly over the store; those whose image is
      not kept are left out, and counted in `skipped`.
    kinds: tokens whose residual is replaced.
    mean_D: the row of mean ablation.
    batch: samples of one request.
  """

  def __init__(
    self,
    client: SubjectClient,
    store: ActivationStore,
    layer: int,
    count: int,
    kinds: Sequence[str],
    mean_D: np.ndarray,
    batch: int,
  ):
    self._client, self._store, self.layer = client, store, layer
    self._kinds, self._mean_D, self._batch = tuple(kinds), mean_D, batch
    found = spread([s for s in store.samples() if _length(store, s) > 1], count)
    self.samples = [s for s in found if _has_image(store, s)]
    self.skipped = len(found) - len(self.samples)

  @functools.cached_property
  def kinds_T(self) -> list[np.ndarray]:
    """The kinds of the tokens that are predicted, of each sample."""
    return [self._tokens(sample)['kind'][1:] for sample in self.samples]

  def served(self) -> list[Loss]:
    """The losses of each sample, rows VARIANTS, with the server's own SAE."""
    return self._ask(VARIANTS, lambda sample: ())

  def given(self, rebuild: Callable[[np.ndarray], np.ndarray]) -> list[Loss]:
    """One row: with `rebuild` of the stored rows in the residual's place."""

    def rows(sample: Sample) -> tuple[np.ndarray]:
      x_TD = self._store.read(self.layer, *self._store.span(sample))
      return (rebuild(x_TD.astype(np.float32)).astype(np.float32),)

    return self._ask((), rows)

  def _ask(self, variants, given) -> list[Loss]:
    found: list[Loss] = []
    pieces = range(0, len(self.samples), self._batch)
    for start in progress.track(pieces, what='evaluate: batches of samples'):
      texts = [
        self._text(sample, given(sample))
        for sample in self.samples[start : start + self._batch]
      ]
      found += self._client.loss(
        self.layer, texts, variants, self._kinds, self._mean_D
      )
    return found

  def _tokens(self, sample: Sample) -> dict[str, np.ndarray]:
    return self._store.tokens(*self._store.span(sample), ('token', 'kind'))

  def _text(self, sample: Sample, given: tuple[np.ndarray, ...]) -> Text:
    arrays = self._tokens(sample)
    image = self._store.image(sample.sample) if sample.image else None
    return Text(arrays['token'], arrays['kind'], image, given)


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
  """`count` of them at most, evenly spread."""
  at = np.linspace(0, len(samples) - 1, min(count, len(samples)))
  return [samples[i] for i in at.round().astype(int)]


def _length(store: ActivationStore, sample: Sample) -> int:
  start, stop = store.span(sample)
  return stop - start


def _has_image(store: ActivationStore, sample: Sample) -> bool:
  """Whether what the sample's tokens look at can be had."""
  if sample.image:
    try:
      store.image(sample.sample)
    except (ValueError, OSError):  # it was moved away since
      return False
    return True
  kind_T = store.tokens(*store.span(sample), ('kind',))['kind']
  return not np.isin(kind_T, [int(kind) for kind in IMAGE]).any()


def table(
  kinds: Sequence[np.ndarray],
  losses: Sequence[Loss],
  variants: Sequence[str],
  seed: int,
  resamples: int,
) -> dict[str, dict[str, Any]]:
  """{kind of the predicted token: figures}.

  tokens: that are predicted.
  ce: {variant: mean cross-entropy of the text among them, in nats}; None where
    there is none. What stands at an image's tokens is a placeholder, so `all`
    has the cross-entropy of `text`.
  kl: {variant: mean KL(clean, variant)}, over all of them.
  ce_recovered: {ablation: (CE_ablation - CE_sae) / (CE_ablation - CE_clean)};
    `ce_loss_score` of SAELens, `frac_recovered` of dictionary_learning, whose
    ablation is zero.
  kl_recovered: {ablation: 1 - KL_sae / KL_ablation}; `kl_div_score` of SAELens.

  The last two are figures as in `core.stats`: whole samples are resampled, and
  n counts samples.

  Raises:
    ValueError: a loss is not finite.
  """
  rows = {}
  for name in NAMES:
    wanted = tokens.kinds(name)
    ce_SC = _sums(kinds, [loss.ce_RT for loss in losses], wanted, TEXT)
    kl_SC = _sums(kinds, [loss.kl_RT for loss in losses], wanted, tuple(Kind))
    if not len(kl_SC):
      continue
    for sums_SC in (ce_SC, kl_SC):
      _check_finite(sums_SC, variants)
    rows[name] = {
      'tokens': int(kl_SC[:, -1].sum()),
      'ce': _means(ce_SC, variants),
      'kl': _means(kl_SC, variants),
      'ce_recovered': {
        ablation: stats.pooled_figure(
          _columns(ce_SC, variants, (ablation, 'sae', 'clean')),
          _ce_share,
          NO_ROOM if len(ce_SC) else NO_TEXT,
          seed,
          resamples,
        )
        for ablation in ABLATIONS
      },
      'kl_recovered': {
        ablation: stats.pooled_figure(
          _columns(kl_SC, variants, (ablation, 'sae')),
          _kl_share,
          NO_ROOM,
          seed,
          resamples,
        )
        for ablation in ABLATIONS
      },
    }
  return rows


def _ce_share(sums_R3: np.ndarray) -> np.ndarray:
  ablated_R, sae_R, clean_R = sums_R3.T
  gap_R = np.where(ablated_R > clean_R, ablated_R - clean_R, np.nan)
  return (ablated_R - sae_R) / gap_R


def _kl_share(sums_R2: np.ndarray) -> np.ndarray:
  ablated_R, sae_R = sums_R2.T
  return 1 - sae_R / np.where(ablated_R > 0, ablated_R, np.nan)


def _sums(
  kinds: Sequence[np.ndarray],
  values: Sequence[np.ndarray],
  wanted: Sequence[Kind],
  defined: Sequence[Kind],
) -> np.ndarray:
  """Sums [S, variants + 1] over the wanted tokens; their count comes last.

  Samples without such tokens are left out.
  """

  def rows() -> Iterator[np.ndarray]:
    for kind_T, value_RT in zip(kinds, values, strict=True):
      of_T = np.isin(kind_T, [int(k) for k in wanted if k in defined])
      if of_T.any():
        sum_R = value_RT[:, of_T].astype(np.float64).sum(1)
        yield np.append(sum_R, of_T.sum())

  found = list(rows())
  width = (len(values[0]) if values else 0) + 1
  return np.array(found).reshape(len(found), width)


def _columns(sums_SC, variants, names) -> np.ndarray:
  return sums_SC[:, [list(variants).index(name) for name in names]]


def _means(sums_SC, variants) -> dict[str, float] | None:
  if not len(sums_SC):
    return None
  total_C = sums_SC.sum(0)
  mean_C = total_C[:-1] / total_C[-1]
  return dict(zip(variants, mean_C.tolist(), strict=True))


def _check_finite(sums_SC, variants) -> None:
  bad = np.flatnonzero(~np.isfinite(sums_SC[:, :-1]).all(0))
  if len(bad):
    raise ValueError(
      f'the loss of the model with `{list(variants)[bad[0]]}` in the loop is '
      'not finite: the SAE or the model overflows'
    )
