"""What a capture that is still to be made will hold, and how long it takes.

A seeded part of what is left is counted and captured by the capture's own
workers (`lmm.trial`), as many as the run itself would have.
"""

import collections
import contextlib
import dataclasses
import functools
import pathlib
import tempfile
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

import numpy as np

from lmm_sae.core import forecast, grid, workers
from lmm_sae.core.forecast import Expected, Pace, Part
from lmm_sae.core.jobs import Job
from lmm_sae.core.sources import Split
from lmm_sae.core.tokens import Kind
from lmm_sae.lmm import trial
from lmm_sae.lmm.crew import crew, small
from lmm_sae.lmm.trial import Counted, Draw, Ran, Trial

COUNTED = 4096  # samples of a split that are counted at most
COUNT_S = 15.0  # within which they are
COUNT_UNITS = 8  # a task
RUN_S = (3.0, 60.0)  # that captured samples take: at least, at most
CHUNK_S = 10.0  # about what a task takes of a model that is slow
CHUNKS = 64  # tasks at most


@dataclasses.dataclass(frozen=True)
class Trials:
  """Who counts and captures: the workers that the capture itself would have.

  Attributes:
    folder: of the model. open: the capturers of a process.
  """

  job: Job
  folder: pathlib.Path
  open: trial.Open

  @contextlib.contextmanager
  def run(
    self, what: str, draws: Sequence[Draw], folder: str = ''
  ) -> Iterator[Iterator]:
    """What the workers make of the draws, in the order in which they end.

    Args:
      what: trial.COUNT or trial.RUN. folder: of the stores that a run writes.
    """
    made = Trial(self.open, tuple(draws), folder, COUNT_S)
    tasks = [(what, number) for number in range(len(draws))]
    work = functools.partial(trial.make, made)
    with crew(self.job, self.folder, len(tasks), work) as start_count:
      results = workers.run(tasks, *start_count)
      with contextlib.closing(results):
        yield (result for _, result in results)


def count(
  trials: Trials,
  splits: Sequence[Split],
  left: Mapping[str, np.ndarray],
  begun: Container[str],
  width: int,
) -> dict[str, Part]:
  """What is left of each split.

  Args:
    left: samples that are still to be captured, by split, ascending.
    begun: splits of which a store stands, which has what is in it once.
    width: D.
  """
  job, units, draws = trials.job, {}, []
  for split in splits:
    drawn = trial.draw(split, left[split.name], COUNTED, job.data.seed)
    # In no order, so that those that there is no time for are none in special.
    units[split.name] = np.random.default_rng(job.data.seed).permutation(drawn)
  for at in range(0, COUNTED, COUNT_UNITS):  # all splits, as far as time goes
    for name, drawn in units.items():
      some = drawn[at : at + COUNT_UNITS].ravel().tolist()
      if some:
        draws.append(Draw(name, tuple(some)))
  found: dict[str, list[Counted]] = collections.defaultdict(list)
  with trials.run(trial.COUNT, draws) as done:
    for each in done:
      found[each.split].append(each)
  vocab = max(each.vocab for some in found.values() for each in some)
  fields = grid.fields(job.lmm.layers, width, job.capture.store)
  fixed = forecast.fixed_bytes(fields, vocab)
  return {
    name: part(
      job,
      each,
      left[name],
      units[name].shape[1],
      fields,
      0 if name in begun else fixed,
    )
    for name, each in found.items()
  }


def part(
  job: Job,
  counted: Iterable[Counted],
  left: np.ndarray,
  unit: int,
  fields: Mapping[str, tuple[str, int]],
  fixed: int,
) -> Part:
  """What is expected of the samples that are left, by those counted.

  Args:
    left: samples, ascending. unit: neighbours that were drawn together.
    fields: of the store, as `grid.fields` gives them.
    fixed: bytes of a store without rows.
  """
  counted = list(counted)
  samples = np.concatenate([np.array(e.samples, np.int64) for e in counted])
  seen_SK = np.concatenate([each.seen_SK for each in counted])
  kept_SK = np.concatenate([each.kept_SK for each in counted])
  bytes_S = np.concatenate([each.bytes_S for each in counted])
  reasons = tuple(reason for each in counted for reason in each.reasons)
  of = len(left)

  def expected(values_S: np.ndarray) -> Expected:
    if len(values_S) == of or unit == 1:
      return forecast.expect(values_S, of)
    whole = len(values_S) // unit * unit  # neighbours are alike
    if not whole:
      return forecast.expect(values_S, of)
    return forecast.expect(
      values_S[:whole].reshape(-1, unit).sum(1), -(-of // unit)
    ).times(of / (-(-of // unit) * unit))

  rows = expected(kept_SK.sum(1))
  group, opts = job.capture.group, job.capture
  groups = np.unique(left // group)
  if len(samples) == of:
    rows_of = collections.Counter()
    for sample, count_ in zip(samples, kept_SK.sum(1), strict=True):
      rows_of[sample // group] += int(count_)
    rows_G = [rows_of[at] for at in groups]
  else:
    rows_G = [round(rows.total / len(groups))] * len(groups)
  sizes = collections.Counter(rows_G)
  stored = sum(
    many * forecast.group_bytes(each, fields, opts.shard_rows, opts.chunk_rows)
    for each, many in sizes.items()
  )
  share = rows.spread / rows.total if rows.total else 0.0
  return Part(
    samples=of,
    counted=len(samples),
    seen=_named(seen_SK, expected),
    kept=_named(kept_SK, expected),
    rejected=expected(1.0 * (seen_SK.sum(1) == 0)),
    reasons=reasons,
    rows=rows,
    bytes=Expected(stored, stored * share)
    + expected(bytes_S)
    + Expected(fixed),
    read_s=sum(each.seconds for each in counted) / len(samples),
  )


def _named(values_SK: np.ndarray, expected) -> dict[str, Expected]:
  return {
    kind.name.lower(): expected(values_SK[:, kind])
    for kind in Kind
    if values_SK[:, kind].any()
  }


def pace(
  trials: Trials, split: Split, left: np.ndarray, least: int, processes: int
) -> Pace:
  """How fast samples of a split are captured; what is written is thrown away.

  Args:
    left: samples that are drawn from. least: samples to capture, if there is
      time. processes: of the run.
  """
  job = trials.job
  order = np.random.default_rng(job.data.seed + 1).permutation(left)
  chunk = min(job.capture.group, len(order))
  with tempfile.TemporaryDirectory(prefix='lmm_sae_trial_') as folder:
    if not small(job, trials.folder):  # a group may take long
      ones = [Draw(split.name, (int(at),)) for at in order[:2]]
      with trials.run(trial.RUN, ones, f'{folder}/one') as done:
        ran = list(done)
      alone = ran[-1].end - ran[-1].begin
      if alone > RUN_S[1] / 2 or len(order) < 4:
        return _pace(ran[-1:], 1, 1)
      batch = job.capture.batch
      chunk = int(CHUNK_S / alone) // batch * batch
      chunk = max(1, min(max(batch, chunk), job.capture.group, len(order) // 2))
    warm = [Draw(split.name, (int(at),)) for at in order[:processes]]
    rest = order[processes if len(order) > 2 * processes else 0 :]
    draws = warm + [
      Draw(split.name, tuple(sorted(rest[at : at + chunk].tolist())))
      for at in range(0, min(len(rest), CHUNKS * chunk), chunk)
    ]
    results: list[Ran] = []
    with trials.run(trial.RUN, draws, f'{folder}/more') as done:
      begin = time.monotonic()
      for each in done:
        if not results:
          begin = time.monotonic()  # the model is loaded
        results.append(each)
        taken = time.monotonic() - begin
        enough = sum(one.samples for one in _whole(results)) >= least
        if taken > RUN_S[1] or (enough and taken > RUN_S[0]):
          break
    return _pace(_whole(results) or results[-1:], processes, chunk)


def _whole(ran: Sequence[Ran]) -> list[Ran]:
  """Those of more samples than the one that a worker warms up with."""
  return [each for each in ran if each.samples > 1]


def _pace(ran: Sequence[Ran], processes: int, chunk: int) -> Pace:
  samples = sum(each.samples for each in ran)
  wall = max(each.end for each in ran) - min(each.begin for each in ran)
  return Pace(
    workers=processes,
    samples=samples,
    chunk=chunk,
    sample_s=wall / samples,
    pixels_s=sum(each.pixels for each in ran) / samples,
    forward_s=sum(each.forward for each in ran) / samples,
    write_s=sum(each.write for each in ran) / samples,
  )
