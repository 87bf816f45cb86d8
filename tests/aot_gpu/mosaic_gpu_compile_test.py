"""The kernel for Hopper, compiled for an H100: what a weight costs, what is kept beside it, who calls it."""

import re

import jax
import jax.numpy as jnp
import pytest

from qalora_jax.kernels import fragments
from qalora_jax.kernels import plan
from qalora_jax.kernels import product
from qalora_jax.kernels import qmatmul
from qalora_jax.quant import qtensor

NAME = 'qmatmul_mosaic_gpu'
D, F = 4096, 11008
S = jax.ShapeDtypeStruct


def matrix(bits, group, inputs, outputs, levels='integer', scale='float32', offset='float32', leading=()):
  """Abstract."""
  form = qtensor.Form(bits, group, levels, scale, offset)
  return jax.eval_shape(lambda: form(jnp.zeros((*leading, inputs, outputs))))


def main_loop(ptx):
  """The instructions of the loop over blocks of inputs: from its label to the jump back to it."""
  first = ptx.index('wgmma.mma_async')
  label = re.findall(r'^(\$L__BB\w+):', ptx[:first], re.MULTILINE)[-1]
  start = ptx.index(f'\n{label}:')
  end = list(re.finditer(rf'bra(\.uni)?\s+{re.escape(label)};', ptx))[-1].start()
  assert start < first < ptx.rindex('wgmma.mma_async') < end
  lines = (line.strip() for line in ptx[start:end].splitlines())
  return [line for line in lines if re.match(r'(@!?%p\d+\s+)?(\{\s*\.reg[^;]*;)?\s*[a-z]', line)]


def of_kernel(compiled):
  [text] = [text for text in compiled.ptx.values() if 'wgmma' in text]
  [kernel] = [kernel for kernel in compiled.kernels() if NAME in kernel.name]
  return text, kernel


CASES = [
  # bits, levels, group, rows, inputs, outputs, scale, offset, instructions of PTX for a weight
  (4, 'integer', 32, 1, D, F, 'float32', 'float32', 4.5),
  (4, 'integer', 128, 16, F, D, 'float16', 'float16', 4.7),
  (4, 'integer', 64, 64, D, D, 'float32', 'none', 4.5),
  (4, 'integer', 32, 256, D, F, 'float32', 'float32', 4.5),
  (8, 'integer', 64, 16, D, F, 'float32', 'float32', 6.0),
  (3, 'integer', 32, 16, D, D, 'float32', 'float32', 6.0),
  (2, 'integer', -1, 64, F, D, 'float32', 'float32', 4.5),
  (4, 'nf4', 64, 1, D, D, 'float32', 'none', 6.0),
]


@pytest.mark.parametrize(('bits', 'levels', 'group', 'rows', 'inputs', 'outputs', 'scale', 'offset', 'most'), CASES)
def test_what_a_weight_costs(h100, bits, levels, group, rows, inputs, outputs, scale, offset, most):
  """No integer becomes a number by conversion, weights meet x from registers, and none of these is spilled."""
  w = matrix(bits, group, inputs, outputs, levels, scale, offset)
  compiled = h100.compile(lambda x, w: qmatmul.qmatmul(x, w, 'mosaic_gpu'), S((rows, inputs), jnp.bfloat16), w)
  text, kernel = of_kernel(compiled)
  loop = main_loop(text)
  assert not [line for line in loop if re.search(r'cvt\.\S*(f32|bf16|bf16x2)\.[su]\d', line)]
  products = [line for line in loop if 'wgmma.mma_async' in line]
  # Sums, then the four registers of A, then where x lies.
  assert all(re.search(r'\{[^{}]*\}, \{%r\d+(, ?%r\d+){3}\}, %rd\d+', line) for line in products)
  assert len(products) == 4 * (fragments.CHUNKS + (offset != 'none'))
  assert len(loop) / (64 * fragments.BLOCK / 128) <= most
  assert kernel.spilled == 0
  # Nothing of the weights is copied: there are x in its new order and the partial sums.
  with jax.set_mesh(h100.mesh):
    blocks = plan.choose(product.Product.of(S((rows, inputs), jnp.bfloat16), w), product.device(), 'mosaic_gpu').blocks
  padded = -(-rows // blocks.rows) * blocks.rows
  sums = 4 * blocks.splits * padded * outputs
  assert compiled.temporary <= 1.1 * (sums + 2 * padded * inputs * 320 // 256) + 2**16


def test_a_stack_is_read_where_it_lies(h100):
  """A scan over layers copies none of their weights."""
  stack = matrix(4, 64, D, D, offset='none', leading=(8,))

  def layers(x, stack):
    step = lambda x, layer: (qmatmul.qmatmul(x, qtensor.in_stack(stack, layer)), None)
    return jax.lax.scan(step, x, jnp.arange(8))[0]

  compiled = h100.compile(layers, S((16, D), jnp.bfloat16), stack)
  text, kernel = of_kernel(compiled)
  assert kernel.spilled == 0
  assert compiled.temporary < stack.planes[0].size * 4 / 8 / 2


def test_it_is_called_for_few_rows(h100):
  w = matrix(4, 128, D, D)
  few, many = (h100.compile(qmatmul.qmatmul, S((rows, D), jnp.bfloat16), w) for rows in (16, 2048))
  assert NAME in few.hlo and NAME not in many.hlo
