"""Question: who multiplies by packed weights fastest, how near the machine's limit, and up to how many rows?

    python -m experiments.bench_qmatmul [--shapes=4096x11008,...] [--rows=1,16,...] [--bits=4,nf4] [--groups=32]
        [--impls=xla,...] [--directions=forward,backward] [--rounds=30] [--minutes=9] [--out=PATH]

It needs jax, flax and numpy alone (`python experiments/bench_qmatmul.py` does as well), on whatever device there is.
In every case stand side by side, in turn in every round: the dense product (bfloat16; float32 on a CPU), `xla`
(dequantize, then a dense product) and each fused implementation that the plan does not refuse there.

A program makes many products, one after the other, with inputs and weights of their own, and is launched several times
before it is waited for: so the time of one product has next to nothing of the dispatch in it, and all that is read in
between is beyond the last cache.  Every timed program's results are held against a float32 product, by `deviation`.
Stored is, for every case and implementation,

    us          the median over the rounds of the time of one product, in microseconds (and `fastest_us`)
    bytes       packed weights + scales + offsets + x + y
    flops       2 M K N (1 + 1 / group), without the 1 / group where there are no offsets
    roofline    the time that those take at the copy bandwidth or the matrix peak, whichever is more, over `us`;
                both limits are measured in the same run
    to_dense    `us` over that of the dense product

and at the end, for a plan's tables, the rows up to which each fused implementation beats `xla`.
Writes PATH.json after every case, PATH.md and, with matplotlib, PATH.png; PATH is
experiments/results/bench_qmatmul-DEVICE by default.  `--minutes` ends it early, with the cases done so far.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import functools
import itertools
import math
import pathlib
import re
import shlex
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

if not __package__:
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from qalora_jax.kernels import plan
from qalora_jax.kernels import product as product_lib
from qalora_jax.kernels import qmatmul
from qalora_jax.quant import qtensor

RESULTS = pathlib.Path(__file__).resolve().parent / 'results'
BITS = ('8', '4', '3', '2', 'nf4')
DIRECTIONS = ('forward', 'backward')
DENSE = 'dense'


@dataclasses.dataclass(frozen=True)
class Scale:
  """What is measured where nothing else is said, and how much at once.

  cache: bytes that all inputs and weights together must exceed; `products` in one program, at most; `copied` bytes and
  a `peak` x `peak` matrix for the machine's limits; `seconds` that the launches of one round take at least.
  """

  shapes: tuple[str, ...]
  rows: tuple[int, ...]
  bits: tuple[str, ...]
  groups: tuple[int, ...]
  rounds: int
  dtype: str
  cache: int
  products: int
  copied: int
  peak: int
  seconds: float


# LLaMA-7B's projections, alone and side by side, and a small model's; caches of an H200 (L2) and of a TPU (VMEM).
_LARGE = Scale(
  shapes=('4096x4096', '4096x12288', '4096x22016', '11008x4096', '4096x11008', '288x768', '768x2048'),
  rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 4096, 8192), bits=BITS, groups=(32, 128), rounds=30,
  dtype='bfloat16', cache=128 * 2**20, products=64, copied=2**30, peak=8192, seconds=5e-3,
)  # fmt: skip
SCALES = {
  'gpu': _LARGE,
  'tpu': _LARGE,
  'cpu': Scale(
    shapes=('288x768', '2048x5632'),
    rows=(1, 16, 512),
    bits=('4', '3', 'nf4'),
    groups=(32,),
    rounds=9,
    dtype='float32',
    cache=32 * 2**20,
    products=4,
    copied=2**27,
    peak=1024,
    seconds=0.0,
  ),  # fmt: skip
}


@dataclasses.dataclass(frozen=True)
class Case:
  """One product: x [rows, inputs] @ w, or dy [rows, outputs] @ w.T; `bits` is one of BITS."""

  inputs: int
  outputs: int
  rows: int
  bits: str
  group: int
  direction: str
  dtype: str

  def __str__(self):
    form = f'{self.bits} bits' if self.bits.isdigit() else self.bits
    return f'{self.direction} {self.inputs}x{self.outputs}, {self.rows} rows, {form} in groups of {self.group}'

  @property
  def form(self) -> qtensor.Form:
    """Of the packed weights."""
    if self.bits.isdigit():
      return qtensor.Form(int(self.bits), self.group)
    return qtensor.Form(4, self.group, self.bits, offset='none')

  @property
  def backward(self) -> bool:
    return self.direction == 'backward'

  def operands(self, impl: str) -> tuple[jax.ShapeDtypeStruct, object]:
    """x (or dy) and w, abstract."""
    dense = jax.ShapeDtypeStruct((self.inputs, self.outputs), self.dtype)
    w = dense if impl == DENSE else jax.eval_shape(self.form, dense)
    return jax.ShapeDtypeStruct((self.rows, self.outputs if self.backward else self.inputs), self.dtype), w

  def bytes(self, impl: str) -> int:
    """Read and written, each once."""
    x, w = self.operands(impl)
    y = self.rows * (self.inputs if self.backward else self.outputs) * x.dtype.itemsize
    return _bytes((x, w)) + y

  def flops(self, impl: str) -> int:
    """Of the product and of that with the offsets."""
    groups = 0 if impl == DENSE or self.form.offset == 'none' else self.inputs // self.group
    return 2 * self.rows * (self.inputs + groups) * self.outputs


def _bytes(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def refusal(case: Case, impl: str, device: product_lib.Device) -> str | None:
  """Why `impl` does not make this product on `device`; None where it does."""
  if impl == DENSE:
    return None
  x, w = case.operands(impl)
  try:
    made = plan.choose(product_lib.Product.of(x, w, case.backward), device, impl)
  except product_lib.Refused as error:
    return str(error)
  return f'{impl} leaves it to xla' if impl != 'xla' and made.blocks is None else None


@functools.cache
def program(direction: str, impl: str) -> Callable:
  """(xs, ws) -> [x @ w for each x, with the ws in turn], or x @ w.T backward: what is timed, one after the other."""

  def one(x, w):
    if impl == DENSE:
      return jnp.dot(x, w if direction == 'forward' else w.T, preferred_element_type=jnp.float32).astype(x.dtype)
    multiply = lambda x: qmatmul.qmatmul(x, w, impl)
    if direction == 'forward':
      return multiply(x)
    given = jax.ShapeDtypeStruct((x.shape[0], w.shape[-2]), x.dtype)
    # `multiply` is linear in x; its value where that does not matter costs nothing once compiled.
    return jax.vjp(multiply, jnp.zeros(given.shape, given.dtype))[1](x)[0]

  def run(xs, ws):
    ys = []
    for x, w in zip(xs, itertools.cycle(ws)):  # noqa: B905
      if ys:
        # No two at once: each waits for the one before.
        x, ys[-1] = jax.lax.optimization_barrier((x, ys[-1]))
      ys.append(one(x, w))
    return ys

  return jax.jit(run)


def draw(key, shapes):
  """Random numbers for abstract operands: any codes, all else around 0."""
  leaves, tree = jax.tree.flatten(shapes)

  def one(key, leaf):
    if leaf.dtype == jnp.uint32:
      return jax.random.bits(key, leaf.shape)
    return (0.1 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)

  return jax.tree.unflatten(tree, [one(k, leaf) for k, leaf in zip(jax.random.split(key, len(leaves)), leaves)])  # noqa: B905


@functools.partial(jax.jit, static_argnames=('direction',))
def deviation(x, w, y, direction: str):
  """The largest error of y in units of what rounding explains; infinite where y is not finite.

  Held against a float32 product z of the float32 matrix.  In bfloat16 (eps = 2^-8, half of it one rounding) an entry
  of the matrix may be rounded twice, and y once more: y errs by |z| eps / 2 and by a sum of n terms of random signs,
  each of at most |x w| eps.  By Hoeffding's inequality such a sum exceeds 8 times the root of their squares' sum with
  a probability below 2 exp(-32), for any entry of any run.  In float32 the partial sums are rounded as well, n times.
  """
  dense = qtensor.dequantize(w) if isinstance(w, qtensor.QTensor) else w.astype(jnp.float32)
  dense = dense.T if direction == 'backward' else dense
  x = x.astype(jnp.float32)
  exact = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
  z, squares = exact(x, dense), exact(jnp.square(x), jnp.square(dense))
  eps = float(jnp.finfo(y.dtype).eps)
  roundings = math.sqrt(x.shape[-1]) if y.dtype == jnp.float32 else 1.0
  allowed = 8 * roundings * eps * jnp.sqrt(squares) + eps * jnp.abs(z)
  y = y.astype(jnp.float32)
  return jnp.max(jnp.where(jnp.isfinite(y), jnp.abs(y - z) / allowed, jnp.inf))


@dataclasses.dataclass
class Bench:
  """A program with its operands: `sets` of them, which launches take in turn."""

  case: Case
  impl: str
  run: Callable
  xs: list
  ws: list
  launches: int = 1
  turn: int = 0

  def time(self) -> float:
    """Seconds of one product, in `launches` programs; AssertionError, saying which, where a result is wrong."""
    begun = time.perf_counter()
    for _ in range(self.launches):
      self.turn = (self.turn + 1) % len(self.xs)
      ys = self.run(self.xs[self.turn], self.ws[self.turn])
    jax.block_until_ready(ys)
    seconds = time.perf_counter() - begun
    self.check(ys, _sample(self.case.rows))
    return seconds / (self.launches * len(ys))

  def check(self, ys, rows) -> None:
    """The given rows of the results of the last program."""
    xs, ws = self.xs[self.turn], self.ws[self.turn]
    direction = self.case.direction
    found = [deviation(x[rows], w, y[rows], direction) for x, w, y in zip(xs, itertools.cycle(ws), ys)]  # noqa: B905
    worst = max(map(float, found))
    if not worst <= 1:
      raise AssertionError(f'{self.impl}, {self.case}: an error of {worst:.1f} times what rounding explains.')


def _sample(rows: int):
  """Up to eight rows, the first and the last among them."""
  return np.unique(np.linspace(0, rows - 1, 8).astype(int))


def bench(case: Case, impl: str, scale: Scale) -> Bench:
  """The program of `impl` for `case`, compiled, every row of one result checked."""
  x, w = case.operands(impl)
  own = _bytes(w)
  # Twice the cache, in programs of at most so many products as leave memory for their results.
  least = math.ceil(2 * scale.cache / own)
  room = max(2, 2**32 // case.bytes(DENSE))
  count = max(1, min(least, scale.products, room))
  if scale.seconds:
    count = max(count, min(scale.products, room))
  weights = min(count, least)
  sets = math.ceil(2 * scale.cache / (weights * own + count * _bytes(x)))
  draws = jax.jit(lambda key: draw(key, ([x] * count, [w] * weights)))
  operands = [draws(jax.random.key(seed)) for seed in range(sets)]
  found = Bench(case, impl, program(case.direction, impl), *map(list, zip(*operands, strict=True)))
  found.check(found.run(found.xs[0], found.ws[0]), slice(None))
  begun = time.perf_counter()
  found.time()
  found.launches = max(1, min(64, math.ceil(scale.seconds / (time.perf_counter() - begun))))
  return found


def limits(scale: Scale) -> dict[str, float]:
  """The machine's: bytes a second of a copy (read and written) and operations a second of a matrix product."""
  x = jnp.ones((scale.copied // 4,), jnp.float32)
  a = jnp.ones((scale.peak, scale.peak), scale.dtype)
  # Where it was: else a CPU's allocator is measured, which gives every result fresh pages.
  copy = jax.jit(lambda x: x + 1, donate_argnums=0)
  multiply = program('forward', DENSE)
  copies, products = [], []
  for _ in range(30):
    begun = time.perf_counter()
    x = jax.block_until_ready(copy(x))
    copies.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    jax.block_until_ready(multiply([a] * 4, [a]))
    products.append(time.perf_counter() - begun)
  return {'bytes_per_second': 2 * scale.copied / min(copies), 'flops_per_second': 8 * scale.peak**3 / min(products)}


def measure(case: Case, impls, scale: Scale, limit: dict[str, float], device: product_lib.Device) -> list[dict]:
  """A row for every one of `impls` that makes this product, the dense one first."""
  able = [impl for impl in (DENSE, *impls) if refusal(case, impl, device) is None]
  benches = {impl: bench(case, impl, scale) for impl in able}
  seconds = {impl: [] for impl in able}
  for _ in range(scale.rounds):
    for impl, own in benches.items():
      seconds[impl].append(own.time())
  rows = []
  for impl, found in seconds.items():
    taken = statistics.median(found)
    moves, computes = case.bytes(impl) / limit['bytes_per_second'], case.flops(impl) / limit['flops_per_second']
    rows.append({
      'shape': f'{case.inputs}x{case.outputs}', 'rows': case.rows, 'bits': case.bits, 'group': case.group,
      'direction': case.direction, 'impl': impl, 'us': 1e6 * taken, 'fastest_us': 1e6 * min(found),
      'bytes': case.bytes(impl), 'flops': case.flops(impl), 'bound': 'memory' if moves >= computes else 'compute',
      'roofline': max(moves, computes) / taken,
      'to_dense': statistics.median(own / dense for own, dense in zip(found, seconds[DENSE], strict=True)),
    })  # fmt: skip
  return rows


def crossovers(rows: list[dict], kind: str) -> Iterator[str]:
  """For every fused implementation and direction: the rows up to which it beats `xla`, as a line of a plan's table.

  At each number of rows the geometric mean, over shapes, bits and groups, of its time over xla's counts.
  """
  key = lambda row: tuple(row[name] for name in ('shape', 'rows', 'bits', 'group', 'direction'))
  others = {key(row): row['us'] for row in rows if row['impl'] == 'xla'}
  fused = sorted({(row['impl'], row['direction']) for row in rows if row['impl'] not in (DENSE, 'xla')})
  for impl, direction in fused:
    logs = {}
    for row in rows:
      if (row['impl'], row['direction']) == (impl, direction) and key(row) in others:
        logs.setdefault(row['rows'], []).append(math.log(row['us'] / others[key(row)]))
    ratios = {count: math.exp(statistics.mean(found)) for count, found in sorted(logs.items())}
    slower = next((at for at, ratio in enumerate(ratios.values()) if ratio >= 1), len(ratios))
    most = [0, *ratios][slower]
    shown = ', '.join(f'{count}: {ratio:.2f}' for count, ratio in ratios.items())
    name = kind.removeprefix('NVIDIA ').split()[0] if kind.startswith('NVIDIA') else kind
    yield f'{name!r}: {most},  # {impl} {direction}; time over xla by rows: {shown}'


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m experiments.bench_qmatmul', allow_abbrev=False, epilog=__doc__.partition('\n\n')[2],
    description=__doc__.partition('\n\n')[0], formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip

  def several(one):
    return lambda text: tuple(one(word) for word in text.split(','))

  def among(*known):
    def one(word):
      if word not in known:
        raise argparse.ArgumentTypeError(f'{word!r}; it is one of {", ".join(known)}')
      return word

    return one

  def shape(word):
    if not re.fullmatch(r'[1-9]\d*x[1-9]\d*', word):
      raise argparse.ArgumentTypeError(f'{word!r} is no shape; write inputs x outputs as 4096x11008')
    return word

  implementations = [*plan.IMPLEMENTATIONS, *(f'{name}{product_lib.INTERPRETED}' for name in plan.IMPLEMENTATIONS)]
  parser.add_argument('--shapes', type=several(shape), metavar='IxO,...')
  parser.add_argument('--rows', type=several(positive), metavar='M,...')
  parser.add_argument('--bits', type=several(among(*BITS)), metavar='B,...', help=', '.join(BITS))
  parser.add_argument('--groups', type=several(positive), metavar='G,...')
  parser.add_argument('--impls', type=several(among(*implementations)), default=tuple(plan.IMPLEMENTATIONS))
  parser.add_argument('--directions', type=several(among(*DIRECTIONS)), default=DIRECTIONS)
  parser.add_argument('--rounds', type=positive, metavar='N')
  parser.add_argument('--minutes', type=positive, metavar='N')
  parser.add_argument('--out', type=pathlib.Path, metavar='PATH', help='without a suffix')
  return parser


def positive(word: str) -> int:
  """A number above 0, of a command line."""
  if not word.isdigit() or not int(word):
    raise argparse.ArgumentTypeError(f'{word!r} is no number above 0')
  return int(word)


def publish(place: pathlib.Path, rows: list[dict], limit: dict, kind: str, last: bool = True) -> None:
  """Writes place.json, and at the `last` also place.md and, where matplotlib is installed, place.png."""
  from qalora_jax import report  # here, so that what is measured stands even where this cannot be imported

  content = report.document(shlex.join(['python', '-m', 'experiments.bench_qmatmul', *sys.argv[1:]]), rows, **limit)
  report.write(place.with_name(place.name + '.json'), content)
  if not last:
    return
  lines = list(crossovers(rows, kind))
  rates = f'copy {limit["bytes_per_second"] / 1e9:.1f} GB/s, matrix peak {limit["flops_per_second"] / 1e12:.3f} TFLOP/s'
  head = f'`{content["command"]}`, commit {content["commit"]}, {content["date"]}, {content["machine"]}, '
  head += f'{content["versions"]}; {rates}\n\n' + ''.join(f'    {line}\n' for line in lines) + '\n' * bool(lines)
  place.with_name(place.name + '.md').write_text(head + report.markdown(rows))
  print(*lines, sep='\n')
  try:
    import matplotlib
  except ImportError:
    print('no plot: matplotlib is not installed')
    return
  matplotlib.use('Agg')
  plot(place.with_name(place.name + '.png'), rows, f'{kind}, {content["date"][:10]}: {rates}')


def plot(path: pathlib.Path, rows: list[dict], title: str) -> None:
  """The fraction of the roofline by rows: a panel a direction and shape, a line an implementation, bits and group."""
  from matplotlib import pyplot as plt

  shapes, directions = ([*dict.fromkeys(row[name] for row in rows)] for name in ('shape', 'direction'))
  figure, panels = plt.subplots(
    len(directions), len(shapes), figsize=(4 * len(shapes) + 2, 3.5 * len(directions)), squeeze=False, sharey=True
  )
  for panel, (direction, shape) in zip(panels.flat, itertools.product(directions, shapes), strict=True):
    lines = {}
    for row in rows:
      if (row['direction'], row['shape']) == (direction, shape):
        name = row['impl'] if row['impl'] == DENSE else f'{row["impl"]}, {row["bits"]}, {row["group"]}'
        lines.setdefault(name, {}).setdefault(row['rows'], []).append(row['roofline'])
    for name, points in lines.items():
      panel.plot(points.keys(), [statistics.median(found) for found in points.values()], 'o-', label=name, markersize=3)
    panel.set(title=f'{direction} {shape}', xlabel='rows', xscale='log')
    panel.set_xscale('log', base=2)
  panels[0, 0].set_ylabel('fraction of roofline')
  names = {}
  for panel in panels.flat:
    names |= {label: line for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
  figure.suptitle(title, fontsize=9)
  figure.legend(names.values(), names.keys(), fontsize=7, loc='center right')
  figure.tight_layout(rect=(0, 0, 1 - 1.5 / figure.get_figwidth(), 1))
  figure.savefig(path, dpi=100)
  plt.close(figure)


def main(words: list[str] | None = None) -> None:
  """Measures, prints and stores."""
  parser = _parser()
  asked = parser.parse_args(words)
  device = product_lib.device()
  scale = SCALES[device.platform]
  said = {name: getattr(asked, name) for name in ('shapes', 'rows', 'bits', 'groups', 'rounds')}
  scale = dataclasses.replace(scale, **{name: value for name, value in said.items() if value is not None})
  cases = [
    Case(*map(int, shape.split('x')), rows, bits, group, direction, scale.dtype)
    for shape, rows, bits, group, direction in itertools.product(
      scale.shapes, scale.rows, scale.bits, scale.groups, asked.directions
    )
  ]
  for case in cases:
    try:
      qtensor.check_group(case.inputs, case.group, f'{case.inputs}x{case.outputs}')
    except ValueError as error:
      parser.error(str(error))
  for impl in asked.impls:
    reasons = [refusal(case, impl, device) for case in cases]
    if all(reasons):
      print(f'{impl} is left out: {reasons[0]}')
  place = asked.out or RESULTS / f'bench_qmatmul-{re.sub("[^a-z0-9]+", "-", device.kind.lower())}'
  begun = time.monotonic()
  limit = limits(scale)
  print(
    f'{device.kind}: copy {limit["bytes_per_second"] / 1e9:.1f} GB/s, {limit["flops_per_second"] / 1e12:.3f} TFLOP/s'
  )
  rows = []
  for case in cases:
    if asked.minutes and time.monotonic() - begun > 60 * asked.minutes:
      print(f'{asked.minutes} minutes are over: {len(rows)} rows')
      break
    found = measure(case, asked.impls, scale, limit, device)
    rows += found
    times = (f'{row["impl"]} {row["us"]:.1f} us ({row["roofline"]:.2f})' for row in found)
    print(f'{case}: {", ".join(times)}', flush=True)
    publish(place, rows, limit, device.kind, last=False)
  publish(place, rows, limit, device.kind)


if __name__ == '__main__':
  main()
