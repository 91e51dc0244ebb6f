"""Activations on the base view of single images, encoded when asked for.

Of a sample with several images, the first one's: a map is of one picture.
"""

import functools

import numpy as np

from lmm_sae.core import progress, truth
from lmm_sae.core.records import Sample
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.tokens import Kind
from lmm_sae.sae.exports import Sae
from lmm_sae.sae.model import SparseCode

KEPT = 4096  # samples whose codes are kept in memory


def check_one_grid(store: ActivationStore) -> None:
  """Refuses base views of images that differ in their rows and columns.

  Raises:
    ValueError: the grid depends on the image, and there are images.
  """
  if store.meta.grid == (0, 0) and any(each.width for each in store.samples()):
    raise ValueError(
      f'{store.path} is of a subject whose grid of patches depends on the '
      'image; maps are of one grid: capture with a LLaVA instead'
    )


class BaseView:
  """The base-view patches of one store's images under one SAE.

  Raises:
    ValueError: the images have grids of their own.
  """

  def __init__(self, store: ActivationStore, layer: int, sae: Sae):
    check_one_grid(store)
    self.store = store
    self.sae = sae
    self._layer = layer
    self._code = functools.lru_cache(KEPT)(self._encode)

  def residual(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Residuals of the patches, and the cell of the grid that each one is.

    Of the sample's first image. Cells count row by row.

    Raises:
      ValueError: the sample's rows are mixed, or not all there.
    """
    span = self.store.span(sample)
    tokens = self.store.tokens(*span, ('kind', 'image', 'row', 'col'))
    base = (tokens['kind'] == Kind.BASE) & (tokens['image'] == 0)
    cell = tokens['row'].astype(int) * self.store.meta.grid[1] + tokens['col']
    return self.store.read(self._layer, *span)[base], cell[base]

  def heat(self, sample: int, latent: int) -> np.ndarray:
    """The latent's activations on the grid, float32 [H, W]."""
    code, cell_P = self._code(sample)
    rows, cols = self.store.meta.grid
    heat_P = np.zeros(rows * cols, np.float32)
    fires_PK = code.idx_NK == latent
    heat_P[cell_P] = np.where(fires_PK, code.vals_NK, 0).max(axis=1)
    return heat_P.reshape(rows, cols)

  def half(self, vocabulary: truth.Vocabulary) -> truth.Half:
    """Every patch of every image, coded and labelled; the truth is known."""
    rows, covered = [], []
    for sample in progress.track(
      self.store.samples(), what=f'concepts on {self.store.meta.split}: samples'
    ):
      x_PD, cell_P = self.residual(sample)
      covered_PC = truth.coverage(
        self.store.regions(sample.sample),
        sample,
        vocabulary,
        self.store.meta.grid,
      )
      rows.append(x_PD)
      covered.append(covered_PC[cell_P])
    x_ND = np.concatenate(rows)
    code = self.sae.encode(x_ND)
    covered_NC = np.concatenate(covered)
    return truth.Half(x_ND, code.vals_NK, code.idx_NK, covered_NC)

  def _encode(self, sample: int) -> tuple[SparseCode, np.ndarray]:
    x_PD, cell_P = self.residual(self.store.sample(sample))
    return self.sae.encode(x_PD), cell_P
