"""train: fits one SAE to the stored rows of each layer.

Writes sae/<layer>/<step>/ (checkpoints), sae/<layer>/export/ (what every later
stage reads) and metrics.jsonl. A killed run goes on from its last checkpoint
and ends with the same parameters, bit for bit.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from lmm_sae.core import config as configs_lib
from lmm_sae.core import host, prefetch, progress, records
from lmm_sae.core.store import ActivationStore
from lmm_sae.core.workdir import Workdir
from lmm_sae.sae import checkpoint, data, exports, hosts, metrics, trainer
from lmm_sae.sae import mesh as mesh_lib
from lmm_sae.sae.checkpoint import Checkpoints, Note
from lmm_sae.sae.hosts import HostsConfig
from lmm_sae.sae.model import Params, SaeConfig
from lmm_sae.sae.options import TrainConfig
from lmm_sae.sae.trainer import TrainState

START_ROWS = 2**14  # rows that b_dec and the scale start from
AHEAD = 2  # batches that are on the devices before they are asked for
FREE = tuple(name.removeprefix('train.') for name in configs_lib.FREE)


def run(config: ConfigDict, workdir: Workdir) -> None:
  """Trains what is not trained yet, together with the run's other processes."""
  options = TrainConfig(**config.train)
  workdir.require(workdir.acts('train'), 'capture')
  store = ActivationStore.open(workdir.acts('train'))
  configs = [
    SaeConfig(layer=layer, width=store.meta.width, **config.sae)
    for layer in config.lmm.layers
  ]
  for sae_config in configs:
    check_layer(store, sae_config)
  with hosts.joined(HostsConfig(**config.hosts)):
    hosts.agree(
      configs_lib.flat(config) | {'rows of the store': store.num_rows}
    )
    mesh = mesh_lib.make(options.devices, options.latent_shards)
    if mesh.devices.flat[0].platform == 'cpu':
      host.keep_freed_memory()
    data.check(options, mesh)
    for sae_config in configs:
      trainer.check(sae_config, options, mesh)
      if not checkpoint.steps(workdir.sae(sae_config.layer)):
        given(sae_config, options)
    hosts.same_folder(workdir.root)
    runs = [
      Run(store, sae_config, options, config.seed, mesh, workdir)
      for sae_config in configs
    ]
    for each in runs:
      each.check()
    for each in runs:
      each.train()


def check_layer(store: ActivationStore, config: SaeConfig) -> None:
  """Refuses a layer that was not captured.

  Raises:
    ValueError: naming those that were.
  """
  if config.layer not in store.meta.layers:
    raise ValueError(
      f'layer {config.layer} is not in {store.path}, which holds '
      f'{store.meta.layers}: set lmm.layers and run `lmm-sae capture`'
    )


def given(config: SaeConfig, options: TrainConfig) -> Params | None:
  """The SAE that training goes on from, where `train.init` names one.

  Raises:
    ValueError: there is none, or it is of another width or size.
  """
  if not options.init:
    return None
  sae = exports.load(options.init.replace('{layer}', str(config.layer)))
  if (sae.config.width, sae.config.latents) != (config.width, config.latents):
    raise ValueError(
      f'train.init={options.init} reads rows of width {sae.config.width} with '
      f'{sae.config.latents} latents, but the rows of layer {config.layer} '
      f'have width {config.width} and sae.latents is {config.latents}: name '
      'another SAE, or set sae.latents to its number'
    )
  return sae.params


class Run:
  """The training of one layer's SAE."""

  def __init__(
    self,
    store: ActivationStore,
    config: SaeConfig,
    options: TrainConfig,
    seed: int,
    mesh: jax.sharding.Mesh,
    workdir: Workdir,
  ):
    self.store = store
    self.config = config
    self.options = options
    self.seed = seed
    self.mesh = mesh
    self.path = workdir.sae(config.layer)
    self.export = workdir.export(config.layer)
    self.log = workdir.file('metrics.jsonl')

  def check(self) -> None:
    """Refuses to go on from what is no checkpoint of this run.

    Raises:
      ValueError: it is of other settings, or damaged.
    """
    if not checkpoint.steps(self.path):
      return
    with Checkpoints(self.path) as checkpoints:
      note = checkpoints.note(checkpoints.latest)
    check(note.settings, self.settings(), self.path)

  def train(self) -> None:
    """Does the steps that are left, and exports."""
    options = self.options
    with Checkpoints(self.path, options.keep, options.keep_best) as checkpoints:
      done = checkpoints.latest
      note = None if done is None else checkpoints.note(done)
      if done == options.steps and hosts.told(self.export.exists()):
        logging.info('layer %d is trained: nothing to do', self.config.layer)
        return
      state, places_S2 = self.begin(checkpoints, note)
      if hosts.first():
        metrics.cut(self.log, self.config.layer, done or 0)
      if not done or done < options.steps:
        state = self.steps(state, places_S2, checkpoints, done or 0)
    self.write(state)

  def write(self, state: TrainState) -> None:
    """Exports the SAE of a state; the other processes wait for process 0."""
    if jax.process_count() > 1:
      state = hosts.fetch(state)
    if hosts.first():
      sae = exports.of(self.config, state)
      exports.write(
        sae, self.export, step=self.options.steps, settings=self.settings()
      )
      logging.info('wrote %s', self.export)
    if jax.process_count() > 1:
      hosts.meet(f'exported {self.config.layer}')

  def settings(self) -> dict[str, Any]:
    """What a checkpoint must share with the run that goes on from it."""
    train = dataclasses.asdict(self.options)
    settings = {
      'sae': dataclasses.asdict(self.config),
      'train': {name: train[name] for name in train if name not in FREE},
      'seed': self.seed,
      'acts': {'rows': self.store.num_rows, 'model': self.store.meta.model},
    }
    return json.loads(json.dumps(settings))

  @functools.cached_property
  def rows(self) -> data.Rows:
    """What is trained on."""
    return data.Rows(
      self.store, self.config.layer, self.options.kinds, self.options.block_rows
    )

  def begin(
    self, checkpoints: Checkpoints, note: Note | None
  ) -> tuple[TrainState, jax.Array | None]:
    """The state to go on with, and where the rows go on."""
    shardings = mesh_lib.sharding(self.mesh, trainer.specs())
    if note is not None:
      logging.info('layer %d: on from step %d', self.config.layer, note.step)
      rows = mesh_lib.sharding(self.mesh, mesh_lib.ROWS)
      shares = self.options.data_shares
      return (
        checkpoints.restore(self.config, note.step, shardings),
        checkpoints.places(note.step, shares, rows),
      )
    logging.info(
      'layer %d: %d rows in %d blocks, %.2f epochs',
      self.config.layer,
      self.rows.count,
      self.rows.blocks,
      self.options.steps * self.options.rows / self.rows.count,
    )
    if hosts.first() and self.options.pool_blocks > self.rows.blocks:
      logging.warning(
        'train.pool_blocks is %d, more than the %d blocks of the store: a pool '
        'holds rows of several epochs, and some more than once',
        self.options.pool_blocks,
        self.rows.blocks,
      )
    state = trainer.start(
      self.config,
      self.rows.sample(START_ROWS, self.seed),
      self.seed,
      normalise=self.options.normalise,
      given=given(self.config, self.options),
    )
    return mesh_lib.put(state, shardings), None

  def steps(
    self,
    state: TrainState,
    places_S2: jax.Array | None,
    checkpoints: Checkpoints,
    done: int,
  ) -> TrainState:
    """The optimiser steps from `done` to the last, with their checkpoints."""
    step = trainer.make_step(self.config, self.options, self.mesh)
    settings = self.settings()
    last = self.options.steps
    left = range(done + 1, last + 1)
    with contextlib.ExitStack() as stack:
      log = StepLog(self.log, self.config.layer, self.options)
      stack.callback(log.close)
      batches = stack.enter_context(
        contextlib.closing(self.batches(places_S2, len(left)))
      )
      for at in progress.track(left, what='steps') if hosts.first() else left:
        began = time.monotonic()
        batch_ND, places_S2 = next(batches)
        log.waited(time.monotonic() - began)
        state, numbers = step(state, batch_ND)
        log.add(at, numbers)
        if at % self.options.save_every == 0 or at == last:
          log.flush()
          note = Note(at, settings, log.mean_fvu())
          checkpoints.save(state, note, places_S2)
    return state

  def batches(
    self, places_S2: jax.Array | None, count: int
  ) -> Iterator[tuple[jax.Array, jax.Array]]:
    """`count` batches on the devices, read and put there by another thread."""
    batches = data.batches(
      self.rows, self.options, self.seed, self.mesh, places_S2
    )
    return prefetch.prefetch(itertools.islice(batches, count), AHEAD)


class StepLog:
  """Lines of metrics.jsonl, each written while the next step runs.

  Fetching the numbers of a step waits for it, so those of step n are fetched
  once step n + 1 is under way. `rows_per_s` is of the time between two fetches;
  `input_wait_share` is the share of it that this process's loop stood still for
  want of a batch on its devices. Process 0 alone writes.
  """

  def __init__(self, path: pathlib.Path, layer: int, options: TrainConfig):
    self._out = records.Appender(path) if hosts.first() else None
    self._layer = layer
    self._rows = options.rows
    self._max_skipped = options.max_skipped
    self._skipped = 0
    self._pending: tuple[int, dict] | None = None
    self._since = time.monotonic()
    self._wait_s = 0.0
    self._fvus: list[float] = []

  def close(self) -> None:
    """Closes the file."""
    if self._out is not None:
      self._out.close()

  def waited(self, seconds: float) -> None:
    """Counts time in which there was no batch."""
    self._wait_s += seconds

  def mean_fvu(self) -> float | None:
    """Over the finite steps since this was last asked; None without one."""
    found, self._fvus = self._fvus, []
    return math.fsum(found) / len(found) if found else None

  def add(self, step: int, numbers: dict[str, jax.Array]) -> None:
    """Takes the numbers of a step that may still be running."""
    self.flush()
    self._pending = (step, numbers)

  def flush(self) -> None:
    """Waits for the pending step and writes its line.

    Raises:
      ValueError: more steps than are allowed found something not finite.
    """
    if self._pending is None:
      return
    step, numbers = self._pending
    self._pending = None
    numbers = {key: float(x) for key, x in jax.device_get(numbers).items()}
    skipped = int(numbers.pop('skipped'))
    finite = {k: x if math.isfinite(x) else None for k, x in numbers.items()}
    now = time.monotonic()
    gone = max(now - self._since, 1e-9)
    line = {
      'layer': self._layer,
      'step': step,
      **finite,
      'skipped': skipped,
      'rows_per_s': round(self._rows / gone, 1),
      'input_wait_share': round(min(self._wait_s / gone, 1.0), 4),
    }
    if self._out is not None:
      self._out.add(line)
    if finite['fvu'] is not None:
      self._fvus.append(finite['fvu'])
    self._since, self._wait_s = now, 0.0
    if skipped > self._skipped:
      logging.warning('step %d skipped: something in it is not finite', step)
      self._skipped = skipped
    if skipped > self._max_skipped:
      raise ValueError(
        f'{skipped} steps of layer {self._layer} met NaN or Inf, in their rows '
        'or their gradients: look at the stored rows with `lmm-sae inspect '
        'ACTS/train --stats`, lower train.lr, or raise train.max_skipped'
      )


def check(found: dict, wanted: dict, path) -> None:
  """Refuses to go on from a checkpoint of other settings.

  Raises:
    ValueError: naming every field that differs, and what to do.
  """
  differ = []
  for section in sorted(found.keys() | wanted.keys()):
    old, new = found.get(section), wanted.get(section)
    if not isinstance(old, dict) or not isinstance(new, dict):
      old, new = {'': old}, {'': new}
    for key in sorted(old.keys() | new.keys()):
      if old.get(key) != new.get(key):
        name = f'{section}.{key}' if key else section
        differ.append(f'{name} was {old.get(key)!r}, now {new.get(key)!r}')
  if differ:
    raise ValueError(
      f'the checkpoints in {path} are of other settings ({"; ".join(differ)}): '
      f'set them back, use another workdir, or delete {path} to train again'
    )
