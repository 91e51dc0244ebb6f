"""The other families, run in two halves as the model server runs them."""

import numpy as np
import pytest
import torch
from PIL import Image

from lmm_sae.core.records import Edit
from lmm_sae.core.remote import Text
from lmm_sae.lmm import forward, gradients, losses
from lmm_sae.lmm.forward import Job
from lmm_sae.lmm.llava import Subject
from tests.lmm import tiny_llava
from tests.lmm.conftest import random_sae
from tests.lmm.test_forward import LAYER, NEW, slowly

EDITS = (Edit(3, 6.0, when='both'), Edit(5, 2.0, mode='add', where='image'))


@pytest.fixture(
  scope='module', params=['llava', 'llava_interleave', 'llava_onevision']
)
def subject(request, tmp_path_factory):
  name = request.param
  folder = tiny_llava.family(tmp_path_factory.mktemp(name) / name, name)
  return Subject.load(folder, threads=1)


@pytest.fixture(scope='module')
def sae():
  return random_sae(40, tiny_llava.WIDTH, 5)


@pytest.fixture(scope='module')
def asked(subject):
  rng = np.random.default_rng(4)
  images = [
    Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8))
    for w, h in ((40, 30), (100, 90))
  ]
  text = subject.chat('how does the face feel?', 1)
  return [forward.ask(subject, text, image) for image in images]


@pytest.mark.parametrize('edits', [(), EDITS], ids=['plain', 'edited'])
def test_the_halves_write_what_the_whole_model_writes(
  subject, sae, asked, edits
):
  jobs = [Job(prompt, LAYER, edits) for prompt in asked]
  found = forward.write(subject, {LAYER: sae}, jobs, NEW)
  assert found == [slowly(subject, sae, job, NEW) for job in jobs]
  assert all(found)


def test_gradients_are_those_of_the_whole_model(subject, asked):
  prompt, tokens = asked[0], (7, 11)
  found = gradients.gradient(subject, prompt, LAYER, tokens)
  kept = []

  def watch(module, args, output):
    x_BTD = output[0] if isinstance(output, tuple) else output
    kept.append(x_BTD.requires_grad_())

  handle = subject.layer(LAYER).register_forward_hook(watch)
  with torch.enable_grad():
    logits_V = subject.model(**prompt.inputs).logits[0, -1]
    (grad_BTD,) = torch.autograd.grad(
      logits_V[tokens[0]] - logits_V[tokens[1]], kept[0]
    )
  handle.remove()
  torch.testing.assert_close(found.grad_TD, grad_BTD[0], rtol=1e-3, atol=1e-5)


def test_the_clean_loss_is_the_whole_models(subject, asked):
  prompt = asked[1]
  image = Image.fromarray(
    np.random.default_rng(5).integers(0, 256, (90, 100, 3), np.uint8)
  )
  text = subject.chat('how does the face feel?', 1)
  tokens = subject.encode(text, [image])
  assert len(tokens.token_T) == len(prompt.map.token_T)
  asked_text = Text(tokens.token_T, tokens.kind_T, image)
  (found,) = losses.losses(subject, LAYER, None, [asked_text], ['clean'])
  inputs = subject.inputs([text], [[image]])
  with torch.no_grad():
    log_TV = subject.model(**inputs).logits[0].log_softmax(1)
  want_T = -log_TV[:-1].gather(1, inputs['input_ids'][0, 1:, None])[:, 0]
  np.testing.assert_allclose(found.ce_RT[0], want_T, rtol=1e-4, atol=1e-4)
