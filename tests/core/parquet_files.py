"""Small parquet files of talks and pictures."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(number: int) -> bytes:
  """A picture that is `number` + 1 wide."""
  file = io.BytesIO()
  Image.new('RGB', (number + 1, 2), (number, 8, 7)).save(file, 'png')
  return file.getvalue()


def row(number: int) -> dict:
  """A row of LLaVA-NeXT's data set; its picture is `number` + 1 wide."""
  return {
    'id': f'n{number}',
    'image': {'bytes': png(number), 'path': f'{number}.png'},
    'conversations': [
      {'from': 'human', 'value': f'<image>\nwhat is {number}?'},
      {'from': 'gpt', 'value': f'it is {number}'},
    ],
    'data_source': 'x' * 999,
  }


def data(rows: list[dict], group: int, **more) -> bytes:
  """A parquet file of these rows, `group` rows a row group."""
  file = io.BytesIO()
  table = pa.Table.from_pylist(rows, **more)
  pq.write_table(table, file, row_group_size=group)
  return file.getvalue()
