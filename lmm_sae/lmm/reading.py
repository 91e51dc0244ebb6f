"""Samples of a split, read and tokenised: what a group is made of."""

import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from lmm_sae.core import records, wording
from lmm_sae.core.choice import Choice
from lmm_sae.core.records import Picture
from lmm_sae.core.sources import IMAGE, Item, Split
from lmm_sae.core.tokens import TokenMap
from lmm_sae.core.workers import RefusedError, StoppedError
from lmm_sae.lmm.llava import Subject

# Pictures of a group that wait for their batch, decoded; those beyond are read
# a second time.
WAITING_BYTES = 2**30

Save = Callable[[str, bytes], None]  # keeps a file of that name


@dataclasses.dataclass(frozen=True, eq=False)
class Ready:
  """A sample ready for the model.

  Attributes:
    row: of the source. record: `start` and `stop` are still to come.
    keep_N: positions that are stored.
    images: emptied once the model has them.
    waits: whether `images` holds them; else they are read again.
  """

  row: int
  record: records.Sample
  tokens: TokenMap
  keep_N: np.ndarray
  images: list[Image.Image]
  waits: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
  """Reads samples of one split.

  Attributes:
    choice: which tokens are stored; seed: of their draw.
    template: chat, or raw: the turns alone.
    save: keeps images that no file outside holds, and the truth; None: neither
      is kept.
    max_tokens: a longer sample is rejected.
  """

  subject: Subject
  split: Split
  choice: Choice
  seed: int
  template: str
  save: Save | None
  max_tokens: int

  def read(
    self, samples: Sequence[int], stopped: Callable[[], bool]
  ) -> tuple[list[Ready], list[dict[str, str]]]:
    """The samples, in order, and those that cannot be captured."""
    ready, rejects, waiting = [], [], 0
    for sample in samples:
      if stopped():
        raise StoppedError
      row = self.split.rows[sample]
      try:
        item = self.split.source[row]
        size = sum(3 * i.width * i.height for i in pictures(item))
        fits = waiting + size <= WAITING_BYTES
        ready.append(self._ready(item, sample, row, fits))
        waiting += size if fits else 0
      except ValueError as error:  # the reason why this row cannot be had
        name = self.split.source.name(row)
        logging.debug('capture: %s is rejected: %s', name, error)
        rejects.append({'source': name, 'reason': str(error)})
      except OSError as error:  # no fault of the row
        raise RefusedError(
          f'{self.split.source.name(row)} cannot be read now, which ends the '
          f'capture: {wording.of(error)}. Run it again, it does the rest'
        ) from error
    return ready, rejects

  def _ready(self, item: Item, sample: int, row: int, waits: bool) -> Ready:
    images = pictures(item)
    if not item.conversation:
      prompt = self.subject.bare(IMAGE * len(images))
    elif item.raw or self.template == 'raw':
      prompt = self.subject.raw(item.conversation, len(images))
    else:
      prompt = self.subject.conversation(item.conversation, len(images))
    tokens = self.subject.encode(prompt, images)
    count = len(tokens.token_T)
    limit = min(self.max_tokens, self.subject.max_tokens)
    if count > limit:
      raise ValueError(
        f'{count} tokens, and at most {limit} are taken: see capture.max_tokens'
      )
    files = [Picture(each.path, *each.image.size) for each in item.images]
    truth = None
    if self.save is not None:
      files, truth = _keep(self.save, item, sample)
    first = files[0] if files else Picture('', 0, 0)
    record = records.Sample(
      sample=sample,
      group=-1,
      source=item.source,
      image=first.file,
      width=first.width,
      height=first.height,
      prompt=str(prompt),
      turns=item.turns,
      start=-1,
      stop=-1,
      truth=truth,
      tokens=count,
      grid=tokens.grid,
      more=tuple(files[1:]),
    )
    keep_N = self.choice.keep(self.seed, self.split.name, sample, tokens.kind_T)
    return Ready(row, record, tokens, keep_N, images if waits else [], waits)


def pictures(item: Item) -> list[Image.Image]:
  """The item's images, decoded."""
  return [each.image for each in item.images]


def _keep(
  save: Save, item: Item, sample: int
) -> tuple[list[Picture], dict[str, Any] | None]:
  """Keeps what no file outside holds: (the images, truth)."""
  files, truth = [], None
  for number, each in enumerate(item.images):
    name = each.path
    if not name:
      name = f'images/{sample:06d}{f".{number}" if number else ""}.png'
      save(name, _png(each.image))
    files.append(Picture(name, *each.image.size))
  if item.regions_HW is not None:
    regions = f'images/{sample:06d}.regions.png'
    save(regions, _png(Image.fromarray(item.regions_HW)))
    truth = {'regions': regions, 'concepts': item.concepts}
  return files, truth


def _png(image: Image.Image) -> bytes:
  file = io.BytesIO()
  image.save(file, 'png', compress_level=1)
  return file.getvalue()
