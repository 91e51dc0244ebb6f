"""Many writers, and those that are killed: the store is the same."""

import pytest

from lmm_sae.core.places import Place
from lmm_sae.core.store import ActivationStore
from tests.core.store_cases import (
  GROUPS,
  create,
  digest,
  finish,
  group,
  killed,
  python,
)


# Of meta.json, of vocab.json, of shards of the first and third group, of their
# commits, of each of the files that a seal writes, and of groups/, which it
# then removes.
@pytest.mark.parametrize('calls', [1, 2, 3, 10, 23, 24, 34, 67, 68, 69, 70, 71])
def test_a_killed_writer_resumes_byte_for_byte(whole, tmp_path, calls):
  killed(tmp_path / 's', calls)
  assert digest(tmp_path / 's') != digest(whole)
  finish(tmp_path / 's')
  assert digest(tmp_path / 's') == digest(whole)


@pytest.mark.parametrize('calls', [18, 70])
def test_a_writer_that_is_killed_in_a_bucket_resumes(whole, s3, calls):
  killed(s3, calls)
  finish(s3)
  assert digest(s3) == digest(whole)


def test_a_kill_within_a_file_leaves_nothing_of_it(whole, tmp_path):
  made = create(tmp_path / 's')
  for name in ('layer_4/c/0/0', 'groups/000000.json', 'samples.jsonl'):
    part = tmp_path / 's' / f'{name}.__lock'
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(b'half of it')
  assert made.committed() == set()
  finish(tmp_path / 's')
  assert digest(tmp_path / 's') == digest(whole)


def test_what_a_killed_writer_left_is_replaced(whole, tmp_path):
  made = create(tmp_path / 's')
  made.write_group(**GROUPS[0])
  made.write_group(**group(2, (9, 9), rejects=3, seed=1))
  (tmp_path / 's' / 'groups' / '000002.json').unlink()
  again = create(tmp_path / 's')
  assert again.committed() == {0}
  for each in GROUPS[1:]:
    again.write_group(**each)
  again.seal()
  assert digest(tmp_path / 's') == digest(whole)


def test_groups_may_come_in_any_order_from_many_writers(whole, place):
  writers = [create(place) for _ in range(3)]
  for at, index in enumerate((4, 2, 0, 3, 1, 3)):
    writers[at % 3].write_group(**GROUPS[index])
  for writer in writers:
    writer.refresh()
    assert writer.committed() == {0, 1, 2, 3, 4}
  loose = ActivationStore.open(place)
  assert loose.ranges == [(0, 13), (24, 29), (72, 96), (96, 102)]
  assert [s.sample for s in loose.samples()] == [0, 1, 10, 30, 40, 41, 42]
  for writer in (*writers, writers[0]):
    writer.seal()
  assert digest(place) == digest(whole)
  sealed = ActivationStore.open(place)
  for name in ('manifest', 'ranges', 'num_rows'):
    assert getattr(sealed, name) == getattr(loose, name)
  assert sealed.samples() == loose.samples()
  assert sealed.rejects() == loose.rejects()


def test_a_reader_from_before_a_seal_reads_on(tmp_path):
  made = create(tmp_path / 's')
  for each in GROUPS:
    made.write_group(**each)
  reader = ActivationStore.open(tmp_path / 's')
  made.seal()
  assert reader.num_rows == 48
  assert len(reader.samples()) == 7
  assert [r['group'] for r in reader.rejects()] == [1, 1, 4]


def test_processes_may_create_write_and_seal_at_once(whole, tmp_path):
  script = """
    import sys
    from tests.core import store_cases
    print('ready', flush=True)
    sys.stdin.read()
    store_cases.finish(sys.argv[1])
  """
  processes = [python(script, str(tmp_path / 's')) for _ in range(3)]
  for process in processes:
    assert process.stdout.readline() == 'ready\n'
  for process in processes:
    process.stdin.close()  # all go now
  for process in processes:
    errors = process.stderr.read()
    assert process.wait() == 0, errors
    process.stdout.close()
    process.stderr.close()
  assert digest(tmp_path / 's') == digest(whole)


def test_a_sealer_that_another_overtakes_ends_well(
  whole, tmp_path, monkeypatch
):
  slow, fast = create(tmp_path / 's'), create(tmp_path / 's')
  for each in GROUPS:
    slow.write_group(**each)
  write = Place.write

  def overtaken(self, data):
    monkeypatch.setattr(Place, 'write', write)
    fast.seal()
    return write(self, data)

  monkeypatch.setattr(Place, 'write', overtaken)
  slow.seal()
  assert digest(tmp_path / 's') == digest(whole)
  assert slow.complete
  assert len(slow.samples()) == 7


def test_an_unfinished_store_is_not_sealed(tmp_path):
  made = create(tmp_path / 's')
  made.write_group(**GROUPS[3])
  with pytest.raises(ValueError, match=r'1 of 5 groups: it is sealed when'):
    made.seal()


def test_a_committed_group_stays_as_it_is(tmp_path):
  made = create(tmp_path / 's')
  made.write_group(**GROUPS[0])
  before = digest(tmp_path / 's')
  made.write_group(**group(0, seed=9))
  late = create(tmp_path / 's')
  late.write_group(**group(0, seed=9))
  assert digest(tmp_path / 's') == before
