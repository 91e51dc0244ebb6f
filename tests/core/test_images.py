"""Images against files written byte by byte, and pixels turned by numpy."""

import contextlib
import io
import os
import struct
import warnings
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from lmm_sae.core import images

PIXELS_HW3 = (
  np.random.default_rng(3).integers(0, 256, (5, 7, 3)).astype(np.uint8)
)


def png(depth, colour, rows, palette=b'', alpha=b'', size=None, more=b''):
  """A PNG file of raw rows of bytes, not written by Pillow."""

  def chunk(kind, data):
    crc = zlib.crc32(kind + data)
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', crc)

  width, height = size
  head = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)
  parts = [b'\x89PNG\r\n\x1a\n', chunk(b'IHDR', head)]
  parts += [chunk(b'PLTE', palette)] * bool(palette)
  parts += [chunk(b'tRNS', alpha)] * bool(alpha)
  parts += [chunk(b'eXIf', more)] * bool(more)
  parts.append(chunk(b'IDAT', zlib.compress(b''.join(b'\0' + r for r in rows))))
  return b''.join([*parts, chunk(b'IEND', b'')])


def tiff(size, samples, bits, photometric, data, kind=1, orientation=1):
  """A little-endian TIFF file of one raw strip, not written by Pillow."""
  width, height = size
  tags = [
    *[(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1)],
    *[(262, 3, photometric), (273, 4, 0), (274, 3, orientation)],
    *[(277, 3, samples), (278, 4, height), (279, 4, len(data)), (339, 3, kind)],
  ]
  start = 8 + 2 + 12 * len(tags) + 4
  extra, entries = b'', b''
  for tag, type_, value in tags:
    count = samples if tag in (258, 339) else 1
    if tag == 273:
      value = start + 4 * samples  # after the two arrays
    if count > 2:
      at = start + len(extra)
      extra += struct.pack(f'<{count}H', *[value] * count)
      entries += struct.pack('<HHII', tag, type_, count, at)
    else:
      packed = struct.pack('<I' if type_ == 4 else '<H', value).ljust(4, b'\0')
      entries += struct.pack('<HHI', tag, type_, count) + packed
  extra = extra.ljust(4 * samples, b'\0')
  head = struct.pack('<2sHIH', b'II', 42, 8, len(tags))
  return head + entries + b'\0\0\0\0' + extra + data


def loaded(data):
  image = images.load(io.BytesIO(data))
  assert image.mode == 'RGB'
  return np.asarray(image)


def greys(array_HW):
  return np.repeat(np.asarray(array_HW, np.uint8)[..., None], 3, -1)


def test_png_palettes_are_their_colours_with_or_without_transparency():
  palette_C3 = PIXELS_HW3.reshape(-1, 3)[:16]
  index_HW = np.arange(35).reshape(5, 7) % 16
  rows = [bytes(row.astype(np.uint8)) for row in index_HW]
  for alpha in (b'', bytes([0, 128, 255])):
    data = png(8, 3, rows, bytes(palette_C3), alpha, (7, 5))
    np.testing.assert_array_equal(loaded(data), palette_C3[index_HW])


def test_transparency_is_dropped_as_processors_do():
  alpha_HW1 = np.arange(35, dtype=np.uint8).reshape(5, 7, 1)
  rows = [bytes(r) for r in np.concatenate([PIXELS_HW3, alpha_HW1], -1)]
  np.testing.assert_array_equal(
    loaded(png(8, 6, rows, size=(7, 5))), PIXELS_HW3
  )
  grey_HW = PIXELS_HW3[..., 0]
  both = np.stack([grey_HW, alpha_HW1[..., 0]], -1)
  data = png(8, 4, [bytes(r) for r in both], size=(7, 5))
  np.testing.assert_array_equal(loaded(data), greys(grey_HW))


def test_16_bits_keep_their_high_bytes():
  value_HW = np.random.default_rng(1).integers(0, 2**16, (5, 7))
  rows = [row.astype('>u2').tobytes() for row in value_HW]
  found = loaded(png(16, 0, rows, size=(7, 5)))
  np.testing.assert_array_equal(found, greys(value_HW >> 8))
  data = tiff((7, 5), 1, 16, 1, value_HW.astype('<u2').tobytes())
  np.testing.assert_array_equal(loaded(data), greys(value_HW >> 8))
  three_HW3 = np.stack([value_HW, value_HW[::-1], value_HW[:, ::-1]], -1)
  rows = [row.astype('>u2').tobytes() for row in three_HW3]
  found = loaded(png(16, 2, rows, size=(7, 5)))
  np.testing.assert_array_equal(found, three_HW3 >> 8)


def test_1_bit_is_black_and_white():
  bit_HW = np.random.default_rng(2).integers(0, 2, (5, 7))
  rows = [bytes(np.packbits(row)) for row in bit_HW]
  found = loaded(png(1, 0, rows, size=(7, 5)))
  np.testing.assert_array_equal(found, greys(bit_HW * 255))


@pytest.mark.parametrize(
  ('value', 'white'), [(1.0, 1.0), (200.0, 255.0), (4000.0, 65535.0)]
)
def test_floats_are_scaled_by_the_least_white_that_fits(value, white):
  value_HW = np.linspace(0, value, 35).reshape(5, 7).astype('<f4')
  found = loaded(tiff((7, 5), 1, 32, 1, value_HW.tobytes(), kind=3))
  wanted = np.rint(value_HW.astype(float) * 255 / white)
  np.testing.assert_array_equal(found, greys(wanted))


def test_floats_without_a_white_are_scaled_between_their_extremes():
  value_HW = np.linspace(-3, 5, 35).reshape(5, 7).astype('<f4')
  found = loaded(tiff((7, 5), 1, 32, 1, value_HW.tobytes(), kind=3))
  np.testing.assert_array_equal(
    found, greys(np.rint((value_HW.astype(float) + 3) * 255 / 8))
  )
  flat = np.full((5, 7), -2, '<f4').tobytes()
  assert not loaded(tiff((7, 5), 1, 32, 1, flat, kind=3)).any()
  broken = np.full((5, 7), np.nan, '<f4').tobytes()
  with pytest.raises(ValueError, match='not finite'):
    loaded(tiff((7, 5), 1, 32, 1, broken, kind=3))


def test_inks_become_light():
  inks_HW4 = np.random.default_rng(4).integers(0, 256, (5, 7, 4))
  data = tiff((7, 5), 4, 8, 5, inks_HW4.astype(np.uint8).tobytes())
  left_HW4 = 255 - inks_HW4.astype(float)
  wanted = left_HW4[..., :3] * left_HW4[..., 3:] / 255
  np.testing.assert_allclose(loaded(data), wanted, atol=1)


def test_jpegs_of_inks_are_taken_as_adobe_writes_them():
  # flat blocks: each ink's DC coefficient says what the file holds, and Adobe
  # holds 255 - ink
  cyan = np.full((8, 8, 4), (255, 0, 0, 0), np.uint8)
  file = io.BytesIO()
  Image.fromarray(cyan, 'CMYK').save(file, 'jpeg', quality=100)
  assert b'Adobe' in file.getvalue()
  assert first_dc(file.getvalue()) == -8 * 128  # 0: all the ink there is
  np.testing.assert_allclose(loaded(file.getvalue())[0, 0], (0, 255, 255))


def first_dc(data):
  """The first component's first DC coefficient of a baseline JPEG."""
  at, tables = 2, {}
  while True:
    marker, length = struct.unpack('>HH', data[at : at + 4])
    body = data[at + 4 : at + 2 + length]
    at += 2 + length
    if marker == 0xFFC4:
      while body:
        counts = body[1:17]
        tables[body[0]] = (counts, body[17 : 17 + sum(counts)])
        body = body[17 + sum(counts) :]
    if marker == 0xFFDA:
      break
  bits = ''.join(
    f'{byte:08b}' for byte in data[at:].replace(b'\xff\0', b'\xff')
  )
  counts, symbols = tables[body[2] >> 4]
  code = first = index = 0
  for length in range(1, 17):
    code = code * 2 + int(bits[length - 1])
    count = counts[length - 1]
    if code - first < count:
      size = symbols[index + code - first]
      break
    index, first = index + count, (first + count) * 2
  value = int(bits[length : length + size] or '0', 2)
  return value if value >> (size - 1) else value - 2**size + 1


UPRIGHT = {  # how pixels as stored become those that are shown
  1: lambda a: a,
  2: lambda a: a[:, ::-1],
  3: lambda a: a[::-1, ::-1],
  4: lambda a: a[::-1],
  5: lambda a: a.transpose(1, 0, 2),
  6: lambda a: a[::-1].transpose(1, 0, 2),
  7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
  8: lambda a: a[:, ::-1].transpose(1, 0, 2),
  9: lambda a: a,  # no such turn
}


@pytest.mark.parametrize('orientation', UPRIGHT)
def test_every_orientation_is_turned_upright(orientation):
  exif = struct.pack('<2sHIHHHII', b'II', 42, 8, 1, 274, 3, 1, orientation)
  exif += b'\0\0\0\0'
  rows = [bytes(row) for row in PIXELS_HW3]
  wanted = UPRIGHT[orientation](PIXELS_HW3)
  for data in (
    png(8, 2, rows, size=(7, 5), more=exif),
    tiff((7, 5), 3, 8, 2, PIXELS_HW3.tobytes(), orientation=orientation),
  ):
    np.testing.assert_array_equal(loaded(data), wanted)


def test_broken_exif_turns_nothing():
  rows = [bytes(row) for row in PIXELS_HW3]
  for exif in (b'II*\0\xff\xff\xff\xff', b'MM', b'garbage' * 9):
    data = png(8, 2, rows, size=(7, 5), more=exif)
    np.testing.assert_array_equal(loaded(data), PIXELS_HW3)


@pytest.mark.parametrize('kind', ['gif', 'png', 'tiff', 'webp', 'mpo', 'avif'])
def test_the_first_frame_is_taken(kind):
  frames = [Image.new('RGB', (24, 16), c) for c in ('red', 'blue', 'lime')]
  file = io.BytesIO()
  frames[0].save(file, kind, save_all=True, append_images=frames[1:])
  found = loaded(file.getvalue())
  assert found.shape == (16, 24, 3)
  np.testing.assert_allclose(found[8, 12], (255, 0, 0), atol=6)


@pytest.mark.parametrize(
  'mode',
  [
    *('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'RGBX', 'RGBa', 'CMYK'),
    *('YCbCr', 'HSV', 'LAB', 'I', 'F', 'I;16', 'I;16B', 'I;16L'),
  ],
)
def test_images_of_any_mode_become_rgb(mode):
  found = images.upright(Image.new(mode, (5, 3)))
  assert (found.mode, found.size) == ('RGB', (5, 3))


@pytest.mark.parametrize('size', [(40_000, 1), (1, 40_000)])
def test_a_side_that_boxes_cannot_count_is_refused(size):
  with pytest.raises(ValueError, match='between 1 and 32767'):
    images.upright(Image.new('1', size))


def test_bombs_are_refused_before_they_are_decoded(recwarn):
  for width, message in ((12_000, 'at most 89478485'), (30_000, 'read')):
    rows = [bytes(8)]  # of as many as are said
    data = png(8, 0, rows, size=(width, 12_000))
    with pytest.raises(ValueError, match=message):
      images.load(io.BytesIO(data))
  assert not recwarn.list


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda at: None, 'does not exist'),
    (lambda at: at.mkdir(), 'is a folder'),
    (lambda at: os.mkfifo(at), 'no regular file'),
    (lambda at: at.write_bytes(b''), 'has no bytes'),
    (lambda at: at.write_bytes(b'PK\3\4' * 9), 'is none of AVIF, BMP'),
    (lambda at: at.symlink_to(at), 'link in a circle'),
    (lambda at: os.truncate(os.open(at, 66), 2**30 + 1), 'at most 1073741824'),
  ],
)
def test_a_path_to_no_image_is_refused(tmp_path, make, message):
  make(tmp_path / 'x.png')
  with pytest.raises(ValueError, match=message):
    images.load(tmp_path / 'x.png')


@pytest.mark.parametrize(
  'name', ['a\0b', 'a' * 300, 'x/' * 3000, '\ud800', 'x\udc80']
)
def test_a_name_that_is_no_path_is_refused_in_few_words(name):
  with pytest.raises(ValueError, match=r'no path|too long|not exist') as caught:
    images.load(name)
  assert len(str(caught.value).encode()) < 500


def test_a_failing_disk_is_not_the_image_s_fault(tmp_path, monkeypatch):
  def fail(*_):
    raise OSError(5, 'Input/output error')

  monkeypatch.setattr(images.os, 'open', fail)
  with pytest.raises(OSError, match='Input/output'):
    images.load(tmp_path / 'x.png')


def test_pillow_s_warnings_are_silenced_once(recwarn):
  warnings.simplefilter('error')
  palette = png(8, 3, [bytes(7)] * 5, bytes(6), bytes(2), (7, 5))
  for _ in range(3):
    loaded(palette)
    loaded(png(8, 0, [bytes(7)] * 5, size=(7, 5), more=b'II*\0' + b'\7' * 30))
    filters = list(warnings.filters)
  loaded(palette)
  assert warnings.filters == filters
  assert sum(each == images._QUIET for each in filters) == 1
  assert not recwarn.list


def written(kind):
  file = io.BytesIO()
  image = Image.fromarray(np.tile(PIXELS_HW3, (6, 6, 1)))
  exif = Image.Exif()
  exif[images.ORIENTATION] = 6
  kinds = {'tiff_lzw': ('tiff', {'compression': 'tiff_lzw'})}
  name, more = kinds.get(kind, (kind, {}))
  if kind in ('jpeg', 'png', 'webp'):
    more = {'exif': exif}
  if kind == 'gif':
    more = {'save_all': True, 'append_images': [image.rotate(90)]}
  image.save(file, name, **more)
  return file.getvalue()


KINDS = {
  kind: written(kind)
  for kind in (
    *('jpeg', 'png', 'gif', 'webp', 'bmp', 'tiff', 'tiff_lzw', 'jpeg2000'),
    *('ico', 'ppm', 'qoi', 'avif', 'mpo'),
  )
}


changes = st.lists(
  st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=8
)


def spoilt_is_a_picture_or_a_reason(kind, changes, kept, early):
  data = bytearray(KINDS[kind])
  for at, byte in changes:  # headers are short, and matter most
    data[at % (min(len(data), 200) if early else len(data))] = byte
  with contextlib.suppress(ValueError):  # refused, and nothing else
    found = images.load(io.BytesIO(bytes(data[: round(len(data) * kept)])))
    assert found.mode == 'RGB'


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.filterwarnings('error')
@hypothesis.given(changes, st.floats(0, 1) | st.just(1.0), st.booleans())
@hypothesis.settings(deadline=None, max_examples=40)
def test_spoilt_bytes_are_a_picture_or_a_reason(kind, changes, kept, early):
  spoilt_is_a_picture_or_a_reason(kind, changes, kept, early)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.filterwarnings('error')
@hypothesis.given(changes, st.floats(0, 1) | st.just(1.0), st.booleans())
@hypothesis.settings(deadline=None, max_examples=2000)
def test_thousands_of_spoilt_images_are_no_more(kind, changes, kept, early):
  spoilt_is_a_picture_or_a_reason(kind, changes, kept, early)
