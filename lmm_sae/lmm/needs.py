"""What a capture needs that is not here: each thing with how to get it.

Nothing is loaded, and nothing is fetched: torch is imported only to ask for its
devices, and on no machine is that more than seconds.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import shutil
import struct

from lmm_sae.core import host, jobs, wording
from lmm_sae.core.forecast import size
from lmm_sae.core.jobs import Job
from lmm_sae.core.places import Place
from lmm_sae.lmm import folders

ITEM_BYTES = {'float32': 4, 'bfloat16': 2, 'float16': 2, 'int8': 1}
HEADER = 2**27  # bytes: a longer one is not of safetensors
INDEX = 'model.safetensors.index.json'


@dataclasses.dataclass(frozen=True)
class Lack:
  """Something that is missing.

  Attributes:
    what: in a word: packages, weights, data, device, memory, disk, store.
    why: what was looked for.
    mend: lines, each a command or a field that gets it.
  """

  what: str
  why: str
  mend: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Device:
  """Where the subject would run.

  Attributes:
    name: for people. memory: bytes, of all devices that share the model.
  """

  name: str
  memory: int


def packages(job: Job) -> list[Lack]:
  """The packages that this job imports and that are not installed."""
  wanted = ['torch', 'transformers']
  if job.lmm.device == 'auto':
    wanted.append('accelerate')
  if job.lmm.dtype == 'int8':
    wanted.append('bitsandbytes')
  if job.data.source == 'hub':
    wanted.append('datasets')
  if job.capture.workers == 'ray':
    wanted.append('ray')
  absent = [name for name in wanted if importlib.util.find_spec(name) is None]
  extras = dict.fromkeys(wording.EXTRAS.get(name, '') for name in absent)
  return [
    Lack(
      'packages',
      f'not installed: {", ".join(absent)}',
      (f"pip install 'lmm_sae[{','.join(filter(None, extras))}]'",),
    )
  ] * bool(absent)


def weights(path: str) -> tuple[pathlib.Path | None, list[Lack]]:
  """(the folder, as far as it is one; what it lacks)."""
  try:
    folder = folders.resolve(path)
  except ValueError as error:
    return _folder(path), [Lack('weights', str(error), _fetched(path))]
  absent = [
    name for name in ('tokenizer.json',) if not (folder / name).is_file()
  ]
  pixels = ('preprocessor_config.json', 'processor_config.json')
  if not any((folder / name).is_file() for name in pixels):
    absent.append(pixels[0])
  index = folder / INDEX
  if index.is_file():
    try:
      shards = set(json.loads(index.read_text())['weight_map'].values())
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
      return folder, [
        Lack('weights', f'{index} is damaged', _fetched(folder.name))
      ]
    absent += sorted(name for name in shards if not (folder / name).is_file())
  elif not folders.size(folder):
    absent.append('model.safetensors')
  if not absent:
    return folder, []
  more = f' and {len(absent) - 3} more' if len(absent) > 3 else ''
  return folder, [
    Lack(
      'weights',
      f'{folder} lacks {", ".join(absent[:3])}{more}',
      _fetched(folder.name, str(folder)),
    )
  ]


def _folder(path: str) -> pathlib.Path | None:
  """The folder that a path names, if it holds a config.json."""
  folder = pathlib.Path(path).expanduser()
  return folder if path and (folder / 'config.json').is_file() else None


def _fetched(path: str, folder: str = 'DIR') -> tuple[str, ...]:
  """How a folder of weights is had."""
  name = path if path.count('/') == 1 and path[0] not in './~' else ''
  return (
    f'hf download {name or "OWNER/NAME"} --local-dir {folder}',
    f'--config.lmm.path={folder}',
  )


def width(folder: pathlib.Path) -> int:
  """D, by config.json; 0 where only transformers would know, and it is not."""
  found = host.language_model(str(folder)).get('hidden_size', 0)
  if not found and importlib.util.find_spec('transformers') is not None:
    import transformers

    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
      config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True
      )
      found = config.get_text_config().hidden_size
  return found


def parameters(folder: pathlib.Path) -> int | None:
  """How many parameters the weights have, by their files' headers.

  Where there are no weights, by config.json, if transformers is here to make
  the model without memory; else None.
  """
  files = sorted(folder.glob('*.safetensors'))
  if files:
    return sum(map(_numbers, files))
  if importlib.util.find_spec('transformers') is None:
    return None
  import torch
  import transformers

  try:
    config = transformers.AutoConfig.from_pretrained(
      folder, local_files_only=True
    )
    with torch.device('meta'):
      model = transformers.AutoModelForImageTextToText.from_config(config)
  except (OSError, ValueError, KeyError, TypeError, RuntimeError):
    return None  # config.json is not whole; `weights` says what else is not
  return sum(each.numel() for each in model.parameters())


def _numbers(file: pathlib.Path) -> int:
  """Of all tensors of a safetensors file.

  Raises:
    ValueError: it is none.
  """
  with file.open('rb') as data:
    start = data.read(8)
    count = struct.unpack('<Q', start)[0] if len(start) == 8 else HEADER + 1
    if count > HEADER:
      raise ValueError(f'{file} is no safetensors file: copy it again')
    try:
      header = json.loads(data.read(count))
      return sum(
        math.prod(tensor['shape'])
        for name, tensor in header.items()
        if name != '__metadata__'
      )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as e:
      raise ValueError(f'{file} is damaged: copy it again') from e


def device(job: Job) -> tuple[Device, list[Lack]]:
  """Where the subject would run, and what of that is missing."""
  here = Device(f'CPU, {host.cores()} cores', jobs.memory())
  wanted = job.lmm.device
  if wanted == 'cpu':
    return here, []
  if importlib.util.find_spec('torch') is None:
    return here, [
      Lack('device', f'lmm.device={wanted} cannot be asked without torch', ())
    ]
  import torch

  count = torch.cuda.device_count()
  if count:
    every = [torch.cuda.get_device_properties(at) for at in range(count)]
    some = every if wanted == 'auto' else every[:1]
    return Device(
      f'{len(some)} x {some[0].name}', sum(each.total_memory for each in some)
    ), []
  slow = 'runs it on the CPU, which takes very long with a model of this size'
  return here, [
    Lack(
      'device',
      f'lmm.device={wanted}, and this machine has no GPU that torch can use',
      (
        'run this on a machine with GPUs and a CUDA build of torch',
        f'--config.lmm.device=cpu  ({slow})'
        if job.lmm.path not in folders.PACKAGED
        else '--config.lmm.device=cpu',
      ),
    )
  ]


def memory(needed: int, where: Device) -> list[Lack]:
  """What weights and rows need beyond the device's memory."""
  if needed <= where.memory:
    return []
  return [
    Lack(
      'memory',
      f'{size(needed)} are needed, {where.name} has {size(where.memory)}',
      (
        'lmm.device=auto shards the model over all GPUs of a machine',
        '--config.lmm.dtype=bfloat16, or int8, halves it',
        '--config.capture.group, --config.capture.batch: lower them',
      ),
    )
  ]


def disk(place: Place, needed: float) -> tuple[str, list[Lack]]:
  """(what is known of the room at a place; what is missing of it).

  Args:
    place: of the store, which need not exist.
    needed: bytes that are still to be written.
  """
  if not place.local:
    return f'{place}: a bucket; how much it may hold is not known', []
  there = pathlib.Path(os.fspath(place))
  while not there.exists():
    there = there.parent
  if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
    return f'{there} cannot be written', [
      Lack('disk', f'{there} cannot be written', ('--config.acts=OTHER_DIR',))
    ]
  free = shutil.disk_usage(there).free
  told = f'{size(free)} free at {there}'
  if needed <= free:
    return f'{told}: it fits', []
  return f'{told}: it does not fit', [
    Lack(
      'disk',
      f'{size(needed)} are to be written, {told}',
      (
        '--workdir or --config.acts on a larger disk, or acts=s3://BUCKET/RUN',
        '--config.capture.keep="(\'all:0.05\',)" stores a share of the tokens',
        '--config.capture.store=int8 halves it; --config.data.limit=N samples',
      ),
    )
  ]


def data(job: Job, error: str) -> Lack:
  """What to do where the data cannot be opened."""
  source = job.data.source
  mend: tuple[str, ...] = ()
  if source == 'llava':
    mend = (
      '--config.data.path=FILE.json --config.data.image_root=IMAGES',
      'or, with its images, from the hub:',
      'hf download --repo-type dataset lmms-lab/LLaVA-NeXT-Data '
      '--local-dir DIR',
      '--config.data.source=hub --config.data.path=DIR',
    )
  elif source == 'hub':
    name = job.data.path or 'lmms-lab/LLaVA-NeXT-Data'
    mend = (
      f'hf download --repo-type dataset {name} --local-dir DIR',
      '--config.data.path=DIR',
      'or --config.data.stream=True, which keeps no file',
    )
  elif source == 'images':
    mend = ('--config.data.path=FOLDER_OF_IMAGES',)
  return Lack('data', error, mend)
