"""What each kernel costs on a device, and which form of it is the cheaper one.

The roofline: an operation takes at least as long as its arithmetic at the peak
of the unit that does it, as its bytes at the bandwidth of the memory, and as
what it sends at the bandwidth of the links; `seconds` is the longest of these.
Bytes are those that must move: each input read once and each result written
once, and a gathered row once for each time it is named, as if nothing were
cached. So the figures are bounds, not forecasts; no kernel was timed for them.

The rule: of a sparse product over K latents a row and the dense product over
all M with the code spread out, the one with fewer seconds is taken. The first
moves N·K rows of D, the second computes 2·N·M·D:

    dense / sparse ≈ 2·M·bandwidth / (K·bytes·FLOP/s)

Peaks are those of the makers' data sheets, without sparsity; of float32 that of
TF32 on an NVIDIA GPU and of one bfloat16 pass on a TPU, with which JAX
multiplies float32 unless told otherwise. Sources: NVIDIA's data sheets of the
A100 80GB SXM, H100 SXM and H200 SXM; Google's pages of TPU v4, v5e, v5p, v6e at
cloud.google.com/tpu/docs. A link's bandwidth is counted in both directions.

Neither jax nor numpy is needed here.
"""

import dataclasses

BYTES = {'bfloat16': 2, 'float32': 4}
VECTOR = 'vector'  # float32 outside the matrix units
FORMS = ('sparse', 'dense')
SORT_PASSES = 8  # reads and writes of a radix sort by 32 bits, 8 at a time


@dataclasses.dataclass(frozen=True)
class Device:
  """A chip, as its data sheet has it.

  Attributes:
    name: short.
    kind: what jax calls it, or the beginning of that.
    flops: FLOP/s by dtype of a matrix product, and of VECTOR; one that is not
      there is not published, and not counted.
    bandwidth: of its memory, bytes/s.
    memory: bytes.
    link: to other chips, all links and both directions, bytes/s; 0: unknown.
    clock: Hz, in which a TPU's compiler counts; 0: unknown.
  """

  name: str
  kind: str
  flops: dict[str, float]
  bandwidth: float
  memory: float
  link: float = 0.0
  clock: float = 0.0


def _device(
  name, kind, matrix, tf32, vector, bandwidth, memory, link, clock=0.0
):
  flops = {'bfloat16': matrix * 1e12, 'float32': tf32 * 1e12}
  if vector:
    flops[VECTOR] = vector * 1e12
  return Device(
    name,
    kind,
    flops,
    bandwidth * 1e9,
    memory * 1e9,
    link * 1e9,
    clock * 1e9,
  )


# TFLOP/s of bfloat16, float32, vector; GB/s; GB; GB/s of links; GHz, which is
# the peak over what 4 matrix units of 128 x 128 a core do in a cycle.
DEVICES = {
  device.name: device
  for device in (
    _device('a100', 'NVIDIA A100', 312, 156, 19.5, 2039, 80, 600),
    _device('h100', 'NVIDIA H100', 989.4, 494.7, 66.9, 3350, 80, 900),
    _device('h200', 'NVIDIA H200', 989.4, 494.7, 66.9, 4800, 141, 900),
    _device('v4', 'TPU v4', 275, 275, 0, 1228, 34.36, 600, 1.05),
    _device('v5e', 'TPU v5 lite', 197, 197, 0, 819, 17.18, 400, 1.5),
    _device('v5p', 'TPU v5', 459, 459, 0, 2765, 102, 1200, 1.75),
    _device('v6e', 'TPU v6', 918, 918, 0, 1638, 34.36, 800),
  )
}


def find(kind: str) -> Device | None:
  """The device that jax calls `kind`; None where it is not in the table."""
  found = [x for x in DEVICES.values() if kind.startswith(x.kind)]
  return max(found, key=lambda x: len(x.kind), default=None)


@dataclasses.dataclass(frozen=True)
class Shape:
  """Of a step, on one chip: N rows, width D, M latents, K a row, its dtype.

  Raises:
    ValueError: the dtype is not one of BYTES, or a number is not positive.
  """

  rows: int
  width: int
  latents: int
  k: int
  dtype: str = 'bfloat16'

  def __post_init__(self):
    if self.dtype not in BYTES:
      raise ValueError(
        f'dtype is {self.dtype!r}; it must be one of {", ".join(BYTES)}'
      )
    for name in ('rows', 'width', 'latents', 'k'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} is {getattr(self, name)}; it must be above 0')

  @property
  def size(self) -> int:
    """Bytes of a number."""
    return BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one operation, on one chip.

  Attributes:
    name: of the operation.
    flops: of the unit `unit`, a key of `Device.flops`.
    bytes: read from and written to the chip's memory.
    unit: a dtype or VECTOR.
    sent: bytes over the chip's links, in and out.
  """

  name: str
  flops: float
  bytes: float
  unit: str = VECTOR
  sent: float = 0.0


def seconds(cost: Cost, device: Device, /) -> float:
  """The least time that the operation takes on the device."""
  peak = device.flops.get(cost.unit)
  return max(
    cost.flops / peak if peak else 0.0,
    cost.bytes / device.bandwidth,
    cost.sent / device.link if device.link else 0.0,
  )


def limit(cost: Cost, device: Device, /) -> str:
  """What holds it up: arithmetic, memory or links."""
  parts = {
    'arithmetic': dataclasses.replace(cost, bytes=0, sent=0),
    'memory': dataclasses.replace(cost, flops=0, sent=0),
    'links': dataclasses.replace(cost, flops=0, bytes=0),
  }
  return max(parts, key=lambda name: seconds(parts[name], device))


def encode(s: Shape, /) -> Cost:
  """The k largest of relu(x wᵀ + b): a dense product, nothing else stored."""
  read = s.size * (s.rows + s.latents) * s.width + 4 * s.latents
  flops = 2 * s.rows * s.latents * s.width
  return Cost('encode', flops, read + 8 * s.rows * s.k, s.dtype)


def spmm(s: Shape, /, form: str = 'sparse') -> Cost:
  """y = z w: K rows of w for a row, or z spread out to [N, M] first."""
  code = 8 * s.rows * s.k
  if form == 'sparse':
    flops = 2 * s.rows * s.k * s.width
    read = s.size * s.rows * s.k * s.width
    return Cost('spmm', flops, code + read + 4 * s.rows * s.width)
  moved = code + s.size * (2 * s.rows + s.width) * s.latents
  flops = 2 * s.rows * s.latents * s.width
  return Cost('spmm', flops, moved + 4 * s.rows * s.width, s.dtype)


def sddmm(s: Shape, /, form: str = 'sparse') -> Cost:
  """K products of a row with rows of w, or all M of them and K picked out."""
  code = 8 * s.rows * s.k
  x = s.size * s.rows * s.width
  if form == 'sparse':
    flops = 2 * s.rows * s.k * s.width
    return Cost('sddmm', flops, code + x + s.size * s.rows * s.k * s.width)
  moved = x + s.size * s.latents * s.width + 4 * s.rows * s.latents
  flops = 2 * s.rows * s.latents * s.width
  return Cost('sddmm', flops, moved + code + 4 * s.rows * s.k, s.dtype)


def spmm_t(s: Shape, /, form: str = 'sparse') -> Cost:
  """w = zᵀ x: codes sorted by latent, rows of x gathered; or z spread out."""
  code = 8 * s.rows * s.k
  result = 4 * s.latents * s.width
  if form == 'sparse':
    flops = 2 * s.rows * s.k * s.width
    moved = SORT_PASSES * code + s.size * s.rows * s.k * s.width
    return Cost('spmm_t', flops, moved + result)
  moved = code + s.size * (2 * s.rows * s.latents + s.rows * s.width)
  flops = 2 * s.rows * s.latents * s.width
  return Cost('spmm_t', flops, moved + result, s.dtype)


def project(s: Shape, /) -> Cost:
  """The gradient without its part along each row: two arrays in, one out."""
  count = s.latents * s.width
  return Cost('project', 6 * count, 12 * count + 4 * s.latents)


def adam(s: Shape, /) -> Cost:
  """One matrix's step: gradient, parameters, two moments in; three out."""
  count = s.latents * s.width
  return Cost('adam', 14 * count, 28 * count)


PRODUCTS = {'spmm': spmm, 'sddmm': sddmm, 'spmm_t': spmm_t}


@dataclasses.dataclass(frozen=True)
class Choice:
  """Which form a product takes, and what each would take."""

  form: str
  sparse_s: float
  dense_s: float

  @property
  def why(self) -> str:
    """In words."""
    return (
      f'sparse at least {1e3 * self.sparse_s:.3g} ms, '
      f'dense at least {1e3 * self.dense_s:.3g} ms'
    )


def choose(name: str, device: Device, s: Shape, /) -> Choice:
  """The form of one of PRODUCTS."""
  sparse_s, dense_s = (
    seconds(PRODUCTS[name](s, form), device) for form in FORMS
  )
  return Choice('sparse' if sparse_s <= dense_s else 'dense', sparse_s, dense_s)


def choices(
  device: Device,
  rows: int,
  width: int,
  latents: int,
  k: int,
  dtype: str = 'bfloat16',
) -> dict[str, Choice]:
  """The form of each of PRODUCTS."""
  s = Shape(rows, width, latents, k, dtype)
  return {name: choose(name, device, s) for name in PRODUCTS}


def train_step(
  rows: int,
  width: int,
  latents: int,
  k: int,
  dtype: str = 'bfloat16',
  *,
  device: Device | None = None,
  data: int = 1,
  latent: int = 1,
  dead: int = 0,
) -> list[Cost]:
  """The costs of what `sae.trainer` does in one step of `topk`, on one chip.

  Args:
    rows, width, latents, k: of the whole step.
    dtype: of the products; parameters, moments and gradients are float32.
    device: takes the cheaper form of each product; None: sparse.
    data: chips that share the rows.
    latent: chips that share the latents. Each decodes K columns for a row, its
      own winners and zeros: a code does not get narrower.
    dead: latents that AuxK trains, all of them at once; as many as are dead.

  Raises:
    ValueError: rows or latents do not divide.
  """
  for name, whole, parts in (
    ('rows', rows, data),
    ('latents', latents, latent),
  ):
    if parts < 1 or whole % parts:
      raise ValueError(
        f'{name} is {whole}, which {parts} chips cannot share evenly'
      )
  own = latents // latent
  s = Shape(rows // data, width, own, min(k, own), dtype)
  form = {
    name: choose(name, device, s).form if device else 'sparse'
    for name in PRODUCTS
  }
  return [
    *_passes(s),
    encode(s),
    spmm(s, form['spmm']),
    sddmm(s, form['sddmm']),
    *(
      dataclasses.replace(spmm_t(s, form['spmm_t']), name=f'spmm_t {name}')
      for name in ('w_dec', 'w_enc')
    ),
    project(s),
    *(
      dataclasses.replace(adam(s), name=f'adam {name}')
      for name in ('w_dec', 'w_enc')
    ),
    *([_dead(s, dead)] if dead else []),
    *_exchanges(s, data, latent),
  ]


def _passes(s: Shape) -> list[Cost]:
  """What goes once over whole arrays beside the kernels."""
  count, row = s.latents * s.width, 4 * s.rows * s.width
  cast = 2 * (4 + s.size) * count if s.size < 4 else 0
  return [
    Cost('cast of w', 0, cast),
    # Mean, variance, centred copy; the error, and its copy for the gradients.
    Cost('rows', 8 * s.rows * s.width, 6 * row + 2 * s.size * row // 4),
    Cost('gradient of b_dec', 2 * count, s.size * count, s.dtype),
    Cost('norm of a gradient', 2 * count, 4 * count),
  ]


def _dead(s: Shape, dead: int) -> Cost:
  """AuxK over so many latents: two products forward, three back, all dense."""
  count = dead * s.width
  moved = s.size * (4 * count + 6 * s.rows * dead) + 16 * s.rows * s.width
  return Cost('auxk', 10 * s.rows * count, moved + 8 * count, s.dtype)


def _exchanges(s: Shape, data: int, latent: int) -> list[Cost]:
  """What chips send: values of codes, rows' sums, and gradients' sums.

  A gather over n chips brings in and sends out (n - 1) pieces; a sum, as a
  ring does it, twice (n - 1)/n of the array each way.
  """
  found = []
  if latent > 1:
    values = 2 * 4 * s.rows * s.k * (latent - 1)
    found.append(Cost('gather of values', 0, 0, sent=values))
    sums = 4 * 4 * s.rows * s.width * (latent - 1) / latent
    found.append(Cost('sum over latents', 0, 0, sent=sums))
  if data > 1:
    grads = 4 * (2 * s.latents * s.width + 3 * s.latents + s.width)
    sums = 4 * grads * (data - 1) / data
    found.append(Cost('sum over rows', 0, 0, sent=sums))
  return found


def total_seconds(costs: list[Cost], device: Device, /) -> float:
  """Of a step whose operations follow one another."""
  return sum(seconds(cost, device) for cost in costs)


def describe(
  device: Device,
  rows: int,
  width: int,
  latents: int,
  k: int,
  dtype: str = 'bfloat16',
) -> list[str]:
  """Which forms are taken and where a step's time goes, line by line."""
  found = choices(device, rows, width, latents, k, dtype)
  costs = train_step(rows, width, latents, k, dtype, device=device)
  return [
    f'{device.name} (data sheet): N={rows}, D={width}, M={latents}, K={k}, '
    f'{dtype}',
    *(f'{name}: {one.form}, {one.why}' for name, one in found.items()),
    *(
      f'{cost.name}: {1e3 * seconds(cost, device):.3g} ms, '
      f'{limit(cost, device)}'
      for cost in costs
    ),
    f'step: at least {1e3 * total_seconds(costs, device):.3g} ms',
  ]
