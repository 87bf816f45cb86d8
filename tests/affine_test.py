"""Affine quantization's choices: zero-points, clipping, storage, groups; on random, heavy-tailed and real weights.

h = 2^(bits-1) throughout.  Tolerances: eps is float32's 2^-23, and each rounding errs by half of it; decoding takes
four (scale, offset, product, sum), of numbers no larger than 2h scales.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from qalora_jax.quant import affine
from qalora_jax.quant import qtensor

BITS = (8, 4, 3, 2)
EPS = float(jnp.finfo(jnp.float32).eps)


def compiled(function, **options):
  """`function` compiled, its results numpy's, so that nothing else here is."""
  run = jax.jit(function, **options)
  return lambda *arguments: jax.tree.map(np.asarray, run(*arguments))


quantize = compiled(lambda quantizer, w: quantizer(w), static_argnums=0)
dequantize, codes_of = compiled(qtensor.dequantize), compiled(qtensor.codes)


def gaussian(*shape, seed=0):
  return (0.02 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def heavy(*shape, seed=0):
  """Student's t with two degrees of freedom: an infinite variance."""
  return (0.02 * np.random.default_rng(seed).standard_t(2, shape)).astype(np.float32)


def by_group(matrix, groups):
  return matrix.reshape(groups, -1, matrix.shape[-1])


def gptq(w, bits, symmetric, kept=1.0):
  """GPTQ's quantizer (paper.md 5.1) of groups w [L, G, O] in float32: scale, zero, codes in 0 .. 2^bits - 1, dense.

  kept: the fraction of the range that is kept.  Its symmetric low is -high even where no entry is negative.
  """
  w = np.asarray(w, np.float32)
  top = np.float32(2**bits - 1)
  low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
  if symmetric:
    high = np.maximum(-low, high)
    low = -high
  empty = (low == 0) & (high == 0)
  low, high = np.where(empty, np.float32(-1), low), np.where(empty, np.float32(1), high)
  low, high = np.float32(kept) * low, np.float32(kept) * high
  scale = (high - low) / top
  zero = np.full_like(scale, (top + 1) / 2) if symmetric else np.round(-low / scale)
  codes = np.clip(np.round(w / scale[:, None]) + zero[:, None], 0, top)
  return scale, zero, codes.astype(np.int32), scale[:, None] * (codes - zero[:, None])


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('symmetric', [False, True])
@pytest.mark.parametrize('draw', [gaussian, heavy])
def test_an_integer_zero_is_gptqs(bits, symmetric, draw):
  w = draw(256, 24)
  w[:32, 0] = 0
  w[:32, 1] = np.abs(w[:32, 1])
  w[:32, 2] = -np.abs(w[:32, 2])
  half = 2 ** (bits - 1)
  scale, zero, codes, dense = gptq(by_group(w, 8), bits, symmetric)
  q = quantize(affine.Affine(bits, 32, symmetric, zero='integer'), w)
  np.testing.assert_array_equal(q.scale, scale)
  np.testing.assert_array_equal(by_group(codes_of(q), 8), codes - half)
  assert (np.abs(by_group(dequantize(q), 8) - dense) <= 4 * EPS * 2 * half * scale[:, None]).all()
  assert not dequantize(q)[:32, 0].any()
  if symmetric:
    assert q.offset is None
  else:
    # A packed zero-point can hold the offset: it is a whole number of steps, and none is out of range.
    steps = half - q.offset / q.scale
    np.testing.assert_allclose(steps, zero, rtol=0, atol=EPS * 2 * half)
    assert zero[0, 1] == 0 and zero[0, 2] == 2 * half - 1


def test_an_integer_zero_rounds_ties_to_even_and_clamps():
  # The range is 15, so a step is 1 and the zero-point round(7.5) = 8: 7.5 would be code 16.
  w = np.array([-7.5, -2.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 3.5, 7.5], np.float32)[:, None]
  q = quantize(affine.Affine(4, -1, zero='integer'), w)
  assert float(q.scale[0, 0]) == 1 and float(q.offset[0, 0]) == 0
  assert codes_of(q)[:, 0].tolist() == [-8, -2, -2, 0, 0, 0, 2, 2, 4, 7]
  assert dequantize(q)[:, 0].tolist() == [-8, -2, -2, 0, 0, 0, 2, 2, 4, 7]


def test_the_same_bits_compiled_or_not():
  quantizer, w = affine.Affine(4, 32, zero='integer'), gaussian(256, 24)
  jax.tree.map(np.testing.assert_array_equal, quantizer(w), quantize(quantizer, w))


@pytest.mark.parametrize('bits', BITS)
def test_a_symmetric_group_without_negative_entries_keeps_its_range(bits):
  """GPTQ's code takes [0, max] for its range there, but keeps the middle zero-point: the upper half is lost."""
  w = np.abs(gaussian(32, 16)) + 1
  q = quantize(affine.Affine(bits, 32, symmetric=True, zero='integer'), w)
  # The largest entry is half a step beyond the last level.
  np.testing.assert_allclose(w.max(0) - dequantize(q).max(0), q.scale[0] / 2, rtol=8 * 2**bits * EPS)


@pytest.mark.parametrize('percentile', [99.9, 95.0, 60.0])
@pytest.mark.parametrize('draw', [gaussian, heavy])
def test_percentiles_are_the_ends(percentile, draw):
  w = draw(512, 16)
  q = quantize(affine.Affine(4, 128, clip='percentile', percentile=percentile), w)
  low, high = np.percentile(by_group(w, 4).astype(np.float64), [100 - percentile, percentile], axis=1)
  scale, offset = q.scale, q.offset
  # The place of a percentile among 128 entries is rounded too; neighbours are no further apart than this.
  extent = np.abs(w).max()
  np.testing.assert_allclose(offset - 8 * scale, low, rtol=0, atol=2 * 128 * EPS * extent)
  np.testing.assert_allclose(offset + 7 * scale, high, rtol=0, atol=2 * 128 * EPS * extent)
  codes = by_group(codes_of(q), 4)
  assert (codes[by_group(w, 4) < low[:, None]] == -8).all() and (codes[by_group(w, 4) > high[:, None]] == 7).all()


def test_the_hundredth_percentile_clips_nothing():
  w = gaussian(512, 16)
  clipped = quantize(affine.Affine(4, 128, clip='percentile', percentile=100.0), w)
  jax.tree.map(np.testing.assert_array_equal, clipped, quantize(affine.Affine(4, 128), w))


def powered(q, w, norm):
  """sum |dense - w|^norm of every group, in float64."""
  errors = np.abs(dequantize(q).astype(np.float64) - w)
  return (by_group(errors, q.groups) ** norm).sum(1)


@pytest.mark.parametrize(
  'norm, choices',
  [
    (2.0, dict()),
    (2.4, dict(symmetric=True)),
    (2.4, dict(zero='integer')),
    (2.0, dict(zero='integer', symmetric=True)),
  ],
)
def test_a_search_is_never_worse_than_no_clipping(norm, choices):
  plain = affine.Affine(3, 64, **choices)
  searching = dataclasses.replace(plain, clip='mse', norm=norm)
  for w in (gaussian(256, 48), heavy(256, 48)):
    without, searched = (powered(quantize(each, w), w, norm) for each in (plain, searching))
    # The errors compared were summed in float32: 64 powers, each of a few roundings.
    assert (searched <= without * (1 + 64 * EPS)).all()
    assert searched.sum() < 0.95 * without.sum()


@pytest.mark.parametrize('symmetric', [False, True])
def test_a_search_finds_the_best_of_gptqs(symmetric):
  w = heavy(256, 48)
  tried = [gptq(by_group(w, 4), 4, symmetric, 1 - percent / 100)[-1] for percent in range(80)]
  errors = np.array([(np.abs(dense.astype(np.float64) - by_group(w, 4)) ** 2.4).sum(1) for dense in tried])
  q = quantize(affine.Affine(4, 64, symmetric, zero='integer', clip='mse', norm=2.4), w)
  np.testing.assert_allclose(powered(q, w, 2.4), errors.min(0), rtol=64 * EPS)
  assert len(np.unique(errors.argmin(0))) > 5


def test_a_search_gives_up_an_outlier():
  """255 entries of 0.1 and one of 1: their two bits go to the many, and well over half of the range is cut."""
  w = np.full((256, 1), 0.1, np.float32)
  w[0] = 1.0
  tried = [gptq(w[None], 2, False, 1 - percent / 100) for percent in range(80)]
  errors = [(np.abs(dense[0].astype(np.float64) - w) ** 2.4).sum() for *_, dense in tried]
  best = int(np.argmin(errors))
  assert best > 60
  q = quantize(affine.Affine(2, -1, zero='integer', clip='mse', norm=2.4), w)
  np.testing.assert_allclose(q.scale, tried[best][0], rtol=2 * EPS)


def test_clipping_on_real_weights(assets):
  tensors = safetensors.load_file(assets / 'models' / 'babyllama_tok105' / 'model.safetensors')
  w = tensors['model.layers.0.mlp.gate_proj.weight'].T.astype(np.float32)
  plain = affine.Affine(2, 64)
  for norm in (2.0, 2.4):
    without = powered(quantize(plain, w), w, norm)
    searched = powered(quantize(dataclasses.replace(plain, clip='mse', norm=norm), w), w, norm)
    assert (searched <= without * (1 + 64 * EPS)).all() and searched.sum() < 0.9 * without.sum()


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize(
  'choices', [dict(), dict(symmetric=True), dict(zero='integer')], ids=lambda c: '-'.join(map(str, c)) or 'real'
)
def test_quantization_is_idempotent(bits, choices):
  quantizer = affine.Affine(bits, 32, **choices)
  once = quantize(quantizer, gaussian(256, 24))
  twice = quantize(quantizer, dequantize(once))
  np.testing.assert_array_equal(codes_of(twice), codes_of(once))
  # Four roundings, of numbers up to 2h scales, at each end of a range of 2h - 1.
  tolerance = 8 * 2**bits * EPS * float(np.abs(once.scale).max())
  np.testing.assert_allclose(dequantize(twice), dequantize(once), rtol=0, atol=tolerance)


@pytest.mark.parametrize('bits', BITS)
def test_gptqs_symmetric_levels_move_when_quantized_again(bits):
  """They end at (h - 1) and -h scales, while a range is that of (h - 1/2): each time it grows or shrinks."""
  quantizer = affine.Affine(bits, 32, symmetric=True, zero='integer')
  once = quantize(quantizer, gaussian(256, 24))
  twice = quantize(quantizer, dequantize(once))
  half = 2 ** (bits - 1)
  ratio = twice.scale / once.scale
  ends = np.array([half - 1, half]) / (half - 0.5)
  assert np.abs(ratio[..., None] - ends).min(-1).max() < 8 * EPS
  assert {int(index) for index in np.abs(ratio[..., None] - ends).argmin(-1).ravel()} == {0, 1}


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('symmetric', [False, True])
def test_codes_are_fitted_to_scales_and_offsets_in_float16(bits, symmetric):
  w = gaussian(256, 24)
  q = quantize(affine.Affine(bits, 32, symmetric, scale_dtype='float16'), w)
  assert q.scale.dtype == jnp.float16 and (symmetric or q.offset.dtype == jnp.float16)
  scale = q.scale.astype(np.float64)[:, None]
  offset = 0.0 if symmetric else q.offset.astype(np.float64)[:, None]
  half = 2 ** (bits - 1)
  levels = np.arange(-half, half)
  distances = np.abs(by_group(w, 8)[..., None] - (levels * scale[..., None] + np.asarray(offset)[..., None]))
  taken = np.take_along_axis(distances, by_group(codes_of(q), 8)[..., None] + half, axis=-1)[..., 0]
  # Halfway between two levels, the rounding of w - offset and of the quotient decide.
  assert (taken <= distances.min(-1) + EPS * (np.abs(w).max() + 2 * half * np.abs(scale))).all()
  stored = (16 if symmetric else 32) / 32
  assert qtensor.bits_per_weight(q) == bits + stored


def test_an_integer_zero_in_float16_is_still_whole():
  q = quantize(affine.Affine(8, 32, zero='integer', scale_dtype='float16'), gaussian(256, 24))
  steps = q.offset.astype(np.float64) / q.scale.astype(np.float64)
  # The offset, of up to 128 steps, is rounded to 11 bits.
  assert np.abs(steps - np.round(steps)).max() <= 128 * 2**-11
  assert len(np.unique(np.round(steps))) > 10


@pytest.mark.parametrize(
  'choices', [dict(), dict(symmetric=True), dict(zero='integer'), dict(zero='integer', symmetric=True)]
)
def test_nothing_is_lost_at_the_ends_of_float16(choices):
  quantizer = affine.Affine(4, -1, scale_dtype='float16', **choices)
  w = gaussian(64, 3)
  w *= np.array([1e-8, 6e4, 1e7], np.float32) / np.abs(w).max(0)
  dense = dequantize(quantize(quantizer, w))
  smallest = 2.0**-24
  # Too small: levels are multiples of the smallest number, so that an error is half of it, or as much for the offset.
  assert np.abs(dense - w)[:, 0].max() <= smallest
  # Not too large: half a step or, at a symmetric end, a whole one, and the roundings of scale and offset.
  assert np.abs(dense - w)[:, 1].max() <= 6e4 / 7.5 * (1 + 16 * 2**-11)
  # Too large: the largest numbers there are, never infinite.
  assert np.isfinite(dense).all() and np.abs(dense)[:, 2].max() >= 7 * 65504


def test_groups_up_to_a_whole_column():
  w = gaussian(2048, 16)
  errors = []
  for group in (16, 64, 256, 1024, -1):
    q = quantize(affine.Affine(4, group), w)
    size = 2048 if group == -1 else group
    assert q.group == size and q.groups == 2048 // size and q.shape == w.shape
    assert qtensor.bits_per_weight(q) == 4 + 64 / size
    errors.append(dequantize(q) - w)
    # Half a step, and the roundings of numbers up to eight steps.
    assert (np.abs(by_group(errors[-1], q.groups)).max(1) <= q.scale * (0.5 + 8 * 4 * EPS)).all()
  assert (np.diff([np.linalg.norm(error) for error in errors]) > 0).all()


@pytest.mark.parametrize('bits', BITS)
def test_symmetric_codes_have_no_offset(bits):
  q = quantize(affine.Affine(bits, 32, symmetric=True), gaussian(256, 24))
  assert q.offset is None and qtensor.bits_per_weight(q) == bits + 32 / 32
  assert qtensor.bits_per_weight(quantize(affine.Affine(bits, 32), gaussian(256, 24))) == bits + 64 / 32


@pytest.mark.parametrize('choices', [dict(zero='integer', clip='mse', norm=2.4), dict(clip='percentile')])
def test_a_stack_is_quantized_layer_by_layer(choices):
  quantizer = affine.Affine(4, 32, **choices)
  w = np.stack([gaussian(64, 8), heavy(64, 8)])
  stacked = quantize(quantizer, w)
  for layer in range(2):
    alone = quantize(quantizer, w[layer])
    jax.tree.map(lambda a, b, layer=layer: np.testing.assert_array_equal(a[layer], b), stacked, alone)


@pytest.mark.parametrize(
  'choices',
  [dict(), dict(symmetric=True), dict(zero='integer', clip='mse'), dict(clip='percentile', symmetric=True)],
)
def test_zeros_stay_zero(choices):
  q = quantize(affine.Affine(4, 32, **choices), np.zeros((64, 8), np.float32))
  assert not dequantize(q).any() and np.isfinite(q.scale).all()


@pytest.mark.parametrize(
  'choices, message',
  [
    (dict(bits=5), r'5 bits; a code has one of \[2, 3, 4, 8\] bits'),
    (dict(zero='float'), r"zero = 'float'; it is one of \('real', 'integer'\)"),
    (dict(clip='max'), r"clip = 'max'; it is one of \('none', 'percentile', 'mse'\)"),
    (dict(percentile=50.0), 'percentile = 50.0; it is above 50 and at most 100'),
    (dict(percentile=100.5), 'percentile = 100.5'),
    (dict(norm=0.0), 'norm = 0.0; it is above 0'),
    (dict(norm=float('nan')), 'norm = nan'),
    (dict(scale_dtype='bfloat16'), r"scale_dtype = 'bfloat16'; it is one of \('float32', 'float16'\)"),
  ],
)
def test_what_cannot_be_is_refused(choices, message):
  with pytest.raises(ValueError, match=message):
    affine.Affine(**{'bits': 4, 'group': 32, **choices})
