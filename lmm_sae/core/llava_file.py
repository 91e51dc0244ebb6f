"""JSON and JSON-lines files whose rows stay on disk.

A file of a million rows is read once, to find where each row begins; rows are
parsed when they are asked for. An open file is 8 bytes a row, and can be
pickled.
"""

import array
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from lmm_sae.core.items import Item, item

PIECE = 2**22  # bytes scanned at a time
MAX_ROW = 2**28  # bytes of one row
_SPACE = b' \t\r\n'
_BOM = b'\xef\xbb\xbf'
# Files that are taken for JSON by mistake, by their first bytes.
_OTHERS = {
  b'\x1f\x8b': 'compressed: unpack it',
  b'\x28\xb5\x2f\xfd': 'compressed: unpack it',
  b'PK\3\4': 'an archive: unpack it',
  b'PAR1': 'parquet: that is data.source=hub',
  b'\xff\xfe': 'UTF-16: write it as UTF-8',
  b'\xfe\xff': 'UTF-16: write it as UTF-8',
}

# What is looked at outside strings: how much deeper each byte leads.
_STEP = np.zeros(256, np.int8)
_STEP[list(b'[{')] = 1
_STEP[list(b']}')] = -1
_MARKS = np.zeros(256, bool)
_MARKS[list(b'"[]{},')] = True


class LlavaFile:
  """A JSON list, or JSON lines, of rows: see `items.item`.

  Images are relative to `image_root`, or else to the file, and lie below it.
  `content` is the file's digest; what the images hold is not in it.
  """

  blocks = None

  def __init__(self, path: str, image_root: str = ''):
    file = pathlib.Path(path).expanduser().absolute()
    if not path or not file.is_file():
      raise ValueError(
        f'data.path {path!r} is no file: give a JSON or JSONL file in LLaVA '
        'format'
      )
    self._file = file
    self._root = folder(image_root or str(file.parent))
    with open(file, 'rb') as opened:
      self._facts = _facts(opened)
      self.content = hashlib.file_digest(opened, 'sha256').hexdigest()
      opened.seek(0)
      head = opened.read(4)
      for magic, what in _OTHERS.items():
        if head.startswith(magic):
          raise ValueError(f'data.path {path} is {what}')
      start = len(_BOM) if head.startswith(_BOM) else 0
      opened.seek(start)
      first = _first(opened)
      opened.seek(start)
      if first == b'[':
        self._start_N, self._stop_N = elements(opened, str(file))
      else:
        self._start_N, self._stop_N = _lines(opened)

  def __len__(self) -> int:
    return len(self._start_N)

  def __getitem__(self, index: int) -> Item:
    start, stop = int(self._start_N[index]), int(self._stop_N[index])
    if stop - start > MAX_ROW:
      raise ValueError(
        f'it has {stop - start} bytes; at most {MAX_ROW} are read'
      )
    with open(self._file, 'rb') as opened:
      if _facts(opened) != self._facts:
        raise OSError(f'{self._file} was changed while it was read')
      opened.seek(start)
      data = opened.read(stop - start)
    try:
      row = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
      raise ValueError(f'not JSON: {error}') from error
    return item(row, str(index), self._root)

  def name(self, index: int) -> str:
    return f'row {index}'


def folder(image_root: str) -> pathlib.Path:
  """The folder that rows' paths are relative to, absolute.

  Raises:
    ValueError: there is none.
  """
  root = pathlib.Path(image_root).expanduser()
  if not root.is_dir():
    raise ValueError(f'data.image_root {image_root!r} is no folder')
  return pathlib.Path(os.path.normpath(root.absolute()))


def elements(opened: BinaryIO, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Where the elements of the JSON list in a file begin and end, in bytes.

  Only strings and brackets are looked at: an element that is no JSON moves no
  other, unless its brackets or quotes are not closed.

  Returns:
    int64 [N] each.

  Raises:
    ValueError: the list does not end, or something follows it.
  """
  cuts, end = [], -1  # bytes of '[', of the commas, and of ']'
  depth = quotes = 0
  for at, piece in _pieces(opened):
    data_B = np.frombuffer(piece, np.uint8)
    if end >= 0:
      rest = piece
    else:
      place_S = np.flatnonzero(_MARKS[data_B])
      byte_S = data_B[place_S]
      quote_S = byte_S == ord('"')
      within_S = (quotes + np.cumsum(quote_S)) % 2 == 1
      quotes += int(quote_S.sum())
      place_S, byte_S = place_S[~within_S], byte_S[~within_S]
      depth_S = depth + np.cumsum(_STEP[byte_S], dtype=np.int64)
      closed = np.flatnonzero((depth_S <= 0) & (_STEP[byte_S] < 0))
      if len(closed):
        end = at + int(place_S[closed[0]])
        rest = piece[end - at + 1 :]
        place_S, byte_S = place_S[: closed[0]], byte_S[: closed[0]]
        depth_S = depth_S[: closed[0]]
      else:
        rest = b''
      depth = int(depth_S[-1]) if len(depth_S) else depth
      cut_S = (depth_S == 1) & (byte_S == ord(','))
      if not cuts and len(cut_S):  # the list's own bracket
        cut_S[0] = True
      if cut_S.any():
        cuts.append(at + place_S[cut_S].astype(np.int64))
    if rest.strip(_SPACE):
      raise ValueError(
        f'data.path {name} is not JSON: something follows the list, which '
        f'ends at byte {end}'
      )
  if end < 0:
    raise ValueError(
      f'data.path {name} is not JSON: the list that it begins with does not end'
    )
  cut_N = np.concatenate(cuts)
  start_N, stop_N = cut_N + 1, np.append(cut_N[1:], end)
  if len(cut_N) == 1:
    opened.seek(start_N[0])
    if not opened.read(int(stop_N[0] - start_N[0])).strip(_SPACE):
      return start_N[:0], stop_N[:0]
  return start_N, stop_N


def _pieces(opened: BinaryIO) -> Iterator[tuple[int, bytes]]:
  r"""(offset, bytes) of a file, every escape (\\ or \") written over.

  What is written over keeps its length; no piece ends within an escape.
  """
  at = opened.tell()
  while piece := opened.read(PIECE):
    while piece.endswith(b'\\') and (more := opened.read(1)):
      piece += more
    yield at, piece.replace(b'\\\\', b'__').replace(b'\\"', b'__')
    at += len(piece)


def _lines(opened: BinaryIO) -> tuple[np.ndarray, np.ndarray]:
  """Where the lines that are not blank begin and end, in bytes."""
  starts, stops = array.array('q'), array.array('q')
  at = opened.tell()
  for line in opened:
    if not line.isspace():
      starts.append(at)
      stops.append(at + len(line))
    at += len(line)
  return np.array(starts, np.int64), np.array(stops, np.int64)


def _first(opened: BinaryIO) -> bytes:
  """The first byte that is not space."""
  while piece := opened.read(PIECE):
    if found := piece.lstrip(_SPACE):
      return found[:1]
  return b''


def _facts(opened: BinaryIO) -> tuple[int, int]:
  facts = os.fstat(opened.fileno())
  return facts.st_size, facts.st_mtime_ns
