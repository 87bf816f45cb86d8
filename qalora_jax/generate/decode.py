"""Decoding with a cache of keys and values: one program reads the prompts, one writes a token of every row.

B rows, P tokens of the longest prompt (padded), S entries of the cache, V vocabulary.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax import sharding
from qalora_jax.generate import cache as cache_lib
from qalora_jax.generate import sampling

_GREEDY = sampling.Sampling()


def stream(
  model: nn.Module,
  variables: dict,
  prompts: Sequence[Sequence[int]],
  *,
  max_tokens: int,
  key,
  settings: sampling.Sampling = _GREEDY,
  ends: Sequence[int] = (),
  first: int = 0,
) -> Iterator[list[int | None]]:
  """Yields, at every step, the next token of every row, None where the row is over; ends when all are.

  A row is over after a token of `ends`, after `max_tokens`, or at the model's window.  What a row says depends on its
  own prompt and its number, counted from `first` (its draws are those of fold_in(key, number)), not on the others.  The
  caches of keys and values have one static size, so a token costs the same wherever in the text it stands.

  Raises ValueError as `cache.check` does.
  """
  asked = cache_lib.prompts(model, prompts, max_tokens)
  keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(first + jnp.arange(len(prompts)))
  budget = asked.budget
  mesh = sharding.mesh_of(variables)
  state, made = _read(model, settings, mesh, asked.size, variables, asked.tokens, asked.lengths, keys_B)
  step = 0
  while step < max(budget):
    step += 1
    # Begun before its predecessor is looked at, so that the device never waits for this program.
    following = _write(model, settings, mesh, variables, state, keys_B) if step < max(budget) else None
    tokens = [token if step <= budget[row] else None for row, token in enumerate(np.asarray(made).tolist())]
    yield tokens
    budget = [0 if token in ends else left for token, left in zip(tokens, budget, strict=True)]
    if following is not None:
      state, made = following


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _read(model, settings, mesh, size: int, variables, tokens_BP, lengths_B, keys_B):
  """The prompts in a cache of `size` entries, and the first token of every row."""
  cache, logits_BV, (text_BP, real_BP) = cache_lib.read(model, mesh, size, variables, tokens_BP, lengths_B)
  seen_BV = jnp.zeros((len(tokens_BP), logits_BV.shape[-1] if settings.remembers else 0), bool)
  if settings.remembers:
    seen_BV = seen_BV.at[jnp.arange(len(text_BP))[:, None], text_BP].max(real_BP)
  return _chosen(settings, {'cache': cache, 'seen': seen_BV}, logits_BV, keys_B)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _write(model, settings, mesh, variables, state, keys_B):
  """One more token of every row; the cache is written in place."""
  cache, logits_BV = cache_lib.extend(model, mesh, variables, state['cache'], state['tokens'])
  return _chosen(settings, {**state, 'cache': cache}, logits_BV, keys_B)


def _chosen(settings, state, logits_BV, keys_B):
  """(the state after a token of every row, the tokens)."""
  keys_B = jax.vmap(jax.random.fold_in)(keys_B, state['cache'].positions)
  draw = jax.vmap(lambda logits_V, key, seen_V: sampling.sample(logits_V, key, settings, seen_V))
  tokens_B = draw(logits_BV, keys_B, state['seen']).astype(jnp.int32)
  seen_BV = state['seen']
  if settings.remembers:
    seen_BV = seen_BV.at[jnp.arange(len(tokens_B)), tokens_B].set(True)
  return {**state, 'tokens': tokens_B, 'seen': seen_BV}, tokens_B
