"""Puts many questions about a store's images to the subject server, in batches.

asker = Asker(client, store, layer, peaks_M, batch=64, max_new_tokens=8)
texts = asker.answers([Ask(12, 'how does the face feel?', (edit,))])
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from lmm_sae.core.records import Edit
from lmm_sae.core.remote import GenerateRow, SubjectClient
from lmm_sae.core.store import ActivationStore


@dataclasses.dataclass(frozen=True)
class Ask:
  """One answer that is wanted.

  Attributes:
    sample: of the store, its image with it where it has one; -1: no image.
    edits: (): the plain model.
    sae: without edits: the SAE's reconstruction takes the residual's place at
      the tokens `where`, in the phase `when`.
  """

  sample: int
  prompt: str
  edits: tuple[Edit, ...] = ()
  sae: bool = False
  where: str = 'all'
  when: str = 'prompt'


def connect(url: str, token: str, timeout_s: float) -> SubjectClient:
  """A client of the server that config.server names.

  Raises:
    ValueError: no server is named.
  """
  if not url:
    raise ValueError(
      'server.url is empty: start `lmm-sae serve` with the same --config and '
      '--workdir and give its URL as --config.server.url, or run `lmm-sae '
      'all`, which starts one'
    )
  return SubjectClient(url, token, timeout_s)


class Asker:
  """Asks about the images of one store, at one layer.

  Args:
    peaks_M: what edits of unit `peak` count in.
    batch: rows of one request. The server shares work between rows of one image
      and prompt, so such rows should stand together.
  """

  def __init__(
    self,
    client: SubjectClient,
    store: ActivationStore,
    layer: int,
    peaks_M: np.ndarray,
    batch: int,
    max_new_tokens: int,
  ):
    self.client = client
    self.layer = layer
    self.batch = batch
    self._peaks = {layer: peaks_M}
    self._max_new_tokens = max_new_tokens
    self._store = store
    self._load = functools.lru_cache(maxsize=64)(store.image)

  def image(self, sample: int) -> Image.Image | None:
    """The image that is asked about; None without one."""
    known = sample >= 0 and self._store.sample(sample).image
    return self._load(sample) if known else None

  def answers(self, asks: Sequence[Ask]) -> list[str]:
    """The answers, greedy, in order."""
    return [text for part in self.batches(asks) for text in self.ask(part)]

  def batches(self, asks: Sequence[Ask]) -> Iterator[Sequence[Ask]]:
    for start in range(0, len(asks), self.batch):
      yield asks[start : start + self.batch]

  def ask(self, asks: Sequence[Ask]) -> list[str]:
    """The answers of one request."""
    pictures = {a.sample: self.image(a.sample) for a in asks}
    images = {s: image for s, image in pictures.items() if image is not None}
    place = {sample: i for i, sample in enumerate(images)}
    rows = [
      GenerateRow(
        place.get(a.sample),
        a.prompt,
        a.edits,
        self.layer,
        a.sae,
        a.where,
        a.when,
      )
      for a in asks
    ]
    texts = self.client.generate(
      rows, list(images.values()), self._max_new_tokens, peaks=self._peaks
    )
    return [text.strip() for text in texts]
