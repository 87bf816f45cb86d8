"""The kernel for Hopper, compiled for an H100: what a weight costs, what is kept beside it, who calls it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qalora_jax.kernels import fragments
from qalora_jax.kernels import plan
from qalora_jax.kernels import product
from qalora_jax.kernels import qmatmul
from qalora_jax.quant import codebooks
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


def halves(word):
  """The two bfloat16 numbers in a register, exactly."""
  return [np.uint32((word >> shift & 0xFFFF) << 16).view(np.float32).astype(np.float64) for shift in (0, 16)]


def together(low, high):
  """Two numbers, each rounded to bfloat16, in a register."""
  low, high = (int(np.array(value).astype(jnp.bfloat16).view(np.uint16)) for value in (low, high))
  return low | high << 16


def number(word):
  return np.uint32(word).view(np.float32).astype(np.float64)


def permuted(a, b, selector):
  return sum(((b << 32 | a) >> 8 * (selector >> 4 * at & 7) & 0xFF) << 8 * at for at in range(4))


def by_half(function):
  return lambda *words: together(*(function(*each) for each in zip(*map(halves, words), strict=True)))


MEANING = {
  'mov.b32': lambda a: a,
  'mov.u32': lambda a: a,
  'and.b32': lambda a, b: a & b,
  'or.b32': lambda a, b: a | b,
  'xor.b32': lambda a, b: a ^ b,
  'shl.b32': lambda a, n: a << n & 0xFFFFFFFF,
  'shr.u32': lambda a, n: a >> n,
  'prmt.b32': permuted,
  'cvt.rn.bf16x2.f32': lambda high, low: together(number(low), number(high)),
  'sub.rn.f32': lambda a, b: int(np.float32(number(a) - number(b)).view(np.uint32)),
  'add.rn.bf16x2': by_half(lambda a, b: a + b),
  'sub.rn.bf16x2': by_half(lambda a, b: a - b),
  'mul.rn.bf16x2': by_half(lambda a, b: a * b),
  'fma.rn.bf16x2': by_half(lambda a, b, c: a * b + c),
}


def executed(ptx):
  """One thread's pass through the loop -> (what it loaded, for every wgmma the four registers of A).

  Every load gives another random number, a usual one where it is taken for a float32.  A register is (its value, the
  loads that it comes of), and None where it comes of anything else, such as an address.
  """
  loop = main_loop(ptx)
  rng, loaded, products, held = np.random.default_rng(0), [], [], {'%ctaid.x': (0, frozenset())}
  for name, constant in re.findall(r'mov\.b32\s+(%r\d+), (-?\d+);', ptx[: ptx.index('wgmma.mma_async')]):
    held[name] = (int(constant) & 0xFFFFFFFF, frozenset())
  floats = {name for line in loop if '.f32 ' in line for name in re.findall(r'%r\d+', line)}

  def operand(text):
    return held.get(text) if text.startswith('%') else (int(text) & 0xFFFFFFFF, frozenset())

  for line in loop:
    if 'wgmma.mma_async' in line:
      products.append([held[name] for name in re.findall(r'%r\d+', re.search(r'\}, \{([^}]*)\}', line).group(1))])
      continue
    found = re.match(r'([a-z][\w.:]*)\s+(%r\d+), *([^;]*);', line)
    if not found:
      continue
    code, result, operands = found.groups()
    if code == 'ld.shared.b32':
      usual = int(np.float32(rng.uniform(0.01, 0.02)).view(np.uint32))
      loaded.append(usual if result in floats else int(rng.integers(2**32)))
      held[result] = (loaded[-1], frozenset([len(loaded) - 1]))
      continue
    values = [operand(text.strip()) for text in operands.split(',')] if code in MEANING else [None]
    if any(value is None for value in values):
      held[result] = None
      continue
    held[result] = (MEANING[code](*(value for value, _ in values)), frozenset().union(*(of for _, of in values)))
  return loaded, products


def level(bits, levels, words, at):
  """The level of input `at` of a unit, of which `words` are the word of each plane with its code."""
  code = taken = 0
  for width, word in zip(qtensor.PLANES[bits], words, strict=True):
    code |= (word >> at * width % 32 & 2**width - 1) << taken
    taken += width
  if levels == 'integer':
    return (code ^ 1 << bits - 1) - 2 ** (bits - 1)
  return float(codebooks.CODEBOOKS[levels][code])


CASES = [
  # Products that no other test compiles: the PTX of a kernel is written the first time alone.
  # bits, levels, group, rows, inputs, outputs, scale, offset, instructions of PTX for a weight
  # With three stages the place of the next is a remainder.
  (4, 'integer', 32, 24, D, F, 'float32', 'float32', 4.6),
  (4, 'integer', 128, 16, F, D, 'float16', 'float16', 4.7),
  (4, 'integer', 64, 64, D, D, 'float32', 'none', 4.5),
  (4, 'integer', 32, 256, D, F, 'float32', 'float32', 4.5),
  (8, 'integer', 64, 16, D, F, 'float32', 'float32', 6.0),
  (3, 'integer', 32, 16, D, D, 'float32', 'float32', 6.0),
  (2, 'integer', -1, 64, F, D, 'float32', 'float32', 4.5),
  (4, 'nf4', 64, 1, D, D, 'float32', 'none', 8.5),
  # Most sums with four warpgroups, and with two.
  (4, 'integer', 32, 160, D, 3 * D, 'float32', 'none', 4.5),
  (4, 'integer', 32, 256, D, 3 * D, 'float32', 'none', 4.5),
  (4, 'nf4', 32, 192, 2 * D, 7 * D, 'float32', 'float32', 8.5),
  (4, 'nf4', 32, 256, 2 * D, 7 * D, 'float32', 'none', 8.5),
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
  assert kernel.spilled == 0 and not kernel.serialized
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


@pytest.mark.parametrize(
  ('bits', 'levels'), [(8, 'integer'), (4, 'integer'), (3, 'integer'), (2, 'integer'), (4, 'nf4')]
)
def test_what_a_thread_makes(h100, bits, levels):
  """The compiled instructions, executed for words drawn at random, give A's registers the weights of `fragments`."""
  # So many outputs that inputs are not split, and a loop is left to read.
  w = matrix(bits, 32, 512, 64 * 264, levels)
  text, _ = of_kernel(h100.compile(lambda x, w: qmatmul.qmatmul(x, w, 'mosaic_gpu'), S((8, 512), jnp.bfloat16), w))
  loaded, products = executed(text)
  uses = np.zeros(len(loaded), int)
  scales, offsets = {}, {}
  for at in range(4 * fragments.CHUNKS):
    for _, of in products[at]:
      uses[list(of)] += 1
  for at, registers in enumerate(products):
    chunk, k16 = divmod(at, 4)
    for place, (value, of) in enumerate(registers):
      # By PTX's table of m64nNk16: rows r, then r + 8, of the columns of one tile of eight, then of the next.
      tile, half = 2 * k16 + place // 2, place % 2
      if chunk == fragments.CHUNKS:
        offsets[half, tile] = (value, of)
        continue
      unit, register = divmod(tile, 4)
      # Its scale is in every chunk, and so are three bits' high ones, which are not taken for float32.
      scale = max(of, key=lambda one: (uses[one], number(loaded[one]) if 0.01 <= number(loaded[one]) <= 0.02 else -1))
      assert scales.setdefault((half, unit), scale) == scale
      words = [loaded[one] for one in sorted(of - {scale}, key=lambda one: uses[one])]
      wanted = [level(bits, levels, words, t) for t in fragments.pairs(bits, levels, chunk)[register]]
      wanted = np.array(wanted) * number(loaded[scale])
      before = (1 if levels == 'integer' else 3) * 2**-15  # The rounding: `fragments.scaled`.
      assert np.all(np.abs(np.array(halves(value)) - wanted) <= (before + 2**-8 * (1 + before)) * np.abs(wanted))
  assert len(set(scales.values())) == 4
  for half in range(2):
    of = sorted(offsets[half, 0][1])
    parts = {tile: np.array(halves(offsets[half, tile][0])) for tile in range(fragments.UNITS)}
    assert all(np.array_equal(parts[tile], parts[3 * (tile // 3)]) for tile in parts)
    wanted = [number(loaded[one]) for one in of]
    found = parts[0] + parts[3] + parts[6]
    assert np.allclose(found, wanted, rtol=2**-23) or np.allclose(found, wanted[::-1], rtol=2**-23)
