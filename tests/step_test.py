"""The training step: accumulation, freezing, sharding, and the loss it minimises."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qalora_jax import adapters
from qalora_jax import optim
from qalora_jax import sharding
from qalora_jax import step as step_lib
from qalora_jax.kernels import mesh as mesh_lib
from qalora_jax.kernels import plan
from qalora_jax.models import linear
from qalora_jax.models import llama
from qalora_jax.quant import affine
from qalora_jax.quant import float4

CONFIG = llama.ModelConfig(
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
  if bits != 'mixed':
    quantizers = (('all', affine.Affine(bits, 16)),) if bits else ()
  else:
    doubled = float4.Float4(group=16, double=True)
    quantizers = (('layers/1/.*down', affine.Affine(2, 16, True)), ('mlp', doubled), ('all', affine.Affine(4, 16)))
  return linear.Scheme(quantizers=quantizers, adapter=adapter)


@functools.cache
def born(kind, bits=4):
  model = llama.Llama(CONFIG, scheme_of(kind, bits))

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


def one_step(model, frozen, params, batch, accumulation=1, tx=None, mesh=None, impl=None, **jit):
  tx = tx or optax.sgd(1.0)
  step = sharding.over(mesh, functools.partial(step_lib.train_step, model, tx, 0, accumulation))
  with plan.using(impl):
    return jax.jit(step, **jit)(step_lib.init_state(tx, params), frozen, batch)


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


@pytest.mark.parametrize(
  'kind, bits, shape, impl',
  [
    ('qalora', 4, (8, 1, 1), None),
    ('qalora', 4, (2, 2, 2), None),
    ('qalora', 4, (2, 2, 2), 'tpu_interpreted'),
    ('qalora', 3, (2, 2, 2), 'tpu_interpreted'),
    ('lora', 2, (1, 4, 2), None),
    ('lora', 2, (1, 2, 4), 'tpu_interpreted'),
    ('lora', 0, (2, 2, 2), None),
    ('full', 0, (1, 4, 2), None),
  ],
)
def test_sharded_is_unsharded(kind, bits, shape, impl, monkeypatch):
  """One step on a mesh is that of one device: XLA's products, and kernels that run in shard_map on their own parts."""
  if len(jax.devices()) < 8:
    pytest.skip('needs eight devices; tests/conftest.py asks for them on CPU')
  model, frozen, params = born(kind, bits)
  batch = a_batch()
  want, wanted = one_step(model, frozen, params, batch, accumulation=1)
  mesh = sharding.make_mesh(**dict(zip(sharding.AXES, shape, strict=True)))
  abstract = {'frozen': {}, **jax.eval_shape(model.init, jax.random.key(0), batch['tokens'])}
  at_frozen = sharding.place(abstract['frozen'], mesh)
  tx = optax.sgd(1.0)
  at_state = sharding.place(jax.eval_shape(functools.partial(step_lib.init_state, tx), abstract['params']), mesh)
  rows = sharding.batch(mesh)
  divisions, run = set(), mesh_lib.run
  monkeypatch.setattr(
    mesh_lib, 'run', lambda f, x, w, d, t: (divisions.add((d.inputs, d.outputs, t)), run(f, x, w, d, t))[1]
  )
  got, metrics = one_step(
    model,
    jax.device_put(frozen, at_frozen),
    params,
    jax.device_put(batch, rows),
    tx=tx,
    mesh=mesh,
    impl=impl,
    in_shardings=(at_state, at_frozen, rows),
    out_shardings=(at_state, sharding.replicated(mesh)),
  )
  assert_trees_close(got.params, want.params)
  assert_trees_close(metrics, wanted)
  # By columns and by rows, there and back; XLA's own products are not run in parts.
  by_columns, by_rows = (None, 'tensor'), ('tensor', None)
  assert divisions == ({(*axes, t) for axes in (by_columns, by_rows) for t in (False, True)} if impl else set())
  if shape == (2, 2, 2) and bits:
    down = at_frozen['layers']['mlp']['down_proj']['kernel']
    assert (
      down.scale.spec == down.offset.spec == down.planes[0].spec == jax.sharding.PartitionSpec(None, 'tensor', 'fsdp')
    )


@pytest.mark.parametrize('impl', [None, 'tpu_interpreted'])
def test_two_stacks_and_doubled_scales_on_a_mesh(impl):
  """Layers that differ, scales in 8 bits, weights without offsets: as on one device, and nothing large is copied."""
  model, frozen, params = born('qalora', 'mixed')
  assert sorted(params) == ['layers_0', 'layers_1']
  batch, mesh, tx = a_batch(), sharding.make_mesh(data=2, fsdp=2, tensor=2), optax.sgd(1.0)
  want, wanted = one_step(model, frozen, params, batch)
  abstract = jax.eval_shape(model.init, jax.random.key(0), batch['tokens'])
  at_frozen = sharding.place(abstract['frozen'], mesh)
  at_state = sharding.place(jax.eval_shape(functools.partial(step_lib.init_state, tx), abstract['params']), mesh)
  rows = sharding.batch(mesh)
  placed = jax.device_put(frozen, at_frozen), params, jax.device_put(batch, rows)
  shardings = dict(in_shardings=(at_state, at_frozen, rows), out_shardings=(at_state, sharding.replicated(mesh)))
  got, metrics = one_step(model, *placed, tx=tx, mesh=mesh, impl=impl, **shardings)
  assert_trees_close(got.params, want.params)
  assert_trees_close(metrics, wanted)
  up = at_frozen['layers_0']['mlp']['up_proj']['kernel']
  assert up.scale.codes.spec == up.planes[0].spec == jax.sharding.PartitionSpec(None, 'fsdp', 'tensor')
  assert up.scale.absmax.spec == up.scale.mean.spec == jax.sharding.PartitionSpec()


def test_a_group_never_straddles_devices():
  model, *_ = born('qalora')
  abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
  mesh = sharding.make_mesh(data=1, fsdp=8, tensor=1)
  # 64 inputs in groups of 16 are 4 groups, over 8 devices.
  with pytest.raises(
    ValueError, match=r"k_proj/kernel: its axis 'embed' has 4 parts.*fsdp = 8; use one of \[1, 2, 4\]"
  ):
    sharding.place(abstract['frozen'], mesh)
  held = sharding.place(abstract['frozen'], mesh, fallback='replicate')
  assert held['layers']['attention']['q_proj']['kernel'].scale.spec == jax.sharding.PartitionSpec(None, None, 'tensor')
  assert held['embedding'].spec == jax.sharding.PartitionSpec('tensor', 'fsdp')


def test_meshes_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match='data=3, fsdp=1, tensor=1 does not fit 8 devices'):
    sharding.make_mesh(data=3)
  with pytest.raises(ValueError, match='is 9 rows, which do not divide over data x fsdp = 8'):
    sharding.check_rows(32, 4, sharding.make_mesh(data=8))
    sharding.check_rows(8, 1, sharding.make_mesh(data=4, fsdp=2))
    sharding.check_rows(36, 4, sharding.make_mesh(data=8))


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
