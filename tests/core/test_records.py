"""Records as JSON."""

import dataclasses
import errno
import json
import pathlib

import pytest

from lmm_sae.core import records
from lmm_sae.core.records import Picture, Sample, Turn
from tests.core.store_cases import META

SAMPLE = Sample(
  sample=3,
  group=1,
  source='row 3',
  image='a.png',
  width=5,
  height=7,
  prompt='<image>\nwhat?',
  turns=(Turn('colour', 'what?', 'red'), Turn('', 'and?', 'blue')),
  start=-1,
  stop=-1,
  truth={'regions': 'a.regions.png', 'concepts': [['red'], []]},
  tokens=11,
  grid=(2, 3),
  more=(Picture('b.png', 1, 2),),
)


@pytest.mark.parametrize('record', [SAMPLE, META])
def test_json_has_every_field_as_dataclasses_give_them(record):
  found = records.to_json(record)
  assert found == dataclasses.asdict(record)
  assert list(found) == list(dataclasses.asdict(record))


def test_a_sample_comes_back_from_json():
  line = json.loads(json.dumps(records.to_json(SAMPLE)))
  assert records.from_json(Sample, line) == SAMPLE


def test_a_full_disk_names_the_file_and_leaves_the_old_one(
  tmp_path, monkeypatch
):
  records.write_json(tmp_path / 'a.json', {'old': 1})

  def full(path, text):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(pathlib.Path, 'write_text', full)
  with pytest.raises(OSError, match=r'No space .*a\.json\.part'):
    records.write_json(tmp_path / 'a.json', {'new': 2})
  assert json.loads((tmp_path / 'a.json').read_text()) == {'old': 1}
