"""Rows of every layout, and rows that are spoilt."""

import base64
import contextlib
import copy
import io
import json
import os

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from lmm_sae.core import images, items
from lmm_sae.core.items import Item
from lmm_sae.core.records import Turn


def png(size=(3, 2)):
  file = io.BytesIO()
  Image.new('RGB', size, (9, 8, 7)).save(file, 'png')
  return file.getvalue()


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  folder = tmp_path_factory.mktemp('pics')
  for number, size in enumerate([(3, 2), (5, 4), (7, 6)]):
    (folder / f'{number}.png').write_bytes(png(size))
  (folder / 'sub').mkdir()
  (folder / 'sub' / 'x.png').write_bytes(png())
  (folder.parent / 'out.png').write_bytes(png())
  return folder


def talk(*values):
  roles = ('human', 'gpt')
  return [
    {'from': roles[at % 2], 'value': value} for at, value in enumerate(values)
  ]


def sizes(item):
  return [loaded.image.size for loaded in item.images]


def test_a_row_of_llava_next(root):
  row = {
    'id': '000000033471',
    'image': '1.png',
    'conversations': talk('<image>\nWhat?', 'A bus.', 'Where?', 'There.'),
    'data_source': 'sharegpt4v(coco)',
  }
  found = items.item(row, '7', root)
  assert found.source == '000000033471'
  assert sizes(found) == [(5, 4)]
  assert found.images[0].path == str(root / '1.png')
  assert found.conversation == (
    ('user', '<image>\nWhat?'),
    ('assistant', 'A bus.'),
    ('user', 'Where?'),
    ('assistant', 'There.'),
  )
  assert found.turns == (
    Turn('', 'What?', 'A bus.'),
    Turn('', 'Where?', 'There.'),
  )
  assert not found.raw


def test_a_system_turn_is_kept_and_asks_nothing():
  row = {
    'conversations': [{'from': 'system', 'value': 'Be brief.'}, *talk('a', 'b')]
  }
  found = items.item(row, '7', None)
  assert [role for role, _ in found.conversation] == [
    'system',
    'user',
    'assistant',
  ]
  assert found.turns == (Turn('', 'a', 'b'),)
  assert found.source == '7'


def test_columns_of_turns_are_turned_on_their_side():
  row = {'conversations': {'from': ['human', 'gpt'], 'value': ['a', 'b']}}
  found = items.item(row, '', None)
  assert found.conversation == (('user', 'a'), ('assistant', 'b'))
  row['conversations']['value'].append('c')
  with pytest.raises(ValueError, match='differ in length'):
    items.item(row, '', None)


@pytest.mark.parametrize('field', ['image', 'images'])
def test_several_images_may_stand_in_any_turn(root, field):
  row = {
    field: ['2.png', {'path': '0.png'}, {'bytes': png((8, 9)), 'path': 'no'}],
    'conversations': talk('one <image> and', 'like <image>', 'or', '<image>'),
  }
  found = items.item(row, '', root)
  assert sizes(found) == [(7, 6), (3, 2), (8, 9)]
  assert [each.path for each in found.images] == [
    str(root / '2.png'),
    str(root / '0.png'),
    '',
  ]
  assert found.turns == (
    Turn('', 'one  and', 'like <image>'),
    Turn('', 'or', '<image>'),
  )


def test_images_that_none_names_come_before_the_first_question(root):
  row = {'images': ['0.png', '1.png'], 'conversations': talk('what?', 'cats')}
  row['conversations'].insert(0, {'from': 'system', 'value': 's'})
  found = items.item(row, '', root)
  assert found.conversation[1] == ('user', '<image>\n<image>\nwhat?')
  assert found.turns == (Turn('', 'what?', 'cats'),)


def test_messages_with_texts(root):
  row = {
    'messages': [
      {'role': 'user', 'content': '<image>what?'},
      {'role': 'assistant', 'content': 'a cat'},
    ],
    'image': '0.png',
  }
  found = items.item(row, '', root)
  assert found.conversation == (
    ('user', '<image>what?'),
    ('assistant', 'a cat'),
  )
  assert sizes(found) == [(3, 2)]


def parts(*contents):
  roles = ('user', 'assistant')
  return [
    {'role': roles[at % 2], 'content': content}
    for at, content in enumerate(contents)
  ]


def text(words):
  return {'type': 'text', 'text': words, 'index': None}


def test_parts_take_the_row_s_images_in_order(root):
  row = {
    'messages': parts(
      [{'type': 'image'}, text('what? '), 'and '],
      [text('a cat')],
      [text('or'), {'type': 'image'}],
    ),
    'images': ['1.png', '0.png'],
  }
  found = items.item(row, '', root)
  assert sizes(found) == [(5, 4), (3, 2)]
  assert found.conversation == (
    ('user', '<image>\nwhat? and '),
    ('assistant', 'a cat'),
    ('user', 'or<image>'),
  )


def test_parts_may_say_which_image_or_hold_it(root):
  address = 'data:image/png;base64,' + base64.b64encode(png((4, 4))).decode()
  row = {
    'messages': parts(
      [
        {'type': 'image', 'index': 1},
        {'type': 'image', 'index': 0, 'text': None},
        {'type': 'image_url', 'image_url': {'url': address}},
        {'type': 'image', 'image': '2.png'},
        {'type': 'image', 'bytes': png((6, 1))},
        {'image': {'bytes': address.partition(',')[2]}, 'type': 'image'},
        text('which?'),
      ]
    ),
    'images': ['1.png', '0.png'],
  }
  assert sizes(items.item(row, '', root)) == [
    (3, 2),
    (5, 4),
    (4, 4),
    (7, 6),
    (6, 1),
    (4, 4),
  ]


def test_a_text_is_raw():
  found = items.item({'id': 4, 'text': 'Once upon'}, '', None)
  assert found == Item('4', (), (('user', 'Once upon'),), raw=True)


def test_the_first_layout_that_is_not_null_counts():
  row = {'conversations': None, 'messages': parts('hi'), 'text': None}
  assert items.item(row, '', None).conversation == (('user', 'hi'),)


@pytest.mark.parametrize(
  ('value', 'shown'),
  [(5, '5'), (0.5, '0.5'), ('a\ud800', r'a\ud800'), (None, 'n'), ({}, 'n')],
)
def test_an_id_is_something_to_show(value, shown):
  row = {'id': value, 'conversations': talk('a', 'b')}
  assert items.item(row, 'n', None).source == shown
  assert len(items.identity({'id': 'x' * 10**6}, 'n')) == items.MAX_NAME


A = talk('a', 'b')
BAD = {
  'a row must be an object, not a list': [],
  'it has no conversations, messages or text': {},
  'they are empty, or no list': {'conversations': []},
  'are empty, or no list': {'conversations': 'hi'},
  'is a str, no object': {'conversations': ['hi']},
  "role 'robot' is none of human": {
    'conversations': [{'from': 'robot', 'value': 'a'}]
  },
  'role None is none': {'conversations': [{'value': 'a'}]},
  r'role \[\] is none': {'conversations': [{'from': [], 'value': 'a'}]},
  'it is a NoneType, no text': {'conversations': [{'from': 'human'}]},
  'it is a list, no text': {'conversations': talk(['a'])},
  'assistant speaks first': {'conversations': talk('a', 'b')[1:]},
  'nobody speaks first': {'conversations': [{'from': 'system', 'value': 'a'}]},
  'turn 1 of its conversation, of the assistant, is empty': {
    'conversations': talk('a', ' \n')
  },
  'is no Unicode text: surrogates': {'conversations': talk('a \ud800 b')},
  'longer than 1000000 characters': {'conversations': talk('a' * 1_000_001)},
  '1 <image> for 0 images': {'conversations': talk('<image>')},
  '1 <image> for 2 images': {
    'image': ['0.png', '1.png'],
    'conversations': talk('<image> a'),
  },
  '2 <image> for 1 images': {
    'image': '0.png',
    'conversations': talk('<image> a', '<image>'),
  },
  'both image and images': {'image': 'a', 'images': ['b'], 'text': 'a'},
  'an image of it is a int': {'image': 5, 'conversations': A},
  'an image of it is a NoneType': {'image': [None, 'a'], 'conversations': A},
  'neither bytes nor a path': {'image': {'bytes': None}, 'conversations': A},
  'has no bytes': {'image': {'bytes': b''}, 'conversations': A},
  'is none of AVIF': {'image': {'bytes': b'<svg>' * 9}, 'conversations': A},
  'does not exist': {'image': 'gone.png', 'conversations': A},
  'is a folder': {'image': 'sub', 'conversations': A},
  'that is no path: embedded null': {'image': 'a\0.png', 'conversations': A},
  'lies outside': {'image': '../out.png', 'conversations': A},
  'out.png lies outside': {'image': 'sub/../../out.png', 'conversations': A},
  'hosts lies outside': {'image': '/etc/hosts', 'conversations': A},
  'is an address; none is fetched': {
    'image': 'http://127.0.0.1/a.png',
    'conversations': A,
  },
  'is no base64 data address': {'image': 'data:image/png', 'conversations': A},
  'image is no base64': {'image': {'bytes': 'a/b.png'}, 'conversations': A},
  'its image is no base64': {
    'image': 'data:image/png;base64,a!',
    'conversations': A,
  },
  "a part of type 'video' is neither": {'messages': parts([{'type': 'video'}])},
  'a part of type None is neither': {'messages': parts([5])},
  'a part names image 0 of the 0 images': {
    'messages': parts([{'type': 'image'}])
  },
  'a part names image 7 of the 1': {
    'messages': parts([{'type': 'image', 'index': 7}]),
    'image': '0.png',
  },
  'a part names image -1 of the 1': {
    'messages': parts([{'type': 'image', 'index': -1}]),
    'image': '0.png',
  },
  "index 'x' of a part": {
    'messages': parts([{'type': 'image', 'index': 'x'}]),
    'image': '0.png',
  },
  '1 of its 2 images are not named': {
    'messages': parts([{'type': 'image'}]),
    'images': ['0.png', '1.png'],
  },
}


@pytest.mark.parametrize('reason', BAD)
def test_a_bad_row_says_why(root, reason):
  with pytest.raises(ValueError, match=reason):
    items.item(BAD[reason], 'row', root)


def test_paths_need_a_root():
  row = {'image': '0.png', 'conversations': A}
  with pytest.raises(ValueError, match=r'set data\.image_root'):
    items.item(row, '', None)


def test_an_absolute_path_below_the_root_is_read(root):
  row = {'image': str(root / 'sub' / '..' / '2.png'), 'conversations': A}
  assert items.item(row, '', root).images[0].path == str(root / '2.png')
  link = root / 'link.png'
  os.symlink(root.parent / 'out.png', link)
  try:  # the user's own
    row['image'] = 'link.png'
    assert sizes(items.item(row, '', root)) == [(3, 2)]
  finally:
    link.unlink()


def test_images_of_a_row_are_bounded_together(root, monkeypatch):
  monkeypatch.setattr(images, 'MAX_PIXELS', 100)
  row = {'image': ['2.png'] * 3, 'conversations': A}
  with pytest.raises(ValueError, match='126 pixels and more; at most 100'):
    items.item(row, '', root)


def test_a_row_of_images_alone_has_a_bare_prompt(root):
  found = items.bare({'id': 'q', 'image': '1.png', 'text': 'x'}, '0', root)
  assert (found.source, found.conversation, found.turns) == ('q', (), ())
  with pytest.raises(ValueError, match='neither conversations nor an image'):
    items.bare({'image': None}, '0', root)


GOOD = [
  {'id': 'a', 'image': '0.png', 'conversations': talk('<image>\nwhat?', 'b')},
  {'images': ['0.png', {'bytes': png()}], 'conversations': talk('a', 'b', 'c')},
  {
    'messages': parts([{'type': 'image'}, text('a')], 'b', [text('c')]),
    'image': [{'path': '1.png', 'bytes': None}],
  },
  {'text': 'a', 'image': None},
]
odd = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | st.binary(max_size=20)
  | st.text(max_size=9)
  | st.characters(categories=['Cs'])
  | st.sampled_from(
    ['0.png', '../out.png', '/', '.', '<image>', 'user', 'text', 'image', '\0']
  ),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(
      st.sampled_from(
        ['from', 'value', 'role', 'content', 'type', 'bytes', 'path', 'url']
      ),
      inner,
      max_size=3,
    )
  ),
  max_leaves=6,
)


def places(value, path=()):
  """The paths of all that stands in a row."""
  yield path
  if isinstance(value, dict | list):
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
      yield from places(inner, (*path, key))


@hypothesis.given(row=st.sampled_from(GOOD), data=st.data())
@hypothesis.settings(
  deadline=None,
  max_examples=200,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_a_spoilt_row_is_an_item_or_a_reason(root, row, data):
  row = copy.deepcopy(row)
  for _ in range(data.draw(st.integers(1, 3))):
    path = data.draw(st.sampled_from(list(places(row))))
    if not path:
      continue
    inner = row
    for key in path[:-1]:
      inner = inner[key]
    inner[path[-1]] = data.draw(odd)
  try:
    found = items.item(row, 'row', root)
  except ValueError as error:  # refused, and nothing else
    json.dumps(str(error), ensure_ascii=False).encode()
  else:
    named = sum(words.count(items.IMAGE) for _, words in found.conversation)
    assert named == len(found.images)
    assert all(np.asarray(each.image).ndim == 3 for each in found.images)
    assert all(words.encode().strip() for _, words in found.conversation)


@hypothesis.given(value=odd)
@hypothesis.settings(
  deadline=None,
  max_examples=100,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_anything_at_all_is_an_item_or_a_reason(root, value):
  for row in (value, {'image': value}, {'images': [value], 'text': 'a'}):
    with contextlib.suppress(ValueError):
      items.item(row, 'row', root)
    if isinstance(row, dict):
      with contextlib.suppress(ValueError):
        items.bare(row, 'row', root)
