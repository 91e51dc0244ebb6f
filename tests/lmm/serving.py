"""A server in a thread."""

import contextlib
import threading

from lmm_sae.lmm import serve
from lmm_sae.lmm.serve import ServerConfig


@contextlib.contextmanager
def running(service, **changes):
  """A server in a thread; gives its URL."""
  opts = ServerConfig(**changes)
  with serve.bind(opts) as sock:
    up, url, servers = threading.Event(), [], []

    def announce(at):
      url.append(at)
      up.set()

    def work():
      serve.run(service, sock, opts, announce, servers.append)

    thread = threading.Thread(target=work)
    thread.start()
    assert up.wait(20)
    try:
      yield url[0]
    finally:
      servers[0].should_exit = True
      thread.join(20)
      assert not thread.is_alive()
