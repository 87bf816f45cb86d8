"""The Triton kernel, compiled for NVIDIA's chips: what its PTX holds, and that nothing dense is in memory."""

import re

import jax
import jax.numpy as jnp
import pytest

from qalora_jax.kernels import plan
from qalora_jax.kernels import product
from qalora_jax.kernels import qmatmul
from qalora_jax.kernels import triton
from qalora_jax.quant import qtensor

S = jax.ShapeDtypeStruct
# A conversion from an integer to a float: cvt.rn.f32.s32, cvt.rn.bf16.u16 ...
CONVERSION = re.compile(r'cvt\.\w+\.(?:bf16|f16|f32|f64)\.[us]\d+')


def matrix(form, inputs, outputs, group, *leading):
  """A matrix, or a stack of them, abstract; `form` is a number of bits of integer codes, 'nf4' or 'fp4'."""
  form = qtensor.Form(form, group) if isinstance(form, int) else qtensor.Form(4, group, form)
  return jax.eval_shape(lambda: form(jnp.zeros((*leading, inputs, outputs))))


def kernel(compiled):
  """The PTX of the module that holds the kernel."""
  [text] = [text for text in compiled.ptx.values() if '.entry quantized_product' in text]
  return text


# Every two of: form, group (with sizes), dtype, rows.
@pytest.mark.parametrize(
  'form, inputs, outputs, group, dtype, rows',
  [
    (4, 4096, 11008, 32, 'bfloat16', 1),
    (4, 11008, 4096, 128, 'bfloat16', 256),
    (4, 288, 768, 288, 'float16', 16),
    (3, 4096, 4096, 64, 'bfloat16', 16),
    (3, 344, 352, 344, 'float32', 1),
    (2, 4096, 4096, 32, 'bfloat16', 7),
    (2, 11008, 4096, 64, 'float16', 1),
    (8, 4096, 4096, 128, 'bfloat16', 16),
    (8, 128, 352, 32, 'float32', 256),
    ('nf4', 4096, 11008, 64, 'bfloat16', 16),
    ('fp4', 4096, 4096, 32, 'float16', 7),
    ('nf4', 288, 288, 288, 'float32', 7),
  ],
)
def test_it_compiles_for_an_h100(h100, form, inputs, outputs, group, dtype, rows):
  x, w = S((rows, inputs), dtype), matrix(form, inputs, outputs, group)
  compiled = h100.compile(lambda x, w: qmatmul.qmatmul(x, w, 'triton'), x, w)
  text = kernel(compiled)
  assert not CONVERSION.findall(text)
  # Tensor cores multiply 16-bit weights; float32 is multiplied as float32.
  assert ('mma' in text) == (dtype != 'float32') and 'tf32' not in text
  [used] = [used for used in compiled.kernels() if used.name == 'quantized_product']
  assert used.spilled == 0
  # Memory: permuted x and its pools, both padded, and the float32 parts of the sums.
  blocks = triton.plan(product.Product.of(x, w), product.Device('gpu', 'NVIDIA H100 80GB HBM3'))
  padded = -(-rows // blocks.rows) * blocks.rows
  parts = 4 * blocks.splits * rows * outputs if blocks.splits > 1 else 0
  assert compiled.temporary <= parts + 2 * padded * (inputs + 512 * blocks.splits) * x.dtype.itemsize + 2**16


def test_a_stack_is_not_copied(h100):
  """A scan over layers passes whole stacks and an index: beside x and sums there is nothing in memory."""
  x, stack = S((16, 4096), jnp.bfloat16), matrix(4, 4096, 4096, 32, 8)

  def layers(x, stack):
    layer = lambda x, at: (qmatmul.qmatmul(x, qtensor.in_stack(stack, at), 'triton'), None)
    return jax.lax.scan(layer, x, jnp.arange(8))[0]

  one_layer = stack.planes[0].size * 4 // 8
  assert h100.compile(layers, x, stack).temporary < one_layer // 2


@pytest.mark.parametrize('form', [4, 8, 'nf4'])
def test_it_compiles_for_other_chips(other, form):
  """It is what the plan takes there, and its blocks fit the chip's shared memory."""
  x, w = S((32, 4096), jnp.bfloat16), matrix(form, 4096, 4096, 32)
  with jax.set_mesh(other.mesh):
    device = product.device()
  assert plan.choose(product.Product.of(x, w), device).name == 'triton'
  compiled = other.compile(qmatmul.qmatmul, x, w)
  assert not CONVERSION.findall(kernel(compiled))
  [used] = [used for used in compiled.kernels() if used.name == 'quantized_product']
  assert used.spilled == 0
