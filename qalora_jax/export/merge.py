"""Merging a run, and the proof that the merged model is the adapted one."""

import dataclasses
import math

from flax import linen as nn
import jax
import jax.numpy as jnp

from qalora_jax import adapters
from qalora_jax import quant


@dataclasses.dataclass(frozen=True)
class Check:
  """Adapted against merged logits on one batch: their largest difference, what rounding allows, what training moved."""

  difference: float
  tolerance: float
  effect: float

  @property
  def holds(self) -> bool:
    """Whether the merge is equal up to rounding; a NaN is not."""
    return math.isfinite(self.difference) and self.difference <= self.tolerance

  def __str__(self):
    return (
      f'merged against adapted logits: largest difference {self.difference:.2e} (rounding allows {self.tolerance:.2e}; '
      f'the adapter moves them by {self.effect:.2e})'
    )


def check(model: nn.Module, frozen: dict, params: dict, merged: dict, *, seed: int = 0) -> Check:
  """Compares model(frozen, params) with model(merged) in float32 on random tokens [4, 64].

  The tolerance is measured, not chosen: the change of the merged logits when every number w that the merge made is
  moved, up or down at random, by the rounding of the sums that make and use it,

      (R + 2 + sqrt(I)) * eps(float32) * |w|

  R the rank, I the inputs.  Whatever differs by more is not rounding.
  """
  exact = model.clone(config=dataclasses.replace(model.config, dtype=jnp.float32, remat='none'))
  width = min(64, model.config.max_position_embeddings)
  tokens = jax.random.randint(jax.random.key(seed), (4, width), 0, model.config.vocab_size)

  @jax.jit
  def compare(frozen, params, merged):
    logits = lambda **variables: exact.apply(variables, tokens)
    after = logits(frozen=merged)

    def furthest(other):
      # XLA's maximum on CPU passes over NaN.
      distance = jnp.abs(other - after)
      return jnp.where(jnp.isfinite(distance), distance, jnp.inf).max()

    return (
      furthest(logits(frozen=frozen, params=params)),
      furthest(logits(frozen=_nudged(merged, params, jax.random.key(seed + 1)))),
      furthest(logits(frozen=frozen)),
    )

  # What trains as it is, a head, is there with and without the adapter.
  heads = {name: node for name, node in params.items() if name not in frozen}
  adapted = {name: node for name, node in params.items() if name in frozen}

  # TF32 and bfloat16 passes, the default of GPUs and TPUs, would hide what is looked for.
  with jax.default_matmul_precision('highest'):
    return Check(*(float(x) for x in compare(frozen | heads, adapted, merged)))


def moved(model: nn.Module, params: dict, settled: dict, *, seed: int = 0) -> float:
  """How far QAT's logits on random tokens [4, 16] are from those of its weights as codes (`quant.settle`).

  It is 0: training computes with these very codes.
  """
  tokens = jax.random.randint(jax.random.key(seed), (4, 16), 0, model.config.vocab_size)
  logits = jax.jit(model.apply)
  distance = jnp.abs(logits({'params': params}, tokens) - logits({'frozen': settled}, tokens))
  return float(jnp.where(jnp.isfinite(distance), distance, jnp.inf).max())


def merge(frozen: dict, params: dict) -> dict:
  """`adapters.merge`, compiled."""
  return jax.jit(adapters.merge)(frozen, params)


def _nudged(merged: dict, params: dict, key) -> dict:
  """`merged` with every number that an adapter of `params` changed moved by its rounding, see `check`."""
  moved = dict(merged)
  for name, node in params.items():
    key, own = jax.random.split(key)
    if name != 'adapter':
      moved[name] = _nudged(merged[name], node, own)
      continue
    kernel, rank = merged['kernel'], node.a.shape[-1]
    size = (rank + 2 + math.sqrt(kernel.shape[-2])) * jnp.finfo(jnp.float32).eps
    nudge = lambda w, size=size, own=own: w * (1 + size * jax.random.rademacher(own, w.shape, jnp.float32))
    moved['kernel'] = kernel.replace(offset=nudge(kernel.offset)) if quant.is_quantized(kernel) else nudge(kernel)
  return moved
