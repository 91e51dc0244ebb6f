"""The server over a real socket: its client, and requests that are bad."""

import json
import socket

import httpx
import numpy as np
import pytest
import torch

from lmm_sae.core import wire
from lmm_sae.core.records import Edit
from lmm_sae.core.remote import GenerateRow, SubjectClient
from lmm_sae.core.tokens import Kind
from lmm_sae.lmm import forward, serve
from lmm_sae.lmm.forward import Job
from lmm_sae.lmm.serve import ServerConfig
from lmm_sae.lmm.service import Service
from tests.lmm.serving import running

LAYER = 1
ASK = 'how does the face feel?'


class FakeClip:
  """Scores and masks that say which pair they were asked for."""

  def score(self, images, index, texts):
    return np.array(
      [images[i].width + len(t) for i, t in zip(index, texts, strict=True)],
      np.float32,
    )

  def masks(self, images, index, phrases, box_threshold):
    return [
      np.full(images[i].size[::-1], len(phrase) * box_threshold > 1)
      for i, phrase in zip(index, phrases, strict=True)
    ]


@pytest.fixture(scope='module')
def service(subject, sae):
  clip = FakeClip()
  return Service(subject, {LAYER: sae}, clip, {'clip': clip})


@pytest.fixture(scope='module')
def url(service):
  with running(service, max_mb=1, queue=3) as at:
    yield at


@pytest.fixture
def client(url):
  with SubjectClient(url, timeout_s=60) as made:
    yield made


def test_health_and_info(client):
  assert client.health()
  assert client.info() == {
    'model': 'tiny',
    'layers': 3,
    'width': 24,
    'grid': [4, 4],
    'saes': {LAYER: {'latents': 40, 'k': 5}},
    'judges': ['clip'],
    'clip': True,
  }


def test_generate_answers_every_row(client, subject, sae, images):
  edits = (
    Edit(3, 2.0, unit='peak', where='image'),
    Edit(4, mode='ablate', when='both', keep_error=True),
  )
  rows = [
    GenerateRow(1, ASK, edits, LAYER),
    GenerateRow(0, ASK, layer=LAYER, sae=True, where='image'),
    GenerateRow(None, ASK),
    GenerateRow(1, ASK, layer=LAYER),
  ]
  peaks = {LAYER: np.full(40, 3.0, np.float32)}
  got = client.generate(rows, images, 5, peaks=peaks)
  asked = [
    forward.ask(subject, subject.chat(ASK, i is not None), i)
    for i in (images[1], images[0], None)
  ]
  control = (Edit(0, 1.0, mode='scale', where='image'),)
  clamp = (Edit(3, 6.0, where='image'), edits[1])
  jobs = [
    Job(asked[0], LAYER, clamp),
    Job(asked[1], LAYER, control),
    Job(asked[2], 0, ()),
    Job(asked[0], LAYER, ()),
  ]
  want = [
    subject.tokenizer.decode(ids, skip_special_tokens=True).strip()
    for ids in forward.write(subject, {LAYER: sae}, jobs, 5)
  ]
  assert got == want
  assert got[0] != got[3]
  assert client.generate([], [], 5) == []


def test_prompts_are_kept_between_requests_up_to_a_size(subject, sae, images):
  header = row(edits=[{'latent': 1, 'value': 9.0}])
  arrays = [{'image_0': wire.png(image)} for image in images]
  roomy, narrow = (
    Service(subject, {LAYER: sae}, max_bytes=size) for size in (10**6, 0)
  )
  answers = []
  for service in (roomy, narrow):
    for sent in (*arrays, *arrays):
      answers.append(service.answer('generate', header, sent)[0])
  assert answers[:4] == answers[4:]
  assert answers[:2] == answers[2:4]
  assert len(roomy._asked) == 2
  assert not narrow._asked


def test_seeded_answers_repeat(client, images):
  rows = [GenerateRow(0, ASK)] * 3
  first = client.generate(rows, images[:1], 5, seed=1)
  assert first == client.generate(rows, images[:1], 5, seed=1)
  assert len(set(first)) == 3


def test_residuals_come_with_their_maps(client, subject, images):
  rows = [(images[0], ASK), (None, ASK), (images[1], 'what?')]
  got = client.residual(LAYER, rows)
  for (image, prompt), (x_TD, token_map) in zip(rows, got, strict=True):
    asked = forward.ask(subject, subject.chat(prompt, image is not None), image)
    want = subject.residuals(asked.inputs, [LAYER])[LAYER][0]
    np.testing.assert_allclose(x_TD, want, atol=1e-6)
    np.testing.assert_array_equal(token_map.kind_T, asked.map.kind_T)
    np.testing.assert_array_equal(token_map.box_T4, asked.map.box_T4)
    assert token_map.grid == asked.map.grid
  assert (got[0][1].kind_T == Kind.BASE).sum() == 16


def test_bfloat16_residuals_stay_bfloat16(service, images, monkeypatch):
  def residuals(inputs, layers):
    del inputs
    return {layers[0]: torch.full((1, 3, 2), 1.5, dtype=torch.bfloat16)}

  monkeypatch.setattr(service.subject, 'residuals', residuals)
  header = {'layer': LAYER, 'rows': [{'image': None, 'prompt': 'a'}]}
  _, arrays = service.answer('residual', header, {})
  assert arrays['x_0'].dtype.name == 'bfloat16'
  assert (arrays['x_0'].astype(np.float32) == 1.5).all()


def test_gradient_and_difference_agree(client, images):
  top = client.next(images[0], ASK, top=3)
  assert [t.logit for t in top] == sorted((t.logit for t in top), reverse=True)
  assert all(t.logprob < 0 for t in top)
  pair = (top[0].token, top[1].token)
  got = client.gradient(LAYER, images[0], ASK, *pair)
  assert got['tokens'] == pair
  assert got['logits'] == pytest.approx((top[0].logit, top[1].logit), abs=1e-4)
  assert got['x_TD'].shape == got['grad_TD'].shape == (len(got['kind_T']), 24)
  assert np.abs(got['grad_TD']).max() > 0
  sets = [(), (Edit(2, 4.0),), (Edit(2, 4.0, keep_error=True),)]
  differences = client.difference(LAYER, images[0], ASK, *pair, sets)
  assert differences[0] == pytest.approx(got['difference'], abs=1e-4)
  assert len({round(d, 4) for d in differences}) == 3
  single = [
    client.difference(LAYER, images[0], ASK, *pair, [edits])[0]
    for edits in sets
  ]
  assert differences == pytest.approx(single, abs=1e-5)


def test_words_are_compared_where_they_part(client, images):
  got = client.gradient(LAYER, images[0], ASK, 'cat sits', 'cat looks')
  plain = client.gradient(LAYER, images[0], ASK, 'red', 'blue')
  longer = len(got['kind_T']) - len(plain['kind_T'])
  assert longer >= 1
  assert (got['kind_T'][-longer:] == Kind.ANSWER).all()
  (difference,) = client.difference(
    LAYER, images[0], ASK, 'cat sits', 'cat looks', [()]
  )
  assert difference == pytest.approx(got['difference'], abs=1e-4)


def test_next_tokens_follow_an_edit(client, images):
  plain = client.next(images[0], ASK)
  edits = (Edit(1, 9.0, where='all'),)
  assert len(plain) == 10
  assert client.next(images[0], ASK, layer=LAYER, edits=edits) != plain


def test_judges_answer_in_pairs(client, images):
  texts = ['abc', 'abcde', 'a']
  chosen = [images[1], images[0], images[1]]
  np.testing.assert_allclose(client.clip(chosen, texts), [59, 35, 57])
  masks = client.ground(chosen, texts, box_threshold=0.3)
  assert [m.shape for m in masks] == [(30, 56), (40, 30), (30, 56)]
  assert [bool(m.all()) for m in masks] == [False, True, False]
  assert client.ground([], []) == []
  assert client.clip([], []).shape == (0,)
  with pytest.raises(ValueError, match="'dino' is not served"):
    client.ground(chosen, texts, judge='dino')


def row(**changes):
  fields = {'image': 0, 'prompt': ASK, 'layer': LAYER} | changes
  return {'rows': [fields], 'max_new_tokens': 2}


def edit(**changes):
  return row(edits=[{'latent': 1, 'value': 1.0} | changes])


BAD = {
  'unknown latent': ('generate', edit(latent=40), 'latent 40'),
  'negative latent': ('generate', edit(latent=-1), 'negative'),
  'latent of a wrong type': ('generate', edit(latent='1'), 'latent'),
  'unknown mode': ('generate', edit(mode='boost'), 'boost'),
  'unknown place': ('generate', edit(where='sky'), 'sky'),
  'bos': ('generate', edit(where='bos'), 'BOS'),
  'empty span': ('generate', edit(where='span:Bolivia'), 'no token'),
  'no peak': ('generate', edit(unit='peak'), 'peak'),
  'misspelt field': ('generate', edit(vaule=1.0), 'vaule'),
  'unknown layer': ('generate', row(layer=9), 'layer 9'),
  'no SAE': ('generate', row(layer=0, sae=True), 'no SAE of layer 0'),
  'no such image': ('generate', row(image=2), 'image 2'),
  'no prompt': ('generate', row(prompt=None), 'prompt'),
  'image in the text': (
    'generate',
    row(prompt='<image> a', image=None),
    'image',
  ),
  'long prompt': ('generate', row(prompt='red ' * 2100), 'shorten'),
  'no tokens': ('generate', row() | {'max_new_tokens': 0}, 'max_new_tokens'),
  'negative seed': ('generate', row() | {'seed': -1}, 'seed'),
  'too many rows': (
    'generate',
    {**row(), 'rows': row()['rows'] * 5000},
    '4096',
  ),
  'nothing': ('generate', {}, 'rows'),
  'same words': (
    'gradient',
    {
      'layer': 0,
      'image': None,
      'prompt': 'a',
      'answer': 'b',
      'baseline': 'b',
    },
    'do not part',
  ),
  'word and id': (
    'gradient',
    {'layer': 0, 'image': None, 'prompt': 'a', 'answer': 'b', 'baseline': 3},
    'two words or two ids',
  ),
  'id beyond the vocabulary': (
    'gradient',
    {'layer': 0, 'image': None, 'prompt': 'a', 'answer': 9**9, 'baseline': 3},
    'the ids end',
  ),
  'unpaired': ('clip', {'images': [0], 'texts': ['a', 'b']}, 'pair'),
  'image of no pair': ('ground', {'images': [3], 'texts': ['a']}, 'image 3'),
}


@pytest.mark.parametrize('name', BAD)
def test_a_bad_request_is_refused_with_its_reason(url, images, name):
  method, header, says = BAD[name]
  arrays = {'image_0': wire.png(images[0])}
  got = httpx.post(f'{url}/{method}', content=wire.pack(header, arrays))
  assert got.status_code == 400
  assert says in got.json()['error']


@pytest.mark.parametrize(
  'body',
  [
    b'',
    b'{"rows": []}',
    wire.pack(row(), {'image_0': np.zeros(9, np.uint8)}),
    wire.pack(row(), {'picture': np.zeros(9, np.uint8)}),
    wire.pack(row(), {}).replace(b'[1]', b'NaN'),
  ],
)
def test_a_bad_body_is_refused(url, body):
  got = httpx.post(f'{url}/generate', content=body)
  assert got.status_code == 400
  assert got.json()['error']


def test_nan_is_refused(url):
  body = wire.pack(edit(value=123456), {}).replace(b'123456', b'   NaN')
  got = httpx.post(f'{url}/generate', content=body)
  assert got.status_code == 400
  assert 'NaN' in got.json()['error']


def test_a_body_that_is_too_long_is_refused(url):
  got = httpx.post(f'{url}/generate', content=bytes(1_000_001))
  assert got.status_code == 413
  assert 'server.max_mb' in got.json()['error']


def test_other_paths_and_methods_are_refused(url):
  for method, path in (
    ('POST', '/eval'),
    ('GET', '/nothing'),
    ('GET', '/'),
    ('POST', '/info'),
    ('DELETE', '/info'),
    ('GET', '/generate'),
  ):
    got = httpx.request(method, url + path)
    assert got.status_code in (404, 405), (method, path)
    assert got.json()['error']


def test_a_token_is_asked_for_where_one_is_set(service):
  with running(service, token='abc') as at:
    assert SubjectClient(at).health()
    for token in ('', 'abd', 'ab', 'abcd'):
      with pytest.raises(ValueError, match='bearer token'):
        SubjectClient(at, token=token).info()
    assert SubjectClient(at, token='abc').info()['model'] == 'tiny'


def test_another_address_needs_a_token():
  with pytest.raises(ValueError, match=r'server\.token'):
    serve.bind(ServerConfig(host='0.0.0.0'))
  serve.bind(ServerConfig(host='0.0.0.0', token='a')).close()
  serve.bind(ServerConfig(host='localhost')).close()
  with pytest.raises(ValueError, match=r'server\.host'):
    serve.bind(ServerConfig(host='256.0.0.1', token='a'))


def test_a_port_that_is_taken_says_so():
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(OSError, match=f'127.0.0.1:{port}'):
      serve.bind(ServerConfig(port=port))


def test_an_sae_of_another_model_is_refused(subject, sae):
  narrow = type(sae)(
    sae.w_enc_MD[:, :9], sae.b_enc_M, sae.w_dec_MD[:, :9], sae.b_dec_D[:9], 5
  )
  with pytest.raises(ValueError, match='width 9'):
    Service(subject, {LAYER: narrow})
  with pytest.raises(ValueError, match='layer 7'):
    Service(subject, {7: sae})


def test_what_the_server_says_is_json(url):
  assert json.loads(httpx.get(f'{url}/health').text) == {'status': 'ok'}
