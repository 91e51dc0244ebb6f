"""A folder of pictures, each a sample with a bare prompt."""

import hashlib
import os
import pathlib

from lmm_sae.core import images
from lmm_sae.core.items import Item
from lmm_sae.core.row_images import Loaded

# Written out, so that every machine counts the same files.
SUFFIXES = (
  *('.apng', '.avif', '.avifs', '.bmp', '.dib', '.gif', '.ico', '.j2c', '.j2k'),
  *('.jfif', '.jp2', '.jpc', '.jpe', '.jpeg', '.jpf', '.jpg', '.jpx', '.mpo'),
  *('.pbm', '.pgm', '.png', '.pnm', '.ppm', '.qoi', '.tif', '.tiff', '.webp'),
)
ARCHIVES = ('.7z', '.bz2', '.gz', '.rar', '.tar', '.tgz', '.xz', '.zip', '.zst')


class ImageFolder:
  """Every image below a folder, in order of name.

  Hidden files and folders are passed over, and folders that are links.
  `content` is a digest of the names.
  """

  blocks = None

  def __init__(self, path: str):
    root = pathlib.Path(path).expanduser().absolute()
    if path and root.is_file():
      more = ': unpack it' * (root.suffix.lower() in ARCHIVES)
      raise ValueError(
        f'data.path {path!r} is a file, no folder of images{more}'
      )
    if not path or not root.is_dir():
      raise ValueError(f'data.path {path!r} is no folder of images')
    self._root = str(root)
    names = sorted(_names(self._root))
    self._files = [
      os.path.join(*name)
      for name in names
      if name[-1].lower().endswith(SUFFIXES)
    ]
    listed = os.fsencode('\0'.join(self._files))
    self.content = hashlib.sha256(listed).hexdigest()
    archives = [name[-1] for name in names if name[-1].endswith(ARCHIVES)]
    if archives and not self._files:
      raise ValueError(
        f'data.path {path} holds no images, but {archives[0]}: unpack it'
      )

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Item:
    path = os.path.join(self._root, self._files[index])
    return Item(self.name(index), (Loaded(images.load(path), path),), ())

  def name(self, index: int) -> str:
    """Its path below the folder, as far as it can be shown."""
    return self._files[index].encode('utf-8', 'backslashreplace').decode()


def _names(root: str) -> list[tuple[str, ...]]:
  """The files below a folder, each as the parts of its path.

  Raises:
    OSError: a folder cannot be listed.
  """

  def refuse(error: OSError) -> None:
    raise error

  found = []
  for at, folders, files in os.walk(root, onerror=refuse):
    folders[:] = [name for name in folders if not name.startswith('.')]
    parts = () if at == root else tuple(os.path.relpath(at, root).split(os.sep))
    found += [(*parts, name) for name in files if not name.startswith('.')]
  return found
