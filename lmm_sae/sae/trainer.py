"""One optimiser step of an SAE, and the state that it carries on.

state = trainer.start(config, rows_ND, seed, normalise=True)
step = trainer.make_step(config, options, mesh)
state, metrics = step(state, batch_ND)        # the old state is given away
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmm_sae.kernels import ops, reference
from lmm_sae.sae import losses as losses_lib
from lmm_sae.sae import mesh as mesh_lib
from lmm_sae.sae import model
from lmm_sae.sae.losses import Batch, Weights
from lmm_sae.sae.model import Params, SaeConfig
from lmm_sae.sae.options import DTYPES, TrainConfig, current_k, learning_rate

THETA_STEPS = 100  # over which BatchTopK's thresholds are averaged
NEVER = 2**30  # idle counts stop there: int32 holds one more batch


@flax.struct.dataclass
class TrainState:
  """What a step reads and writes, and a checkpoint holds.

  Attributes:
    step: optimiser steps done.
    params: of the SAE, for rows times `scale`.
    opt_state: of Adam.
    idle_M: rows seen since each latent fired.
    scale: what rows are multiplied by.
    skipped: steps that changed nothing, since something was not finite.
  """

  step: jax.Array
  params: Params
  opt_state: optax.OptState
  idle_M: jax.Array
  scale: jax.Array
  skipped: jax.Array


def adam() -> optax.GradientTransformation:
  """Adam in optax, whose state a run carries on."""
  b1, b2, eps = reference.ADAM
  return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


def start(
  config: SaeConfig,
  rows_ND: np.ndarray,
  seed: int,
  *,
  normalise: bool,
  given: Params | None = None,
) -> TrainState:
  """The state before the first step.

  b_dec is the geometric median of `rows_ND`, which should come from many
  samples. With `normalise`, rows are divided by the root mean square of a
  centred coordinate, so that one learning rate suits biases of every model;
  `export_params` takes that out again. The thresholds of JumpReLU start where
  k latents a row are above them.

  Args:
    config: of the SAE.
    rows_ND: of the store.
    seed: of the encoder.
    normalise: see above.
    given: an SAE to go on with, for rows as the store holds them; its
      thresholds stay where it has some, norms of its decoder's rows go into
      the encoder.
  """
  x_ND = jnp.asarray(rows_ND, jnp.float32)
  b_dec_D = model.geometric_median(x_ND)
  spread = jnp.sqrt(jnp.mean((x_ND - b_dec_D) ** 2))
  scale = 1 / jnp.maximum(spread, 1e-12) if normalise else jnp.ones(())
  if given is None:
    params = model.init(config, b_dec_D * scale, jax.random.key(seed))
  else:
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), given)
    params = model.rescale(model.fold(params), scale)
  if config.activation == 'jumprelu':
    code = model.encode(params, x_ND[:4096] * scale, k=config.k)
    theta_M = jnp.full(config.latents, jnp.mean(code.vals_NK[:, -1]))
    own = jnp.any(params.theta_M > 0)
    params = params.replace(theta_M=jnp.where(own, params.theta_M, theta_M))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=adam().init(params),
    idle_M=jnp.zeros(config.latents, jnp.int32),
    scale=scale,
    skipped=jnp.zeros((), jnp.int32),
  )


def shapes(config: SaeConfig) -> TrainState:
  """The state's shapes and dtypes, without its values."""
  row = jax.ShapeDtypeStruct((1, config.width), jnp.float32)
  begin = functools.partial(start, config, seed=0, normalise=True)
  return jax.eval_shape(begin, row)


def specs() -> TrainState:
  """Over which axes of the mesh each array of the state is split."""
  params = Params(
    w_enc_MD=mesh_lib.LATENTS,
    b_enc_M=mesh_lib.LATENTS,
    w_dec_MD=mesh_lib.LATENTS,
    b_dec_D=mesh_lib.WHOLE,
    theta_M=mesh_lib.LATENTS,
  )
  return TrainState(
    step=mesh_lib.WHOLE,
    params=params,
    opt_state=optax.ScaleByAdamState(mesh_lib.WHOLE, mu=params, nu=params),
    idle_M=mesh_lib.LATENTS,
    scale=mesh_lib.WHOLE,
    skipped=mesh_lib.WHOLE,
  )


def export_params(state: TrainState) -> Params:
  """The parameters for rows as the store holds them, in numpy."""
  params = model.rescale(model.normalise(state.params), 1 / state.scale)
  return jax.tree.map(np.asarray, jax.device_get(params))


def check(
  config: SaeConfig, options: TrainConfig, mesh: jax.sharding.Mesh
) -> None:
  """Refuses what the devices cannot share.

  Raises:
    ValueError: the rows do not divide over the devices and the pieces, or the
      latents over those that share them; or options that exclude one another.
  """
  shares = mesh.shape[mesh_lib.DATA]
  if options.rows % (shares * options.accumulate):
    raise ValueError(
      f'train.rows is {options.rows}, which {shares} devices cannot share '
      f'evenly in {options.accumulate} piece(s): make it a multiple of '
      f'{shares * options.accumulate}'
    )
  if options.k_from and not config.k <= options.k_from <= bound(config):
    raise ValueError(
      f'train.k_from is {options.k_from}; it must be in '
      f'{config.k}..{bound(config)} (from sae.k), or 0'
    )
  if options.multi_topk and config.activation != 'topk':
    raise ValueError(
      f'train.multi_topk is {options.multi_topk}, but sae.activation is '
      f'{config.activation}: it is for topk; set it to 0'
    )
  parts = mesh.shape[mesh_lib.LATENT]
  if config.latents % parts:
    raise ValueError(
      f'sae.latents is {config.latents}, which {parts} devices cannot share '
      f'evenly (train.latent_shards): make it a multiple of {parts}'
    )


def bound(config: SaeConfig) -> int:
  """What k can fall from."""
  return config.latents if config.activation == 'topk' else config.most


def make_step(
  config: SaeConfig, options: TrainConfig, mesh: jax.sharding.Mesh
) -> Callable[[TrainState, jax.Array], tuple[TrainState, dict]]:
  """The jitted step: (state, batch [N, D]) -> (state, metrics).

  The batch is split over `data`; each device sums over its share, piece by
  piece where `accumulate` asks for it, and one psum makes gradients and metrics
  whole. Where the loss or a gradient is not finite, the step is counted and
  changes nothing else but its number. The state is donated.

  Raises:
    ValueError: see `check`.
  """
  check(config, options, mesh)
  return _jitted(dataclasses.replace(config, layer=0), options, mesh)


@functools.lru_cache(maxsize=4)  # SAEs of several layers share one compilation
def _jitted(config: SaeConfig, options: TrainConfig, mesh: jax.sharding.Mesh):
  parts = mesh.shape[mesh_lib.LATENT]
  axis = mesh_lib.LATENT if parts > 1 else ''
  shares = mesh.shape[mesh_lib.DATA]
  rows_axis = mesh_lib.DATA if shares > 1 else ''  # XLA copies even for one
  weights = Weights(
    auxk=options.auxk,
    multi_topk=options.multi_topk,
    sparsity=options.sparsity if config.activation == 'jumprelu' else 0.0,
  )

  def step(state: TrainState, x_ND: jax.Array):
    x_ND = x_ND.astype(jnp.float32) * state.scale
    dead_M = state.idle_M > config.dead_after
    mean_D = whole(jnp.sum(x_ND, 0)) / options.rows
    variance = whole(jnp.sum((x_ND - mean_D) ** 2))

    batch = Batch(variance, options.rows, rows_axis, shares)

    def loss(params, x_ND, k, wide):
      terms, code = losses_lib.losses(
        params,
        x_ND,
        dead_M,
        batch,
        config=config,
        weights=weights,
        k=k,
        wide=wide,
        dtype=DTYPES[options.compute],
        backend=options.backend,
        axis=axis,
      )
      return terms.total, (terms, count_fired(code, config.latents // parts))

    def piece(x_ND, k=0, wide=0):
      grads, rest = jax.grad(loss, has_aux=True)(state.params, x_ND, k, wide)
      return grads, *rest

    if options.k_from:
      plain = piece

      def piece(x_ND):
        k = current_k(state.step, options=options, k=config.k)
        return jax.lax.cond(
          state.step < options.k_steps,
          lambda: plain(x_ND, k, options.k_from),
          lambda: plain(x_ND),
        )

    if options.accumulate == 1:
      found = piece(x_ND)
    else:
      # Every so many rows: a piece is the same however many devices share it.
      pieces = x_ND.reshape(-1, options.accumulate, config.width)
      pieces = jnp.swapaxes(pieces, 0, 1)
      zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(piece, pieces[0]),
      )
      found, _ = jax.lax.scan(
        lambda sums, x_ND: (jax.tree.map(jnp.add, sums, piece(x_ND)), None),
        zeros,
        pieces,
      )
    grads, terms, fired_M = whole(found)
    w_dec_MD, squares_M = ops.project(
      grads.w_dec_MD, state.params.w_dec_MD, backend=options.backend
    )
    grads = grads.replace(w_dec_MD=w_dec_MD)
    own = (grads.w_enc_MD, grads.b_enc_M, grads.theta_M)
    squares = sum(jnp.sum(g**2) for g in own)
    squares = over_latents(squares + jnp.sum(squares_M))
    norm = jnp.sqrt(squares + jnp.sum(grads.b_dec_D**2))
    good = jnp.isfinite(terms.total) & jnp.isfinite(norm)
    lr = learning_rate(state.step, options=options, latents=config.latents)
    params, opt_state = _adam(
      grads,
      state.params,
      state.opt_state,
      factor=jnp.minimum(1.0, options.clip / jnp.maximum(norm, 1e-30)),
      rate=lr,
      good=good,
      backend=options.backend,
    )
    params = params.replace(
      theta_M=_thresholds(config, state, params.theta_M, terms.theta, good)
    )
    idle_M = jnp.where(fired_M > 0, 0, state.idle_M + options.rows)
    idle_M = jnp.where(good, jnp.minimum(idle_M, NEVER), state.idle_M)
    state = state.replace(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      idle_M=idle_M,
      skipped=state.skipped + ~good,
    )
    metrics = {
      'fvu': terms.fvu,
      'auxk': terms.auxk,
      'multi': terms.multi,
      'l0': terms.l0,
      'dead': over_latents(jnp.sum(dead_M)) / config.latents,
      'lr': lr,
      'grad_norm': norm,
      'skipped': state.skipped,
    }
    if config.prefixes:
      metrics['nested'] = terms.nested
    if config.activation != 'topk':
      metrics |= {'full': terms.full, 'sparsity': terms.sparsity}
    return state, metrics

  def whole(share):
    return jax.lax.psum(share, rows_axis) if rows_axis else share

  def over_latents(share):
    return jax.lax.psum(share, axis) if axis else share

  mapped = jax.shard_map(
    step,
    mesh=mesh,
    in_specs=(specs(), mesh_lib.ROWS),
    out_specs=(specs(), mesh_lib.WHOLE),
    check_vma=False,  # gradients are of each share: the psums are ours
  )
  return jax.jit(mapped, donate_argnums=0)


def _adam(grads, params, opt_state, *, good, **rest):
  """One step of Adam on every parameter; rows of W_dec stay of unit norm."""
  count = opt_state.count + 1
  found = {
    field.name: ops.adam(
      getattr(grads, field.name),
      tuple(
        getattr(x, field.name) for x in (params, opt_state.mu, opt_state.nu)
      ),
      count=count,
      good=good,
      unit=field.name == 'w_dec_MD',
      **rest,
    )
    for field in dataclasses.fields(Params)
  }
  params, mu, nu = (
    Params(**{name: new[i] for name, new in found.items()}) for i in range(3)
  )
  count = jnp.where(good, count, opt_state.count)
  return params, optax.ScaleByAdamState(count, mu, nu)


def _thresholds(config, state, theta_M, theta, good) -> jax.Array:
  """What thresholds are after a step: see `sae.activations`.

  JumpReLU's were changed by Adam and stay above 0; BatchTopK's is the mean of
  the last steps', which early steps count for less and less.
  """
  if config.activation == 'jumprelu':
    return jnp.maximum(theta_M, 0)
  if config.activation == 'topk':
    return theta_M
  share = 1 / jnp.minimum(state.opt_state.count + 1, THETA_STEPS)
  return jnp.where(good, theta_M + (theta - theta_M) * share, theta_M)


def count_fired(code: model.SparseCode, latents: int) -> jax.Array:
  """How many rows each latent fires on, int32 [M]."""
  fired_NK = (code.vals_NK > 0).astype(jnp.int32)
  return jnp.zeros(latents, jnp.int32).at[code.idx_NK].add(fired_NK)
