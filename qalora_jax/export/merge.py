"""Merging a run, and the proof that the merged model is the adapted one."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from qalora_jax import adapters
from qalora_jax.models import llama


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


def check(model: llama.Llama, frozen: dict, params: dict, merged: dict, *, seed: int = 0) -> Check:
  """Compares model(frozen, params) with model(merged) in float32 on random tokens [4, 64].

  The tolerance is measured, not chosen: the change of the merged logits when every merged number w is moved, up or
  down at random, by the rounding of the sums that make and use it,

      (R + 2 + sqrt(I)) * eps(float32) * |w|, plus eps(dtype of w) * |w| where w is stored in fewer bits,

  R the rank, I the inputs.  Whatever differs by more is not rounding.
  """
  exact = model.clone(config=dataclasses.replace(model.config, dtype=jnp.float32, remat='none'))
  width = min(64, model.config.max_position_embeddings)
  tokens = jax.random.randint(jax.random.key(seed), (4, width), 0, model.config.vocab_size)
  rank = max((node.a.shape[-1] for node in _adapters(params)), default=0)
  keys = iter(list(jax.random.split(jax.random.key(seed + 1), len(jax.tree.leaves(merged)))))

  def nudge(w):
    key = next(keys)
    if not jnp.issubdtype(w.dtype, jnp.floating):
      return w
    inputs = w.shape[-2] if w.ndim > 1 else 1
    size = (rank + 2 + math.sqrt(inputs)) * jnp.finfo(jnp.float32).eps
    size += jnp.finfo(w.dtype).eps if w.dtype != jnp.float32 else 0.0
    moved = w.astype(jnp.float32) * (1 + size * jax.random.rademacher(key, w.shape, jnp.float32))
    # Sixteen-bit numbers would swallow the nudge on the way back; the float32 forward takes them as they are.
    return moved

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
      furthest(logits(frozen=jax.tree.map(nudge, merged))),
      furthest(logits(frozen=frozen)),
    )

  return Check(*(float(x) for x in compare(frozen, params, merged)))


def merge(frozen: dict, params: dict) -> dict:
  """`adapters.merge`, compiled."""
  return jax.jit(adapters.merge)(frozen, params)


def _adapters(params: dict) -> list:
  nodes = jax.tree.leaves(params, is_leaf=adapters.is_adapter)
  return [node for node in nodes if adapters.is_adapter(node)]
