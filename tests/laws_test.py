"""The laws the package stands on, on random matrices; the same laws on real weights are in babyllama_test.py.

Tolerances: eps is float32's 2^-23.  A sum of n products errs by at most n * eps relative to the sum of their
magnitudes; random signs make it about sqrt(n) * eps, and two sums that are compared err each on its own.
"""

import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qalora_jax import adapters
from qalora_jax.adapters import lora
from qalora_jax.adapters import qalora
from qalora_jax.kernels import qmatmul
from qalora_jax.kernels import reference
from qalora_jax.kernels import xla
from qalora_jax.quant import affine
from qalora_jax.quant import qtensor

BITS = (8, 4, 3, 2)
EPS = float(jnp.finfo(jnp.float32).eps)
I, O, G, R, B = 256, 96, 32, 4, 16
L = I // G


def example(bits, pool='sum', dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(bits), 5)
  q = affine.quantize(0.02 * jax.random.normal(keys[0], (I, O)), bits=bits, group=G)
  adapter = qalora.QALoRA(
    a=jax.random.normal(keys[1], (L, R)), b=0.01 * jax.random.normal(keys[2], (R, O)), alpha=2.0, pool=pool
  )
  x = (jax.random.normal(keys[3], (B, I)) + 0.5).astype(dtype)
  return q, adapter, x, jax.random.normal(keys[4], (B, O))


def textbook(x, q, a, b, scaling):
  """QA-LoRA as the paper writes it: the quantized product, plus s * pool(x) @ A @ B (App. B, Eq. 4)."""
  return x @ qtensor.dequantize(q) + scaling * reference.pool(x, L) @ a @ b


def close(got, want, sums):
  """Equal within the rounding of sums of `sums` products, relative to the largest entry."""
  np.testing.assert_allclose(got, want, rtol=0, atol=4 * math.sqrt(sums) * EPS * float(jnp.abs(want).max()))


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('symmetric', [False, True])
def test_quantization_errs_by_half_a_step(bits, symmetric):
  w = jax.random.normal(jax.random.key(0), (2, I, O))
  q = affine.quantize(w, bits=bits, group=G, symmetric=symmetric)
  codes = qtensor.codes(q)
  half = 2 ** (bits - 1)
  assert codes.min() == -half and codes.max() == half - 1
  error = jnp.abs(qtensor.dequantize(q) - w).reshape(2, L, G, O).max(2) / jnp.abs(q.scale)
  # Asymmetric: half a step.  Symmetric: the code 2^(bits-1) does not exist, so one end may miss by a whole step.
  assert float(error.max()) <= (1.0 if symmetric else 0.5) + half * 4 * EPS


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('symmetric', [False, True])
def test_quantization_is_idempotent(bits, symmetric):
  w = jax.random.normal(jax.random.key(1), (I, O))
  once = affine.quantize(w, bits=bits, group=G, symmetric=symmetric)
  twice = affine.quantize(qtensor.dequantize(once), bits=bits, group=G, symmetric=symmetric)
  np.testing.assert_array_equal(qtensor.codes(twice), qtensor.codes(once))
  np.testing.assert_allclose(twice.scale, once.scale, rtol=4 * 2**bits * EPS)


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('inputs', [64, 70, 172, 1])
def test_packing_round_trips(bits, inputs):
  codes = jax.random.randint(jax.random.key(2), (3, inputs, 5), -(2 ** (bits - 1)), 2 ** (bits - 1))
  planes = qtensor.pack(codes, bits)
  assert all(plane.dtype == jnp.uint32 for plane in planes)
  assert sum(plane.shape[-2] for plane in planes) == sum(-(-inputs * width // 32) for width in qtensor.PLANES[bits])
  np.testing.assert_array_equal(qtensor.unpack(planes, bits, inputs), codes)


@pytest.mark.parametrize('bits', BITS)
def test_a_constant_group_is_exact(bits):
  w = jnp.full((I, O), 0.3).at[:G].set(0.0)
  np.testing.assert_array_equal(qtensor.dequantize(affine.quantize(w, bits=bits, group=G)), w)


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('pool', qalora.POOLS)
def test_merged_equals_adapted_equals_the_textbook(bits, pool):
  q, adapter, x, t = example(bits, pool)

  def through(forward):
    def loss(x, a, b):
      return jnp.sum(jnp.tanh(forward(x, adapter.replace(a=a, b=b))) * t)

    return forward(x, adapter), *jax.grad(loss, argnums=(0, 1, 2))(x, adapter.a, adapter.b)

  merged = through(lambda x, own: qmatmul.qmatmul(x, own.merge(q)))
  adapted = through(lambda x, own: own.apply(x, q))
  paper = through(lambda x, own: textbook(x, q, own.a, own.b, own.scaling(G)))
  for got in (merged, adapted):
    for g, w in zip(got, paper, strict=True):
      close(g, w, I + B)
  assert float(jnp.abs(adapter.apply(x, q) - qmatmul.qmatmul(x, q)).max()) > 0.01  # the adapter does something


@pytest.mark.parametrize('pool', qalora.POOLS)
def test_a_mean_is_a_sum_with_alpha_over_group(pool):
  q, adapter, x, _ = example(4, pool)
  other = adapter.replace(
    pool={'sum': 'mean', 'mean': 'sum'}[pool], alpha=adapter.alpha * (G if pool == 'sum' else 1 / G)
  )
  close(other.apply(x, q), adapter.apply(x, q), I)


@pytest.mark.parametrize('wrong', ['sign', 'pool', 'forgotten'])
def test_the_merge_law_can_fail(wrong):
  """The published ways to get the merge wrong (paper.md 1.3) are far outside the tolerance of the law."""
  q, adapter, x, _ = example(4)
  right = adapter.apply(x, q)
  factor = {'sign': -1.0, 'pool': 1.0 / G, 'forgotten': 0.0}[wrong]
  bad = adapter.replace(alpha=adapter.alpha * factor).apply(x, q)
  with pytest.raises(AssertionError):
    close(bad, right, I)


@pytest.mark.parametrize('bits', BITS)
def test_a_merge_leaves_codes_and_scales_alone(bits):
  q, adapter, *_ = example(bits)
  merged = adapter.merge(q)
  for before, after in zip((*q.planes, q.scale), (*merged.planes, merged.scale), strict=True):
    np.testing.assert_array_equal(after, before)
  assert qtensor.bits_per_weight(merged) == qtensor.bits_per_weight(q) == bits + 64 / G


@pytest.mark.parametrize('bits', BITS)
def test_bfloat16_keeps_small_offset_changes(bits):
  """A change of 1e-5 in the offsets reaches the sums of y and dx in bfloat16 as in float32, within 1 %."""
  q, _, x, t = example(bits, dtype=jnp.bfloat16)
  dy = t.astype(jnp.bfloat16)
  change = 1e-5 * jax.random.normal(jax.random.key(9), q.offset.shape)
  moved = q.replace(offset=q.offset + change)

  def error(got, want):
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))

  dense_change = jnp.repeat(change, G, axis=0)
  in_y, in_dx = x.astype(jnp.float32) @ dense_change, dy.astype(jnp.float32) @ dense_change.T
  assert error(xla.sums(x, moved) - xla.sums(x, q), in_y) < 0.01
  assert error(xla.transposed_sums(dy, moved) - xla.transposed_sums(dy, q), in_dx) < 0.01
  # One bfloat16 matrix loses it: the trap that the two separate products avoid.
  rounded = [qtensor.dequantize(w).astype(jnp.bfloat16).astype(jnp.float32) for w in (moved, q)]
  assert error(x.astype(jnp.float32) @ (rounded[0] - rounded[1]), in_y) > 0.5


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_nothing_dense_is_kept_for_the_backward_pass(bits, dtype):
  q, adapter, x, _ = example(bits, dtype=dtype)
  _, pull = jax.vjp(lambda x, own: own.apply(x, q), x, adapter)
  kept = [leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, 'shape')]
  # pool(x), the codes, scales and offsets, A and B (and s): never x [B, I], never a matrix [I, O].
  largest_plane = max(plane.size for plane in q.planes)
  assert max(leaf.size for leaf in kept if leaf.dtype != jnp.uint32) <= max(B * L, L * O, R * O)
  assert max(leaf.size for leaf in kept) <= max(largest_plane, L * O)
  assert not any(leaf.shape == x.shape for leaf in kept)


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_every_path_computes_the_reference(bits, dtype):
  q, _, x, t = example(bits, dtype=dtype)

  def through(impl):
    y, pull = jax.vjp(lambda x, offset: qmatmul.qmatmul(x, q.replace(offset=offset), impl), x, q.offset)
    return y, *pull(t.astype(dtype))

  for got, want in zip(through('xla'), through('reference'), strict=True):
    assert got.dtype == want.dtype
    if dtype == jnp.float32:
      close(got, want, I + O)
    else:
      # Two roundings to bfloat16 (the scaled codes, the result) of half a step each, on sums of random signs.
      size = float(jnp.abs(want.astype(jnp.float32)).max())
      np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=0, atol=2**-7 * size)


def test_qmatmul_under_jit_vmap_scan_and_remat():
  q, adapter, x, _ = example(4)
  want = adapter.apply(x, q)
  stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (q, adapter))
  mapped = jax.vmap(lambda w, own: own.apply(x, w))(*stack)
  _, scanned = jax.lax.scan(lambda c, w: (c, jax.checkpoint(lambda: w[1].apply(x, w[0]))()), 0, stack)
  for got in (jax.jit(adapter.apply)(x, q), mapped[0], mapped[1], scanned[0], scanned[1]):
    close(got, want, I)
  grads = jax.grad(lambda own: jnp.sum(jax.checkpoint(own.apply)(x, q) ** 2))(adapter)
  plain = jax.grad(lambda own: jnp.sum(own.apply(x, q) ** 2))(adapter)
  jax.tree.map(lambda g, w: close(g, w, I + B), grads, plain)


def test_lora_merges_into_dense():
  w = 0.02 * jax.random.normal(jax.random.key(0), (I, O))
  x = jax.random.normal(jax.random.key(1), (B, I))
  own = lora.LoRA(
    a=jax.random.normal(jax.random.key(2), (I, R)), b=0.01 * jax.random.normal(jax.random.key(3), (R, O)), alpha=2.0
  )
  close(x @ own.merge(w), own.apply(x, w), I + R)
  q = affine.quantize(w, bits=4, group=G)
  close(x @ own.merge(q), own.apply(x, q), I + R)


@pytest.mark.parametrize('kind', adapters.KINDS)
@pytest.mark.parametrize('rate', [0.0, 0.5])
def test_a_fresh_adapter_changes_nothing(kind, rate):
  q, _, x, _ = example(4)
  fresh = nn.unbox(adapters.Adapter(kind, R, 16.0, dropout=rate).init(jax.random.key(0), q, ('embed', 'mlp')))
  np.testing.assert_array_equal(fresh.apply(x, q, jax.random.key(1)), qmatmul.qmatmul(x, q))


@pytest.mark.parametrize('kind', adapters.KINDS)
def test_dropout_keeps_the_mean(kind):
  q, _, x, _ = example(4)
  fresh = nn.unbox(adapters.Adapter(kind, R, 16.0, dropout=0.25).init(jax.random.key(0), q, ('embed', 'mlp')))
  own = fresh.replace(b=jax.random.normal(jax.random.key(1), fresh.b.shape))
  draws = jax.vmap(lambda key: own.apply(x, q, key))(jax.random.split(jax.random.key(2), 4096))
  spread = draws.std(0) / math.sqrt(len(draws))
  z = (draws.mean(0) - own.apply(x, q)) / spread
  assert float(spread.min()) > 0
  assert float(jnp.sqrt(jnp.mean(z**2))) < 1.5  # the mean of many standard normals squared is 1


def test_a_group_that_does_not_divide_is_refused_with_those_that_do():
  with pytest.raises(ValueError, match=r'172 inputs do not divide into groups of 32; use base.group in \[2, 4, 43'):
    affine.quantize(jnp.zeros((172, 8)), bits=4, group=32)
  assert affine.quantize(jnp.zeros((172, 8)), bits=4, group=-1).groups == 1


def test_offsets_in_bfloat16_are_refused():
  q, *_ = example(4)
  with pytest.raises(TypeError, match='offset of a QTensor in bfloat16'):
    q.replace(offset=q.offset.astype(jnp.bfloat16))
  with pytest.raises(TypeError, match='in bfloat16'):
    jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), q)


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda q, x: affine.quantize(jnp.zeros((I, O)), bits=5, group=G), '5 bits'),
    (lambda q, x: qmatmul.qmatmul(x, q, impl='mosaic'), "no implementation 'mosaic'"),
    (lambda q, x: qmatmul.qmatmul(x[:, :-1], q), 'x has 255 inputs, the weight 256'),
    (lambda q, x: adapters.Adapter('qalora', 4, 1.0).init(jax.random.key(0), x, 'ab'), 'needs quantized weights'),
    (lambda q, x: adapters.Adapter('qalora', 4, 1.0, pool='max').init(jax.random.key(0), q, 'ab'), 'adapter.pool'),
  ],
)
def test_what_cannot_be_is_refused(call, message):
  q, _, x, _ = example(4)
  with pytest.raises(ValueError, match=message):
    call(q, x)
