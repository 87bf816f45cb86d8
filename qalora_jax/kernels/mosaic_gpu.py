"""x @ dequantize(w) fused for Hopper, in Pallas Mosaic GPU: decoding and small batches, bound by reading the codes.

The canonical planes are read as they lie, whole stacks too; no second layout of the weights exists.  A program
(thread block) makes [rows, 64 * warpgroups] of y from `steps` blocks of 256 inputs; one warpgroup more fetches:

    acc [64 outputs, rows] += fragments(words, scale) [64, 256]  @  x.T [256, rows]        wgmma, float32 sums

* Words come to shared memory as [8 units, outputs], a unit being 32 inputs (see `fragments`), and are read from there
  across, [outputs, units], without bank conflicts: the 128-byte swizzle spreads the four rows that a warp reads.
* The codes, or a codebook's levels (in two bfloat16 parts), times their scales, rounded once to bfloat16, are A, in
  registers; x, put into the fragments' order by XLA beforehand (`arrange`), is B, in shared memory.
* pool(x) @ offset is in the same accumulator to float32's accuracy: both are split into three bfloat16 numbers, and
  eight of the nine products of parts are 64 columns more of the same product.  The ninth is below 2^-32.
* Where outputs are too few to occupy the chip, inputs are split, and XLA adds the float32 partial sums.

Backward in x, and many rows, are cheaper dequantized and multiplied by cuBLAS: `transpose` is xla's.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax.kernels import fragments
from qalora_jax.kernels import xla
from qalora_jax.kernels.product import Device
from qalora_jax.kernels.product import Product
from qalora_jax.kernels.product import Refused
from qalora_jax.quant import double
from qalora_jax.quant import qtensor

# Rows up to which this is expected to beat dequantizing and cuBLAS.  Predicted from an H100's published rates, not
# measured; `experiments/bench_qmatmul.py` measures it.
FUSED = 256

_HOPPER = re.compile(r'\b(G?H[12]00|H800|H20)\b')
# The version that Pallas Mosaic GPU is written for here: layouts of loads, whole kernels as one function.
_JAX = (0, 11)
# What a multiprocessor has: bytes of shared memory for one program, less what barriers take.
_SHARED = 227 * 1024 - 2048
# Those of a chip, by its name, where they are not an H100's with SXM.
_MULTIPROCESSORS = {'H100 PCIe': 114, 'H800 PCIe': 114, 'H20': 78}
_USUAL_MULTIPROCESSORS = 132
# A multiprocessor's cycle: bytes from HBM and from the L2 cache, and products of the tensor cores.
_HBM, _L2, _PRODUCTS = 20, 40, 2048
# And instructions of a lane, by the warpgroups that hide each other's latencies; what a weight takes of them, by bits:
# counted in the code that ptxas makes of the loop.
_LANES = {1: 50, 2: 85, 4: 110}
# The most rows of a program, by its warpgroups: with more sums ptxas spills registers, or lets no two products of the
# tensor cores overlap.  A codebook is in registers too.
_ROWS = {1: 128, 2: 128, 4: 80}
_ROWS_BY_CODEBOOK = {**_ROWS, 4: 64}
_INSTRUCTIONS = {8: 4.4, 4: 3.9, 3: 5.3, 2: 3.9}
# By the size of the assembled kernel, against that of four bits.
_INSTRUCTIONS_BY_CODEBOOK = 8.7
# Cycles until a program's first words arrive.
_LATENCY = 2000


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How a product is cut: rows of x and warpgroups (of 64 outputs) of a program, blocks of 256 inputs in each of the
  `splits` of the inputs, stages of shared memory."""

  rows: int
  warpgroups: int
  steps: int
  splits: int
  stages: int


def worthwhile(product: Product, device: Device) -> bool:
  """Whether it is expected to beat dequantizing and cuBLAS."""
  return bool(_HOPPER.search(device.kind)) and not product.transposed and product.rows <= FUSED


def plan(product: Product, device: Device) -> Blocks | None:
  """The blocks with the least time by the rates above; Refused where sizes, dtype, chip or jax do not allow any."""
  if jax.__version_info__ < _JAX:
    raise Refused(f'it needs jax >= {".".join(map(str, _JAX))}, this is {jax.__version__}; take impl=None.')
  if device.platform != 'gpu' or not _HOPPER.search(device.kind):
    kind = device.kind or device.platform
    raise Refused(f"it is written for Hopper's wgmma (H100, H200), not for {kind!r}; take impl=None.")
  if product.transposed:
    return None
  if product.dtype != 'bfloat16':
    reason = 'would be TF32' if product.dtype == 'float32' else 'is not what its registers hold'
    raise Refused(f"it multiplies bfloat16; {product.dtype} {reason}; cast x, or take impl='xla'.")
  group, block = product.group, fragments.BLOCK
  if group % fragments.UNIT or (block % group and group % block and group != product.inputs):
    raise Refused(f'groups of {group} do not meet its blocks of {block} inputs; take groups of 32, 64, 128 or 256.')
  if product.inputs % block or product.outputs % 64:
    raise Refused(
      f'[{product.inputs}, {product.outputs}] is not of whole blocks of {block} inputs and 64 outputs; take impl=None.'
    )
  return min(_candidates(product), key=lambda blocks: _cycles(product, blocks, _multiprocessors(device)))


def _multiprocessors(device: Device) -> int:
  named = (count for name, count in _MULTIPROCESSORS.items() if re.search(rf'\b{name}\b', device.kind))
  return next(named, _USUAL_MULTIPROCESSORS)


def _candidates(product: Product):
  """Every Blocks that fits into shared memory."""
  of_inputs = product.inputs // fragments.BLOCK
  most = _ROWS if product.levels == 'integer' else _ROWS_BY_CODEBOOK
  for warpgroups in _LANES:
    # Blocks of equal rows, the fewest that registers allow or of 64 at most.
    for blocks in sorted({-(-product.rows // 64), -(-product.rows // most[warpgroups])}):
      rows = 8 * -(-product.rows // (8 * blocks))
      stages = _SHARED // sum(_stage(product, rows, warpgroups))
      if product.outputs % (64 * warpgroups) or stages < 2:
        continue
      for steps in sorted({-(-of_inputs // splits) for splits in range(1, of_inputs + 1)}):
        yield Blocks(rows, warpgroups, steps, -(-of_inputs // steps), max(2, min(stages, steps, 6)))


def _stage(product: Product, rows: int, warpgroups: int) -> tuple[int, int]:
  """The bytes of weights and of x in one stage."""
  outputs = 64 * warpgroups
  by_group = 4 * max(1, fragments.BLOCK // product.group) * (2 if product.offset else 1)
  columns = fragments.BLOCK + (fragments.CHUNK if product.offset else 0)
  return outputs * (fragments.BLOCK * product.bits // 8 + by_group), 2 * rows * columns


def _cycles(product: Product, blocks: Blocks, multiprocessors: int) -> float:
  """The cycles of the whole product, predicted from the chip's rates."""
  weights, x = _stage(product, blocks.rows, blocks.warpgroups)
  by_rows = -(-product.rows // blocks.rows)
  programs = by_rows * product.outputs // (64 * blocks.warpgroups) * blocks.splits
  waves = -(-programs // multiprocessors)
  per_block = 64 * blocks.warpgroups * fragments.BLOCK
  instructions = _INSTRUCTIONS[product.bits] if product.levels == 'integer' else _INSTRUCTIONS_BY_CODEBOOK
  step = max(
    weights / by_rows / _HBM,
    (weights + x) / _L2,
    per_block * instructions / _LANES[blocks.warpgroups],
    per_block * blocks.rows / _PRODUCTS,
  )
  # Partial sums are written and read once more, by another kernel.
  sums = 8 * blocks.splits * product.rows * product.outputs / _HBM / multiprocessors if blocks.splits > 1 else 0
  return waves * (blocks.steps * step + _LATENCY) + sums + (_LATENCY if blocks.splits > 1 else 0)


def forward(x, w: qtensor.QTensor, blocks: Blocks, *, out_dtype, interpret=False):
  """x [..., I] bfloat16 @ dense(w) -> [..., O] in out_dtype."""
  inputs, outputs = w.shape[-2:]
  rows = x.reshape(-1, inputs)
  count = rows.shape[0]
  rows = jnp.pad(rows, ((0, -count % blocks.rows), (0, 0)))
  # Words of a unit side by side: the same bytes in the same order.
  by_unit = lambda plane: plane.reshape(*plane.shape[:-2], inputs // fragments.UNIT, -1, outputs)
  operands = {} if w.layer is None else {'layer': w.layer.reshape(1)}
  operands |= {f'plane{at}': by_unit(plane) for at, plane in enumerate(w.planes)}
  operands['scale'] = qtensor.scales(w) if isinstance(w.scale, double.Doubled) else w.scale
  operands |= {} if w.offset is None else {'offset': w.offset}
  operands['x'] = arrange(rows, w.bits, w.levels, w.offset is not None)
  partial = _multiply(operands, blocks, w.bits, w.levels, w.group, out_dtype, interpret)
  y = partial[0] if blocks.splits == 1 else partial.sum(0)
  return y[:count].astype(out_dtype).reshape(*x.shape[:-1], outputs)


def transpose(dy, w: qtensor.QTensor, blocks: None, *, out_dtype, interpret=False):
  """dy [..., O] @ dense(w).T -> [..., I], by `xla`."""
  return xla.transpose(dy, w, out_dtype=out_dtype)


def arrange(x, bits: int, levels: str, offset: bool) -> jax.Array:
  """x [M, I] bfloat16 in the order of the fragments; with an offset, 64 columns of its sums after every 256."""
  by_block = x.reshape(x.shape[0], -1, fragments.BLOCK)
  arranged = jnp.take(by_block, fragments.order(bits, levels), axis=-1)
  if offset:
    of_unit = by_block.reshape(*by_block.shape[:2], fragments.UNITS, fragments.UNIT).astype(jnp.float32)
    # Term by term it is one kernel with the rest; a reduction would be one more to launch.
    sums = functools.reduce(jnp.add, [of_unit[..., at] for at in range(fragments.UNIT)])
    parts = []
    for _ in range(3):
      # XLA would take a conversion there and back for none.
      parts.append(jax.lax.reduce_precision(sums, 8, 7))
      sums = sums - parts[-1]
    columns = jnp.concatenate([parts[at] for _, at in fragments.PARTS], axis=-1).astype(x.dtype)
    arranged = jnp.concatenate([arranged, columns], axis=-1)
  return arranged.reshape(x.shape[0], -1)


def _multiply(operands: dict, blocks: Blocks, bits: int, levels: str, group: int, out_dtype, interpret: bool):
  """The kernel: {'layer': [1] (for a stack), 'plane0': [.., I / 32, words, O], .., 'scale': [.., L, O],
  'offset': [L, O] (where there is one), 'x': arranged [M, ..]} -> [splits, M, O], in float32 where splits > 1."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  warpgroups, outputs = blocks.warpgroups, 64 * blocks.warpgroups
  by_group = max(1, fragments.BLOCK // group)
  columns = fragments.BLOCK + (fragments.CHUNK if 'offset' in operands else 0)
  rows, of_blocks = operands['x'].shape[0], operands['x'].shape[1] // columns
  counts = [count for name, plane in operands.items() if name.startswith('plane') for count in plane.shape[-2:-1]]
  # wgmma's own layout, but loaded number by number: in memory the next unit is a row away.
  across = plgpu.Layout._WGMMA_ACC_32BIT

  def kernel(*refs):
    given = dict(zip((*operands, 'y', 'through'), refs, strict=False))
    own, split = jax.lax.axis_index('warpgroup'), jax.lax.axis_index('split')
    # Columns of the stage that are this warpgroup's, the program's outputs and rows, and its first block of inputs.
    mine, at_output, first = pl.ds(64 * own, 64), outputs * jax.lax.axis_index('outputs'), split * blocks.steps
    ours, those = pl.ds(at_output, outputs), pl.ds(blocks.rows * jax.lax.axis_index('rows'), blocks.rows)
    layer = (given['layer'][0],) if 'layer' in given else ()
    through = given['through'].at[own] if interpret else None

    def weights(chunk, scale, words):
      if interpret:
        return fragments.weights_of(bits, levels, chunk, words, scale)
      return _fragment(plgpu, across, functools.partial(_weights, bits, levels, chunk), scale, *words)

    def offsets(offset):
      return fragments.offsets_of(offset) if interpret else _fragment(plgpu, across, _offsets, offset)

    def by_unit(ref):
      """The numbers of every unit's group, float32 [64, 8]."""
      if by_group == fragments.UNITS:
        return plgpu.load(ref.at[:, mine].T, layout=across).astype(jnp.float32)
      unit = plgpu.broadcasted_iota(jnp.int32, (64, fragments.UNITS), 1, layout=across)
      found = None
      for at in reversed(range(by_group)):
        one = plgpu.load(ref.at[at, mine], layout=across.reduce(1)).astype(jnp.float32)
        one = plgpu.layout_cast(jax.lax.broadcast_in_dim(one, (64, fragments.UNITS), (0,)), across)
        found = one if found is None else jnp.where(unit < (at + 1) * (fragments.UNITS // by_group), one, found)
      return found

    def block(_, *held):
      *held, sums = held
      held = dict(zip(sources, held, strict=True))
      words = [held[name] for name in sources if name not in ('scale', 'offset', 'x')]
      loaded, factor = {}, by_unit(held['scale'])
      for chunk in range(columns // fragments.CHUNK):
        if chunk < fragments.CHUNKS:
          named = fragments.words(bits, chunk)
          for at in named:
            if at not in loaded:
              loaded[at] = plgpu.load(words[at].at[:, mine].T, layout=across)
          fragment = weights(chunk, factor, [loaded[at] for at in named])
        else:
          fragment = offsets(by_unit(held['offset']))
        if interpret:
          # The interpreter has no product with A in registers.
          through[...] = fragment
          plgpu.commit_smem()
          fragment = through
        plgpu.wgmma(sums, fragment, held['x'].at[:, pl.ds(fragments.CHUNK * chunk, fragments.CHUNK)].T)
        # The next fragment is made while this one is multiplied.
        plgpu.wgmma_wait(0 if interpret else 1)
      plgpu.wgmma_wait(0)
      return sums

    def program(run):
      @functools.partial(pl.run_scoped, sums=plgpu.ACC((64, blocks.rows), jnp.float32))
      def _(sums):
        run(sums)
        y = sums[...] if interpret else _one_by_one(plgpu, across, sums[...])
        there = given['y'].at[split, those, pl.ds(at_output + 64 * own, 64)]
        # Eight neighbouring outputs of a row, a sector of 32 bytes, are written at once.
        _store(plgpu, there.T, y.astype(given['y'].dtype))

    # {operand: (its part in global memory, the shape of a stage, where a step finds it, how it lies in shared memory)}
    swizzled = lambda ref: _swizzled(plgpu, ref.dtype)
    sources = {
      f'{name}_{at}': (given[name].at[(*layer, slice(None), at, ours)], (8, outputs), lambda k: (first + k, 0), True)
      for name, count in zip([name for name in given if name.startswith('plane')], counts, strict=True)
      for at in range(count)
    }
    of_group = (lambda k: (first + k, 0)) if by_group > 1 else (lambda k: ((first + k) * fragments.BLOCK // group, 0))
    for name in ('scale', 'offset'):
      if name in given:
        stacked = layer if given[name].ndim == 3 else ()
        part = given[name].at[(*stacked, slice(None), ours)]
        sources[name] = (part, (by_group, outputs), of_group, by_group == fragments.UNITS)
    sources['x'] = (given['x'].at[those], (blocks.rows, columns), lambda k: (0, first + k), True)
    specs = [
      plgpu.BlockSpec(shape, where, transforms=swizzled(part) if lies else ())
      for part, shape, where, lies in sources.values()
    ]
    whole = of_blocks % blocks.steps == 0
    pipeline = plgpu.emit_pipeline_warp_specialized(
      block,
      grid=(blocks.steps if whole else jnp.minimum(blocks.steps, of_blocks - first),),
      # As many as issuing a stage's copies takes; with fewer they would be spilled.
      memory_registers=80,
      in_specs=specs,
      wg_axis='warpgroup',
      num_compute_wgs=warpgroups,
      max_concurrent_steps=blocks.stages,
      compute_context=program,
    )
    pipeline(*(part for part, *_ in sources.values()))

  shape = (blocks.splits, rows, operands['scale'].shape[-1])
  scratch = plgpu.SMEM((warpgroups, 64, fragments.CHUNK), jnp.bfloat16, transforms=_swizzled(plgpu, jnp.bfloat16))
  call = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct(shape, out_dtype if blocks.splits == 1 else jnp.float32),
    grid=(blocks.splits, shape[-1] // outputs, rows // blocks.rows),
    grid_names=('split', 'outputs', 'rows'),
    num_threads=warpgroups + 1,
    thread_name='warpgroup',
    scratch_types=[scratch] if interpret else [],
    kernel_name='qmatmul_mosaic_gpu',
  )
  if not interpret:
    return call(*operands.values())
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
    return call(*operands.values())


def _store(plgpu, ref, value):
  """ref[...] = value; ref is in global memory, and its last axis is not the one along which it is contiguous."""
  if hasattr(plgpu, 'store'):
    plgpu.store(ref, value, optimized=False)
  else:  # jax 0.11
    ref[...] = value


def _swizzled(plgpu, dtype):
  """Rows of 128 bytes, eight to a tile, whose 16-byte pieces change places so that columns are read at full speed."""
  return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def _weights(bits, levels, chunk, machine, scale, *words):
  """The tiles of a chunk of codes times their scales; each argument has two units, as has each thread."""
  held = list(zip(*words, strict=True))
  return [
    tile for unit in range(2) for tile in fragments.weights(machine, bits, levels, chunk, held[unit], scale[unit])
  ]


def _offsets(machine, offset):
  """The tiles of parts of offsets that meet those of sums of x."""
  parts = fragments.parts(machine, *offset)
  return [parts[at] for at, _ in fragments.PARTS]


def _fragment(plgpu, across, program, *arrays):
  """`program` of a machine and, for each of `arrays` [64, 8], two registers -> its eight tiles, bfloat16 [64, 64]."""
  from jax.experimental.mosaic import gpu as mgpu
  from jaxlib.mlir.dialects import vector

  @plgpu.inline_mgpu(
    arg_types=(across,) * len(arrays),
    return_type=plgpu.ShapeDtypeStruct((64, fragments.CHUNK), jnp.bfloat16, layout=plgpu.Layout.WGMMA),
  )
  def emit(_, *arrays):
    machine, layout = _Registers(), plgpu.Layout.WGMMA.to_mgpu()
    made = np.empty(layout.registers_shape((64, fragments.CHUNK)), dtype=object)
    by_half = made.reshape(-1, 2)
    for half in range(2):  # A thread has rows r and r + 8.
      own = [[vector.extract(one, [], [0]) for one in array.registers.reshape(2, 2)[half]] for array in arrays]
      by_half[:, half] = [machine.pair(tile) for tile in program(machine, *own)]
    return mgpu.FragmentedArray(_registers=made, _layout=layout, _is_signed=None)

  return emit(*arrays)


def _one_by_one(plgpu, across, array):
  """float32 [64, M], the same numbers in the same threads, to be stored number by number."""
  from jax.experimental.mosaic import gpu as mgpu
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import vector

  returned = plgpu.ShapeDtypeStruct(array.shape, jnp.float32, layout=across)

  @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=returned)
  def emit(_, array):
    layout = across.to_mgpu()
    made = np.empty(layout.registers_shape(tuple(array.shape)), dtype=object)
    one = ir.VectorType.get((1,), ir.F32Type.get())
    pairs = array.registers.reshape(-1)
    made.reshape(-1)[:] = [vector.broadcast(one, vector.extract(pair, [], [at])) for pair in pairs for at in range(2)]
    return mgpu.FragmentedArray(_registers=made, _layout=layout, _is_signed=None)

  return emit(array)


class _Registers:
  """The machine of `fragments` whose registers are those of an NVIDIA GPU, as values of MLIR."""

  def __init__(self):
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith
    from jaxlib.mlir.dialects import llvm

    self._arith, self._llvm = arith, llvm
    self._word, self._float = ir.IntegerType.get_signless(32), ir.F32Type.get()
    self._pair = ir.VectorType.get((2,), ir.BF16Type.get())
    self._zero = self.right(self._assembled(self._word, 'mov.u32 $0, %ctaid.x;', '=r'), 30)

  def _value(self, a):
    return self._arith.constant(self._word, a - (a >> 31 << 32)) if isinstance(a, int) else a

  def _assembled(self, result, code, constraints, *operands):
    return self._llvm.inline_asm(result, list(operands), code, constraints, has_side_effects=False)

  def pair(self, a):
    return self._llvm.bitcast(self._pair, self._value(a))

  def both(self, a, bits):
    return self._arith.andi(a, self._value(bits))

  def _kept(self, a):
    """A constant that stays in its register.

    An instruction has place for one constant; ptxas would move a second into a register before each of them, an
    instruction more for two weights.  It cannot know that no grid has 2^30 programs.
    """
    return self._arith.ori(self._zero, self._value(a)) if isinstance(a, int) else a

  def either(self, a, b):
    return self._arith.ori(a, self._kept(b))

  def differ(self, a, b):
    return self._arith.xori(a, self._kept(b))

  def left(self, a, n):
    return self._arith.shli(a, self._value(n)) if n else a

  def right(self, a, n):
    return self._arith.shrui(a, self._value(n)) if n else a

  def permute(self, a, b, selector):
    code, constraints = 'prmt.b32 $0, $1, $2, $3;', '=r,r,r,r'
    return self._assembled(self._word, code, constraints, self._kept(a), self._kept(b), self._value(selector))

  def pack(self, low, high):
    return self._assembled(self._word, 'cvt.rn.bf16x2.f32 $0, $1, $2;', '=r,f,f', high, low)

  def low(self, p):
    return self._llvm.bitcast(self._float, self.left(p, 16))

  def high(self, p):
    return self._llvm.bitcast(self._float, self.both(p, 0xFFFF0000))

  def minus(self, a, b):
    return self._arith.subf(a, b)

  def _paired(self, result):
    return self._llvm.bitcast(self._word, result)

  def subtract(self, p, q):
    return self._paired(self._arith.subf(self.pair(p), self.pair(q)))

  def times(self, p, q):
    return self._paired(self._arith.mulf(self.pair(p), self.pair(q)))

  def fused(self, p, q, r):
    return self._paired(self._llvm.intr_fma(self.pair(p), self.pair(q), self.pair(r)))
