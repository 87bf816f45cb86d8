"""NF4, FP4 and double quantization: equal to bitsandbytes to the last bit, and what follows from their equations.

Recorded values come from bitsandbytes 0.50.2 on a CPU (quantize_4bit with blocks of 64, dequantize_4bit), whose
matrices are [outputs, inputs].  The nested codes are those of its torch code (`backends/default`).  Inputs are whole
multiples of a power of two, so that sums of scales are exact in any order.  A digest is the start of the SHA-256 of
float32 bytes (of -0 as 0).
"""

import dataclasses
import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from qalora_jax.adapters import qalora
from qalora_jax.kernels import qmatmul
from qalora_jax.kernels import reference
from qalora_jax.quant import affine
from qalora_jax.quant import codebooks
from qalora_jax.quant import double
from qalora_jax.quant import float4
from qalora_jax.quant import qtensor

KINDS = ('nf4', 'fp4')
EPS = float(jnp.finfo(jnp.float32).eps)
TABLES = {
  'nf4': [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
  ],
  'fp4': [
    *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
    *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
    *(0.0, -0.0052083334885537624, -0.6666666865348816, -1.0),
    *(-0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
  ],
}
# Six scales; the second block of the second output is zero.
SMALL = {
  'nf4': dict(
    packed=(
      '00126bf4c2c3ea41feeee015b05e4e71eb7433459d04c1a1d51eb75557ad04c190b2fb63111237cf3c1a1d61fda889be039f'
      '4e4fa30eca99bdf27e2c2d50d9530125bf3c1b2e830edddef139f3d2d50d84211125ae19f6f91eb63211259e16e377777777'
      '777777777777777777777777777777777777777777777777777777770149e2a191d61fdbaabdf16d191a2e9410fff025bf4d'
      '2c3fb510feef138e19071c41ec9889be03a06f70c510eddde026d18081c51fdcbbce028e3c2d50d85222'
    ),
    dense='e5ebb00902de62f8',
    doubled='4ee36792fe62b671',
    first=[-0.2487848848104477, -0.2487848848104477, -0.173202246427536, -0.1306302398443222],
  ),
  'fp4': dict(
    packed=(
      'bbade43c5a5c37ca32222bae4be2f21a249fcdce65bf5a7a5ea241efe972bc4a6b4d349caaaac953c5a7a2ea35761642bd63'
      'f2f36db24766423d12d5d5eb26ecbade43c5a4d26db325523bc63c5d2fb51cdaaade72a63e36a24ecaaadf62ae2c00000000'
      '00000000000000000000000000000000000000000000000000000000bac62d7b6a5ea32477423ae5a6b7d26cab333bde43c5'
      'd5c34fab3233ac12a6b1b4fa24611642bc7be39b5eab22522bd95a1b1a5ea3244452bd62d5d5eb56fdaa'
    ),
    dense='c741950e1c34a9a4',
    doubled='35adb4f1ad134d28',
    first=[-0.2487848848104477, -0.2487848848104477, -0.16585659980773926, -0.12439244240522385],
  ),
}
SMALL_ABSMAX = [[0.25, 0.2421875, 0.25], [0.24609375, 0.0, 0.25]]
SMALL_SCALES = [0.2487848848104477, 0.24588266015052795, 0.2429804503917694, 0.0014511197805404663]
# Three hundred scales: the second block of 256 is not full.
WIDE = {
  'nf4': dict(packed='857c5199d5fb60ca', dense='c14bc260c591fe32', doubled='b559e8f8c1d35140'),
  'fp4': dict(packed='6a84d12b9f8d9cd8', dense='45c427c81d854a9a', doubled='dec6b1fd64772464'),
}
WIDE_CODES = (
  '0404031b1b1b31322f94a7a5cdcdd1e7e5e8fdfdf90404041b1b1b323030949da1d1d0d0e4e7e8fefcfd0403041b1b1a3231'
  '32a6a3a1cfcfd1e7e7e6f8fefe0404041b1b1a31312ba5a2a5d0d0d1dbe4e2fefcfe0404041b1b1b323130a2a6a6d1cfd1e8'
  'e5e7fefffe0404041b1b1b30303270709fd0d0cde7e7e7fdfefb0404031a1b1b313232a7a462d0d1cae6e2e1f8fbfc040404'
  '1a1b1b30313299a570d0ced1e7e7e4fef7f80404041b1b1a323131a3a0a7d1cfcfe4e8e7fdfefa0404041b1b1b323232a1a7'
  '8fced1cfe7e7e8f9fcff0404041b1b1b2e32309d70a6cececfe6e1e6fbf6fb0404041a1b1b323232a1a0a3cfd0d0e6e5e5fa'
  'f8fc0404041b1b1b313131a352a5d0cfd0e5e6e7fefdfd0404041b1b1b3132318f5ca5d1cecee8e7e7fcfffd0404041a1b1b'
)
# The codes of `edges`, for a scale that divides exactly and one that does not.
EDGES = [
  ('nf4', 1.0, 'f0123456789abcde123456789abcdef0123456789abcde777777777777777777'),
  ('nf4', 0.0137, 'f0124556789abcde123456788abccef0123456789abcde777777777777777777'),
  ('fp4', 1.0, '3badcfe908167452adcfe9001674523badcfe908167452808000000000000000'),
  ('fp4', 0.0137, '3bddffe008167452adcfe9008677553badcfe908167452808000000000000000'),
]


def small():
  i, o = np.arange(128)[:, None], np.arange(3)
  steps = (7 * i * i + 13 * i * o + 5 * o) % 257 - 128
  steps[64:, 1] = 0
  return (steps * 2.0**-9).astype(np.float32)


def wide():
  i, o = np.arange(192)[:, None], np.arange(100)
  steps = (31 * i + 17 * o) * (i + 3 * o + 1) % 1009 - 504
  return (steps * (1 + o % 7) * 2.0**-12).astype(np.float32)


def edges(kind, absmax):
  """A block of every midpoint between levels, its two neighbours in float32, and what lies next to zero."""
  table = np.sort(np.array(TABLES[kind], np.float32))
  midpoints = (table[1:] + table[:-1]) / np.float32(2) * np.float32(absmax)
  around = [midpoints, np.nextafter(midpoints, np.float32(2)), np.nextafter(midpoints, np.float32(-2))]
  block = np.concatenate([[absmax], *around, [1e-5, -1e-5, 1e-30, -1e-30]]).astype(np.float32)
  block[np.abs(block) < 1e-38] = 0  # jax on a CPU takes subnormal numbers for zero
  return np.pad(block, (0, 64 - len(block)))[:, None]


def packed(q):
  """The codes as bitsandbytes packs them: output by output, the earlier of two inputs in the upper half of a byte."""
  pairs = codes_of(q).T.reshape(-1, 2)
  return (pairs[:, 0] << 4 | pairs[:, 1]).astype(np.uint8).tobytes()


def digest(values):
  return hashlib.sha256((values + np.float32(0)).T.tobytes()).hexdigest()[:16]


def gaussian(*shape, seed=0):
  return (0.02 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def close(got, want, sums):
  """Equal within the rounding of sums of `sums` products of random signs, relative to the largest entry."""
  np.testing.assert_allclose(got, want, rtol=0, atol=4 * math.sqrt(sums) * EPS * float(np.abs(want).max()))


def same(got, want):
  """Equal trees, to the last bit."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def compiled(function, **options):
  """`function` compiled, its results numpy's, so that nothing else here is."""
  run = jax.jit(function, **options)
  return lambda *arguments: jax.tree.map(np.asarray, run(*arguments))


quantize = compiled(lambda quantizer, w: quantizer(w), static_argnums=0)
dequantize, codes_of, scales_of = map(compiled, (qtensor.dequantize, qtensor.codes, qtensor.scales))
compress, expand = map(compiled, (double.compress, double.expand))


def relative_error(quantizer, w):
  return np.linalg.norm(dequantize(quantize(quantizer, w)) - w) / np.linalg.norm(w)


@pytest.mark.parametrize('kind', KINDS)
def test_the_tables_are_those_of_bitsandbytes(kind):
  assert codebooks.CODEBOOKS[kind].dtype == np.float32
  assert codebooks.CODEBOOKS[kind].tolist() == TABLES[kind]


def test_the_dynamic_map_is_that_of_bitsandbytes():
  found = codebooks.DYNAMIC
  assert found.dtype == np.float32 and found.shape == (256,) and (np.diff(found) > 0).all()
  ends = {0: -0.992968738079071, 1: -0.9789062738418579, 126: -5.500000384017767e-07, 127: 0.0}
  ends |= {128: 5.500000384017767e-07, 129: 3.250000190746505e-06, 254: 0.992968738079071, 255: 1.0}
  assert {index: float(found[index]) for index in ends} == ends
  assert hashlib.sha256(found.tobytes()).hexdigest() == (
    'e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c'
  )


@pytest.mark.parametrize('kind', KINDS)
def test_a_small_matrix_as_bitsandbytes_has_it(kind):
  want = SMALL[kind]
  once = quantize(float4.Float4(kind=kind), small())
  assert packed(once).hex() == want['packed']
  assert once.scale.tolist() == SMALL_ABSMAX
  assert digest(dequantize(once)) == want['dense']
  twice = quantize(float4.Float4(kind=kind, double=True), small())
  assert packed(twice).hex() == want['packed']
  assert twice.scale.codes.tolist() == [[198, 196, 198], [197, 0, 198]]
  assert float(twice.scale.mean) == 0.2063802033662796 and twice.scale.absmax.tolist() == [0.2063802033662796]
  assert scales_of(twice).T.ravel()[:4].tolist() == SMALL_SCALES
  dense = dequantize(twice)
  assert dense[:4, 0].tolist() == want['first'] and digest(dense) == want['doubled']
  # The scale of the block of zeros is no longer 0; its weights still are.
  assert not dense[64:, 1].any()


@pytest.mark.parametrize('kind', KINDS)
def test_scales_that_do_not_fill_their_blocks_as_bitsandbytes_has_them(kind):
  want = WIDE[kind]
  once = quantize(float4.Float4(kind=kind), wide())
  assert hashlib.sha256(packed(once)).hexdigest()[:16] == want['packed']
  assert digest(once.scale) == '2a4e30c683323adc'
  assert digest(dequantize(once)) == want['dense']
  twice = quantize(float4.Float4(kind=kind, double=True), wide())
  assert twice.scale.codes.T.tobytes().hex() == WIDE_CODES
  assert float(twice.scale.mean) == 0.47889649868011475
  assert twice.scale.absmax.tolist() == [0.38243162631988525] * 2
  assert digest(scales_of(twice)) == '250cf602213b137b'
  assert digest(dequantize(twice)) == want['doubled']


@pytest.mark.parametrize('kind, absmax, codes', EDGES)
def test_ties_and_zeros_as_bitsandbytes_has_them(kind, absmax, codes):
  quantizer, block = float4.Float4(kind=kind), edges(kind, absmax)
  q = quantize(quantizer, block)
  assert packed(q).hex() == codes
  # As GPTQ calls it, a scale for every weight: XLA divides and multiplies by reciprocals as it likes.
  alone = compiled(quantizer.encode)(block[:, 0], np.full(64, absmax, np.float32), None)
  np.testing.assert_array_equal(alone, codes_of(q)[:, 0])


def test_the_same_bits_compiled_or_not():
  """Where a compiler may join a product and a sum, or divide by multiplying, it is kept from it."""
  scale = np.abs(gaussian(30, 70)) + np.float32(0.01)
  compiled = compress(scale)
  same(double.compress(scale), compiled)
  np.testing.assert_array_equal(double.expand(compiled), expand(compiled))


@pytest.mark.parametrize('kind', KINDS)
def test_every_code_is_the_nearest(kind):
  w = gaussian(256, 96)
  q = quantize(float4.Float4(kind=kind), w)
  normal = w.reshape(4, 64, 96).astype(np.float64) / q.scale[:, None]
  distances = np.abs(normal[..., None] - codebooks.CODEBOOKS[kind])
  taken = np.take_along_axis(distances, codes_of(q).reshape(4, 64, 96, 1), axis=-1)[..., 0]
  # Both roundings of w * (1 / scale) and that of a midpoint are of eps / 2 at most, and count in two distances.
  assert (taken <= distances.min(-1) + 3 * EPS).all()


@pytest.mark.parametrize('kind', KINDS)
def test_quantization_is_idempotent(kind):
  once = quantize(float4.Float4(kind=kind), gaussian(256, 96))
  dense = dequantize(once)
  twice = quantize(float4.Float4(kind=kind), dense)
  np.testing.assert_array_equal(dequantize(twice), dense)
  np.testing.assert_array_equal(twice.scale, once.scale)
  # FP4 has a second zero, which nothing rounds to from 0.
  codes = codes_of(once)
  np.testing.assert_array_equal(codes_of(twice), np.where((codes == 8) & (kind == 'fp4'), 0, codes))


def test_bits_per_weight():
  w = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
  bits = lambda **choices: qtensor.bits_per_weight(jax.eval_shape(float4.Float4(**choices), w))
  assert bits() == bits(kind='fp4') == 4.5
  assert bits(scale_dtype='float16') == bits(group=128) == 4.25
  assert bits(double=True) == 4 + 8 / 64 + 32 / (64 * 256) + 32 / 4096**2
  assert round(bits(double=True), 3) == 4.127


@pytest.mark.parametrize('choices', [dict(double=True), dict(kind='fp4', scale_dtype='float16')])
def test_a_stack_is_quantized_layer_by_layer(choices):
  quantizer = float4.Float4(**choices)
  w = gaussian(3, 192, 100)
  stacked = quantize(quantizer, w)
  assert stacked.shape == w.shape
  for layer in range(3):
    same(jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked), quantize(quantizer, w[layer]))
  same(compiled(jax.vmap(quantizer))(w), stacked)


def test_a_second_quantization_errs_by_half_a_gap_of_the_map():
  scale = np.abs(gaussian(30, 70)) + np.float32(0.01)
  doubled = compress(scale)
  flat = (scale - doubled.mean).T.ravel()
  blocks = np.pad(flat, (0, -len(flat) % 256)).reshape(-1, 256)
  np.testing.assert_array_equal(np.abs(blocks).max(-1), doubled.absmax)
  gap = np.diff(codebooks.DYNAMIC).max()
  assert gap == pytest.approx(0.9 / 64, rel=1e-5)
  largest = float(doubled.absmax.max())
  errors = np.abs(expand(doubled) - scale)
  # Half a gap, and the roundings of the difference, the product and the sum.
  assert gap / 4 * largest < errors.max() <= gap / 2 * largest + 2 * EPS * scale.max()


def test_doubled_scales_under_jit_vmap_and_scan():
  q = quantize(float4.Float4(double=True), gaussian(2, 192, 100))
  assert q.scale.shape == (2, 3, 100) and q.scale.dtype == jnp.float32
  x = gaussian(5, 192, seed=1)
  step = lambda carry, layer: (carry, (double.expand(layer.scale), qmatmul.qmatmul(x, layer)))
  _, (scanned, products) = jax.jit(lambda q: jax.lax.scan(step, 0, q))(q)
  mapped = jax.jit(jax.vmap(double.expand))(q.scale)
  for layer in range(2):
    own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], q)
    want = scales_of(own)
    np.testing.assert_array_equal(mapped[layer], want)
    np.testing.assert_array_equal(scanned[layer], want)
    dense = dequantize(own)
    np.testing.assert_array_equal(dequantize(own.replace(scale=want)), dense)
    close(products[layer], x @ dense, 192)


def test_errors_on_gaussian_weights():
  """At 4.5 bits per weight, relative to the norm of the weights.

  NF4 comes before symmetric integers, but FP4 after: its second level is 1/192, not the 1/12 that would be half of the
  third, so that it is almost a third zero.
  """
  w = gaussian(1024, 256)
  integer = affine.Affine(4, 64, symmetric=True)
  gptq = dataclasses.replace(integer, zero='integer')
  found = [relative_error(each, w) for each in (float4.Float4(), integer, gptq, float4.Float4(kind='fp4'))]
  assert found == sorted(found)
  # Measured 0.0920, 0.0951, 0.1029, 0.1221; 2^18 independent errors spread by less than 0.5 %.
  np.testing.assert_allclose(found, [0.0920, 0.0950, 0.1029, 0.1220], rtol=0.01)
  # Errors of 8-bit scales add little; a search for better ends makes integers the best of all here.
  assert found[0] < relative_error(float4.Float4(double=True), w) < 1.002 * found[0]
  assert relative_error(dataclasses.replace(integer, clip='mse'), w) < found[0]


def test_errors_on_real_weights(assets):
  tensors = safetensors.load_file(assets / 'models' / 'babyllama_tok105' / 'model.safetensors')
  matrices = [w.T.astype(np.float32) for name, w in tensors.items() if name.endswith('_proj.weight')]
  matrices = [w for w in matrices if w.shape[0] % 64 == 0]
  quantizers = [
    float4.Float4(),
    affine.Affine(4, 64, symmetric=True),
    affine.Affine(4, 64, symmetric=True, zero='integer'),
    float4.Float4(kind='fp4'),
  ]
  found = np.array([[relative_error(quantizer, w) for quantizer in quantizers] for w in matrices])
  assert len(found) == 30
  means = found.mean(0)
  assert (np.diff(means) > 0).all()
  np.testing.assert_allclose(means, [0.0917, 0.0934, 0.1011, 0.1210], rtol=0.01)
  # Of every single matrix too, but that integers whose largest entry is exact beat NF4 on some.
  assert (found[:, 0] < found[:, 2]).all() and (found[:, 2] < found[:, 3]).all()


@pytest.mark.parametrize('choices', [dict(kind='fp4'), dict(double=True)])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_products_are_those_of_the_reference(choices, dtype):
  q = quantize(float4.Float4(**choices), gaussian(256, 96))
  x, dy = (jnp.asarray(gaussian(16, features, seed=features), dtype) for features in (256, 96))

  @functools.partial(compiled, static_argnums=0)
  def through(impl):
    y, pull = jax.vjp(lambda x: qmatmul.qmatmul(x, q, impl), x)
    return y, *pull(dy)

  for got, want in zip(through('xla'), through('reference'), strict=True):
    assert got.dtype == want.dtype == dtype
    if dtype == jnp.float32:
      close(got, want, 256 + 96)
    else:
      # Two roundings to bfloat16 (the scaled levels, the result) of half a step each, on sums of random signs.
      got, want = got.astype(np.float32), want.astype(np.float32)
      np.testing.assert_allclose(got, want, rtol=0, atol=2**-7 * np.abs(want).max())


@pytest.mark.parametrize(
  'quantizer',
  [
    float4.Float4(),
    float4.Float4(kind='fp4', double=True),
    affine.Affine(3, 64, symmetric=True),
  ],
  ids=lambda quantizer: quantizer.levels,
)
def test_qalora_merges_into_codes_that_had_no_offset(quantizer):
  q = quantize(quantizer, gaussian(256, 96))
  assert q.offset is None
  adapter = qalora.QALoRA(a=50 * gaussian(4, 8, seed=1), b=gaussian(8, 96, seed=2) / 2, alpha=4.0)
  x, t = 50 * gaussian(16, 256, seed=3) + 0.5, 50 * gaussian(16, 96, seed=4)
  scaling = adapter.scaling(64)

  @functools.partial(compiled, static_argnums=0)
  def through(forward):
    def loss(x, a, b):
      y = forward(x, adapter.replace(a=a, b=b))
      return jnp.sum(jnp.tanh(y) * t), y

    gradients, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, adapter.a, adapter.b)
    return y, *gradients

  merged = through(lambda x, own: qmatmul.qmatmul(x, own.merge(q)))
  adapted = through(lambda x, own: own.apply(x, q))
  paper = through(lambda x, own: x @ qtensor.dequantize(q) + scaling * reference.pool(x, 4) @ own.a @ own.b)
  for got in (merged, adapted):
    for g, w in zip(got, paper, strict=True):
      close(g, w, 256 + 16)
  assert np.abs(paper[0] - x @ dequantize(q)).max() > 0.01  # the adapter does something
  stored = compiled(adapter.merge)(q)
  same((stored.planes, stored.scale), (q.planes, q.scale))
  assert stored.offset.dtype == jnp.float32 and stored.offset.shape == (4, 96)
  assert qtensor.bits_per_weight(stored) == qtensor.bits_per_weight(q) + 32 / 64


@pytest.mark.parametrize('kind', KINDS)
def test_scales_in_float16(kind):
  quantizer = float4.Float4(kind=kind, scale_dtype='float16')
  w = gaussian(64, 8)
  # Too small for float16, a scale becomes its smallest number, 2^-24, and too large its largest: nothing vanishes
  # though it could be kept, and nothing is infinite.
  w[:, 0], w[:, 1] = 1e-9, 1e6
  q = quantize(quantizer, w)
  assert q.scale.dtype == jnp.float16 and q.scale[0, :2].tolist() == [2.0**-24, 65504.0]
  np.testing.assert_array_equal(q.scale[0, 2:], np.abs(w).max(0)[2:].astype(np.float16))
  assert (np.abs(dequantize(q)) <= np.abs(w).max(0) * (1 + 2**-11)).all()


@pytest.mark.parametrize(
  'choices, message',
  [
    (dict(kind='nf3'), r"kind = 'nf3'; it is one of \('nf4', 'fp4'\)"),
    (dict(scale_dtype='bfloat16'), r"scale_dtype = 'bfloat16'; it is one of \('float32', 'float16'\)"),
    (dict(double=True, scale_dtype='float16'), "scale_dtype = 'float16' with double = True"),
  ],
)
def test_what_cannot_be_is_refused(choices, message):
  with pytest.raises(ValueError, match=message):
    float4.Float4(**choices)


def test_a_group_that_does_not_divide_is_refused_by_name():
  with pytest.raises(ValueError, match='down_proj: 172 inputs do not divide into groups of 64'):
    float4.Float4()(jnp.zeros((172, 8)), 'down_proj')
