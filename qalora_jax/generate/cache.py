"""What a model keeps of a text that it writes: keys and values, read from a prompt and grown by a token at a time.

A decoder reads the prompt itself and continues it.  A model with an encoder reads the prompt by that, once, and writes
from a beginning of its own: what its decoder takes from the encoder is kept beside the cache and never changes.

B rows, P tokens of the longest prompt (padded), S entries of the cache, W beams of a row, V vocabulary.
"""

from collections.abc import Sequence
import dataclasses
import math

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax import sharding
from qalora_jax.models import attention
from qalora_jax.models import linear

# Prompts and caches are padded to multiples of this many tokens, and of an eighth of the next power of two: a growing
# conversation and prompts of many lengths share few programs, and little of them is padding.
_LEAST = 64


class Cache(struct.PyTreeNode):
  """`past` and `given` as `models.attention` has them, and the place of the next token of every row, positions [B]."""

  past: dict
  given: dict
  positions: jax.Array


@dataclasses.dataclass(frozen=True)
class Prompts:
  """A batch of prompts, padded: tokens [B, P], lengths [B]; `size` = S, and how many tokens every row may write."""

  tokens: np.ndarray
  lengths: np.ndarray
  size: int
  budget: list[int]


def continues(model: nn.Module) -> bool:
  """Whether what the model writes follows the prompt in one text; not so where an encoder reads the prompt."""
  return linear.DECODER not in model.config.depths


def check(model: nn.Module, prompt: Sequence[int]) -> None:
  """ValueError for a prompt that is empty, fills the model's window, or holds a token that the model does not embed.

  An encoder that reads prompts has no window: its positions are relative.
  """
  window, rows = model.config.max_position_embeddings, model.config.vocab_size
  if not prompt:
    raise ValueError('a prompt has no token to start from.')
  if continues(model) and len(prompt) >= window:
    raise ValueError(f'the prompt has {len(prompt)} tokens and the model a window of {window}; shorten the prompt.')
  if max(prompt) >= rows:
    raise ValueError(f'the prompt holds token {max(prompt)} and the model embeds {rows}: its tokenizer is another one.')


def prompts(model: nn.Module, asked: Sequence[Sequence[int]], max_tokens: int) -> Prompts:
  """The prompts as one batch, and room for `max_tokens` more (a decoder's: within its window); raises as `check`."""
  for prompt in asked:
    check(model, prompt)
  lengths = [len(prompt) for prompt in asked]
  if continues(model):
    window = model.config.max_position_embeddings
    padded, size = (min(window, _up(tokens)) for tokens in (max(lengths), max(lengths) + max_tokens))
    budget = [min(max_tokens, window - length) for length in lengths]
  else:
    padded, size, budget = _up(max(lengths)), _up(1 + max_tokens), [max_tokens] * len(lengths)
  tokens_BP = np.zeros((len(asked), padded), np.int32)
  for row, prompt in enumerate(asked):
    tokens_BP[row, : len(prompt)] = prompt
  return Prompts(tokens_BP, np.array(lengths, np.int32), size, budget)


def read(model: nn.Module, mesh, size: int, variables: dict, tokens_BP, lengths_B) -> tuple:
  """(the cache of `size` entries, logits [B, V] of the next token, the text so far and which of its tokens are real).

  The text is [B, P] tokens, or the beginning [B, 1] of an answer.  A prompt is followed by padding, whose keys and
  values are masked until decoding writes over them.
  """
  real_BP = jnp.arange(tokens_BP.shape[1])[None] < lengths_B[:, None]
  kept, apply = [attention.PRESENT, attention.GIVEN], sharding.over(mesh, model.apply)
  if continues(model):
    logits_B1V, made = apply(variables, tokens_BP, only_BP=lengths_B[:, None] - 1, mutable=kept)
    text, positions_B = (tokens_BP, real_BP), lengths_B
  else:
    begin_B1 = jnp.full((len(tokens_BP), 1), model.config.decoder_start_token_id, jnp.int32)
    how = dict(inputs_BS=tokens_BP, input_segments_BS=real_BP.astype(jnp.int32))
    logits_B1V, made = apply(variables, begin_B1, **how, mutable=kept)
    text, positions_B = (begin_B1, begin_B1 >= 0), jnp.ones_like(lengths_B)

  def grown(leaf):
    # [N, B, K, P, C] -> [N, B, K, S, C]
    leaf = leaf[..., :size, :]
    return jnp.pad(leaf, [(0, 0), (0, 0), (0, 0), (0, size - leaf.shape[-2]), (0, 0)])

  past = jax.tree.map(grown, made.get(attention.PRESENT, {}))
  return Cache(past, made.get(attention.GIVEN, {}), positions_B), logits_B1V[:, 0], text


def extend(model: nn.Module, mesh, variables: dict, cache: Cache, tokens_B) -> tuple[Cache, jax.Array]:
  """(the cache with one more token of every row, logits [B, V] of the next); a donated cache is written in place."""
  positions_B = cache.positions
  collections = {attention.PAST: cache.past, attention.GIVEN: cache.given}
  logits_B1V, made = sharding.over(mesh, model.apply)(
    {**variables, **{name: tree for name, tree in collections.items() if tree}},
    tokens_B[:, None],
    positions_BT=positions_B[:, None],
    only_BP=jnp.zeros_like(positions_B)[:, None],
    mutable=[attention.PRESENT],
  )
  rows_B = jnp.arange(len(positions_B))
  # Rows that are over go on beyond the cache; what falls outside it is dropped.
  put = lambda old, new: old.at[:, rows_B, :, positions_B].set(new[..., 0, :].swapaxes(0, 1), mode='drop')
  past = jax.tree.map(put, cache.past, made.get(attention.PRESENT, {}))
  return cache.replace(past=past, positions=positions_B + 1), logits_B1V[:, 0]


def repeated(cache: Cache, times: int) -> Cache:
  """Every row `times` times, one after the other."""
  more = lambda axis: lambda leaf: jnp.repeat(leaf, times, axis=axis)
  given = {name: jax.tree.map(more(1 if linear.stack_of(name) else 0), tree) for name, tree in cache.given.items()}
  return Cache(jax.tree.map(more(1), cache.past), given, more(0)(cache.positions))


def chosen(cache: Cache, rows_B) -> Cache:
  """The rows `rows_B` of a cache; each takes what is given from its own place, so it is chosen among its prompt's."""
  return cache.replace(past=jax.tree.map(lambda leaf: leaf[:, rows_B], cache.past))


def _up(tokens: int) -> int:
  step = max(_LEAST, 2 ** (math.ceil(math.log2(tokens)) - 3))
  return math.ceil(tokens / step) * step
