"""GPTQ checkpoints (`gptq_files`), for bases whose offsets are integer zero-points.

A merged QA-LoRA model has real offsets, which this layout cannot hold: it is refused, unless it may be rounded.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax import bitstream
from qalora_jax import gptq_files
from qalora_jax import hf
from qalora_jax import layout
from qalora_jax import tensors
from qalora_jax.export import job as job_lib
from qalora_jax.export import verify as verify_lib
from qalora_jax.quant import qtensor

DTYPES = ('float32', 'float16')


def check(job: job_lib.Job) -> None:
  """ValueError for a model without quantized weights, of several forms, or with offsets that are no zero-points."""
  gptq_files.check_family(job.config)
  found = [(name, leaf) for _, name, leaf in layout.matrices(job.config, job.tree)]
  if not found:
    raise ValueError('nothing in this model is quantized; write it with --format=hf.')
  forms = sorted({(leaf.levels, leaf.bits, leaf.group) for _, leaf in found})
  if len(forms) > 1 or forms[0][0] != 'integer':
    shown = ', '.join(f'{bits} bits ({levels}) in groups of {group}' for levels, bits, group in forms)
    raise ValueError(f'a GPTQ checkpoint has one width and group of integer codes for all; here are {shown}.')
  bits = forms[0][1]
  for name, leaf in found:
    inputs, outputs = leaf.shape[-2:]
    if inputs * bits % 32 or outputs * bits % 32:
      raise ValueError(f'{name} is {inputs} x {outputs}: {bits}-bit codes do not fill whole words of 32 bits.')
  if not job.lossy:
    _refuse_real(job)


def _refuse_real(job: job_lib.Job) -> None:
  worst, farthest, change, size = '', 0.0, 0.0, 0.0
  for _, name, leaf in layout.parts(job.config, job.tree):
    if isinstance(leaf, qtensor.QTensor):
      distance, moved, norm = (float(x) for x in _loss(leaf))
      change, size = change + moved, size + norm
      # An offset is as many steps long as its zero-point is far from the middle, and was rounded as such.
      eps = 0.0 if leaf.offset is None else float(np.finfo(leaf.offset.dtype).eps)
      if distance > max(farthest, 2**leaf.bits * eps):
        farthest, worst = distance, name
  if worst:
    raise ValueError(
      f'{worst} has offsets up to {farthest:.2f} steps from an integer zero-point, and GPTQ files hold no others (a '
      f'merged adapter makes them real).  Rounding them would change the weights by {(change / size) ** 0.5:.1%} '
      'of their norm: write --format=mlx, gguf (4 bits) or qalora, which hold them, or accept that by --allow-lossy.'
    )


def write(directory, job: job_lib.Job, progress: Callable[[], None] | None = None) -> None:
  """Writes qweight, qzeros, scales and g_idx of every matrix, the rest dense in `job.dtype`."""
  kinds = {path: leaf for path, _, leaf in layout.matrices(job.config, job.tree)}
  one = next(iter(kinds.values()))
  # v1 stores zero - 1, which 0 has no place for.
  version = 'gptq_v2' if any(int(_zeros(leaf).min()) == 0 for leaf in kinds.values()) else 'gptq'

  quantized = lambda name, leaf: _tensors(layout.module(name), leaf, version)
  stated = {
    'quant_method': gptq_files.METHOD,
    'checkpoint_format': version,
    'bits': one.bits,
    'group_size': one.group,
    'desc_act': False,
    'sym': one.offset is None,
    'lm_head': 'lm_head/kernel' in kinds,
  }
  hf.publish(
    directory,
    job.config,
    hf.named(job.config, job.tree, job.dtype, quantized, progress),
    dtype=job.dtype,
    shard_bytes=hf.SHARD_BYTES,
    more={'quantization_config': stated},
    **job.tokenizer,
  )


def verify(directory, job: job_lib.Job, progress: Callable[[], None] | None = None) -> verify_lib.Verified:
  """Reads every weight back by `gptq_files` (GPTQ's own libraries run on GPUs alone); ValueError where one differs by
  more than the rounding of scales to float16 and, where the job is lossy, of zero-points.
  """
  forms, found, version = gptq_files.describe(directory), tensors.headers(directory)[0], gptq_files.version(directory)
  weights = {name: weight for weight, name in layout.weights(job.config).items()}
  biased = gptq_files.biases(job.config)

  def read(path, name):
    form = forms.get(weights.get(layout.module(name)))
    if form is not None:
      module = layout.module(name)
      has_bias = f'{module}.bias' in biased
      return verify_lib.dense(gptq_files.matrix(directory, found, module, form, version, has_bias=has_bias))
    stored = tensors.read(name, found[name])
    return stored.T if layout.is_matrix(path) else stored

  half, least = float(np.finfo(np.float16).eps) / 2, float(np.finfo(np.float16).smallest_subnormal)

  def allowed(path, leaf):
    if not isinstance(leaf, qtensor.QTensor):
      return 0.0 if job.dtype == 'float32' else half * np.abs(leaf) + least
    rounding = verify_lib.rounding(leaf, 2 * half) + 2.0**leaf.bits * least
    if job.lossy:
      distance = np.asarray(_distance(leaf)) * np.asarray(qtensor.scales(leaf))
      rounding += np.repeat(distance, leaf.group, axis=0)
    return rounding

  reader = "qalora_jax's reader of GPTQ files"
  return verify_lib.verify(job.config, job.tree, reader, read, allowed, progress)


def _tensors(module: str, q: qtensor.QTensor, version: str):
  """(name, tensor) of the four tensors of a matrix."""
  half = 2 ** (q.bits - 1)
  codes = (np.asarray(_codes(q)) + half).astype(np.uint8)
  zeros = np.asarray(_zeros(q)) - (version == 'gptq')
  yield f'{module}.qweight', np.ascontiguousarray(bitstream.pack(codes.T, q.bits).T).view(np.int32)
  yield f'{module}.qzeros', bitstream.pack(zeros.astype(np.uint8), q.bits).view(np.int32)
  yield f'{module}.scales', hf.cast(np.asarray(qtensor.scales(q)), 'float16', f'{module}.scales')
  yield f'{module}.g_idx', (np.arange(q.shape[-2]) // q.group).astype(np.int32)


_codes = jax.jit(qtensor.codes)


def _real_zeros(q: qtensor.QTensor) -> jax.Array:
  """2^(bits - 1) - offset / scale [..., L, O]: where the grid of a group has its zero."""
  scale, offset = qtensor.scales(q), qtensor.offsets(q)
  return 2 ** (q.bits - 1) - jnp.where(offset == 0, 0.0, offset / scale)


@jax.jit
def _zeros(q: qtensor.QTensor) -> jax.Array:
  """The nearest zero-points that fit into `bits` bits, int32."""
  return jnp.clip(jnp.round(_real_zeros(q)), 0, 2**q.bits - 1).astype(jnp.int32)


@jax.jit
def _distance(q: qtensor.QTensor) -> jax.Array:
  """Steps between every zero-point and the nearest that can be stored [..., L, O]."""
  return jnp.abs(_real_zeros(q) - _zeros(q))


@jax.jit
def _loss(q: qtensor.QTensor):
  """(the largest distance, the square of what rounding zero-points changes, the square of the weights)."""
  distance = _distance(q)
  change = jnp.where(distance == 0, 0.0, distance * qtensor.scales(q))
  return distance.max(), q.group * jnp.sum(change**2), jnp.sum(qtensor.dequantize(q) ** 2)
