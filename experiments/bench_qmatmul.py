"""Question: who multiplies by packed weights fastest, how near the machine's limit, and up to how many rows?

    python -m experiments.bench_qmatmul [--shapes=4096x11008,...] [--rows=1,16,...] [--bits=4,nf4] [--groups=32]
        [--impls=xla,...] [--directions=forward,backward] [--rounds=30] [--minutes=9] [--note=TEXT] [--out=PATH]

It needs jax, flax and numpy alone (`python experiments/bench_qmatmul.py` does as well), on whatever device there is.
In every case stand side by side, in turn in every round: `xla` (dequantize, then a dense product) and each fused
implementation that the plan does not refuse there; in the first case of its shape, rows and direction the dense product
too (bfloat16; float32 on a CPU).  On GPUs, fused ones are measured up to 512 rows unless --rows says which.  Few rows,
4 bits and LLaMA-7B's widest matrices come first; of the default shapes and groups, those that do not fit are left out.

A program makes many products, one after the other, with inputs and weights of their own, and is launched several times
before it is waited for: so the time of one product has next to nothing of the dispatch in it, and all that is read in
between is beyond the last cache.  In every round one product's result is held against a float32 one, by `deviation`.
Stored is, for every case and implementation,

    us          the median over the rounds of the time of one product, in microseconds (and `fastest_us`)
    bytes       packed weights + scales + offsets + x + y
    flops       2 M K N (1 + 1 / group), without the 1 / group where there are no offsets
    roofline    the time that those take at the copy bandwidth or the matrix peak, whichever is more, over `us`;
                both limits are measured before the first case
    to_dense    `us` over that of the dense product
    commit      of the code that measured it

and at the end, for a plan's tables, the rows up to which each fused implementation beats `xla`.
Writes PATH.json after every case, PATH.md and, with matplotlib, PATH.png; PATH is
experiments/results/bench_qmatmul-DEVICE by default.  What PATH.json has of the same kind of device is not measured
again, whatever the commit, nor are the limits: the same command goes on where it stopped.  `--minutes` ends it before
the first case that would begin later.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import functools
import itertools
import json
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
# What a row is of; the dense product has neither bits nor group.
KEY = ('shape', 'rows', 'bits', 'group', 'direction', 'impl')
# Measured first: these, with 4 bits and so few rows.
FOREMOST = ('4096x11008', '4096x12288', '4096x22016', '11008x4096')
DECODING = 16
# Copies that are waited for at once.
_COPIES = 20


@dataclasses.dataclass(frozen=True)
class Scale:
  """What is measured where nothing else is said, and how much at once.

  cache: bytes that all inputs and weights together must exceed; `products` in one program, at most; `copied` bytes and
  a `peak` x `peak` matrix for the machine's limits; `seconds` that the launches of one round take at least; `fused`:
  rows up to which fused implementations are measured, None for any.
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
  fused: int | None


# LLaMA-7B's projections, alone and side by side, and a small model's; caches of an H200 (L2) and of a TPU (VMEM).
_LARGE = Scale(
  shapes=(*FOREMOST, '4096x4096', '288x768', '768x2048'),
  rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 4096, 8192), bits=BITS, groups=(32, 128), rounds=30,
  dtype='bfloat16', cache=128 * 2**20, products=64, copied=2**30, peak=8192, seconds=5e-3, fused=None,
)  # fmt: skip
SCALES = {
  'gpu': dataclasses.replace(_LARGE, fused=512),
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
    seconds=5e-3,
    fused=None,
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
  def shape(self) -> str:
    return f'{self.inputs}x{self.outputs}'

  def key(self, impl: str) -> tuple:
    """The values of KEY."""
    bits, group = (None, None) if impl == DENSE else (self.bits, self.group)
    return self.shape, self.rows, bits, group, self.direction, impl

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
    w = _weights(self.inputs, self.outputs, self.dtype, None if impl == DENSE else self.form)
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


@functools.cache
def _weights(inputs: int, outputs: int, dtype: str, form: qtensor.Form | None):
  """Abstract, dense where there is no form."""
  dense = jax.ShapeDtypeStruct((inputs, outputs), dtype)
  return jax.eval_shape(form, dense) if form else dense


def every_case(scale: Scale, directions=DIRECTIONS, shapes=(), groups=()) -> list[Case]:
  """The cases of a scale in the order of their importance, without the pairs of a shape and a group that do not fit.

  Raises ValueError where both of such a pair are in `shapes` and `groups`, which were asked for, and where one of these
  fits none.
  """
  refused = {}
  for shape, group in itertools.product(scale.shapes, scale.groups):
    try:
      qtensor.check_group(int(shape.split('x')[0]), group, shape)
    except ValueError as error:
      refused[shape, group] = error
      if shape in shapes and group in groups:
        raise
  for shape in shapes:
    if all((shape, group) in refused for group in scale.groups):
      raise refused[shape, scale.groups[0]]
  for group in groups:
    if all((shape, group) in refused for shape in scale.shapes):
      raise refused[scale.shapes[0], group]
  found = [
    Case(*map(int, shape.split('x')), rows, bits, group, direction, scale.dtype)
    for shape, rows, bits, group, direction in itertools.product(
      scale.shapes, scale.rows, scale.bits, scale.groups, directions
    )
    if (shape, group) not in refused
  ]
  # Decoding is forward.
  later = lambda case: (case.shape not in FOREMOST) + (case.bits != '4') + (case.rows > DECODING) + case.backward
  return sorted(found, key=later)


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

  # Traced and lowered once, however many products follow.
  @jax.jit
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
  """Random numbers for abstract operands: any codes, all else around 0, offsets as large as a middle code's weight."""
  leaves, tree = jax.tree.flatten(shapes)

  def one(key, leaf):
    if leaf.dtype == jnp.uint32:
      return jax.random.bits(key, leaf.shape)
    return (0.1 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)

  def centred(leaf):
    if not isinstance(leaf, qtensor.QTensor) or leaf.offset is None:
      return leaf
    return leaf.replace(offset=leaf.offset * 2 ** (leaf.bits - 1))

  drawn = [one(k, leaf) for k, leaf in zip(jax.random.split(key, len(leaves)), leaves)]  # noqa: B905
  is_matrix = lambda leaf: isinstance(leaf, qtensor.QTensor)
  return jax.tree.map(centred, jax.tree.unflatten(tree, drawn), is_leaf=is_matrix)


@functools.partial(jax.jit, static_argnames=('direction',))
def deviation(x, w, y, direction: str):
  """The error of y in units of what rounding explains, by entry or by norm; infinite where y is not finite.

  Held against a float32 product z of the float32 matrix.  In bfloat16 (eps = 2^-7, half of it one rounding) an entry
  of the matrix may be rounded twice, and y once more: y errs by |z| eps / 2, of which twice is allowed, and by a sum of
  n terms of random signs, each of at most |x w| eps.  By Hoeffding's inequality such a sum exceeds 8 times the root of
  their squares' sum with a probability below 2 exp(-32), for any entry of any run.  In float32 the partial sums are
  rounded as well, n times.

  All entries together may err by 1 % of their norm.  One rounding errs by eps / 2 / sqrt(3), 0.23 %, in the root mean
  square at most, three by 0.39 %, and codes * scale, which is what is rounded, is not larger in the mean than the
  matrix where offsets are drawn independently of them.
  """
  dense = qtensor.dequantize(w) if isinstance(w, qtensor.QTensor) else w.astype(jnp.float32)
  dense = dense.T if direction == 'backward' else dense
  x = x.astype(jnp.float32)
  exact = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
  z, squares = exact(x, dense), exact(jnp.square(x), jnp.square(dense))
  eps = float(jnp.finfo(y.dtype).eps)
  roundings = math.sqrt(x.shape[-1]) if y.dtype == jnp.float32 else 1.0
  allowed = 8 * roundings * eps * jnp.sqrt(squares) + eps * jnp.abs(z)
  error = y.astype(jnp.float32) - z
  norm = jnp.sqrt(jnp.sum(jnp.square(error)) / jnp.sum(jnp.square(z)))
  worst = jnp.maximum(jnp.max(jnp.abs(error) / allowed), norm / 0.01)
  return jnp.where(jnp.isfinite(y).all(), worst, jnp.inf)


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
  rounds: int = 0

  def time(self) -> float:
    """Seconds of one product, in `launches` programs; AssertionError, saying which, where a result is wrong."""
    begun = time.perf_counter()
    for _ in range(self.launches):
      self.turn = (self.turn + 1) % len(self.xs)
      ys = self.run(self.xs[self.turn], self.ws[self.turn])
    jax.block_until_ready(ys)
    seconds = time.perf_counter() - begun
    self.rounds += 1
    self.check(ys, self.rounds % len(ys), _sample(self.case.rows))
    return seconds / (self.launches * len(ys))

  def calibrate(self, seconds: float) -> None:
    """Sets `launches` to as many programs as take `seconds` at least.

    By the time of one program in the round before: with one launch that is mostly dispatch and waiting, so the first
    count is too low, and is corrected in the rounds that follow.
    """
    self.launches = 1
    while (taken := self.time() * len(self.xs[0])) * self.launches < seconds:
      self.launches = max(self.launches + 1, math.ceil(seconds / taken))

  def check(self, ys, which: int, rows) -> None:
    """The given rows of one result of the last program."""
    xs, ws = self.xs[self.turn], self.ws[self.turn]
    worst = float(deviation(xs[which][rows], ws[which % len(ws)], ys[which][rows], self.case.direction))
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
  count = min(scale.products, room)
  weights = min(count, least)
  sets = math.ceil(2 * scale.cache / (weights * own + count * _bytes(x)))
  draws = jax.jit(lambda key: draw(key, ([x] * count, [w] * weights)))
  operands = [draws(jax.random.key(seed)) for seed in range(sets)]
  found = Bench(case, impl, program(case.direction, impl), *map(list, zip(*operands, strict=True)))
  found.check(found.run(found.xs[0], found.ws[0]), 0, slice(None))
  found.time()  # so that nothing is compiled, nor read for the first time, in what follows
  found.calibrate(scale.seconds)
  return found


def limits(scale: Scale) -> dict[str, float]:
  """The machine's: bytes a second of a copy (read and written) and operations a second of a matrix product."""
  x = jnp.ones((scale.copied // 4,), jnp.float32)
  # Random, for a chip's power, and with it its clock, depends on how many bits change.
  a, b = (jax.random.normal(key, (scale.peak, scale.peak), scale.dtype) for key in jax.random.split(jax.random.key(0)))
  # Where it was: else a CPU's allocator is measured, which gives every result fresh pages.
  copy = jax.jit(lambda x: x + 1, donate_argnums=0)
  multiply = program('forward', DENSE)
  copies, products = [], []
  for _ in range(10):
    begun = time.perf_counter()
    for _ in range(_COPIES):
      x = copy(x)
    jax.block_until_ready(x)
    copies.append((time.perf_counter() - begun) / _COPIES)
  for _ in range(30):
    begun = time.perf_counter()
    jax.block_until_ready(multiply([a] * 4, [b]))
    products.append(time.perf_counter() - begun)
  return {'bytes_per_second': 2 * scale.copied / min(copies), 'flops_per_second': 8 * scale.peak**3 / min(products)}


def due(case: Case, impls, scale: Scale, device: product_lib.Device, done: set) -> list[str]:
  """Who is to be measured: the dense product and those of `impls` that make this one, if not among the keys `done`."""
  small = scale.fused is None or case.rows <= scale.fused
  return [
    impl
    for impl in (DENSE, *impls)
    if case.key(impl) not in done and (small or impl in (DENSE, 'xla')) and refusal(case, impl, device) is None
  ]


def measure(case: Case, impls, scale: Scale, limit: dict[str, float], dense: float | None) -> list[dict]:
  """A row for every one of `impls`; dense: the microseconds of the dense product, None where it is among them."""
  benches = {impl: bench(case, impl, scale) for impl in impls}
  seconds = {impl: [] for impl in impls}
  for _ in range(scale.rounds):
    for impl, own in benches.items():
      seconds[impl].append(own.time())
  us = {impl: 1e6 * statistics.median(found) for impl, found in seconds.items()}
  rows = []
  for impl, taken in us.items():
    moves, computes = case.bytes(impl) / limit['bytes_per_second'], case.flops(impl) / limit['flops_per_second']
    rows.append({
      **dict(zip(KEY, case.key(impl), strict=True)), 'us': taken, 'fastest_us': 1e6 * min(seconds[impl]),
      'bytes': case.bytes(impl), 'flops': case.flops(impl), 'bound': 'memory' if moves >= computes else 'compute',
      'roofline': 1e6 * max(moves, computes) / taken, 'to_dense': taken / us.get(DENSE, dense),
    })  # fmt: skip
  return rows


def crossovers(rows: list[dict], kind: str) -> Iterator[str]:
  """Lines of a plan's table: for every fused implementation, direction and class of levels, up to where it beats `xla`.

  At each number of rows the geometric mean, over shapes, bits and groups, of its time over xla's counts.
  """
  of = lambda row: (row['impl'], row['direction'], 'integer' if row['bits'].isdigit() else 'codebook')
  product = lambda row: tuple(row[name] for name in KEY if name != 'impl')
  others = {product(row): row['us'] for row in rows if row['impl'] == 'xla'}
  logs = {}
  for row in rows:
    if row['impl'] not in (DENSE, 'xla') and product(row) in others:
      logs.setdefault(of(row), {}).setdefault(row['rows'], []).append(math.log(row['us'] / others[product(row)]))
  name = kind.removeprefix('NVIDIA ').split()[0] if kind.startswith('NVIDIA') else kind
  for (impl, direction, levels), by_rows in sorted(logs.items()):
    ratios = {count: math.exp(statistics.mean(found)) for count, found in sorted(by_rows.items())}
    slower = next((at for at, ratio in enumerate(ratios.values()) if ratio >= 1), len(ratios))
    most = [0, *ratios][slower]
    shown = ', '.join(f'{count}: {ratio:.2f}' for count, ratio in ratios.items())
    yield f'{name!r}: {most},  # {impl} {direction}, {levels}; time over xla by rows: {shown}'


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
  parser.add_argument('--note', metavar='TEXT', help='stored with the results, as that a machine was shared')
  parser.add_argument('--out', type=pathlib.Path, metavar='PATH', help='without a suffix')
  return parser


def positive(word: str) -> int:
  """A number above 0, of a command line."""
  if not word.isdigit() or not int(word):
    raise argparse.ArgumentTypeError(f'{word!r} is no number above 0')
  return int(word)


def stored(path: pathlib.Path, kind: str) -> tuple[list[dict], dict[str, float]]:
  """The rows and the limits that an earlier run left there, none where there was none; ValueError for another kind."""
  if not path.exists():
    return [], {}
  content = json.loads(path.read_text())
  if content.get('device') != kind:
    raise ValueError(f'{path} is of {content.get("device")!r}, this is {kind!r}; name another file with --out')
  return content['rows'], {name: content[name] for name in ('bytes_per_second', 'flops_per_second')}


def publish(place: pathlib.Path, rows: list[dict], limit: dict, kind: str, note: str | None, last: bool) -> None:
  """Writes place.json, and at the `last` also place.md and, where matplotlib is installed, place.png."""
  from qalora_jax import report  # here, so that what is measured stands even where this cannot be imported

  command = shlex.join(['python', '-m', 'experiments.bench_qmatmul', *sys.argv[1:]])
  content = report.document(command, rows, device=kind, note=note, **limit)
  for row in rows:
    row.setdefault('commit', content['commit'])
  report.write(place.with_name(place.name + '.json'), content)
  if not last or not rows:
    return
  lines = list(crossovers(rows, kind))
  rates = f'copy {limit["bytes_per_second"] / 1e9:.1f} GB/s, matrix peak {limit["flops_per_second"] / 1e12:.3f} TFLOP/s'
  head = f'`{content["command"]}`, commit {content["commit"]}, {content["date"]}, {content["machine"]}, '
  head += (
    f'{content["versions"]}; {rates}{f"; {note}" if note else ""}\n\n'
    + ''.join(f'    {line}\n' for line in lines)
    + '\n' * bool(lines)
  )
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
  scale = dataclasses.replace(scale, fused=None) if asked.rows else scale
  place = asked.out or RESULTS / f'bench_qmatmul-{re.sub("[^a-z0-9]+", "-", device.kind.lower())}'
  try:
    cases = every_case(scale, asked.directions, asked.shapes or (), asked.groups or ())
    rows, limit = stored(place.with_name(place.name + '.json'), device.kind)
  except ValueError as error:
    parser.error(str(error))
  for impl in asked.impls:
    if all(refusal(case, impl, device) for case in cases):
      print(f'{impl} is left out: {refusal(cases[0], impl, device)}')
  begun = time.monotonic()
  limit = limit or limits(scale)
  print(
    f'{device.kind}: copy {limit["bytes_per_second"] / 1e9:.1f} GB/s, {limit["flops_per_second"] / 1e12:.3f} TFLOP/s'
  )
  done = {tuple(row[name] for name in KEY): row['us'] for row in rows}
  for case in cases:
    impls = due(case, asked.impls, scale, device, done.keys())
    if not impls:
      continue
    if asked.minutes and time.monotonic() - begun > 60 * asked.minutes:
      print(f'{asked.minutes} minutes are over: {len(rows)} rows; the same command goes on')
      break
    found = measure(case, impls, scale, limit, done.get(case.key(DENSE)))
    rows += found
    done |= {tuple(row[name] for name in KEY): row['us'] for row in found}
    times = (f'{row["impl"]} {row["us"]:.1f} us ({row["roofline"]:.2f})' for row in found)
    print(f'{case}: {", ".join(times)}', flush=True)
    publish(place, rows, limit, device.kind, asked.note, last=False)
  publish(place, rows, limit, device.kind, asked.note, last=True)


if __name__ == '__main__':
  main()
