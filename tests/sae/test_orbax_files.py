"""What orbax wrote, read as files: every layout, every kind of damage."""

import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as v0
import pytest
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1

from lmm_sae.sae import ocdbt, orbax_files

W_SHAPE = 8, 6


def tree():
  """Arrays split over 8 devices, of numpy, on one device; numbers; nothing."""
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('data', 'latent'))
  x = np.random.default_rng(0).normal(size=W_SHAPE).astype(np.float32)

  def lay(*spec):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

  return {
    'a': {'w': lay('latent'), 'both': lay(('data', 'latent'), None)},
    'plain': np.arange(5),
    'deep': [{'half': jax.numpy.ones(3, 'bfloat16')}],
    'count': 3,
    'rate': 2.5,
    'none': None,
    'empty': {},
  }


def standard(path):
  with v0.StandardCheckpointer() as saver:
    saver.save(path, tree())
  return path, ''


def manager(path):
  with v0.CheckpointManager(path) as saver:
    items = v0.args.Composite(
      state=v0.args.StandardSave(tree()), meta=v0.args.JsonSave({'x': [1, 2]})
    )
    saver.save(30, args=items)
  return path / '30', 'state'


def first_version_one(path):
  v1.save(path, tree())
  return path, 'state'


def without_ocdbt(path, zarr3=False):
  handler = v0.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=zarr3)
  with v0.Checkpointer(handler) as saver:
    saver.save(path, tree())
  return path, ''


def without_ocdbt_zarr3(path):
  return without_ocdbt(path, zarr3=True)


LAYOUTS = (
  standard,
  manager,
  first_version_one,
  without_ocdbt,
  without_ocdbt_zarr3,
)


@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda f: f.__name__)
def test_every_layout_gives_the_same_tree(tmp_path, layout):
  path, item = layout(tmp_path / 'saved')
  assert orbax_files.holds(path)
  folder = orbax_files.read(path)
  assert folder.processes == 1
  assert not folder.warnings
  found = {x.name: x for x in folder.arrays}
  assert {x.item for x in folder.arrays} == {item}
  prefix = f'{item}.' if item else ''
  assert folder.values == {f'{prefix}none': None, f'{prefix}empty': 'Dict'}
  want = tree()
  for name, value in (
    ('a.w', want['a']['w']),
    ('a.both', want['a']['both']),
    ('plain', want['plain']),
    ('deep.0.half', want['deep'][0]['half']),
    ('count', np.array(3)),
    ('rate', np.array(2.5)),
  ):
    array = found.pop(name)
    value = np.asarray(value)
    assert (array.shape, array.dtype) == (value.shape, value.dtype.name)
    assert array.nbytes == value.nbytes
    assert array.stored > 0
    got = array.read()
    if got.dtype.itemsize == 2:
      got = got.view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(got, value)
  assert not found
  mesh = {'data': 4, 'latent': 2}
  said = {x.name: x.sharding for x in folder.arrays}
  assert said['a.w'] == {'mesh': mesh, 'spec': ['latent']}
  assert said['a.both'] == {'mesh': mesh, 'spec': [['data', 'latent'], None]}
  assert said['deep.0.half'] == {'device': 'cpu:0'}
  assert said['plain'] is None


def test_items_that_are_json_are_read(tmp_path):
  path, _ = manager(tmp_path / 'saved')
  assert orbax_files.read(path).documents == {'meta': {'x': [1, 2]}}


def test_a_folder_of_checkpoints_is_none_itself(tmp_path):
  path, _ = manager(tmp_path / 'saved')
  assert not orbax_files.holds(path.parent)
  assert orbax_files.steps(path.parent) == {30: path}
  standard(tmp_path / 'saved' / 'step_200')
  assert list(orbax_files.steps(path.parent)) == [30, 200]


def test_an_item_alone_is_read_with_the_note_of_its_checkpoint(tmp_path):
  path, _ = manager(tmp_path / 'saved')
  folder = orbax_files.read(path / 'state')
  assert len(folder.arrays) == 6
  assert folder.note['item_handlers']
  assert not folder.warnings


@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda f: f.__name__)
def test_rows_come_in_blocks_along_either_axis(tmp_path, layout):
  path, _ = layout(tmp_path / 'saved')
  array = next(x for x in orbax_files.read(path).arrays if x.name == 'a.w')
  for axis in (0, 1):
    blocks = list(array.blocks(elements=W_SHAPE[1 - axis] * 3, axis=axis))
    assert [at for at, _ in blocks] == [
      sum(len(x) for _, x in blocks[:i]) for i in range(len(blocks))
    ]
    assert len(blocks) > 1
    whole = np.concatenate([x for _, x in blocks])
    np.testing.assert_array_equal(whole.T if axis else whole, array.read())


def facts(path):
  folder = orbax_files.read(path)
  return (
    [x.facts() for x in folder.arrays],
    folder.values,
    folder.documents,
    folder.note,
  )


# What orbax itself does without: leftovers of a merge, marks.
SPARE = ('commit_success.txt', 'orbax.checkpoint', '_sharding')


@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize('harm', ['gone', 'empty', 'half'])
def test_damage_to_any_file_is_said_or_changes_nothing(tmp_path, layout, harm):
  path, _ = layout(tmp_path / 'saved')
  want, refused = facts(path), {}
  for file in [x for x in sorted(path.rglob('*')) if x.is_file()]:
    held = file.read_bytes()
    file.unlink()
    if harm != 'gone':
      file.write_bytes(held[: len(held) // 2 * (harm == 'half')])
    try:
      got = facts(path)
    except ValueError as error:
      refused[file.name] = str(error)
    else:
      # An array by itself knows no length of its chunks when compressed.
      spare = harm == 'half' and 'ocdbt' in layout.__name__
      odd = [note for note in orbax_files.read(path).warnings if note]
      assert got == want or odd or file.name in SPARE or spare, file
    file.write_bytes(held)
  for said in refused.values():
    assert 'is damaged' in said
    assert '\n' not in said
  assert '_METADATA' in refused
  if 'ocdbt' not in layout.__name__:
    assert 'manifest.ocdbt' in refused
  assert facts(path) == want


def test_a_chunk_that_is_missing_is_said(tmp_path):
  path, _ = without_ocdbt(tmp_path / 'saved')
  (path / 'a.w' / '4.0').unlink()
  with pytest.raises(ValueError, match=r'a\.w has 7 of its 8 chunks'):
    orbax_files.read(path)


def test_data_that_is_cut_is_said_without_a_read(tmp_path):
  big = np.random.default_rng(0).normal(size=(300, 40))
  v1.save(tmp_path / 'saved', {'big': big})
  files = (tmp_path / 'saved').rglob('d/*')
  file = max(files, key=lambda x: x.stat().st_size)
  with file.open('r+b') as opened:
    opened.truncate(file.stat().st_size // 2)  # a tree of no use ends it
  with pytest.raises(ValueError, match=r'd/\w+ has \d+ bytes of \d+'):
    orbax_files.read(tmp_path / 'saved')


@pytest.mark.parametrize(
  ('note', 'said'),
  [
    ('[' * 100_000, 'nested too deeply'),
    ('{"item_handlers": {"state": null}}', 'names no handler of state'),
    ('{"item_handlers": {"state": {}}}', 'names no handler of state'),
  ],
)
def test_a_note_that_is_none_is_damage(tmp_path, note, said):
  (tmp_path / 'state').mkdir()
  (tmp_path / orbax_files.NOTE).write_text(note)
  with pytest.raises(ValueError, match=said):
    orbax_files.read(tmp_path)


def test_a_killed_save_is_no_checkpoint(tmp_path):
  path, _ = standard(tmp_path / 'saved')
  torn = path.rename(tmp_path / 'saved.orbax-checkpoint-tmp')
  with pytest.raises(ValueError, match='save that was killed'):
    orbax_files.read(torn)


def test_a_tree_of_many_nodes_has_every_key(tmp_path):
  store = ts.KvStore.open(
    {
      'driver': 'ocdbt',
      'base': {'driver': 'file', 'path': f'{tmp_path}/'},
      'config': {'max_inline_value_bytes': 8, 'max_decoded_node_bytes': 300},
    }
  ).result()
  with ts.Transaction() as transaction:
    for at in range(40):
      store.with_transaction(transaction)[f'aa.b/c/{at:03d}'] = b'x' * (at + 1)
    store.with_transaction(transaction)['aa.b/zarr.json'] = b'{"long": true}'
  found = ocdbt.database(tmp_path)
  assert list(found) == ['aa.b']
  stored = found['aa.b']
  assert (stored.chunks, stored.size) == (40, 40 * 41 // 2)
  assert (stored.driver, stored.meta) == ('zarr3', b'{"long": true}')


def test_copies_of_a_checkpoint_are_read_where_they_lie(tmp_path):
  path, _ = standard(tmp_path / 'saved')
  moved = pathlib.Path(shutil.copytree(path, tmp_path / 'else where'))
  shutil.rmtree(path)
  array = orbax_files.read(moved).arrays[0]
  np.testing.assert_array_equal(array.read(), tree()['a']['both'])
