"""What each latent did to one answer, and how such a price is made.

An answer is won by the logit of its first token over the runner-up's. Removing
latent j from token t changes that margin by some z[t, j] * <grad[t], W_dec[j]>,
where grad is the mean over a few points of the path on which all latents come
in (one point: the first order alone). So a few forwards and backwards price
every latent at every token. Positive: the latent pushed the answer.
"""

import dataclasses

import numpy as np

from lmm_sae.core.records import Edit
from lmm_sae.core.tokens import Kind, TokenMap


@dataclasses.dataclass(frozen=True)
class Priced:
  """The price of every latent for one answer.

  Attributes:
    answer, baseline: the model's top token and the runner-up, as text.
    tokens: their ids.
    margin: logit(answer) - logit(baseline).
    effect_KM: float32, summed over the tokens of each kind, by `Kind`.
    heat_HW: summed over latents, by patch of the base view; empty without one.
    words: (token id, sum over latents) of the question's tokens.
  """

  answer: str
  baseline: str
  tokens: tuple[int, int]
  margin: float
  effect_KM: np.ndarray
  heat_HW: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros((0, 0), np.float32)
  )
  words: tuple[tuple[int, float], ...] = ()

  @property
  def effect_M(self) -> np.ndarray:
    return self.effect_KM.sum(0)

  def kinds(self, latent: int) -> dict[str, float]:
    """The latent's effect by token kind; kinds without effect are left out."""
    return {
      kind.name.lower(): float(self.effect_KM[kind, latent])
      for kind in Kind
      if self.effect_KM[kind, latent]
    }

  def strongest(self, n: int) -> list[int]:
    """The n latents of largest absolute effect, largest first."""
    return _first(np.abs(self.effect_M), n)

  def pushers(self, n: int) -> list[int]:
    """The n latents that pushed the answer most, largest first."""
    return _first(self.effect_M, n)


def table(
  effect_TK: np.ndarray,
  idx_TK: np.ndarray,
  kind_T: np.ndarray,
  latents: int,
) -> np.ndarray:
  """Effects summed by token kind and latent, float32 [kinds, M]."""
  summed_KM = np.zeros((len(Kind), latents), np.float32)
  np.add.at(summed_KM, (kind_T[:, None].astype(int), idx_TK), effect_TK)
  return summed_KM


def spread(
  price_T: np.ndarray, tokens: TokenMap
) -> tuple[np.ndarray, tuple[tuple[int, float], ...]]:
  """Prices of tokens as (heat_HW of the base view, words of the question)."""
  base_T = tokens.kind_T == Kind.BASE
  heat_HW = np.zeros(tokens.grid if base_T.any() else (0, 0), np.float32)
  heat_HW[tokens.row_T[base_T], tokens.col_T[base_T]] = price_T[base_T]
  asked_T = tokens.kind_T == Kind.QUESTION
  ids, prices = tokens.token_T[asked_T], price_T[asked_T]
  return heat_HW, tuple(zip(ids.tolist(), prices.tolist(), strict=True))


def ablation(latents: list[int]) -> tuple[Edit, ...]:
  """The edits that take latents out of the prompt; all else is kept."""
  return tuple(
    Edit(latent, mode='ablate', where='all', when='prompt', keep_error=True)
    for latent in latents
  )


def _first(value_M: np.ndarray, n: int) -> list[int]:
  """The n largest values above zero; the lower index of equals first."""
  order = np.argsort(-value_M, kind='stable')[:n]
  return [int(latent) for latent in order if value_M[latent] > 0]
