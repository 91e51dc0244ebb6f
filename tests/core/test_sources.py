import contextlib
import io
import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from lmm_sae.core import images, sources
from lmm_sae.core.records import Turn
from lmm_sae.core.sources import DataConfig

TALK = [
  {'from': 'human', 'value': '<image>\nwhat is this?'},
  {'from': 'gpt', 'value': ' a cat '},
  {'from': 'human', 'value': 'where?'},
  {'from': 'gpt', 'value': 'on the mat'},
]


def picture(path, size=(9, 7), **kwargs):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path, **kwargs)
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
  '2 images': {'image': ['1.png', '1.png'], 'conversations': TALK},
  'must be an object': ['not', 'an', 'object'],
  'its image is a int': {'image': 3, 'conversations': TALK},
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


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (DataConfig(source='llava', path='/no/where.json'), 'is no file'),
    (DataConfig(source='images', path='/no/where'), 'is no folder'),
    (DataConfig(source='images', path=''), 'is no folder'),
  ],
)
def test_a_source_that_is_not_there_is_refused(config, message):
  with pytest.raises(ValueError, match=message):
    sources.open_source(config)


@pytest.mark.parametrize(
  ('text', 'message'),
  [('[]', 'no samples'), ('', 'no samples'), ('[{', 'is not JSON')],
)
def test_an_empty_or_broken_file_is_refused(tmp_path, text, message):
  (tmp_path / 'd.json').write_text(text)
  with pytest.raises(ValueError, match=message):
    sources.open_source(DataConfig('llava', str(tmp_path / 'd.json')))


def test_a_folder_of_images_is_read_by_name(tmp_path):
  picture(tmp_path / 'b.JPG', format='jpeg')
  picture(tmp_path / 'a' / 'z.png')
  (tmp_path / 'c.png').write_bytes(b'no image')
  (tmp_path / 'notes.txt').write_text('no image either')
  source = sources.open_source(DataConfig('images', str(tmp_path)))
  names = [source.name(at) for at in range(len(source))]
  assert names == ['a/z.png', 'b.JPG', 'c.png']
  assert source[0].conversation == ()
  assert source[1].images[0].path == str(tmp_path / 'b.JPG')
  with pytest.raises(ValueError, match='cannot be read'):
    source[2]


def test_hub_needs_the_datasets_package(monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(ValueError, match=r"pip install 'lmm_sae\[data\]'"):
    sources.open_source(DataConfig('hub', 'org/name'))


class FakeRows(list):
  """As much of a `datasets.Dataset` as is used."""

  column_names = ()

  def cast_column(self, name, feature):
    assert (name, feature) == ('image', 'bytes')
    return self


@pytest.fixture
def hub(monkeypatch):
  rows = FakeRows()
  fake = types.ModuleType('datasets')
  fake.load_dataset = lambda path, split: rows
  fake.Image = lambda decode: 'bytes' if not decode else 'pixels'
  monkeypatch.setitem(sys.modules, 'datasets', fake)
  return rows


def test_hub_rows_are_read_from_bytes(hub, tmp_path):
  data = picture(tmp_path / '1.png').read_bytes()
  hub += [
    {'id': 'q', 'image': {'bytes': data}, 'conversations': TALK},
    {'id': 'r', 'image': {'bytes': data[:99]}, 'conversations': TALK},
  ]
  hub.column_names = ('id', 'image', 'conversations')
  source = sources.open_source(DataConfig('hub', 'org/name'))
  assert source[0].images[0].image.size == (9, 7)
  assert source[0].images[0].path == ''
  with pytest.raises(ValueError, match='cannot be read'):
    source[1]


def test_hub_data_of_images_alone_has_bare_prompts(hub, tmp_path):
  hub += [{'image': {'bytes': picture(tmp_path / '1.png').read_bytes()}}, {}]
  hub.column_names = ('image',)
  source = sources.open_source(DataConfig('hub', 'org/name'))
  assert source[0].conversation == ()
  with pytest.raises(ValueError, match='neither'):
    source[1]


@pytest.mark.parametrize('mode', ['L', 'P', 'CMYK', 'RGBA', '1', 'I;16'])
def test_images_of_any_mode_become_rgb(mode):
  assert images.upright(Image.new(mode, (5, 3))).mode == 'RGB'


def test_images_are_turned_as_their_exif_tag_says(tmp_path):
  path = tmp_path / 'turned.jpg'
  exif = Image.Exif()
  exif[0x0112] = 6  # a quarter turn
  picture(path, (9, 7), exif=exif)
  assert images.load(path).size == (7, 9)


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
  frames = [Image.new('RGB', (5, 4), c) for c in ('red', 'blue')]
  frames[0].save(tmp_path / 'm.gif', save_all=True, append_images=frames[1:])
  assert images.load(tmp_path / 'm.gif').getpixel((0, 0)) == (255, 0, 0)


def test_a_side_that_boxes_cannot_count_is_refused():
  with pytest.raises(ValueError, match='between 1 and 32767'):
    images.upright(Image.new('1', (40_000, 1)))


@pytest.mark.filterwarnings('ignore')  # Pillow says what it repairs
@pytest.mark.parametrize('kind', ['png', 'jpeg', 'gif', 'webp', 'bmp', 'tiff'])
def test_a_torn_or_spoilt_file_is_read_or_refused(tmp_path, kind):
  rng = np.random.default_rng(1)
  whole = picture(tmp_path / 'w', (40, 30), format=kind).read_bytes()
  for _ in range(40):
    data = bytearray(whole)
    for at in rng.integers(0, len(data), 6):
      data[at] = rng.integers(256)
    torn = bytes(data[: rng.integers(len(data) + 1)])
    for spoilt in (bytes(data), torn):
      with contextlib.suppress(ValueError):  # refused, and nothing else
        assert images.load(io.BytesIO(spoilt)).mode == 'RGB'
