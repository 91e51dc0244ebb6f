"""The report against the files it is made of."""

import json
import re
import shutil

import numpy as np
import pytest

from lmm_sae.core import (
  concepts,
  masks,
  pictures,
  records,
  report_figures,
  summary,
)
from lmm_sae.core.findings import Findings
from lmm_sae.core.index import LatentIndex
from lmm_sae.core.records import Steering
from lmm_sae.core.workdir import Workdir
from lmm_sae.stages import report
from tests.stages import fake_run

LATENTS, SAMPLES = 40, 16


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A run with its report: (config, workdir)."""
  config, workdir = fake_run.make(
    tmp_path_factory.mktemp('run'), LATENTS, SAMPLES
  )
  report.run(config, workdir)
  return config, workdir


@pytest.fixture
def copy(made, tmp_path):
  """The same, to be changed by a test."""
  config, workdir = made
  shutil.copytree(workdir.root, tmp_path / 'run')
  return config.copy_and_resolve_references(), Workdir.of(tmp_path / 'run')


def page(workdir):
  return (workdir.file('report') / 'index.html').read_text()


def data(workdir, name):
  """What a data file puts under its key."""
  text = (workdir.file('report') / 'data' / name).read_text()
  key, value = re.fullmatch(
    r'lmmSae\.put\(("[^"]*"),(.*)\)\n', text, re.DOTALL
  ).groups()
  del key
  return json.loads(value)


def everything(workdir):
  root = workdir.file('report')
  files = sorted(path for path in root.rglob('*') if path.is_file())
  return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_the_same_run_gives_the_same_bytes(made, copy):
  report.run(*copy)
  assert everything(copy[1]) == everything(made[1])
  assert not copy[1].file('report.part').exists()


def test_the_summary_is_written_and_printed(copy, capsys):
  config, workdir = copy
  report.run(config, workdir)
  written = json.loads(workdir.file('summary.json').read_text())
  assert set(written.pop('tables')) == {'2'}
  assert written == json.loads(json.dumps(summary.compute(workdir, (2,))))
  told = capsys.readouterr().out
  assert summary.table(written) in told
  assert str(workdir.file('report') / 'index.html') in told


def test_headline_figures_stand_beside_their_baselines(made):
  figures = json.loads(made[1].file('summary.json').read_text())
  text = page(made[1])
  for name in ('explained_right', 'explained_right_shuffled', 'clip_random'):
    assert f'{figures[name]["value"]:.2f}'[:4] in text
  for words in (
    'raw neurons',
    'shuffled label',
    'random images',
    'SAE quality',
    'Loss kept',
    'Answers kept with the SAE in the loop',
  ):
    assert words in text


def test_scores_stand_beside_every_baseline(made):
  text = page(made[1])
  figures = json.loads(made[1].file('summary.json').read_text())
  table = text[text.index('Do the explanations hold') :]
  rows = re.findall(r'<tr><th scope="row">(.*?)</tr>', table, re.DOTALL)
  row = next(one for one in rows if '<b>IoU</b>' in one)
  cells = re.findall(r'<td class="num">([\d.-]+)<br>', row)
  iou = figures['iou']
  wanted = [
    iou['value'],
    iou['explainers']['small']['value'],
    iou['difference']['value'],
    *(
      figures[f'iou_{name}']['value']
      for name in ('random', 'shuffled', 'untrained', 'neurons')
    ),
  ]
  assert cells == [report_figures.number(value) for value in wanted]
  row = next(one for one in rows if '<b>Intruder</b>' in one)
  assert 'guessing: 0.20; judge base where answers are known: 0.25' in row
  assert 'Take care: this judge does not beat chance' in row
  assert table.count('Take care') == 1
  row = next(one for one in rows if '<b>Detection in text</b>' in one)
  assert 'fires on text alone' in row
  for words in ('Untrained SAE', 'Raw neurons', 'By category', 'By kind of'):
    assert words in table


def test_layers_stand_beside_one_another(copy):
  config, workdir = copy
  assert 'Layer by layer' not in page(workdir)
  config.lmm.layers = (2, 3)
  shutil.copytree(workdir.file('index') / '2', workdir.file('index') / '3')
  report.run(config, workdir)
  text = page(workdir)
  rows = text[text.index('>Layer by layer<') :].split('</table>')[0]
  assert re.findall(r'<b>(Layer \d)</b>', rows) == ['Layer 2', 'Layer 3']
  figures = json.loads(workdir.file('summary.json').read_text())
  assert set(figures['tables']) == {'2', '3'}
  right = figures['explained_right']['value']
  assert f'>{report_figures.number(right)}<' in rows


def test_the_page_asks_for_nothing_outside(made):
  text = page(made[1])
  assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', text) == []
  assert set(re.findall(r'https?://[^\s\'"<)]+', text)) == {
    'http://www.w3.org/2000/svg'
  }
  assert '@import' not in text
  assert 'url(' not in text


def test_words_of_a_model_never_become_markup(made):
  _, workdir = made
  assert fake_run.NASTY in {
    one.text for one in Findings.of(workdir, 2, 'b').explained[2]
  }
  assert '<img' not in page(workdir)
  # elsewhere they are strings of JSON, which the scripts put in text nodes
  text = '\n'.join(path.read_text() for path in report.ASSETS.glob('*.js'))
  assert not re.search(
    r'innerHTML|outerHTML|insertAdjacent|document\.write', text
  )


def test_a_title_is_escaped_everywhere(copy):
  config, workdir = copy
  config.report.title = '</script><b>"hi"'
  report.run(config, workdir)
  assert '</script><b>' not in page(workdir)
  assert page(workdir).count('</script>') == 2


def test_every_latent_meets_one_fate(made):
  _, workdir = made
  index = LatentIndex.open(workdir.index(2, 'b'))
  fields = data(workdir, 'layer_2.js')['fields']
  assert fields['latent'] == list(range(LATENTS))
  counts = re.findall(r'class="count">([\d,]+)<', page(workdir))
  assert sum(int(count.replace(',', '')) for count in counts) == LATENTS
  fates = dict(zip(fields['latent'], fields['outcome'], strict=True))
  assert fates[LATENTS + fake_run.DEAD] == 'dead'
  assert fates[LATENTS + fake_run.TEXT] == 'text_only'
  assert fates[LATENTS + fake_run.ALWAYS] == 'always_on'
  for latent, fate in fates.items():
    if fate == 'dead':
      assert index.stats['dead'][latent]


def test_columns_hold_what_stages_found(made):
  _, workdir = made
  findings = Findings.of(workdir, 2, 'b')
  fields = data(workdir, 'layer_2.js')['fields']
  for row, latent in enumerate(fields['latent']):
    sample_S, *_ = findings.index.postings(latent)
    assert fields['rate'][row] == pytest.approx(len(sample_S) / SAMPLES, 1e-3)
    scored = findings.scored(latent, 'base').get('iou_exact', {})
    if '' in scored:
      assert fields['iou'][row] == pytest.approx(scored[''].value, 1e-3)
      assert fields['iou_base'][row] == pytest.approx(
        scored['random'].value, 1e-3
      )
    else:
      assert fields['iou'][row] is None


def test_heat_maps_and_masks_are_those_of_the_index(made):
  config, workdir = made
  index = LatentIndex.open(workdir.index(2, 'b'))
  details = data(workdir, '2/latents_0000.js')
  details |= data(workdir, '2/latents_0001.js')
  thumbs = data(workdir, '2/thumbs_0000.js')
  assert set(details) == {str(m) for m in range(LATENTS)} == set(thumbs)
  for latent in range(LATENTS):
    peak = float(index.stats['peak_base'][latent])
    shown = details[str(latent)]['exemplars']
    assert len(shown) == len(index.exemplars(latent))
    for one, true in zip(shown, index.exemplars(latent), strict=True):
      level_HW, lit_HW = pictures.decode_heat(one['h'])
      np.testing.assert_array_equal(level_HW > 0, true.heat_HW > 0)
      np.testing.assert_array_equal(
        lit_HW, masks.lit(true.heat_HW, peak, config.explain.threshold)
      )
    if shown:
      assert thumbs[str(latent)] == [[o['s'], o['h']] for o in shown[:5]]


def test_each_picture_is_stored_once_and_described(made):
  _, workdir = made
  samples = data(workdir, 'samples.js')
  images = {path.name for path in (workdir.file('report') / 'img').iterdir()}
  named = [name for table in samples.values() for name, _ in table.values()]
  assert sorted(images) == sorted(named)
  assert all(alt.startswith('Sample ') for _, alt in samples['b'].values())
  assert any('face' in alt for _, alt in samples['b'].values())
  shown = {
    one['s']
    for detail in data(workdir, '2/latents_0000.js').values()
    for one in detail['exemplars']
  }
  assert shown <= {int(sample) for sample in samples['b']}


def test_flip_rates_are_counted_on_half_b(made):
  _, workdir = made
  studies = {s['name']: s for s in data(workdir, 'steering.js')['studies']}
  lines = records.read(Steering, workdir.file('steering.jsonl'))
  for name in ('colour', 'emotion'):
    for control, key in (('', 'figure'), ('random', 'random')):
      hits = [
        concepts.says(one.text_edited, one.target)
        for one in lines
        if (one.study, one.half, one.control) == (name, 'b', control)
      ]
      figure = studies[name]['total'][key]
      assert figure['n'] == len(hits)
      assert figure['value'] == pytest.approx(np.mean(hits))
    assert studies[name]['chosen'] == 4
    assert studies[name]['doses'] == list(fake_run.DOSES)
  red = next(c for c in studies['colour']['curves'] if c['target'] == 'red')
  for dose, share, n in red['points']:
    hits = [
      concepts.says(one.text_edited, 'red')
      for one in lines
      if (one.half, one.target, one.edits[0].value) == ('a', 'red', dose)
    ]
    assert n == len(hits)
    assert share == pytest.approx(np.mean(hits))
  assert studies['text']['rows'] == []  # no target, so nothing to count
  assert len(studies['text']['cases']) == 1


def test_what_was_not_run_says_so(copy):
  config, workdir = copy
  for name in (
    'explanations.jsonl',
    'scores.jsonl',
    'steering.jsonl',
    'attributions.jsonl',
    'evaluation.json',
    'concepts.json',
    'eq.json',
    'mistakes.json',
    'seconds.json',
    'config.json',
  ):
    workdir.file(name).unlink()
  shutil.rmtree(workdir.acts('train'))
  report.run(config, workdir)
  text = page(workdir)
  assert 'run <code>lmm-sae evaluate</code>' in text or 'evaluate' in text
  assert text.count('Not run') >= 2
  assert data(workdir, 'eq.js') is None
  assert data(workdir, 'steering.js') == {'studies': []}
  fates = set(data(workdir, 'layer_2.js')['fields']['outcome'])
  assert fates <= {'not_asked', 'always_on', 'text_only', 'tiles_only', 'dead'}
  assert 'not_asked' in fates


def test_a_limit_keeps_the_explained_latents(copy):
  config, workdir = copy
  config.report.latents = 7
  report.run(config, workdir)
  fields = data(workdir, 'layer_2.js')['fields']
  assert len(fields['latent']) == 7
  assert fields['latent'] == sorted(fields['latent'])
  assert set(fields['outcome']) == {'explained'}
  counts = re.findall(r'class="count">([\d,]+)<', page(workdir))
  assert sum(map(int, counts)) == LATENTS  # fates count all


def test_a_lost_picture_is_left_out(copy, caplog):
  config, workdir = copy
  (workdir.acts('b') / 'images/000003.png').delete()
  report.run(config, workdir)
  assert '3' not in data(workdir, 'samples.js')['b']


def test_a_report_without_an_index_names_the_stage(config, tmp_path):
  with pytest.raises(ValueError, match='lmm-sae index'):
    report.run(config, Workdir.of(tmp_path))


@pytest.mark.parametrize(('field', 'value'), [('latents', -1), ('image_px', 0)])
def test_bad_values_are_refused(config, tmp_path, field, value):
  config.report[field] = value
  with pytest.raises(ValueError, match=f'report.{field}'):
    report.run(config, Workdir.of(tmp_path))


def test_studies_of_another_format_are_refused(copy):
  config, workdir = copy
  records.write_json(workdir.file('eq.json'), {'format_version': 99})
  with pytest.raises(ValueError, match='format_version 99'):
    report.run(config, workdir)
