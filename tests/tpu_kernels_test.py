"""The Mosaic kernels of `qmatmul`, interpreted on the CPU; that they compile for TPUs is another test's.

Errors are against float64 and held to a bound that follows from the arithmetic, element by element.  With u = 2^-24
and v = 2^-8, what rounding to float32 and to bfloat16 errs at most relatively, and |.| the same product of magnitudes:

* a float32 sum of n products errs by at most 2 n u |x| @ |w|;
* bfloat16 weights add v |x| @ |level * scale| (not where scales come after the sums, but for a codebook's levels);
* the offset's product in pieces of bfloat16 adds 2 v^2 pool(|x|) @ |offset|: what two pieces leave of a sum of x, and
  the product of the second pieces, which is left out;
* a result in bfloat16 adds v |y|.
"""

import dataclasses
import functools
import itertools

import hypothesis
from hypothesis import strategies as st
import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np
import pytest

from qalora_jax.kernels import plan
from qalora_jax.kernels import product as product_lib
from qalora_jax.kernels import qmatmul
from qalora_jax.kernels import tpu
from qalora_jax.quant import codebooks
from qalora_jax.quant import double
from qalora_jax.quant import qtensor

IMPL = 'tpu_interpreted'
V5E, V6E = (product_lib.Device('tpu', kind) for kind in ('TPU v5 lite', 'TPU v6 lite'))
FORMS = (4, 3, 'nf4', 8, 2, 'fp4')
# Real matrices, the first four scaled down: name, inputs, outputs.
SHAPES = (
  ('LLaMA-7B gate', 128, 344),
  ('LLaMA-13B gate', 320, 864),
  ('LLaMA-65B gate', 256, 688),
  ('MiniLM up', 128, 512),
  ('babyllama gate', 128, 352),
)
ROWS = (1, 7, 16, 47, 33)
U, V = 2.0**-24, 2.0**-8


_pack = jax.jit(qtensor.pack, static_argnums=1)


def matrix(inputs, outputs, form, group, seed=0) -> qtensor.QTensor:
  """Random codes, scales and offsets as those of weights of 0.02, that are not 0 on average."""
  bits, levels = (4, form) if isinstance(form, str) else (form, 'integer')
  group = inputs if group == -1 else group
  draw = np.random.default_rng(seed)
  codes = draw.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (inputs, outputs), np.int32)
  by_group = (inputs // group, outputs)
  scale = (0.05 / (2**bits if levels == 'integer' else 1) * draw.uniform(1, 2, by_group)).astype(np.float32)
  offset = 0.02 * draw.standard_normal(by_group, np.float32)
  leaves = _pack(codes, bits), jnp.asarray(scale), jnp.asarray(offset)
  return qtensor.QTensor(*leaves, bits=bits, group=group, levels=levels)


def factors(q, rows, dtype, seed=1):
  """x [rows, I] of mean 0.5 and dy [rows, O]."""
  draw = np.random.default_rng(seed)
  x, dy = (draw.standard_normal((rows, size), np.float32) for size in q.shape)
  return jnp.asarray(x + np.float32(0.5), dtype), jnp.asarray(dy, dtype)


_codes = jax.jit(qtensor.codes)


def in_float64(q):
  """level * scale and offset, each [I, O]."""
  codes = np.asarray(_codes(q))
  levels = codes if q.levels == 'integer' else codebooks.CODEBOOKS[q.levels][codes]
  scale, offset = (np.repeat(np.asarray(leaf, np.float64), q.group, axis=0) for leaf in (q.scale, q.offset))
  return levels.astype(np.float64) * scale, offset


def wide(x):
  return np.asarray(x, np.float64)


@functools.partial(jax.jit, static_argnames=('blocks', 'transposed', 'out_dtype'))
def interpreted(x, q, blocks, transposed=False, out_dtype=None):
  multiply = tpu.transpose if transposed else tpu.forward
  return multiply(x, q, blocks, out_dtype=out_dtype or x.dtype, interpret=True)


def right(got, x, q, dtype, scaling='before', transposed=False):
  """Whether x @ dense(q), or x @ dense(q).T, is `got` within the bound, every element written."""
  got, x, (scaled, offset) = wide(got), wide(x), in_float64(q)
  if transposed:
    scaled, offset = scaled.T, offset.T
  want = x @ (scaled + offset)
  weights, offsets = np.abs(x) @ np.abs(scaled), np.abs(x) @ np.abs(offset)
  allowed = 2 * (x.shape[1] + q.group) * U * (weights + offsets)
  if x_is_narrow(dtype):
    rounded = scaling == 'before' or q.levels != 'integer'
    allowed += V * weights * rounded + 2 * V**2 * offsets + V * np.abs(want)
  assert np.isfinite(got).all()
  worst = np.max(np.abs(got - want) / allowed)
  assert worst <= 1, f'{worst:.2f} of what is allowed'


def x_is_narrow(dtype):
  return jnp.dtype(dtype) == jnp.bfloat16


def cases():
  """Every form with every group; shapes, rows and dtypes go round at lengths that share no factor."""
  for at, (group, form) in enumerate(itertools.product((32, 64, 128, -1), FORMS)):
    fit = [shape for shape in SHAPES if shape[1] % (group if group > 0 else 1) == 0]
    name, inputs, outputs = fit[at % len(fit)]
    dtype = ('bfloat16', 'float32')[(at + at // len(FORMS)) % 2]
    yield pytest.param(inputs, outputs, form, group, dtype, ROWS[at % len(ROWS)], id=f'{name}-{form}-{group}-{dtype}')


@pytest.mark.parametrize(('inputs', 'outputs', 'form', 'group', 'dtype', 'rows'), list(cases()))
def test_values_and_gradients_are_the_reference_s(inputs, outputs, form, group, dtype, rows):
  q = matrix(inputs, outputs, form, group)
  x, dy = factors(q, rows, dtype)

  @jax.jit
  def through(x, dy, q):
    y, pull = jax.vjp(lambda x, offset: qmatmul.qmatmul(x, q.replace(offset=offset), IMPL), x, q.offset)
    return y, *pull(dy)

  y, dx, doffset = through(x, dy, q)
  assert y.dtype == dx.dtype == x.dtype and doffset.dtype == jnp.float32
  scaling = plan.choose(product_lib.Product.of(x, q), product_lib.device(), IMPL).blocks.scaling
  right(y, x, q, dtype, scaling)
  right(dx, dy, q, dtype, transposed=True)
  pooled = lambda x: wide(x).reshape(rows, q.groups, q.group).sum(-1).T
  allowed = 2 * (rows + q.group) * U * pooled(np.abs(wide(x))) @ np.abs(wide(dy))
  assert (np.abs(wide(doffset) - pooled(x) @ wide(dy)) <= allowed).all()


# Several steps along every axis of the grid, the last ones of rows and outputs cut short.
@pytest.mark.parametrize(
  ('rows', 'inputs', 'outputs', 'form', 'group', 'dtype', 'blocks'),
  [
    (39, 256, 344, 4, 32, 'bfloat16', tpu.Blocks(16, 128, 128)),
    (39, 768, 344, 3, 32, 'bfloat16', tpu.Blocks(16, 256, 256)),
    (47, 256, 352, 2, 64, 'float32', tpu.Blocks(32, 128, 256)),
    (7, 384, 288, 8, 128, 'bfloat16', tpu.Blocks(7, 128, 128)),
    (24, 512, 300, 4, -1, 'bfloat16', tpu.Blocks(16, 128, 128)),
    (39, 384, 200, 'nf4', 384, 'float32', tpu.Blocks(16, 128, 128)),
    (24, 256, 344, 'fp4', 64, 'bfloat16', tpu.Blocks(16, 128, 128)),
    (20, 512, 344, 4, 32, 'bfloat16', tpu.Blocks(16, 256, 128, 'after', depth=256)),
    (5, 768, 344, 4, 64, 'bfloat16', tpu.Blocks(8, 384, 256, 'after', depth=256)),
    (16, 512, 160, 2, 128, 'float32', tpu.Blocks(8, 256, 128, 'after', depth=128)),
    (16, 512, 160, 4, 512, 'bfloat16', tpu.Blocks(8, 256, 128, 'after', depth=128)),
    (9, 256, 160, 'nf4', 32, 'bfloat16', tpu.Blocks(16, 128, 128, 'after', depth=256)),
  ],
)
def test_blocks_smaller_than_the_product(rows, inputs, outputs, form, group, dtype, blocks):
  q = matrix(inputs, outputs, form, group)
  x, dy = factors(q, rows, dtype)
  right(interpreted(x, q, blocks), x, q, dtype, blocks.scaling)
  if blocks.scaling == 'before':
    right(interpreted(dy, q, blocks, transposed=True), dy, q, dtype, transposed=True)


@hypothesis.settings(max_examples=5, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.data())
def test_any_legal_shape(data):
  rows = data.draw(st.integers(1, 40), 'rows')
  group = data.draw(st.sampled_from([8, 16, 24, 32, 40, 96]), 'group')
  groups, outputs = data.draw(st.integers(1, 9), 'groups'), data.draw(st.integers(1, 300), 'outputs')
  form, dtype = data.draw(st.sampled_from(FORMS), 'form'), data.draw(st.sampled_from(['bfloat16', 'float32']), 'dtype')
  device, transposed = data.draw(st.sampled_from([V5E, V6E]), 'device'), data.draw(st.booleans(), 'transposed')
  q = matrix(group * groups, outputs, form, group)
  x = factors(q, rows, dtype)[transposed]
  blocks = tpu.plan(product_lib.Product.of(x, q, transposed), device)
  right(interpreted(x, q, blocks, transposed), x, q, dtype, blocks.scaling, transposed)


@pytest.mark.parametrize('form', [4, 3, 'nf4'])
@pytest.mark.parametrize('scaling', ['before', 'after'])
def test_bfloat16_keeps_small_offset_changes(form, scaling):
  """A change of 1e-5 in the offsets reaches y and dx in bfloat16, as in float32, within 1 %."""
  q = matrix(512, 96, form, 32)
  x, dy = factors(q, 16, 'bfloat16')
  change = 1e-5 * np.random.default_rng(9).standard_normal(q.offset.shape, np.float32)
  blocks = tpu.Blocks(16, 256, 96, scaling)

  def missed(x, transposed=False):
    """The part of its move that the product misses."""
    moved, before = (
      interpreted(x, w, blocks, transposed, jnp.float32) for w in (q.replace(offset=q.offset + change), q)
    )
    dense = np.repeat(wide(change), q.group, axis=0)
    want = wide(x) @ (dense.T if transposed else dense)
    return np.linalg.norm(wide(moved) - wide(before) - want) / np.linalg.norm(want)

  assert missed(x) < 0.01
  if scaling == 'before':
    assert missed(dy, transposed=True) < 0.01


@pytest.mark.parametrize(('dtype', 'scaling'), [('bfloat16', 'before'), ('bfloat16', 'after'), ('float32', 'before')])
def test_what_is_not_finite_reaches_its_rows_alone(dtype, scaling):
  q = matrix(256, 200, 4, 32)
  x, dy = (factor.at[3, 150].set(np.nan).at[17, 9].set(np.inf) for factor in factors(q, 20, dtype))
  blocks = tpu.Blocks(8, 128, 128, scaling)
  results = [interpreted(x, q, blocks)]
  if scaling == 'before':
    results.append(interpreted(dy, q, blocks, transposed=True))
  for result in results:
    finite = np.isfinite(wide(result))
    assert not finite[[3, 17]].any() and np.delete(finite, [3, 17], axis=0).all()


def test_what_a_kernel_leaves_unwritten_would_show():
  """Interpreted, outputs start as NaN, and so does what lies beyond the edge of an input."""

  def writes_half(x_ref, y_ref):
    y_ref[0:4, :] = x_ref[0:4, :]

  spec = pl.BlockSpec((8, 128), lambda i: (0, 0))
  call = pl.pallas_call(
    writes_half,
    out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
    grid=(1,),
    in_specs=[spec],
    out_specs=spec,
    interpret=True,
  )
  got = np.isnan(call(jnp.zeros((8, 100))))
  assert got[4:].all() and got[:, 100:].all() and not got[:4, :100].any()


def stacked(count=3, **form):
  return [matrix(128, 200, 4, 32, seed=seed) for seed in range(count)]


def stack_of(matrices):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *matrices)


@pytest.mark.parametrize('scale', ['float32', 'float16', 'double'])
def test_a_matrix_in_its_stack_is_that_matrix(scale):
  made = {'float32': lambda s: s, 'float16': lambda s: s.astype(jnp.float16), 'double': double.compress}[scale]
  matrices = [q.replace(scale=made(q.scale)) for q in stacked()]
  stack = stack_of(matrices)
  x, dy = factors(matrices[0], 5, 'bfloat16')

  @jax.jit
  def both(x, dy, q):
    y, pull = jax.vjp(lambda x: qmatmul.qmatmul(x, q, IMPL), x)
    return y, *pull(dy)

  for index in (0, 2):
    for got, want in zip(both(x, dy, qtensor.in_stack(stack, index)), both(x, dy, matrices[index]), strict=True):
      np.testing.assert_array_equal(got, want)


def test_a_scan_reads_the_stack_where_it_lies():
  """Nothing but the kernel touches the packed weights: the loop slices neither planes nor scales."""
  stack = stack_of(stacked())
  x, _ = factors(matrix(128, 200, 4, 32), 5, 'bfloat16')
  narrow = lambda y: y[:, :128]

  def run(x, stack, impl):
    def layer(x, at):
      return narrow(qmatmul.qmatmul(x, qtensor.in_stack(stack, at), impl)), None

    return jax.lax.scan(layer, x, jnp.arange(3))[0]

  want = x
  for at in range(3):
    want = narrow(qmatmul.qmatmul(want, jax.tree.map(lambda leaf, at=at: leaf[at], stack), IMPL))
  np.testing.assert_array_equal(jax.jit(run, static_argnums=2)(x, stack, IMPL), want)
  planned = plan.choose(product_lib.Product.of(x, qtensor.in_stack(stack, 0)), V5E)
  compiled = lambda x, w: planned.module.forward(x, w, planned.blocks, out_dtype=x.dtype)
  inner = jax.make_jaxpr(compiled)(x, qtensor.in_stack(stack, 0)).jaxpr
  takes = [eqn for eqn in inner.eqns if any(getattr(v, 'aval', None) in whole(stack) for v in eqn.invars)]
  assert [eqn.primitive.name for eqn in takes] == ['pallas_call']


def whole(stack):
  """The types of a stack's planes and scales."""
  return [jax.typeof(leaf) for leaf in (*stack.planes, stack.scale)]


def test_under_jit_remat_vmap_and_donation():
  matrices = stacked(2)
  q = matrices[0]
  x, dy = factors(q, 6, 'float32')
  y = qmatmul.qmatmul(x, q, IMPL)
  with plan.using(IMPL):
    call = lambda x, q: qmatmul.qmatmul(x, q)
    close = lambda got, want: np.testing.assert_allclose(
      got, want, rtol=0, atol=2 * 128 * U * float(jnp.abs(want).max())
    )
    close(jax.vmap(call, in_axes=(0, None))(x.reshape(2, 3, -1), q).reshape(y.shape), y)
    close(jax.vmap(call, in_axes=(None, 0))(x, stack_of(matrices))[0], y)
    both = jax.vmap(call)(jnp.stack([x, x]), stack_of(matrices))
    close(both[1], call(x, matrices[1]))

    def loss(x, offset, wrap):
      return jnp.vdot(wrap(call)(x, q.replace(offset=offset)), dy)

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    for kept, made in zip(grads(x, q.offset, lambda f: f), grads(x, q.offset, jax.checkpoint), strict=True):
      np.testing.assert_array_equal(kept, made)
    donated = jax.jit(lambda x, q: x + call(x, q)[:, :128], donate_argnums=0)
    close(donated(x + 0.0, q), x + y[:, :128])


def product(rows=16, inputs=4096, outputs=4096, bits=4, group=32, levels='integer', dtype='bfloat16', **more):
  return product_lib.Product(rows, inputs, outputs, bits, group, levels, dtype, offset=True, **more)


@pytest.mark.parametrize(
  ('refused', 'device', 'says'),
  [
    (product(), product_lib.Device('cpu', 'cpu'), "for TPUs and this is 'cpu'; take impl='xla'"),
    (product(dtype='float16'), V5E, 'TPUs do not multiply float16; use bfloat16 or float32'),
    (product(group=4), V5E, 'groups of 4 inputs do not fill whole rows .* multiple of 8'),
    (product(levels='nf4', bits=8), V5E, 'codebooks of 4 bits and nf4 has 8'),
    (product(bits=3), product_lib.Device('tpu', 'TPU v4'), 'TPU v4 unpacks no vectors of 2 bits; use 4 or 8'),
    (product(inputs=1000 * 1001, group=8), V5E, 'takes [0-9]+ MiB of the 96 MiB of VMEM'),
  ],
)
def test_refusals_say_why(refused, device, says):
  with pytest.raises(product_lib.Refused, match=says):
    tpu.plan(refused, device)


def test_only_a_tpu_is_asked():
  assert tpu.worthwhile(product(), V5E)
  assert not tpu.worthwhile(product(), product_lib.Device('gpu', 'NVIDIA H100 80GB HBM3'))
  assert plan.choose(product(), V5E).name == 'tpu'
  assert plan.choose(product(dtype='float16'), V5E).name == 'xla'


KINDS = ('TPU v4', 'TPU v5 lite', 'TPU v5', 'TPU v6 lite', 'TPU7x', 'TPU of tomorrow')


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
@hypothesis.given(
  rows=st.integers(1, 9000),
  groups=st.integers(1, 400),
  group=st.sampled_from([8, 16, 32, 64, 96, 128, 4096]),
  outputs=st.sampled_from([1, 288, 344, 352, 1536, 4096, 11008, 13824, 22016, 32000, 32001]),
  bits=st.sampled_from([8, 4, 3, 2]),
  dtype=st.sampled_from(['bfloat16', 'float32']),
  kind=st.sampled_from(KINDS),
  transposed=st.booleans(),
)
def test_plans_are_legal(rows, groups, group, outputs, bits, dtype, kind, transposed):
  inputs = groups * group
  whole = product(rows, inputs, outputs, bits, group, dtype=dtype, transposed=transposed)
  try:
    blocks = tpu.plan(whole, product_lib.Device('tpu', kind))
  except product_lib.Refused as refused:
    # Nothing divides the inputs and they are too many to be taken together, or an old chip.
    assert inputs > 2048 if 'VMEM' in str(refused) else bits < 4 and kind in ('TPU v4', 'TPU of tomorrow')
    return
  assert inputs % blocks.inputs == 0 and (blocks.inputs % group == 0 or group % blocks.inputs == 0)
  if blocks.inputs < inputs:
    assert blocks.inputs % 128 == 0
    assert all(blocks.inputs * width // 32 % 8 == 0 for width in qtensor.PLANES[bits])
  assert blocks.outputs == outputs or blocks.outputs % 128 == 0
  assert blocks.rows % 8 == 0 or blocks.rows == rows
  assert blocks.scaling == 'before' or not transposed
  assert hash(blocks) == hash(dataclasses.replace(blocks))
