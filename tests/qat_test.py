"""Quantization-aware training: what trains is what is exported, and it learns as LSQ says.

Tolerances as in laws_test.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qalora_jax.kernels import qmatmul
from qalora_jax.quant import affine
from qalora_jax.quant import float4
from qalora_jax.quant import latent
from qalora_jax.quant import qtensor

BITS = (8, 4, 3, 2)
EPS = float(jnp.finfo(jnp.float32).eps)
I, O, G, B = 64, 24, 16, 8
L = I // G


start = jax.jit(latent.latent, static_argnums=(1, 2))
quantized = jax.jit(lambda w: w.quantize())


def example(bits, learned, key=0, **choices):
  """A Latent in the midst of training: away from where it was fitted, with weights outside learned ranges."""
  keys = jax.random.split(jax.random.key(key), 4)
  w = start(0.02 * jax.random.normal(keys[0], (I, O)), affine.Affine(bits, G, **choices), learned)
  w = w.replace(w=w.w + 0.002 * jax.random.normal(keys[1], (I, O)))
  if learned:
    w = w.replace(scale=w.scale * jax.random.uniform(keys[2], (L, O), minval=0.7, maxval=1.0))
  if w.offset is not None:
    w = w.replace(offset=w.offset + 0.003 * jax.random.normal(keys[3], (L, O)))
  return w


def batch(dtype=jnp.float32, key=1):
  keys = jax.random.split(jax.random.key(key))
  return jax.random.normal(keys[0], (B, I)).astype(dtype), jax.random.normal(keys[1], (B, O)).astype(dtype)


@jax.jit
def product(w, *batches):
  """y and dx of every (x, dy)."""
  through = lambda x, dy: (lambda y, pull: (y, *pull(dy)))(*jax.vjp(lambda x: qmatmul.qmatmul(x, w), x))
  return [through(*pair) for pair in batches]


@jax.jit
def learn(w, x, dy):
  """The gradient of w."""
  return jax.vjp(lambda w: qmatmul.qmatmul(x, w), w)[1](dy)[0]


def equal(got, want):
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert g.dtype == w.dtype
    np.testing.assert_array_equal(g, w)


def close(got, want, sums):
  np.testing.assert_allclose(got, want, rtol=0, atol=4 * math.sqrt(sums) * EPS * float(np.abs(want).max()))


def by_group(matrix):
  return np.asarray(matrix, np.float64).reshape(L, G, O)


def lsq(w, x, dy):
  """(dw, dscale, doffset, their tolerances, how many weights are clipped) of a learned Latent, in float64.

  A float32 z errs by three roundings of at most h + 1; ddense by the rounding of a sum of B products.
  """
  h = 2 ** (w.quantizer.bits - 1)
  ddense = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
  s = np.asarray(w.scale.astype(w.quantizer.scale_dtype), np.float64)
  beta = np.zeros_like(s) if w.offset is None else np.asarray(w.offset, np.float64)
  if w.quantizer.zero == 'integer':
    beta = s * np.clip(np.round(beta / s), 1 - h, h)
  beta = beta.astype(w.quantizer.scale_dtype).astype(np.float64)
  z = (by_group(w.w) - beta[:, None, :]) / s[:, None, :]
  # No weight of the examples is so near to a border that float32 could see it on the other side.
  assert np.abs(z + h).min() > 1e-5 and np.abs(z - h + 1).min() > 1e-5
  assert np.abs(np.abs(z[np.abs(z) < h] % 1) - 0.5).min() > 1.5 * h * EPS
  below, above = z <= -h, z >= h - 1
  slope = np.round(z) - z
  slope[below], slope[above] = -h, h - 1
  d = by_group(ddense)
  g = 1 / math.sqrt(G * (h - 1))
  dw = np.where(below | above, 0, d)
  each = np.abs(d) * 3 * (h + 1) * EPS + 4 * math.sqrt(B + G) * EPS * np.abs(d).max() * h
  return (
    dw.reshape(I, O),
    g * (d * slope).sum(1),
    g * (d - dw).sum(1),
    g * each.sum(1),
    int((below | above).sum()),
  )


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('symmetric', [False, True])
@pytest.mark.parametrize('learned', [False, True])
def test_the_forward_pass_is_that_of_the_exported_matrix(bits, symmetric, learned):
  """Bit for bit, and so is dx; each jitted on its own, as training and inference are."""
  w = example(bits, learned, symmetric=symmetric)
  batches = batch(), batch(jnp.bfloat16)
  q = quantized(w)
  assert isinstance(q, qtensor.QTensor) and q.shape == w.shape == (I, O) and q.size == w.size == I * O
  equal(product(w, *batches), product(q, *batches))


@pytest.mark.parametrize('bits', [8, 2])
@pytest.mark.parametrize(
  'choices', [dict(zero='integer', scale_dtype='float16'), dict(clip='percentile', percentile=90)]
)
def test_it_is_for_other_choices_of_the_quantizer_too(bits, choices):
  w = example(bits, learned='clip' not in choices, **choices)
  q = quantized(w)
  assert q.scale.dtype == q.offset.dtype == jnp.dtype(choices.get('scale_dtype', 'float32'))
  equal(product(w, batch(), batch(jnp.bfloat16)), product(q, batch(), batch(jnp.bfloat16)))


@pytest.mark.parametrize('bits', [8, 2])
@pytest.mark.parametrize(
  'choices',
  [
    dict(),
    dict(symmetric=True),
    dict(zero='integer'),
    dict(zero='integer', symmetric=True),
    dict(zero='integer', scale_dtype='float16'),
    dict(clip='percentile', percentile=98),
  ],
)
def test_both_kinds_start_as_round_to_nearest(bits, choices):
  quantizer = affine.Affine(bits, G, **choices)

  @jax.jit
  def starts(w):
    return [latent.latent(w, quantizer, learned) for learned in (False, True)], quantizer(w)

  kinds, want = starts(0.02 * jax.random.normal(jax.random.key(bits), (2, I, O)))
  for own in kinds:
    assert own.shape == (2, I, O) and own.size == 2 * I * O
    equal(quantized(own), want)
  assert kinds[0].scale is None and kinds[0].offset is None
  assert kinds[1].scale.dtype == jnp.float32 and (kinds[1].offset is None) == quantizer.symmetric


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('choices', [dict(), dict(symmetric=True), dict(zero='integer', scale_dtype='float16')])
def test_learned_scales_learn_as_lsq_says(bits, choices):
  w = example(bits, learned=True, **choices)
  (x, dy), got = batch(), learn(w, *batch())
  dw, dscale, doffset, atol, clipped = lsq(w, x, dy)
  assert 0 < clipped < I * O
  if choices == dict(symmetric=True):
    assert (w.scale < 0).any() and (w.scale > 0).any()
  close(got.w, dw, B)
  assert (np.abs(got.scale - dscale) <= atol).all() and np.abs(dscale).max() > 10 * atol.max()
  if w.offset is None:
    assert got.offset is None
  else:
    assert (np.abs(got.offset - doffset) <= atol).all() and np.abs(doffset).max() > 10 * atol.max()


def test_a_bfloat16_gradient_is_summed_in_float32():
  x, dy = batch(jnp.bfloat16)
  got = learn(example(4, learned=False), x, dy)
  assert got.w.dtype == jnp.float32 and got.scale is None and got.offset is None
  # Products of bfloat16 numbers are exact in float32.
  close(got.w, np.asarray(x, np.float64).T @ np.asarray(dy, np.float64), B)


@pytest.mark.parametrize('symmetric', [False, True])
def test_minmax_passes_gradients_straight_through_but_not_where_it_clips(symmetric):
  x, dy = batch()
  ddense = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
  close(learn(example(2, learned=False, symmetric=symmetric), x, dy).w, ddense, B)
  w = example(2, learned=False, symmetric=symmetric, clip='mse')
  q = quantized(w)
  error = np.abs(by_group(w.w) - by_group(qtensor.dequantize(q)))
  cut = (error > np.abs(np.asarray(q.scale))[:, None, :] * (0.5 + 4 * EPS)).reshape(I, O)
  assert 0 < cut.sum() < I * O / 2
  close(learn(w, x, dy).w, np.where(cut, 0, ddense), B)


@pytest.mark.parametrize('learned', [False, True])
def test_the_kernel_computes_the_reference(learned):
  w, (x, dy) = example(3, learned), batch()

  @functools.partial(jax.jit, static_argnums=0)
  def through(impl):
    y, pull = jax.vjp(lambda x, w: qmatmul.qmatmul(x, w, impl), x, w)
    return y, *pull(dy)

  for got, want in zip(jax.tree.leaves(through('xla')), jax.tree.leaves(through('reference')), strict=True):
    # A gradient of a scale sums G products of sums of B products.
    close(got, want, I + O + G * B)


@pytest.mark.parametrize('learned', [False, True])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_only_inputs_and_weights_are_kept_for_the_backward_pass(learned, dtype):
  w = example(4, learned)
  _, pull = jax.vjp(qmatmul.qmatmul, batch(dtype)[0], w)
  kept = sorted((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(pull) if hasattr(leaf, 'shape'))
  assert kept == sorted((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves((batch(dtype)[0], w)))


def test_under_vmap_scan_and_remat():
  x, dy = batch()
  each = [example(3, learned=True, key=key) for key in range(2)]
  stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

  def scanned(stack):
    return jax.lax.scan(lambda c, w: (c, jax.checkpoint(qmatmul.qmatmul)(x, w)), 0, stack)[1]

  want_y = jnp.stack([product(w, (x, dy))[0][0] for w in each])
  want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(learn(w, x, dy) for w in each))
  for forward in (jax.vmap(lambda w: qmatmul.qmatmul(x, w)), scanned):
    y, pull = jax.jit(lambda stack, forward=forward: jax.vjp(forward, stack))(stack)
    close(y, want_y, I)
    jax.tree.map(lambda g, w: close(g, w, B + G), jax.jit(pull)(jnp.stack([dy, dy]))[0], want)


@pytest.mark.parametrize('symmetric', [False, True])
@pytest.mark.parametrize('zero', affine.ZEROS)
def test_a_scale_of_zero_is_a_constant_group_that_training_can_leave(symmetric, zero):
  w = example(3, learned=True, symmetric=symmetric, zero=zero)
  x, dy = batch()
  gone = w.replace(scale=w.scale.at[0].set(0.0).at[1].set(1e-40))
  np.testing.assert_array_equal(
    qtensor.dequantize(quantized(gone))[:G],
    jnp.zeros((G, O)) if symmetric or zero == 'integer' else jnp.repeat(w.offset[:1], G, axis=0),
  )
  got = learn(gone, x, dy)
  assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((product(gone, (x, dy)), got)))
  # The limit from above: every weight is clipped.
  limit = learn(w.replace(scale=w.scale.at[0].set(1e-20)), x, dy)
  close(got.scale[0], limit.scale[0], G)
  assert float(jnp.abs(got.scale[0]).min()) > 0
  np.testing.assert_array_equal(got.w[:G], 0.0)


def test_a_constant_group_learns():
  constant = start(jnp.full((I, O), 0.3), affine.Affine(4, G), True)
  x, dy = batch()
  assert float(jnp.abs(constant.scale).max()) == 0
  got = learn(constant, x, dy)
  close(got.w, np.asarray(x, np.float64).T @ np.asarray(dy, np.float64), B)


@pytest.mark.parametrize('bits', BITS)
def test_a_learned_integer_zero_stays_one_that_can_be_packed(bits):
  w = example(bits, learned=True, zero='integer')
  far = w.replace(offset=w.offset + jax.random.normal(jax.random.key(5), w.offset.shape))
  for own in (w, far):
    q = quantized(own)
    zeros = 2 ** (bits - 1) - np.asarray(q.offset, np.float64) / np.asarray(q.scale, np.float64)
    # The float32 product of scale and steps errs by half a unit in the last place.
    np.testing.assert_allclose(zeros, np.round(zeros), rtol=0, atol=2**bits * EPS)
    assert zeros.min() > -0.5 and zeros.max() < 2**bits - 0.5


@pytest.mark.parametrize('bits', [2, 3])
@pytest.mark.parametrize('learned', [False, True])
def test_training_halves_the_loss_of_round_to_nearest(bits, learned):
  """A regression on correlated inputs (8 directions and noise), where errors of weights can make up for each other.

  The float solution is known and has no loss.  Measured: 10 to 29 % of the loss of its rounding is left.
  """
  keys = jax.random.split(jax.random.key(0), 4)
  x = jax.random.normal(keys[0], (128, 8)) @ jax.random.normal(keys[1], (8, I))
  x = x + 0.3 * jax.random.normal(keys[2], x.shape)
  solution = jax.random.normal(keys[3], (I, O))
  quantizer = affine.Affine(bits, G)
  loss = lambda w: jnp.mean((qmatmul.qmatmul(x, w) - x @ solution) ** 2)
  optimizer = optax.adam(optax.linear_schedule(0.01, 0.0, 200))

  @jax.jit
  def train(w):
    def step(carry, _):
      updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
      return (optax.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (w, optimizer.init(w)), length=200)[0][0]

  trained = train(latent.latent(solution, quantizer, learned))
  assert float(loss(trained.quantize())) < 0.5 * float(loss(quantizer(solution)))


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda w: latent.latent(w, float4.Float4(), True), 'a weight: quantization-aware training .* not Float4'),
    (lambda w: latent.latent(w, affine.Affine(4, 48), True, 'q_proj'), 'q_proj: 64 inputs do not divide into groups'),
    (lambda w: latent.latent(w, affine.Affine(4, 48), False, 'q_proj'), 'q_proj: 64 inputs do not divide into groups'),
    (lambda w: qmatmul.qmatmul(w[:, :8], latent.latent(w, affine.Affine(4, G), True)), 'x has 8 inputs, the weight 64'),
    (lambda w: qmatmul.qmatmul(w.T, latent.latent(w, affine.Affine(4, G), True), 'mosaic'), "'mosaic'"),
  ],
)
def test_what_cannot_be_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(jnp.zeros((I, O)))
