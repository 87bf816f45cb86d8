"""Who multiplies: the plan, its refusals, and what a model sees of them.  Products have test files of their own."""

import dataclasses

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import pytest

from qalora_jax import sharding
from qalora_jax.kernels import mesh as mesh_lib
from qalora_jax.kernels import plan
from qalora_jax.kernels import product
from qalora_jax.kernels import qmatmul
from qalora_jax.models import linear
from qalora_jax.quant import affine
from qalora_jax.quant import qtensor

I, O, G, B = 256, 128, 32, 8
V5E = product.Device('tpu', 'TPU v5 lite')
H100 = product.Device('gpu', 'NVIDIA H100 80GB HBM3')
B200 = product.Device('gpu', 'NVIDIA B200')
CPU = product.Device('cpu', 'cpu')


def example(bits=4, dtype=jnp.float32):
  q = affine.quantize(0.02 * jax.random.normal(jax.random.key(0), (I, O)), bits=bits, group=G)
  return q, jax.random.normal(jax.random.key(1), (B, I)).astype(dtype)


def products(rows, **changes):
  known = {'inputs': 4096, 'outputs': 11008, 'bits': 4, 'group': 32, 'levels': 'integer', 'dtype': 'bfloat16'}
  return product.Product(rows, **{**known, 'offset': True, **changes})


@pytest.mark.parametrize(
  'device, rows, names',
  [
    (CPU, 1, {'xla'}),
    (V5E, 1, {'tpu'}),
    (V5E, 4096, {'tpu'}),
    (H100, 16, {'mosaic_gpu', 'triton'}),
    (H100, 4096, {'xla'}),
    (B200, 16, {'triton', 'xla'}),
    (B200, 4096, {'xla'}),
    (product.Device('gpu', 'AMD Instinct MI300X'), 16, {'xla'}),
    (product.Device('metal', 'Apple M3'), 16, {'xla'}),
  ],
)
def test_every_device_has_a_plan(device, rows, names):
  for bits, levels in ((8, 'integer'), (4, 'integer'), (3, 'integer'), (2, 'integer'), (4, 'nf4')):
    made = plan.choose(products(rows, bits=bits, levels=levels), device)
    assert made.name in names and not made.interpret
    hash(made)


def test_what_a_kernel_cannot_do_is_left_to_xla():
  """Five inputs a group lie across the rows of a TPU's registers."""
  odd = products(16, inputs=4095, group=5)
  assert plan.choose(odd, V5E).name == 'xla'
  with pytest.raises(product.Refused, match=r"impl='tpu' cannot make x \[16, 4095\] .* groups of 5: "):
    plan.choose(odd, V5E, 'tpu')


@pytest.mark.parametrize('impl', ['tpu', 'mosaic_gpu', 'triton'])
def test_a_kernel_that_is_named_runs_or_says_why_not(impl):
  q, x = example(dtype=jnp.bfloat16)
  with pytest.raises(product.Refused, match=rf"impl='{impl}' cannot make x \[{B}, {I}\] bfloat16 @ w .*(cpu|jax >= )"):
    qmatmul.qmatmul(x, q, impl)
  with pytest.raises(product.Refused), plan.using(impl):
    jax.jit(qmatmul.qmatmul)(x, q)


def test_using_reaches_a_product_through_jit_and_leaves_no_trace():
  q, x = example()
  step = jax.jit(qmatmul.qmatmul)
  kernels = lambda: str(jax.make_jaxpr(step)(x, q)).count('pallas_call')
  assert kernels() == 0
  with plan.using('tpu_interpreted'):
    assert kernels() == 1
    through = step(x, q)
  assert kernels() == 0
  np.testing.assert_allclose(through, step(x, q), rtol=0, atol=I * 2**-24 * float(jnp.abs(through).max()))


def test_matrices_in_a_stack_are_those_of_its_slices():
  w = 0.02 * jax.random.normal(jax.random.key(0), (3, I, O))
  for bits in (4, 3):
    stack = affine.quantize(w, bits=bits, group=G)
    for layer in range(3):
      there = qtensor.in_stack(stack, jnp.int32(layer))
      own = jax.tree.map(lambda leaf, at=layer: leaf[at], stack)
      assert there.shape == own.shape == (I, O)
      for read in (qtensor.codes, qtensor.scales, qtensor.offsets, qtensor.dequantize):
        np.testing.assert_array_equal(read(there), read(own))


@pytest.mark.parametrize(
  'axes, rows, want',
  [
    (('embed', 'mlp'), 8, mesh_lib.Division(('data', 'fsdp'), None, 'tensor', (4, 1, 2))),
    (('mlp', 'embed'), 8, mesh_lib.Division(('data', 'fsdp'), 'tensor', None, (4, 2, 1))),
    # Rows that the mesh does not divide are held whole; so are inputs whose groups it would cut.
    (('embed', 'mlp'), 6, mesh_lib.Division((), None, 'tensor', (1, 1, 2))),
  ],
)
def test_how_a_product_is_divided(axes, rows, want):
  q, _ = example()
  x = jnp.zeros((rows, 4, I))
  found = []

  def look(x):
    found.append(mesh_lib.divide(x, q.replace(split=linear.split(axes))))
    return x

  jax.eval_shape(sharding.over(sharding.make_mesh(data=2, fsdp=2, tensor=2), look), x)
  assert found == [want]
  column = affine.quantize(jnp.ones((I, O)), bits=4, group=-1)
  found.clear()
  whole = lambda x: (found.append(mesh_lib.divide(x, column.replace(split=linear.split(('mlp', 'embed'))))), x)[1]
  jax.eval_shape(sharding.over(sharding.make_mesh(data=2, fsdp=2, tensor=2), whole), x)
  assert found[0].inputs is None


def test_without_a_division_arrays_on_several_devices_are_left_to_xla():
  q, x = example()
  if jax.device_count() == 1:
    pytest.skip('needs several devices; tests/conftest.py asks for them on CPU')
  assert mesh_lib.divide(x, q) is None
  look = lambda x: str(jax.make_jaxpr(qmatmul.qmatmul)(x, q))
  assert 'pallas_call' not in look(x)
  # A kernel that is asked for by name makes the whole product on every device.
  mesh = sharding.make_mesh(data=4, tensor=2)
  placed = jax.device_put(x, sharding.batch(mesh))
  got = jax.jit(sharding.over(mesh, lambda x: qmatmul.qmatmul(x, q, 'tpu_interpreted')))(placed)
  np.testing.assert_allclose(got, qmatmul.qmatmul(x, q), rtol=0, atol=I * 2**-24 * float(jnp.abs(got).max()))


def operands(traced, name):
  """The shapes and dtypes of what goes into the first `name` of a program, inner programs included."""
  for equation in traced.eqns:
    if equation.primitive.name == name:
      return [(value.aval.shape, str(value.aval.dtype)) for value in equation.invars]
    for inner in core.jaxprs_in_params(equation.params):
      if (found := operands(inner, name)) is not None:
        return found
  return None


def number(traced, name):
  """How many `name` a program has, inner programs included, but not those of a kernel."""
  count = 0
  for equation in traced.eqns:
    if equation.primitive.name == name:
      count += 1
    else:
      count += sum(number(inner, name) for inner in core.jaxprs_in_params(equation.params))
  return count


def test_one_layer_is_gathered_and_a_whole_stack_is_read_where_it_lies():
  """Weights that lie over the rows' axis are gathered packed, for the layer at hand; others go in as they are."""
  stack = affine.quantize(0.02 * jax.random.normal(jax.random.key(0), (3, I, O)), bits=4, group=G)
  x = jnp.zeros((8, I))

  def layer(x, stack):
    w = qtensor.in_stack(stack, jnp.int32(1)).replace(split=linear.split(('embed', 'mlp')))
    return qmatmul.qmatmul(x, w, 'tpu_interpreted')

  def into_shard_map(**sizes):
    traced = jax.make_jaxpr(sharding.over(sharding.make_mesh(**sizes), layer))(x, stack)
    return [shape for shape, dtype in operands(traced.jaxpr, 'shard_map') if dtype == 'uint32']

  assert into_shard_map(data=4, tensor=2) == [(3, I // 8, O)]
  assert into_shard_map(data=1, fsdp=4, tensor=2) == [(I // 8, O)]


def test_a_mapped_product_is_planned_for_all_its_rows(monkeypatch):
  q, x = example()
  planned, choose = [], plan.choose
  monkeypatch.setattr(plan, 'choose', lambda product, *rest: (planned.append(product.rows), choose(product, *rest))[1])
  mapped = jax.vmap(lambda x: qmatmul.qmatmul(x, q, 'tpu_interpreted'))(x)
  assert planned[-1] == B
  np.testing.assert_allclose(mapped, qmatmul.qmatmul(x, q, 'xla'), rtol=0, atol=I * 2**-24 * float(abs(mapped).max()))


@pytest.mark.parametrize('impl', ['xla', 'tpu_interpreted'])
def test_remat_by_name_makes_no_product_again(impl):
  """What the gradient of two products makes: both, and the transposes of both; again only what was not kept."""
  q, x = example()
  back = affine.quantize(0.02 * jax.random.normal(jax.random.key(2), (O, I)), bits=4, group=G)

  def made(policy):
    both = lambda x: jnp.sum(jnp.tanh(qmatmul.qmatmul(jnp.tanh(qmatmul.qmatmul(x, q, impl)), back, impl)))
    traced = jax.make_jaxpr(jax.value_and_grad(jax.checkpoint(both, policy=policy)))(x)
    return number(traced.jaxpr, 'dot_general' if impl == 'xla' else 'pallas_call')

  kept = made(jax.checkpoint_policies.save_only_these_names(qmatmul.PRODUCT))
  again = made(jax.checkpoint_policies.nothing_saveable)
  assert kept < again


def test_a_shard_map_around_a_product_gets_the_gradient_of_what_its_devices_share():
  q, x = example()
  if jax.device_count() < 4:
    pytest.skip('needs four devices; tests/conftest.py asks for them on CPU')
  mesh, rows = sharding.make_mesh(devices=jax.devices()[:4]), jax.sharding.PartitionSpec('data')
  whole = jax.sharding.PartitionSpec()
  squares = lambda x, offset: jnp.sum(qmatmul.qmatmul(x, q.replace(offset=offset), 'xla') ** 2)
  summed = lambda x, offset: jax.lax.psum(squares(x, offset), 'data')
  apart = jax.shard_map(summed, mesh=mesh, in_specs=(rows, whole), out_specs=whole)
  got, want = (jax.jit(jax.grad(f, argnums=(0, 1)))(x, q.offset) for f in (apart, squares))
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=0, atol=(I + B) * 2**-23 * float(jnp.abs(w).max()))


@pytest.mark.parametrize(
  'change, error, message',
  [
    (lambda q, x: (q.replace(planes=q.planes * 2), x), ValueError, 'its codes lie in planes .*packed in uint32 planes'),
    (lambda q, x: (q.replace(planes=(q.planes[0].view(jnp.int32),)), x), ValueError, 'int32'),
    (lambda q, x: (q.replace(bits=3), x), ValueError, '256 inputs of 3 bits'),
    (lambda q, x: (q.replace(bits=5), x), ValueError, '5 bits; there are'),
    (lambda q, x: (q.replace(offset=q.offset[:-1]), x), ValueError, 'offsets .* do not fit scales'),
    (lambda q, x: (jax.tree.map(lambda leaf: leaf[None], q), x), ValueError, 'the weight is a stack'),
    (lambda q, x: (q, x[:, 1:]), ValueError, 'x has 255 inputs, the weight 256'),
    (lambda q, x: (q, x.astype(jnp.int8)), TypeError, 'x is int8'),
    (lambda q, x: (q.replace(offset=q.offset.astype(jnp.bfloat16)), x), TypeError, 'offset of a QTensor in bfloat16'),
  ],
)
def test_bad_operands_are_one_clear_error_at_trace_time(change, error, message):
  q, x = example()
  with pytest.raises(error, match=message):
    jax.eval_shape(lambda: qmatmul.qmatmul(*change(q, x)[::-1]))


def test_an_unknown_implementation_is_refused_with_those_there_are():
  q, x = example()
  with pytest.raises(product.Refused, match="no implementation 'mosaic'; there are .*'triton', 'xla'"):
    qmatmul.qmatmul(x, q, 'mosaic')


def test_products_name_themselves():
  text = str(dataclasses.replace(products(7), transposed=True))
  assert text == 'dy [7, 11008] bfloat16 @ w.T [4096, 11008] of 4 bits (integer) in groups of 32'
