"""What keeps a step small changes nothing: logits and attention by pieces.  And it is small: compiled programs."""

import dataclasses
import functools
import json
import math
import re

from flax import linen as nn
import hypothesis
from hypothesis import strategies
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import step_test

from qalora_jax import adapters
from qalora_jax import objectives
from qalora_jax import optim
from qalora_jax import sharding
from qalora_jax import step as step_lib
from qalora_jax import topologies
from qalora_jax.kernels import exact
from qalora_jax.models import attention
from qalora_jax.models import decoder
from qalora_jax.models import linear
from qalora_jax.models import pieces
from qalora_jax.quant import affine

HEADS = {
  'trained': (False, linear.Scheme(trains=True)),
  'tied, trained': (True, linear.Scheme(trains=True)),
  'quantized, adapted': (
    False,
    linear.Scheme(
      quantizers=(('.', affine.Affine(4, 16)),), adapter=adapters.Adapter('qalora', 4, 8.0), adapted='lm_head|v_proj'
    ),
  ),
}
# A prime, so that pieces never divide it; a vocabulary that is the size of nothing else.
T, V = 11, 80


@hypothesis.given(
  size=strategies.integers(1, 40),
  one=strategies.integers(1, 9),
  limit=strategies.integers(1, 200),
  rows=strategies.integers(1, 3),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_pieces_join_to_the_whole_and_keep_the_limit(size, one, limit, rows):
  length = pieces.length(size, one, limit)
  assert length * one <= limit or length == 1
  x = np.arange(rows * size * 2).reshape(rows, size, 2)
  cut = pieces.cut(x, length)
  assert cut.shape[1:] == (rows, length, 2)
  np.testing.assert_array_equal(pieces.joined(cut, size), x)
  # Fewest pieces, and as even as they can be.
  assert (size <= max(1, limit // one)) == (length == size)


def test_a_device_holds_its_part():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  found = lambda: (
    pieces.local(linear.ROWS, 8),
    pieces.local('vocab', 6),
    pieces.local('heads', 3),
    pieces.local('norm', 5),
  )
  assert found() == (8, 6, 3, 5)
  assert sharding.over(mesh, found)() == (2, 3, 3, 5)


def limited(monkeypatch, logits: int, queries: int):
  """So many logits of a row, and scores of so many queries, at most at once on one device."""
  monkeypatch.setattr(objectives, 'LOGITS', step_test.ROWS * logits * 4)
  monkeypatch.setattr(attention, 'SCORES', step_test.ROWS * queries * step_test.CONFIG.num_attention_heads * T * 4)


def plain_loss(model, params, frozen, batch):
  """The summed loss of all logits at once, by its definition."""
  variables = {'params': params, 'frozen': frozen}
  logits = model.apply(variables, batch['tokens'], batch['segments'], batch['positions'])[:, :-1]
  targets, segments = batch['tokens'][:, 1:], batch['segments']
  counts = (batch['loss_mask'][:, 1:] == 1) & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
  log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
  return -jnp.sum(log_p * counts)


@pytest.mark.parametrize('head', HEADS)
def test_the_loss_by_pieces_is_the_plain_one(head, monkeypatch):
  """Value and gradients of every trained weight; pieces of 4 tokens, blocks of 3 queries, of rows of 11."""
  tied, scheme = HEADS[head]
  model = decoder.Decoder(dataclasses.replace(step_test.CONFIG, vocab_size=V, tie_word_embeddings=tied), scheme)
  variables = {'frozen': {}, **nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))}
  move = lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape)
  params, frozen = jax.tree.map(move, variables['params']), variables['frozen']
  assert head != 'quantized, adapted' or sorted(params) == ['layers', 'lm_head']
  batch = jax.tree.map(lambda x: x[:, :T], step_test.a_batch())
  wanted = jax.jit(jax.value_and_grad(functools.partial(plain_loss, model)))(params, frozen, batch)
  limited(monkeypatch, 4 * V, queries=3)

  def by_pieces(params):
    return step_lib.score_rows(model, {'params': params, 'frozen': frozen}, batch)[0].sum()

  got = jax.jit(jax.value_and_grad(by_pieces))
  text = str(jax.make_jaxpr(got)(params))
  assert f'f32[{step_test.ROWS},4,{V}]' in text
  assert f'f32[{step_test.ROWS},{T},{V}]' not in text
  assert f'f32[{step_test.ROWS},4,{T},{T}]' not in text
  step_test.assert_trees_close(got(params), wanted)


def test_pieces_on_a_mesh_are_those_of_one_device(monkeypatch):
  """The limit is a device's: with a quarter of the rows and half of the vocabulary it takes eight times the tokens."""
  model, frozen, params = step_test.born('qalora')
  batch = jax.tree.map(lambda x: x[:, :T], step_test.a_batch())
  want, wanted = step_test.one_step(model, frozen, params, batch)
  limited(monkeypatch, step_test.CONFIG.vocab_size, queries=1)
  mesh, tx = sharding.make_mesh(data=2, fsdp=2, tensor=2), optax.sgd(1.0)
  abstract = jax.eval_shape(model.init, jax.random.key(0), batch['tokens'])
  at_frozen = sharding.place(abstract['frozen'], mesh)
  at_state = sharding.place(jax.eval_shape(functools.partial(step_lib.init_state, tx), abstract['params']), mesh)
  shardings = dict(in_shardings=(at_state, at_frozen, sharding.batch(mesh)), out_shardings=(at_state, None))
  lengths, length = [], pieces.length
  monkeypatch.setattr(pieces, 'length', lambda *a: lengths.append(length(*a)) or lengths[-1])
  placed = jax.device_put(frozen, at_frozen), params, jax.device_put(batch, sharding.batch(mesh))
  step = jax.jit(sharding.over(mesh, functools.partial(step_lib.train_step, model, tx, 0, 1)), **shardings)
  frozen, params, batch = placed
  got, metrics = step(step_lib.init_state(tx, params), frozen, batch)
  assert set(lengths) == {6}  # 8 at most: 11 in two pieces
  step_test.assert_trees_close(got.params, want.params)
  step_test.assert_trees_close(metrics, wanted)


@pytest.mark.parametrize('segmented', [False, True])
def test_attention_by_blocks_is_attention(segmented, monkeypatch):
  """Values and gradients, grouped queries; a padded last block and one query at a time."""
  rows, heads, groups, width = 2, 4, 2, 8
  keys = jax.random.split(jax.random.key(0), 4)
  q = jax.random.normal(keys[0], (rows, T, heads, width))
  k, v = (jax.random.normal(key, (rows, T, groups, width)) for key in keys[1:3])
  weight = jax.random.normal(keys[3], q.shape)
  segments = jnp.array([[1] * 4 + [2] * 5 + [0] * 2, [1] * T]) if segmented else None
  mask = jnp.tril(jnp.ones((T, T), bool))[None, None]
  if segmented:
    mask = mask & (segments[:, :, None] == segments[:, None, :])[:, None]
  whole = lambda *qkv: jnp.sum(weight * jax.nn.dot_product_attention(*qkv, mask=mask))
  wanted = jax.value_and_grad(whole, argnums=(0, 1, 2))(q, k, v)
  for queries in 1, 4:
    monkeypatch.setattr(attention, 'SCORES', queries * rows * heads * T * 4)
    blocks = lambda *qkv: jnp.sum(weight * attention.attend(*qkv, segments))
    assert f'f32[{rows},{queries},' in str(jax.make_jaxpr(blocks)(q, k, v))
    # Sums of up to 11 x 8 products of numbers around 1.
    step_test.assert_trees_close(jax.value_and_grad(blocks, argnums=(0, 1, 2))(q, k, v), wanted, eps=1e-5)


def test_gradients_of_keys_are_added_in_float32(monkeypatch):
  """In bfloat16 a sum over the blocks would be rounded after each; it is rounded once, as without blocks."""
  rows, heads, width, time = 1, 1, 8, 256
  q, k, v, weight = jax.random.normal(jax.random.key(0), (4, rows, time, heads, width)).astype(jnp.bfloat16)
  loss = lambda v: jnp.sum((weight * attention.attend(q, k, v)).astype(jnp.float32))
  wanted = jax.grad(loss)(v).astype(jnp.float32)
  monkeypatch.setattr(attention, 'SCORES', rows * heads * time * 4)
  got = jax.grad(lambda v: loss(v))(v).astype(jnp.float32)
  # One rounding of each, 2^-9 of the entry, and the products' own: the probabilities are bfloat16 in both.
  np.testing.assert_allclose(got, wanted, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize('narrow', [0, 1])
def test_a_product_with_a_float32_operand_copies_no_other(narrow, monkeypatch):
  """Three pieces of one operand, and the other as it is; to 2^-22 of the products' magnitudes."""
  monkeypatch.setattr(exact.product_lib, 'device', lambda: exact.product_lib.Device('gpu', 'NVIDIA H100'))
  rng = np.random.default_rng(0)
  operands = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((24, 80), (80, 56))]
  operands[narrow] = operands[narrow].astype(jnp.bfloat16)
  wide = [np.asarray(operand, np.float64) for operand in operands]
  # Each piece leaves 2^-8 of the rest, so three leave nothing; sums of 80 numbers in float32 leave 80 x 2^-24 at most.
  bound = 80 * 2.0**-24 * (np.abs(wide[0]) @ np.abs(wide[1]))
  assert (np.abs(np.asarray(exact.dot(*operands), np.float64) - wide[0] @ wide[1]) <= bound).all()
  made = str(jax.make_jaxpr(exact.dot)(*operands))
  assert not re.search(r'bf16\[\d*,?240|bf16\[240', made)
  # Pieces of the float32 operand alone are stacked.
  (stacked,) = set(re.findall(r'bf16\[3,(\d+,\d+)\]', made))
  assert stacked == ','.join(map(str, operands[1 - narrow].shape))


def test_a_run_that_offloads_is_the_same_run(qalora, trained, tmp_path, monkeypatch):
  """Layers' inputs and moments on the host, through a checkpoint too."""
  placed, on_host = [], optim.on_host
  monkeypatch.setattr(optim, 'on_host', lambda at: placed.append(on_host(at)) or placed[-1])
  offloads = ('model.remat=offload', 'optim.offload=true', 'train.checkpoint_every=2')
  qalora('train', tmp_path, *offloads, 'train.steps=2', 'train.validate_every=0')
  qalora('train', tmp_path, *offloads, '--replace_config')
  assert placed
  lines = lambda workdir: [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  losses = lambda workdir: {row['step']: row['loss'] for row in lines(workdir) if 'loss' in row}
  got, want = losses(tmp_path), losses(trained)
  assert got.keys() == want.keys() == set(range(1, 9))
  # Layers are computed again, and Adam's operations are rounded in another order.
  np.testing.assert_allclose(list(got.values()), [want[step] for step in got], rtol=1e-5)


# A small LLaMA that is compiled for a TPU; its vocabulary is the size of nothing else, and so is its window.
ROWS, WINDOW, WIDTH, MLP, VOCABULARY, RANK = 2, 384, 256, 512, 1024, 8


def compiled_step(layers: int, remat: str):
  """(a training step for v5e with its moments on the host, the bytes of the gradients of one of its layers)."""
  scheme = linear.Scheme(
    quantizers=(('all', affine.Affine(4, 32)),),
    adapter=adapters.Adapter('qalora', RANK, 8.0),
    frozen_dtype=jnp.bfloat16,
  )
  config = decoder.Config(VOCABULARY, WIDTH, MLP, layers, 2, 2, dtype=jnp.bfloat16, remat=remat)
  model = decoder.Decoder(config, scheme)
  settings = dict(clip=0.3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
  tx = optim.adamw(lambda step: 1e-3, **settings, offload=True)
  tokens = jax.ShapeDtypeStruct((ROWS, WINDOW), jnp.int32)
  variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))
  state = jax.eval_shape(functools.partial(step_lib.init_state, tx), variables['params'])
  batch = dict.fromkeys(('tokens', 'loss_mask', 'segments', 'positions'), tokens)
  mesh = topologies.chip('v5e')
  whole = sharding.replicated(mesh)
  there = lambda tree: jax.tree.map(lambda _: whole, tree)
  at = optim.on_host(there(state))
  put = lambda tree, at: jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, at)
  placed = put(state, at), *(put(tree, there(tree)) for tree in (variables['frozen'], batch))
  with jax.set_mesh(mesh):
    train = functools.partial(step_lib.train_step, model, tx, 0, 1)
    compiled = topologies.compiled(train, *placed, out_shardings=(at, whole), donate_argnums=0)
  return compiled, sum(leaf.size * 4 for leaf in jax.tree.leaves(variables['params'])) // layers


@pytest.mark.skipif(not topologies.installed(), reason='libtpu is not installed')
def test_a_further_layer_adds_its_gradients_alone(monkeypatch):
  """Nothing dense: a layer's input goes to the host, where its moments are."""
  monkeypatch.setattr(objectives, 'LOGITS', 2**19)
  monkeypatch.setattr(attention, 'SCORES', 2**19)
  (few, _), (many, trained) = (compiled_step(layers, 'offload') for layers in (2, 6))
  grown = lambda name: (getattr(many.memory_analysis(), name) - getattr(few.memory_analysis(), name)) / 4
  # Gradients are padded to whole tiles of 8 x 128 numbers: those of the seven A have 8 columns of at most 16 groups.
  padding = 7 * 16 * 128 * 4
  dense = 2 * (4 * WIDTH**2 + 3 * WIDTH * MLP)
  assert grown('temp_size_in_bytes') <= trained + padding < dense / 8
  assert grown('host_temp_size_in_bytes') == pytest.approx(2 * ROWS * WINDOW * WIDTH, rel=0.05)
  assert grown('host_argument_size_in_bytes') >= 2 * trained


@pytest.mark.skipif(not topologies.installed(), reason='libtpu is not installed')
def test_no_logits_and_no_scores_stand_whole(monkeypatch):
  monkeypatch.setattr(objectives, 'LOGITS', 2**19)
  monkeypatch.setattr(attention, 'SCORES', 2**19)
  text = compiled_step(2, 'full')[0].as_text()
  shapes = [tuple(map(int, dims.split(','))) for dims in re.findall(r'(?:f32|bf16)\[([\d,]+)\]', text)]
  logits = {math.prod(dims) for dims in shapes if VOCABULARY in dims} - {VOCABULARY, VOCABULARY * WIDTH}
  # 2^17 of them are the most that fit; 384 tokens in six pieces of 64.
  assert max(logits) == ROWS * 64 * VOCABULARY == 2**17
  assert not [dims for dims in shapes if dims.count(WINDOW) == 2]
