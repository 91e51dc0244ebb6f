"""What a capture has made so far, and what is said of it at its end."""

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from absl import logging

from lmm_sae.core.jobs import Job
from lmm_sae.core.sources import SPLITS, Split
from lmm_sae.core.store import ActivationStore

CONTENT = 'content'  # in a store's config: `Source.content`
REASONS = 5  # of rejects that are told, the commonest


def found(job: Job, fingerprint: str) -> dict[str, ActivationStore]:
  """The stores that hold what this job makes of this model, by split.

  One that was made otherwise is left out: it is refused by whoever is to write
  into it, which knows all that differs.
  """
  stores = {}
  for name in SPLITS:
    if not (job.workdir.acts(name) / 'meta.json').exists():
      continue
    store = ActivationStore.open(job.workdir.acts(name), partial=True)
    meta, layout, opts = store.meta, store.layout, job.capture
    if (
      (meta.fingerprint, meta.layers) == (fingerprint, job.lmm.layers)
      and _settings(meta.config) == job.settings
      and (layout.shard_rows, layout.chunk_rows, layout.group_rows)
      == (opts.shard_rows, opts.chunk_rows, opts.group_rows)
    ):
      stores[name] = store
  return stores


def lacks_vocab(store: ActivationStore) -> bool:
  """Whether it must be opened for writing, which writes that file, too."""
  return not (store.path / 'vocab.json').exists()


def _settings(config: dict[str, Any]) -> dict[str, Any]:
  """The part of a store's config that a command says, not its data."""
  return {name: each for name, each in config.items() if name != CONTENT}


def changed(store: ActivationStore, split: Split) -> bool:
  """Whether the data are others than those that were captured."""
  return store.meta.config[CONTENT] != split.source.content


def finish(job: Job, fingerprint: str) -> None:
  """Seals what is complete, and says what was captured and what is missing.

  Raises:
    ValueError: nothing was stored of a split.
  """
  stores = found(job, fingerprint)
  missing = {name: 'all' for name in SPLITS if name not in stores}
  for name, store in stores.items():
    if store.complete:
      _seal(store)
    else:
      missing[name] = store.layout.groups - len(store.committed())
  if missing:
    owed = ', '.join(f'{count} of {name}' for name, count in missing.items())
    logging.info(
      'capture: what is asked for is done (capture.share=%r); groups that '
      'others still owe: %s',
      job.capture.share,
      owed,
    )
  for name, store in stores.items():
    if name not in missing:
      _tell(store)
      _check_not_empty(store)


def _seal(store: ActivationStore) -> None:
  """Seals it, unless it is: that one may lie where nothing can be written."""
  if not (store.path / 'groups').list():
    return
  layout = dataclasses.asdict(store.layout)
  ActivationStore.create(store.path, store.meta, **layout).seal()
  store.refresh()


def kinds(store: ActivationStore) -> dict[str, int]:
  """Committed rows by the name of their kind."""
  found: collections.Counter = collections.Counter()
  for line in store.manifest:
    found.update(line['kinds'])
  return dict(found)


def _tell(store: ActivationStore) -> None:
  """Logs what a complete store holds."""
  logging.info(
    'capture: %s: %d samples, %d rows (%s)',
    store.path,
    sum(line['samples'] for line in store.manifest),
    store.num_rows,
    ', '.join(f'{name} {count}' for name, count in kinds(store).items()),
  )
  if store.meta.dtype != 'bfloat16' and store.num_rows:
    costs = [
      f'{store.rounding(at):.2e} of layer {at}' for at in store.meta.layers
    ]
    logging.info(
      'capture: %s: rounding to %s costs an FVU of %s',
      store.path,
      store.meta.dtype,
      ', '.join(costs),
    )
  rejects = store.rejects()
  if rejects:
    logging.warning(
      'capture: %s: %d samples rejected, see rejects.jsonl; %s',
      store.path,
      len(rejects),
      '; '.join(common([each['reason'] for each in rejects])),
    )


def common(reasons: Sequence[str]) -> list[str]:
  """The commonest reasons with their counts, numbers in them not told apart."""
  alike: dict[str, list[str]] = {}
  for reason in reasons:
    alike.setdefault(re.sub(r'\d+', '0', reason), []).append(reason)
  most = sorted(alike.values(), key=lambda group: -len(group))
  told = [f'{len(group)} times: {group[0]}' for group in most[:REASONS]]
  rest = sum(len(group) for group in most[REASONS:])
  return [*told, f'{rest} for other reasons'] if rest else told


def _check_not_empty(store: ActivationStore) -> None:
  if store.num_rows:
    return
  rejects = store.rejects()
  if any(line['samples'] for line in store.manifest):
    raise ValueError(
      f'none of the tokens of {store.path} is of a kind that is stored: see '
      'capture.keep and capture.keep_halves'
    )
  raise ValueError(
    f'no sample of {store.path} could be read; the first, '
    f'{rejects[0]["source"]}: {rejects[0]["reason"]}'
  )
