"""GPTQ checkpoints, as AutoGPTQ, GPTQModel and transformers write them: quantized weights as a base.

    dense[i, o] = scales[l, o] * (code[i, o] - zero[l, o])      l = i // group

with unsigned codes and integer zero-points; `gptq` (v1) stores zero - 1, `gptq_v2` zero itself.  As a QTensor:

    code - 2^(bits - 1)      scale = scales      offset = scales * (2^(bits - 1) - zero)

NAME.qweight [I * bits / 32, O] and NAME.qzeros [L, O * bits / 32] hold codes one after another, along the inputs and
along the outputs; NAME.g_idx [I] the group of every input, which has to be i // group (no act-order, or with static
groups).
"""

from collections.abc import Callable
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax import bitstream
from qalora_jax import families
from qalora_jax import hf
from qalora_jax import layout
from qalora_jax import stacks
from qalora_jax import tensors
from qalora_jax.models import layers
from qalora_jax.models import linear
from qalora_jax.quant import qtensor

METHOD = 'gptq'
FORMATS = ('gptq', 'gptq_v2')


def holds(directory) -> bool:
  """Whether config.json in `directory` says that its weights are GPTQ's."""
  file = pathlib.Path(directory) / hf.CONFIG
  stated = tensors.read_json(file).get('quantization_config') if file.is_file() else None
  return isinstance(stated, dict) and stated.get('quant_method') == METHOD


def describe(directory) -> dict[str, qtensor.Form]:
  """{weight: form} of the quantized matrices; ValueError for a checkpoint that is not packed as above."""
  stated, (found, problems) = _stated(directory), tensors.headers(directory)
  config = hf.read_config(directory, quantized=True)
  check_family(config)
  forms, wanted, shapes = {}, {}, layout.matrix_shapes(config)
  for path, names in layout.names(config, layout.apart(config)).items():
    module, shape = layout.module(names[0]), shapes[layout.unstacked(path)]
    if not layout.is_matrix(path) or f'{module}.qweight' not in found:
      wanted[names[0]] = hf.dense_wanted(path, shape)
      continue
    bits, group = stated['bits'], qtensor.check_group(shape[0], stated['group_size'], f'{directory}: {module}')
    wanted |= _fields(module, shape, bits, group)
    scale = found.get(f'{module}.scales')
    form = qtensor.Form(bits, group, scale='float16' if scale and scale.dtype == 'F16' else 'float32')
    forms[linear.weight_name(layout.module(path))] = form
  ignored = lambda name: name.endswith(('.g_idx', '.bias')) or families.of(config).ignored(config, name)
  tensors.check(directory, found, wanted, problems, ignored)
  return forms


def check_family(config: layers.Config) -> None:
  """ValueError for a family whose files hold several projections in one tensor, or one the other way round."""
  if families.of(config).views(config):
    raise ValueError(
      f"model_type {config.family!r} has files in which projections lie otherwise than here, and GPTQ's codes of such "
      'are not known: use the dense checkpoint, and --format=qalora or hf to write one.'
    )


def load(
  directory,
  config: layers.Config,
  scheme: linear.Scheme,
  *,
  progress: Callable[[], None] | None = None,
  place: stacks.Place | None = None,
) -> dict:
  """The tree of the collection 'frozen', at `place` (default: on the host); as `packed.load`.

  Raises ValueError where the groups of an act-order checkpoint are not contiguous, or a projection has a bias that the
  model has not.
  """
  forms, shapes, found = describe(directory), layout.matrix_shapes(config), tensors.headers(directory)[0]
  stated_version, biased = version(directory), biases(config)
  read = lambda name: tensors.read(name, found[name])
  names = layout.names(config, scheme.starts(config))
  form = {path: forms.get(linear.weight_name(layout.module(path))) for path in names}

  def blank(path):
    shape = shapes[layout.unstacked(path)]
    if form[path] is None:
      return jax.ShapeDtypeStruct(shape, scheme.frozen_dtype)
    return jax.eval_shape(form[path], jax.ShapeDtypeStruct(shape, jnp.float32))

  def part(path, name):
    if form[path] is None:
      return read(name).T if layout.is_matrix(path) else read(name)
    module = layout.module(name)
    return matrix(directory, found, module, form[path], stated_version, has_bias=f'{module}.bias' in biased)

  return layout.assemble(config, {path: blank(path) for path in names}, part, progress, place or stacks.OnHost())


def biases(config: layers.Config) -> set[str]:
  """The names of the biases that the model has."""
  return {name for path, names in layout.names(config).items() if path.endswith('/bias') for name in names}


def matrix(
  directory,
  found: dict[str, tensors.Header],
  module: str,
  form: qtensor.Form,
  version: str,
  *,
  has_bias: bool = False,
):
  """The QTensor of one module; ValueError as `load`.  `found`: the headers of the directory."""
  read = lambda field: tensors.read(f'{module}.{field}', found[f'{module}.{field}'])
  for field, group in (('g_idx', form.group), ('bias', None)):
    if f'{module}.{field}' in found and not (field == 'bias' and has_bias):
      _check_extra(directory, f'{module}.{field}', read(field), group)
  return _qtensor(*map(read, ('qweight', 'qzeros', 'scales')), form, version)


def version(directory) -> str:
  """The checkpoint's format: one of FORMATS."""
  return _stated(directory)['checkpoint_format']


def _qtensor(qweight, qzeros, scales, form: qtensor.Form, version: str) -> qtensor.QTensor:
  codes = bitstream.unpack(qweight.view(np.uint32).T, form.bits).T
  zeros = bitstream.unpack(qzeros.view(np.uint32), form.bits).astype(np.int32)
  if version == 'gptq':
    # Stored in `bits` bits, 0 - 1 is the largest number.
    zeros = (zeros + 1) % 2**form.bits
  half = 2 ** (form.bits - 1)
  offset = scales.astype(np.float32) * (half - zeros)
  planes = qtensor.pack(jnp.asarray(codes.astype(np.int32) - half), form.bits)
  return qtensor.QTensor(planes, scales.astype(form.scale), offset, bits=form.bits, group=form.group)


def _check_extra(directory, name: str, value: np.ndarray, group: int | None) -> None:
  if group is None:
    if np.any(value):
      raise ValueError(f'{directory}: {name} is not zero, and the model of its config.json has no such bias.')
  elif not np.array_equal(value, np.arange(len(value)) // group):
    raise ValueError(
      f'{directory}: {name} scatters the inputs of a group (act-order): offsets per group could not merge an adapter. '
      'Quantize with desc_act = false, or with static groups.'
    )


def _fields(module: str, shape, bits: int, group: int) -> dict[str, tensors.Wanted]:
  inputs, outputs = shape
  return {
    f'{module}.qweight': tensors.Wanted((inputs * bits // 32, outputs), ('I32',)),
    f'{module}.qzeros': tensors.Wanted((inputs // group, outputs * bits // 32), ('I32',)),
    f'{module}.scales': tensors.Wanted((inputs // group, outputs), hf.FLOATS),
  }


def _stated(directory) -> dict:
  """quantization_config, checked and completed."""
  file = pathlib.Path(directory) / hf.CONFIG
  stated = {'group_size': -1, 'checkpoint_format': 'gptq', **tensors.read_json(file)['quantization_config']}
  if stated.get('bits') not in qtensor.PLANES:
    raise ValueError(f'{file}: quantization_config has bits = {stated.get("bits")!r}; supported: 8, 4, 3, 2.')
  if stated['checkpoint_format'] not in FORMATS:
    raise ValueError(
      f"{file}: checkpoint_format = {stated['checkpoint_format']!r}; supported: {', '.join(FORMATS)} (kernels' own "
      'layouts, such as marlin, are converted back by the program that wrote them).'
    )
  if stated.get('dynamic'):
    raise ValueError(f'{file}: quantization_config has widths of its own for some modules (dynamic); not supported.')
  return stated
