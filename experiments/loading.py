"""Question: how much memory does it take to load a checkpoint, beyond what it becomes?

    python -m experiments.loading [--layers=6] [--width=4096] [--vocabulary=32000] [--bits=4] [--directory=PATH]
        [--out=PATH]

Writes a synthetic LLaMA of LLaMA-7B's widths in bfloat16, in shards of half a gigabyte (6 layers: 3 GB; into a
temporary directory, or into PATH, which is then kept and used again), and loads it in a process of its own for every
row of the table:

    streamed   as the commands do (`stacks.OnDevices`): a tensor is read, quantized, and put on the shards it belongs to
    host       as they did: the whole packed tree grows on the host and is then copied to the devices

on one CPU device and on eight over which the weights are divided (sharding.fsdp = 8).  The memory of a CPU's "devices"
is the host's, so the floor of both is the packed result; on an accelerator that part lies elsewhere, and what is left
beyond it is all that the host holds.

    packed_MiB    what the loaded tree holds
    largest_MiB   the largest tensor as it is stored
    peak_MiB      the process's largest resident set (VmHWM) over what it held before it began to load (jax, its
                  devices and the model's shapes), compiling the quantizers included
    beyond        (peak - packed) / largest: how many of the largest tensor stand in memory beside the result

Files are read by mapping them, and mapped pages count as resident: no more than one tensor's, for every tensor's
mapping is closed when it has been read.  glibc is told not to keep what is freed (MALLOC_MMAP_THRESHOLD_), so that
what is counted is held.  Writes PATH.{json,md}, experiments/results/loading by default.
"""

import argparse
from collections.abc import Iterator
import contextlib
import gc
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

if not __package__:
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from qalora_jax import hf
from qalora_jax import layout
from qalora_jax import report
from qalora_jax import sharding
from qalora_jax import stacks
from qalora_jax import tensors
from qalora_jax.models import decoder
from qalora_jax.models import linear
from qalora_jax.quant import affine

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'experiments' / 'results' / 'loading'
GROUP, HEAD, SHARD_BYTES, MIB = 32, 128, 2**29, 2**20
WAYS, DEVICES = ('host', 'streamed'), (1, 8)


def synthesize(directory: pathlib.Path, config: decoder.Config) -> None:
  """Writes a checkpoint of `config` with normal weights in bfloat16; one shard stands in memory."""
  # Weights are pieces of one long noise, each from another place: as good for this, and made in no time.
  noise = np.random.default_rng(0).normal(0, 0.02, 2**24 + 1).astype(np.float32).astype(jnp.bfloat16)
  rng, shapes = np.random.default_rng(1), layout.matrix_shapes(config)

  def named() -> Iterator[tuple[str, np.ndarray]]:
    for path, names in layout.names(config).items():
      shape = shapes[path][::-1] if layout.is_matrix(path) else shapes[path]
      for name in names:
        yield name, np.resize(np.roll(noise, int(rng.integers(len(noise)))), shape)

  with tensors.fresh(directory) as temporary:
    hf.write_config(temporary, config, dtype='bfloat16')
    tensors.write(temporary, named(), SHARD_BYTES)


def load(directory, bits: int, way: str) -> dict:
  """The tree on a mesh of all devices, by one of WAYS."""
  config = hf.read_config(directory)
  scheme = linear.Scheme(quantizers=(('all', affine.Affine(bits, GROUP)),), frozen_dtype=jnp.bfloat16)
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  abstract = jax.eval_shape(decoder.Decoder(config, scheme).init, jax.random.key(0), tokens)['frozen']
  at = sharding.place(abstract, sharding.make_mesh(data=1, fsdp=-1))
  if way == 'host':
    return jax.block_until_ready(jax.device_put(hf.load(directory, config, scheme), at))
  return hf.load(directory, config, scheme, place=stacks.OnDevices(at))


def resident(field: str) -> int:
  """Bytes of this process's resident memory: VmRSS now, VmHWM at most."""
  status = pathlib.Path('/proc/self/status').read_text(encoding='utf-8')
  return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f'{field}:'))


def measured(directory, bits: int, way: str, rounds: int) -> dict:
  """What the last of `rounds` loadings takes, in this process; those before it compile what it needs."""
  jax.block_until_ready(jax.jit(jnp.sin, out_shardings=sharding.replicated(sharding.make_mesh()))(1.0))
  for _ in range(rounds - 1):
    load(directory, bits, way)
  gc.collect()
  with contextlib.suppress(OSError):
    # VmHWM begins anew; where that is not allowed it may say too much, never too little.
    pathlib.Path('/proc/self/clear_refs').write_text('5')
  base, began = resident('VmRSS'), time.monotonic()
  tree = load(directory, bits, way)
  seconds, peak = time.monotonic() - began, resident('VmHWM') - base
  packed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  found, _ = tensors.headers(directory)
  largest = max(int(np.prod(each.shape)) * np.dtype(tensors.DTYPES[each.dtype]).itemsize for each in found.values())
  stored = sum(file.stat().st_size for file in pathlib.Path(directory).glob('*.safetensors'))
  sizes = {'stored': stored, 'packed': packed, 'largest': largest, 'peak': peak}
  return {
    'way': way,
    'devices': jax.device_count(),
    **{f'{name}_MiB': round(size / MIB, 1) for name, size in sizes.items()},
    'beyond': (peak - packed) / largest,
    'seconds': round(seconds, 1),
  }


def apart(directory, bits: int, way: str, devices: int, rounds: int = 1) -> dict:
  """`measured` in a fresh process of so many devices."""
  added = {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    'MALLOC_MMAP_THRESHOLD_': '65536',
    'MALLOC_TRIM_THRESHOLD_': '65536',
  }
  words = [str(directory), str(bits), way, str(rounds)]
  command = [sys.executable, '-c', f'from experiments import loading; loading.child({words})']
  done = subprocess.run(command, cwd=ROOT, env=os.environ | added, capture_output=True, text=True, check=False)
  if done.returncode:
    raise RuntimeError(f'loading {way} on {devices} devices failed:\n{done.stderr}')
  return json.loads(done.stdout.splitlines()[-1])


def child(words: list[str]) -> None:
  """Prints `measured` as one line of JSON."""
  directory, bits, way, rounds = words
  print(json.dumps(measured(directory, int(bits), way, int(rounds))))


def main(argv=None) -> None:
  """The table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--layers', type=int, default=6)
  parser.add_argument('--width', type=int, default=4096)
  parser.add_argument('--vocabulary', type=int, default=32000)
  parser.add_argument('--bits', type=int, default=4)
  parser.add_argument('--directory', type=pathlib.Path)
  parser.add_argument('--out', type=pathlib.Path, default=RESULTS)
  options = parser.parse_args(argv)
  mlp, heads = round(11008 * options.width / 4096 / GROUP) * GROUP, options.width // HEAD
  config = decoder.Config(options.vocabulary, options.width, mlp, options.layers, heads, heads)
  shown = [f'--{name}={getattr(options, name)}' for name in ('layers', 'width', 'vocabulary', 'bits')]
  command = shlex.join(['python', '-m', 'experiments.loading', *shown])
  with tempfile.TemporaryDirectory() as temporary:
    directory = options.directory or pathlib.Path(temporary) / 'model'
    if not directory.exists():
      synthesize(directory, config)
    rows = []
    for devices in DEVICES:
      for way in WAYS:
        rows.append(apart(directory, options.bits, way, devices))
        report.publish(options.out, 'Loading', command, rows, group=GROUP, mlp=mlp)


if __name__ == '__main__':
  main()
