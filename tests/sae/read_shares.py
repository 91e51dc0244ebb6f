"""Which blocks each process of a run reads, with the blocks of every share.

python -m tests.sae.read_shares ACTS OUT     as often as there are processes

OUT/PROCESS.json is [blocks read, {share: blocks of its first pools}].
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator
from unittest import mock

import jax

from lmm_sae.core.store import ActivationStore
from lmm_sae.sae import data, hosts, mesh
from tests.sae import small

POOLS, SHARES = 3, 4


@contextlib.contextmanager
def recording(rows: data.Rows) -> Iterator[list[int]]:
  """The numbers of the blocks that are read meanwhile, as they come."""
  blocks, read = [], rows.read_many

  def note(some):
    blocks.extend(map(int, some))
    return read(some)

  with mock.patch.object(rows, 'read_many', note):
    yield blocks


def main(acts: str, out: str) -> None:
  """Reads until the pools of every share of this process are used up."""
  with hosts.joined(hosts.HostsConfig('auto', 60, 60)):
    store = ActivationStore.open(pathlib.Path(acts) / 'train')
    rows = data.Rows(store, small.LAYER, ('all',), 8)
    shares = {}
    for share in range(SHARES):
      with recording(rows) as blocks:
        pools = data.pools(
          rows, share=share, shares=SHARES, pool_blocks=SHARES, seed=0
        )
        for at in range(POOLS):
          pools[at]  # by number, since an iterator would read ahead
      shares[share] = list(blocks)
    with recording(rows) as blocks:
      options = dataclasses.replace(
        small.TRAIN, rows=SHARES, pool_blocks=SHARES, data_shares=SHARES
      )
      for _, places_S2 in data.batches(rows, options, 0, mesh.make(0)):
        if hosts.fetch(places_S2)[:, 0].min() >= POOLS:
          break
    path = pathlib.Path(out) / f'{jax.process_index()}.json'
    path.write_text(json.dumps([list(blocks), shares]))


if __name__ == '__main__':
  main(*sys.argv[1:])
