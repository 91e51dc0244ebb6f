"""SAEs on the Hugging Face hub: fetched into its cache, and sent there.

A repository is written `owner/name[:subfolder][@revision]`. Where it stands
(HF_ENDPOINT), who asks (HF_TOKEN), and the cache (HF_HOME) are the hub client's
own settings; with HF_HUB_OFFLINE=1 what the cache holds is taken and nothing is
asked. The client comes with the extra `hub`.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator

KINDS = ('*.safetensors', '*.json', '*.md')  # that are fetched, and sent
PICKLES = ('*.pt',)  # that are fetched too if they are asked for

_NAME = r'[A-Za-z0-9][\w.-]*'
_REPO = re.compile(
  rf'(?P<repo>{_NAME}/{_NAME})(:(?P<folder>[^:@]+))?(@(?P<revision>[^:@]+))?'
)


def is_repo(source: str) -> bool:
  """Whether a source is a repository: it reads like one, and is no path here.

  A relative path of two parts reads like one, too: what exists is a path.
  """
  return bool(_REPO.fullmatch(source)) and not os.path.exists(source)


def place(source: str | os.PathLike, pickles: bool = False) -> pathlib.Path:
  """The folder that is meant: a local one, or that of a repository, fetched.

  Raises:
    ValueError: it reads like a repository and cannot be had.
  """
  text = os.fspath(source)
  return fetch(text, pickles) if is_repo(text) else pathlib.Path(text)


def fetch(source: str, pickles: bool = False) -> pathlib.Path:
  """The folder of a repository, from the hub or its cache.

  Args:
    source: owner/name[:subfolder][@revision].
    pickles: whether files that may hold code (ae.pt) are fetched, too. Reading
      one runs none of it: `sae.pickles`.

  Raises:
    ValueError: there is none, or it cannot be had; the message says why.
  """
  match = _REPO.fullmatch(source)
  if match is None:
    raise ValueError(
      f'{source!r} is no repository: write owner/name[:subfolder][@revision]'
    )
  repo, inside = match['repo'], (match['folder'] or '').strip('/')
  if {'..', '.', ''} & set(inside.split('/')) and inside:
    raise ValueError(f'{source}: {inside!r} is no folder of the repository')
  kinds = KINDS + (PICKLES if pickles else ())
  from huggingface_hub import snapshot_download

  with _said(source, 'fetched'):
    root = snapshot_download(
      repo,
      revision=match['revision'],
      allow_patterns=[f'{inside}/{kind}' if inside else kind for kind in kinds],
    )
  folder = pathlib.Path(root, inside)
  if not folder.is_dir() or not any(folder.iterdir()):
    more = '' if pickles else ', without pickles'
    raise ValueError(
      f'{source} has no file of the kinds that are read '
      f'({", ".join(kinds)}{more})'
    )
  return folder


def send(folder: str | os.PathLike, repo: str, message: str = '') -> str:
  """Uploads an export with its card, in one commit; the repository's address.

  A repository that does not exist is made, private. Files that stand there and
  not in the folder stay.

  Raises:
    ValueError: the folder has no card, the name is none, or the hub refuses.
  """
  folder = pathlib.Path(folder)
  if not re.fullmatch(f'{_NAME}/{_NAME}', repo):
    raise ValueError(f'{repo!r} is no repository: write owner/name')
  if not (folder / 'README.md').is_file():
    raise ValueError(f'{folder} has no README.md: it is no export')
  from huggingface_hub import HfApi

  api = HfApi()
  with _said(repo, 'uploaded to'):
    api.create_repo(repo, private=True, exist_ok=True)
    api.upload_folder(
      repo_id=repo,
      folder_path=folder,
      allow_patterns=list(KINDS),
      commit_message=message or 'Upload a sparse autoencoder',
    )
  return f'{api.endpoint}/{repo}'


@contextlib.contextmanager
def _said(source: str, done: str) -> Iterator[None]:
  """Turns what the hub's client raises into one line of what to do."""
  from huggingface_hub import errors

  try:
    yield
  except errors.GatedRepoError as error:
    why = 'its owner has to grant access first (log in, then ask on its page)'
    raise ValueError(f'{source} cannot be {done}: {why}') from error
  except errors.RevisionNotFoundError as error:
    raise ValueError(f'{source} has no such revision') from error
  except errors.RepositoryNotFoundError as error:
    raise ValueError(
      f'{source} is neither a path here nor a repository that this login may '
      'see: check the name, and set HF_TOKEN for a private one'
    ) from error
  except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
    raise ValueError(
      f'{source} is no path here, and cannot be {done}: the hub is not '
      'reached, and its cache does not hold all of it. Fetch it where there is '
      'a network, and give the folder'
    ) from error
  except errors.HfHubHTTPError as error:
    status = error.response.status_code if error.response is not None else '?'
    login = ': set HF_TOKEN to a token that may write' * (status in (401, 403))
    raise ValueError(
      f'{source} cannot be {done}: the hub answered {status}{login}'
    ) from error
  except (errors.HTTPError, OSError) as error:
    line = str(error).strip().partition('\n')[0]
    raise ValueError(
      f'{source} cannot be {done}: {line or type(error).__name__}'
    ) from error
