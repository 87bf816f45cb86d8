"""Quantized products by Mosaic, the compiler of Pallas kernels for TPUs: dequantized block by block, never in memory.

In groups of G inputs, with q the levels of the codes [I, O], s their scales and b the offsets [L, O]:

    y = x @ (s * q) + pool(x) @ b             dx = dy @ (s * q).T + spread(dy @ b.T)

The first product of each is one of the MXU on a block of s * q that is made in VMEM.  The second has 1 / G of its
size and keeps float32's accuracy, so that small changes of the offsets are not rounded away with bfloat16's weights.

Codes are unpacked by reinterpreting words as vectors of narrow integers: field j of word i is input i * 32 / width + j,
which is how Mosaic lays narrow integers out.  The third bit of 3 has no such type and is tested with a mask.
"""

import dataclasses
import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from qalora_jax.kernels import exact
from qalora_jax.kernels import product as product_lib
from qalora_jax.kernels import reference
from qalora_jax.kernels.product import Refused
from qalora_jax.quant import codebooks
from qalora_jax.quant import qtensor

_EXACT = jax.lax.Precision.HIGHEST
# Rows and columns of a vector register of 32-bit numbers: blocks are whole tiles of it or whole dimensions.
_SUBLANES, _LANES = 8, 128
_NARROW = {8: jnp.int8, 4: jnp.int4, 2: jnp.int2}


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How a product is cut: one grid step multiplies [rows, inputs] by [inputs, outputs] (transposed: by its transpose).

  scaling says where codes meet their scales:

  * 'before': level * scale is multiplied in float32 and rounded once, to x's dtype: 2^-8 of a weight in bfloat16.
  * 'after': x meets the levels, which integer codes are exactly, and the sums of every group are scaled in float32:
    no weight is rounded (levels of a codebook are, to x's dtype).  Forward only.

  depth: inputs that the MXU sums in one pass; with 'after', smaller groups share one.  vmem: bytes it may take.
  """

  rows: int
  inputs: int
  outputs: int
  scaling: str = 'before'
  depth: int = 128
  vmem: int = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class _Chip:
  """What blocks depend on, of one core.

  vmem: its bytes.  depth: of an MXU.  multiply_adds, bytes: of all its MXUs, and out of HBM, in a cycle.  rows: of a
  block, so many that multiplying hides the unpacking of its weights.  narrowest: integers of which it unpacks vectors,
  in bits.
  """

  vmem: int
  depth: int
  multiply_adds: int
  bytes: int
  rows: int
  narrowest: int = 2

  @classmethod
  def of(cls, device: product_lib.Device) -> '_Chip':
    """The first whose name `device.kind` begins with; a chip of another name is taken for the least of them."""
    return next((chip for name, chip in _CHIPS.items() if device.kind.startswith(name)), _LEAST)


_LEAST = _Chip(16 * 2**20, 128, 2**16, 580, 512, narrowest=4)
_CHIPS = {
  'TPU v5 lite': _Chip(128 * 2**20, 128, 2**16, 545, 512),
  'TPU v5e': _Chip(128 * 2**20, 128, 2**16, 545, 512),
  'TPU v5': _Chip(64 * 2**20, 128, 2**16, 790, 512),
  'TPU v6': _Chip(128 * 2**20, 256, 2**18, 937, 1024),
  'TPU7': _Chip(64 * 2**20, 256, 2**18, 1900, 1024),
}


def worthwhile(product: product_lib.Product, device: product_lib.Device) -> bool:
  """On every TPU: nothing dense is written, and the MXU hides the unpacking."""
  return device.platform == 'tpu'


def plan(product: product_lib.Product, device: product_lib.Device) -> Blocks:
  """Blocks for `product`, found by experiments/tpu_static.py; Refused where Mosaic cannot make it.

  Wherever VMEM allows, a step takes all of the dimension that is summed: x (or dy) is then fetched once, and sums need
  no second pass.  Of the other dimension it takes what keeps the MXU busy for some thousand cycles, or, where few rows
  leave it waiting for weights, what makes all steps and the first fetch together the shortest.
  """
  chip = _check(product, device)
  rows = _even(max(1, product.rows), chip.rows, 16)
  # The MXU multiplies float32 in six passes.
  passes = 6 if product.dtype == 'float32' else 1
  weights = min(_WEIGHTS, _CYCLES * chip.multiply_adds // (rows * passes))
  if product.transposed:
    # Of 256 inputs, the scales of groups of 32 fill registers.
    outputs = _outputs_summed(product.outputs, min(_SUMMED, max(256, weights // 256 // _LANES * _LANES)))
    inputs = _inputs(product, max(256, _power(weights // outputs)))
  else:
    inputs = _inputs(product, _SUMMED)
    outputs = _power(weights // inputs)
    outputs = _even(product.outputs, _streamed(product, chip, outputs) if rows <= _FEW else outputs, _LANES)
  blocks = _fitting(product, Blocks(rows, inputs, outputs, depth=chip.depth, vmem=chip.vmem * 3 // 4))
  if product.transposed or not _after(product, blocks):
    return blocks
  # Rows are repeated for the groups that share a pass, in whole registers.
  return dataclasses.replace(blocks, scaling='after', rows=_round_up(blocks.rows, _SUBLANES))


# Rows up to which reading the weights takes longer than multiplying them; weights of a block; cycles of a step beside
# which its bookkeeping (some 150) does not count; the largest dimension that is summed at once.
_FEW, _WEIGHTS, _CYCLES, _SUMMED = 64, 2**22, 3 * 2**12, 2**14
# Cycles of a step in which a core that waits for weights does not unpack: bookkeeping, the first load, the last sums.
_IDLE = 300


def _power(size: int) -> int:
  """The largest power of two up to `size`, not less than a register's lanes and not more than 2048."""
  return min(2048, max(_LANES, 1 << (max(1, size).bit_length() - 1)))


def _streamed(product: product_lib.Product, chip: _Chip, most: int) -> int:
  """Outputs of a block, up to `most`, where reading weights takes longest.

  Every step adds its idle cycles, and the first fetch, behind which nothing is hidden, grows with the block.
  """
  bytes_per_output = product.inputs * product.bits / 8 + product.inputs / product.group * 8
  idle = _IDLE * chip.bytes / bytes_per_output
  time = lambda size: pl.cdiv(product.outputs, size) * (size + idle) + size
  return min(range(_LANES, most + 1, _LANES), key=time)


def _check(product: product_lib.Product, device: product_lib.Device) -> _Chip:
  """The chip; Refused for what it does not compile in any blocks."""
  if device.platform != 'tpu':
    raise Refused(f"its kernels are for TPUs and this is {device.kind or device.platform!r}; take impl='xla'.")
  if product.dtype not in ('bfloat16', 'float32'):
    raise Refused(f"TPUs do not multiply {product.dtype}; use bfloat16 or float32, or take impl='xla'.")
  if product.group % _SUBLANES:
    raise Refused(
      f'groups of {product.group} inputs do not fill whole rows of its registers; '
      f"use groups of a multiple of {_SUBLANES}, or take impl='xla'."
    )
  if product.levels != 'integer' and product.bits != 4:
    raise Refused(f"it looks up codebooks of 4 bits and {product.levels} has {product.bits}; take impl='xla'.")
  chip = _Chip.of(device)
  if max(qtensor.PLANES[product.bits]) < chip.narrowest:
    raise Refused(
      f"{device.kind} unpacks no vectors of {max(qtensor.PLANES[product.bits])} bits; use 4 or 8, or take impl='xla'."
    )
  return chip


def _after(product: product_lib.Product, blocks: Blocks) -> bool:
  """Whether scaling sums takes fewer operations than scaling weights."""
  count = _groups(blocks.inputs, product.group)
  if count == 1:
    return blocks.rows <= blocks.inputs
  # An MXU of 256 multiplies so fast that scaling weights, an operation for each, takes longer than reading them.
  whole = max(product.group, blocks.depth) % product.group == 0 and product.group % 32 == 0
  return whole and blocks.depth >= 256 and blocks.rows <= max(24, product.group // 2)


def _inputs(product: product_lib.Product, most: int) -> int:
  """Inputs of a block: all, or a divisor up to `most` in whole tiles of x and of every plane, and in whole groups.

  Or the group in whole blocks.  Where there is no such divisor it is all of them.
  """
  if product.inputs <= most:
    return product.inputs
  unit = math.lcm(_LANES, *(_SUBLANES * qtensor.WORD // width for width in qtensor.PLANES[product.bits]))
  fits = lambda block: product.inputs % block == 0 and (block % product.group == 0 or product.group % block == 0)
  blocks = [block for block in range(unit, product.inputs + 1, unit) if fits(block)]
  within = [block for block in blocks if block <= most] or blocks[:1] or [product.inputs]
  # Scales in whole registers are read block by block, others all at once.
  aligned = [block for block in within if block % (_SUBLANES * product.group) == 0 and 2 * block >= within[-1]]
  return (aligned or within)[-1]


def _outputs_summed(size: int, most: int) -> int:
  """Outputs of a block where they are summed: all, or a divisor in whole tiles, else `most` and a mask."""
  if size <= most:
    return size
  return max((block for block in range(256, most + 1, _LANES) if size % block == 0), default=most)


def _even(size: int, most: int, unit: int) -> int:
  """`size` if that is at most `most`, else the block of whole units that divides it most evenly."""
  return size if size <= most else _round_up(pl.cdiv(size, pl.cdiv(size, most)), unit)


def _round_up(size: int, unit: int) -> int:
  return -(-size // unit) * unit


def _fitting(product: product_lib.Product, blocks: Blocks) -> Blocks:
  """`blocks`, halved until they fit; Refused where the smallest do not."""
  while _bytes(product, blocks) > blocks.vmem:
    smaller = {
      'rows': _round_up(blocks.rows // 2, 16),
      'inputs': _inputs(product, blocks.inputs // 2),
      'outputs': _round_up(blocks.outputs // 2, _LANES),
    }
    smaller = {name: size for name, size in smaller.items() if size < getattr(blocks, name)}
    if not smaller:
      raise Refused(
        f'its smallest block, {blocks.inputs} inputs by {blocks.outputs} outputs, takes '
        f'{_bytes(product, blocks) / 2**20:.0f} MiB of the {blocks.vmem / 2**20:.0f} MiB of VMEM; '
        "use a number of inputs that a multiple of 256 divides, or take impl='xla'."
      )
    largest = max(smaller, key=lambda name: getattr(blocks, name))
    blocks = dataclasses.replace(blocks, **{largest: smaller[largest]})
  # XLA uses what is left, so twice what is counted is enough.
  return dataclasses.replace(blocks, vmem=min(blocks.vmem, max(16 * 2**20, 2 * _bytes(product, blocks))))


def _bytes(product: product_lib.Product, blocks: Blocks) -> int:
  """What a step keeps in VMEM: operands twice (one is read while the other is used), sums, and a block of weights."""
  rows, inputs, outputs = (_round_up(size, _LANES) for size in (blocks.rows, blocks.inputs, blocks.outputs))
  groups = _round_up(product.inputs // product.group, _LANES)
  size = 4 if product.dtype == 'float32' else 2
  streamed = (rows * inputs + rows * outputs) * size + inputs * outputs * product.bits // 8
  streamed += 2 * groups * outputs * 4 + 4 * rows * groups * 2
  made = inputs * outputs * (4 + size) + 2 * rows * (inputs if product.transposed else outputs) * 4
  return 2 * streamed + made


def forward(x, w: qtensor.QTensor, blocks: Blocks, *, out_dtype, interpret=False):
  """x [..., I] @ dense(w) -> [..., O] in out_dtype."""
  *leading, inputs = x.shape
  outputs, groups = w.shape[-1], w.groups
  bm, bk, bn = blocks.rows, blocks.inputs, blocks.outputs
  x, given = _at_least(bm, x.reshape(-1, inputs))
  rows = x.shape[0]
  grid = (pl.cdiv(rows, bm), pl.cdiv(outputs, bn), inputs // bk)
  layers, planes, scale = _stacks(w, interpret)
  operands = [_in_memory(x, interpret), *planes, scale]
  specs = [pl.BlockSpec((bm, bk), lambda i, j, k, layers: (i, k))]
  for plane in planes:
    specs.append(pl.BlockSpec((None, _words(plane, bk, inputs), bn), lambda i, j, k, layers: (layers[0], k, j)))
  specs.append(pl.BlockSpec((None, groups, bn), lambda i, j, k, layers: (layers[1], 0, j)))
  if w.levels != 'integer':
    operands.append(_table(w.levels))
    specs.append(pl.BlockSpec((1, _LANES), lambda i, j, k, layers: (0, 0)))
  if w.offset is not None:
    pooled = reference.pool(x, groups)
    pooled = exact.of_pooled(pooled) if x.dtype == jnp.bfloat16 else pooled
    operands += [pooled, qtensor.offsets(w)]
    specs.append(pl.BlockSpec((bm, pooled.shape[1]), lambda i, j, k, layers: (i, 0)))
    specs.append(pl.BlockSpec((groups, bn), lambda i, j, k, layers: (0, j)))
  kernel = functools.partial(_forward, form=_Form.of(w), blocks=blocks, steps=grid[2])
  y = pl.pallas_call(
    kernel,
    out_shape=product_lib.result((rows, outputs), out_dtype, operands),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=grid,
      in_specs=specs,
      out_specs=pl.BlockSpec((bm, bn), lambda i, j, k, layers: (i, j)),
      scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)] * (grid[2] > 1),
    ),
    compiler_params=_parameters(blocks),
    interpret=interpret,
    name='qmatmul_forward',
  )(layers, *operands)
  return y[:given].reshape(*leading, outputs)


def transpose(dy, w: qtensor.QTensor, blocks: Blocks, *, out_dtype, interpret=False):
  """dy [..., O] @ dense(w).T -> [..., I] in out_dtype."""
  *leading, outputs = dy.shape
  inputs, groups = w.shape[-2], w.groups
  bm, bk, bn = blocks.rows, blocks.inputs, blocks.outputs
  dy, given = _at_least(bm, dy.reshape(-1, outputs))
  rows = dy.shape[0]
  grid = (pl.cdiv(rows, bm), inputs // bk, pl.cdiv(outputs, bn))
  layers, planes, scale = _stacks(w, interpret)
  own = _groups(bk, w.group)
  whole = own % _SUBLANES != 0 or bk % w.group != 0
  operands = [_in_memory(dy, interpret), *planes, scale]
  specs = [pl.BlockSpec((bm, bn), lambda i, k, j, layers: (i, j))]
  for plane in planes:
    specs.append(pl.BlockSpec((None, _words(plane, bk, inputs), bn), lambda i, k, j, layers: (layers[0], k, j)))
  if whole:
    specs.append(pl.BlockSpec((None, groups, bn), lambda i, k, j, layers: (layers[1], 0, j)))
  else:
    specs.append(pl.BlockSpec((None, own, bn), lambda i, k, j, layers: (layers[1], k, j)))
  if w.levels != 'integer':
    operands.append(_table(w.levels))
    specs.append(pl.BlockSpec((1, _LANES), lambda i, k, j, layers: (0, 0)))
  if w.offset is not None:
    operands.append(_by_block(exact.dot(dy, qtensor.offsets(w).T), grid[1], w.group // bk))
    specs.append(pl.BlockSpec((None, bm, operands[-1].shape[2]), lambda i, k, j, layers: (k, i, 0)))
  kernel = functools.partial(_transpose, form=_Form.of(w), blocks=blocks, steps=grid[2], outputs=outputs, whole=whole)
  dx = pl.pallas_call(
    kernel,
    out_shape=product_lib.result((rows, inputs), out_dtype, operands),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=grid,
      in_specs=specs,
      out_specs=pl.BlockSpec((bm, bk), lambda i, k, j, layers: (i, k)),
      scratch_shapes=[pltpu.VMEM((bm, bk), jnp.float32)] * (grid[2] > 1),
    ),
    compiler_params=_parameters(blocks),
    interpret=interpret,
    name='qmatmul_transpose',
  )(layers, *operands)
  return dx[:given].reshape(*leading, inputs)


@dataclasses.dataclass(frozen=True)
class _Form:
  """What the kernels need to know of a QTensor."""

  bits: int
  group: int
  levels: str
  offset: bool

  @classmethod
  def of(cls, w: qtensor.QTensor):
    return cls(w.bits, w.group, w.levels, w.offset is not None)

  @property
  def planes(self) -> int:
    return len(qtensor.PLANES[self.bits])


def _at_least(rows: int, x):
  """x with rows of 0 behind it up to `rows`, and how many it had: Mosaic does not repeat a block's first row alone."""
  return jnp.pad(x, ((0, max(0, rows - x.shape[0])), (0, 0))), x.shape[0]


def _parameters(blocks: Blocks):
  semantics = ('parallel', 'parallel', 'arbitrary')
  return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=blocks.vmem)


def _stacks(w: qtensor.QTensor, interpret: bool):
  """The indices of w's layer in the stacks of its planes and of its scales, and those stacks."""
  layer = jnp.zeros((), jnp.int32) if w.layer is None else w.layer.astype(jnp.int32)
  stack = (lambda leaf: leaf[None]) if w.layer is None else (lambda leaf: leaf)
  planes = [stack(plane) for plane in w.planes]
  if interpret:
    # XLA on CPU computes the narrow integers of constant words ahead of time, and wrongly: it may not see them.
    planes = jax.lax.optimization_barrier(planes)
  if isinstance(w.scale, jax.Array) and w.scale.dtype == jnp.float32:
    return jnp.stack([layer, layer]), planes, stack(w.scale)
  return jnp.stack([layer, jnp.zeros_like(layer)]), planes, qtensor.scales(w)[None]


def _in_memory(x, interpret: bool):
  """x in HBM, whence blocks are fetched while others are used; out of VMEM they would be copied between two steps."""
  return x if interpret else pltpu.with_memory_space_constraint(x, pltpu.HBM)


def _words(plane, block: int, inputs: int) -> int:
  """The words of a plane that hold `block` inputs."""
  return plane.shape[-2] if block == inputs else plane.shape[-2] * block // inputs


def _groups(block: int, group: int) -> int:
  """The groups that a block of inputs touches: blocks divide groups or groups blocks."""
  return max(1, block // group)


def _table(levels: str):
  """The codebook, repeated over the lanes of a register."""
  book = codebooks.CODEBOOKS[levels]
  return jnp.asarray(np.tile(book, _LANES // book.size)[None])


def _by_block(by_group, blocks: int, repeats: int):
  """dy @ offset.T [rows, L] as the pieces of each block's groups: [blocks, rows, 3 * groups of a block].

  repeats: blocks of a group, where groups are larger.
  """
  by_group = jnp.repeat(by_group, max(1, repeats), axis=1)
  pieces = [piece.reshape(piece.shape[0], blocks, -1) for piece in exact.pieces(by_group, 3)]
  return jnp.concatenate(pieces, axis=2).swapaxes(0, 1)


def _forward(layers, x_ref, *refs, form: _Form, blocks: Blocks, steps: int):
  """One grid step of `forward`; step 0 of a block of outputs starts from pool(x) @ offset."""
  refs, y_ref, sums = _unpack_refs(refs, steps)
  planes, (scale_ref, *refs) = refs[: form.planes], refs[form.planes :]
  table_ref = refs.pop(0) if form.levels != 'integer' else None

  def start():
    if not form.offset:
      return None
    pooled_ref, offset_ref = refs
    pooled, offset = pooled_ref[...], offset_ref[...]
    if pooled.dtype == jnp.bfloat16:
      return jnp.dot(pooled, exact.of_offset(offset), preferred_element_type=jnp.float32)
    return jnp.dot(pooled, offset, precision=_EXACT, preferred_element_type=jnp.float32)

  def add():
    scale = _own_rows(scale_ref, pl.program_id(2), blocks.inputs, form.group)
    if blocks.scaling == 'after':
      return _scaled_after(x_ref, planes, scale, table_ref, form, blocks)
    w = _dense(planes, scale, table_ref, form, blocks, x_ref.dtype)
    return jnp.dot(x_ref[...], w, precision=_precision(x_ref.dtype), preferred_element_type=jnp.float32)

  def finish(total):
    y_ref[...] = total.astype(y_ref.dtype)

  _accumulate(sums, steps, start, add, finish)


def _accumulate(sums, steps: int, start, add, finish):
  """finish(start() + add() + add() ...), one add() a step; `sums` holds what was added so far."""
  if steps == 1:
    first = start()
    finish(add() if first is None else first + add())
    return
  step = pl.program_id(2)

  @pl.when(step == 0)
  def _():
    first = start()
    sums[...] = jnp.zeros_like(sums) if first is None else first

  sums[...] += add()

  @pl.when(step == steps - 1)
  def _():
    finish(sums[...])


def _transpose(layers, dy_ref, *refs, form: _Form, blocks: Blocks, steps: int, outputs: int, whole: bool):
  """One grid step of `transpose`; the last of a block of inputs adds dy @ offset.T."""
  refs, dx_ref, sums = _unpack_refs(refs, steps)
  planes, (scale_ref, *refs) = refs[: form.planes], refs[form.planes :]
  table_ref = refs.pop(0) if form.levels != 'integer' else None

  def add():
    scale = _own_rows(scale_ref, pl.program_id(1), blocks.inputs, form.group) if whole else scale_ref[...]
    # Beyond the last output lies anything, NaN included: both factors are made 0 there.
    left = outputs - pl.program_id(2) * blocks.outputs if outputs % blocks.outputs else None
    w = _dense(planes, _before(left, scale), table_ref, form, blocks, dy_ref.dtype)
    dy = _before(left, dy_ref[...])
    across = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(dy, w, across, precision=_precision(dy.dtype), preferred_element_type=jnp.float32)

  def finish(total):
    if form.offset:
      total += _spread(refs[0][...], blocks.inputs)
    dx_ref[...] = total.astype(dx_ref.dtype)

  _accumulate(sums, steps, lambda: None, add, finish)


def _before(left, value):
  """`value` with zeros from column `left` on; itself where that is None."""
  if left is None:
    return value
  return jnp.where(jax.lax.broadcasted_iota(jnp.int32, value.shape, 1) < left, value, jnp.zeros_like(value))


def _unpack_refs(refs, steps: int):
  """The inputs, the output and, where there are several steps, the sums between them."""
  if steps == 1:
    *inputs, output = refs
    return inputs, output, None
  *inputs, output, sums = refs
  return inputs, output, sums


def _precision(dtype):
  return _EXACT if dtype == jnp.float32 else None


def _own_rows(scale_ref, step, block: int, group: int):
  """The scales [groups of a block, O] of block `step`, out of those of all groups."""
  count = _groups(block, group)
  if count == scale_ref.shape[0]:
    return scale_ref[...]
  if block < group:
    return scale_ref[pl.ds(jax.lax.div(step, group // block), 1), :]
  start = step * count
  if count % _SUBLANES == 0:
    return scale_ref[pl.ds(pl.multiple_of(start, _SUBLANES), count), :]
  # Several rows at once are read from the first of a register alone, a single one from anywhere.
  return jnp.concatenate([scale_ref[pl.ds(start + row, 1), :] for row in range(count)])


def _scaled_after(x_ref, planes, scale, table_ref, form: _Form, blocks: Blocks):
  """x @ (level * scale) [rows, outputs] of a block, the sums of every group scaled in float32.

  Levels must be exact in x's dtype.  Groups smaller than the MXU's depth share a pass of it: x is repeated for each
  of them, and 0 but for the inputs of its own group.
  """
  levels = _levels([plane[...] for plane in planes], table_ref, form, blocks.inputs).astype(x_ref.dtype)
  count, outputs = scale.shape
  group = blocks.inputs // count
  together = max(1, blocks.depth // group)
  rows, dtype = x_ref.shape[0], x_ref.dtype
  total = jnp.zeros((rows, outputs), jnp.float32)
  for at in range(0, count, together):
    # The last pass may hold fewer.
    here = min(together, count - at)
    inputs = slice(at * group, (at + here) * group)
    part = _apart(x_ref[:, inputs], here, group)
    sums = jnp.dot(part, levels[inputs], precision=_precision(dtype), preferred_element_type=jnp.float32)
    total += (sums.reshape(here, rows, outputs) * scale[at : at + here, None, :]).sum(0)
  return total


def _apart(x, count: int, group: int):
  """x [rows, count * group] -> [count * rows, count * group]: once for each group, 0 outside of it."""
  if count == 1:
    return x
  shape = (count, *x.shape)
  index, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 2))
  own = jax.lax.div(column, group) == index
  return jnp.where(own, x[None], jnp.zeros(shape, x.dtype)).reshape(count * x.shape[0], x.shape[1])


def _dense(planes, scale, table_ref, form: _Form, blocks: Blocks, dtype):
  """level * scale [inputs, outputs] of a block, in `dtype`."""
  levels = _levels([plane[...] for plane in planes], table_ref, form, blocks.inputs)
  count, outputs = scale.shape
  by_group = levels.astype(jnp.float32).reshape(count, blocks.inputs // count, outputs)
  return (by_group * scale[:, None, :]).reshape(blocks.inputs, outputs).astype(dtype)


def _levels(planes, table_ref, form: _Form, inputs: int):
  """The levels [inputs, outputs] of a block of codes: narrow integers or float32."""
  if form.levels != 'integer':
    codes = pltpu.bitcast(planes[0], jnp.uint4)[:inputs].astype(jnp.int32)
    table = jnp.broadcast_to(table_ref[...], (inputs, _LANES))
    columns = range(0, codes.shape[1], _LANES)
    return jnp.concatenate([jnp.take_along_axis(table, codes[:, at : at + _LANES], axis=1) for at in columns], axis=1)
  if form.bits != 3:
    return pltpu.bitcast(planes[0], _NARROW[form.bits])[:inputs]
  low, high = planes
  low = pltpu.bitcast(low, jnp.uint2).astype(jnp.float32)[:inputs]
  words, outputs = high.shape
  repeated = jnp.broadcast_to(high[:, None, :], (words, qtensor.WORD, outputs))
  bit = jnp.uint32(1) << jax.lax.broadcasted_iota(jnp.uint32, repeated.shape, 1)
  negative = ((repeated & bit) != 0).reshape(words * qtensor.WORD, outputs)[:inputs]
  return low - jnp.where(negative, 4.0, 0.0)


def _spread(pieces, inputs: int):
  """[rows, 3 * groups] of `_by_block` -> [rows, inputs]: to every input its group's number, exactly, by the MXU."""
  groups = pieces.shape[1] // 3
  row, column = (jax.lax.broadcasted_iota(jnp.int32, (3 * groups, inputs), axis) for axis in (0, 1))
  own = jax.lax.rem(row, groups) == jax.lax.div(column, inputs // groups)
  return jnp.dot(pieces, own.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
