"""Pictures from files: upright, RGB, whole, or a reason why not.

What is returned is what a viewer shows of the first frame: turned as its EXIF
tag says, CMYK and palettes converted, more than 8 bits scaled down. Colour
profiles are not applied, and transparency is dropped, both as the subjects' own
processors do.
"""

import errno
import functools
import io
import os
import re
import stat
import struct
import warnings
import zlib
from typing import BinaryIO

import numpy as np
from PIL import Image

MAX_SIDE = 32767  # pixel boxes are stored as int16
MAX_PIXELS = 89_478_485  # where Pillow warns of a bomb; 0.3 GB of RGB
MAX_BYTES = 2**30  # of a file
MAX_NAME = 300  # characters of a path that are shown
# Those that hold pixels and nothing that is run; no guess by the suffix alone.
FORMATS = (
  *('AVIF', 'BMP', 'DIB', 'GIF', 'ICO', 'JPEG', 'JPEG2000', 'MPO', 'PNG'),
  *('PPM', 'QOI', 'TIFF', 'WEBP'),
)

ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
# What Pillow's readers raise on bytes that are not what they seem.
_BROKEN = (
  *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError),
  *(OSError, RuntimeError, SyntaxError, TypeError, ValueError),
  *(struct.error, zlib.error),
  Image.DecompressionBombError,
)
# What a name may be wrong in; any other error is the disk's or the machine's.
_NAMES = {
  errno.ENOENT: 'does not exist',
  errno.ENOTDIR: 'does not exist',
  errno.EISDIR: 'is a folder',
  errno.EACCES: 'may not be read by this user',
  errno.EPERM: 'may not be read by this user',
  errno.ENAMETOOLONG: 'has too long a name',
  errno.ELOOP: 'is a link in a circle',
  errno.ENXIO: 'is no regular file',
}

_QUIET = ('ignore', None, Warning, re.compile(r'PIL\.'), 0)


def load(file: str | os.PathLike | BinaryIO) -> Image.Image:
  """The image of a file, or of its bytes: see `upright`.

  Raises:
    ValueError: it is missing, broken, or too large.
    OSError: the disk or the machine fails, which is no fault of the image.
  """
  if isinstance(file, str | os.PathLike):
    name, data = f'image {_shown(file)}', read(file)
  else:
    name, data = 'image in the data', file.read()
  if not data:
    raise ValueError(f'{name} has no bytes')
  # Pillow says what it repairs; here a picture is had, or refused. To add the
  # filter anew each time would let others' warnings be shown again and again.
  if _QUIET not in warnings.filters:
    warnings.filterwarnings('ignore', module=_QUIET[3].pattern)
  try:
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
      _check_size(image)  # before anything is decoded
      return upright(image)
  except Image.UnidentifiedImageError:
    raise ValueError(
      f'{name} cannot be read: it is none of {", ".join(FORMATS)}, or its '
      'beginning is broken'
    ) from None
  except _BROKEN as error:
    why = str(error) or type(error).__name__
    raise ValueError(f'{name} cannot be read: {why}') from error


def upright(image: Image.Image) -> Image.Image:
  """RGB pixels of an image's first frame, turned as its EXIF tag says.

  16-bit greys keep their high bytes. Greys of 32 bits and floats have no fixed
  white: it is 65535 (floats: the least of 1, 255 and 65535) where no value is
  negative or above it, else values are scaled between their extremes.

  Raises:
    ValueError: its size, or a value that is not finite.
  """
  _check_size(image)
  image.load()  # some readers turn the image by themselves, and drop the tag
  turn = _TURNS.get(_orientation(image))
  if image.mode in ('I', 'F') or image.mode.startswith('I;16'):
    image = _grey(image)
  image = image.convert('RGB')
  _check_size(image)
  return image if turn is None else image.transpose(turn)


def read(path: str | os.PathLike) -> bytes:
  """The bytes of a regular file.

  Raises:
    ValueError: the name is wrong, or the file larger than MAX_BYTES.
    OSError: the disk fails.
  """
  name = f'image {_shown(path)}'
  try:
    os.fspath(path).encode()
  except UnicodeEncodeError:  # no record of a sample could name it
    raise ValueError(f'{name}: that is no path in UTF-8: rename it') from None
  try:
    # a pipe that nobody writes to would keep a plain open() waiting
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  except OSError as error:
    if error.errno not in _NAMES:
      raise
    raise ValueError(f'{name} {_NAMES[error.errno]}') from None
  except ValueError as error:  # a NUL, or a lone surrogate
    raise ValueError(f'{name}: that is no path: {error}') from None
  try:
    facts = os.fstat(handle)
    if stat.S_ISDIR(facts.st_mode):
      raise ValueError(f'{name} is a folder')
    if not stat.S_ISREG(facts.st_mode):
      raise ValueError(f'{name} is no regular file')
    if facts.st_size > MAX_BYTES:
      raise ValueError(
        f'{name} has {facts.st_size} bytes; at most {MAX_BYTES} are read'
      )
    with open(handle, 'rb', closefd=False) as file:
      return file.read()
  finally:
    os.close(handle)


def _shown(path: str | os.PathLike) -> str:
  """A path for people: never long, and always text."""
  text = os.fspath(path)
  text = text if len(text) <= MAX_NAME else f'{text[:MAX_NAME]}...'
  return text.encode('utf-8', 'backslashreplace').decode()


def _check_size(image: Image.Image) -> None:
  width, height = image.size
  if max(width, height) > MAX_SIDE or min(width, height) < 1:
    raise ValueError(
      f'image of {width} x {height} pixels: sides must be between 1 and '
      f'{MAX_SIDE}'
    )
  if width * height > MAX_PIXELS:
    raise ValueError(
      f'image of {width} x {height} pixels: at most {MAX_PIXELS} are read'
    )


@functools.cache
def _formats() -> tuple[str, ...]:
  """Those of FORMATS that this Pillow was built with."""
  Image.init()
  return tuple(name for name in FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> object:
  """The EXIF tag; 1 where EXIF is broken, as a viewer takes it."""
  try:
    return image.getexif().get(ORIENTATION, 1)
  except _BROKEN:
    return 1


def _grey(image: Image.Image) -> Image.Image:
  """Values of more than 8 bits as an 8-bit image."""
  value_HW = np.asarray(image)
  if image.mode.startswith('I;16'):
    return Image.fromarray((value_HW >> 8).astype(np.uint8))
  if not np.isfinite(value_HW).all():
    raise ValueError('some of its values are not finite')
  value_HW = value_HW.astype(np.float64)
  low, high = value_HW.min(), value_HW.max()
  whites = [65535.0] if image.mode == 'I' else [1.0, 255.0, 65535.0]
  fits = [white for white in whites if low >= 0 and high <= white]
  if fits:
    low, high = 0.0, fits[0]
  scaled_HW = (value_HW - low) * (255 / max(high - low, 1e-30))
  return Image.fromarray(np.rint(scaled_HW).astype(np.uint8))
