"""The training step: state, loss and update as pure functions.  No mesh, no config, no disk.

B rows, T time, V vocabulary, A micro-batches.
"""

import functools

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import optax


class State(struct.PyTreeNode):
  """What training changes: the step count, the trainable weights, the optimizer's moments."""

  step: jax.Array
  params: dict
  opt_state: optax.OptState


def init_state(tx: optax.GradientTransformation, params: dict) -> State:
  """The state before the first step."""
  return State(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


def token_nll(logits_BTV, batch: dict) -> tuple[jax.Array, jax.Array]:
  """-log p(token t | tokens before it in its segment) [B, T-1] in nats, and the mask of the targets that count.

  A target counts where its loss_mask is 1 and its predecessor in the row belongs to the same segment.
  """
  targets_BT = batch['tokens'][:, 1:]
  same = batch['segments'][:, 1:] == batch['segments'][:, :-1]
  mask_BT = (batch['loss_mask'][:, 1:] * same * (batch['segments'][:, 1:] > 0)).astype(jnp.float32)
  chosen = jnp.take_along_axis(logits_BTV[:, :-1], targets_BT[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits_BTV[:, :-1], axis=-1) - chosen, mask_BT


def score_rows(model: nn.Module, variables: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
  """The summed negative log-likelihood [B] of every row's targets, in nats, and their number [B]."""
  logits = model.apply(variables, batch['tokens'], batch['segments'], batch['positions'])
  nll_BT, mask_BT = token_nll(logits, batch)
  return jnp.sum(nll_BT * mask_BT, axis=-1), jnp.sum(mask_BT, axis=-1)


def train_step(
  model: nn.Module, tx: optax.GradientTransformation, seed: int, accumulation: int, state: State, frozen: dict, batch
) -> tuple[State, dict]:
  """One optimizer step on batch [B, T]: the gradient of the mean loss per counted token with respect to params.

  With `accumulation` = A the rows go through in A micro-batches whose summed losses and gradients are added and
  divided once by the number of tokens, so that the result is that of one large batch however unevenly the tokens
  fall.  Metrics: loss (nats per token), tokens, grad_norm (before clipping).
  """
  micro_batches = jax.tree.map(functools.partial(_split, accumulation), batch)
  key = jax.random.fold_in(jax.random.key(seed), state.step)

  def summed_loss(params, micro, index):
    variables = {'params': params, 'frozen': frozen}
    rngs = {'dropout': jax.random.fold_in(key, index)}
    logits = model.apply(variables, micro['tokens'], micro['segments'], micro['positions'], rngs=rngs)
    nll_BT, mask_BT = token_nll(logits, micro)
    return jnp.sum(nll_BT * mask_BT), jnp.sum(mask_BT)

  def accumulate(total, indexed):
    index, micro = indexed
    (loss, tokens), grads = jax.value_and_grad(summed_loss, has_aux=True)(state.params, micro, index)
    return jax.tree.map(jnp.add, total, (loss, tokens, grads)), None

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
