"""The optimizer: a learning-rate schedule and AdamW behind a clip; its moments in 32 or 8 bits, here or on the host."""

from collections.abc import Callable
import math
from typing import NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from qalora_jax import sharding
from qalora_jax.quant import codebooks
from qalora_jax.quant import latent

SCHEDULES = ('constant', 'cosine', 'linear')
# Entries below which an array is not worth compressing.
_LEAST = 4096


def schedule(
  kind: str, *, learning_rate: float, steps: int, warmup_steps: int = 0, end_fraction: float = 0.0
) -> Callable:
  """The learning rate of step 0, 1, ...: a linear rise over warmup_steps, then `kind` to end_fraction of the peak.

  With progress p in [0, 1] after warm-up: constant 1, linear 1 - p, cosine (1 + cos(pi p)) / 2, each scaled
  to run from 1 to end_fraction (constant stays at 1).
  """
  if kind not in SCHEDULES:
    raise ValueError(f'optim.schedule = {kind!r}; it is one of {SCHEDULES}.')

  def rate(step):
    rise = jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
    p = jnp.clip((step - warmup_steps) / max(steps - warmup_steps, 1), 0.0, 1.0)
    fall = {'constant': 1.0, 'linear': 1.0 - p, 'cosine': 0.5 * (1.0 + jnp.cos(jnp.pi * p))}[kind]
    floor = 0.0 if kind == 'constant' else end_fraction
    return learning_rate * rise * (floor + (1.0 - floor) * fall)

  return rate


def adamw(
  rate: Callable,
  *,
  clip: float,
  beta1: float,
  beta2: float,
  eps: float,
  weight_decay: float,
  state: str = 'float32',
  offload: bool = False,
) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter, 2019) on gradients clipped to the global norm `clip` (0: not clipped).

  Learned scales and offsets (QAT) do not decay: at 0 they would be no smaller a weight, but none.  `state`, one of
  STATES, is how the moments are held; with `offload` they are in the host's memory, where `on_host` places them.
  """
  if state not in STATES:
    raise ValueError(f'optim.state = {state!r}; it is one of {tuple(STATES)}.')
  if state == 'float32' and not offload:
    adam = optax.scale_by_adam(beta1, beta2, eps)
  else:
    adam = scale_by_adam(beta1, beta2, eps, state=state, offload=offload)
  update = optax.chain(adam, optax.add_decayed_weights(weight_decay, _decays), optax.scale_by_learning_rate(rate))
  return optax.chain(optax.clip_by_global_norm(clip), update) if clip else update


class Moments(NamedTuple):
  """Adam's state: the steps taken, for every weight its first moment and the root of its second, as STATES holds them.

  A checkpoint goes by names: `nu`, as optax calls the second moment itself, would let the one pass for the other.
  """

  count: jax.Array
  mu: optax.Params
  root: optax.Params


class Blocked(struct.PyTreeNode):
  """x [..., I] as levels[codes] * peak of its block: codes [..., I] uint8, peak [..., I / block] float32.

  The peak is the entry of largest magnitude, with its sign: the levels have 1, and need not have -1.
  """

  codes: jax.Array
  peak: jax.Array

  def expand(self, levels) -> jax.Array:
    """x in float32."""
    blocks = jnp.asarray(levels)[self.codes.astype(jnp.int32)].reshape(*self.peak.shape, -1)
    return (blocks * self.peak[..., None]).reshape(self.codes.shape)


def compress(x, levels, block: int) -> Blocked:
  """x [..., I] float32 in 8 bits by the nearest of 256 levels, in blocks along the last axis (Dettmers et al., 2022).

  What is above 0 never becomes 0 where the levels have no sign, for it is divided by.
  """
  blocks = x.reshape(*x.shape[:-1], -1, block)
  high, low = blocks.max(-1), blocks.min(-1)
  peak = jnp.where(high >= -low, high, low)
  codes = codebooks.nearest(levels, blocks / jnp.where(peak == 0, 1.0, peak)[..., None])
  if levels[0] == 0:
    codes = jnp.where(blocks > 0, jnp.maximum(codes, 1), codes)
  return Blocked(codes.astype(jnp.uint8).reshape(x.shape), peak)


def _compressed_zeros(like, levels) -> Blocked | jax.Array:
  """Zeros in the shape of `like`, compressed where `block_of` finds a block."""
  block = block_of(like.shape)
  if not block:
    return jnp.zeros(like.shape)
  code = int(np.flatnonzero(levels == 0)[0])
  return Blocked(jnp.full(like.shape, code, jnp.uint8), jnp.zeros((*like.shape[:-1], like.shape[-1] // block)))


def block_of(shape: tuple[int, ...]) -> int:
  """The entries along the last axis that share a constant, 16 to 256 of them; 0 for an array that stays float32.

  That is one of fewer than 4096 entries, as in the paper, or that no block divides.  Of the divisors from 64 on it is
  the one whose blocks halve most often, so that they divide over as many devices as the axis.
  """
  fits = [size for size in range(16, 257) if shape and shape[-1] % size == 0]
  if math.prod(shape) < _LEAST or not fits:
    return 0
  halves = lambda count: count & -count
  return max(fits, key=lambda size: (min(size, 64), halves(shape[-1] // size), size))


def _compressed_as(x, held, levels) -> Blocked | jax.Array:
  """x as `held` was."""
  return compress(x, levels, x.shape[-1] // held.peak.shape[-1]) if isinstance(held, Blocked) else x


def _expanded(held, levels) -> jax.Array:
  return held.expand(levels) if isinstance(held, Blocked) else held


# How moments are held, given their levels: (zeros like a weight; x in the form of what was held; what is held, wide).
STATES = {
  'float32': (lambda like, levels: jnp.zeros(like.shape), lambda x, held, levels: x, lambda held, levels: held),
  'int8': (_compressed_zeros, _compressed_as, _expanded),
}


def scale_by_adam(beta1: float, beta2: float, eps: float, *, state: str, offload: bool) -> optax.GradientTransformation:
  """`optax.scale_by_adam` whose moments are held as STATES says, and with `offload` in the host's memory.

  Of the second moment the root is held, which has half its decades.  Weights are gone through one after the other, and
  a stack of layers layer by layer, in place: no more than a layer's moments are ever wide, or on the device.
  """
  zeros, keep, wide = STATES[state]
  levels = codebooks.DYNAMIC, codebooks.DYNAMIC_UNSIGNED
  move = (lambda tree, space: jax.device_put(tree, space)) if offload else (lambda tree, space: tree)

  def init(params):
    blank = lambda levels: jax.tree.map(lambda p: move(zeros(p, levels), jax.memory.Space.Host), params)
    return Moments(jnp.zeros((), jnp.int32), blank(levels[0]), blank(levels[1]))

  def update(grads, moments, params=None):
    del params
    count = optax.safe_increment(moments.count)
    rise = [1 - beta**count for beta in (beta1, beta2)]

    def one(g, *held):
      held = move(held, jax.memory.Space.Device)
      mu, root = map(wide, held, levels)
      mu, nu = beta1 * mu + (1 - beta1) * g, beta2 * jnp.square(root) + (1 - beta2) * jnp.square(g)
      held = tuple(map(keep, (mu, jnp.sqrt(nu)), held, levels))
      return mu / rise[0] / (jnp.sqrt(nu / rise[1]) + eps), *move(held, jax.memory.Space.Host)

    each = [jax.tree.structure(grads).flatten_up_to(tree) for tree in (grads, moments.mu, moments.root)]
    found = [_by_layer(one, *leaves) if leaves[0].ndim > 2 else one(*leaves) for leaves in zip(*each, strict=True)]
    trees = [jax.tree.unflatten(jax.tree.structure(grads), leaves) for leaves in zip(*found, strict=True)]
    return trees[0], Moments(count, *trees[1:])

  return optax.GradientTransformation(init, update)


def on_host(state):
  """The shardings `state` of a training state, with those of `Moments` in the host's memory; made for `offload`."""
  is_moments = lambda node: isinstance(node, Moments)
  hosted = lambda node: node._replace(mu=sharding.on_host(node.mu), root=sharding.on_host(node.root))
  place = lambda node: hosted(node) if is_moments(node) else node
  return jax.tree.map(place, state, is_leaf=is_moments)


def _by_layer(function: Callable, *stacks):
  """function(*(one layer of each stack)) -> as many things alike, written where they were read."""

  def layer(index, stacks):
    made = function(*jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stacks))
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, index, 0), stacks, made)

  return jax.lax.fori_loop(0, len(stacks[0]), layer, stacks)


def _decays(params):
  """True for every leaf but the scales and offsets of a Latent."""
  is_latent = lambda node: isinstance(node, latent.Latent)

  def decays(node):
    if not is_latent(node):
      return True
    return jax.tree.map(lambda part: part is node.w, node)

  return jax.tree.map(decays, params, is_leaf=is_latent)
