"""Dense Hugging Face directories: any program loads them."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from qalora_jax import hf
from qalora_jax.export import job as job_lib
from qalora_jax.export import verify as verify_lib

DTYPES = hf.DTYPES


def check(job: job_lib.Job) -> None:
  """Any model can be dense."""


def write(directory, job: job_lib.Job, progress: Callable[[], None] | None = None) -> None:
  """`hf.write`."""
  hf.write(directory, job.config, job.tree, dtype=job.dtype, progress=progress, **job.tokenizer)


def verify(directory, job: job_lib.Job, progress: Callable[[], None] | None = None) -> verify_lib.Verified:
  """Reads every tensor back; ValueError where one differs by more than one rounding to the dtype."""
  source = hf.Source(directory, job.config)
  number = jnp.finfo(job.dtype)
  eps = 0.0 if job.dtype == 'float32' else float(number.eps) / 2
  allowed = lambda path, leaf: eps * np.abs(verify_lib.dense(leaf)) + float(number.smallest_subnormal)
  return verify_lib.verify(job.config, job.tree, 'safetensors', source.read, allowed, progress)
