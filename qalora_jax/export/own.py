"""The package's own directories (`packed`): quantized as trained, loaded again here."""

from collections.abc import Callable

import numpy as np

from qalora_jax import packed
from qalora_jax import quant
from qalora_jax import tensors
from qalora_jax.export import job as job_lib
from qalora_jax.export import verify as verify_lib

DTYPES = ('float32',)


def check(job: job_lib.Job) -> None:
  """ValueError for a model without quantized weights."""
  if not quant.matrices(job.tree):
    raise ValueError('nothing in this model is quantized; write it with --format=hf.')


def write(directory, job: job_lib.Job, progress: Callable[[], None] | None = None) -> None:
  """`packed.write`."""
  packed.write(directory, job.config, job.tree, provenance=job.provenance, progress=progress, **job.tokenizer)


def verify(directory, job: job_lib.Job, progress: Callable[[], None] | None = None) -> verify_lib.Verified:
  """Reads every tensor back; ValueError where one is another."""
  found, count = tensors.headers(directory)[0], 0
  for name, tensor in packed.named(job.config, job.tree, progress):
    if not np.array_equal(tensors.read(name, found[name]), tensor):
      raise ValueError(f'not written: {name} is not read back as it is; please report this.')
    count += 1
  return verify_lib.Verified('safetensors', count, count, 0.0, '')
