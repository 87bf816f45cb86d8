"""The package's own directories: a model that is still quantized, merged or not.

As a Hugging Face directory, but the `NAME.weight` of a quantized matrix is replaced by the fields of its QTensor, with
its axes: `NAME.codes.0`, `NAME.codes.1` (the planes, uint32), `NAME.scale` and `NAME.offset` (float32 or float16).
qalora.json says which matrices these are, in how many bits and groups, by which formula, and where they come from.
"""

from collections.abc import Callable
import functools
import pathlib

from flax import traverse_util
import jax
import jax.numpy as jnp

from qalora_jax import hf
from qalora_jax import layout
from qalora_jax import tensors
from qalora_jax.models import llama
from qalora_jax.quant import qtensor

MANIFEST = 'qalora.json'
FORMAT = 'qalora_jax'
VERSION = 1
FORMULA = (
  "dense[i, o] = code[i, o] * scale[i // group, o] + offset[i // group, o]. A code is a two's-complement number of "
  '`bits` bits, spread over planes, low bits first, of these widths: 8: [8], 4: [4], 3: [2, 1], 2: [2]. codes.p holds '
  'plane p: in column o, consecutive inputs fill each uint32 from its lowest bit up, 32 // width of them.'
)
_SCALES = ('F32', 'F16')
_ENTRY = ('bits', 'group', 'inputs', 'outputs')


def is_packed(directory) -> bool:
  """Whether `directory` was written by `write`."""
  return (pathlib.Path(directory) / MANIFEST).is_file()


def manifest(directory) -> dict:
  """qalora.json, `provenance` included; ValueError for another format, another version or a malformed entry."""
  file = pathlib.Path(directory) / MANIFEST
  if not file.is_file():
    raise FileNotFoundError(f'{directory} has no {MANIFEST}; `qalora quantize` and `qalora export` write one.')
  value = tensors.read_json(file)
  if value.get('format') != FORMAT:
    raise ValueError(f'{file}: format is {value.get("format")!r}, not {FORMAT!r}.')
  if value.get('version') != VERSION:
    raise ValueError(f'{file}: version {value.get("version")!r}; this program reads version {VERSION}: update it.')
  weights = value.get('weights')
  if not isinstance(weights, dict):
    raise ValueError(f'{file}: has no "weights".')
  for name, entry in weights.items():
    if not isinstance(entry, dict) or any(not isinstance(entry.get(key), int) for key in _ENTRY):
      raise ValueError(f'{file}: {name} needs the whole numbers {", ".join(_ENTRY)}; it holds {entry!r}.')
    if entry['bits'] not in qtensor.PLANES:
      raise ValueError(f'{file}: {name} has {entry["bits"]} bits; a code has one of {sorted(qtensor.PLANES)}.')
    if entry['group'] < 1 or entry['inputs'] % entry['group']:
      raise ValueError(f'{file}: {name} has {entry["inputs"]} inputs in groups of {entry["group"]}.')
  return value


def describe(directory) -> dict[str, tuple[int, int]]:
  """{path: (bits, group)} of the quantized matrices, such as {'layers/mlp/down_proj': (4, 32)}.

  Raises ValueError where qalora.json does not fit config.json, or layers of one stack differ.
  """
  file = pathlib.Path(directory) / MANIFEST
  entries, config = dict(manifest(directory)['weights']), hf.read_config(directory)
  shapes, found = layout.matrix_shapes(config), {}
  for path, names in layout.names(config).items():
    if not layout.is_matrix(path):
      continue
    forms = {}
    for module in map(layout.module, names):
      entry = entries.pop(module, None)
      if entry is not None and (entry['inputs'], entry['outputs']) != shapes[path]:
        raise ValueError(f'{file}: {module} is {entry["inputs"]} x {entry["outputs"]}, not {shapes[path]}.')
      forms.setdefault(None if entry is None else (entry['bits'], entry['group']), module)
    if len(forms) > 1:
      differ = ', '.join(f'{form or "dense"} in {module}' for form, module in forms.items())
      raise ValueError(f'{file}: layers differ in (bits, group): {differ}. A stack of layers must be alike for now.')
    found[layout.module(path)] = next(iter(forms))
  if entries:
    raise ValueError(f'{file}: names {", ".join(list(entries)[:8])}, which the model of {hf.CONFIG} does not have.')
  return {module: form for module, form in found.items() if form is not None}


def load(
  directory, config: llama.ModelConfig, *, frozen_dtype=None, progress: Callable[[], None] | None = None
) -> dict:
  """The tree of the collection 'frozen', on the host as numpy arrays: load(write(tree)) == tree, bit for bit.

  Dense weights become `frozen_dtype`, or stay as stored where it is None; codes, scales and offsets always stay.
  `progress()` is called after every layer.  Raises one ValueError for all that the headers show to be wrong, before
  anything is read, as `hf.load` does.
  """
  forms, shapes, names = describe(directory), layout.matrix_shapes(config), layout.names(config)
  found, problems = tensors.headers(directory)
  fields = {
    name: _fields(path, name, shape, forms.get(layout.module(path)))
    for path, shape in shapes.items()
    for name in names[path]
  }
  wanted = {key: want for of_name in fields.values() for key, want in of_name.items()}
  tensors.check(directory, found, wanted, problems)

  def blank(path):
    form, leaves = forms.get(layout.module(path)), []
    for layers in zip(*(fields[name].items() for name in names[path]), strict=True):
      stored = functools.reduce(jnp.promote_types, (tensors.DTYPES[found[key].dtype] for key, _ in layers))
      leaves.append(jax.ShapeDtypeStruct(layers[0][1].shape, stored))
    if form is None:
      return jax.ShapeDtypeStruct(shapes[path], frozen_dtype or leaves[0].dtype)
    *planes, scale, offset = leaves
    return qtensor.QTensor(tuple(planes), scale, offset, bits=form[0], group=form[1])

  def part(path, name):
    stored = [tensors.read(key, found[key]) for key in fields[name]]
    is_transposed = layout.is_matrix(path) and layout.module(path) not in forms
    return [array.T for array in stored] if is_transposed else stored

  return layout.assemble(config, {path: blank(path) for path in shapes}, part, progress)


def write(
  directory,
  config: llama.ModelConfig,
  tree: dict,
  *,
  provenance: dict,
  tokenizer_from=None,
  bos=None,
  eos=None,
  shard_bytes: int = hf.SHARD_BYTES,
  progress: Callable[[], None] | None = None,
) -> None:
  """Writes a tree as it is, quantized and dense weights alike; `provenance` (JSON) says where it comes from.

  Otherwise as `hf.write`: tokenizer, shards, `progress()` after every layer, a directory that appears when it is
  whole, ValueError for a target that is not empty or a tree that is not this model's.
  """
  flat = traverse_util.flatten_dict(tree, sep='/')
  quantized = {path: leaf for path, leaf in flat.items() if isinstance(leaf, qtensor.QTensor)}
  weights = {}
  for path, names in layout.names(config).items():
    if path in quantized:
      q = quantized[path]
      entry = {'bits': q.bits, 'group': q.group, 'inputs': q.shape[-2], 'outputs': q.shape[-1]}
      weights |= {layout.module(name): entry for name in names}
  document = {'format': FORMAT, 'version': VERSION, 'formula': FORMULA, 'provenance': provenance, 'weights': weights}

  def named():
    for path, name, leaf in layout.parts(config, tree, progress):
      if path in quantized:
        yield from zip(_field_names(name, leaf.bits), jax.tree.leaves(leaf), strict=True)
      else:
        yield name, leaf.T if layout.is_matrix(path) else leaf

  hf.publish(
    directory,
    config,
    named(),
    dtype=str(flat['embedding'].dtype) if 'embedding' in flat else 'float32',
    tokenizer_from=tokenizer_from,
    bos=bos,
    eos=eos,
    shard_bytes=shard_bytes,
    documents={MANIFEST: document},
  )


def _field_names(name: str, bits: int) -> list[str]:
  """The tensors of a quantized matrix, in the order of a QTensor's leaves."""
  fields = (*(f'codes.{plane}' for plane in range(len(qtensor.PLANES[bits]))), 'scale', 'offset')
  return [f'{layout.module(name)}.{field}' for field in fields]


def _fields(path: str, name: str, shape: tuple[int, ...], form: tuple[int, int] | None) -> dict[str, tensors.Wanted]:
  """{tensor name: what it has to be} of one leaf: one tensor where it is dense."""
  if form is None:
    return {name: hf.dense_wanted(path, shape)}
  bits, group = form
  inputs, outputs = shape
  by_group = tensors.Wanted((inputs // group, outputs), _SCALES)
  wanted = [*(tensors.Wanted(plane, ('U32',)) for plane in _planes(shape, bits)), by_group, by_group]
  return dict(zip(_field_names(name, bits), wanted, strict=True))


@functools.cache
def _planes(shape: tuple[int, ...], bits: int) -> tuple[tuple[int, ...], ...]:
  """The shapes of the planes of a matrix's codes."""
  codes = jax.ShapeDtypeStruct(shape, jnp.int32)
  return tuple(plane.shape for plane in jax.eval_shape(functools.partial(qtensor.pack, bits=bits), codes))
