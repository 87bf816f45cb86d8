"""Perplexity: the mean negative log-likelihood of the targets, in nats per token."""

import functools
import math

from flax import linen as nn
import jax
import numpy as np

from qalora_jax import progress
from qalora_jax import sharding
from qalora_jax import step as step_lib
from qalora_jax.data import batches


def row_scores(model: nn.Module, variables: dict, *, examples: list, window: int, batch: int, mesh, label: str):
  """The summed NLL in nats of each example's targets, and their number: two float64 arrays in the examples' order."""
  score = _compiled(model, mesh)
  shares = mesh.shape['data'] * mesh.shape['fsdp']
  batch = -(-batch // shares) * shares  # every device has rows; what is over is filled with rows that do not count
  nll, count = np.zeros(len(examples)), np.zeros(len(examples))
  with progress.bar(label, len(examples)) as bar:
    for rows in batches.scoring(examples, window=window, batch=batch):
      index = rows.pop('rows')
      got_nll, got_count = jax.device_get(score(variables, rows))
      real = index >= 0
      nll[index[real]], count[index[real]] = got_nll[real], got_count[real]
      bar.advance(int(real.sum()))
  return nll, count


@functools.lru_cache(maxsize=4)
def _compiled(model: nn.Module, mesh):
  """One jitted function a model: the validations of a long run share its program."""
  return jax.jit(functools.partial(step_lib.score_rows, model), in_shardings=(None, sharding.batch(mesh)))


def score(
  model: nn.Module, variables: dict, *, examples: list, window: int, batch: int, mesh, characters: int | None = None
) -> dict:
  """nats_per_token and perplexity (its exponential) over all targets of the examples.

  With `characters`, the number of characters the targets spell, also bits_per_character = sum NLL / (ln 2 *
  characters), which models with different tokenizers share.
  """
  nll, count = row_scores(
    model, variables, examples=examples, window=window, batch=batch, mesh=mesh, label='perplexity'
  )
  mean = float(nll.sum() / count.sum())
  result = {'nats_per_token': mean, 'perplexity': math.exp(min(mean, 700.0)), 'tokens': int(count.sum())}
  if characters:
    result['bits_per_character'] = float(nll.sum() / math.log(2) / characters)
  return result


def spelled(tokenizer, examples: list) -> int:
  """The number of characters that the examples' targets spell; a token for something unknown counts as one."""
  total = 0
  for example in examples:
    targets = np.asarray(example['tokens'])[np.asarray(example['loss_mask']) > 0]
    spoken = [int(t) for t in targets if t not in (tokenizer.bos, tokenizer.eos, tokenizer.unknown)]
    total += len(tokenizer.decode(spoken)) + int(np.sum(targets == tokenizer.unknown))
  return total
