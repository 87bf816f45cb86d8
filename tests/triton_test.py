"""The laws of the Triton kernel, interpreted; what it compiles to is in aot_gpu/triton_compile_test.py.

The interpreter fills a result with NaN before the kernel writes it, so an element that is never written shows.
"""

import dataclasses
import functools
import re

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qalora_jax.kernels import plan
from qalora_jax.kernels import product
from qalora_jax.kernels import qmatmul
from qalora_jax.kernels import triton
from qalora_jax.quant import double
from qalora_jax.quant import qtensor

H100 = product.Device('gpu', 'NVIDIA H100 80GB HBM3')
# A kernel is compiled here to run once or twice.

quick = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@functools.partial(quick, static_argnums=range(7), static_argnames=('seed', 'scale', 'leading'))
def matrix(form, inputs, outputs, group, seed=0, scale='float32', leading=()):
  """A random matrix; `form` is a number of bits of integer codes, 'nf4' or 'fp4'."""
  bits, levels = (form, 'integer') if isinstance(form, int) else (4, form)
  keys = jax.random.split(jax.random.key(seed), 3)
  half = 2 ** (bits - 1)
  codes = jax.random.randint(keys[0], (*leading, inputs, outputs), -half, half)
  groups = (*leading, inputs // group, outputs)
  scales = jax.random.uniform(keys[1], groups, minval=0.01, maxval=0.03).astype(scale)
  offsets = 0.02 * jax.random.normal(keys[2], groups).astype(scale)
  return qtensor.QTensor(qtensor.pack(codes, bits), scales, offsets, bits=bits, group=group, levels=levels)


@functools.partial(quick, static_argnums=range(4), static_argnames='seed')
def rows_of(rows, inputs, dtype, seed=1):
  return (jax.random.normal(jax.random.key(seed), (rows, inputs)) + 0.5).astype(dtype)


def sums(x, w, **changes):
  """The kernel's float32 sums."""
  return _sums(x, w, dataclasses.replace(triton.plan(product.Product.of(x, w), H100), **changes))


@functools.partial(quick, static_argnames='blocks')
def _sums(x, w, blocks):
  return triton.forward(x, w, blocks, out_dtype=jnp.float32, interpret=True)


@quick
def _parts(w):
  return qtensor.scaled(w), qtensor.offsets(w)


def check(got, x, w):
  """`got` is x @ dense(w) in float64, but for each scaled level rounded to x's dtype and float32 sums.

  A rounding errs evenly within u = eps / 2 of a level, the sum of them by 6 of its standard deviations at most:
  6 * u / sqrt(3) * sqrt(sum (x * level * scale)^2).  Float32 sums of I terms err by 4 * sqrt(I) * 2^-23 of the largest
  sum of magnitudes (laws_test.py).
  """
  scaled, offset = (np.asarray(part, np.float64) for part in _parts(w))
  offset = np.repeat(offset, w.group, axis=0)
  u = 0 if x.dtype == jnp.float32 else float(jnp.finfo(x.dtype).eps) / 2
  x = np.asarray(x, np.float64)
  magnitudes = np.abs(x) @ (np.abs(scaled) + np.abs(offset))
  allowed = 6 * u / 3**0.5 * np.sqrt(x**2 @ scaled**2) + 4 * x.shape[-1] ** 0.5 * 2.0**-23 * magnitudes.max()
  assert np.all(np.abs(np.asarray(got, np.float64) - x @ (scaled + offset)) <= allowed)


# Projections of LLaMA-7B (4096 x 4096, 4096 x 11008, 11008 x 4096) and 65B (8192 x 22016) over 32, MiniLM's 384 x 1536
# over 4, babyllama's, the 288 x 768 of a small model over 4 (outputs), and columns of one group, whole words or not.
CASES = [
  (4, 128, 128, 32, 'bfloat16', 16),
  (3, 128, 344, 64, 'bfloat16', 1),
  (2, 352, 128, 32, 'bfloat16', 7),
  (8, 256, 688, 128, 'bfloat16', 33),
  ('nf4', 96, 384, 32, 'bfloat16', 7),
  (4, 344, 128, 344, 'bfloat16', 17),
  (3, 288, 192, 288, 'float16', 16),
  (2, 128, 352, 64, 'float32', 1),
  (8, 70, 40, 70, 'float16', 7),
  ('fp4', 288, 96, 96, 'float32', 33),
  (3, 1056, 72, 32, 'float32', 7),
  (4, 1056, 72, 96, 'float16', 1),
]


@pytest.mark.parametrize('form, inputs, outputs, group, dtype, rows', CASES)
def test_it_computes_the_product(form, inputs, outputs, group, dtype, rows):
  w = matrix(form, inputs, outputs, group, scale='float16' if rows == 7 else 'float32')
  x = rows_of(rows, inputs, dtype)
  check(sums(x, w), x, w)


def test_without_offsets_in_any_number_of_parts():
  w = matrix(4, 1056, 40, 32).replace(offset=None)
  x = rows_of(2, 1056, 'bfloat16')
  for splits in (1, 2):
    check(sums(x, w, splits=splits), x, w)


@pytest.mark.parametrize('form, dtype', [(4, 'float32'), (3, 'bfloat16')])
def test_values_and_gradients_of_qmatmul(form, dtype):
  w = matrix(form, 64, 72, 32)
  x = rows_of(6, 64, dtype).reshape(2, 3, 64)
  dy = rows_of(6, 72, dtype, seed=2).reshape(2, 3, 72)

  def through(impl):
    y, pull = jax.vjp(lambda x, offset: qmatmul.qmatmul(x, w.replace(offset=offset), impl), x, w.offset)
    return y, *pull(dy)

  through = quick(through, static_argnums=0)
  for got, want in zip(through('triton_interpreted'), through('reference'), strict=True):
    assert got.dtype == want.dtype and got.shape == want.shape
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    # In bfloat16 two roundings of half a step: of the levels, and of the result.
    tolerance = 4 * 136**0.5 * 2.0**-23 if dtype == 'float32' else 2.0**-7
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def test_bfloat16_keeps_small_changes_of_offsets():
  w = matrix(4, 256, 96, 32)
  x = rows_of(16, 256, 'bfloat16')
  change = 1e-5 * jax.random.normal(jax.random.key(9), w.offset.shape)
  want = np.asarray(x, np.float32) @ np.repeat(np.asarray(change), 32, axis=0)
  got = sums(x, w.replace(offset=w.offset + change)) - sums(x, w)
  assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_reaches_its_row_and_no_other(bad):
  w = matrix(4, 288, 72, 96)
  x = rows_of(7, 288, 'bfloat16')
  got = sums(x.at[3, 287].set(bad).at[5, 0].set(bad), w)
  assert not np.isfinite(got[jnp.array([3, 5])]).any()
  others = jnp.array([0, 1, 2, 4, 6])
  check(got[others], x[others], w)


@pytest.mark.parametrize('form', [3, 'nf4'])
def test_a_layer_of_a_stack(form):
  stack = matrix(form, 96, 72, 32, leading=(3,))
  if form == 'nf4':
    stack = stack.replace(scale=double.compress(stack.scale))
  x = rows_of(5, 96, 'bfloat16')
  multiply = lambda w: qmatmul.qmatmul(x, w, 'triton_interpreted')
  layer = lambda carry, at: (carry, multiply(qtensor.in_stack(stack, at)))
  scanned = quick(lambda: jax.lax.scan(layer, 0, jnp.arange(3))[1])()
  alone = quick(multiply)
  for at in range(3):
    np.testing.assert_array_equal(scanned[at], alone(jax.tree.map(lambda leaf, at=at: leaf[at], stack)))


def assembled(text, *registers):
  """What a line of our PTX leaves in $0, for registers of pairs [N, 2] of 16-bit words."""
  word = lambda pairs: pairs[:, 0].astype(np.uint32) | pairs[:, 1].astype(np.uint32) << 16
  known = {f'${at}': word(pairs) for at, pairs in enumerate(registers, start=1)}
  value = lambda name: known[name] if name in known else np.full_like(known['$1'], int(name, 0))
  pairs = lambda words: np.stack([words & 0xFFFF, words >> 16], -1).astype(np.uint16)
  number = lambda name: pairs(value(name)).view(ml_dtypes.bfloat16).astype(np.float64)
  for line in text.strip('{} ').removeprefix('.reg .b32 moved, weight, one;').strip(' ;').split(';'):
    operation, result, *given = re.split(r',?\s+', line.strip())
    if operation == 'lop3.b32':
      a, b, c, table = map(value, given)
      bits = [(int(table[0]) >> index & 1, index) for index in range(8)]
      pick = lambda flag, x: x if flag else ~x
      terms = [pick(at & 4, a) & pick(at & 2, b) & pick(at & 1, c) for wanted, at in bits if wanted]
      known[result] = functools.reduce(np.bitwise_or, terms)
    elif operation == 'fma.rn.bf16x2':
      # Exact in float64, but for a product and a sum more than 2^37 apart; then rounded once.
      a, b, c = map(number, given)
      known[result] = word((a * b + c).astype(ml_dtypes.bfloat16).view(np.uint16))
    else:
      compute = {'mov.b32': lambda a: a, 'shr.b32': np.right_shift, 'shl.b32': np.left_shift}[operation]
      known[result] = compute(*map(value, given)).astype(np.uint32)
  return pairs(known['$0']).view(ml_dtypes.bfloat16)


@pytest.mark.parametrize('bits', [4, 3, 2])
def test_the_assembly_makes_the_weights_that_the_interpreted_kernel_makes(bits):
  """It cannot run here: what its few instructions mean is written down in `assembled`."""
  draw = np.random.default_rng(bits)
  codes = draw.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (32, 2 * 4096))
  scale = draw.uniform(0.001, 0.1, 2 * 4096).astype(np.float32)
  high = scale.astype(ml_dtypes.bfloat16)
  low = (scale - high.astype(np.float32)).astype(ml_dtypes.bfloat16)
  scales = [part.view(np.uint16).reshape(-1, 2) for part in (high, low)]
  planes = [np.asarray(plane) for plane in qtensor.pack(jnp.asarray(codes), bits)]
  for field in range(32):
    halves = [
      (plane[field * width // 32] >> (field * width % 32 // 16 * 16)).astype(np.uint16).reshape(-1, 2)
      for width, plane in zip(qtensor.PLANES[bits], planes, strict=True)
    ]
    got = assembled(triton.assembly(bits, field), *halves, *scales).reshape(-1).astype(np.float64)
    exact = codes[field] * scale.astype(np.float64)
    # Half a step of bfloat16, and what rounding the product with `low` leaves.
    assert np.all(np.abs(got - exact) <= (2.0**-8 + 2.0**-16) * np.abs(exact))
    once = exact.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    assert np.mean(got == once) > 0.99


@settings(deadline=None)
@given(
  rows=st.integers(1, 256),
  runs=st.integers(1, 700),
  outputs=st.integers(1, 30000),
  bits=st.sampled_from([8, 4, 3, 2]),
  dtype=st.sampled_from(['float32', 'bfloat16', 'float16']),
  kind=st.sampled_from(['NVIDIA H100 80GB HBM3', 'NVIDIA A100-SXM4-80GB', 'NVIDIA L4', 'NVIDIA B200']),
)
def test_a_plan_leaves_no_part_empty(rows, runs, outputs, bits, dtype, kind):
  wanted = product.Product(rows, 32 * runs, outputs, bits, 32, 'integer', dtype, True)
  blocks = triton.plan(wanted, product.Device('gpu', kind))
  steps = -(-runs // triton.RUNS)
  each = -(-steps // blocks.splits)
  assert (blocks.splits - 1) * each < steps <= blocks.splits * each
  assert hash(blocks) == hash(dataclasses.replace(blocks))


ASKED = product.Product(16, 4096, 4096, 4, 32, 'integer', 'bfloat16', True)


@pytest.mark.parametrize(
  'device, changes, reason',
  [
    (product.Device('cpu', 'cpu'), {}, "NVIDIA GPUs, not on 'cpu'"),
    (product.Device('tpu', 'TPU v5 lite'), {}, "not on 'TPU v5 lite'"),
    (product.Device('gpu', 'AMD Instinct MI300X'), {}, "not on 'AMD Instinct MI300X'"),
    (product.Device('gpu', 'NVIDIA GeForce RTX 2080 Ti'), {}, 'compute capability 8.0'),
    (H100, {'group': 16}, 'a group of 16 inputs is not whole runs of 32'),
  ],
)
def test_it_refuses_by_name(device, changes, reason):
  with pytest.raises(product.Refused, match=reason):
    plan.choose(dataclasses.replace(ASKED, **changes), device, 'triton')


EARLIER = [
  *('Tesla P4', 'Tesla P40', 'Tesla P100-PCIE-16GB', 'Tesla V100-SXM2-16GB', 'Quadro GV100', 'Tesla T4', 'NVIDIA T400'),
  *('NVIDIA T600 Laptop GPU', 'NVIDIA T1000 8GB', 'NVIDIA GeForce MX450', 'NVIDIA GeForce GTX 1660 SUPER'),
  *('NVIDIA TITAN RTX', 'Quadro RTX 6000', 'NVIDIA GeForce RTX 2060 SUPER'),
]
LATER = [
  *('NVIDIA A40', 'NVIDIA A100-PCIE-40GB', 'NVIDIA L4', 'NVIDIA RTX 2000 Ada Generation', 'NVIDIA GeForce MX570'),
  *(
    'NVIDIA GeForce RTX 2050',
    'NVIDIA RTX A4000',
    'NVIDIA GH200 480GB',
    'NVIDIA GB10',
    'NVIDIA RTX PRO 6000 Blackwell',
  ),
]


@pytest.mark.parametrize('kind', [*EARLIER, *LATER])
def test_chips_without_bfloat16_are_refused(kind):
  device = product.Device('gpu', kind)
  if kind in LATER:
    triton.plan(ASKED, device)
    return
  with pytest.raises(product.Refused, match=r'compute capability 8\.0'):
    triton.plan(ASKED, device)


def test_it_refuses_a_jax_without_it(monkeypatch):
  monkeypatch.setattr(triton, 'backend', None)
  with pytest.raises(product.Refused, match='no jax.experimental.pallas.triton'):
    triton.plan(ASKED, H100)


def test_it_is_worth_it_for_few_rows():
  blackwell = product.Device('gpu', 'NVIDIA B200')
  chosen = lambda **changes: plan.choose(dataclasses.replace(ASKED, **changes), blackwell).name
  assert chosen() == chosen(rows=128) == chosen(group=4096) == 'triton'
  assert chosen(rows=2048) == chosen(transposed=True) == chosen(group=16) == 'xla'
  assert plan.choose(ASKED, product.Device('cpu', 'cpu')).name == 'xla'
  # By name the gradient too is asked for, and is XLA's.
  assert plan.choose(dataclasses.replace(ASKED, transposed=True), blackwell, 'triton').blocks is None
