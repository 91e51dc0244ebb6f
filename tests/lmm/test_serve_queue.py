"""The server with many clients at once, with bad ones, and when it stops."""

import pathlib
import re
import socket
import threading
import time

import httpx
import pytest

from lmm_sae.core import wire
from lmm_sae.core.records import Edit
from lmm_sae.core.remote import GenerateRow, SubjectClient
from lmm_sae.lmm.service import Service
from tests.lmm.serving import running

LAYER = 1
ASK = 'how does the face feel?'


class Gate:
  """A model that waits to be let through; counts its requests."""

  def __init__(self):
    self.entered = threading.Semaphore(0)
    self.open = threading.Event()
    self.done = []

  def info(self):
    return {'saes': {}}

  def answer(self, method, header, arrays, check):
    del method, arrays
    self.entered.release()
    while not self.open.wait(0.01):
      check()
    check()
    self.done.append(header['n'])
    if header['n'] == 'bad':
      raise KeyError('a fault of ours')
    return {'n': header['n']}, {}


def post(url, n, timeout=20.0):
  body = wire.pack({'n': n}, {})
  return httpx.post(f'{url}/generate', content=body, timeout=timeout)


def in_thread(work):
  thread = threading.Thread(target=work)
  thread.start()
  return thread


def test_a_full_queue_is_answered_503_and_the_rest_in_turn():
  gate = Gate()
  answers = {}

  def ask(n):
    answers[n] = post(url, n)

  with running(gate, queue=2) as url:
    threads = [in_thread(lambda: ask('first'))]
    assert gate.entered.acquire(timeout=10)
    threads += [in_thread(lambda n=n: ask(n)) for n in range(4)]
    until = time.monotonic() + 10
    while len(answers) < 2 and time.monotonic() < until:
      time.sleep(0.01)
    assert [a.status_code for a in answers.values()] == [503, 503]
    assert all(a.headers['retry-after'] for a in answers.values())
    gate.open.set()
    for thread in threads:
      thread.join(10)
    statuses = sorted(a.status_code for a in answers.values())
    assert statuses == [200, 200, 200, 503, 503]
    assert len(gate.done) == 3


def test_a_client_that_hangs_up_harms_nobody():
  gate = Gate()
  with running(gate, queue=4) as url:
    with pytest.raises(httpx.ReadTimeout):
      post(url, 'gone while it runs', timeout=0.3)
    assert gate.entered.acquire(timeout=10)
    started = threading.Thread(target=lambda: post(url, 'stays'))
    started.start()
    assert gate.entered.acquire(timeout=10)
    with pytest.raises(httpx.ReadTimeout):
      post(url, 'gone while it waits', timeout=0.3)
    for _ in range(3):  # the event loop sees the end of a connection in turn
      httpx.get(f'{url}/health')
    gate.open.set()
    started.join(10)
    assert post(url, 'next').status_code == 200
    assert gate.done == ['stays', 'next']


def test_a_torn_request_gives_its_place_back():
  gate = Gate()
  gate.open.set()
  with running(gate, queue=0) as url:
    for _ in range(3):
      host, port = url.removeprefix('http://').split(':')
      with socket.create_connection((host, int(port))) as sock:
        sock.sendall(
          b'POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\nab'
        )
        time.sleep(0.05)
    until = time.monotonic() + 5
    while post(url, 'next').status_code == 503 and time.monotonic() < until:
      time.sleep(0.02)
    assert gate.done == ['next']


def test_a_fault_of_ours_is_a_500_and_the_server_goes_on():
  gate = Gate()
  gate.open.set()
  with running(gate) as url:
    got = post(url, 'bad')
    assert got.status_code == 500
    assert 'KeyError' in got.json()['error']
    assert post(url, 'good').status_code == 200


def test_a_server_that_stops_drops_what_runs():
  gate = Gate()
  got = []
  with running(gate) as url:
    thread = in_thread(lambda: got.append(post(url, 'slow')))
    assert gate.entered.acquire(timeout=10)
  thread.join(10)
  assert got[0].status_code == 503
  assert gate.done == []


@pytest.mark.parametrize(
  ('clients', 'requests'),
  [(6, 6), pytest.param(32, 200, marks=pytest.mark.slow)],
)
def test_a_crowd_is_served_and_the_memory_stays_flat(
  subject, sae, images, clients, requests
):
  """Good and bad requests at once; every good one is answered rightly."""
  good = [
    [GenerateRow(i % 2, ASK, (Edit(i, 6.0),), LAYER), GenerateRow(None, ASK)]
    for i in range(4)
  ]
  bad = [
    [GenerateRow(5, ASK)],
    [GenerateRow(0, ASK, (Edit(99, 1.0),), LAYER)],
    [GenerateRow(0, ASK, (Edit(1, 1.0, where='tiles'),), LAYER)],
  ]
  faults = []

  def visit(url, number):
    with SubjectClient(url, timeout_s=300) as client:
      for turn in range(requests):
        rows = good[(number + turn) % 4]
        if client.generate(rows, images, 4) != wanted[(number + turn) % 4]:
          faults.append(f'{number} {turn}: another answer')
        try:
          client.generate(bad[(number + turn) % 3], images, 4)
          faults.append(f'{number} {turn}: a bad request was answered')
        except ValueError:
          pass

  with running(Service(subject, {LAYER: sae}), queue=4) as url:
    with SubjectClient(url, timeout_s=60) as client:
      wanted = [client.generate(rows, images, 4) for rows in good]
    before = resident_mb()
    threads = [
      in_thread(lambda number=number: visit(url, number))
      for number in range(clients)
    ]
    for thread in threads:
      thread.join()
  assert faults == []
  assert resident_mb() - before < 64


def resident_mb() -> float:
  status = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(r'VmRSS:\s+(\d+)', status)[1]) / 1024
