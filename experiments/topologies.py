"""Chips that are not here: jax compiles for TPUs on any Linux machine with libtpu (the extra aot-tpu).

`chip('v5e')` is a mesh of one device that can only be compiled for:

    with jax.set_mesh(topologies.chip('v5e')):
      compiled = topologies.compiled(function, *arguments)

Under it `qmatmul` plans as on that chip.  A compiled program says what it holds in memory (`memory_analysis()`) and
what it does (`as_text()`); it cannot run.  `chip('h100')` takes the extra aot-gpu instead, in its own environment.
"""

import contextlib
import functools
import importlib.util
import math
import os
import pathlib

import jax
from jax.experimental import topologies
import numpy as np

# The smallest topologies that every libtpu knows; one of their chips is taken.
CHIPS = {'v5e': 'v5e:2x2', 'v6e': 'v6e:2x2', 'v5p': 'v5p:2x2x1'}
H100 = 'h100'
# The chip as XLA describes it.
_H100 = pathlib.Path(__file__).resolve().parents[1] / 'tests' / 'aot_gpu' / 'h100.txtpb'

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


def installed() -> bool:
  """Whether libtpu is here."""
  return importlib.util.find_spec('libtpu') is not None


def chip(name: str) -> jax.sharding.Mesh:
  """The mesh ('one',) of a single chip of CHIPS; RuntimeError without libtpu."""
  return pod(CHIPS[name], one=1)


@functools.cache
def pod(topology: str, **axes: int) -> jax.sharding.Mesh:
  """A mesh of the first chips of a topology, its axes by name and size: pod('v5e:2x2', data=2, tensor=2)."""
  if not installed():
    raise RuntimeError("compiling for TPUs takes libtpu: pip install 'qalora_jax[aot-tpu]' (Linux on x86-64).")
  with _environment(_ALONE):
    described = topologies.get_topology_desc(platform='tpu', topology_name=topology)
  chips = np.array(described.devices[: math.prod(axes.values())])
  return jax.sharding.Mesh(chips.reshape(tuple(axes.values())), tuple(axes))


def compiled(function, *arguments, **options) -> jax.stages.Compiled:
  """`function` compiled for the chip in context; arguments may be abstract, options are jax.jit's.

  It is never put in jax's persistent cache: a program for a chip that is not there cannot be read back.
  """
  platform = jax.sharding.get_abstract_mesh().abstract_device.platform
  platform = 'tpu' if platform == 'tpu' else 'cuda'
  lowered = jax.jit(function, **options).trace(*arguments).lower(lowering_platforms=(platform,))
  cached_from = jax.config.jax_persistent_cache_min_compile_time_secs
  jax.config.update('jax_persistent_cache_min_compile_time_secs', math.inf)
  try:
    return lowered.compile()
  finally:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', cached_from)


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
