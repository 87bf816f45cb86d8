"""Beam search: the likeliest text that keeping W beginnings at a time finds.

A beginning has the score sum log p of its tokens.  At every step the K likeliest continuations of a row's W beginnings
are looked at, K = W max(2, 1 + number of ends), so that W of them can go on.  Those of the W likeliest that end (by a
token of `ends`, which counts, or by the budget) are compared by

    score = sum log p / length^penalty

with the W best texts that ended before, and the best W stay.  A row is over when W texts have ended and the likeliest
beginning, its score divided by its present length^penalty, is not better than the worst of them: with a positive
penalty a longer text could still have come to be better, and is not waited for (transformers' early_stopping = False,
which this follows step for step).  With W = 1 the penalty decides nothing, and the text is the greedy one.

B rows, W beams, K continuations, L tokens to write at most, V vocabulary.
"""

from collections.abc import Sequence
import functools

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax import sharding
from qalora_jax.adapters import several
from qalora_jax.generate import cache as cache_lib


class Search(struct.PyTreeNode):
  """W beginnings of `step` tokens and W texts that ended, of every row; the caches of the beginnings, [B W] rows.

  The score of what is not there yet is -inf, its length 0.
  """

  cache: cache_lib.Cache
  step: jax.Array
  scores: jax.Array
  written: jax.Array
  ended_scores: jax.Array
  ended: jax.Array
  lengths: jax.Array
  going: jax.Array


def search(
  model: nn.Module,
  variables: dict,
  prompts: Sequence[Sequence[int]],
  *,
  max_tokens: int,
  beams: int,
  penalty: float = 1.0,
  ends: Sequence[int] = (),
) -> list[list[int]]:
  """The best text for every prompt, with the token of `ends` that ends it; raises ValueError as `cache.check` does.

  What is written for a prompt does not depend on the others.
  """
  asked, mesh = cache_lib.prompts(model, prompts, max_tokens), sharding.mesh_of(variables)
  budget_B, longest = np.array(asked.budget, np.int32), max(asked.budget)
  how = (beams, tuple(ends))
  state, going = _begin(
    model, mesh, how, asked.size, longest, variables, asked.tokens, asked.lengths, budget_B, penalty
  )
  # What Several adapters choose by rows is chosen for every beam of a row.
  wide = {**variables, 'params': several.repeated(variables.get('params', {}), beams)}
  for _ in range(longest - 1):
    # Begun before its predecessor is looked at, as in `decode`: a step changes nothing of a row that is over.
    state, following = _step(model, mesh, how, wide, state, budget_B, penalty)
    if not np.asarray(going).any():
      break
    going = following
  ended, lengths = jax.device_get((state.ended[:, 0], state.lengths[:, 0]))
  return [text[:length].tolist() for text, length in zip(ended, lengths, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _begin(model, mesh, how, size: int, longest: int, variables, tokens_BP, lengths_B, budget_B, penalty):
  """The search after the first token, and which rows go on."""
  beams, rows = how[0], len(tokens_BP)
  cache, logits_BV, _ = cache_lib.read(model, mesh, size, variables, tokens_BP, lengths_B)
  blank = jnp.zeros((rows, beams, longest), jnp.int32)
  nothing = jnp.full((rows, beams), -jnp.inf)
  state = Search(
    cache=cache_lib.repeated(cache, beams),
    step=jnp.zeros((), jnp.int32),
    # All beams are alike: only one of them is continued.
    scores=nothing.at[:, 0].set(0.0),
    written=blank,
    ended_scores=nothing,
    ended=blank,
    lengths=jnp.zeros((rows, beams), jnp.int32),
    going=jnp.ones(rows, bool),
  )
  return _chosen(how, state, jnp.repeat(logits_BV[:, None], beams, axis=1), budget_B, penalty)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _step(model, mesh, how, variables, state, budget_B, penalty):
  """The search after one more token, and which rows go on."""
  rows, beams = state.scores.shape
  last_BW = jnp.take(state.written, state.step - 1, axis=-1)
  cache, logits_NV = cache_lib.extend(model, mesh, variables, state.cache, last_BW.reshape(-1))
  return _chosen(how, state.replace(cache=cache), logits_NV.reshape(rows, beams, -1), budget_B, penalty)


def _chosen(how, state: Search, logits_BWV, budget_B, penalty):
  beams, ends = how
  rows, _, vocabulary = logits_BWV.shape
  scores_BWV = jax.nn.log_softmax(logits_BWV, axis=-1) + state.scores[..., None]
  count = min(beams * max(2, 1 + len(ends)), beams * vocabulary)
  scores_BK, found_BK = jax.lax.top_k(scores_BWV.reshape(rows, -1), count)
  parents_BK, tokens_BK = found_BK // vocabulary, found_BK % vocabulary
  pick = lambda x, index: jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)
  written_BKL = pick(state.written, parents_BK).at[:, :, state.step].set(tokens_BK)
  length = state.step + 1
  by_length = length.astype(jnp.float32) ** penalty
  over_BK = jnp.isin(tokens_BK, jnp.array(ends, jnp.int32)) | (length >= budget_B)[:, None]
  # The W best texts that ended.
  counts_BK = over_BK & (jnp.arange(count) < beams)[None] & state.going[:, None]
  candidates = (
    jnp.where(counts_BK, scores_BK / by_length, -jnp.inf),
    written_BKL,
    jnp.where(counts_BK, length, 0),
  )
  both = jax.tree.map(
    lambda old, new: jnp.concatenate([old, new], axis=1), (state.ended_scores, state.ended, state.lengths), candidates
  )
  best_BW = jax.lax.top_k(both[0], beams)[1]
  ended_scores, ended, lengths = (pick(x, best_BW) for x in both)
  # The W likeliest that go on.
  scores_BW, on_BW = jax.lax.top_k(jnp.where(over_BK, -jnp.inf, scores_BK), beams)
  rows_BW = jnp.arange(rows)[:, None] * beams + pick(parents_BK, on_BW)
  better_B = scores_BW[:, 0] / by_length > ended_scores[:, -1]
  going_B = state.going & better_B & (length < budget_B)
  state = state.replace(
    cache=cache_lib.chosen(state.cache, rows_BW.reshape(-1)),
    step=length,
    scores=scores_BW,
    written=pick(written_BKL, on_BW),
    ended_scores=ended_scores,
    ended=ended,
    lengths=lengths,
    going=going_B,
  )
  return state, going_B
