"""Drives a headless Chromium over its DevTools pipe; needs no driver.

    with Chromium() as browser, browser.page('file:///x/index.html') as page:
      page.wait('document.body.dataset.shown')
      page.press('Tab')
      page.text('h1')

To take a picture: python -m tests.stages.chromium PAGE.html OUT.png [WIDTH]
[HEIGHT] [light|dark] [#/route]
"""

import base64
import fcntl
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import time

FLAGS = (
  '--headless',
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
  '--disable-dev-shm-usage',
  '--hide-scrollbars',
  '--remote-debugging-pipe',
)
NAMES = ('chromium', 'chromium-browser', 'google-chrome')
KEYS = {  # name -> (code, virtual key, text)
  'Tab': ('Tab', 9, ''),
  'Enter': ('Enter', 13, '\r'),
  'Escape': ('Escape', 27, ''),
  ' ': ('Space', 32, ' '),
  'ArrowLeft': ('ArrowLeft', 37, ''),
  'ArrowRight': ('ArrowRight', 39, ''),
  '/': ('Slash', 191, '/'),
}


def find() -> str | None:
  """The path of a Chromium, if this machine has one."""
  return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
  """A browser process with a profile of its own."""

  def __init__(self, timeout_s: float = 60.0):
    self.timeout_s = timeout_s
    self.events: list[dict] = []
    self._answers: dict[int, dict] = {}
    self._next = 0
    self._buffer = b''

  def __enter__(self) -> 'Chromium':
    path = find()
    if path is None:
      raise FileNotFoundError('no Chromium: see launch/check_report.sh')
    self._profile = tempfile.mkdtemp(prefix='chromium-')
    theirs_in, self._out = os.pipe()
    self._in, theirs_out = os.pipe()
    high = [
      fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)
    ]

    def wire():  # the browser reads commands from 3 and writes to 4
      os.dup2(high[0], 3)
      os.dup2(high[1], 4)

    self._process = subprocess.Popen(
      [path, *FLAGS, f'--user-data-dir={self._profile}', 'about:blank'],
      preexec_fn=wire,
      pass_fds=(3, 4),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      env=os.environ | {'HOME': self._profile},
    )
    for fd in (theirs_in, theirs_out, *high):
      os.close(fd)
    return self

  def __exit__(self, *_) -> None:
    os.close(self._out)  # the browser ends when its pipe does
    try:
      self._process.wait(10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    os.close(self._in)
    shutil.rmtree(self._profile, ignore_errors=True)

  def send(self, method: str, session: str = '', **params) -> dict:
    """The result of a DevTools command; events that come first are kept."""
    self._next += 1
    line = {'id': self._next, 'method': method, 'params': params}
    if session:
      line['sessionId'] = session
    os.write(self._out, json.dumps(line).encode() + b'\0')
    deadline = time.monotonic() + self.timeout_s
    while self._next not in self._answers:
      self._read(deadline, method)
    answer = self._answers.pop(self._next)
    if 'error' in answer:
      raise RuntimeError(f'{method}: {answer["error"]["message"]}')
    return answer['result']

  def _read(self, deadline: float, what: str) -> None:
    left = deadline - time.monotonic()
    if left <= 0 or not select.select([self._in], [], [], left)[0]:
      raise TimeoutError(f'{what}: no answer within {self.timeout_s} s')
    part = os.read(self._in, 1 << 16)
    if not part:
      raise RuntimeError(f'{what}: Chromium ended')
    *lines, self._buffer = (self._buffer + part).split(b'\0')
    for line in map(json.loads, lines):
      if 'id' in line:
        self._answers[line['id']] = line
      else:
        self.events.append(line)

  def page(
    self, url: str, width: int = 1280, height: int = 900, dark: bool = False
  ) -> 'Page':
    return Page(self, url, width, height, dark)


class Page:
  """One tab. `errors` and `requests` are what it did so far."""

  def __init__(self, browser, url, width, height, dark):
    self._browser = browser
    target = browser.send('Target.createTarget', url='about:blank')
    self._target = target['targetId']
    self._session = browser.send(
      'Target.attachToTarget', targetId=self._target, flatten=True
    )['sessionId']
    for domain in ('Page', 'Runtime', 'Log', 'Network'):
      self.send(f'{domain}.enable')
    scheme = {
      'name': 'prefers-color-scheme',
      'value': 'dark' if dark else 'light',
    }
    self.send('Emulation.setEmulatedMedia', features=[scheme])
    self.size(width, height)
    self.send('Page.navigate', url=url)
    self.wait(f'location.href.startsWith({json.dumps(url.split("#")[0])})')
    self.wait('document.readyState === "complete"')

  def __enter__(self) -> 'Page':
    return self

  def __exit__(self, *_) -> None:
    self._browser.send('Target.closeTarget', targetId=self._target)

  def send(self, method: str, **params) -> dict:
    return self._browser.send(method, self._session, **params)

  def size(self, width: int, height: int) -> None:
    self.send(
      'Emulation.setDeviceMetricsOverride',
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=width < 600,
    )

  def run(self, script: str):
    """The value of an expression; a promise is awaited."""
    got = self.send(
      'Runtime.evaluate',
      expression=script,
      awaitPromise=True,
      returnByValue=True,
    )
    if 'exceptionDetails' in got:
      raise RuntimeError(f'{script}: {got["exceptionDetails"]}')
    return got['result'].get('value')

  def wait(self, script: str) -> None:
    """Until the expression is true."""
    self.run(
      'new Promise((done, fail) => { const end = Date.now() + 50000;'
      f' const look = () => {{ if ({script}) done(true);'
      ' else if (Date.now() > end) fail(new Error("waited in vain"));'
      ' else setTimeout(look, 20); }; look(); })'
    )

  def text(self, selector: str) -> str:
    return self.run(
      f'document.querySelector({json.dumps(selector)}).innerText.trim()'
    )

  def texts(self, selector: str) -> list[str]:
    return self.run(
      f'[...document.querySelectorAll({json.dumps(selector)})]'
      '.filter((e) => e.offsetParent).map((e) => e.innerText.trim())'
    )

  def click(self, selector: str) -> None:
    self.run(f'document.querySelector({json.dumps(selector)}).click()')

  def press(self, key: str, shift: bool = False) -> None:
    """Presses and lets go a key of KEYS, as a keyboard does."""
    code, number, text = KEYS[key]
    line = {
      'key': key,
      'code': code,
      'windowsVirtualKeyCode': number,
      'modifiers': 8 if shift else 0,
    }
    self.send('Input.dispatchKeyEvent', type='keyDown', text=text, **line)
    self.send('Input.dispatchKeyEvent', type='keyUp', **line)

  def type(self, text: str) -> None:
    self.send('Input.insertText', text=text)

  def screenshot(self, path: str | os.PathLike) -> None:
    data = self.send('Page.captureScreenshot', format='png')['data']
    pathlib.Path(path).write_bytes(base64.b64decode(data))

  @property
  def errors(self) -> list[str]:
    """Uncaught exceptions, console errors and warnings, failed loads."""
    found = []
    for event in self._mine():
      method, params = event['method'], event['params']
      if method == 'Runtime.exceptionThrown':
        found.append(json.dumps(params['exceptionDetails']))
      if method == 'Runtime.consoleAPICalled' and params['type'] in (
        'error',
        'warning',
        'assert',
      ):
        found.append(json.dumps(params['args']))
      if method == 'Log.entryAdded' and params['entry']['level'] in (
        'error',
        'warning',
      ):
        found.append(params['entry']['text'])
      if method == 'Network.loadingFailed' and not params.get('canceled'):
        found.append(params['errorText'])
    return found

  @property
  def requests(self) -> list[str]:
    """The URL of everything that was asked for."""
    return [
      event['params']['request']['url']
      for event in self._mine()
      if event['method'] == 'Network.requestWillBeSent'
    ]

  def _mine(self) -> list[dict]:
    self.run('0')  # whatever happened before has been told by now
    return [
      event
      for event in self._browser.events
      if event.get('sessionId') == self._session
    ]


def main(page, out, width=1280, height=900, scheme='light', route='#/') -> None:
  """Saves a picture of the page."""
  url = pathlib.Path(page).absolute().as_uri() + route
  with Chromium() as browser:
    size = int(width), int(height)
    with browser.page(url, *size, dark=scheme == 'dark') as tab:
      tab.wait('document.body.dataset.shown')
      tab.wait(
        '[...document.images].every((i) => i.complete || !i.offsetParent ||'
        ' i.getBoundingClientRect().top > innerHeight)'
      )
      tab.screenshot(out)
      for error in tab.errors:
        sys.stderr.write(f'{error}\n')


if __name__ == '__main__':
  main(*sys.argv[1:])
