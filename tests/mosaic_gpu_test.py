"""The kernel for Hopper, interpreted: what it computes, what it refuses, how it is cut.

Interpreted, fragments go through shared memory (the interpreter's wgmma reads both operands there) and are made by
the same programs, run on arrays; that a GPU's registers hold the same is the compiler's and `fragments_test`'s part.
"""

import functools

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qalora_jax.kernels import fragments
from qalora_jax.kernels import mosaic_gpu
from qalora_jax.kernels import plan
from qalora_jax.kernels import product
from qalora_jax.kernels import qmatmul
from qalora_jax.quant import double
from qalora_jax.quant import qtensor

H100 = product.Device('gpu', 'NVIDIA H100 80GB HBM3')
IMPL = 'mosaic_gpu_interpreted'
interpreted = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason='Pallas Mosaic GPU is used from jax 0.11 on')


@pytest.fixture(scope='module', autouse=True)
def _compiled_plainly():
  """An interpreted kernel runs once: compiling it well would take longer than running it."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture
def newer(monkeypatch):
  """A jax that it plans for."""
  monkeypatch.setattr(jax, '__version_info__', (0, 11, 2))


def matrix(bits, group, inputs, outputs, levels='integer', offset=True, dtype=jnp.float32, leading=(), seed=0):
  """A matrix of the sizes of a language model's weights; group -1 is a whole column."""
  rng = np.random.default_rng(seed)
  group = inputs if group == -1 else group
  lowest = -(2 ** (bits - 1)) if levels == 'integer' else 0
  codes = rng.integers(lowest, lowest + 2**bits, (*leading, inputs, outputs))
  scale = rng.uniform(0.5, 1.5, (*leading, inputs // group, outputs)) * 0.02 / 2 ** (bits - 1)
  shift = jnp.asarray(0.005 * rng.normal(size=scale.shape), dtype) if offset else None
  planes = qtensor.pack(jnp.asarray(codes, jnp.int32), bits)
  return qtensor.QTensor(planes, jnp.asarray(scale, dtype), shift, bits=bits, group=group, levels=levels)


def rows(count, inputs, seed=1):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(count, inputs)), jnp.bfloat16)


def close(y, x, w):
  """y is x @ dense(w) in float64, but for what bfloat16 rounds and float32 sums.

  Every level * scale is rounded to bfloat16, to within u = 2^-8 of it and 3 * 2^-15 before (`fragments.scaled`).  These
  errors are even within u, the sum of them below 6 of its standard deviations: 6 * u / sqrt(3) * sqrt(sum (x * level *
  scale)^2).  Float32 sums of I terms err by 4 * sqrt(I) * 2^-23 of the largest sum of magnitudes (laws_test.py).  A y
  in bfloat16 is rounded once more.
  """
  exact = lambda array: np.asarray(array, np.float64)
  x, scaled = exact(x), exact(qtensor.scaled(w))
  offset = np.zeros_like(scaled) if w.offset is None else np.repeat(exact(qtensor.offsets(w)), w.group, axis=0)
  wanted, u = x @ (scaled + offset), 2**-8 + 3 * 2**-15
  magnitudes = np.abs(x) @ (np.abs(scaled) + np.abs(offset))
  allowed = 6 * u / 3**0.5 * np.sqrt(x**2 @ scaled**2) + 4 * x.shape[-1] ** 0.5 * 2.0**-23 * magnitudes.max()
  if y.dtype == jnp.bfloat16:
    allowed += 2**-8 * (np.abs(wanted) + allowed)
  assert np.all(np.abs(exact(y) - wanted) <= allowed)


CASES = [
  # bits, levels, group, rows, inputs, offset, dtype
  (4, 'integer', 32, 1, 512, True, jnp.float32),
  (4, 'integer', 64, 16, 256, True, jnp.float16),
  (4, 'integer', -1, 7, 768, False, jnp.float32),
  (8, 'integer', 128, 7, 256, True, jnp.float32),
  (8, 'integer', 32, 1, 256, False, jnp.float16),
  (3, 'integer', 32, 16, 256, True, jnp.float32),
  (3, 'integer', 128, 7, 512, False, jnp.float32),
  (2, 'integer', 64, 7, 256, True, jnp.float32),
  (2, 'integer', -1, 16, 512, True, jnp.float16),
  (4, 'nf4', 64, 16, 256, False, jnp.float32),
  (4, 'fp4', 32, 1, 256, True, jnp.float32),
]


@interpreted
@pytest.mark.parametrize(('bits', 'levels', 'group', 'count', 'inputs', 'offset', 'dtype'), CASES)
def test_it_is_the_product(bits, levels, group, count, inputs, offset, dtype):
  w = matrix(bits, group, inputs, 64, levels, offset, dtype)
  x = rows(count, inputs)
  y = qmatmul.qmatmul(x, w, IMPL)
  assert y.dtype == jnp.bfloat16 and y.shape == (count, 64)
  close(y, x, w)


@interpreted
@pytest.mark.parametrize(
  'blocks',
  [
    # Two warpgroups; inputs in two splits, of which the second has fewer blocks than the first has, or than stages.
    mosaic_gpu.Blocks(rows=8, warpgroups=2, steps=3, splits=2, stages=3),
    # Two programs of rows.
    mosaic_gpu.Blocks(rows=8, warpgroups=1, steps=5, splits=1, stages=2),
    # Four warpgroups.
    mosaic_gpu.Blocks(rows=16, warpgroups=4, steps=3, splits=2, stages=2),
  ],
)
def test_however_it_is_cut(blocks):
  w, x = matrix(4, 64, 1280, 64 * max(2, blocks.warpgroups)), rows(13, 1280)
  close(mosaic_gpu.forward(x, w, blocks, out_dtype=jnp.float32, interpret=True), x, w)


@interpreted
def test_gradients():
  """Those of the reference: of x through the same dense matrix, of the offsets in float32."""
  w, x = matrix(4, 32, 256, 64), rows(3, 256).reshape(1, 3, 256)
  towards = jnp.asarray(np.random.default_rng(2).normal(size=(1, 3, 64)), jnp.bfloat16)

  def loss(x, offset, impl):
    return (qmatmul.qmatmul(x, w.replace(offset=offset), impl).astype(jnp.float32) * towards).sum()

  dx, doffset = jax.grad(loss, (0, 1))(x, w.offset, IMPL)
  wanted, wanted_offset = jax.grad(loss, (0, 1))(x, w.offset, 'reference')
  scale = float(jnp.abs(wanted.astype(jnp.float32)).max())
  # A weight and dx are rounded to bfloat16: 2^-8 each.
  np.testing.assert_allclose(*(np.asarray(g, np.float32) for g in (dx, wanted)), atol=2**-7 * scale)
  np.testing.assert_allclose(doffset, wanted_offset, rtol=1e-5, atol=1e-5)


@interpreted
def test_a_small_change_of_an_offset_reaches_y():
  """1e-5, an eighth of bfloat16's last place at a weight of 0.02, to within 1 %."""
  w, x = matrix(4, 64, 256, 64), rows(4, 256)
  blocks = mosaic_gpu.plan(product.Product.of(x, w), H100)
  run = functools.partial(mosaic_gpu.forward, x, blocks=blocks, out_dtype=jnp.float32, interpret=True)
  change = run(w.replace(offset=w.offset + 1e-5)) - run(w)
  wanted = 1e-5 * x.astype(jnp.float32).sum(-1)
  np.testing.assert_allclose(change, np.broadcast_to(wanted[:, None], change.shape), rtol=0.01, atol=1e-6)


@interpreted
@pytest.mark.filterwarnings('ignore:invalid value encountered:RuntimeWarning')  # numpy's, within the interpreter.
def test_what_is_not_finite_reaches_y():
  """In its own row, and in no other."""
  w, x = matrix(4, 64, 256, 64), rows(4, 256)
  x = x.at[1, 200].set(jnp.nan).at[2, 3].set(jnp.inf)
  y = qmatmul.qmatmul(x, w, IMPL)
  np.testing.assert_array_equal(np.isfinite(np.asarray(y, np.float32)).all(-1), [True, False, False, True])
  assert not np.isfinite(np.asarray(y, np.float32)[1:3]).any()


@interpreted
@pytest.mark.parametrize('doubled', [False, True])
def test_in_a_stack(doubled):
  """Matrix 1 of three, its index traced, by rows with leading axes."""
  stack, x = matrix(4, 128, 256, 64, leading=(3,)), rows(6, 256).reshape(2, 3, 256)
  if doubled:
    stack = stack.replace(scale=jax.vmap(double.compress)(stack.scale))
  y = jax.jit(lambda layer: qmatmul.qmatmul(x, qtensor.in_stack(stack, layer), IMPL))(1)
  assert y.shape == (2, 3, 64)
  close(y.reshape(6, 64), x.reshape(6, 256), jax.tree.map(lambda leaf: leaf[1], stack))


@interpreted
def test_shared_memory_is_used_in_order(monkeypatch):
  """No number is read in shared memory before it is there, nor written over before it is read."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  watched = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
  monkeypatch.setattr(plgpu, 'InterpretGPUParams', watched)
  w, x = matrix(2, 64, 1024, 128), rows(8, 1024)
  blocks = mosaic_gpu.Blocks(rows=8, warpgroups=2, steps=4, splits=1, stages=2)
  close(mosaic_gpu.forward(x, w, blocks, out_dtype=jnp.float32, interpret=True), x, w)


def product_of(**changes):
  usual = dict(rows=16, inputs=4096, outputs=4096, bits=4, group=64, levels='integer', dtype='bfloat16', offset=True)
  return product.Product(**(usual | changes))


@pytest.mark.parametrize(
  ('changes', 'reason'),
  [
    ({'dtype': 'float32'}, 'TF32'),
    ({'dtype': 'float16'}, 'multiplies bfloat16'),
    ({'group': 16}, 'groups of 16'),
    ({'group': 96, 'inputs': 4608}, 'groups of 96'),
    ({'inputs': 288, 'group': 32}, '288'),
    ({'outputs': 344}, '344'),
  ],
)
def test_what_it_refuses(newer, changes, reason):
  with pytest.raises(product.Refused, match=reason):
    mosaic_gpu.plan(product_of(**changes), H100)


@pytest.mark.parametrize(
  'kind', ['NVIDIA B200', 'NVIDIA GB200', 'NVIDIA A100-SXM4-80GB', 'NVIDIA GeForce RTX 4090', '']
)
def test_other_chips_are_refused(newer, kind):
  device = product.Device('gpu', kind)
  with pytest.raises(product.Refused, match='Hopper'):
    mosaic_gpu.plan(product_of(), device)
  assert not mosaic_gpu.worthwhile(product_of(), device)


def test_older_jax_is_refused(monkeypatch):
  monkeypatch.setattr(jax, '__version_info__', (0, 10, 2))
  with pytest.raises(product.Refused, match=r'needs jax >= 0\.11'):
    mosaic_gpu.plan(product_of(), H100)
  assert plan.choose(product_of(), H100).name != 'mosaic_gpu'


@pytest.mark.parametrize('kind', ['NVIDIA H100 80GB HBM3', 'NVIDIA H100 PCIe', 'NVIDIA H200', 'NVIDIA GH200 480GB'])
def test_it_is_first_on_hopper(newer, kind):
  device = product.Device('gpu', kind)
  assert plan.choose(product_of(), device).name == 'mosaic_gpu'
  assert not mosaic_gpu.worthwhile(product_of(rows=2048), device)
  assert not mosaic_gpu.worthwhile(product_of(transposed=True), device)


@settings(max_examples=200, deadline=None)
@given(
  st.integers(1, 4096),
  st.integers(1, 128),
  st.integers(1, 512),
  st.sampled_from([(8, 'integer'), (4, 'integer'), (3, 'integer'), (2, 'integer'), (4, 'nf4')]),
  st.sampled_from([32, 64, 128, 256, -1]),
  st.booleans(),
)
def test_blocks_are_whole(count, of_inputs, of_outputs, form, group, offset):
  """Every program has whole tiles, every split a block, and all stages fit into shared memory."""
  inputs, outputs, (bits, levels) = fragments.BLOCK * of_inputs, 64 * of_outputs, form
  group = inputs if group == -1 else group
  wanted = product.Product(count, inputs, outputs, bits, group, levels, 'bfloat16', offset)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, '__version_info__', (0, 11, 2))
    blocks = mosaic_gpu.plan(wanted, H100)
  assert blocks.rows % 8 == 0 and blocks.rows <= 128
  assert outputs % (64 * blocks.warpgroups) == 0
  assert (blocks.splits - 1) * blocks.steps < of_inputs <= blocks.splits * blocks.steps
  assert blocks.stages >= 2 and blocks.stages * sum(mosaic_gpu._stage(wanted, blocks.rows, blocks.warpgroups)) <= 232448


@pytest.mark.parametrize('levels', ['integer', 'nf4'])
@pytest.mark.parametrize('count', [1, 100, 129, 256, 1000])
def test_rows_are_not_padded_by_a_block(newer, count, levels):
  """Blocks of rows are equal but for whole tiles of eight, and as few as registers allow."""
  wanted = product_of(rows=count, levels=levels, inputs=8192, outputs=28672, offset=False)
  blocks = mosaic_gpu.plan(wanted, H100)
  assert -(-count // blocks.rows) * (blocks.rows - 8) < count
  assert blocks.warpgroups < 4 or blocks.rows <= (80 if levels == 'integer' else 64)


@pytest.mark.parametrize(
  ('kind', 'count'),
  [
    ('NVIDIA H100 80GB HBM3', 132),
    ('NVIDIA H100 PCIe', 114),
    ('NVIDIA H20', 78),
    ('NVIDIA H200', 132),
    ('NVIDIA H800', 132),
  ],
)
def test_multiprocessors(kind, count):
  assert mosaic_gpu._multiprocessors(product.Device('gpu', kind)) == count


@pytest.mark.parametrize(('bits', 'levels'), [(8, 'integer'), (4, 'integer'), (3, 'integer'), (4, 'nf4')])
def test_arranged(bits, levels):
  """x meets the weights of its inputs: the product of both in the fragments' order is the product."""
  w, x = matrix(bits, 64, 512, 64, levels), rows(5, 512)
  arranged = np.asarray(mosaic_gpu.arrange(x, bits, levels, True), np.float64).reshape(5, 2, -1)
  order = fragments.order(bits, levels)
  weights = np.asarray(qtensor.scaled(w), np.float64).reshape(2, fragments.BLOCK, 64)[:, order]
  offset = np.repeat(np.asarray(w.offset), 2, axis=0).T.reshape(64, 2, fragments.UNITS)
  parts = [fragments.offsets_of(jnp.asarray(offset[:, at])) for at in range(2)]
  weights = np.concatenate([weights, np.stack([np.asarray(part, np.float64).T for part in parts])], axis=1)
  y = np.einsum('mbi,bio->mo', arranged, weights)
  np.testing.assert_allclose(y, np.asarray(x, np.float64) @ np.asarray(qtensor.dequantize(w), np.float64), atol=1e-6)
