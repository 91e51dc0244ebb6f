"""Where each stage's output stands in a workdir, and who makes it."""

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Workdir:
  """Paths of one run. `acts` may point at a store shared with other runs."""

  root: pathlib.Path
  acts_root: pathlib.Path

  @classmethod
  def of(cls, workdir: str | pathlib.Path, acts: str = '') -> 'Workdir':
    root = pathlib.Path(workdir).absolute()
    shared = pathlib.Path(acts).absolute() if acts else root / 'acts'
    return cls(root, shared)

  def acts(self, split: str) -> pathlib.Path:
    return self.acts_root / split

  def sae(self, layer: int) -> pathlib.Path:
    return self.root / 'sae' / str(layer)

  def export(self, layer: int) -> pathlib.Path:
    return self.sae(layer) / 'export'

  def index(self, layer: int, split: str) -> pathlib.Path:
    return self.root / 'index' / str(layer) / split

  def file(self, name: str) -> pathlib.Path:
    return self.root / name

  def require(self, path: pathlib.Path, stage: str) -> pathlib.Path:
    """The path, which must exist.

    Raises:
      ValueError: it does not; the message names the stage that makes it.
    """
    if not path.exists():
      raise ValueError(
        f'{path} is missing: run `lmm-sae {stage}` with this workdir first'
      )
    return path
