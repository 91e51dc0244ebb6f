"""Every headline figure against a reckoning by hand."""

import pytest

from lmm_sae.core import records, summary
from lmm_sae.core.records import (
  Attribution,
  Edit,
  Effect,
  Explanation,
  Score,
  Steering,
)
from lmm_sae.core.workdir import Workdir


def concept(latent, name, objects=0.9, f1_a=0.5, clean=False):
  return {
    'latent': latent,
    'concept': name,
    'threshold': 0.2,
    'f1_a': f1_a,
    'f1_b': 0.4,
    'precision_b': 0.8,
    'objects': objects,
    'peak': 3.0,
    'clean': clean,
    'why': 'a column that the summary does not read',
  }


def explain(
  latent, text, explainer='large', outcome='explained', layer=2, dictionary=''
):
  return Explanation(
    layer, latent, (), outcome, text, text, 'o', explainer, dictionary
  )


def steer(study, target, plain, edited, control='', half='b', dose=2.0):
  edits = (Edit(1, dose, unit='peak'),)
  return Steering(
    2, edits, control, 0, 'q', plain, plain, edited, study, half, target
  )


def append(workdir, name, lines):
  with records.Appender(workdir.file(name)) as out:
    for line in lines:
      out.add(line)


@pytest.fixture
def workdir(tmp_path):
  workdir = Workdir.of(tmp_path)
  table = [
    concept(0, 'red', clean=True),
    concept(1, 'red', clean=True),
    concept(2, 'square'),
    concept(3, 'happy', clean=True),
    concept(4, 'blue', objects=0.7),  # seldom on objects
    concept(5, 'blue', f1_a=0.1),  # stands for nothing
    concept(6, 'star'),  # no explanation
  ]
  counted = ['blue', 'happy', 'red', 'square', 'star']
  records.write_json(
    workdir.file('concepts.json'),
    {
      '2': table,
      'neurons': {'2': 1},
      'counted': counted,
      'dictionaries': {
        'neurons': {'2': [concept(0, 'blue'), concept(1, 'red')]},
        'untrained': {'2': [concept(m, 'red', clean=m > 0) for m in range(3)]},
      },
    },
  )
  records.write_json(
    workdir.file('evaluation.json'),
    {
      'format_version': 2,
      '2': {'all': {'fvu': 0.05, 'l0': 8, 'dead': 0.1, 'rows': 900}},
      'loss': {
        '2': {
          'kinds': {
            kind: {'ce_recovered': {'zero': {'value': value, 'n': 6, 'ci': ci}}}
            for kind, value, ci in (
              ('all', 0.9, None),
              ('answer', 0.6, [0.5, 0.7]),
            )
          }
        }
      },
    },
  )
  append(
    workdir,
    'explanations.jsonl',
    [
      explain(0, 'a Red thing'),
      explain(1, 'bored'),
      explain(2, 'red squares'),
      explain(3, 'happy red face'),
      explain(4, 'blue'),
      explain(5, 'blue'),
      explain(0, 'red', 'little'),
      explain(1, '', 'little', 'no_pattern'),
      explain(0, 'green', layer=3),
      explain(0, 'blue', dictionary='neurons'),
      explain(1, 'square', dictionary='neurons'),
      explain(2, 'red', dictionary='untrained'),
    ],
  )
  append(
    workdir,
    'scores.jsonl',
    [
      *(
        Score(2, latent, scorer, baseline, value, 5, 'large')
        for scorer, baseline, values in (
          ('iou_exact', '', (0.4, 0.6)),
          ('iou_exact', 'random', (0.1, 0.2)),
          ('iou', '', (0.3, 0.1)),
          ('clip', '', (25, 27)),
          ('clip', 'shuffled', (21, 22)),
        )
        for latent, value in enumerate(values)
      ),
      Score(2, 0, 'iou_exact', '', 0.9, 5, 'little'),
      Score(2, 1, 'clip', '', 21, 5, 'little'),
      Score(2, 0, 'clip', '', 26, 5, 'little'),
      Score(2, 0, 'iou_exact', '', 0.2, 5, 'large', 'neurons'),
      Score(2, 1, 'iou_exact', '', 0.1, 5, 'large', 'neurons'),
      Score(2, 0, 'detection', '', 0.75, 8, 'large'),
      Score(2, 1, 'detection', '', 0.5, 8, 'large'),
      Score(2, 2, 'detection', '', 1.0, 8, 'large'),
      Score(2, 1, 'detection', 'shuffled', 0.25, 8, 'large'),
      Score(2, 0, 'consistency', '', 0.875, 8, 'large'),
    ],
  )
  append(
    workdir,
    'steering.jsonl',
    [
      steer('colour', 'red', 'blue', 'blue', half='a', dose=4.0),
      steer('colour', 'red', 'blue', 'red'),
      steer('colour', 'red', 'green', 'the red one'),
      steer('colour', 'red', 'red', 'red'),  # was said without an edit
      steer('colour', 'blue', 'red', 'red'),
      steer('colour', 'red', 'blue', 'red', 'random'),
      steer('emotion', 'sad', 'happy', 'sad', dose=3.0),
      steer('emotion', 'sad', 'happy', 'angry', 'random'),
      steer('text', '', 'happy', 'sad'),
    ],
  )
  append(
    workdir,
    'attributions.jsonl',
    [
      Attribution(
        2, i, 'x', 'y', tuple(Effect(m, *pair) for m, pair in enumerate(pairs))
      )
      for i, pairs in enumerate(
        ([(3, 3.1), (2, 1.9), (1, None)], [(1, 0.5), (-1, -0.5), (0.5, 0.9)])
      )
    ],
  )
  known = {'value': 0.55, 'n': 32, 'ci': [0.4, 0.7], 'lines': 8}
  task = {
    'chance': 0.5,
    'calibration': known,
    'trusted': False,
    'asked': 90,
    'failed': 3,
    'unread': 2,
  }
  agreement = {'detection': {'value': 0.9, 'n': 8, 'ci': [0.7, 1], 'kappa': 0}}
  records.write_json(
    workdir.file('judges.json'),
    {
      'format_version': 1,
      'first': 'large',
      'second': 'little',
      'judges': {'large': {'detection': task}},
      'agreement': agreement,
    },
  )
  records.write_json(workdir.file('seconds.json'), {'capture': 30, 'train': 60})
  return workdir


def test_each_figure_is_what_the_files_say(workdir):
  figures = summary.compute(workdir, (2,))
  values = {
    name: (figure['value'], figure['n'])
    for name, figure in figures.items()
    if isinstance(figure, dict) and 'value' in figure
  }
  assert values.pop('attribution_correlation') == (
    pytest.approx(0.98, abs=0.02),
    5,
  )
  approx = pytest.approx
  missing = {name for name, value in values.items() if value == (None, 0)}
  assert {name: values[name] for name in values if name not in missing} == {
    'fvu': (0.05, 900),
    'ce_recovered': (0.6, 6),
    'clean_concepts': (2, 5),
    'clean_concepts_neurons': (1, 5),
    'clean_concepts_untrained': (1, 5),
    'explained_right': (0.75, 4),
    # red by 2 other texts of 3, red by 3 of 3, square by 0, happy by 0
    'explained_right_shuffled': (approx((2 / 3 + 1) / 4), 4),
    'explained_right_untrained': (1, 1),
    'explained_right_neurons': (0.5, 2),
    'explained_difference': (0.0, 2),  # red: both; red again: neither
    'iou': (approx(0.5), 2),
    'iou_random': (approx(0.15), 2),
    'iou_neurons': (approx(0.15), 2),
    'clip': (26, 2),
    'clip_shuffled': (21.5, 2),
    'detection': (0.75, 3),
    'detection_shuffled': (0.25, 1),
    'consistency': (0.875, 1),
    'steer_colour': (approx(2 / 3), 3),
    'steer_emotion': (1, 1),
    'steer_random': (0.5, 2),
    'seconds': (90, 2),
  }
  assert missing == {
    *('iou_shuffled', 'iou_untrained'),
    *('clip_random', 'clip_untrained', 'clip_neurons'),
    *(f'detection_{name}' for name in ('random', 'untrained', 'neurons')),
    *(
      name
      for task in ('iou_paper', 'fuzzing', 'intruder', 'detection_text',
                   'fuzzing_text', 'intruder_text')
      for name in (task, *summary.BASELINES[task])
    ),
  }  # fmt: skip
  assert all(figures[name]['reason'] for name in missing)
  assert figures['iou']['scorer'] == 'iou_exact'
  assert figures['explained_right']['explainer'] == 'large'
  little = figures['explained_right']['explainers']['little']
  assert little['explained_right']['value'] == 0.5
  assert figures['steer_colour']['dose'] == 2.0
  assert figures['steer_colour']['targets']['blue']['value'] == 0
  assert figures['seconds']['stages'] == {'capture': 30, 'train': 60}
  for name in ('explained_right', 'iou', 'clip', 'steer_colour'):
    low, high = figures[name]['ci']
    assert low <= figures[name]['value'] <= high


def test_two_explainers_differ_by_pairs_of_latents(workdir):
  figures = summary.compute(workdir, (2,))
  clip = figures['clip']['difference']
  assert (clip['value'], clip['n']) == (2.5, 2)  # 25 - 26 and 27 - 21
  assert clip['of'] == ['large', 'little']
  low, high = clip['ci']
  assert (low, high) == (-1, 6)
  assert figures['clip']['explainers']['little']['value'] == 23.5
  iou = figures['iou']['difference']
  assert (iou['value'], iou['n']) == (pytest.approx(-0.5), 1)
  append(workdir, 'explanations.jsonl', [explain(3, 'sad', 'little')])
  right = summary.compute(workdir, (2,))['explained_difference']
  assert (right['value'], right['n']) == (pytest.approx(1 / 3), 3)


def test_a_judge_that_guesses_stands_with_a_warning(workdir):
  figures = summary.compute(workdir, (2,))
  one = figures['detection']
  assert one['judge'] == 'large'
  assert (one['chance'], one['failed'], one['unread']) == (0.5, 3, 2)
  assert one['calibration']['value'] == 0.55
  assert 'does not beat chance' in one['warning']
  assert figures['consistency']['judges'] == ['large', 'little']
  assert figures['consistency']['agreement']['detection']['value'] == 0.9
  assert 'warning' not in figures['iou']
  table = summary.table(figures)
  assert 'detection: this judge does not beat chance' in table
  records.write_json(workdir.file('judges.json'), {'format_version': 7})
  with pytest.raises(ValueError, match='format_version 7'):
    summary.compute(workdir, (2,))


def test_several_layers_stand_beside_the_first(workdir):
  figures = summary.compute(workdir, (2, 3))
  assert list(figures['layers']) == ['2', '3']
  assert figures['layers']['2']['fvu'] == figures['fvu']
  assert figures['layers']['3']['fvu']['value'] is None


def test_an_empty_workdir_gives_reasons_instead_of_figures(tmp_path):
  figures = summary.compute(Workdir.of(tmp_path), (2,))
  for name, figure in figures.items():
    if name not in ('layers', 'format_version'):
      assert figure['value'] is None
      assert figure['reason']
  assert 'run `lmm-sae steer`' in summary.table(figures)


def test_an_evaluation_of_another_format_is_refused(workdir):
  records.write_json(workdir.file('evaluation.json'), {'format_version': 9})
  with pytest.raises(
    ValueError, match='format_version 9; this program reads 2'
  ):
    summary.compute(workdir, (2,))


def test_why_the_loss_was_not_had_is_told(workdir):
  table = {'fvu': 0.05, 'rows': 900}
  for loss, reason in (
    ({}, 'not measured: run `lmm-sae evaluate`'),
    ({'loss': {'2': {'reason': 'no server', 'kinds': {}}}}, 'no server'),
  ):
    records.write_json(
      workdir.file('evaluation.json'), {'2': {'all': table}} | loss
    )
    figures = summary.compute(workdir, (2,))
    assert figures['ce_recovered']['reason'] == reason


def test_the_table_sets_each_figure_beside_its_baselines(workdir):
  table = summary.table(summary.compute(workdir, (2,)))
  lines = {line.split()[0]: line for line in table.splitlines()}
  assert '0.500' in lines['iou']
  assert 'random 0.150, shuffled -' in lines['iou']
  assert 'neurons 1' in lines['clean_concepts']
  assert 'steer_random 0.500' in lines['steer_emotion']
  assert 'iou_random' not in lines
  assert lines['seconds:'] == 'seconds: 90 (capture 30, train 60)'
  assert all(line == line.rstrip() for line in table.splitlines())
