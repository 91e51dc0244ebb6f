"""A team sums to the same bits on all; one that fails takes the rest along."""

import pathlib

import pytest
import torch

from lmm_sae.scenes import muon, team


def _add(mine: team.Team, folder: pathlib.Path) -> None:
  tensors = [torch.full((2, 2), 0.1 + mine.rank), torch.full((3,), 1 / 3)]
  mine.sum(tensors)
  params = {
    name: torch.nn.Parameter(torch.eye(4) + i)
    for i, name in enumerate(('x.weight', 'y.weight', 'z.weight'))
  }
  optimiser = muon.Muon(params, lambda _: 1.0, mine)
  for i, p in enumerate(params.values()):
    p.grad = torch.arange(16.0).view(4, 4).sin() + i
  optimiser.step(0.1, 0.1)
  torch.save([*tensors, *params.values()], folder / f'{mine.rank}.pt')


def _fail(mine: team.Team, folder: pathlib.Path) -> None:
  del folder
  if mine.rank:
    raise SystemExit(3)
  mine.sum([torch.ones(1)])


def test_two_end_with_the_bits_of_one(tmp_path):
  team.start(2, _add, tmp_path)
  first, second = (torch.load(tmp_path / f'{i}.pt') for i in range(2))
  for one, other in zip(first, second, strict=True):
    assert torch.equal(one, other)
  torch.testing.assert_close(first[0], torch.full((2, 2), 1.2))
  (tmp_path / 'alone').mkdir()
  _add(team.Team(), tmp_path / 'alone')
  alone = torch.load(tmp_path / 'alone' / '0.pt')
  for one, other in zip(first[2:], alone[2:], strict=True):
    torch.testing.assert_close(one, other)


def test_a_member_that_ends_takes_the_first_along(tmp_path):
  with pytest.raises(RuntimeError):
    team.start(2, _fail, tmp_path)
