"""The subject server: `Service` behind HTTP, for one machine or a trusted net.

POST /residual /gradient /logits /generate /loss /ground /clip
     bodies: core.wire
GET  /health /info                                         JSON

One thread runs the model; requests wait their turn in a queue of fixed length,
and one that finds it full is answered 503. A request whose client hangs up is
dropped, before or between two tokens. Errors are {'error': message}.
"""

import asyncio
import dataclasses
import secrets
import socket
import threading
from collections.abc import Callable
from concurrent import futures

import fastapi
import torch
import uvicorn
from absl import logging
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lmm_sae.core import host, wire
from lmm_sae.lmm.forward import Cancelled
from lmm_sae.lmm.service import METHODS, Service

BODY_S = 120.0  # a body must arrive within
MEDIA = 'application/octet-stream'


@dataclasses.dataclass(frozen=True)
class ServerConfig:
  """config.server; see experiments/base.py."""

  url: str = ''
  host: str = '127.0.0.1'
  port: int = 0
  token: str = ''
  max_mb: int = 256
  queue: int = 16
  timeout_s: float = 600.0


def bind(opts: ServerConfig) -> socket.socket:
  """A socket at that address, not yet listening.

  Raises:
    ValueError: another address than loopback, and no token.
    OSError: the port is taken, or the address is not ours.
  """
  host.check_address('server.host', opts.host, opts.token)
  try:
    family, kind, proto, _, address = socket.getaddrinfo(
      opts.host, opts.port, type=socket.SOCK_STREAM
    )[0]
  except (socket.gaierror, OverflowError) as error:
    raise ValueError(
      f'server.host {opts.host!r} port {opts.port}: {error}'
    ) from error
  sock = socket.socket(family, kind, proto)
  sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    sock.bind(address)
    sock.listen(128)  # Linux tells only now whether the port is taken
  except OSError as error:
    sock.close()
    raise OSError(error.errno, f'{opts.host}:{opts.port}') from error
  return sock


def run(
  service: Service,
  sock: socket.socket,
  opts: ServerConfig,
  announce: Callable[[str], None],
  own: Callable[[uvicorn.Server], None] = lambda _: None,
) -> None:
  """Serves until SIGINT or SIGTERM; `announce` gets the URL once it is up.

  `own` gets the server, whose `should_exit` ends it too.
  """
  stopping = threading.Event()
  server = _Server(
    uvicorn.Config(
      app(service, opts, stopping),
      log_level='warning',
      access_log=False,
      timeout_graceful_shutdown=5,
      lifespan='off',
    )
  )
  host, port = sock.getsockname()[:2]
  server.up = lambda: announce(
    f'http://[{host}]:{port}' if ':' in host else f'http://{host}:{port}'
  )
  server.down = stopping.set
  own(server)
  server.run(sockets=[sock])


class _Server(uvicorn.Server):
  """Tells when it is up, and when it is about to go down."""

  up: Callable[[], None]
  down: Callable[[], None]

  async def startup(self, sockets=None) -> None:
    await super().startup(sockets)
    if self.started:
      self.up()

  async def shutdown(self, sockets=None) -> None:
    self.down()
    await super().shutdown(sockets)


def app(
  service: Service, opts: ServerConfig, stopping: threading.Event
) -> fastapi.FastAPI:
  """The HTTP application."""
  api = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
  worker = futures.ThreadPoolExecutor(1, 'model')
  places = _Places(opts.queue + 1)  # one runs, the others wait
  wanted = f'Bearer {opts.token}'.encode()

  def admit(request: fastapi.Request) -> None:
    given = request.headers.get('authorization', '').encode()
    if opts.token and not secrets.compare_digest(given, wanted):
      raise HTTPException(401, 'a bearer token is needed: set server.token')

  @api.get('/health')
  async def health() -> dict[str, str]:
    return {'status': 'ok'}

  @api.get('/info')
  async def info(request: fastapi.Request) -> JSONResponse:
    admit(request)
    return JSONResponse(service.info())

  @api.post('/{method}')
  async def post(method: str, request: fastapi.Request) -> fastapi.Response:
    admit(request)
    if method not in METHODS:
      raise HTTPException(404, f'no {method!r} here, only {METHODS}')
    if not places.take():
      await _drain(request)  # a client that is still sending hears nothing
      return _error(503, 'the queue is full: try again', {'Retry-After': '1'})
    try:
      body = await _read(request, opts.max_mb)
      gone = asyncio.create_task(_gone(request))
    except BaseException:
      places.give()
      raise

    def check() -> None:
      if gone.done() or stopping.is_set():
        raise Cancelled

    def work() -> bytes:
      check()
      header, arrays = wire.unpack(body)
      return wire.pack(*service.answer(method, header, arrays, check))

    job = worker.submit(work)
    job.add_done_callback(lambda _: places.give())
    try:
      return fastapi.Response(await asyncio.wrap_future(job), media_type=MEDIA)
    finally:
      gone.cancel()

  @api.exception_handler(ValueError)
  async def refuse(request, error) -> JSONResponse:
    del request
    return _error(400, str(error))

  @api.exception_handler(HTTPException)
  async def refuse_http(request, error) -> JSONResponse:
    del request
    return _error(error.status_code, str(error.detail))

  @api.exception_handler(ClientDisconnect)
  @api.exception_handler(Cancelled)
  async def drop(request, error) -> JSONResponse:
    del request, error
    return _error(503, 'the request was dropped: the server is stopping')

  @api.exception_handler(torch.OutOfMemoryError)
  @api.exception_handler(MemoryError)
  async def too_much(request, error) -> JSONResponse:
    del request
    logging.warning('out of memory: %s', error)
    return _error(413, f'it does not fit in memory, send less at once: {error}')

  @api.exception_handler(Exception)
  async def fail(request, error) -> JSONResponse:
    logging.error('%s: %s: %s', request.url.path, type(error).__name__, error)
    return _error(500, f'{type(error).__name__}: {error}')

  return api


class _Places:
  """Counts the requests that wait or run; taken and given by any thread."""

  def __init__(self, count: int):
    self._free = threading.Semaphore(count)

  def take(self) -> bool:
    return self._free.acquire(blocking=False)

  def give(self) -> None:
    self._free.release()


def _error(status: int, message: str, headers=None) -> JSONResponse:
  return JSONResponse({'error': message}, status, headers)


async def _read(request: fastapi.Request, max_mb: int) -> bytes:
  """The body, if it is not too long."""
  parts, size = [], 0
  try:
    async with asyncio.timeout(BODY_S):
      async for part in request.stream():
        size += len(part)
        if size <= max_mb * 1_000_000:
          parts.append(part)
        else:
          parts.clear()  # read on, or the client never reads the answer
  except TimeoutError as error:
    raise HTTPException(408, f'no whole body within {BODY_S:g} s') from error
  if size > max_mb * 1_000_000:
    raise HTTPException(
      413,
      f'the body has {size / 1e6:.1f} MB, the limit is {max_mb}: send less at '
      'once, or raise server.max_mb',
    )
  return b''.join(parts)


async def _drain(request: fastapi.Request) -> None:
  async with asyncio.timeout(BODY_S):
    async for _ in request.stream():
      pass


async def _gone(request: fastapi.Request) -> None:
  """Returns once the client has hung up; the body must have been read."""
  while (await request.receive())['type'] != 'http.disconnect':
    pass
