"""Checkpoints of a run, sae/<layer>/<step>/; no other module imports orbax.

Under `state` lies the TrainState, under `data` the place in the rows at which
each share goes on, both as orbax writes them, split over processes; the run's
settings are JSON beside them.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from absl import logging as absl_logging
from orbax.checkpoint import v1 as ocp

from lmm_sae.sae import orbax_files, trainer
from lmm_sae.sae.model import SaeConfig
from lmm_sae.sae.trainer import TrainState

if TYPE_CHECKING:
  from lmm_sae.sae import exports, layouts

FORMAT_VERSION = 4  # 3 had the place in the rows in another form
STATE, DATA, PLACES = 'state', 'data', 'places_S2'  # what a checkpoint holds


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
    fvu: the mean over the steps since the checkpoint before; None where no
      step was finite.
  """

  step: int
  settings: dict[str, Any]
  fvu: float | None = None


class Checkpoints:
  """The checkpoints under sae/<layer>/, a context manager.

  A save is whole or absent: orbax writes into a temporary folder and renames
  it. Only one run at a time may open them with `keep`, all its processes at
  once.

  Args:
    path: sae/<layer>.
    keep: checkpoints that stay; then what a killed save left behind is removed
      too, before the next save at the latest. None to read alone.
    keep_best: checkpoints of the lowest FVU that stay beside them.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    keep: int | None = None,
    keep_best: int = 0,
  ):
    self.path = pathlib.Path(path)
    for torn in sorted(self.path.glob(f'*{orbax_files.TORN}*')):
      absl_logging.warning('%s is left out: a save that was killed', torn)
    self._checkpointer = ocp.training.Checkpointer(
      self.path,
      preservation_policy=None if keep is None else _kept(keep, keep_best),
      cleanup_tmp_directories=keep is not None,
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind, *_) -> None:
    # A save of several processes may wait for one that is gone.
    if kind is None or jax.process_count() == 1:
      self._checkpointer.close()

  @property
  def latest(self) -> int | None:
    """The step of the last checkpoint."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def note(self, step: int) -> Note:
    """What the checkpoint of that step says.

    Raises:
      ValueError: it is damaged, or its format is not known.
    """
    with self._whole(step):
      orbax_files.read(self.path / str(step))  # says what is cut in one line
      found = self._checkpointer.metadata(step)
      said = dict(found.custom_metadata or {})
    if not said:
      raise ValueError(self._damaged(step, 'it lacks its settings'))
    version = said.pop('format_version', None)
    check_version(self.path / str(step), version, FORMAT_VERSION)
    return Note(step=step, fvu=(found.metrics or {}).get('fvu'), **said)

  def save(self, state: TrainState, note: Note, places_S2: jax.Array) -> None:
    """Begins to write a checkpoint; waits only for the one before.

    The state may be given away at once: it is copied first.

    Args:
      state: of the run.
      note: says which step it is.
      places_S2: where the rows go on, see `data.batches`.
    """
    self._checkpointer.save_checkpointables_async(
      note.step,
      {STATE: state, DATA: {PLACES: places_S2}},
      force=True,
      metrics=None if note.fvu is None else {'fvu': note.fvu},
      custom_metadata={
        'format_version': FORMAT_VERSION,
        'settings': note.settings,
      },
    )

  def wait(self) -> None:
    """Returns when what was saved is on disk."""
    self._checkpointer.wait()

  def restore(
    self,
    config: SaeConfig,
    step: int,
    shardings: TrainState | None = None,
  ) -> TrainState:
    """The state of that step, on one device or as a tree of shardings says.

    Raises:
      ValueError: it is damaged.
    """
    shapes = trainer.shapes(config)
    if shardings is None:
      one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      shardings = jax.tree.map(lambda _: one, shapes)

    def leaf(x, sharding):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    with self._whole(step):
      return self._checkpointer.load(
        step,
        jax.tree.map(leaf, shapes, shardings),
        checkpointable_name=STATE,
      )

  def places(
    self, step: int, shares: int, sharding: jax.sharding.Sharding
  ) -> jax.Array:
    """Where the rows go on after that step, int32 [S, 2].

    Raises:
      ValueError: it is damaged.
    """
    leaf = jax.ShapeDtypeStruct((shares, 2), jnp.int32, sharding=sharding)
    with self._whole(step):
      return self._checkpointer.load(
        step, {PLACES: leaf}, checkpointable_name=DATA
      )[PLACES]

  @contextlib.contextmanager
  def _whole(self, step: int):
    try:
      yield
    except (ValueError, OSError, KeyError) as error:
      raise ValueError(self._damaged(step, error)) from error

  def _damaged(self, step: int, why: Any) -> str:
    before = [at for at in steps(self.path) if at < step]
    then = f'on from step {before[-1]}' if before else 'from the start'
    return (
      f'the checkpoint {self.path / str(step)} is damaged ({why}): move it '
      f'away, and the same command goes {then}'
    )


def load(
  path_or_repo: str | os.PathLike,
  layer: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> 'exports.Sae':
  """An SAE to work with: numpy in, numpy out; no torch is loaded.

      from lmm_sae.sae import checkpoint
      sae = checkpoint.load('runs/demo/sae/1')
      vals_NK, idx_NK = sae.encode(x_ND)  # x_ND: any float dtype, [N, D]
      x_hat_ND = sae.decode(sae.encode(x_ND))

  Args:
    path_or_repo: an export; a workdir; its sae/<layer>, whose export is read,
      or without one its last checkpoint; sae/<layer>/<step>; a folder in any
      layout of `sae.layouts`; or a repository of the Hugging Face hub with such
      a folder, as `lmms-lab/llama3-llava-next-8b-hf-sae-131k`.
    layer: the decoder layer, where a folder holds SAEs of several; it is taken
      to be this one whatever its settings say, but for a checkpoint of ours.
    mesh: of `sae.mesh.make`, to lay it on; None: in memory, as numpy.

  Raises:
    ValueError: there is none, it is damaged, contradicts itself or the probe
      beside it, or computes what this program does not.
  """
  from lmm_sae.sae import exports  # which reads checkpoints, too

  found = find(path_or_repo, layer)
  exports.check(found)
  return exports.take(found, mesh)


def find(
  path_or_repo: str | os.PathLike, layer: int | None = None
) -> 'layouts.Source':
  """What `load` loads, read when it is asked for unless it is a checkpoint.

  Raises:
    ValueError: there is none, it is damaged or contradicts itself.
  """
  from lmm_sae.sae import hub, layouts

  path = hub.place(path_or_repo)
  if (path / 'sae').is_dir():  # a workdir
    path = _only(path / 'sae', layer)
  if path.name.isdigit() and (path / STATE).exists():
    return _stored(path.parent, int(path.name), layer)
  found = [] if (path / 'export').exists() else steps(path)
  if found and (path / str(found[-1]) / STATE).exists():
    return _stored(path, found[-1], layer)
  return layouts.find(path, layer)


def _only(path: pathlib.Path, layer: int | None) -> pathlib.Path:
  """sae/<layer> of a workdir.

  Raises:
    ValueError: there are several, and none is named.
  """
  layers = steps(path)
  if layer is None and len(layers) != 1:
    raise ValueError(f'{path} holds SAEs of the layers {layers}: name one')
  return path / str(layers[0] if layer is None else layer)


def _stored(
  path: pathlib.Path, step: int, layer: int | None
) -> 'layouts.Source':
  """The SAE of a checkpoint of training."""
  from lmm_sae.sae import exports

  with Checkpoints(path) as checkpoints:
    note = checkpoints.note(step)
    config = SaeConfig(**note.settings['sae'])
    state = checkpoints.restore(config, step)
  if layer is not None and layer != config.layer:
    raise ValueError(f'{path} is of layer {config.layer}, not {layer}')
  return exports.source(exports.of(config, state))


def _kept(keep: int, keep_best: int):
  """Which checkpoints stay, for orbax."""
  policies = ocp.training.preservation_policies
  return policies.AnyPreservationPolicy(
    [
      policies.LatestN(keep),
      policies.BestN(
        get_metric_fn=lambda metrics: -metrics['fvu'],
        n=keep_best,
        keep_checkpoints_without_metrics=False,
      ),
    ]
  )


def steps(path: str | os.PathLike) -> list[int]:
  """The steps that have a checkpoint under sae/<layer>/, ascending."""
  path = pathlib.Path(path)
  if not path.is_dir():
    return []
  return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit())


def check_version(path: pathlib.Path, version: Any, known: int) -> None:
  """Refuses a format that this program does not know."""
  if version != known:
    raise ValueError(
      f'{path} has format_version {version}; this program reads {known}'
    )
