"""LLaVA-format files: where rows lie in them, and that they stay there."""

import gzip
import json
import os
import pickle
import tracemalloc

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from lmm_sae.core import llava_file, sources
from lmm_sae.core.records import Turn
from lmm_sae.core.sources import DataConfig

TALK = [
  {'from': 'human', 'value': '<image>\nwhat is this?'},
  {'from': 'gpt', 'value': ' a cat '},
  {'from': 'human', 'value': 'where?'},
  {'from': 'gpt', 'value': 'on the mat'},
]


def picture(path, size=(9, 7)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('RGB', size, (3, 50, 200)).save(path)
  return path


def llava(folder, rows, name='data.json'):
  path = folder / name
  if name.endswith('.jsonl'):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
    path.write_text('\n'.join(lines) + '\n')
  else:
    path.write_text(json.dumps(rows))
  return sources.open_source(DataConfig(source='llava', path=str(path)))


@pytest.mark.parametrize('name', ['data.json', 'data.jsonl'])
def test_llava_rows_become_items(tmp_path, name):
  picture(tmp_path / 'pics' / '1.png')
  rows = [
    {'id': 'x7', 'image': 'pics/1.png', 'conversations': TALK},
    {'conversations': TALK[2:]},
  ]
  source = llava(tmp_path, rows, name)
  assert len(source) == 2
  first, second = source[0], source[1]
  assert first.source == 'x7'
  assert first.images[0].image.size == (9, 7)
  assert first.images[0].path == str(tmp_path / 'pics' / '1.png')
  assert first.conversation[0] == ('user', '<image>\nwhat is this?')
  assert [role for role, _ in first.conversation] == ['user', 'assistant'] * 2
  assert first.turns == (
    Turn('', 'what is this?', 'a cat'),
    Turn('', 'where?', 'on the mat'),
  )
  assert second.source == '1'
  assert second.images == ()


def test_images_are_relative_to_image_root(tmp_path):
  picture(tmp_path / 'far' / '1.png')
  path = tmp_path / 'data.json'
  path.write_text(json.dumps([{'image': '1.png', 'conversations': TALK}]))
  config = DataConfig(
    source='llava', path=str(path), image_root=str(tmp_path / 'far')
  )
  assert sources.open_source(config)[0].images[0].image.size == (9, 7)


BAD = {
  'does not exist': {'image': 'gone.png', 'conversations': TALK},
  'cannot be read': {'image': 'torn.png', 'conversations': TALK},
  'no conversations': {'image': '1.png', 'conversations': []},
  'it has no conv': {'image': '1.png'},
  "role 'robot'": {'conversations': [{'from': 'robot', 'value': 'hi'}]},
  'has no value': {'conversations': [{'from': 'human'}]},
  '1 <image> for 0 images': {'conversations': TALK},
  '1 <image> for 2 images': {
    'image': ['1.png', '1.png'],
    'conversations': TALK,
  },
  'must be an object': ['not', 'an', 'object'],
  'an image of it is a int': {'image': 3, 'conversations': TALK},
}


@pytest.mark.parametrize('reason', BAD)
def test_a_bad_row_says_why_and_moves_no_other(tmp_path, reason):
  picture(tmp_path / '1.png')
  whole = picture(tmp_path / 'torn.png').read_bytes()
  (tmp_path / 'torn.png').write_bytes(whole[: len(whole) // 2])
  good = {'id': 'good', 'image': '1.png', 'conversations': TALK}
  source = llava(tmp_path, [good, BAD[reason], good])
  with pytest.raises(ValueError, match=reason):
    source[1]
  assert source.name(1) == 'row 1'
  assert source[2].source == 'good'


def test_a_broken_line_is_one_reject(tmp_path):
  source = llava(tmp_path, ['{"id": ', {'conversations': TALK[2:]}], 'a.jsonl')
  with pytest.raises(ValueError, match='not JSON'):
    source[0]
  assert source[1].conversation


def opened(tmp_path, data):
  path = tmp_path / 'd.json'
  path.write_bytes(data)
  return sources.open_source(DataConfig('llava', str(path)))


def rows_of(source):
  """The rows as JSON, by the offsets alone."""
  data = source._file.read_bytes()
  return [
    json.loads(data[start:stop])
    for start, stop in zip(source._start_N, source._stop_N, strict=True)
  ]


tree = st.recursive(
  st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
  max_leaves=12,
)


@hypothesis.given(
  rows=st.lists(tree, min_size=1, max_size=8),
  indent=st.none() | st.just(2),
  ascii_only=st.booleans(),
  piece=st.integers(1, 64),
  around=st.sampled_from(['', ' ', '\n\t', '\ufeff']),
)
@hypothesis.settings(
  deadline=None,
  max_examples=100,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_rows_of_a_list_lie_where_json_says(
  tmp_path, monkeypatch, rows, indent, ascii_only, piece, around
):
  monkeypatch.setattr(llava_file, 'PIECE', piece)
  text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
  data = (around + text + around.strip('\ufeff')).encode(errors='replace')
  wanted = json.loads(data.decode('utf-8-sig'))
  found = rows_of(opened(tmp_path, data))
  assert json.dumps(found) == json.dumps(wanted)


def test_quotes_and_backslashes_do_not_end_a_row(tmp_path):
  texts = ['\\', '"', '\\"', '"]}', '[{,', '\\\\"', '\n\\', ',"', 'é\\u005c']
  rows = [
    {'conversations': [{'from': 'user', 'value': text}]} for text in texts
  ]
  for piece in range(1, 12):
    source = opened(tmp_path, json.dumps(rows).encode())
    llava_file.PIECE, kept = piece, llava_file.PIECE
    try:
      source = opened(tmp_path, json.dumps(rows).encode())
    finally:
      llava_file.PIECE = kept
    assert [source[at].conversation[0][1] for at in range(len(texts))] == texts


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    (b'[{"a": 1}, {"b": "x]}', 'does not end'),
    (b'[{"a": 1}', 'does not end'),
    (b'[1, 2] [3]', 'something follows the list, which ends at byte 5'),
    (b'[1]\n{"id": 1}', 'something follows'),
    (gzip.compress(b'[1]'), 'is compressed: unpack it'),
    ('[1]'.encode('utf-16'), 'is UTF-16'),
    (b'PAR1', r'data\.source=hub'),
  ],
)
def test_a_file_of_anything_else_is_refused(tmp_path, data, message):
  with pytest.raises(ValueError, match=message):
    opened(tmp_path, data)


def test_a_broken_element_of_a_list_moves_no_other(tmp_path):
  good = json.dumps({'conversations': TALK[2:]}).encode()
  source = opened(
    tmp_path, b'[' + b', '.join([good, b'{"a" 1}', b'\xff', b'', good]) + b']'
  )
  assert len(source) == 5
  for at in (1, 2, 3):
    with pytest.raises(ValueError, match='not JSON'):
      source[at]
  assert source[0].conversation == source[4].conversation


@pytest.mark.parametrize(
  'line',
  [
    b'{"conversations": "\xff"}',
    b'[' * 100_000,
    b'{"id": ' + b'9' * 5000 + b'}',
    b'{',
    b'null',
    b'"text"',
    b'\x00',
  ],
)
def test_a_line_that_is_no_row_moves_no_other(tmp_path, line):
  good = json.dumps({'id': 'g', 'conversations': TALK[2:]}).encode()
  source = opened(tmp_path, b'\n'.join([good, b'', line, b' \r', good + b'\r']))
  assert len(source) == 3
  with pytest.raises(ValueError, match=r'JSON|must be an object|no text'):
    source[1]
  assert source[0].source == source[2].source == 'g'


def test_a_file_that_changes_stops_the_run(tmp_path):
  good = json.dumps({'conversations': TALK[2:]}).encode()
  source = opened(tmp_path, good)
  source._file.write_bytes(b' ' + good)
  with pytest.raises(OSError, match='was changed'):
    source[0]
  os.remove(source._file)
  with pytest.raises(FileNotFoundError):
    source[0]


def test_an_open_file_takes_bytes_a_row_and_can_be_sent(tmp_path):
  row = json.dumps({'conversations': [{'from': 'user', 'value': 'x' * 900}]})
  data = ('[' + ', '.join([row] * 20_000) + ']').encode()
  (tmp_path / 'd.json').write_bytes(data)
  tracemalloc.start()
  try:
    source = llava_file.LlavaFile(str(tmp_path / 'd.json'))
    held, _ = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert held < len(data) / 20
  again = pickle.loads(pickle.dumps(source))
  assert again[19_999] == source[19_999]
  np.testing.assert_array_equal(again._start_N, source._start_N)
