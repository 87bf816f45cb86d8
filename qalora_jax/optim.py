"""The optimizer: a learning-rate schedule and AdamW behind a clip."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from qalora_jax.quant import latent

SCHEDULES = ('constant', 'cosine', 'linear')


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
  rate: Callable, *, clip: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
  """AdamW (Loshchilov and Hutter, 2019) on gradients clipped to the global norm `clip` (0: not clipped).

  Learned scales and offsets (QAT) do not decay: at 0 they would be no smaller a weight, but none.
  """
  update = optax.adamw(rate, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay, mask=_decays)
  return optax.chain(optax.clip_by_global_norm(clip), update) if clip else update


def _decays(params):
  """True for every leaf but the scales and offsets of a Latent."""
  is_latent = lambda node: isinstance(node, latent.Latent)

  def decays(node):
    if not is_latent(node):
      return True
    return jax.tree.map(lambda part: part is node.w, node)

  return jax.tree.map(decays, params, is_leaf=is_latent)
