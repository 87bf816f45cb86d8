"""From logits to a token.  V vocabulary."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is chosen; the cuts act in this order.

  penalty: positive logits of tokens that the text already holds are divided by it, negative ones multiplied (Keskar et
    al., 2019; 1: none).
  temperature: 0 takes the likeliest token, else one is drawn from softmax(logits / temperature) after the cuts.
  top_k: the k likeliest tokens are left (0: all).
  top_p: the smallest set of likeliest tokens whose probability reaches top_p (Holtzman et al., 2020).
  min_p: the tokens at least min_p times as probable as the likeliest (Nguyen et al., 2024).
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  penalty: float = 1.0

  @property
  def remembers(self) -> bool:
    """Whether the choice depends on the tokens before it."""
    return self.penalty != 1.0


def sample(logits_V, key, settings: Sampling, seen_V=None) -> jax.Array:
  """One token id.  `seen_V`: which tokens the text already holds; read where `settings.remembers`."""
  if settings.remembers:
    penalized = jnp.where(logits_V > 0, logits_V / settings.penalty, logits_V * settings.penalty)
    logits_V = jnp.where(seen_V, penalized, logits_V)
  if settings.temperature == 0.0:
    return jnp.argmax(logits_V)
  logits_V = logits_V / settings.temperature
  ordered = jnp.sort(logits_V, descending=True)
  least = ordered[-1]
  if settings.top_k:
    least = ordered[min(settings.top_k, logits_V.size) - 1]
    ordered = jnp.where(ordered >= least, ordered, -jnp.inf)
  p = jax.nn.softmax(ordered)
  kept = (jnp.cumsum(p) - p < settings.top_p) & (p >= settings.min_p * p[0])
  least = jnp.min(jnp.where(kept & (ordered > -jnp.inf), ordered, jnp.inf))
  return jax.random.categorical(key, jnp.where(logits_V >= least, logits_V, -jnp.inf))
