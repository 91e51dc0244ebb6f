"""A few processes of one core each that train one model together.

At these sizes two processes that average their gradients outrun one process
with two threads by far: they meet once a step, not once an operation.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor, distributed, multiprocessing


@dataclasses.dataclass(frozen=True)
class Team:
  """This process's place among `size` equals; sums are bit-equal on all."""

  rank: int = 0
  size: int = 1

  def sum(self, tensors: list[Tensor]) -> None:
    """Sums each tensor over the team, in place."""
    if self.size == 1 or not tensors:
      return
    flat = torch.cat([x.reshape(-1) for x in tensors])
    distributed.all_reduce(flat)
    parts = flat.split([x.numel() for x in tensors])
    for x, part in zip(tensors, parts, strict=True):
      x.copy_(part.view(x.shape))


def start(size: int, work: Callable[..., None], *args) -> None:
  """Runs work(team, *args) in `size` processes, of which this one is the first.

  A member that dies takes the others with it at their next sum.
  """
  with tempfile.TemporaryDirectory() as folder:
    store = pathlib.Path(folder) / 'store'
    context = multiprocessing.get_context('spawn')
    others = [
      context.Process(
        target=_join, args=(rank, size, store, work, args), daemon=True
      )
      for rank in range(1, size)
    ]
    for other in others:
      other.start()
    _join(0, size, store, work, args)
    for other in others:
      other.join()


def _join(rank: int, size: int, store: pathlib.Path, work, args) -> None:
  torch.set_num_threads(1)
  if size == 1:
    work(Team(), *args)
    return
  distributed.init_process_group(
    'gloo',
    store=distributed.FileStore(str(store), size),
    rank=rank,
    world_size=size,
  )
  try:
    work(Team(rank, size), *args)
  finally:
    distributed.destroy_process_group()
