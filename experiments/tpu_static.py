"""Question: how close do the TPU kernels come to the machine's limits, by the compiler's own schedule?

    python -m experiments.tpu_static [--chip=v5e] [WORD ...]

No TPU is needed and none is used: libtpu compiles every kernel for v5e, v6e and v5p as `kernels.tpu` plans it, and says
in undocumented dumps which bundle of instructions issues in which cycle.  WORDs choose cases whose names have all of
them.  Read from the schedule, per step of a kernel's grid, stalls included (bundles left empty because something is
waited for; the last dump folds them away, this counts them):

    cycles   what a step takes; a part that only the first or last of several steps runs counts with its share
    mxu      multiply-adds of the whole product over those of the MXUs in a cycle, over steps
    hbm      cycles in which memory moves what the pipeline fetches and writes, over steps
    bound    the larger of mxu and of what memory takes if everything is moved once
    reached  bound over the larger of cycles and hbm: 1 is the machine's limit

Offsets count as overhead: forward, the MXU multiplies them in four pieces of bfloat16 (4 / group of its work, an eighth
in groups of 32); backward, a pass of it spreads what was multiplied before.

What no schedule shows: waiting for memory inside a step, the first fetch (one more hbm) and the last write, fetching
instructions, clocks under load, and what XLA does around the kernels (pooling, padding, the backward pass's product
with offsets).  So it is a lower bound of the time, good for comparing blocks.
Writes experiments/results/tpu_static.{json,md} unless WORDs or a chip were given.
"""

from collections.abc import Iterator
import concurrent.futures
import dataclasses
import functools
import math
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax import report
from qalora_jax import topologies
from qalora_jax.kernels import product
from qalora_jax.kernels import tpu
from qalora_jax.quant import qtensor

RESULTS = pathlib.Path(__file__).resolve().parent / 'results' / 'tpu_static'
# A stack so large that it lies in HBM, as a model's does; the compiler keeps small operands in VMEM.
LAYERS = 32
# The last dump of the schedule before empty bundles are folded away.
STAGE = 'packed-bundles-post-ra'
KERNELS = {'forward': tpu.forward, 'backward': tpu.transpose}


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one core can do: published bfloat16 FLOP/s and bytes/s, and the multiply-adds of its MXUs in a cycle.

  The clock follows from the first and the last.
  """

  flops: float
  bandwidth: float
  multiply_adds: int

  @property
  def clock(self) -> float:
    return self.flops / 2 / self.multiply_adds


# Google Cloud's figures a chip; v5p has two cores.  Four MXUs of 128 x 128, or two of 256 x 256 that take two rows a
# cycle (a `vmatmul` of 16 rows occupies one for 8 cycles).
LIMITS = {
  'v5e': Limits(197e12, 819e9, 4 * 128 * 128),
  'v6e': Limits(918e12, 1640e9, 2 * 2 * 256 * 256),
  'v5p': Limits(459e12 / 2, 2765e9 / 2, 4 * 128 * 128),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """A product on a chip."""

  chip: str
  kernel: str
  form: qtensor.Form
  rows: int
  shape: tuple[int, int]

  def __str__(self):
    form = self.form.levels if self.form.levels != 'integer' else f'{self.form.bits}-bit'
    inputs, outputs = self.shape
    return f'{self.chip} {self.kernel} {form} g{self.form.group} {self.rows}x{inputs}x{outputs}'


def cases() -> Iterator[Case]:
  """Training products of 4096 x 4096 and decode steps of LLaMA-7B's shapes."""
  four = [qtensor.Form(4, group) for group in (32, 64, 128)]
  others = [*(qtensor.Form(bits, 32) for bits in (8, 3, 2)), qtensor.Form(4, 64, 'nf4', offset='none')]
  for chip in LIMITS:
    for form in four + others:
      for kernel in KERNELS:
        yield Case(chip, kernel, form, 2048, (4096, 4096))
    for shape in ((4096, 11008), (4096, 4096), (11008, 4096)):
      for form in [four[0], four[2]] + others * (shape == (4096, 11008)):
        yield Case(chip, 'forward', form, 16, shape)


def measure(place: str, case: Case, blocks=None) -> dict:
  """The row of a case, compiled in this process, after `_begin(place)`; `blocks` instead of those planned."""
  w = jax.eval_shape(case.form, jax.ShapeDtypeStruct((LAYERS, *case.shape), jnp.float32))
  w = jax.eval_shape(qtensor.in_stack, w, jax.ShapeDtypeStruct((), jnp.int32))
  inputs, outputs = case.shape
  transposed = case.kernel == 'backward'
  x = jax.ShapeDtypeStruct((case.rows, outputs if transposed else inputs), jnp.bfloat16)
  with jax.set_mesh(topologies.chip(case.chip)):
    blocks = blocks or tpu.plan(product.Product.of(x, w, transposed), product.device())
    function = functools.partial(KERNELS[case.kernel], blocks=blocks, out_dtype=jnp.bfloat16)
    for path in _dumps(place).iterdir():
      path.unlink()
    topologies.compiled(function, x, w)
    program = jax.make_jaxpr(function)(x, w)
  grid, moved, once = traffic(program)
  limits, steps = LIMITS[case.chip], math.prod(grid)
  in_cycles = lambda count: count / limits.bandwidth * limits.clock / steps
  text = _dump(place)
  found = cycles(text, grid[-1])
  mxu, hbm = case.rows * inputs * outputs / limits.multiply_adds / steps, in_cycles(moved)
  bound = max(mxu, in_cycles(once))
  return {
    'case': str(case), 'blocks': f'{blocks.rows}x{blocks.inputs}x{blocks.outputs} {blocks.scaling}',
    'steps': steps, 'cycles': round(found), 'mxu': round(mxu), 'hbm': round(hbm),
    'limited_by': 'mxu' if bound == mxu else 'hbm', 'bound': round(bound), 'reached': bound / max(found, hbm),
  }  # fmt: skip


def cycles(text: str, steps: int) -> float:
  """Bundles of one pass through the only loop of a schedule, that of the grid.

  What a branch skips is run in one of `steps` passes (the first or the last along the sum), but for the pipeline's own
  guard around all work, which is always passed.
  """
  bundles = re.split(r'^ *(?=(?:0|0x[0-9a-f]+) +(?:[A-Z]{2})? *:)', text, flags=re.MULTILINE)[1:]
  within = [number for number, bundle in enumerate(bundles) if re.match(r'\w+ +(?:[A-Z]{2})? *: *>', bundle)]
  branches = [
    (number, int(match[1]))
    for number, bundle in enumerate(bundles)
    for match in re.finditer(r'sbr\.rel \([^)]*\) target bundleno = (\d+)', bundle)
  ]
  backward = [target for number, target in branches if target <= number]
  if len(backward) > 1:
    raise RuntimeError('the schedule has loops within the loop over the grid; how often they run it does not say.')
  if not backward:
    within = range(len(bundles))
  whole = within[-1] + 1 - within[0]
  skipped = [range(number + 1, target) for number, target in branches if number < target and number in within]
  rare = set().union(*(bundles for bundles in skipped if len(bundles) < whole / 2))
  return whole - len(rare) * (1 - 1 / steps)


def traffic(program) -> tuple[tuple[int, ...], int, int]:
  """(grid, bytes that the pipeline moves, bytes of every block once) of the Pallas kernel in a traced program.

  The pipeline moves a block whenever its place is another than in the step before.
  """
  (call,) = (equation for equation in program.jaxpr.eqns if equation.primitive.name == 'pallas_call')
  mapping = call.params['grid_mapping']
  grid = tuple(mapping.grid)
  points = jnp.stack(jnp.meshgrid(*map(jnp.arange, grid), indexing='ij'), -1).reshape(-1, len(grid))
  prefetched = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in call.invars[: mapping.num_index_operands]]
  moved = once = 0
  for block in mapping.block_mappings:
    place = lambda point, block=block: jnp.stack(block.compute_start_indices_interpret(tuple(point), *prefetched))
    places = np.asarray(jax.vmap(place)(points))
    fetches = 1 + int((places[1:] != places[:-1]).any(-1).sum())
    extent = [getattr(size, 'block_size', size) for size in block.block_shape]
    extent = [size if isinstance(size, int) else 1 for size in extent]
    size = math.prod(extent) * block.array_aval.dtype.itemsize
    moved += fetches * size
    once += len(np.unique(places, axis=0)) * size
  return grid, moved, once


def _dumps(place: str) -> pathlib.Path:
  """Where this process's libtpu dumps."""
  return pathlib.Path(place, str(os.getpid()))


def _dump(place: str) -> str:
  """What libtpu wrote of the kernel after STAGE."""
  found = [path for path in _dumps(place).glob(f'*-qmatmul*-{STAGE}.txt') if 'schedule-analysis' not in path.name]
  if len(found) != 1:
    raise RuntimeError(
      f'libtpu wrote {len(found)} schedules ({STAGE}) of a kernel; its dumps are undocumented and may have changed.'
    )
  return found[0].read_text()


def _begin(place: str) -> None:
  """A worker's start: libtpu reads its flags once, while it loads."""
  _dumps(place).mkdir()
  flags = (
    f'--xla_jf_dump_to={_dumps(place)}',
    '--xla_jf_dump_llo_text=true',
    f'--xla_jf_dump_llo_pass_label_regex={STAGE}',
  )
  os.environ['LIBTPU_INIT_ARGS'] = ' '.join((os.environ.get('LIBTPU_INIT_ARGS', ''), *flags))


def main() -> None:
  """Measures, stores and renders."""
  if not topologies.installed():
    sys.exit("libtpu is not installed: pip install 'qalora_jax[aot-tpu]' (Linux on x86-64).")
  words = [word.removeprefix('--chip=') for word in sys.argv[1:]]
  chosen = [case for case in cases() if all(word in str(case).split() for word in words)]
  spawned = multiprocessing.get_context('spawn')
  workers = functools.partial(concurrent.futures.ProcessPoolExecutor, os.cpu_count(), spawned, _begin)
  with tempfile.TemporaryDirectory() as place, workers((place,)) as pool:
    try:
      rows = list(pool.map(functools.partial(measure, place), chosen))
    except concurrent.futures.process.BrokenProcessPool:
      sys.exit('libtpu ended its process while it loaded: it does not know the flags --xla_jf_dump_* any more.')
  if words:
    report.show('TPU kernels by their schedule', rows)
    return
  limits = {chip: f'{l.flops:.3g} FLOP/s, {l.bandwidth:.4g} B/s, {l.clock / 1e9:.2f} GHz' for chip, l in LIMITS.items()}
  report.publish(RESULTS, 'TPU kernels by their schedule', 'python -m experiments.tpu_static', rows, **limits)


if __name__ == '__main__':
  main()
