"""Perplexity: the mean negative log-likelihood of the targets, in nats per token."""

import functools
import math

from flax import linen as nn
import jax
import numpy as np

from qalora_jax import hosts
from qalora_jax import objectives
from qalora_jax import progress
from qalora_jax import sharding
from qalora_jax import step as step_lib
from qalora_jax.data import batches


def row_scores(
  model: nn.Module,
  variables: dict,
  *,
  examples: list,
  window: int,
  batch: int,
  mesh,
  label: str,
  objective: objectives.Objective = objectives.TOKENS,
  inputs: int = 0,
):
  """The summed loss of each example's targets, and their number: two float64 arrays in the examples' order.

  Of tokens the loss is the negative log-likelihood in nats.
  """
  score = _compiled(model, mesh, objective)
  shares = mesh.shape['data'] * mesh.shape['fsdp']
  batch = -(-batch // shares) * shares  # every device has rows; what is over is filled with rows that do not count
  nll, count = np.zeros(len(examples)), np.zeros(len(examples))
  with progress.bar(label, len(examples)) as bar:
    for rows in batches.scoring(examples, window=window, batch=batch, inputs=inputs):
      index = rows.pop('rows')
      got_nll, got_count = jax.device_get(score(variables, hosts.spread(rows, sharding.batch(mesh))))
      real = index >= 0
      nll[index[real]], count[index[real]] = got_nll[real], got_count[real]
      bar.advance(int(real.sum()))
  return nll, count


@functools.lru_cache(maxsize=4)
def _compiled(model: nn.Module, mesh, objective: objectives.Objective):
  """One jitted function a model: the validations of a long run share its program."""
  return jax.jit(
    sharding.over(mesh, functools.partial(step_lib.score_rows, model, objective=objective)),
    in_shardings=(None, sharding.batch(mesh)),
    out_shardings=sharding.replicated(mesh),  # every process reads all rows' scores
  )


def mean_loss(model: nn.Module, variables: dict, *, objective: objectives.Objective, **how) -> float:
  """The mean loss over all targets of the examples; `how` is that of `row_scores`."""
  losses, count = row_scores(model, variables, label='validation', objective=objective, **how)
  return float(losses.sum() / count.sum())


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


def windows(tokenizer, text: str, *, window: int, stride: int, first: int = 0) -> list:
  """The examples whose `score` is the perplexity of one long text, x_1 ... x_N: BOS and the text's tokens.

  BOS is there wherever tokenizer_config.json (or config.json) names one, as in training, also where transformers would
  leave it out because add_bos_token or the post-processor of tokenizer.json say so.

  stride = 0, or = window = W: the stream is cut into n = floor(N / W) windows that share nothing, the remainder is left
  out, and each window scores all but its first token:

    nats_per_token = 1 / (n (W - 1)) sum_{w < n} sum_{1 < t <= W} -log p(x_{wW + t} | x_{wW + 1} ... x_{wW + t - 1})

  GPTQ's released code (Frantar et al., 2022) takes exp of the mean over windows of each window's mean, which is the
  same, the windows being of one length; W is 2048 there.  `first` keeps only so many windows (0: all), as that code
  keeps 256 of C4.

  0 < stride = s < W: windows begin at x_1, x_{1 + s}, x_{1 + 2s}, ...; the first scores all but its first token, every
  other one its last s, so that each token but x_1 is scored once, and all beyond the first window after at least W - s
  tokens.  With `first`, the stream ends after first * W tokens.

    nats_per_token = 1 / (N - 1) sum_{1 < i <= N} -log p(x_i | x_{b(i)} ... x_{i - 1})
    b(i) = 1 + s ceil(max(i - W, 0) / s)

  Raises ValueError for a window below 2, a stride or number of windows that cannot be, and a text that is too short.
  """
  if window < 2:
    raise ValueError(f'window = {window} holds no target; it must be 2 or more')
  if not 0 <= stride <= window:
    raise ValueError(f'evaluate.stride = {stride} with windows of {window}: it must be from 0 (a window) to {window}')
  if first < 0:
    raise ValueError(f'first = {first} windows; it must be 0 (all) or more')
  stream = np.array([*([] if tokenizer.bos is None else [tokenizer.bos]), *tokenizer.encode(text)], np.int32)
  stream = stream[: first * window or None]
  least = window if stride in (0, window) else 2
  if len(stream) < least:
    raise ValueError(f'the text has {len(stream)} tokens and needs {least}; lower data.window, or name more text')
  return _windows(stream, window, stride or window)


def _windows(stream: np.ndarray, window: int, stride: int) -> list:
  """The windows of `windows` as examples; where they overlap, the last one ends with the stream."""
  # Windows of one length share one mask.
  whole, last = np.ones(window, np.int32), (np.arange(window) >= window - stride).astype(np.int32)
  whole[0] = 0
  if stride == window:
    starts = range(0, len(stream) - window + 1, window)
    return [{'tokens': stream[start : start + window], 'loss_mask': whole} for start in starts]
  examples = [{'tokens': stream[:window], 'loss_mask': whole[: len(stream)]}]
  for start in range(stride, len(stream) - window + stride, stride):
    tokens = stream[start : start + window]
    examples.append({'tokens': tokens, 'loss_mask': last[: len(tokens)]})
  return examples


def spelled(tokenizer, examples: list) -> int:
  """The number of characters that the examples' targets spell; a token for something unknown counts as one."""
  total = 0
  for example in examples:
    targets = np.asarray(example['tokens'])[np.asarray(example['loss_mask']) > 0]
    spoken = [int(t) for t in targets if t not in (tokenizer.bos, tokenizer.eos, tokenizer.unknown)]
    total += len(tokenizer.decode(spoken)) + int(np.sum(targets == tokenizer.unknown))
  return total
