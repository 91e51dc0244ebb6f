"""The images that a row of a data set holds or names.

A value is a path, the bytes of a file, {bytes} or {path}, or a base64 data
address. What is none of these, or no picture, is a ValueError with the reason.
"""

import base64
import binascii
import dataclasses
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from lmm_sae.core import images


@dataclasses.dataclass(frozen=True)
class Loaded:
  """An image, RGB and upright, and its file; '' where no file holds it."""

  image: Image.Image
  path: str = ''


def load(
  values: Sequence[Any], root: pathlib.Path | None
) -> tuple[Loaded, ...]:
  """The images of a row, at most MAX_PIXELS together.

  Raises:
    ValueError: one cannot be read.
  """
  found, pixels = [], 0
  for value in values:
    found.append(_load(value, root))
    pixels += found[-1].image.width * found[-1].image.height
    if pixels > images.MAX_PIXELS:
      raise ValueError(
        f'its images have {pixels} pixels and more; at most '
        f'{images.MAX_PIXELS} are read'
      )
  return tuple(found)


def _load(value: Any, root: pathlib.Path | None) -> Loaded:
  if isinstance(value, Mapping):
    if isinstance(value.get('bytes'), str):  # as JSON holds them
      value = _base64(value['bytes'])
    elif value.get('bytes') is not None:
      value = value['bytes']
    elif value.get('path') is not None:
      value = value['path']
    else:
      raise ValueError('an image of it has neither bytes nor a path')
  if isinstance(value, bytes | bytearray):
    return Loaded(images.load(io.BytesIO(value)))
  if not isinstance(value, str):
    raise ValueError(f'an image of it is {kind_of(value)}, not a path')
  if value.startswith('data:'):
    return Loaded(images.load(io.BytesIO(_data_url(value))))
  path = within(root, value)
  return Loaded(images.load(path), path)


def within(root: pathlib.Path | None, name: str) -> str:
  """The absolute path of a file that a row names; it must lie in `root`.

  What rows name comes from others: a path out of the folder that the user gave
  would let them have any picture of this machine read, stored and sent on.
  Links below the folder are the user's own, and followed.

  Raises:
    ValueError: it does not lie there.
  """
  shown = ascii(name)[1:-1][:200]
  if '://' in name:
    raise ValueError(f'image {shown} is an address; none is fetched')
  if not name:
    raise ValueError('an image of it has an empty path')
  if root is None:
    raise ValueError(
      f'image {shown} is a path, without bytes: set data.image_root to the '
      'folder of the images'
    )
  path = os.path.normpath(os.path.join(root, name))
  if path != str(root) and not path.startswith(os.path.join(root, '')):
    raise ValueError(
      f'image {shown} lies outside {root}: set data.image_root to a folder '
      'that holds all images'
    )
  return path


def _data_url(value: str) -> bytes:
  head, comma, body = value.partition(',')
  if not comma or not head.endswith(';base64'):
    raise ValueError(f'image {ascii(head)[:80]} is no base64 data address')
  return _base64(body)


def _base64(text: str) -> bytes:
  try:
    return base64.b64decode(text, validate=True)
  except (binascii.Error, ValueError) as error:
    raise ValueError(f'its image is no base64: {error}') from error


def kind_of(value: Any) -> str:
  """What a value is, for a reason."""
  return f'a {type(value).__name__}'
