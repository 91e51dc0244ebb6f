"""What it means when a file or an object cannot be read or written.

TensorStore tells of it in pages; here the cause is named, and what to do.
"""

import errno
import os
import re

FAILURES = (ValueError, NotImplementedError)  # what TensorStore raises
NO_ROOM = (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)
REFUSED = re.compile(
  r'PERMISSION_DENIED|UNAUTHENTICATED|AccessDenied|InvalidAccessKeyId'
  r"|SignatureDoesNotMatch|ExpiredToken|credentials|http_response_code='40[13]'"
)
NO_NETWORK = re.compile(
  r'CURL error|[Cc]ould not (?:connect|resolve)|UNAVAILABLE|DEADLINE_EXCEEDED'
)


def explained(error: Exception, place: str) -> ValueError:
  """What a failure of TensorStore means, and what to do; without its pages."""
  text = str(error)
  code = re.search(r"os_error_code='(\d+)'", text)
  short = re.sub(r"\s*\[[a-z-]+_?[a-z_-]*='.*", '', text, flags=re.DOTALL)
  if '://' in place:
    # Of Google's, a write alone is told so.
    if 'NoSuchBucket' in text or (place[:3] == 'gs:' and 'NOT_FOUND' in text):
      bucket = '/'.join(place.split('/')[:3])
      return ValueError(
        f'{place}: the bucket {bucket} does not exist: make it, or change acts'
      )
    if REFUSED.search(text):
      what = (
        'AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE'
        if place.startswith('s3:')
        else 'GOOGLE_APPLICATION_CREDENTIALS'
      )
      return ValueError(
        f'{place}: access is refused ({short[:200]}): set {what}'
      )
    if NO_NETWORK.search(text):
      what = (
        "AWS_ENDPOINT_URL (for a server that is not Amazon's) and AWS_REGION"
        if place.startswith('s3:')
        else 'the proxy'
      )
      return ValueError(
        f'{place}: no server answers ({short[:200]}): check the network, and '
        f'set {what}'
      )
  elif code:
    return unwritten(place, OSError(int(code[1]), os.strerror(int(code[1]))))
  return ValueError(f'{place}: {short[:300]}')


def unwritten(place: str, error: OSError) -> ValueError:
  """What a local file system's refusal means."""
  reason = os.strerror(error.errno).lower()
  if error.errno in NO_ROOM:
    return ValueError(
      f'{place} cannot be written, {reason}: make room for it, then run the '
      'same again'
    )
  if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
    return ValueError(
      f'{place}: {reason}: make its folder one that may be written, or change '
      'acts'
    )
  return ValueError(f'{place}: {reason}')
