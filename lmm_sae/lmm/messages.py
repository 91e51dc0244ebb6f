"""The headers of requests to the subject server, checked field by field.

What they mean stands with `core.remote.SubjectClient`. A field that is unknown,
missing or of another type is refused by its name.
"""

import dataclasses
import json
from typing import Annotated, Any

import pydantic

from lmm_sae.core import records, remote

MAX_ROWS = 4096
MAX_POINTS = 256  # gradients of one request

Peaks = dict[str, dict[str, float]]
Word = str | int


def message(kind: type) -> type:
  """A frozen dataclass that takes the fields it has, and of their types."""
  config = pydantic.ConfigDict(extra='forbid', strict=True)
  return pydantic.dataclasses.dataclass(kind, config=config, frozen=True)


Edit = message(records.Edit)
_Index = Annotated[int, pydantic.Field(ge=0)]


@message
class Row(remote.GenerateRow):
  edits: tuple[Edit, ...] = ()


@message
class Generate:
  rows: Annotated[tuple[Row, ...], pydantic.Field(max_length=MAX_ROWS)]
  max_new_tokens: Annotated[int, pydantic.Field(ge=1, le=4096)]
  seed: _Index | None = None
  peaks: Peaks = dataclasses.field(default_factory=dict)


@message
class Question:
  image: int | None
  prompt: str


@message
class Residual:
  layer: int
  rows: Annotated[tuple[Question, ...], pydantic.Field(max_length=MAX_ROWS)]


@message
class Gradient:
  layer: int
  image: int | None
  prompt: str
  answer: Word
  baseline: Word
  points: Annotated[int, pydantic.Field(ge=1, le=MAX_POINTS)] = 1


@message
class Logits:
  layer: int
  image: int | None
  prompt: str
  edit_sets: Annotated[
    tuple[tuple[Edit, ...], ...], pydantic.Field(max_length=MAX_ROWS)
  ]
  answer: Word | None = None
  baseline: Word | None = None
  top: _Index = 0
  peaks: Peaks = dataclasses.field(default_factory=dict)


@message
class Loss:
  layer: int
  images: Annotated[tuple[int | None, ...], pydantic.Field(max_length=MAX_ROWS)]
  variants: tuple[str, ...]
  kinds: tuple[str, ...] = ('all',)
  given: _Index = 0


@message
class Pairs:
  images: tuple[_Index, ...]
  texts: tuple[str, ...]

  def __post_init__(self):
    if len(self.images) != len(self.texts):
      raise ValueError(
        f'{len(self.images)} images and {len(self.texts)} texts do not pair'
      )


@message
class Ground(Pairs):
  judge: str = ''
  box_threshold: float = 0.3


def read(kind: type, header: dict[str, Any]) -> Any:
  """The header as that message.

  Raises:
    ValueError: it has other fields, or values of other types.
  """
  try:
    return pydantic.TypeAdapter(kind).validate_json(json.dumps(header))
  except pydantic.ValidationError as error:
    first = error.errors(include_url=False)[0]
    place = '.'.join(str(part) for part in first['loc'])
    said = first['msg'].removeprefix('Value error, ')
    raise ValueError(f'{place}: {said}' if place else said) from error
