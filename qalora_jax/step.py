"""The training step: state, loss and update as pure functions.  No mesh, no config, no disk.

B rows, T time, N pieces of it of P tokens, D model, V vocabulary, A micro-batches.
"""

import functools

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import optax

from qalora_jax.models import linear
from qalora_jax.models import pieces

# Bytes of float32 logits that a device makes at once.
LOGITS = 2**26


class State(struct.PyTreeNode):
  """What training changes: the step count, the trainable weights, the optimizer's moments."""

  step: jax.Array
  params: dict
  opt_state: optax.OptState


def init_state(tx: optax.GradientTransformation, params: dict) -> State:
  """The state before the first step."""
  return State(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


def token_nll(model: nn.Module, variables: dict, batch: dict, rngs: dict | None = None) -> tuple[jax.Array, jax.Array]:
  """-log p(token t + 1 | tokens up to t in its segment) [B, T] in nats, and the mask of the targets that count.

  A target counts where its loss_mask is 1 and its predecessor in the row belongs to the same segment; the last place
  of a row has no target.  Logits are made of one piece of the tokens after another, forward and backward, so that no
  more than LOGITS bytes of them stand on a device at once.  With several pieces each has its own dropout in the head.
  """
  tokens_BT, segments_BT = batch['tokens'], batch['segments']
  x_BTD = model.apply(variables, tokens_BT, segments_BT, batch['positions'], rngs=rngs, method='hidden')
  following = lambda x_BT: jnp.pad(x_BT[:, 1:], [(0, 0), (0, 1)])
  mask_BT = following(batch['loss_mask']) * (following(segments_BT) == segments_BT) * (following(segments_BT) > 0)

  def nll(x_BPD, targets_BP, rngs):
    logits_BPV = model.apply(variables, x_BPD, rngs=rngs, method='head')
    chosen_BP1 = jnp.take_along_axis(logits_BPV, targets_BP[..., None], axis=-1)
    return jax.nn.logsumexp(logits_BPV, axis=-1) - chosen_BP1[..., 0]

  rows, count = tokens_BT.shape
  vocabulary = model.config.vocab_size
  of_one = pieces.local(linear.ROWS, rows) * pieces.local('vocab', vocabulary) * jnp.dtype(jnp.float32).itemsize
  size = pieces.length(count, of_one, LOGITS)
  targets_BT = following(tokens_BT)
  if size == count:
    return nll(x_BTD, targets_BT, rngs), mask_BT.astype(jnp.float32)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def piece(index, x_BPD, targets_BP):
    return nll(x_BPD, targets_BP, {name: jax.random.fold_in(key, index) for name, key in (rngs or {}).items()})

  cut = pieces.cut(x_BTD, size), pieces.cut(targets_BT, size)
  nll_NBP = jax.lax.scan(lambda _, each: (None, piece(*each)), None, (jnp.arange(len(cut[0])), *cut))[1]
  return pieces.joined(nll_NBP, count), mask_BT.astype(jnp.float32)


def score_rows(model: nn.Module, variables: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
  """The summed negative log-likelihood [B] of every row's targets, in nats, and their number [B]."""
  nll_BT, mask_BT = token_nll(model, variables, batch)
  return jnp.sum(nll_BT * mask_BT, axis=-1), jnp.sum(mask_BT, axis=-1)


def train_step(
  model: nn.Module, tx: optax.GradientTransformation, seed: int, accumulation: int, state: State, frozen: dict, batch
) -> tuple[State, dict]:
  """One optimizer step on batch [B, T]: the gradient of the mean loss per counted token with respect to params.

  With `accumulation` = A the rows go through in A micro-batches whose summed losses and gradients are added and
  divided once by the number of tokens, so that the result is that of one large batch however unevenly the tokens
  fall.  Metrics: loss (nats per token), tokens, grad_norm (before clipping).
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)

  def summed_loss(params, micro, index):
    variables = {'params': params, 'frozen': frozen}
    nll_BT, mask_BT = token_nll(model, variables, micro, {'dropout': jax.random.fold_in(key, index)})
    return jnp.sum(nll_BT * mask_BT), jnp.sum(mask_BT)

  def gradient(index, micro):
    (loss, tokens), grads = jax.value_and_grad(summed_loss, has_aux=True)(state.params, micro, index)
    return loss, tokens, grads

  if accumulation == 1:
    # A sum would hold the gradients twice: what was added so far, and what is added.
    loss, tokens, grads = gradient(0, batch)
  else:
    micro_batches = jax.tree.map(functools.partial(_split, accumulation), batch)
    accumulate = lambda total, indexed: (jax.tree.map(jnp.add, total, gradient(*indexed)), None)
    zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
    (loss, tokens, grads), _ = jax.lax.scan(accumulate, zero, (jnp.arange(accumulation), micro_batches))
  per_token = 1.0 / jnp.maximum(tokens, 1.0)
  grads = jax.tree.map(lambda g: g * per_token, grads)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = {'loss': loss * per_token, 'tokens': tokens, 'grad_norm': optax.tree.norm(grads)}
  return State(state.step + 1, params, opt_state), metrics


def _split(parts: int, x_BT):
  """[B, T] -> [parts, B / parts, T], row r into part r % parts: rows sharded over devices stay where they are."""
  rows = x_BT.shape[0]
  return x_BT.reshape(rows // parts, parts, *x_BT.shape[1:]).swapaxes(0, 1)
