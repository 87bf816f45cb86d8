"""The training step: state and update as pure functions, of the loss that an objective says.  No mesh, config, disk.

B rows, T time, A micro-batches.
"""

import functools

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import optax

from qalora_jax import objectives


class State(struct.PyTreeNode):
  """What training changes: the step count, the trainable weights, the optimizer's moments."""

  step: jax.Array
  params: dict
  opt_state: optax.OptState


def init_state(tx: optax.GradientTransformation, params: dict) -> State:
  """The state before the first step."""
  return State(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


def score_rows(
  model: nn.Module, variables: dict, batch: dict, *, objective: objectives.Objective = objectives.TOKENS
) -> tuple[jax.Array, jax.Array]:
  """The summed loss [B] of every row's targets, and their number [B]."""
  losses_BT, mask_BT = objective.losses(model, variables, batch)
  return jnp.sum(losses_BT * mask_BT, axis=-1), jnp.sum(mask_BT, axis=-1)


def train_step(
  model: nn.Module,
  tx: optax.GradientTransformation,
  seed: int,
  accumulation: int,
  state: State,
  frozen: dict,
  batch,
  *,
  objective: objectives.Objective = objectives.TOKENS,
) -> tuple[State, dict]:
  """One optimizer step on batch [B, T]: the gradient of the mean loss per counted target with respect to params.

  With `accumulation` = A the rows go through in A micro-batches whose summed losses and gradients are added and
  divided once by the number of targets, so that the result is that of one large batch however unevenly the targets
  fall.  Metrics: loss (the mean), the number of targets under the objective's `unit`, grad_norm (before clipping).
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)

  def summed_loss(params, micro, index):
    variables = {'params': params, 'frozen': frozen}
    losses_BT, mask_BT = objective.losses(model, variables, micro, {'dropout': jax.random.fold_in(key, index)})
    return jnp.sum(losses_BT * mask_BT), jnp.sum(mask_BT)

  def gradient(index, micro):
    (loss, count), grads = jax.value_and_grad(summed_loss, has_aux=True)(state.params, micro, index)
    return loss, count, grads

  if accumulation == 1:
    # A sum would hold the gradients twice: what was added so far, and what is added.
    loss, count, grads = gradient(0, batch)
  else:
    micro_batches = jax.tree.map(functools.partial(_split, accumulation), batch)
    accumulate = lambda total, indexed: (jax.tree.map(jnp.add, total, gradient(*indexed)), None)
    zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
    (loss, count, grads), _ = jax.lax.scan(accumulate, zero, (jnp.arange(accumulation), micro_batches))
  per_target = 1.0 / jnp.maximum(count, 1.0)
  grads = jax.tree.map(lambda g: g * per_target, grads)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = {'loss': loss * per_target, objective.unit: count, 'grad_norm': optax.tree.norm(grads)}
  return State(state.step + 1, params, opt_state), metrics


def _split(parts: int, x_BT):
  """[B, T] -> [parts, B / parts, T], row r into part r % parts: rows sharded over devices stay where they are."""
  rows = x_BT.shape[0]
  return x_BT.reshape(rows // parts, parts, *x_BT.shape[1:]).swapaxes(0, 1)
