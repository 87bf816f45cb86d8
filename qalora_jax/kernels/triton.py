"""Quantized products of few rows by Pallas's Triton, for NVIDIA GPUs: weights are made where they are multiplied.

I inputs, O outputs, G group size, L groups.  The kernel reads the planes of a QTensor as they are stored.  Its unit is
a run: 32 consecutive inputs of one group, that is, whole words of every plane and one scale.  A block takes 16 runs;
input f of each, f = 0 .. 31, makes a slab [16, outputs] of weights, which one small dot multiplies.  So a weight never
moves to another place: it is x whose inputs are permuted, once, before the kernel.

    y = sum over f of x[:, f::32] @ (codes * scale)[f::32]  +  pool(x) @ offset

Outputs alone make too few blocks for a chip, so the inputs are split too, and XLA adds the parts, which are float32.
The pooled product is a part of the kernel too, in float32 (never TF32, which would lose small changes of an offset):
1 / G of the multiplications, by the units that do not multiply matrices.

There is no kernel for dy @ dense(w).T.  It is wanted in training, where rows are many, and there one dense matrix and
XLA's product take, by prediction, 3 to 11 % more than a product with a dense matrix; a fused kernel would make every
weight again for every block of rows.  `transpose` is `xla.transpose`.

No figure here was measured on a GPU: counts are those of the PTX for an H100, the rest is arithmetic.
"""

import dataclasses
import functools
import re

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from qalora_jax.kernels import reference
from qalora_jax.kernels import xla
from qalora_jax.kernels.product import Device
from qalora_jax.kernels.product import Product
from qalora_jax.kernels.product import Refused
from qalora_jax.quant import codebooks
from qalora_jax.quant import double
from qalora_jax.quant import qtensor

try:
  from jax.experimental.pallas import triton as backend
except ImportError:  # jax 0.11 announces that it will go.
  backend = None

# Inputs of a run: as many as a word of the narrowest plane holds.
RUN = qtensor.WORD
# Runs of a block, and groups of one step of the pooled product: the fewest that a dot sums over.
RUNS = 16
# Up to so many rows a product is worth this kernel.  By prediction it ties with XLA at about 200 rows for integer
# codes and at 90 for codebooks (4.5 and 9 instructions for a weight and 32 rows, against writing and reading 16 bits).
ROWS = {'integer': 128, 'nf4': 64, 'fp4': 64}
# Blocks that fill a chip: two for each of an H100's multiprocessors.
_FULL = 264
# Chips before the first with bfloat16 and asynchronous copies (compute capability 8.0).
# Not by a prefix of numbers: an RTX 2080 is earlier, an RTX 2000 Ada and an MX570 are not.
_EARLIER = re.compile(r'\b(G?P\d+|G?V100\w?|T\d+G?|GT|GTX|TITAN|Quadro|MX[1-4]\d0|MX550|RTX 20[678]0)\b')
# Bytes of shared memory that a block may take: those of Ada and consumer chips, but for those named.
_SHARED, _MORE_SHARED = 99 << 10, {'A100': 163 << 10, 'H100': 227 << 10, 'H200': 227 << 10, 'B200': 227 << 10}
# Without it a float32 dot is TF32.
_EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How a product is cut.

  A block makes [rows, outputs] sums over one of `splits` parts of the inputs.  stages: how many steps' operands lie in
  shared memory at a time.  packed: two weights are made by one instruction, in assembly (`assembly`).
  """

  rows: int
  outputs: int
  splits: int
  stages: int
  packed: bool
  warps: int = 4


def worthwhile(product: Product, device: Device) -> bool:
  """Whether the rows are few; a transposed product is XLA's in any case."""
  return device.platform == 'gpu' and not product.transposed and product.rows <= ROWS[product.levels]


def plan(product: Product, device: Device) -> Blocks | None:
  """The blocks; None for a transposed product, which XLA makes.

  Refuses a jax without Pallas's Triton, devices other than NVIDIA's from compute capability 8.0 on, and several groups
  of a size that is no multiple of 32.
  """
  if backend is None:
    raise Refused("this jax has no jax.experimental.pallas.triton; use impl='mosaic_gpu' or 'xla'.")
  if _EARLIER.search(device.kind):
    raise Refused(f"it needs compute capability 8.0, which {device.kind!r} lacks; use impl='xla'.")
  if device.platform != 'gpu' or 'NVIDIA' not in device.kind:
    raise Refused(f"it runs on NVIDIA GPUs, not on {device.kind or device.platform!r}; use impl='xla'.")
  if product.group % RUN and product.group != product.inputs:
    raise Refused(f"a group of {product.group} inputs is not whole runs of {RUN}; use impl='xla'.")
  if product.transposed:
    return None
  rows, outputs = 16 if product.rows <= 16 else 32, 64
  integer = product.levels == 'integer'
  steps = pl.cdiv(product.inputs, RUN * RUNS)
  blocks = pl.cdiv(product.rows, rows) * pl.cdiv(product.outputs, outputs)
  # As few steps in each part as leave enough parts, then as many parts as these steps take.
  splits = pl.cdiv(steps, pl.cdiv(steps, min(steps, pl.cdiv(_FULL, blocks))))
  # The words, the scales and the rows of x of a step.
  size = 4 * RUNS * outputs * (product.bits + 1) + RUN * RUNS * rows * jnp.dtype(product.dtype).itemsize
  shared = next((most for name, most in _MORE_SHARED.items() if name in device.kind), _SHARED)
  # Levels of a codebook are loaded too; Triton would copy each of them to shared memory first.
  stages = 2 if integer and 2 * size <= shared else 1
  return Blocks(rows, outputs, splits, stages, packed=integer and product.bits < 8 and product.dtype == 'bfloat16')


def forward(x, w: qtensor.QTensor, blocks: Blocks, *, out_dtype, interpret=False):
  """x [..., I] @ dense(w) -> [..., O] in out_dtype.

  Weights are rounded once, from code * scale to x's dtype; sums are float32.  A float32 x is multiplied in float32.
  """
  *leading, inputs = x.shape
  outputs = w.shape[-1]
  x = x.reshape(-1, inputs)
  rows = x.shape[0]
  # Every part has as many steps; beyond the last run, group and row there are zeros.
  steps = pl.cdiv(pl.cdiv(inputs, RUN * RUNS), blocks.splits)
  pools = pl.cdiv(pl.cdiv(w.groups, RUNS), blocks.splits)
  padding = lambda used, wanted: ((0, -rows % blocks.rows), (0, blocks.splits * wanted - used))
  runs = blocks.splits * steps * RUNS
  permuted = jnp.pad(x, padding(inputs, steps * RUNS * RUN)).reshape(-1, runs, RUN).swapaxes(1, 2)
  operands = {
    'layer': jnp.zeros(1, jnp.int32) if w.layer is None else w.layer.reshape(1),
    'x': permuted.reshape(-1, RUN * runs),
    'planes': w.planes,
    'scale': qtensor.scales(w) if isinstance(w.scale, double.Doubled) else w.scale,
  }
  if w.levels != 'integer':
    operands['levels'] = jnp.asarray(codebooks.CODEBOOKS[w.levels])
  if w.offset is not None:
    operands['pooled'] = jnp.pad(reference.pool(x, w.groups), padding(w.groups, pools * RUNS))
    operands['offset'] = w.offset
  flat, tree = jax.tree.flatten(operands)
  blocks = dataclasses.replace(blocks, packed=blocks.packed and not interpret)
  sums = pl.pallas_call(
    functools.partial(_multiply, tree=tree, bits=w.bits, group=w.group, blocks=blocks, steps=steps, pools=pools),
    grid=(pl.cdiv(outputs, blocks.outputs), pl.cdiv(rows, blocks.rows), blocks.splits),
    out_shape=jax.ShapeDtypeStruct((blocks.splits, rows, outputs), jnp.float32 if blocks.splits > 1 else out_dtype),
    compiler_params=backend.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
    interpret=interpret,
    name='quantized_product',
  )(*flat)
  return sums.sum(0).astype(out_dtype).reshape(*leading, outputs)


def transpose(dy, w: qtensor.QTensor, blocks: None = None, *, out_dtype, interpret=False):
  """dy [..., O] @ dense(w).T -> [..., I] in out_dtype, by XLA."""
  return xla.transpose(dy, w, out_dtype=out_dtype)


def assembly(bits: int, field: int) -> str:
  """PTX that makes two bfloat16 weights: of input `field` of two runs, in the low and the high 16 bits of a register.

  $0 = (codes - 2^(bits-1)) * ($high + $low), where a scale is the sum of two bfloat16 numbers; the arguments after
  the result are the halves of both runs' words in which the field lies, for every plane, then $high and $low.

  A code, its sign bit flipped, is set into the mantissa of 128, from which 128 + 2^(bits-1) is taken: no conversion.
  Every step is exact but the last and the product with $low, so the weight is rounded once (within 2^-17).
  """
  half = 2 ** (bits - 1)
  pair = lambda value: f'0x{value << 16 | value:08X}'
  lines, taken, made = [], 0, pair(0x4300 | half)
  for argument, width in enumerate(qtensor.PLANES[bits], start=1):
    shift = width * field % 16 - taken
    mask = pair((2**width - 1) << taken)
    lines.append(f'{"shr" if shift >= 0 else "shl"}.b32 moved, ${argument}, {abs(shift)};')
    # (moved & mask) ^ made
    lines.append(f'lop3.b32 weight, moved, {mask}, {made}, 0x6A;')
    taken, made = taken + width, 'weight'
  lines += [
    f'mov.b32 one, {pair(0x3F80)};',
    f'mov.b32 moved, {pair(0xC300 | half)};',
    'fma.rn.bf16x2 weight, weight, one, moved;',
    f'mov.b32 moved, {pair(0x8000)};',
    f'fma.rn.bf16x2 moved, weight, ${argument + 2}, moved;',
    f'fma.rn.bf16x2 $0, weight, ${argument + 1}, moved;',
  ]
  return '{ .reg .b32 moved, weight, one; ' + ' '.join(lines) + ' }'


def _multiply(*refs, tree, bits, group, blocks, steps, pools):
  """One block: the sums of blocks.rows rows and blocks.outputs outputs over one part of the inputs."""
  *flat, y_ref = refs
  operand = jax.tree.unflatten(tree, flat)
  first_row, part = pl.program_id(1) * blocks.rows, pl.program_id(2)
  rows = (first_row + jnp.arange(blocks.rows))[:, None]
  columns = (pl.program_id(0) * blocks.outputs + jnp.arange(blocks.outputs))[None]
  _, row_count, column_count = y_ref.shape
  layer, dtype = operand['layer'][0], operand['x'].dtype
  runs_of_x = operand['x'].shape[1] // RUN
  widths = qtensor.PLANES[bits]

  def lines(ref, indices):
    """Those lines of the matrix, or of its layer of the stack; zeros beyond its edges."""
    indices = indices[:, None]
    at = (layer, indices, columns) if len(ref.shape) == 3 else (indices, columns)
    mask = (indices < ref.shape[-2]) & (columns < column_count)
    return backend.load(ref.at[at], mask=mask, other=jnp.zeros((), ref.dtype))

  def add(sums, ref, at, weights):
    """sums + ref[rows, at : at + RUNS] @ weights; rows that are not there are not read."""
    mask = jnp.broadcast_to(rows < row_count, (blocks.rows, RUNS))
    x = backend.load(ref.at[pl.ds(first_row, blocks.rows), pl.ds(at, RUNS)], mask=mask, other=jnp.zeros((), ref.dtype))
    precision = _EXACT if x.dtype == jnp.float32 else None
    return sums + jax.lax.dot(x, weights, precision=precision, preferred_element_type=jnp.float32)

  def step(index, sums):
    first = (part * steps + index) * RUNS
    runs = first + jnp.arange(RUNS)
    scale = lines(operand['scale'], runs * RUN // group).astype(jnp.float32)
    # A run is `width` words of a plane.
    words = [
      [lines(plane, runs * width + word) for word in range(width)]
      for width, plane in zip(widths, operand['planes'], strict=True)
    ]
    high = scale.astype(dtype)
    low = (scale - high.astype(jnp.float32)).astype(dtype)
    for field in range(RUN):
      if blocks.packed:
        weights = _packed(words, bits, field, high, low)
      else:
        weights = (_level(words, bits, field, operand.get('levels')) * scale).astype(dtype)
      sums = add(sums, operand['x'], field * runs_of_x + first, weights)
    return sums

  def pooled(index, sums):
    first = (part * pools + index) * RUNS
    offset = lines(operand['offset'], first + jnp.arange(RUNS)).astype(jnp.float32)
    return add(sums, operand['pooled'], first, offset)

  zeros = jnp.zeros((blocks.rows, blocks.outputs), jnp.float32)
  sums = jax.lax.fori_loop(0, steps, step, zeros)
  if 'offset' in operand:
    sums += jax.lax.fori_loop(0, pools, pooled, zeros)
  mask = (rows < row_count) & (columns < column_count)
  backend.store(y_ref.at[part, rows, columns], sums.astype(y_ref.dtype), mask=mask)


def _packed(words, bits, field, high, low):
  """code * (high + low) in bfloat16 for input `field` of every run, by `assembly`."""
  half = lambda width, own: own[field * width // 32] >> (field * width % 32 // 16 * 16)
  halves = [half(width, own).astype(jnp.uint16) for width, own in zip(qtensor.PLANES[bits], words, strict=True)]
  [weights] = backend.elementwise_inline_asm(
    assembly(bits, field),
    args=[*halves, high, low],
    constraints=','.join(['=r'] + ['r'] * (len(halves) + 2)),
    pack=2,
    result_shape_dtypes=[jax.ShapeDtypeStruct(high.shape, high.dtype)],
  )
  return weights


def _level(words, bits, field, levels):
  """The float32 level of input `field` of every run, without a conversion of integers to floats.

  words: the words of a run, by plane; levels: a codebook, or None for integers.
  """
  unsigned, taken = None, 0
  for width, own in zip(qtensor.PLANES[bits], words, strict=True):
    word, shift = own[field * width // 32], field * width % 32 - taken
    moved = (word >> shift if shift >= 0 else word << -shift) & jnp.uint32((2**width - 1) << taken)
    unsigned, taken = moved if unsigned is None else unsigned | moved, taken + width
  if levels is not None:
    return backend.load(levels.at[unsigned.astype(jnp.int32)])
  # The code, its sign bit flipped, in the mantissa of 2^23.
  half = 2 ** (bits - 1)
  return jax.lax.bitcast_convert_type(unsigned ^ jnp.uint32(0x4B000000 | half), jnp.float32) - (2.0**23 + half)
