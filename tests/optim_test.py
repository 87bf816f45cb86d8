"""Adam's moments in 8 bits and on the host: what is kept of them, where it lies, and that training hardly notices."""

import functools

from flax import linen as nn
import hypothesis
from hypothesis import strategies
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_test

from qalora_jax import adapters
from qalora_jax import hf
from qalora_jax import optim
from qalora_jax import sharding
from qalora_jax import step as step_lib
from qalora_jax.models import decoder
from qalora_jax.models import linear
from qalora_jax.quant import affine
from qalora_jax.quant import codebooks

MAPS = {'signed': codebooks.DYNAMIC, 'unsigned': codebooks.DYNAMIC_UNSIGNED}
SETTINGS = dict(clip=0.3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)


def adamw(**changes):
  return optim.adamw(optim.schedule('constant', learning_rate=1e-3, steps=1), **SETTINGS, **changes)


def test_the_unsigned_map_is_that_of_bitsandbytes():
  """By its rule: between 0 and 1, decade i of seven has 2^(i+1) levels, the means of neighbours of a linspace."""
  found = codebooks.DYNAMIC_UNSIGNED
  assert len(found) == 256 and found[0] == 0 and found[-1] == 1 and (np.diff(found) > 0).all()
  for decade in range(7):
    edges = np.linspace(0.1, 1, 2 ** (decade + 1) + 1)
    own = found[2 ** (decade + 1) - 1 : 2 ** (decade + 2) - 1]
    np.testing.assert_allclose(own, 10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2, rtol=1e-6)


@pytest.mark.parametrize('levels', MAPS)
@hypothesis.given(seed=strategies.integers(0, 2**20), decades=strategies.integers(0, 12))
@hypothesis.settings(deadline=None, max_examples=20)
def test_moments_in_8_bits(levels, seed, decades):
  """Kept within half a gap between levels, the peak exactly; kept once more they do not change."""
  rng, levels = np.random.default_rng(seed), MAPS[levels]
  x = (rng.normal(size=(8, 512)) * 10.0 ** -rng.uniform(0, decades, (8, 512))).astype(np.float32)
  x[0], x[1, ::2] = 0, 0
  x = x if levels[0] < 0 else np.abs(x)
  kept = optim.compress(jnp.asarray(x), levels, 64)
  assert kept.codes.dtype == jnp.uint8 and kept.codes.shape == x.shape and kept.peak.shape == (8, 8)
  wide = np.asarray(kept.expand(levels))
  blocks, made, peak = x.reshape(8, 8, 64), wide.reshape(8, 8, 64), np.asarray(kept.peak)[..., None]
  assert (np.abs(peak) == np.abs(blocks).max(-1, keepdims=True)).all()
  normal = blocks / np.where(peak == 0, 1, peak)
  above = np.clip(np.searchsorted(levels, normal), 1, 255)
  gap = levels[above] - levels[above - 1]
  # A number above 0 is never kept as 0: it may be a whole gap away.
  share = np.where((levels[0] == 0) & (above == 1), 1.0, 0.5)
  # What lies beyond the least level (-0.993) is off by what is missing there to -1.
  beyond = np.maximum(levels[0] - normal, 0)
  # The quotient, the middle between two levels and the product are each rounded once, by up to half an eps.
  rounded = np.finfo(np.float32).eps * (np.abs(blocks) + np.abs(made))
  assert (np.abs(made - blocks) <= (share * gap + beyond) * np.abs(peak) + rounded).all()
  assert ((made == 0) == (blocks == 0)).all() or levels[0] < 0
  assert (made[blocks == 0] == 0).all()
  again = optim.compress(jnp.asarray(wide), levels, 64)
  np.testing.assert_array_equal(again.codes, kept.codes)
  np.testing.assert_array_equal(again.peak, kept.peak)


@hypothesis.given(size=strategies.integers(1, 40000))
@hypothesis.settings(deadline=None, max_examples=100)
def test_blocks_divide_the_last_axis(size):
  block = optim.block_of((4096, size))
  assert block == 0 or (16 <= block <= 256 and size % block == 0)
  assert block or not any(size % fit == 0 for fit in range(16, 257))


def test_blocks_by_hand():
  """LLaMA's widths have many blocks that halve often; small arrays have none."""
  assert [optim.block_of((2, size)) for size in (4096, 11008, 8192, 22016)] == [64, 86, 64, 86]
  assert optim.block_of((4095,)) == optim.block_of((63, 64)) == optim.block_of(()) == 0


def test_nothing_kept_is_zero_moments():
  """A new state is what compressing zeros would give."""
  weights = {'large': jnp.ones((64, 128)), 'small': jnp.ones((3,))}
  (moments, *_) = jax.tree.leaves(adamw(state='int8').init(weights), is_leaf=lambda x: isinstance(x, optim.Moments))
  for tree, levels in ((moments.mu, codebooks.DYNAMIC), (moments.root, codebooks.DYNAMIC_UNSIGNED)):
    zeros = optim.compress(jnp.zeros((64, 128)), levels, 64)
    np.testing.assert_array_equal(tree['large'].codes, zeros.codes)
    np.testing.assert_array_equal(tree['large'].peak, zeros.peak)
    np.testing.assert_array_equal(tree['small'], jnp.zeros(3))


def trained(tx, weights, steps=3, place=lambda shardings: None):
  """Weights and optimizer state after some random gradients."""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  at = place(jax.tree.map(lambda _: here, jax.eval_shape(tx.init, weights)))
  state = jax.jit(tx.init, out_shardings=at)(weights)
  update = jax.jit(tx.update, out_shardings=None if at is None else (here, at))
  rng = np.random.default_rng(0)
  for _ in range(steps):
    grads = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32), weights)
    updates, state = update(grads, state, weights)
    weights = jax.tree.map(jnp.add, weights, updates)
  return weights, state


@pytest.mark.parametrize('state', optim.STATES)
def test_moments_on_the_host_change_nothing(state):
  """Stacks go through layer by layer, other weights whole; in float32 it is optax's Adam, the same operations."""
  weights = {'stack': jnp.ones((3, 32, 128)), 'matrix': jnp.ones((64, 128)), 'norm': jnp.ones((7,))}
  here, _ = trained(adamw(state=state), weights)
  there, moved = trained(adamw(state=state, offload=True), weights, place=optim.on_host)
  (moments,) = [
    node
    for node in jax.tree.leaves(moved, is_leaf=lambda x: isinstance(x, optim.Moments))
    if node is not None and isinstance(node, optim.Moments)
  ]
  assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves((moments.mu, moments.root))} == {sharding.HOST}
  assert moments.count.sharding.memory_kind == 'device'
  # Updates of 1e-3, each rounded in another order.
  step_test.assert_trees_close(there, here, eps=3e-7)


def test_devices_without_host_memory_are_told(monkeypatch):
  mesh = sharding.make_mesh()
  sharding.check_host_memory(mesh, ['optim.offload = True'])
  monkeypatch.setattr(sharding, 'HOST', 'memory of another planet')
  sharding.check_host_memory(mesh, [])
  with pytest.raises(ValueError, match=r'^optim.offload = True: cpu does not reach .* set model.remat = "full"'):
    sharding.check_host_memory(mesh, ['optim.offload = True'])


def test_codes_lie_as_their_weights_do():
  """On a mesh, blocks of a matrix over tensor and fsdp; two steps are those of one device."""
  model, frozen, params = step_test.born('full')
  batch, tx = step_test.a_batch(), adamw(state='int8')
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  abstract = jax.eval_shape(model.init, jax.random.key(0), batch['tokens'])['params']
  make_state = functools.partial(step_lib.init_state, tx)
  at = sharding.place(jax.eval_shape(make_state, abstract), mesh, 'replicate')
  (moments,) = [
    node
    for node in jax.tree.leaves(at, is_leaf=lambda x: isinstance(x, optim.Moments))
    if isinstance(node, optim.Moments)
  ]
  up, kept = (tree['layers']['mlp']['up_proj']['kernel'] for tree in (at.params, moments.mu))
  assert kept.codes.spec == kept.peak.spec == up.spec == jax.sharding.PartitionSpec(None, 'fsdp', 'tensor')
  step = functools.partial(step_lib.train_step, model, tx, 0, 1)
  rows = sharding.batch(mesh)
  whole, parts = make_state(params), jax.device_put(make_state(params), at)
  one = jax.jit(step)
  many = jax.jit(sharding.over(mesh, step), in_shardings=(at, None, rows), out_shardings=(at, None))
  for _ in range(2):
    (whole, _), (parts, _) = one(whole, frozen, batch), many(parts, frozen, batch)
  # A sum rounded otherwise may take the neighbour of a code, a moment off by 1 % of its block's peak.
  moved = lambda state: jax.tree.map(jnp.subtract, state.params, params)
  for got, want in zip(jax.tree.leaves(moved(parts)), jax.tree.leaves(moved(whole)), strict=True):
    assert float(jnp.linalg.norm(got - want)) <= 0.01 * float(jnp.linalg.norm(want))


def test_a_real_model_trains_alike(assets):
  """Twelve steps of QA-LoRA on babyllama: the loss falls in 8 bits as it does in 32."""
  directory = assets / 'models' / 'babyllama_tok105'
  config = hf.read_config(directory)
  scheme = linear.Scheme(quantizers=(('all', affine.Affine(4, 32)),), adapter=adapters.Adapter('qalora', 32, 32.0))
  model = decoder.Decoder(config, scheme)
  frozen = jax.device_put(hf.load(directory, config, scheme))
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))['params']
  tokens = jax.random.randint(jax.random.key(1), (4, 64), 0, config.vocab_size)
  ones = jnp.ones_like(tokens)
  places = jnp.broadcast_to(jnp.arange(64)[None], tokens.shape)
  batch = dict(tokens=tokens, loss_mask=ones, segments=ones, positions=places)
  losses = {}
  for state in optim.STATES:
    tx = optim.adamw(lambda step: 1e-3, **SETTINGS, state=state)
    step = jax.jit(functools.partial(step_lib.train_step, model, tx, 0, 1))
    now, losses[state] = step_lib.init_state(tx, params), []
    for _ in range(12):
      now, metrics = step(now, frozen, batch)
      losses[state].append(float(metrics['loss']))
  codes = [leaf.size for leaf in jax.tree.leaves(now.opt_state) if leaf.dtype == jnp.uint8]
  assert sum(codes) > adapters.count(params)  # most of the two moments
  losses = {state: np.array(values) for state, values in losses.items()}
  fallen = losses['float32'][0] - losses['float32'][-1]
  print(losses, fallen)
  assert fallen > 0.1
  assert np.abs(losses['int8'] - losses['float32']).max() <= 0.02 * fallen
