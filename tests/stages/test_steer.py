import pytest

from lmm_sae.core import records, steering, summary
from lmm_sae.core.records import Edit, Steering
from lmm_sae.core.steering import Case
from lmm_sae.stages import steer
from tests.stages import linear_subject as subject


@pytest.fixture
def steer_config(config):
  config.lmm.layers = (subject.LAYER,)
  config.steer.doses = (0.25, 1.0, 2.0)
  config.steer.cases_a = 3
  config.steer.cases_b = 5
  config.steer.batch = 7
  return config


def steered(workdir):
  return records.read(Steering, workdir.file('steering.jsonl'))


def run(config, workdir, monkeypatch, client=None):
  client = client or subject.Client()
  subject.patch(monkeypatch, client)
  steer.run(config, workdir)
  return client


def test_latent_and_dose_are_the_smallest_that_flip_on_half_a(
  steer_config, tmp_path, monkeypatch
):
  workdir = subject.make(tmp_path)
  run(steer_config, workdir, monkeypatch)
  chosen = [r for r in steered(workdir) if r.half == 'b' and not r.control]
  assert {r.edits[0].value for r in chosen} == {1.0}
  latents = {r.target: r.edits[0].latent for r in chosen}
  # latent 4 has a higher F1 for red on A, but flips nothing there
  assert latents == {'red': 0, 'blue': 1, 'happy': 2, 'sad': 3}
  tried = {r.edits[0].latent for r in steered(workdir) if r.half == 'a'}
  assert tried == {0, 1, 2, 3, 4}


def test_every_case_lacks_its_target_and_carries_its_controls(
  steer_config, tmp_path, monkeypatch
):
  workdir = subject.make(tmp_path)
  run(steer_config, workdir, monkeypatch)
  found = steered(workdir)
  assert found
  for one in found:
    assert one.target not in one.text_plain
    assert one.text_sae == f'{one.text_plain} then'
    assert one.edits[0].where == 'image'
    assert not one.edits[0].keep_error
  b = [r for r in found if r.half == 'b']
  for study, latents in (('colour', {0, 1}), ('emotion', {2, 3})):
    chosen = [r for r in b if r.study == study and not r.control]
    random = [r for r in b if r.study == study and r.control == 'random']
    assert len(chosen) == len(random) == 2 * 5
    assert [r.sample for r in chosen] == [r.sample for r in random]
    assert not latents & {r.edits[0].latent for r in random}


def test_the_summary_counts_the_flips_of_half_b(
  steer_config, tmp_path, monkeypatch
):
  workdir = subject.make(tmp_path)
  run(steer_config, workdir, monkeypatch)
  figures = summary.compute(workdir, (subject.LAYER,))
  assert figures['steer_colour']['value'] == 1
  assert figures['steer_colour']['n'] == 10
  assert figures['steer_colour']['dose'] == 1.0
  assert figures['steer_emotion']['targets']['sad']['n'] == 5
  random = [r for r in steered(workdir) if r.control]
  flips = sum(r.target in r.text_edited for r in random)
  assert figures['steer_random']['value'] == pytest.approx(flips / 20)


@pytest.mark.parametrize('fail_after', [1, 3, 9, 16])
def test_a_killed_run_resumes_to_the_same_bytes(
  steer_config, tmp_path, monkeypatch, fail_after
):
  whole = subject.make(tmp_path / 'whole')
  client = run(steer_config, whole, monkeypatch)
  assert client.requests > 16
  cut = subject.make(tmp_path / 'cut')
  with pytest.raises(ConnectionError):
    run(steer_config, cut, monkeypatch, subject.Client(fail_after))
  path = cut.file('steering.jsonl')
  path.write_bytes(path.read_bytes()[:-3])  # and the last line was torn
  run(steer_config, cut, monkeypatch)
  wanted = whole.file('steering.jsonl').read_bytes()
  assert path.read_bytes() == wanted
  again = run(steer_config, cut, monkeypatch)
  assert again.requests < client.requests
  assert path.read_bytes() == wanted


def test_records_of_other_settings_are_refused(
  steer_config, tmp_path, monkeypatch
):
  workdir = subject.make(tmp_path)
  run(steer_config, workdir, monkeypatch)
  steer_config.steer.doses = (0.5, 1.0)
  with pytest.raises(ValueError, match='remove'):
    run(steer_config, workdir, monkeypatch)


def test_without_truth_the_best_explained_latents_make_records(
  steer_config, tmp_path, monkeypatch
):
  workdir = subject.make(tmp_path, known=False)
  with records.Appender(workdir.file('explanations.jsonl')) as out:
    for latent in (6, 2, 8, 7, 3, 1):
      outcome = 'no_pattern' if latent == 6 else 'explained'
      out.add(
        records.Explanation(2, latent, (), outcome, 'x', 'x', 'object', 'base')
      )
    beside = ('explained', 'x', 'x', 'object', 'base', 'neurons')
    out.add(records.Explanation(2, 4, (), *beside))  # none of the SAE's
  with records.Appender(workdir.file('scores.jsonl')) as out:
    out.add(records.Score(2, 1, 'clip', '', 99.0, 5, '', 'neurons'))
    out.add(records.Score(2, 4, 'clip', '', 99.0, 5, '', 'neurons'))
    for latent, value in ((6, 9.0), (8, 5.0), (7, 4.0), (3, 3.0)):
      out.add(records.Score(2, latent, 'clip', '', value, 5))
  steer_config.steer.prompts = (subject.FEEL,)
  run(steer_config, workdir, monkeypatch)
  found = steered(workdir)
  latents = {r.edits[0].latent for r in found if not r.control}
  assert latents == {8, 7, 3, 1}  # scored best; then the highest peak
  assert {(r.study, r.sample >= 0) for r in found} == {
    ('image', True),
    ('text', False),
  }
  where = {(r.study, r.edits[0].where) for r in found}
  assert where == {('image', 'image'), ('text', 'all')}
  assert sum(r.control == 'random' for r in found) * 2 == len(found)
  figure = summary.compute(workdir, (2,))['steer_colour']
  assert figure['value'] is None
  assert figure['reason']


def test_a_latent_that_the_sae_lacks_is_refused(
  steer_config, tmp_path, monkeypatch
):
  steer_config.steer.latents = (subject.M,)
  with pytest.raises(ValueError, match='0 to 8'):
    run(steer_config, subject.make(tmp_path), monkeypatch)


def test_without_a_server_the_message_says_how_to_start_one(
  steer_config, tmp_path
):
  with pytest.raises(ValueError, match='serve'):
    steer.run(steer_config, subject.make(tmp_path))


def answer(latent, dose, text, target='red', half='a'):
  edits = (Edit(latent, dose, unit='peak'),)
  return Steering(2, edits, '', 0, '', '', '', text, 'colour', half, target)


def test_a_choice_takes_the_smallest_of_the_best_doses():
  swept = [
    answer(3, 1.0, 'blue'),
    answer(3, 2.0, 'it is Red.'),
    answer(3, 4.0, 'red'),
    answer(5, 1.0, 'blue'),
    answer(5, 2.0, 'bored'),
    answer(5, 4.0, 'red'),
  ]
  assert steering.choose(swept, {'red': [5, 3]}, (4.0, 2.0, 1.0)) == (
    2.0,
    {'red': 3},
  )


def test_a_choice_is_never_offered_half_b():
  with pytest.raises(ValueError, match='half b'):
    steering.choose([answer(3, 1.0, 'red', half='b')], {'red': [3]}, (1.0,))


def test_the_pool_takes_first_questions_first_and_a_few_to_spare():
  turns = tuple(
    records.Turn('colour', f'q{i}', word, word)
    for i, word in enumerate(('red', 'blue'))
  )
  samples = [
    records.Sample(i, 0, '', 'x.png', 1, 1, '', turns, 0, 0) for i in range(4)
  ]
  # 3 + 1 cases of each: 4 red ones for blue, then blue ones for red
  pool = steering.pool_of(samples, 'colour', ('red', 'blue'), 3)
  assert pool == [
    *(Case(i, turns[0]) for i in range(4)),
    *(Case(i, turns[1]) for i in range(4)),
  ]
