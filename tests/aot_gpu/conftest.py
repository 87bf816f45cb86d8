"""Programs compiled for an H100 on a machine without one; `make test-aot-gpu` runs what stands here.

Nothing runs: what a compiled program promises is read from it (the memory it takes, its kernels' PTX, the registers
that `ptxas` gives them).
"""

import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import warnings

import pytest

# Before anything imports jax.  XLA and Mosaic GPU write the PTX that they make into these folders.
os.environ['JAX_PLATFORMS'] = 'cpu'
_DUMP = pathlib.Path(tempfile.mkdtemp(prefix='ptx-'))
_XLA, _MOSAIC = _DUMP / 'xla', _DUMP / 'mosaic'
_XLA.mkdir()
_MOSAIC.mkdir()
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_dump_to={_XLA} --xla_dump_emitter_re=ptx'
os.environ['MOSAIC_GPU_DUMP_TO'] = str(_MOSAIC)

# The chip as XLA describes it, from its published facts.
_H100 = (pathlib.Path(__file__).parents[2] / 'qalora_jax' / 'targets' / 'h100.txtpb').read_text()
# Others by what matters here of what differs: compute capability, multiprocessors, shared memory of one and of a block.
_OTHERS = {
  'NVIDIA A100-SXM4-80GB': ((8, 0), 108, 164 << 10, 163 << 10),
  'NVIDIA L4': ((8, 9), 58, 100 << 10, 99 << 10),
  'NVIDIA B200': ((10, 0), 148, 228 << 10, 227 << 10),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A kernel's use of the chip, as `ptxas` counts it: 32-bit registers of a thread, bytes spilled from them.

  serialized: whether `ptxas` lets no two of its wgmma overlap.
  """

  name: str
  registers: int
  spilled: int
  serialized: bool


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A program compiled for a chip.

  ptx: the text of every module of kernels in it, by file name; Pallas kernels stand there under their `name`.
  """

  program: object
  ptx: dict[str, str]

  @property
  def temporary(self) -> int:
    """The bytes it takes beside its arguments and results."""
    return self.program.memory_analysis().temp_size_in_bytes

  @property
  def hlo(self) -> str:
    """What XLA made of it."""
    return self.program.as_text()

  def kernels(self) -> list[Kernel]:
    """Every kernel, as `ptxas` assembles it; the test is skipped where no `ptxas` is installed."""
    return [kernel for text in self.ptx.values() for kernel in assemble(text)]


def assemble(ptx: str) -> list[Kernel]:
  """The kernels of a PTX module, as `ptxas` assembles them for the target that the module names."""
  own = (pathlib.Path(path) for path in sys.path)
  found = [str(ptxas) for path in own for ptxas in path.glob('nvidia/*/bin/ptxas')] + [shutil.which('ptxas')]
  if found[0] is None:
    pytest.skip('no ptxas (it comes with nvidia-cuda-nvcc)')
  target = re.search(r'^\.target\s+(\w+)', ptx, re.MULTILINE).group(1)
  command = [found[0], '-v', f'-arch={target}', '-o', os.devnull, '/dev/stdin']
  told = subprocess.run(command, input=ptx, capture_output=True, text=True, check=False)
  assert told.returncode == 0, told.stderr
  entry = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
  serialized = re.findall(r"wgmma\.mma_async instructions are serialized.*'(\w+)'", told.stderr)
  return [
    Kernel(name, int(registers), int(stored) + int(loaded), name in serialized)
    for name, stored, loaded, registers in re.findall(entry, told.stderr, re.DOTALL)
  ]


@dataclasses.dataclass(frozen=True)
class Chip:
  """One or more chips that are not here."""

  mesh: object

  def compile(self, function, *args) -> Compiled:
    """`function` of arrays of the shapes and dtypes of `args`, compiled; every array lies whole on every chip."""
    import jax

    # A program that was compiled before would be found in memory, and its PTX nowhere.
    jax.clear_caches()
    for folder in (_XLA, _MOSAIC):
      for path in folder.iterdir():
        path.unlink()
    whole = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
    # The mesh in context is how the plan, and Pallas, learn of the chip.
    with jax.set_mesh(self.mesh), warnings.catch_warnings():
      warnings.filterwarnings('ignore', 'The Pallas Triton backend is deprecated')
      traced = jax.jit(function, in_shardings=whole, out_shardings=whole).trace(*args)
      program = traced.lower(lowering_platforms=('cuda',)).compile()
    texts = {path.name: path.read_text() for folder in (_XLA, _MOSAIC) for path in sorted(folder.glob('*.ptx'))}
    return Compiled(program, texts)


def _chips(description: str, count: int = 1) -> Chip:
  import jax
  from jax.experimental import topologies
  import numpy as np

  form = f'1x1x{count}'
  try:
    topology = topologies.get_topology_desc(
      platform='cuda', topology_name=form, topology=form, target_config=description
    )
  except Exception as error:  # The plugin is missing: jax has no error of its own for that.
    pytest.skip(f'no compiler for NVIDIA chips (make test-aot-gpu installs it): {error}')
  return Chip(jax.sharding.Mesh(np.array(topology.devices), ('data',)))


@pytest.fixture(scope='session')
def h100() -> Chip:
  """An H100: `h100.compile(f, *shapes)` is f compiled for it."""
  return _chips(_H100)


def _other(name: str) -> Chip:
  (major, minor), cores, shared, of_block = _OTHERS[name]
  changes = {
    r'(device_description_str: ).*': f'"{name}"',
    r'(major: )9(?=\s+minor: 0\s+}\s+core_count)': str(major),
    r'(major: \d+\s+minor: )0(?=\s+}\s+core_count)': str(minor),
    r'(core_count: )\d+': str(cores),
    r'(shared_memory_per_core: )\d+': str(shared),
    r'(shared_memory_per_block_optin: )\d+': str(of_block),
  }
  description = _H100
  for pattern, value in changes.items():
    description, count = re.subn(pattern, rf'\g<1>{value}', description)
    assert count == 1, pattern
  return _chips(description)


@pytest.fixture(scope='session')
def b200() -> Chip:
  """A chip of the generation after an H100's."""
  return _other('NVIDIA B200')


@pytest.fixture(scope='session', params=_OTHERS)
def other(request) -> Chip:
  """Chips of the generations before and after an H100's."""
  return _other(request.param)


@pytest.fixture(scope='session', autouse=True)
def _compiled_once():
  """Nothing is taken from the cache of compiled programs: it holds no PTX."""
  yield
  shutil.rmtree(_DUMP)
