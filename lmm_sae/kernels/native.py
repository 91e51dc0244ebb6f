"""The functions of the family for a CPU in C++ (`native*`), through jax.ffi.

encode multiplies tile by tile and keeps the k largest of each row as the tiles
are made, so [N, M] never exists, not even in part; the selection is exact. On a
processor with AVX512_BF16 the tiles are products of bfloat16, which is twice as
fast, and what may be among the k largest given a proven bound of the error is
computed again in float32. The work runs on XLA's own threads; spmm_t sums each
latent's rows in their order, so that no result depends on how many they are.

The library is built for the machine that it runs on, once, when it is first
asked for: with $CXX, or c++, and kept under $XDG_CACHE_HOME. Where there is no
compiler, `why_not` says so and the backend `cpu` does the work.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from lmm_sae.kernels import reference

F32 = jnp.float32
MOST_PLACES = 2**31 - 1  # of a code: places are int32
SOURCE = pathlib.Path(__file__).with_name('native.cc')
FLAGS = (
  *('-O3', '-march=native', '-std=c++17', '-shared', '-fPIC'),
  *('-DNDEBUG', '-Wno-psabi'),
)
HANDLERS = {
  'lmm_sae_encode': 'LmmSaeEncode',
  'lmm_sae_spmm': 'LmmSaeSpmm',
  'lmm_sae_sddmm': 'LmmSaeSddmm',
  'lmm_sae_spmm_t': 'LmmSaeSpmmT',
  'lmm_sae_project': 'LmmSaeProject',
  'lmm_sae_adam': 'LmmSaeAdam',
}


def why_not() -> str:
  """Why this backend cannot run here; '' where it can."""
  found = _library()
  return found if isinstance(found, str) else ''


def screens() -> bool:
  """Whether the processor multiplies bfloat16, so that encode screens first."""
  _require()
  return _library().lmm_sae_screens()


@functools.cache
def _library() -> ctypes.CDLL | str:
  """The library, built if need be, its functions known to XLA; or why not."""
  try:
    library = ctypes.CDLL(str(build()))
  except (OSError, RuntimeError) as error:
    return str(error)
  library.lmm_sae_screens.restype = ctypes.c_bool
  for target, symbol in HANDLERS.items():
    handler = jax.ffi.pycapsule(getattr(library, symbol))
    jax.ffi.register_ffi_target(target, handler, platform='cpu')
  return library


def build() -> pathlib.Path:
  """The library for this machine, built where it is not there yet.

  Raises:
    RuntimeError: there is no compiler, or it fails; the message says how.
    OSError: the library cannot be written.
  """
  compiler = shlex.split(os.environ.get('CXX', '')) or ['c++']
  if shutil.which(compiler[0]) is None:
    raise RuntimeError(
      f'there is no C++ compiler {compiler[0]!r}: install one (on Debian, '
      'g++), or name it in $CXX'
    )
  command = [*compiler, *FLAGS, '-isystem', jax.ffi.include_dir(), str(SOURCE)]
  what = [
    path.read_text() for path in sorted(SOURCE.parent.glob('native*.[ch]*'))
  ]
  what += [*command, jax.__version__, _processor()]
  what.append(_run([*compiler, '--version']))
  name = hashlib.sha256('\0'.join(what).encode()).hexdigest()[:16]
  path = _cache() / f'native-{name}.so'
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
      part = pathlib.Path(folder) / path.name
      _run([*command, '-o', str(part)])
      part.replace(path)
  return path


def _cache() -> pathlib.Path:
  home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(home) / 'lmm_sae'


def _processor() -> str:
  """What -march=native looks at: a cache may be shared by several machines."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return platform.processor()
  return '\n'.join(
    sorted({x for x in lines if x.startswith(('flags', 'model', 'Features'))})
  )


def _run(command: list[str]) -> str:
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    last = (done.stderr.strip() or 'no message').splitlines()[-1]
    raise RuntimeError(f'{shlex.join(command[:1])} failed: {last}')
  return done.stdout


def encode(
  x_ND: jax.Array,
  w_MD: jax.Array,
  b_M: jax.Array,
  /,
  *,
  k: int,
  screen: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The k largest of relu(x wᵀ + b), descending, ties to the lower index.

  Args:
    screen: whether bfloat16 products go first; None: where the processor can.
  """
  shape = (x_ND.shape[0], k)
  out = (_f32(shape), jax.ShapeDtypeStruct(shape, jnp.int32))
  screen = screens() if screen is None else screen
  return _call('lmm_sae_encode', out, x_ND, w_MD, b_M, screen=screen)


def spmm(v_NK: jax.Array, i_NK: jax.Array, w_MD: jax.Array, /) -> jax.Array:
  """y[n] = Σ_k v[n, k] · w[i[n, k]]."""
  out = _f32((len(i_NK), w_MD.shape[1]))
  return _call('lmm_sae_spmm', out, v_NK, i_NK, w_MD)


def sddmm(x_ND: jax.Array, i_NK: jax.Array, w_MD: jax.Array, /) -> jax.Array:
  """v[n, k] = ⟨x[n], w[i[n, k]]⟩."""
  return _call('lmm_sae_sddmm', _f32(i_NK.shape), x_ND, i_NK, w_MD)


def spmm_t(
  v_NK: jax.Array, i_NK: jax.Array, x_ND: jax.Array, /, *, latents: int
) -> jax.Array:
  """w[m] = Σ over i[n, k] = m of v[n, k] · x[n], for all M = `latents` rows."""
  if i_NK.size > MOST_PLACES:
    raise NotImplementedError(
      f'the native kernels sum codes of at most {MOST_PLACES} entries, not '
      f'{i_NK.shape}: raise --config.train.accumulate, or use '
      '--config.train.backend=cpu'
    )
  out = _f32((latents, x_ND.shape[1]))
  return _call('lmm_sae_spmm_t', out, v_NK, i_NK, x_ND)


def project(
  grad_MD: jax.Array, w_MD: jax.Array, /
) -> tuple[jax.Array, jax.Array]:
  """The gradient without its part along each row of w; sums of its squares."""
  out = (_f32(w_MD.shape), _f32(w_MD.shape[:1]))
  return _call('lmm_sae_project', out, grad_MD, w_MD, aliases={0: 0})


def adam(
  grad_MD: jax.Array,
  state: tuple[jax.Array, jax.Array, jax.Array],
  scalars: jax.Array,
  /,
  *,
  unit: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Parameters and moments after a step of Adam; in place where XLA allows."""
  out = tuple(_f32(x.shape) for x in state)
  b1, b2, eps = map(np.float32, reference.ADAM)
  return _call(
    'lmm_sae_adam',
    out,
    grad_MD,
    scalars,
    *state,
    aliases={2: 0, 3: 1, 4: 2},
    b1=b1,
    b2=b2,
    eps=eps,
    unit=unit,
  )


def _f32(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, F32)


def _require() -> None:
  if why_not():
    raise NotImplementedError(
      f'the native kernels cannot run here ({why_not()}): use '
      '--config.train.backend=cpu'
    )
  if jax.default_backend() != 'cpu':
    raise NotImplementedError(
      f'the native kernels run on a CPU, but jax runs on '
      f'{jax.default_backend()}: use --config.train.backend=auto'
    )


def _call(target: str, out, *args: jax.Array, aliases=None, **attributes):
  _require()
  args = [
    x if x.dtype == jnp.int32 else x.astype(F32) for x in map(jnp.asarray, args)
  ]
  call = jax.ffi.ffi_call(target, out, input_output_aliases=aliases)
  return call(*args, **attributes)
