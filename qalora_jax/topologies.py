"""Chips that are not here, compiled for all the same: TPUs with libtpu, NVIDIA's with the CUDA plugin, CPU anywhere.

    devices = topologies.find('v5e:16x16').devices()
    with jax.set_mesh(topologies.mesh('v5e:2x2', data=2, tensor=2)):
      compiled = topologies.compiled(function, *arguments)

Under such a mesh `qmatmul` plans as on that chip.  A compiled program says what it holds in memory
(`memory_analysis()`) and what it does (`as_text()`); it cannot run.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import re

import jax
from jax.experimental import topologies as described
import numpy as np

_TARGETS = pathlib.Path(__file__).resolve().parent / 'targets'
# The search for fast code is three quarters of libtpu's time for a training step.
_QUICK = {'tpu': {'xla_optimization_level': 'EFFORT_O0'}}
_NEEDED = re.compile(r'memory required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \([^)]*\)')
# GPUs of one host, which share NVLink.
_GPUS_A_HOST = 8

# Read by libtpu while it loads: where it stands, instead of asking a cloud that is not there; and that it may load in
# several processes at once (else they fight over a lock file, meant for processes that would share real chips).
_ALONE = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_WORKER_ID': '0',
  'TPU_LOG_DIR': 'disabled',
}


@dataclasses.dataclass(frozen=True)
class Chip:
  """What its maker states of a chip: FLOP/s in bfloat16, bytes/s of its memory, bytes of it, bytes/s to its neighbours.

  `link` adds up all links of a chip, one way.  A CPU states nothing: 0.
  """

  name: str
  platform: str
  flops: float = 0.0
  bandwidth: float = 0.0
  memory: int = 0
  link: float = 0.0
  least: str = ''


# TPUs: cloud.google.com/tpu/docs, the pages of each version, but the memory is what libtpu gives to a program; H100
# SXM: NVIDIA's data sheet (dense FLOPs), and the memory that its driver reports.  `least` is the smallest topology that
# libtpu knows.
CHIPS = {
  'v5e': Chip('v5e', 'tpu', 197e12, 819e9, int(15.75 * 2**30), 200e9, '2x2'),
  'v5p': Chip('v5p', 'tpu', 459e12, 2765e9, int(95.73 * 2**30), 600e9, '2x2x1'),
  'v6e': Chip('v6e', 'tpu', 918e12, 1640e9, int(31.24 * 2**30), 448e9, '2x2'),
  'h100': Chip('h100', 'cuda', 989e12, 3352e9, 84_942_979_072, 450e9, '1'),
  'cpu': Chip('cpu', 'cpu', least='1'),
}
TPUS = tuple(name for name, chip in CHIPS.items() if chip.platform == 'tpu')


class Overfull(ValueError):
  """A program that the compiler refuses because it needs `needed` bytes of a device, which has fewer."""

  def __init__(self, needed: int, said: str):
    super().__init__(f'a device cannot hold the program: it takes {needed / 2**30:.2f} GiB ({said})')
    self.needed = needed


class Refused(ValueError):
  """A program that the compiler gives up on for a reason of its own."""


@dataclasses.dataclass(frozen=True)
class Topology:
  """Chips of one kind, laid out as `shape` says: (16, 16)."""

  chip: Chip
  shape: tuple[int, ...]

  def __str__(self):
    return f'{self.chip.name}:{"x".join(map(str, self.shape))}'

  @property
  def count(self) -> int:
    """How many chips there are."""
    return math.prod(self.shape)

  def devices(self) -> list:
    """Its devices, which can be compiled for.

    Raises ValueError, with the way out, where the compiler is not installed or the chip does not come in this layout.
    """
    return list(_devices(self))


def find(text: str) -> Topology:
  """The topology that 'v5e:16x16', 'h100:8', 'cpu:8' or 'v5e' (one chip) names; ValueError for any other text."""
  name, colon, layout = text.partition(':')
  if name not in CHIPS:
    raise ValueError(
      f'--topology={text}: no chip {name!r}; it is one of {", ".join(CHIPS)}, as in v5e:16x16 or h100:8.'
    )
  if colon and not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', layout):
    raise ValueError(f'--topology={text}: after the colon stand sizes, as in v5e:16x16 or h100:8.')
  shape = tuple(int(size) for size in layout.split('x')) if colon else (1,)
  if CHIPS[name].platform != 'tpu' and len(shape) > 1:
    raise ValueError(f'--topology={text}: {name} takes one number, of all its devices: {name}:{math.prod(shape)}.')
  return Topology(CHIPS[name], shape)


def installed(platform: str = 'tpu') -> bool:
  """Whether what compiles for 'tpu', 'cuda' or 'cpu' is here."""
  if platform == 'tpu':
    return importlib.util.find_spec('libtpu') is not None
  if platform == 'cuda':
    return importlib.util.find_spec('jax_plugins') is not None and any(
      importlib.util.find_spec(f'jax_plugins.xla_cuda{major}') for major in (12, 13)
    )
  return True


def mesh(text: str, **axes: int) -> jax.sharding.Mesh:
  """A mesh of the first devices of a topology, its axes by name and size: mesh('v5e:2x2', data=2, tensor=2)."""
  chips = np.array(find(text).devices()[: math.prod(axes.values())])
  return jax.sharding.Mesh(chips.reshape(tuple(axes.values())), tuple(axes))


def chip(name: str) -> jax.sharding.Mesh:
  """The mesh ('one',) of a single chip of CHIPS."""
  return mesh(name, one=1)


def compiled(function, *arguments, **options) -> jax.stages.Compiled:
  """`function` compiled for the chip in context; arguments may be abstract, options are jax.jit's."""
  return compiled_for(
    jax.sharding.get_abstract_mesh().abstract_device.platform, jax.jit(function, **options), *arguments
  )


def compiled_for(platform: str, jitted: jax.stages.Wrapped, *arguments, quick: bool = False) -> jax.stages.Compiled:
  """A jitted function compiled for a platform, 'tpu', 'cuda' ('gpu') or 'cpu'.

  `quick`: with the least optimization, where that saves time; such a program takes some percent more memory or less.
  It is never put in jax's persistent cache: a program for a chip that is not there cannot be read back.  Raises
  Overfull where the compiler finds that a device cannot hold it (TPU; the other compilers do not look), Refused where
  it gives up otherwise.
  """
  lowered = jitted.trace(*arguments).lower(lowering_platforms=('cuda' if platform == 'gpu' else platform,))
  cached_from = jax.config.jax_persistent_cache_min_compile_time_secs
  jax.config.update('jax_persistent_cache_min_compile_time_secs', math.inf)
  try:
    return lowered.compile(_QUICK.get(platform) if quick else None)
  except jax.errors.JaxRuntimeError as error:
    # Arguments are counted among what it calls temporaries.
    if needed := _NEEDED.search(str(error)):
      raise Overfull(int(float(needed[1]) * 2 ** (10 * ' KMGT'.index(needed[2]))), needed[0]) from error
    said = str(error).strip().partition('\n')[0]
    raise Refused(f'the compiler for {platform} gives up on this program: {said:.300}') from error
  finally:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', cached_from)


@functools.cache
def _devices(topology: Topology) -> tuple:
  of_platform = {'tpu': _tpus, 'cuda': _gpus, 'cpu': _cpus}
  return of_platform[topology.chip.platform](topology)


def _tpus(topology: Topology) -> tuple:
  if not installed('tpu'):
    raise ValueError(
      f"{topology}: compiling for TPUs takes libtpu: pip install 'qalora_jax[aot-tpu]' (Linux on x86-64)."
    )
  # One chip is taken out of the smallest layout.
  layout = topology.chip.least if topology.count == 1 else str(topology).partition(':')[2]
  with _environment(_ALONE):
    try:
      found = described.get_topology_desc(platform='tpu', topology_name=f'{topology.chip.name}:{layout}')
    except jax.errors.JaxRuntimeError as error:
      said = str(error).splitlines()[0]
      raise ValueError(
        f'--topology={topology}: {said} The smallest is {topology.chip.name}:{topology.chip.least}, or '
        f'{topology.chip.name} for one chip.'
      ) from error
  return tuple(found.devices[: topology.count])


def _gpus(topology: Topology) -> tuple:
  if not installed('cuda'):
    raise ValueError(
      f"{topology}: compiling for NVIDIA's chips takes jax's CUDA plugin: pip install 'qalora_jax[aot-gpu]' "
      '(Linux, Python 3.12; no driver and no GPU), or qalora_jax[cuda] where there is one.'
    )
  hosts, rest = divmod(topology.count, _GPUS_A_HOST)
  if hosts and rest:
    raise ValueError(f'--topology={topology}: beyond one host GPUs come in eights.')
  form = f'1x{hosts}x{_GPUS_A_HOST}' if hosts else f'1x1x{rest}'
  target = (_TARGETS / f'{topology.chip.name}.txtpb').read_text()
  found = described.get_topology_desc(platform='cuda', topology_name=form, topology=form, target_config=target)
  return tuple(found.devices)


def _cpus(topology: Topology) -> tuple:
  # Only before jax's first use of a device can it be told how many there are to be.
  with contextlib.suppress(RuntimeError):
    if topology.count > max(jax.config.jax_num_cpu_devices, 1):
      jax.config.update('jax_num_cpu_devices', topology.count)
  here = jax.devices('cpu')
  if len(here) < topology.count:
    raise ValueError(
      f'--topology={topology}: this process has {len(here)} CPU devices; set '
      f'XLA_FLAGS=--xla_force_host_platform_device_count={topology.count}.'
    )
  return tuple(here[: topology.count])


@contextlib.contextmanager
def _environment(variables: dict[str, str]):
  """Variables that are there only inside, so that later processes do not inherit them; ones already set stay."""
  added = {name: value for name, value in variables.items() if name not in os.environ}
  os.environ.update(added)
  try:
    yield
  finally:
    for name in added:
      del os.environ[name]
