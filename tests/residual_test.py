"""Adapters that start from the quantization error: each is the best of its kind, none is worse than starting from zero.

The real matrix is a projection of a trained model's first layer; its inputs are those that the model gives it, one for
every token of the vocabulary.  The drawn one has inputs that are correlated and of very different size.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from qalora_jax import adapters
from qalora_jax.adapters import residual
from qalora_jax.quant import affine
from qalora_jax.quant import float4
from qalora_jax.quant import gptq
from qalora_jax.quant import qtensor
from qalora_jax.quant import refine

EPS = float(jnp.finfo(jnp.float32).eps)
I, O, G, R = 128, 64, 16, 3
L = I // G
# Only in the first a constant added to a group of weights changes nothing but its offset.
QUANTIZERS = {
  'affine': jax.jit(affine.Affine(2, G)),
  'integer zeros': jax.jit(affine.Affine(2, G, zero='integer')),
  'symmetric': jax.jit(affine.Affine(3, G, symmetric=True)),
  'nf4': jax.jit(float4.Float4(group=G)),
}


@pytest.fixture(scope='module')
def real(assets):
  """(w [I, O], the mean of x x^T over the vocabulary): the first keys of a trained LLaMA.  105 inputs x: rank < I."""
  tensors = safetensors.load_file(assets / 'models' / 'babyllama_tok105' / 'model.safetensors')
  embeddings = tensors['model.embed_tokens.weight']
  normal = embeddings / np.sqrt(np.mean(embeddings**2, axis=-1, keepdims=True) + 1e-5)
  x = normal * tensors['model.layers.0.input_layernorm.weight'][None]
  return jnp.asarray(tensors['model.layers.0.self_attn.k_proj.weight'].T), jnp.asarray(x.T @ x / len(x))


@pytest.fixture(scope='module')
def drawn():
  rng = np.random.default_rng(0)
  x = (rng.normal(size=(1024, 12)) @ rng.normal(size=(12, I)) + rng.normal(size=(1024, I))) * np.geomspace(0.1, 10.0, I)
  return jnp.asarray(0.02 * rng.normal(size=(I, O)), jnp.float32), jnp.asarray(x.T @ x / len(x), jnp.float32)


@pytest.fixture(params=['real', 'drawn'])
def matrix(request):
  return request.getfixturevalue(request.param)


def choice(kind, rank=R, **changes):
  return adapters.Adapter(kind, rank, 16.0, **changes)


def wide(x):
  return np.asarray(x, np.float64)


@jax.jit
def dense(w):
  return qtensor.dequantize(w) if isinstance(w, qtensor.QTensor) else w


codes = jax.jit(qtensor.codes)
offsets = jax.jit(qtensor.offsets)


def group_of(node):
  return 1 if isinstance(node, adapters.lora.LoRA) else G


def low_rank(node):
  """s A B [L, O] in float64."""
  s = node.scaling if group_of(node) == 1 else node.scaling(G)
  return s * wide(node.a) @ wide(node.b)


def update(node):
  return np.repeat(low_rank(node), group_of(node), axis=0)


def missing(w, frozen, node=None):
  """w - frozen - update in float64."""
  return wide(w) - wide(dense(frozen)) - (0.0 if node is None else update(node))


def energy(error, hessian):
  return np.sum(error * (hessian @ error))


def loss(w, frozen, node, hessian, damping, delta=None):
  """What 'calibrated' minimises, of s A B or of `delta` in its place, in float64."""
  group, hessian = group_of(node), wide(hessian)
  delta = low_rank(node) if delta is None else delta
  error = missing(w, frozen) - np.repeat(delta, group, axis=0)
  pooled = hessian.reshape(I // group, group, I // group, group).sum((1, 3))
  m = damping * np.diagonal(pooled).mean()
  return energy(error, hessian) + m * np.sum((error if group == 1 else delta) ** 2)


def least(w, frozen, node, hessian, damping):
  """The least `loss` at this rank, in float64: of M, and the singular values beyond R of K^1/2 M."""
  group, hessian, error = group_of(node), wide(hessian), missing(w, frozen)
  repeat = np.repeat(np.eye(I // group), group, axis=0)
  k = repeat.T @ hessian @ repeat
  k = k + damping * np.diagonal(k).mean() * np.eye(len(k))
  best = error if group == 1 else np.linalg.solve(k, repeat.T @ hessian @ error)
  values, vectors = np.linalg.eigh(k)
  sizes = np.linalg.svd((vectors * np.sqrt(values)) @ vectors.T @ best, compute_uv=False)
  return loss(w, frozen, node, hessian, damping, best) + np.sum(sizes[node.a.shape[-1] :] ** 2)


@pytest.mark.parametrize('quantizer', QUANTIZERS)
@pytest.mark.parametrize(
  'kind, adapter', [('loftq', 'qalora'), ('calibrated', 'qalora'), *((kind, 'lora') for kind in residual.KINDS)]
)
def test_starts_nearer_to_w_than_its_rounding(matrix, kind, adapter, quantizer):
  """In the norm that the kind minimises.  (QA-LoRA's pissa need not be: it leaves the rounding error as it falls.)"""
  w, hessian = matrix
  quantize = QUANTIZERS[quantizer]
  frozen, node = residual.initialize(kind, choice(adapter), w, quantize, hessian)
  norm = hessian if kind == 'calibrated' else jnp.eye(I)
  assert energy(missing(w, frozen, node), wide(norm)) < energy(missing(w, quantize(w)), wide(norm))
  assert np.linalg.matrix_rank(low_rank(node)) == node.a.shape[-1] == R


def test_pissa_for_qalora_takes_from_the_scales_what_has_no_offset(matrix):
  """NF4 scales by the largest magnitude of a group, which is less without the group's mean."""
  w, _ = matrix
  quantize = QUANTIZERS['nf4']
  frozen, node = residual.initialize('pissa', choice('qalora'), w, quantize)
  assert np.mean(frozen.scale) < np.mean(quantize(w).scale)
  assert np.linalg.norm(missing(w, frozen, node)) < np.linalg.norm(missing(w, quantize(w)))


def test_a_dense_base_keeps_what_pissa_leaves(matrix):
  w, _ = matrix
  frozen, node = residual.initialize('pissa', choice('lora'), w, None)
  # One rounding in the subtraction, one in the sum, each of a number no larger than the largest entry, doubled.
  np.testing.assert_allclose(node.merge(frozen), w, rtol=0, atol=4 * EPS * np.abs(w).max())
  sizes = np.linalg.svd(wide(w), compute_uv=False)
  np.testing.assert_allclose(np.sum(wide(frozen) ** 2), np.sum(sizes[R:] ** 2), rtol=I * EPS)
  np.testing.assert_allclose(np.linalg.svd(update(node), compute_uv=False)[:R], sizes[:R], rtol=I * EPS)


@pytest.mark.parametrize('shape, rank', [((I, O), R), ((O, I), 8 * R)])
def test_singular_values_over_six_decades(shape, rank):
  """The squares of those that the Gram matrix blurs are below eps of the first: that each of `rank` may cost."""
  sides = [np.linalg.qr(np.random.default_rng(n).normal(size=(n, O)))[0] for n in shape]
  sizes = np.geomspace(1.0, 1e-6, O)
  w = jnp.asarray((sides[0] * sizes) @ sides[1].T, jnp.float32)
  _, node = residual.initialize('pissa', choice('lora', rank), w, None)
  left = np.sum((wide(w) - update(node)) ** 2)
  # w itself was rounded: eps^2 of its squared norm, far below.
  assert np.sum(sizes[rank:] ** 2) - EPS <= left <= np.sum(sizes[rank:] ** 2) + rank * EPS


@pytest.mark.parametrize('damping', [1e-5, 0.01])
@pytest.mark.parametrize('quantizer', ['affine', 'nf4'])
@pytest.mark.parametrize('adapter', ['lora', 'qalora'])
def test_calibrated_is_the_best_there_is(drawn, adapter, quantizer, damping):
  """The gradient is 0 there, so the rounding of A and B costs only its square: nothing, in the digits compared."""
  w, hessian = drawn
  frozen, node = residual.initialize('calibrated', choice(adapter), w, QUANTIZERS[quantizer], hessian, damping=damping)
  found = loss(w, frozen, node, hessian, damping)
  assert found == pytest.approx(least(w, frozen, node, hessian, damping), rel=1e-5)
  rng = np.random.default_rng(0)
  for step in (1e-3, 1e-2, 0.1, 1.0):
    for _ in range(5):
      a, b = (x * (1 + step * rng.normal(size=x.shape)) for x in (wide(node.a), wide(node.b)))
      assert loss(w, frozen, node.replace(a=a, b=b), hessian, damping) > found
  others = [residual.initialize(kind, choice(adapter), w, QUANTIZERS[quantizer])[1] for kind in ('pissa', 'loftq')]
  others += [residual.initialize('loftq', choice(adapter), w, QUANTIZERS[quantizer], iterations=1)[1]]
  assert min(loss(w, frozen, other, hessian, damping) for other in others) > 1.01 * found


def test_calibrated_beats_the_others_where_they_chose_their_codes_too(matrix):
  w, hessian = matrix
  for adapter in ('lora', 'qalora'):
    left = {}
    for kind in residual.KINDS:
      frozen, node = residual.initialize(kind, choice(adapter), w, QUANTIZERS['nf4'], hessian)
      left[kind] = energy(missing(w, frozen, node), wide(hessian))
    assert left['calibrated'] < 0.95 * min(left['pissa'], left['loftq'])


@pytest.mark.parametrize('quantizer', ['affine', 'nf4'])
def test_calibrated_of_full_rank_is_the_refinement(matrix, quantizer):
  w, hessian = matrix
  frozen, node = residual.initialize('calibrated', choice('qalora', L + 5), w, QUANTIZERS[quantizer], hessian)
  want = offsets(jax.jit(refine.refine)(frozen, w, hessian, 0.01))
  # F^-T magnifies the rounding of the singular vectors by at most its condition, sqrt(1 + L / damping) < 30.
  size = np.abs(want - offsets(frozen)).max()
  np.testing.assert_allclose(node.merge(frozen).offset, want, rtol=0, atol=30 * L * EPS * size)


@pytest.mark.parametrize('adapter', ['lora', 'qalora'])
def test_it_takes_the_codes_of_any_quantizer(real, adapter):
  w, hessian = real
  calls = []

  def quantize(w):
    calls.append(w)
    return gptq.quantize(w, hessian, affine.Affine(2, G), gptq.GPTQ())

  frozen, node = residual.initialize('calibrated', choice(adapter), w, quantize, hessian)
  assert len(calls) == 1
  np.testing.assert_array_equal(codes(frozen), codes(quantize(w)))
  assert energy(missing(w, frozen, node), wide(hessian)) < energy(missing(w, frozen), wide(hessian))


@pytest.mark.parametrize(
  'adapter, quantizer, rises',
  [('lora', 'affine', True), ('lora', 'nf4', False), ('qalora', 'integer zeros', False), ('qalora', 'nf4', False)],
)
def test_loftq_is_the_published_loop_until_it_stops_paying(real, adapter, quantizer, rises):
  w, _ = real
  quantize, steps = QUANTIZERS[quantizer], 14
  L, G = (I, 1) if adapter == 'lora' else (globals()['L'], globals()['G'])
  published, delta = [], np.zeros((I, O))
  for _ in range(steps):
    error = missing(w, quantize(w - jnp.asarray(delta, jnp.float32)))
    u, sizes, vt = np.linalg.svd(error.reshape(L, G, O).mean(1), full_matrices=False)
    delta = np.repeat((u[:, :R] * sizes[:R]) @ vt[:R], G, axis=0)
    published.append(np.linalg.norm(error - delta))
  found = [
    np.linalg.norm(missing(w, *residual.initialize('loftq', choice(adapter), w, quantize, iterations=count)))
    for count in (1, 2, 3, steps)
  ]
  # A weight next to the middle between two levels may go either way, and weighs 1 / (I * O).
  np.testing.assert_allclose(found[:3], published[:3], rtol=1e-3)
  assert found == sorted(found, reverse=True) and found[-1] < found[0]
  assert (published[-1] > 1.005 * min(published)) == rises
  assert found[-1] <= 1.02 * min(published)


def test_where_offsets_follow_qalora_only_moves_them(real):
  """quantize(w - repeat(D)) has the codes of quantize(w), and offsets less by D."""
  w, _ = real
  quantize = QUANTIZERS['affine']
  rounded = quantize(w)
  size = np.abs(w).max()
  for kind in ('pissa', 'loftq'):
    frozen, node = residual.initialize(kind, choice('qalora'), w, quantize)
    np.testing.assert_array_equal(codes(frozen), codes(rounded))
    moved = node.merge(frozen).offset - rounded.offset
    if kind == 'pissa':
      # Codes of 2 bits: an offset is an end of the range less twice a third of it, rounded a few times.
      np.testing.assert_allclose(moved, jnp.zeros_like(moved), rtol=0, atol=16 * EPS * size)
      assert np.abs(low_rank(node)).max() > 0.1 * size
    else:
      # One step: what the published loop makes of five is five times the adapter on the same sum.
      np.testing.assert_array_equal(frozen.offset, rounded.offset)
      once = residual.initialize(kind, choice('qalora'), w, quantize, iterations=1)[1]
      np.testing.assert_array_equal(node.a, once.a)
      assert np.linalg.norm(moved) > 0.01 * np.linalg.norm(w) / np.sqrt(G)


@pytest.mark.parametrize('quantizer', ['affine', 'nf4'])
@pytest.mark.parametrize('kind', residual.KINDS)
def test_the_merge_stays_exact_and_pools_agree(drawn, kind, quantizer):
  w, hessian = drawn
  frozen, node = residual.initialize(kind, choice('qalora'), w, QUANTIZERS[quantizer], hessian)
  merged = node.merge(frozen)
  for before, after in zip((*frozen.planes, frozen.scale), (*merged.planes, merged.scale), strict=True):
    np.testing.assert_array_equal(after, before)
  want = wide(dense(frozen)) + update(node)
  # A product of R terms and two sums, of numbers no larger than these.
  size = np.abs(wide(w)).max() + np.abs(update(node)).max()
  np.testing.assert_allclose(dense(merged), want, rtol=0, atol=(R + 3) * EPS * size)

  other, mean = residual.initialize(kind, choice('qalora', pool='mean'), w, QUANTIZERS[quantizer], hessian)
  assert mean.pool == 'mean' and mean.alpha == node.alpha == 16.0
  np.testing.assert_array_equal(codes(other), codes(frozen))
  np.testing.assert_allclose(low_rank(mean), low_rank(node), rtol=0, atol=8 * EPS * np.abs(low_rank(node)).max())
  np.testing.assert_allclose(mean.a, 4.0 * node.a, rtol=0, atol=8 * EPS * np.abs(mean.a).max())  # sqrt(G)


@pytest.mark.parametrize('adapter', ['lora', 'qalora'])
def test_factors_are_balanced_whatever_the_unit_of_the_inputs(drawn, adapter):
  w, hessian = drawn
  start = lambda hessian: residual.initialize('calibrated', choice(adapter), w, QUANTIZERS['nf4'], hessian)[1]
  node, scaled = start(hessian), start(256.0 * hessian)
  grams = [wide(node.a).T @ wide(node.a), wide(node.b) @ wide(node.b).T]
  np.testing.assert_allclose(*grams, rtol=0, atol=I * EPS * np.abs(grams[0]).max())
  assert np.abs(grams[0] - np.diag(np.diagonal(grams[0]))).max() <= I * EPS * np.abs(grams[0]).max()
  # A power of 4: each rounding is the same.
  np.testing.assert_array_equal(scaled.a, node.a)


@pytest.mark.parametrize('adapter, rank', [('qalora', L + 5), ('lora', O + 5)])
def test_ranks_beyond_the_matrix_still_train(drawn, adapter, rank):
  w, hessian = drawn
  frozen, node = residual.initialize('calibrated', choice(adapter, rank), w, QUANTIZERS['nf4'], hessian)
  full = L if adapter == 'qalora' else O
  assert node.a.shape == (I if adapter == 'lora' else L, rank) and node.b.shape == (rank, O)
  fresh = choice(adapter, rank).init(jax.random.key(0), frozen, ('inputs', 'outputs'))
  np.testing.assert_array_equal(node.a[:, full:], fresh.a.value[:, full:])
  np.testing.assert_array_equal(node.b[full:], jnp.zeros((5, O)))
  x = jnp.asarray(np.random.default_rng(1).normal(size=(8, I)), jnp.float32)
  gradient = jax.grad(lambda b: jnp.sum(node.replace(b=b).apply(x, frozen) ** 2))(node.b)
  assert np.abs(gradient[full:]).max(1).min() > 1e-3 * np.abs(gradient).max()
  if adapter == 'lora':
    # All of the error; F^-T magnifies the rounding of its singular vectors by at most sqrt(1 + I / damping) < 120.
    np.testing.assert_allclose(node.merge(frozen), w, rtol=0, atol=120 * O * EPS * np.abs(w).max())


@pytest.mark.parametrize('adapter', ['lora', 'qalora'])
@pytest.mark.parametrize('kind', ['loftq', 'calibrated'])
def test_without_an_error_the_adapter_is_a_fresh_one(drawn, kind, adapter):
  constant, hessian = jnp.repeat(drawn[0][::G], G, axis=0), drawn[1]
  key = jax.random.key(7)
  frozen, node = residual.initialize(kind, choice(adapter), constant, QUANTIZERS['affine'], hessian, key=key)
  np.testing.assert_array_equal(dense(frozen), constant)
  fresh = choice(adapter).init(key, frozen, ('inputs', 'outputs'))
  np.testing.assert_array_equal(node.a, fresh.a.value)
  np.testing.assert_array_equal(node.b, fresh.b.value)


def test_alpha_and_dropout_are_the_adapters(drawn):
  w, _ = drawn
  for adapter in ('lora', 'qalora'):
    _, one = residual.initialize('pissa', choice(adapter), w, QUANTIZERS['affine'])
    _, other = residual.initialize('pissa', adapters.Adapter(adapter, R, 1.0, dropout=0.25), w, QUANTIZERS['affine'])
    assert (other.alpha, other.dropout) == (1.0, 0.25)
    np.testing.assert_allclose(low_rank(other), low_rank(one), rtol=0, atol=8 * EPS * np.abs(low_rank(one)).max())
    np.testing.assert_allclose(other.b, 4.0 * one.b, rtol=0, atol=8 * EPS * np.abs(other.b).max())


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(kind='olora'), r"initialisation 'olora'; it is one of \('pissa', 'loftq', 'calibrated'\)"),
    (dict(kind='calibrated', hessian=None), 'calibrated needs a Hessian'),
    (dict(kind='calibrated', hessian=jnp.eye(L)), r'Hessian of shape \(8, 8\) for 128 inputs'),
    (dict(kind='pissa', quantize=None, adapter=choice('qalora')), 'pissa for qalora needs a quantized base'),
    (dict(kind='loftq', quantize=None), 'loftq for lora needs a quantized base'),
    (dict(kind='loftq', iterations=0), 'iterations = 0'),
    (dict(adapter=choice('dora')), 'for adapters of kind lora and qalora, not dora'),
    (dict(adapter=choice('qalora', pool='max')), "adapter.pool = 'max'"),
    (dict(kind='calibrated', damping=0.0, hessian=jnp.ones((I, I))), 'use more damping than 0.0'),
    (dict(kind='calibrated', damping=0.0, hessian=jnp.ones((I, I)), adapter=choice('qalora')), 'use more damping'),
    (dict(w=jnp.full((I, O), jnp.nan)), 'not finite'),
  ],
)
def test_what_cannot_be_is_refused(drawn, changes, message):
  words = dict(kind='pissa', adapter=choice('lora'), w=drawn[0], quantize=QUANTIZERS['affine'], hessian=drawn[1])
  with pytest.raises(ValueError, match=message):
    residual.initialize(**{**words, **changes})
