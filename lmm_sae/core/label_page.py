"""The page on which people rate labels, and what answers it.

POST /api/case {rater}             what is to be rated next
POST /api/label {rater, number, own}   the label, once the rater's words are in
POST /api/answer {rater, number, answer}
POST /api/undo {rater}             opens the case answered last again

Bodies and answers are JSON; pictures are data URLs, so that nothing is reached
by a path. Errors are {error: message}.
"""

import base64
import hmac
import http.server
import importlib.resources
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from lmm_sae.core.ratings import ANSWERS, Case, Sheet

MAX_BODY = 16_384
MAX_WORDS = 200  # characters of a rater's own words
CSP = (
  "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
  "connect-src 'self'; base-uri 'none'; form-action 'none'"
)
FILES = {
  '/': ('label.html', 'text/html; charset=utf-8'),
  '/label.js': ('label.js', 'text/javascript; charset=utf-8'),
  '/label.css': ('label.css', 'text/css; charset=utf-8'),
}

# case -> {images: [{seen, heat}: PNG], texts: [str]}
Show = Callable[[Case], dict[str, Any]]


class Refusal(Exception):
  """A request that cannot be answered, with its HTTP status."""

  def __init__(self, status: int, text: str):
    super().__init__(text)
    self.status = status


class Desk:
  """Answers the page; its methods may be called by threads."""

  def __init__(self, sheets: Mapping[str, Sheet], show: Show):
    self._sheets, self._show = dict(sheets), show
    self._lock = threading.Lock()

  def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What a POST gives.

    Raises:
      Refusal: of a request that makes no sense.
    """
    do = {
      '/api/case': self._case,
      '/api/label': self._label,
      '/api/answer': self._answer,
      '/api/undo': self._undo,
    }.get(path)
    if do is None:
      raise Refusal(404, 'there is no such thing here')
    rater = body.get('rater')
    if not isinstance(rater, str) or (rater and rater not in self._sheets):
      raise Refusal(403, f'nobody of that name rates here: {self._names()}')
    if not rater:
      if len(self._sheets) > 1:
        return {'raters': list(self._sheets)}
      (rater,) = self._sheets
    with self._lock:
      return do(self._sheets[rater], body)

  def _names(self) -> str:
    return ', '.join(self._sheets)

  def _case(self, sheet: Sheet, body: dict[str, Any]) -> dict[str, Any]:
    del body
    at = sheet.next()
    found = {'rater': sheet.rater, 'number': at, 'total': len(sheet.cases)}
    if at == len(sheet.cases):
      return {**found, 'done': True}
    shown = self._show(sheet.cases[at])
    images = [
      {name: _data_url(png) for name, png in one.items()}
      for one in shown['images']
    ]
    last = sheet.last(sheet.cases[at])
    label = {} if last is None else {'own': last.own, 'label': last.label}
    return {**found, 'images': images, 'texts': shown['texts'], **label}

  def _label(self, sheet: Sheet, body: dict[str, Any]) -> dict[str, Any]:
    case = _current(sheet, body)
    own = body.get('own')
    if not isinstance(own, str) or len(own) > MAX_WORDS:
      raise Refusal(400, f'own must be text of at most {MAX_WORDS} characters')
    if sheet.last(case) is None:  # words that follow the label count no more
      sheet.note(case, ' '.join(own.split()), '')
    return {'label': case.label, 'own': sheet.last(case).own}

  def _answer(self, sheet: Sheet, body: dict[str, Any]) -> dict[str, Any]:
    case = _current(sheet, body)
    answer = body.get('answer')
    if answer not in ANSWERS:
      raise Refusal(400, f'answer must be one of {", ".join(ANSWERS)}')
    last = sheet.last(case)
    if last is None:
      raise Refusal(409, 'ask for the label first')
    sheet.note(case, last.own, answer)
    return self._case(sheet, body)

  def _undo(self, sheet: Sheet, body: dict[str, Any]) -> dict[str, Any]:
    before = sheet.next() - 1
    if before >= 0:
      case = sheet.cases[before]
      sheet.note(case, sheet.last(case).own, '')
    return self._case(sheet, body)


def _current(sheet: Sheet, body: dict[str, Any]) -> Case:
  """The case that is open, which the request must be about."""
  at, number = sheet.next(), body.get('number')
  if type(number) is not int or not 0 <= number < len(sheet.cases):
    raise Refusal(404, f'there is no case {number!r}')
  if number != at:
    raise Refusal(409, f'case {at} is open, not {number}: load the page anew')
  return sheet.cases[at]


def _data_url(png: bytes) -> str:
  return 'data:image/png;base64,' + base64.b64encode(png).decode()


def server(
  desk: Desk, host: str, port: int, token: str
) -> http.server.ThreadingHTTPServer:
  """An HTTP server of the page, bound and not yet serving.

  Args:
    token: asked of every POST where it is not empty.

  Raises:
    OSError: the port is taken, or the address is none of ours.
  """
  folder = importlib.resources.files('lmm_sae.core') / 'label_assets'
  pages = {
    path: ((folder / name).read_bytes(), kind)
    for path, (name, kind) in FILES.items()
  }

  class Handler(http.server.BaseHTTPRequestHandler):
    timeout = 60  # seconds in which a request must arrive

    def do_GET(self) -> None:
      content, kind = pages.get(self.path.partition('?')[0], (None, ''))
      if content is None:
        self._json(404, {'error': 'there is no such page'})
      else:
        self._send(200, content, kind)

    def do_POST(self) -> None:
      try:
        self._json(200, desk.answer(self.path, self._body()))
      except Refusal as error:
        self.close_connection = True  # its body may be unread
        self._json(error.status, {'error': str(error)})

    def _body(self) -> dict[str, Any]:
      given = self.headers.get('Authorization', '')
      if token and not hmac.compare_digest(
        given.encode(), f'Bearer {token}'.encode()
      ):
        raise Refusal(401, 'the token is missing or wrong: open /#TOKEN')
      # A page of another site cannot send this type without asking first.
      if self.headers.get('Content-Type') != 'application/json':
        raise Refusal(415, 'the body must be application/json')
      size = self.headers.get('Content-Length', '')
      if not size.isdecimal() or int(size) > MAX_BODY:
        raise Refusal(413, f'a body has at most {MAX_BODY} bytes')
      try:
        body = json.loads(self.rfile.read(int(size)))
      except ValueError as error:
        raise Refusal(400, 'the body is no JSON') from error
      if not isinstance(body, dict):
        raise Refusal(400, 'the body is no JSON object')
      return body

    def _json(self, status: int, value: dict[str, Any]) -> None:
      self._send(status, json.dumps(value).encode(), 'application/json')

    def _send(self, status: int, content: bytes, kind: str) -> None:
      self.send_response(status)
      self.send_header('Content-Type', kind)
      self.send_header('Content-Length', str(len(content)))
      self.send_header('Content-Security-Policy', CSP)
      self.send_header('X-Content-Type-Options', 'nosniff')
      self.send_header('Cache-Control', 'no-store')
      self.end_headers()
      self.wfile.write(content)

    def log_message(self, text: str, *values: Any) -> None:
      logging.debug('label: ' + text, *values)

  made = http.server.ThreadingHTTPServer((host, port), Handler)
  made.daemon_threads = True
  return made
