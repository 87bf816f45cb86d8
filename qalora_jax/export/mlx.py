"""MLX directories, as mlx_lm loads and serves them: packed weights, scales and biases beside a config.json.

MLX's affine weights are w = scale * u + bias with unsigned codes u, so that offsets of any value are held:

    u = code + 2^(bits - 1)      bias = offset - 2^(bits - 1) * scale

Codes of a row (one output) stand one after another in uint32 words, from the lowest bit up.
"""

from collections.abc import Callable
import functools
import pathlib

import jax
import numpy as np

from qalora_jax import bitstream
from qalora_jax import hf
from qalora_jax import layout
from qalora_jax import tensors
from qalora_jax.export import job as job_lib
from qalora_jax.export import verify as verify_lib
from qalora_jax.models import layers
from qalora_jax.quant import qtensor

# Groups that MLX's kernels know; a larger one that they divide is written as several of equal scale and bias.
_GROUPS = (128, 64, 32)
# The families that mlx_lm computes as here where no token's sight ends before the model's.
_FAMILIES = ('llama', 'mistral', 'qwen2', 'qwen3', 'gemma2')
# Not bfloat16: its offsets would lose 1-5 % of an adapter.
DTYPES = ('float32', 'float16')


def check(job: job_lib.Job) -> None:
  """ValueError for a model that MLX's affine weights cannot hold without loss, and where MLX is absent."""
  library()
  _check_family(job.config)
  for _, name, leaf in layout.matrices(job.config, job.tree):
    if leaf.levels != 'integer':
      raise ValueError(
        f'{name} holds {leaf.levels} codes, and MLX has no such table: write --format=qalora, or dense by --format=hf.'
      )
    if _group(leaf) is None:
      raise ValueError(
        f'{name} has groups of {leaf.group} inputs; MLX knows {", ".join(map(str, _GROUPS[::-1]))} and multiples: '
        'quantize with one of them, or write --format=qalora.'
      )


def _check_family(config: layers.Config) -> None:
  """ValueError for a family that mlx_lm has not under these names, and for windows, which it looks at in none here."""
  if config.family not in _FAMILIES:
    raise ValueError(
      f'model_type {config.family!r}: MLX directories are written of {", ".join(_FAMILIES)}; write --format=hf, or '
      '--format=qalora to keep the codes.'
    )
  if config.cut_short:
    raise ValueError(
      f'sliding_window = {config.window}: mlx_lm lets the tokens of a {config.family} see all that came before, and '
      'says something else beyond the window; write --format=hf, or --format=qalora to keep the codes.'
    )


def write(directory, job: job_lib.Job, progress: Callable[[], None] | None = None) -> None:
  """Writes the model tensor by tensor; what is dense there stays dense."""
  forms = {layout.module(name): (_group(leaf), leaf.bits) for _, name, leaf in layout.matrices(job.config, job.tree)}

  quantized = lambda name, leaf: _tensors(layout.module(name), leaf, job.dtype)
  more = quantization(forms)
  hf.publish(
    directory,
    job.config,
    hf.named(job.config, job.tree, job.dtype, quantized, progress),
    dtype=job.dtype,
    shard_bytes=hf.SHARD_BYTES,
    more=more,
    **job.tokenizer,
  )


def quantization(forms: dict[str, tuple[int, int]]) -> dict:
  """What config.json says of quantized weights: {module: (group, bits)}; those of the commonest form say nothing."""
  if not forms:
    return {}
  described = {name: {'group_size': group, 'bits': bits} for name, (group, bits) in forms.items()}
  commonest = max(described.values(), key=list(described.values()).count)
  others = {name: one for name, one in described.items() if one != commonest}
  value = {**commonest, 'mode': 'affine', **others}
  return {'quantization': value, 'quantization_config': value}


def library():
  """mlx.core on the CPU; ValueError saying how to get it."""
  try:
    import mlx.core as mx
  except ImportError as error:
    raise ValueError(
      f'MLX is needed to read the export back, and does not load ({error}): pip install "qalora_jax[mlx]".'
    ) from error
  mx.set_default_device(mx.cpu)
  return mx


def verify(directory, job: job_lib.Job, progress: Callable[[], None] | None = None) -> verify_lib.Verified:
  """Reads every weight back by MLX; ValueError where one differs by more than rounding."""
  mx = library()
  files = {name: header.file for name, header in tensors.headers(directory)[0].items()}
  stated = tensors.read_json(pathlib.Path(directory) / hf.CONFIG).get('quantization', {})
  # Opened lazily: a tensor is read when it is used.
  opened = functools.lru_cache(maxsize=1)(lambda file: mx.load(str(file)))
  tensor = lambda name: opened(files[name])[name]

  def read(path, name):
    module = layout.module(name)
    if f'{module}.scales' not in files:
      value = np.array(tensor(name).astype(mx.float32))
    else:
      own = stated.get(module, stated)
      value = mx.dequantize(
        tensor(name), tensor(f'{module}.scales'), tensor(f'{module}.biases'), own['group_size'], own['bits']
      )
      value = np.array(value.astype(mx.float32))
    return value.T if layout.is_matrix(path) else value

  # Four roundings: of the bias, of what is stored, of a product and of a sum.
  eps = 4 * float(np.finfo(job.dtype).eps)
  # Below float16's normal numbers a rounding is half of its smallest step, for a scale as for 2^bits of them.
  least = float(np.finfo(job.dtype).smallest_subnormal) * 2**8
  allowed = lambda path, leaf: verify_lib.rounding(leaf, eps) + least
  return verify_lib.verify(job.config, job.tree, f'mlx {mx.__version__}', read, allowed, progress)


def _group(q: qtensor.QTensor) -> int | None:
  """The largest group of MLX that divides the matrix's own."""
  return next((group for group in _GROUPS if q.group % group == 0), None)


def _tensors(module: str, q: qtensor.QTensor, dtype: str):
  """(name, tensor) of the three tensors of a matrix."""
  codes, scale, bias = (np.asarray(part) for part in _unsigned(q))
  times = q.group // _group(q)
  yield f'{module}.weight', bitstream.pack(codes.T, q.bits)
  for name, value in (('scales', scale), ('biases', bias)):
    yield f'{module}.{name}', hf.cast(np.repeat(value, times, axis=0).T, dtype, f'{module}.{name}')


@jax.jit
def _unsigned(q: qtensor.QTensor):
  """Codes [I, O] uint8, scales and biases [L, O] float32."""
  zero = 2 ** (q.bits - 1)
  scale = qtensor.scales(q)
  return (qtensor.codes(q) + zero).astype('uint8'), scale, qtensor.offsets(q) - zero * scale
