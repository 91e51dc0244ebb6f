import os
import pickle

import numpy as np
import pytest
from PIL import Image

from lmm_sae.core import sources
from lmm_sae.core.sources import DataConfig


def picture(path, size=(9, 7), **kwargs):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path, **kwargs)
  return path


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
  [('[ ]', 'no samples'), (' \n', 'no samples'), ('[{', 'is not JSON')],
)
def test_an_empty_or_broken_file_is_refused(tmp_path, text, message):
  (tmp_path / 'd.json').write_text(text)
  with pytest.raises(ValueError, match=message):
    sources.open_source(DataConfig('llava', str(tmp_path / 'd.json')))


def test_a_folder_of_images_is_read_by_name(tmp_path):
  picture(tmp_path / 'b.JPG', format='jpeg')
  picture(tmp_path / 'a' / 'z.png')
  picture(tmp_path / 'a-b' / 'z.Tiff')
  picture(tmp_path / '.hidden' / 'z.png')
  picture(tmp_path / '.z.png')
  (tmp_path / 'd.png').mkdir()
  (tmp_path / 'c.png').write_bytes(b'no image')
  (tmp_path / 'notes.txt').write_text('no image either')
  source = sources.open_source(DataConfig('images', str(tmp_path)))
  names = [source.name(at) for at in range(len(source))]
  assert names == ['a/z.png', 'a-b/z.Tiff', 'b.JPG', 'c.png']
  assert source[0].conversation == ()
  assert source[2].images[0].path == str(tmp_path / 'b.JPG')
  with pytest.raises(ValueError, match='cannot be read'):
    source[3]
  again = pickle.loads(pickle.dumps(source))
  assert again[0].images[0].image == source[0].images[0].image


def test_a_name_that_is_no_text_is_shown_escaped(tmp_path):
  picture(tmp_path / 'z.png').rename(tmp_path / os.fsdecode(b'\xff.png'))
  source = sources.open_source(DataConfig('images', str(tmp_path)))
  assert source.name(0) == source[0].source == r'\udcff.png'


def test_archives_are_to_be_unpacked(tmp_path):
  (tmp_path / 'pics.zip').write_bytes(b'PK')
  for path in (tmp_path, tmp_path / 'pics.zip'):
    with pytest.raises(ValueError, match='unpack it'):
      sources.open_source(DataConfig('images', str(path)))


def test_a_folder_without_images_is_refused(tmp_path):
  with pytest.raises(ValueError, match='holds no samples'):
    sources.open_source(DataConfig('images', str(tmp_path)))


def test_content_tells_data_apart_wherever_they_lie(tmp_path):
  def llava(folder, text):
    path = tmp_path / folder / 'd.jsonl'
    path.parent.mkdir()
    path.write_text(text)
    return sources.open_source(DataConfig('llava', str(path))).content

  def images(folder, name):
    picture(tmp_path / folder / name)
    return sources.open_source(
      DataConfig('images', str(tmp_path / folder))
    ).content

  found = [llava(name, text) for name, text in zip('abc', 'xxy', strict=True)]
  assert found[0] == found[1] != found[2]
  found = [images('d', 'x.png'), images('e', 'x.png'), images('f', 'y.png')]
  assert found[0] == found[1] != found[2]
