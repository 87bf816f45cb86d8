"""The training step: accumulation, freezing, and the loss it minimises."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qalora_jax import adapters
from qalora_jax import optim
from qalora_jax import step as step_lib
from qalora_jax.models import decoder
from qalora_jax.models import linear
from qalora_jax.quant import affine

CONFIG = decoder.Config(
  vocab_size=64,
  hidden_size=64,
  intermediate_size=128,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=4,
)
ROWS, T = 8, 12


def scheme_of(kind, bits=4):
  if kind == 'full':
    return linear.Scheme(trains=True)
  adapter = adapters.Adapter(kind, 4, 8.0)
  quantizers = (('all', affine.Affine(bits, 16)),) if bits else ()
  return linear.Scheme(quantizers=quantizers, adapter=adapter)


@functools.cache
def born(kind, bits=4):
  model = decoder.Decoder(CONFIG, scheme_of(kind, bits))

  @jax.jit
  def draw(key):
    variables = {'frozen': {}, **nn.unbox(model.init(key, jnp.zeros((1, 4), jnp.int32)))}
    # Adapters are born with B = 0, which would leave A without a gradient.
    move = lambda x: x + 0.01 * jax.random.normal(jax.random.key(x.size), x.shape)
    return variables['frozen'], jax.tree.map(move, variables['params'])

  return model, *draw(jax.random.key(0))


def a_batch(seed=0, rows=ROWS):
  """Rows of unequal lengths, two documents in each, so that micro-batches count different numbers of tokens."""
  keys = jax.random.split(jax.random.key(seed), 2)
  lengths = jax.random.randint(keys[0], (rows, 1), 4, T + 1)
  place = jnp.arange(T)[None]
  segments = jnp.where(place < lengths, 1 + (place >= 3), 0)
  return {
    'tokens': jax.random.randint(keys[1], (rows, T), 0, CONFIG.vocab_size),
    'loss_mask': (place < lengths).astype(jnp.int32) * (place % 4 != 1),
    'segments': segments,
    'positions': jnp.where(place >= 3, place - 3, place) * (segments > 0),
  }


def one_step(model, frozen, params, batch, accumulation=1):
  tx = optax.sgd(1.0)
  step = functools.partial(step_lib.train_step, model, tx, 0, accumulation)
  return jax.jit(step)(step_lib.init_state(tx, params), frozen, batch)


def assert_trees_close(got, want, eps=2e-5):
  """Equal within the rounding of the few hundred sums behind a gradient, relative to the largest entry."""
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=0, atol=eps * max(float(jnp.abs(w).max()), 1e-3))


@pytest.mark.parametrize('kind, accumulation', [('qalora', 4), ('lora', 8), ('full', 2)])
def test_accumulation_is_one_large_batch(kind, accumulation):
  model, frozen, params = born(kind)
  batch = a_batch()
  counts = batch['loss_mask'].sum(1)
  assert len(set(counts.tolist())) > 1
  whole, metrics = one_step(model, frozen, params, batch)
  parts, same = one_step(model, frozen, params, batch, accumulation)
  assert_trees_close(parts.params, whole.params)
  assert_trees_close(same, metrics)


def test_the_loss_is_the_mean_over_counted_tokens():
  """By hand: log-softmax of the logits at t - 1, where token t counts and continues its own segment."""
  model, frozen, params = born('qalora')
  batch = a_batch()
  _, metrics = one_step(model, frozen, params, batch)
  variables = {'frozen': frozen, 'params': params}
  logits = jax.jit(model.apply)(variables, batch['tokens'], batch['segments'], batch['positions'])
  log_p = np.asarray(jax.nn.log_softmax(logits))
  batch = jax.tree.map(np.asarray, batch)
  total = count = 0
  for b in range(ROWS):
    for t in range(1, T):
      segment = batch['segments'][b, t]
      if segment > 0 and segment == batch['segments'][b, t - 1] and batch['loss_mask'][b, t]:
        total -= log_p[b, t - 1, batch['tokens'][b, t]]
        count += 1
  assert int(metrics['tokens']) == count
  assert float(metrics['loss']) == pytest.approx(float(total) / count, rel=1e-5)


@pytest.mark.parametrize('kind', ['qalora', 'lora'])
def test_only_adapters_train_and_the_base_stays_bit_identical(kind):
  model, frozen, params = born(kind)
  before = jax.tree.map(np.array, frozen)
  tx = optim.adamw(
    optim.schedule('constant', learning_rate=0.01, steps=5),
    clip=1.0,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.1,
  )
  step = jax.jit(functools.partial(step_lib.train_step, model, tx, 0, 1), donate_argnums=0)
  state = step_lib.init_state(tx, jax.tree.map(jnp.copy, params))
  losses = []
  for _ in range(5):
    state, metrics = step(state, frozen, a_batch())
    losses.append(float(metrics['loss']))
  jax.tree.map(np.testing.assert_array_equal, frozen, before)
  assert losses[-1] < losses[0]
  for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
    assert float(jnp.abs(new - old).max()) > 0


@pytest.mark.parametrize('kind', optim.SCHEDULES)
def test_schedules(kind):
  rate = optim.schedule(kind, learning_rate=2.0, steps=110, warmup_steps=10, end_fraction=0.1)
  assert float(rate(0)) == pytest.approx(0.2)
  assert float(rate(9)) == pytest.approx(2.0)
  middle = {'constant': 2.0, 'linear': 2.0 * 0.55, 'cosine': 2.0 * 0.55}[kind]
  assert float(rate(60)) == pytest.approx(middle)
  assert float(rate(110)) == pytest.approx(2.0 if kind == 'constant' else 0.2)


def test_clipping_bounds_the_update():
  tx = optim.adamw(lambda step: 1.0, clip=0.3, beta1=0.0, beta2=0.0, eps=1e3, weight_decay=0.0)
  grads = {'w': jnp.full((4,), 100.0)}
  update, _ = tx.update(grads, tx.init(grads), grads)
  # eps dominates the second moment, so the update is the clipped gradient over eps.
  assert float(optax.tree.norm(update)) == pytest.approx(0.3 / 1e3, rel=1e-3)
