"""Decoding with a cache of keys and values: one program reads the prompts, one writes a token of every row.

B rows, P tokens of the longest prompt (padded), S entries of the cache, V vocabulary.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax import sharding
from qalora_jax.generate import sampling
from qalora_jax.models import attention

# Prompts and caches are padded to multiples of this many tokens, and of an eighth of the next power of two: a growing
# conversation and prompts of many lengths share few programs, and little of them is padding.
_LEAST = 64
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

  Raises ValueError as `check` does.
  """
  window, lengths = model.config.max_position_embeddings, [len(prompt) for prompt in prompts]
  for prompt in prompts:
    check(model, prompt)
  padded = min(window, _up(max(lengths)))
  tokens_BP = np.zeros((len(prompts), padded), np.int32)
  for row, prompt in enumerate(prompts):
    tokens_BP[row, : len(prompt)] = prompt
  size = min(window, _up(max(lengths) + max_tokens))
  keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(first + jnp.arange(len(prompts)))
  budget = [min(max_tokens, window - length) for length in lengths]
  mesh = sharding.mesh_of(variables)
  state, made = _read(model, settings, mesh, size, variables, tokens_BP, np.array(lengths, np.int32), keys_B)
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


def check(model: nn.Module, prompt: Sequence[int]) -> None:
  """ValueError for a prompt that is empty, fills the model's window, or holds a token that the model does not embed."""
  window, rows = model.config.max_position_embeddings, model.config.vocab_size
  if not prompt:
    raise ValueError('a prompt has no token to start from.')
  if len(prompt) >= window:
    raise ValueError(f'the prompt has {len(prompt)} tokens and the model a window of {window}; shorten the prompt.')
  if max(prompt) >= rows:
    raise ValueError(f'the prompt holds token {max(prompt)} and the model embeds {rows}: its tokenizer is another one.')


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _read(model, settings, mesh, size: int, variables, tokens_BP, lengths_B, keys_B):
  """The prompts' keys and values in a cache of `size` entries, and the first token of every row.

  A prompt is followed by padding, whose keys and values are masked until decoding writes over them.
  """
  apply = sharding.over(mesh, model.apply)
  logits, made = apply(variables, tokens_BP, only_BP=lengths_B[:, None] - 1, mutable=[attention.PRESENT])

  def grown(leaf):
    # [N, B, K, P, C] -> [N, B, K, S, C]
    leaf = leaf[..., :size, :]
    return jnp.pad(leaf, [(0, 0), (0, 0), (0, 0), (0, size - leaf.shape[-2]), (0, 0)])

  seen_BV = jnp.zeros((len(tokens_BP), logits.shape[-1] if settings.remembers else 0), bool)
  if settings.remembers:
    rows_B1, real_BP = jnp.arange(len(tokens_BP))[:, None], jnp.arange(tokens_BP.shape[1])[None] < lengths_B[:, None]
    seen_BV = seen_BV.at[rows_B1, tokens_BP].max(real_BP)
  state = {'past': jax.tree.map(grown, made.get(attention.PRESENT, {})), 'positions': lengths_B, 'seen': seen_BV}
  return _chosen(settings, state, logits, keys_B)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _write(model, settings, mesh, variables, state, keys_B):
  """One more token of every row; the cache is written in place."""
  positions_B = state['positions']
  past = {attention.PAST: state['past']} if state['past'] else {}
  logits, made = sharding.over(mesh, model.apply)(
    {**variables, **past},
    state['tokens'][:, None],
    positions_BT=positions_B[:, None],
    only_BP=jnp.zeros_like(positions_B)[:, None],
    mutable=[attention.PRESENT],
  )
  rows_B = jnp.arange(len(positions_B))
  # Rows that are over go on beyond the cache; what falls outside it is dropped.
  put = lambda old, new: old.at[:, rows_B, :, positions_B].set(new[..., 0, :].swapaxes(0, 1), mode='drop')
  past = jax.tree.map(put, state['past'], made.get(attention.PRESENT, {}))
  return _chosen(settings, {**state, 'past': past, 'positions': positions_B + 1}, logits, keys_B)


def _chosen(settings, state, logits_B1V, keys_B):
  """(the state after a token of every row, the tokens)."""
  keys_B = jax.vmap(jax.random.fold_in)(keys_B, state['positions'])
  draw = jax.vmap(lambda logits_V, key, seen_V: sampling.sample(logits_V, key, settings, seen_V))
  tokens_B = draw(logits_B1V[:, 0], keys_B, state['seen']).astype(jnp.int32)
  seen_BV = state['seen']
  if settings.remembers:
    seen_BV = seen_BV.at[jnp.arange(len(tokens_B)), tokens_B].set(True)
  return {**state, 'tokens': tokens_B, 'seen': seen_BV}, tokens_B


def _up(tokens: int) -> int:
  step = max(_LEAST, 2 ** (math.ceil(math.log2(tokens)) - 3))
  return math.ceil(tokens / step) * step
