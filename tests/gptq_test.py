"""GPTQ against its published description in float64, and its laws on trained weights and what they really read."""

import dataclasses
import functools
import math

import activations
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qalora_jax.quant import affine
from qalora_jax.quant import codebooks
from qalora_jax.quant import errors
from qalora_jax.quant import float4
from qalora_jax.quant import gptq
from qalora_jax.quant import qtensor

EPS = float(jnp.finfo(jnp.float32).eps)
I, O = 96, 12
QUANTIZERS = (
  affine.Affine(8, 16),
  affine.Affine(4, 16, zero='integer'),
  affine.Affine(4, 32, symmetric=True),
  affine.Affine(3, -1),
  affine.Affine(3, 32, zero='integer', symmetric=True),
  affine.Affine(2, 32),
  affine.Affine(2, -1, zero='integer'),
  float4.Float4(group=16),
  float4.Float4(group=32, kind='fp4'),
)
# Blocks end with their group: those of a whole column are 40, 40 and 16 long.
FRESH = gptq.GPTQ(block=40)
STATIC = gptq.GPTQ(block=40, act_order=True, static_groups=True)


def example(dead=()):
  """Weights, and the Hessian of inputs that are correlated and of unequal size."""
  random = np.random.default_rng(0)
  x = random.normal(size=(1024, I)) @ (np.eye(I) + random.normal(size=(I, I)) / (2 * I**0.5))
  x *= random.uniform(0.6, 1.4, I)
  x[:, list(dead)] = 0
  return random.normal(size=(I, O)).astype(np.float32), activations.hessian(x)


def published_fit(group_w, quantizer):
  """Scale and real-valued zero-point, in codes from 0 on (paper.md 5.1; None for codes around 0), of [G, O]."""
  if isinstance(quantizer, float4.Float4):
    return np.abs(group_w).max(0), None
  low, high, steps = group_w.min(0), group_w.max(0), 2**quantizer.bits - 1
  if quantizer.zero == 'integer':
    low, high = np.minimum(low, 0), np.maximum(high, 0)
  if quantizer.symmetric and quantizer.zero == 'integer':
    return 2 * np.maximum(-low, high) / steps, None
  if quantizer.symmetric:
    return np.where(high > -low, high, low) / -(2 ** (quantizer.bits - 1)), None
  scale = (high - low) / steps
  return scale, -low / scale


@functools.partial(jax.jit, static_argnums=0)
def rounded(quantizer, w):
  return quantizer(w)


@jax.jit
def _parts(q):
  return qtensor.codes(q), qtensor.scales(q), qtensor.offsets(q)


def parts(q):
  codes, scale, offset = map(np.asarray, _parts(q))
  return codes, scale.astype(np.float64), offset.astype(np.float64)


def deviation(w, hessian, q, quantizer, options):
  """How far q is from the published algorithm in float64, in units of the weights: of the codes, of scales and offsets.

  One code that falls the other way changes all weights below it, so the codes of q are followed: at every input the
  distance to the level that q chose is compared with that to the nearest.  The same for scales and offsets.
  """
  g = q.group
  w, hessian = w.astype(np.float64), hessian.astype(np.float64)
  dead = np.diag(hessian) == 0
  hessian[dead, dead], w[dead] = 1, 0
  order = np.argsort(-np.diag(hessian), kind='stable') if options.act_order else np.arange(I)
  hessian += options.damping * np.diag(hessian).mean() * np.eye(I)
  upper = np.linalg.cholesky(np.linalg.inv(hessian[order][:, order])).T

  codes, scale, offset = parts(q)
  first = 2 ** (q.bits - 1) if q.levels == 'integer' else 0
  levels = np.arange(-first, first) if first else codebooks.CODEBOOKS[q.levels].astype(np.float64)

  def misfit(group_w, own):
    want, zero = published_fit(group_w, quantizer)
    off = np.abs(scale[own] - want).max() * np.abs(levels).max()
    if zero is None:
      return max(off, np.abs(offset[own]).max())
    stored = first - offset[own] / scale[own]
    beyond = np.abs(stored - zero) - (0.5 if quantizer.zero == 'integer' else 0)
    whole = np.abs(stored - np.round(stored)) if quantizer.zero == 'integer' else 0.0
    return max(off, (np.maximum(beyond, whole) * scale[own]).max())

  misfits = [misfit(w[l * g : (l + 1) * g], l) for l in range(I // g)] if options.static_groups else []
  now, excess = w[order], 0.0
  for i, row in enumerate(order):
    if i % options.block == 0:
      lagging = now.copy()
    if i % g == 0 and not options.static_groups:
      misfits.append(misfit((lagging if options.stale_groups else now)[i : i + g], i // g))
    table = levels[:, None] * scale[row // g] + offset[row // g]
    distance = np.abs(now[i] - table)
    chosen = codes[row] + first
    excess = max(excess, (distance[chosen, np.arange(O)] - distance.min(0)).max())
    now[i:] -= np.outer(upper[i, i:], (now[i] - table[chosen, np.arange(O)]) / upper[i, i])
  return excess, max(misfits)


def tolerance(w, hessian):
  """Triangular factors and their inverses err by sqrt(I) * eps times their condition number, the root of the Hessian's.

  The weights, sums with entries of U, err alike.  Four of those, since a distance is compared with another, in units
  of the largest weight, which the errors passed on may double.
  """
  alive = np.diag(hessian) > 0
  condition = np.linalg.cond(hessian[np.ix_(alive, alive)].astype(np.float64))
  return 8 * math.sqrt(I * condition) * EPS * np.abs(w).max()


def check(w, hessian, quantizer, options):
  q = gptq.quantize(jnp.asarray(w), jnp.asarray(hessian), quantizer, options)
  within = tolerance(w, hessian)
  for found in deviation(w, hessian, q, quantizer, options):
    assert found <= within
  # The least step between levels (NF4's is 0.08 of the scale) is many times that: a wrong code is no rounding error.
  assert 10 * within < np.abs(parts(q)[1]).min() * (1.0 if q.levels == 'integer' else 0.08)
  return q


@jax.jit
def lost(q, w, hessian):
  """The shares of the output and of the weights that q lost."""
  dense = qtensor.dequantize(q)
  return errors.relative_output_error(dense, w, hessian), errors.weight_error(dense, w)


@pytest.mark.parametrize('quantizer', QUANTIZERS, ids=str)
def test_every_code_is_the_published_one(quantizer):
  w, hessian = example()
  check(w, hessian, quantizer, FRESH)


def test_stale_groups_lack_the_errors_of_their_block():
  """Groups begin at 0, 32 and 64, blocks at 0, 40 and 80: within a block, and two in the first."""
  w, hessian = example()
  check(w, hessian, affine.Affine(4, 32, zero='integer'), dataclasses.replace(FRESH, stale_groups=True))


def test_static_groups_are_those_of_the_given_weights():
  w, hessian = example()
  quantizer = affine.Affine(3, 32)
  q = check(w, hessian, quantizer, STATIC)
  np.testing.assert_array_equal(q.scale, rounded(quantizer, w).scale)


def test_the_block_changes_only_rounding():
  """`deviation` knows no blocks where groups are not stale."""
  w, hessian = example()
  check(w, hessian, affine.Affine(3, -1), gptq.GPTQ(block=1))


@pytest.mark.parametrize('options', [FRESH, STATIC], ids=str)
def test_dead_inputs_are_left_out(options):
  dead = [3, 4, 50]
  w, hessian = example(dead)
  q = check(w, hessian, affine.Affine(4, 16, zero='integer'), options)
  codes, scale, offset = parts(q)
  zeros = np.round(-offset / scale)
  np.testing.assert_array_equal(codes[dead], np.repeat(zeros, 16, axis=0)[dead])


def test_the_check_against_the_published_algorithm_can_fail():
  w, hessian = example()
  quantizer = affine.Affine(4, 16, zero='integer')
  q = gptq.quantize(jnp.asarray(w), jnp.asarray(hessian), quantizer, FRESH)
  changes = (dict(damping=0.05), dict(stale_groups=True), dict(static_groups=True))
  for options in (*(dataclasses.replace(FRESH, **change) for change in changes), STATIC):
    assert max(deviation(w, hessian, q, quantizer, options)) > 10 * tolerance(w, hessian)
  # A field of four bits holds code c as c modulo 16, so that this is the neighbour of a code.
  moved = q.replace(
    planes=tuple(plane ^ (jnp.arange(plane.shape[0]) == 8)[:, None].astype(plane.dtype) for plane in q.planes)
  )
  for other in (moved, rounded(quantizer, w)):
    assert max(deviation(w, hessian, other, quantizer, FRESH)) > 10 * tolerance(w, hessian)


@pytest.mark.parametrize(
  'quantizer, options',
  [(affine.Affine(2, 32), FRESH), (float4.Float4(group=16), FRESH), (affine.Affine(3, 32), STATIC)],
  ids=str,
)
def test_uncorrelated_inputs_leave_rounding(quantizer, options):
  w = jnp.asarray(example()[0])
  got = gptq.quantize(w, 3 * jnp.eye(I), quantizer, options)
  jax.tree.map(np.testing.assert_array_equal, got, rounded(quantizer, w))


def test_the_unit_of_the_hessian_does_not_matter():
  """A power of 4 is a power of 2 in its factor, so that not even rounding changes."""
  w, hessian = map(jnp.asarray, example())
  one, other = (gptq.quantize(w, hessian * unit, affine.Affine(2, 32), FRESH) for unit in (1, 4))
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_doubled_scales_are_made_at_the_end():
  w, hessian = map(jnp.asarray, example())
  plain, doubled = (
    gptq.quantize(w, hessian, float4.Float4(group=16, double=double), FRESH) for double in (False, True)
  )
  jax.tree.map(np.testing.assert_array_equal, doubled.planes, plain.planes)
  # A step of the 8-bit map is at most 0.0157 of the largest difference from the mean; half of it is missed.
  largest = jnp.abs(plain.scale - plain.scale.mean()).max()
  np.testing.assert_allclose(qtensor.scales(doubled), plain.scale, rtol=0, atol=0.008 * float(largest))


def test_outputs_sharded_over_devices_get_the_same_codes():
  """Outputs do not see each other, but a product of other widths sums in another order.

  So scales fitted after such a product differ in their last bits, and codes at most where a weight is that near to the
  middle of two levels: one in some 100,000, none of the 6144 here.
  """
  _, hessian = example()
  w = np.random.default_rng(1).normal(size=(I, 64)).astype(np.float32)
  mesh = jax.make_mesh((8,), ('model',), axis_types=(jax.sharding.AxisType.Auto,))
  place = lambda x, *axes: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))
  quantizer = affine.Affine(3, 32)
  alone = gptq.quantize(jnp.asarray(w), jnp.asarray(hessian), quantizer, FRESH)
  split = gptq.quantize(place(w, None, 'model'), place(hessian), quantizer, FRESH)
  jax.tree.map(np.testing.assert_array_equal, split.planes, alone.planes)
  np.testing.assert_allclose(split.scale, alone.scale, rtol=0, atol=tolerance(w, hessian))
  for leaf in jax.tree.leaves(split):
    assert leaf.sharding.spec[-1] == 'model'


@pytest.mark.parametrize('matrix, bits', [('q_proj', 3), *(('down_proj', bits) for bits in (8, 4, 3, 2))])
def test_trained_weights_lose_less_output_and_more_weight(assets, matrix, bits):
  w, x = activations.layer(assets)[matrix]
  w, hessian = jnp.asarray(w), jnp.asarray(activations.hessian(x))
  quantizer = affine.Affine(bits, 32)
  in_output, in_weights = lost(gptq.quantize(w, hessian, quantizer, gptq.GPTQ()), w, hessian)
  plain_in_output, plain_in_weights = lost(rounded(quantizer, w), w, hessian)
  # Measured on the matrices of three layers: 1.9 to 25 times less.
  assert in_output < plain_in_output / 1.5
  assert in_weights > plain_in_weights


def test_smaller_groups_lose_less(assets):
  w, x = activations.layer(assets)['down_proj']
  w, hessian = jnp.asarray(w), jnp.asarray(activations.hessian(x))
  quantize = lambda group: gptq.quantize(w, hessian, affine.Affine(2, group), gptq.GPTQ())
  whole, wide, narrow = (lost(quantize(group), w, hessian)[0] for group in (-1, 32, 16))
  assert narrow < wide < whole


@pytest.mark.parametrize(
  'choice, message',
  [
    (dict(damping=-0.1), r'base\.gptq\.damping = -0\.1; it is at least 0'),
    (dict(damping=math.nan), r'base\.gptq\.damping = nan'),
    (dict(block=0), r'base\.gptq\.block = 0'),
    (dict(act_order=True), r'QA-LoRA could not be merged exactly; set base\.gptq\.static_groups = True'),
    (dict(static_groups=True, stale_groups=True), r'base\.gptq\.stale_groups and base\.gptq\.static_groups'),
  ],
)
def test_choices_that_cannot_be_are_refused(choice, message):
  with pytest.raises(ValueError, match=message):
    gptq.GPTQ(**choice)


def test_what_cannot_be_quantized_is_refused():
  w, hessian = map(jnp.asarray, example())
  quantize = lambda w, hessian, group=32, **choice: gptq.quantize(
    w, hessian, affine.Affine(2, group), gptq.GPTQ(block=40, **choice), name='layer 3/q_proj'
  )
  with pytest.raises(ValueError, match='layer 3/q_proj: 96 inputs do not divide into groups of 36'):
    quantize(w, hessian, 36)
  with pytest.raises(ValueError, match=r'layer 3/q_proj: w of shape \(96, 12\) with a Hessian of shape \(95, 95\)'):
    quantize(w, hessian[1:, 1:])
  with pytest.raises(ValueError, match='layer 3/q_proj: its Hessian is not finite'):
    quantize(w, hessian.at[2, 3].set(jnp.inf))
  # The mean of its eigenvalues is negative: that of the diagonal.
  bent = hessian - jnp.diag(1.5 * jnp.diagonal(hessian))
  with pytest.raises(ValueError, match=r'layer 3/q_proj: .* base\.gptq\.damping = 0\.01; use more, for example 0\.1'):
    quantize(w, bent)
  # One token: rank 1.
  with pytest.raises(ValueError, match=r'base\.gptq\.damping = 0\.0; use more, for example 0\.01'):
    quantize(w, jnp.ones((I, I)), damping=0.0)
  quantize(w, jnp.ones((I, I)))
