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


def example(bits, learned, key=0, **choices):
  """A Latent in the midst of training: learned scales of both signs if symmetric, and weights outside their ranges."""
  rng = np.random.default_rng(key)
  quantizer = affine.Affine(bits, G, **choices)
  w = rng.normal(scale=0.02, size=(I, O)).astype(np.float32)
  if not learned:
    return latent.Latent(jnp.asarray(w), None, None, quantizer)
  signs = rng.choice([-1, 1], (L, O)) if quantizer.symmetric else 1
  scale = signs * rng.uniform(0.7, 1.0, (L, O)) * np.abs(w).reshape(L, G, O).max(1) / 2 ** (bits - 1)
  offset = None if quantizer.symmetric else jnp.asarray(rng.normal(scale=0.003, size=(L, O)), jnp.float32)
  return latent.Latent(jnp.asarray(w), jnp.asarray(scale, jnp.float32), offset, quantizer)


def batch(dtype=jnp.float32, key=1):
  rng = np.random.default_rng(key)
  return jnp.asarray(rng.normal(size=(B, I)), dtype), jnp.asarray(rng.normal(size=(B, O)), dtype)


@jax.jit
def products(weights, *batches):
  """y and dx of every (x, dy) for every weight."""

  def through(w, x, dy):
    y, pull = jax.vjp(lambda x: qmatmul.qmatmul(x, w), x)
    return y, *pull(dy)

  return [through(w, *pair) for w in weights for pair in batches]


quantized = jax.jit(lambda weights: [w.quantize() for w in weights])


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
  """(dw, dscale, doffset, tolerance of these two, how many weights are outside) of a learned Latent, in float64.

  A float32 z errs by three roundings of at most h + 1; ddense by the rounding of a sum of B products.
  """
  h = 2 ** (w.quantizer.bits - 1)
  stored = lambda part: np.asarray(part).astype(w.quantizer.scale_dtype).astype(np.float64)[:, None, :]
  v, s = by_group(w.w), stored(w.scale)
  beta = np.zeros_like(s) if w.offset is None else np.asarray(w.offset, np.float64)[:, None, :]
  if w.quantizer.zero == 'integer':
    # GPTQ's order: the weight is rounded, then moved by whole steps; the stored offset is near to these steps.
    steps = np.clip(np.round(beta / s), 1 - h, h)
    beta = stored((s * steps)[:, 0])
    unrounded, moved = v / s, steps
  else:
    beta = stored(beta[:, 0])
    unrounded, moved = (v - beta) / s, 0
  z = (v - beta) / s
  # No weight of the examples is so near to a border that float32 could see it on the other side.
  assert min(np.abs(z + h).min(), np.abs(z - h + 1).min()) > 3 * h * EPS
  assert np.abs(unrounded % 1 - 0.5)[np.abs(z) < h].min() > 1.5 * h * EPS
  below, above = z <= -h, z >= h - 1
  slope = np.round(unrounded) - moved - z
  slope[below], slope[above] = -h, h - 1
  d = by_group(np.asarray(x, np.float64).T @ np.asarray(dy, np.float64))
  dw = np.where(below | above, 0, d)
  g = 1 / math.sqrt(G * (h - 1))
  atol = g * (np.abs(d) * 3 * (h + 1) * EPS + 4 * math.sqrt(B + G) * EPS * np.abs(d).max() * h).sum(1)
  return dw.reshape(I, O), g * (d * slope).sum(1), g * (d - dw).sum(1), atol, int((below | above).sum())


def exported(weights):
  """Their QTensors, which give the same y and dx bit for bit; each side jitted alone, as training and inference are."""
  batches = batch(), batch(jnp.bfloat16)
  matrices = quantized(weights)
  equal(products(weights, *batches), products(matrices, *batches))
  return matrices


@pytest.mark.parametrize('bits', BITS)
def test_the_forward_pass_is_that_of_the_exported_matrix(bits):
  weights = [example(bits, learned, symmetric=symmetric) for learned in (False, True) for symmetric in (False, True)]
  for w, q in zip(weights, exported(weights), strict=True):
    assert isinstance(q, qtensor.QTensor) and q.bits == bits
    assert q.shape == w.shape == (I, O) and q.size == w.size == I * O


def test_it_is_for_other_choices_of_the_quantizer_too():
  half, clipped = exported(
    [
      example(8, learned=True, zero='integer', scale_dtype='float16'),
      example(3, learned=False, clip='percentile', percentile=90),
    ]
  )
  assert half.scale.dtype == half.offset.dtype == jnp.float16
  assert clipped.scale.dtype == clipped.offset.dtype == jnp.float32


def test_both_kinds_start_as_round_to_nearest():
  quantizers = (
    affine.Affine(4, G),
    affine.Affine(3, G, symmetric=True),
    affine.Affine(8, G, zero='integer'),
    affine.Affine(8, G, zero='integer', scale_dtype='float16'),
    affine.Affine(4, G, zero='integer', symmetric=True),
    affine.Affine(2, G, clip='percentile', percentile=98),
  )

  @functools.partial(jax.jit, static_argnums=1)
  def starts(w, learned):
    return [latent.latent(w, quantizer, learned) for quantizer in quantizers]

  w = jnp.stack([example(4, learned=False, key=key).w for key in range(2)])
  want = jax.jit(lambda w: [quantizer(w) for quantizer in quantizers])(w)
  for learned in (False, True):
    weights = starts(w, learned)
    equal(quantized(weights), want)
    for own, quantizer in zip(weights, quantizers, strict=True):
      assert own.shape == (2, I, O) and own.size == 2 * I * O
      assert (own.scale is not None) == learned and (own.offset is not None) == (learned and not quantizer.symmetric)


@pytest.mark.parametrize(
  'bits, choices',
  [
    *((bits, dict()) for bits in BITS),
    (4, dict(symmetric=True)),
    (2, dict(symmetric=True)),
    (3, dict(zero='integer')),
    (8, dict(zero='integer', scale_dtype='float16')),
  ],
)
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


@pytest.mark.parametrize('choices', [dict(), dict(symmetric=True), dict(clip='mse'), dict(symmetric=True, clip='mse')])
def test_minmax_passes_gradients_straight_through_but_where_it_clips(choices):
  w, (x, dy) = example(2, learned=False, **choices), batch()
  [q] = quantized([w])
  error = np.abs(by_group(w.w) - by_group(jax.jit(qtensor.dequantize)(q)))
  cut = (error > 0.51 * np.abs(np.asarray(q.scale))[:, None, :]).reshape(I, O)
  # Symmetric levels reach less far to one side: up to half a step is missing there, clipped or not.
  assert 0 < cut.sum() < I * O / 2 or choices == dict()
  through = np.where(cut, 0, 1) if 'clip' in choices else 1
  close(learn(w, x, dy).w, through * (np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)), B)


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
  given = batch(dtype)[0], example(4, learned)
  pull = jax.eval_shape(lambda *given: jax.vjp(qmatmul.qmatmul, *given)[1], *given)
  described = lambda tree: sorted((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(tree))
  assert described(pull) == described(given)


def test_under_vmap_scan_and_remat():
  x, dy = batch()
  each = [example(3, learned=True, key=key) for key in range(2)]
  stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

  def mapped(stack):
    return jax.vmap(lambda w: qmatmul.qmatmul(x, w))(stack)

  def scanned(stack):
    return jax.lax.scan(lambda c, w: (c, jax.checkpoint(qmatmul.qmatmul)(x, w)), 0, stack)[1]

  @functools.partial(jax.jit, static_argnums=0)
  def through(forward, stack):
    y, pull = jax.vjp(forward, stack)
    return y, *pull(jnp.stack([dy, 0 * dy]))

  for forward in (mapped, scanned):
    y, grads = through(forward, stack)
    close(y, jnp.stack([y for y, _ in products(each, (x, dy))]), I)
    jax.tree.map(lambda got, want: close(got[0], want, B + G), grads, learn(each[0], x, dy))
    assert not any(leaf[1].any() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize('symmetric, zero', [(False, 'real'), (True, 'real'), (False, 'integer')])
def test_a_scale_of_zero_is_a_constant_group_that_training_can_leave(symmetric, zero):
  w = example(3, learned=True, symmetric=symmetric, zero=zero)
  x, dy = batch()
  gone = w.replace(scale=w.scale.at[0].set(0.0).at[1].set(1e-40))
  dense = by_group(jax.jit(qtensor.dequantize)(*quantized([gone])))
  # An integer zero is a number of steps, and these are 0 too.
  shift = 0 if symmetric or zero == 'integer' else np.asarray(w.offset)[0]
  np.testing.assert_array_equal(dense[0], np.zeros((G, O)) + shift)
  assert np.isfinite(dense).all()
  got = learn(gone, x, dy)
  assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(got))
  # The limit from above: every weight is clipped.
  limit = learn(w.replace(scale=w.scale.at[0].set(1e-20)), x, dy)
  close(got.scale[0], limit.scale[0], G)
  assert float(jnp.abs(got.scale[0]).min()) > 0
  np.testing.assert_array_equal(got.w[:G], 0.0)


def test_a_constant_group_learns():
  constant = jax.jit(lambda w: latent.latent(w, affine.Affine(4, G), learned=True))(jnp.full((I, O), 0.3))
  x, dy = batch()
  assert float(jnp.abs(constant.scale).max()) == 0
  got = learn(constant, x, dy)
  close(got.w, np.asarray(x, np.float64).T @ np.asarray(dy, np.float64), B)


@pytest.mark.parametrize('bits', [8, 2])
def test_a_learned_integer_zero_stays_one_that_can_be_packed(bits):
  w = example(bits, learned=True, zero='integer')
  far = w.replace(offset=100 * w.offset)
  for own in (w, far):
    [q] = quantized([own])
    zeros = 2 ** (bits - 1) - np.asarray(q.offset, np.float64) / np.asarray(q.scale, np.float64)
    # The float32 product of scale and steps errs by half a unit in the last place.
    np.testing.assert_allclose(zeros, np.round(zeros), rtol=0, atol=2**bits * EPS)
    assert zeros.min() > -0.5 and zeros.max() < 2**bits - 0.5


@pytest.mark.parametrize('bits', [2, 3])
@pytest.mark.parametrize('learned', [False, True])
def test_training_halves_the_loss_of_round_to_nearest(bits, learned):
  """A regression on correlated inputs (8 directions and noise), where errors of weights can make up for each other.

  The float solution is known and has no loss.  Measured: 16 to 34 % of the loss of its rounding is left.
  """
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(128, 8)) @ rng.normal(size=(8, I)) + 0.3 * rng.normal(size=(128, I)), jnp.float32)
  solution = jnp.asarray(rng.normal(size=(I, O)), jnp.float32)
  quantizer = affine.Affine(bits, G)
  loss = lambda w: jnp.mean((qmatmul.qmatmul(x, w) - x @ solution) ** 2)
  optimizer = optax.adam(optax.linear_schedule(0.01, 0.0, 200))

  @jax.jit
  def losses():
    def step(carry, _):
      updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
      return (optax.apply_updates(carry[0], updates), state), None

    w = latent.latent(solution, quantizer, learned)
    trained = jax.lax.scan(step, (w, optimizer.init(w)), length=200)[0][0]
    return loss(quantizer(solution)), loss(trained.quantize())

  rounded, trained = losses()
  assert trained < 0.5 * rounded


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
