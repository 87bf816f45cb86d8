"""LLaMA: causality, packing, grouped queries, rotary positions, and what stands where at birth."""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qalora_jax import adapters
from qalora_jax.models import decoder
from qalora_jax.models import linear
from qalora_jax.models import rotary
from qalora_jax.quant import affine
from qalora_jax.quant import qtensor

CONFIG = decoder.Config(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=64,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
)
TRAINED = linear.Scheme(trains=True)
FOUR_BITS = (('all', affine.Affine(4, 16)),)


@functools.cache
def born(scheme=TRAINED, config=CONFIG, scale=5.0):
  """A model and its variables, weights large enough that every part matters."""

  @jax.jit
  def draw(key):
    variables = nn.unbox(decoder.Decoder(config, scheme).init(key, jnp.zeros((1, 4), jnp.int32)))
    grow = lambda leaf: leaf * scale if leaf.dtype == jnp.float32 and leaf.ndim > 1 else leaf
    return jax.tree.map(grow, variables)

  model = decoder.Decoder(config)
  return model, draw(jax.random.key(0))


def run(model, *arguments):
  return jax.jit(model.apply)(*arguments)


def random_tokens(seed, *shape):
  return jax.random.randint(jax.random.key(seed), shape, 0, CONFIG.vocab_size)


def test_logits_do_not_depend_on_later_tokens():
  """The Jacobian of the logits at t with respect to the embedding at u is zero for u > t, and only there."""
  model, variables = born()
  tokens = jnp.arange(8, dtype=jnp.int32)[None]  # eight different tokens, so a row of the embedding is a position

  def logits(embedding):
    return model.apply({'params': variables['params'] | {'embedding': embedding}}, tokens)[0]

  jacobian = jax.jit(jax.jacobian(logits))(variables['params']['embedding'])  # [T, V, V, D]
  moved = jnp.abs(jacobian).sum(axis=(1, 3))[:, :8]
  np.testing.assert_array_equal(moved > 0, np.tril(np.ones((8, 8), bool)))


def test_packed_documents_do_not_see_each_other():
  model, variables = born()
  first, second = random_tokens(1, 1, 9), random_tokens(2, 1, 5)
  packed = jnp.concatenate([first, second, jnp.zeros((1, 2), jnp.int32)], axis=1)
  segments = jnp.array([[1] * 9 + [2] * 5 + [0] * 2])
  positions = jnp.array([[*range(9), *range(5), 0, 0]])
  got = run(model, variables, packed, segments, positions)
  want = [run(model, variables, first), run(model, variables, second)]
  for part, alone in zip((got[:, :9], got[:, 9:14]), want, strict=True):
    np.testing.assert_allclose(part, alone, atol=1e-5 * float(jnp.abs(alone).max()))
  assert bool(jnp.isfinite(got).all())
  without = run(model, variables, packed)
  assert float(jnp.abs(without[:, 9:14] - want[1]).max()) > 0.1  # the segments are what keeps them apart


def test_grouped_queries_are_repeated_keys():
  """K key/value heads serve H / K queries each: the same as H heads with repeated projections."""
  model, variables = born()
  full = dataclasses.replace(CONFIG, num_key_value_heads=4)
  layers = variables['params']['layers']

  def repeat(kernel):
    N, D, _ = kernel.shape
    return jnp.repeat(kernel.reshape(N, D, 2, 8), 2, axis=2).reshape(N, D, 32)

  attention = layers['attention'] | {
    name: {'kernel': repeat(layers['attention'][name]['kernel'])} for name in ('k_proj', 'v_proj')
  }
  wide = {'params': variables['params'] | {'layers': layers | {'attention': attention}}}
  tokens = random_tokens(3, 2, 12)
  want = run(model, variables, tokens)
  np.testing.assert_allclose(
    run(decoder.Decoder(full), wide, tokens), want, rtol=0, atol=1e-5 * float(jnp.abs(want).max())
  )


def test_rotary_scores_depend_on_distance_alone():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, CONFIG.head_dim))
  frequencies = rotary.frequencies(CONFIG.rope_theta, CONFIG.head_dim, CONFIG.rope_scaling)

  def score(at_q, at_k):
    turn = lambda x, at: rotary.rotate(x, jnp.array([[at]]), frequencies)
    return float(jnp.sum(turn(q, at_q) * turn(k, at_k)))

  assert score(3, 1) == pytest.approx(score(33, 31), abs=1e-5)
  assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
  scaling = rotary.Stretch(8.0, 1.0, 4.0, 8192)
  config = dataclasses.replace(CONFIG, head_dim=128, rope_theta=500000.0)
  plain = rotary.frequencies(config.rope_theta, config.head_dim, config.rope_scaling)
  stretched = rotary.frequencies(config.rope_theta, config.head_dim, scaling)
  waves = 2 * np.pi / plain
  np.testing.assert_array_equal(stretched[waves < 8192 / 4], plain[waves < 8192 / 4])
  np.testing.assert_allclose(stretched[waves > 8192], plain[waves > 8192] / 8, rtol=1e-6)
  between = (waves > 8192 / 4) & (waves < 8192)
  assert between.any() and ((stretched < plain) & (stretched > plain / 8))[between].all()


@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_remat_changes_nothing(remat):
  model, variables = born()
  tokens = random_tokens(4, 2, 12)
  other = decoder.Decoder(dataclasses.replace(CONFIG, remat=remat))
  loss = lambda m: jax.jit(jax.value_and_grad(lambda v: jnp.mean(m.apply(v, tokens) ** 2)))(variables)
  for got, want in zip(jax.tree.leaves(loss(other)), jax.tree.leaves(loss(model)), strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize('kind', [None, *adapters.KINDS])
def test_the_scheme_says_what_is_born_where(kind):
  adapter = adapters.Adapter(kind, 2, 4.0) if kind else None
  scheme = linear.Scheme(quantizers=FOUR_BITS, adapter=adapter, adapted='attention')
  shapes = nn.unbox(jax.eval_shape(decoder.Decoder(CONFIG, scheme).init, jax.random.key(0), random_tokens(0, 1, 4)))
  layers = shapes['frozen']['layers']
  assert all(isinstance(layers['mlp'][name]['kernel'], qtensor.QTensor) for name in layers['mlp'])
  assert shapes['frozen']['embedding'].shape == (64, 32)
  assert shapes['frozen']['lm_head']['kernel'].shape == (32, 64)
  if kind is None:
    assert not shapes.get('params')
    return
  assert set(shapes['params']['layers']) == {'attention'}
  assert set(shapes['params']['layers']['attention']) == {'q_proj', 'k_proj', 'v_proj', 'o_proj'}


@pytest.mark.parametrize('kind', adapters.KINDS)
def test_no_dense_weight_is_kept_between_forward_and_backward(kind):
  """Of all that the scanned layers keep, nothing is a float array of the size of one layer's matrix."""
  scheme = linear.Scheme(quantizers=FOUR_BITS, adapter=adapters.Adapter(kind, 2, 4.0))
  # The head stays dense and is kept, by reference: its shape must be no other's.
  model, variables = born(scheme, dataclasses.replace(CONFIG, vocab_size=80))
  tokens = random_tokens(6, 1, 3)  # so few that activations are smaller than any matrix

  def loss(params):
    return jnp.sum(model.apply({'params': params, 'frozen': variables['frozen']}, tokens) ** 2)

  _, pull = jax.vjp(loss, variables['params'])
  kept = [leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, 'dtype') and leaf.dtype == jnp.float32]
  layers = variables['frozen']['layers']
  matrices = [part[name]['kernel'] for part in (layers['attention'], layers['mlp']) for name in part]
  dense = {matrix.shape for matrix in matrices} | {matrix.shape[1:] for matrix in matrices}
  assert kept and not [leaf.shape for leaf in kept if leaf.shape in dense]


@pytest.mark.parametrize(
  'targets, name, selected',
  [
    ('all', 'layers/0/mlp/down_proj', True),
    ('all', 'lm_head', False),
    ('attention', 'layers/11/attention/o_proj', True),
    ('attention', 'layers/0/mlp/up_proj', False),
    ('(q|v)_proj', 'layers/0/attention/v_proj', True),
    ('(q|v)_proj', 'layers/0/attention/k_proj', False),
    ('_proj$|lm_head', 'lm_head', True),
  ],
)
def test_targets(targets, name, selected):
  assert linear.selects(targets, name) == selected


def test_bfloat16_runs_in_bfloat16_and_stays_close():
  scheme = linear.Scheme(quantizers=FOUR_BITS)
  model, variables = born(scheme)
  tokens = random_tokens(5, 2, 12)
  half = decoder.Decoder(dataclasses.replace(CONFIG, dtype=jnp.bfloat16))
  want, got = run(model, variables, tokens), half.apply(variables, tokens)
  assert got.dtype == jnp.float32
  # Two layers of some twenty roundings of 2^-9 relative, of random sign.
  assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 20 * 2**-9
  assert not np.array_equal(got, want)


def test_heads_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match='num_attention_heads = 4 is no multiple of num_key_value_heads = 3'):
    dataclasses.replace(CONFIG, num_key_value_heads=3)
