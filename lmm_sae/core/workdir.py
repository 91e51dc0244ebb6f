"""Where each stage's output stands in a workdir, and who makes it."""

import dataclasses
import pathlib
from typing import TypeVar

from lmm_sae.core.places import Place

P = TypeVar('P', pathlib.Path, Place)


@dataclasses.dataclass(frozen=True)
class Workdir:
  """Paths of one run.

  The store alone may stand elsewhere, shared with other runs or in a bucket.
  """

  root: pathlib.Path
  acts_root: Place

  @classmethod
  def of(cls, workdir: str | pathlib.Path, acts: str = '') -> 'Workdir':
    root = pathlib.Path(workdir).absolute()
    return cls(root, Place.of(acts or root / 'acts'))

  def acts(self, split: str) -> Place:
    return self.acts_root / split

  def sae(self, layer: int) -> pathlib.Path:
    return self.root / 'sae' / str(layer)

  def export(self, layer: int) -> pathlib.Path:
    return self.sae(layer) / 'export'

  def index(self, layer: int, split: str, dictionary: str = '') -> pathlib.Path:
    """The index of the SAE, or of one of `records.DICTIONARIES`."""
    return self.root / 'index' / str(layer) / dictionary / split

  def file(self, name: str) -> pathlib.Path:
    return self.root / name

  def require(self, path: P, stage: str) -> P:
    """The path, which must exist; a store does once its meta.json does.

    Raises:
      ValueError: it does not; the message names the stage that makes it.
    """
    file = path / 'meta.json' if isinstance(path, Place) else path
    if not file.exists():
      if isinstance(file, Place):
        file.check_bucket()
      raise ValueError(
        f'{path} is missing: run `lmm-sae {stage}` with this workdir first'
      )
    return path
