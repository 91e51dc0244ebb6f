"""Checkpoints of a run, sae/<layer>/<step>/; no other module knows orbax.

The TrainState is orbax's; beside it, as JSON, stand the run's settings and the
data position.
"""

import dataclasses
import logging
import os
import pathlib
from typing import Any

import jax
from absl import logging as absl_logging
from orbax.checkpoint import v1 as ocp

from lmm_sae.sae import trainer
from lmm_sae.sae.model import SaeConfig
from lmm_sae.sae.trainer import TrainState

FORMAT_VERSION = 3  # 2 had no thresholds


def _heard(record: logging.LogRecord) -> bool:
  """Whether a log line is for people: orbax writes 20 a checkpoint."""
  noisy = '/orbax/' in record.pathname or '/jax/' in record.pathname
  return record.levelno >= logging.WARNING or not noisy


absl_logging.get_absl_logger().addFilter(_heard)


@dataclasses.dataclass(frozen=True)
class Note:
  """What a checkpoint says beside its arrays.

  Attributes:
    step: optimiser steps done.
    settings: what the run was started with; a resumed run must have the same.
    data: state of the batch iterator.
  """

  step: int
  settings: dict[str, Any]
  data: Any


class Checkpoints:
  """The checkpoints under sae/<layer>/, a context manager.

  A save is whole or absent: orbax writes into a temporary folder and renames
  it. Only one process at a time may open them with `keep`.

  Args:
    path: sae/<layer>.
    keep: checkpoints that stay; then what a killed save left behind is removed
      too, before the next save at the latest. None to read alone.
  """

  def __init__(self, path: str | os.PathLike, keep: int | None = None):
    policies = ocp.training.preservation_policies
    self.path = pathlib.Path(path)
    self._checkpointer = ocp.training.Checkpointer(
      self.path,
      preservation_policy=None if keep is None else policies.LatestN(keep),
      cleanup_tmp_directories=keep is not None,
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_) -> None:
    self._checkpointer.close()

  @property
  def latest(self) -> int | None:
    """The step of the last checkpoint."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def note(self, step: int) -> Note:
    """What the checkpoint of that step says.

    Raises:
      ValueError: its format is not known.
    """
    found = dict(self._checkpointer.metadata(step).custom_metadata or {})
    version = found.pop('format_version', None)
    check_version(self.path / str(step), version, FORMAT_VERSION)
    return Note(step=step, **found)

  def save(self, state: TrainState, note: Note) -> None:
    """Writes a checkpoint and returns when it is on disk."""
    self._checkpointer.save(
      note.step,
      state,
      force=True,
      custom_metadata={
        'format_version': FORMAT_VERSION,
        'settings': note.settings,
        'data': note.data,
      },
    )

  def restore(
    self,
    config: SaeConfig,
    step: int,
    shardings: TrainState | None = None,
  ) -> TrainState:
    """The state of that step, on one device or as a tree of shardings says."""
    shapes = trainer.shapes(config)
    if shardings is None:
      one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      shardings = jax.tree.map(lambda _: one, shapes)

    def leaf(x, sharding):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return self._checkpointer.load(step, jax.tree.map(leaf, shapes, shardings))


def steps(path: str | os.PathLike) -> list[int]:
  """The steps that have a checkpoint under sae/<layer>/, ascending."""
  path = pathlib.Path(path)
  if not path.is_dir():
    return []
  return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit())


def shapes(path: str | os.PathLike, step: int) -> dict[str, Any]:
  """{name: array metadata with shape and dtype} of a checkpoint."""
  tree = ocp.metadata(pathlib.Path(path) / str(step)).metadata
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(at, simple=True, separator='.'): leaf
    for at, leaf in leaves
  }


def check_version(path: pathlib.Path, version: Any, known: int) -> None:
  """Refuses a format that this program does not know."""
  if version != known:
    raise ValueError(
      f'{path} has format_version {version}; this program reads {known}'
    )
