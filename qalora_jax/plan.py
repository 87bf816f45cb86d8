"""`qalora plan`: what a training step takes on devices that need not be here, before any weight is read."""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import functools
import math
import pathlib
import sys

import jax
import ml_collections
import numpy as np

from qalora_jax import build
from qalora_jax import cli
from qalora_jax import collectives
from qalora_jax import config as config_lib
from qalora_jax import program as program_lib
from qalora_jax import progress
from qalora_jax import report
from qalora_jax import sharding
from qalora_jax import topologies
from qalora_jax.kernels import plan as kernels
from qalora_jax.models import layers

SUMMARY = (
  'Compiles the training step of a config for a topology that need not be here, and prints what it takes of every\n'
  'device: memory by kind, FLOPs and bytes, the least time that each allows, and what would still fit.\n'
  'No weights are read.  --topology: v5e:16x16, v5e (one chip), v5p:..., v6e:..., h100:8, cpu:8.'
)
_FLAGS = (
  config_lib.Flag('topology', 'string', '', 'The devices: CHIP:LAYOUT, such as v5e:16x16, h100:8, cpu:8, or CHIP.'),
  config_lib.Flag('largest', 'bool', True, 'Also search the largest micro-batch and window that fit (compiles more).'),
  config_lib.Flag(
    'quick', 'bool', False, 'Compile with less optimization: on TPU four times as fast, memory within some percent.'
  ),
  config_lib.Flag('out', 'string', None, 'Also write what is printed to this file, as JSON.'),
)
_KINDS = {
  'weights': 'frozen weights',
  'adapter': 'trained weights',
  'optimizer': 'optimizer state',
  'batch': 'batch',
  'padding': 'padding of layouts',
  'gradients': 'gradients',
  'activations': 'activations, workspace',
  'program': 'program',
}
# What limits a step.
FLOPS, MEMORY = 'matrix units', 'memory'
# A window is proposed in multiples of it: the width of a TPU's registers, and a comfortable block anywhere.
_WINDOW_STEP = 128
# Programs compiled in search of one largest size, at most.
_TRIES = 5


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device that a step holds at its worst moment, by kind; `host` are bytes of its host's memory.

  `padding` is what the compiler's layouts add to the arguments, `activations` everything that lives within the step
  but the gradients: what the remat policy keeps, and the largest working set of a layer.
  """

  weights: int
  adapter: int
  optimizer: int
  batch: int
  padding: int
  gradients: int
  activations: int
  program: int
  host: int

  @property
  def total(self) -> int:
    """Of the device."""
    return sum(dataclasses.astuple(self)) - self.host


@dataclasses.dataclass(frozen=True)
class Work:
  """What one device does in a step: FLOPs of all products, bytes of its memory moved at least, bytes from collectives.

  FLOPs are counted in the traced step, recomputation included, a product of a quantized matrix as that of the dense
  one.  Bytes: frozen matrices once for every pass through the layers (under fsdp those that were gathered), trained
  weights too, their gradients written and read, the optimizer's state read and written, and what stands between the
  passes written and read.  Received are the arrays that collectives make; None where they are not known.
  """

  flops: float
  bytes: float
  received: float | None

  def seconds(self, chip: topologies.Chip) -> dict[str, float]:
    """The least time that each of the chip's limits allows; those that nobody stated are left out."""
    rates = {FLOPS: (self.flops, chip.flops), MEMORY: (self.bytes, chip.bandwidth)}
    return {name: amount / rate for name, (amount, rate) in rates.items() if rate}


@dataclasses.dataclass(frozen=True)
class Plan:
  """A step on a topology.  `rows` a device sees at a time, `window` tokens each; `largest`: what would still fit.

  `tokens` are those of the whole step, over all devices and micro-batches; `positions` those that the model was made
  for in a row.
  """

  topology: topologies.Topology
  mesh: dict[str, int]
  rows: int
  window: int
  tokens: int
  positions: int
  memory: Memory
  work: Work
  sent: dict[str, int] | None
  largest: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def capacity(self) -> int:
    """Bytes of a device; 0 where nobody states them (CPU)."""
    return self.topology.chip.memory

  @property
  def fits(self) -> bool | None:
    """Whether a device holds it; None where nobody states what a device has."""
    return self.memory.total <= self.capacity if self.capacity else None

  def row(self) -> dict:
    """All of it as one flat dict for a table: bytes a device, seconds, sizes."""
    least = self.work.seconds(self.topology.chip)
    return {
      'topology': str(self.topology),
      'mesh': ' '.join(f'{axis}={size}' for axis, size in self.mesh.items() if size > 1) or 'one device',
      'rows': self.rows,
      'window': self.window,
      **dataclasses.asdict(self.memory),
      'total': self.memory.total,
      'capacity': self.capacity or None,
      'fits': self.fits,
      **dataclasses.asdict(self.work),
      **{f'{name.replace(" ", "_")}_seconds': seconds for name, seconds in least.items()},
      **{f'largest_{name}': size for name, size in self.largest.items()},
    }


def main(argv=None) -> None:
  """Runs the command with `argv` (default: the process's)."""
  arguments = config_lib.parse('plan', argv, summary=SUMMARY, extra_flags=_FLAGS)
  if not arguments.values['topology']:
    raise ValueError('no --topology; for example --topology=v5e:16x16, --topology=h100:8 or --topology=cpu:8.')
  # Accelerators that are here have other things to do.
  jax.config.update('jax_platforms', 'cpu')
  topology = topologies.find(arguments.values['topology'])
  found = plan(arguments.config, topology, quick=arguments.values['quick'])
  show(found)
  if arguments.values['largest'] and found.capacity:
    # After the plan is said: it takes a while.
    found = dataclasses.replace(found, largest=largest(arguments.config, found))
    show_largest(found)
  if arguments.values['out']:
    content = report.document(arguments.command, [found.row()])
    report.write(pathlib.Path(arguments.values['out']), content)


def plan(config: ml_collections.ConfigDict, topology: topologies.Topology, *, quick: bool = False) -> Plan:
  """What a training step of `config` takes on `topology`; `quick` as in `topologies.compiled_for`.

  Raises ValueError for a config that cannot train there or whose shapes are not known yet, and where the topology's
  compiler is not installed.
  """
  if config.adapter.kind == 'none':
    raise ValueError('adapter.kind = "none" trains nothing, so there is no step; use "qalora", "lora" or "full".')
  if config.base.budget and config.base.method != 'stored':
    raise ValueError(
      f'base.budget = {config.base.budget}: which weights get how many bits is found by calibration; run `qalora '
      'quantize` and plan with its directory as model.source and base.method = "stored", or set base.budget = 0.'
    )
  return _compiled(config, topology, _mesh(config, topology), quick)


def largest(config: ml_collections.ConfigDict, found: Plan) -> dict[str, int]:
  """{'rows': of a device at a time, 'window': tokens} that would still fit, each beside the other as in the config.

  Every size was compiled, as `quick` compiles; 0 where not even one fits.
  """
  topology, mesh = found.topology, _mesh(config, found.topology)
  at_a_time = _shares(found.mesh) * config.train.accumulation

  def planned(key: str, times: int, size: int) -> Plan:
    return _compiled(config_lib.override(config, {key: size * times}), topology, mesh, True)

  with progress.bar('searching', 2 * (_TRIES - 1)) as bar:
    rows = functools.partial(planned, 'train.batch', at_a_time)
    window = functools.partial(planned, 'data.window', 1)
    return {
      'rows': _largest(found, found.rows, 1, rows, bar.advance),
      'window': _largest(found, found.window, _WINDOW_STEP, window, bar.advance),
    }


def _mesh(config: ml_collections.ConfigDict, topology: topologies.Topology) -> jax.sharding.Mesh:
  return sharding.make_mesh(**{axis: config.sharding[axis] for axis in sharding.AXES}, devices=topology.devices())


def show(found: Plan) -> None:
  """Prints a plan for people."""
  say, memory, work = progress.console.print, found.memory, found.work
  gibibytes = lambda count: f'{count / 2**30:.3f} GiB'
  mesh = ', '.join(f'{axis} {size}' for axis, size in found.mesh.items())
  times = found.tokens // (found.rows * found.window * _shares(found.mesh))
  say(f'{found.topology}: {found.topology.count} device(s), {mesh}')
  say(f'{found.rows} row(s) of {found.window} tokens on a device, {times} time(s) a step')
  for kind, label in _KINDS.items():
    _line(label, gibibytes(getattr(memory, kind)))
  _line('a device in all', gibibytes(memory.total), _verdict(found))
  if memory.host:
    _line('in memory of its host', gibibytes(memory.host))
  say('a step, on every device:')
  least, sent = work.seconds(found.topology.chip), work.received
  limit = lambda name: f'at least {least[name] * 1e3:,.2f} ms' if name in least else ''
  _line('products', f'{work.flops / 1e12:.3f} TFLOP', limit(FLOPS))
  _line('its memory', f'{work.bytes / 1e9:.3f} GB', limit(MEMORY))
  if sent is not None:
    about = f'about {sent / found.topology.chip.link * 1e3:,.2f} ms' if found.topology.chip.link else ''
    _line('made by collectives', f'{sent / 1e9:.3f} GB', about)
  for kind, count in (found.sent or {}).items():
    _line(f'  {kind}', f'{count / 1e9:.3f} GB')
  if least:
    slowest = max(least, key=least.get)
    _line('no faster than', f'{found.tokens / least[slowest]:,.0f} tokens/s', f'by its {slowest}')


def show_largest(found: Plan) -> None:
  """Prints what would still fit."""
  for name, size in found.largest.items():
    beyond = f'the model was made for {found.positions:,}' if name == 'window' and size > found.positions else ''
    _line(f'largest {name}', f'{size:,}' if size else 'none fits', beyond)


def _line(label: str, amount: str, note: str = '') -> None:
  progress.console.print(f'  {label:24}{amount:>16}  {note}'.rstrip())


def _verdict(found: Plan) -> str:
  """Whether it fits, and by how much."""
  if not found.capacity:
    return ''
  left = (found.capacity - found.memory.total) / 2**30
  return f'of {found.capacity / 2**30:.1f}: ' + (
    f'fits, {left:.2f} left' if found.fits else f'does NOT fit, {-left:.2f} over'
  )


def _compiled(config, topology: topologies.Topology, mesh: jax.sharding.Mesh, quick: bool) -> Plan:
  """The plan of one compiled step."""
  built = _setup(config)
  program = program_lib.make(config, built, mesh)
  memory, sent = _held(program), None
  # What alone is too much need not be compiled.
  if memory.total <= (topology.chip.memory or math.inf):
    try:
      compiled = program.compiled(topology.chip.platform, quick=quick)
    except topologies.Overfull as full:
      # All that is known of it is the sum.
      memory = dataclasses.replace(memory, activations=full.needed - memory.total)
    else:
      memory = _within(compiled.memory_analysis(), memory)
      sent = _sent(compiled)
  rows = config.train.batch // config.train.accumulation // _shares(dict(mesh.shape))
  return Plan(
    topology=topology,
    mesh=dict(mesh.shape),
    rows=rows,
    window=config.data.window,
    tokens=config.train.batch * config.data.window,
    positions=built.model.config.max_position_embeddings,
    memory=memory,
    work=Work(
      flops=_flops(program) / topology.count,
      bytes=_moved(config, built.model.config, program, rows),
      received=None if sent is None else sum(sent.values()),
    ),
    sent=sent,
  )


def _sent(compiled: jax.stages.Compiled) -> dict[str, int] | None:
  """{kind of collective: bytes a device receives in a step}; None where the compiler cannot print its program."""
  try:
    text = compiled.as_text()
  except jax.errors.JaxRuntimeError:  # libtpu prints some copies to the host's memory not at all
    return None
  sent = {}
  for each in collectives.of(text):
    sent[each.kind] = sent.get(each.kind, 0) + each.bytes * each.times
  return sent


def _setup(config: ml_collections.ConfigDict) -> build.Setup:
  """The model: of a directory that is here, else as config.model.architecture says; nothing is downloaded."""
  if config.model.source != 'scratch' and pathlib.Path(config.model.source or '.missing').is_dir():
    return build.setup(build.adopted(config, None))
  if config.adapter.source:
    raise ValueError(
      f'adapter.source = {config.adapter.source!r}: which adapter that is can be told where model.source is a '
      'directory here; download the model, or state adapter.kind, rank and targets and leave adapter.source empty.'
    )
  stated = config.model.architecture.to_dict()
  if config.model.source != 'scratch' and stated == config_lib.default().model.architecture.to_dict():
    raise ValueError(
      f'model.source = {config.model.source!r} is no directory here, and config.model.architecture is the default: '
      'plan by a recipe that states the architecture (configs/*_llama_*.py), or download the model first.'
    )
  return build.abstract_setup(config)


def _held(program: program_lib.Program) -> Memory:
  """What the shards of the arguments and the gradients take, whatever the compiler does."""
  kinds = {
    'weights': program.frozen,
    'adapter': program.state.params,
    'optimizer': (program.state.step, program.state.opt_state),
    'batch': program.batch,
    'gradients': program.state.params,
  }
  own = {kind: sum(map(_shard_bytes, _leaves(tree, host=False))) for kind, tree in kinds.items()}
  host = sum(map(_shard_bytes, _leaves((program.frozen, program.state), host=True)))
  return Memory(**own, padding=0, activations=0, program=0, host=host)


def _within(stats, held: Memory) -> Memory:
  """What is held, and what the compiler's account adds."""
  arguments = held.total - held.gradients
  inside = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
  gradients = min(held.gradients, inside)  # a small one is used up as it is made
  return dataclasses.replace(
    held,
    # The compiler for CPUs counts arguments in the host's memory among the device's.
    padding=stats.argument_size_in_bytes - arguments - (0 if stats.host_argument_size_in_bytes else held.host),
    gradients=gradients,
    activations=inside - gradients,
    program=stats.generated_code_size_in_bytes,
    host=held.host + stats.host_temp_size_in_bytes,
  )


def _leaves(tree, *, host: bool) -> Iterator:
  """The leaves in the host's memory, or in the devices'."""
  kept = ('pinned_host', 'unpinned_host')
  return (leaf for leaf in jax.tree.leaves(tree) if (leaf.sharding.memory_kind in kept) == host)


def _shard_bytes(leaf) -> int:
  """Bytes of one device's part of an abstract array."""
  return math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize


def _flops(program: program_lib.Program) -> float:
  """FLOPs of all products of a step, on all devices."""
  with kernels.using('xla'):
    return float(_products(program.step.trace(*program.arguments).jaxpr.jaxpr))


def _products(jaxpr) -> int:
  """FLOPs of the dot products of a jaxpr; a loop's as often as it turns, a branch's if it is the dearest."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      left, out = equation.invars[0].aval, equation.outvars[0].aval
      total += 2 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
      continue
    inner, times = [_products(each) for each in _inside(equation.params)], equation.params.get('length', 1)
    if equation.primitive.name == 'shard_map':
      # Inside stands one device's part.
      sizes = equation.params['mesh'].shape
      times = math.prod(sizes[axis] for axis in equation.params['newly_manual_axes'])
    if inner:
      total += (max(inner) if equation.primitive.name == 'cond' else sum(inner)) * times
  return total


def _inside(params: dict) -> Iterator:
  """The jaxprs among the parameters of an equation."""
  is_jaxpr = lambda value: hasattr(getattr(value, 'jaxpr', value), 'eqns')
  for value in params.values():
    for each in value if isinstance(value, tuple | list) else (value,):
      if is_jaxpr(each):
        yield getattr(each, 'jaxpr', each)


def _moved(config, model: layers.Config, program: program_lib.Program, rows: int) -> float:
  """Bytes that a device moves at least in a step, as `Work` says."""
  size = lambda tree: sum(map(_shard_bytes, jax.tree.leaves(tree)))
  divided = lambda leaf: 'fsdp' in jax.tree.leaves(tuple(leaf.sharding.spec))
  # What is divided for storage alone is read whole.
  whole = lambda leaf: _shard_bytes(leaf) * (program.mesh.shape['fsdp'] if divided(leaf) else 1)
  # Of an embedding that is no head only some rows are read.
  looked_up = () if model.tie_word_embeddings else ('embedding',)
  read = lambda tree: sum(whole(leaf) for name in tree.keys() - looked_up for leaf in jax.tree.leaves(tree[name]))
  # Under 'dots' the products are kept, so that no weight is read to compute them again.
  passes = config.train.accumulation * (2 if config.model.remat in ('none', 'dots') else 3)
  weights = passes * read(program.frozen)
  trained = passes * read(program.state.params) + 4 * size(program.state.params) + 2 * size(program.state.opt_state)
  between = sum(model.depths.values()) * model.hidden_size * model.dtype.itemsize
  return weights + trained + 2 * config.train.accumulation * rows * config.data.window * between


def _shares(mesh: dict[str, int]) -> int:
  """Devices that share the rows."""
  return mesh['data'] * mesh['fsdp']


def _largest(known: Plan, size: int, unit: int, at: Callable[[int], Plan], tried: Callable[[], None]) -> int:
  """The largest multiple of `unit` whose plan fits, as far as _TRIES programs find it; 0 where none does.

  What a step holds is close to linear in its rows, and in its window: the next size is where the line through the
  largest that fits and the smallest that does not reaches the capacity.  Only a size whose program was compiled, and
  fits, is returned.
  """
  capacity, totals = known.capacity, {size: known.memory.total}
  # At first as if all that lives within the step grew with the size.
  totals_at_zero = {0: known.memory.total - known.memory.activations}
  for _ in range(_TRIES - 1):
    fits = max((n for n, total in totals.items() if total <= capacity), default=0)
    fails = min((n for n, total in totals.items() if total > capacity), default=math.inf)
    if fits and fails < math.inf:
      ends = fits, fails
    else:
      ends = sorted(totals_at_zero | totals)[-2:] if fits else sorted(totals_at_zero | totals)[:2]
    (n0, held0), (n1, held1) = ((n, (totals_at_zero | totals)[n]) for n in ends)
    rise = (held1 - held0) / (n1 - n0)
    # Where nothing grows yet, far ahead.
    guess = n0 + (capacity - held0) / rise if rise > 0 else 8 * n1
    # Within what is known, both ends left out.
    guess = max(guess // unit, fits // unit + 1) * unit
    guess = guess if fails == math.inf else min(guess, (-(-fails // unit) - 1) * unit)
    if guess <= fits:
      break
    totals[int(guess)] = at(int(guess)).memory.total
    tried()
  return max((n for n, total in totals.items() if total <= capacity), default=0)


if __name__ == '__main__':
  cli.run(main, 'qalora plan', sys.argv[1:])
