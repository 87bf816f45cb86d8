"""The package's own directories: a model that is still quantized, merged or not.

As a Hugging Face directory, but the `NAME.weight` of a quantized matrix is replaced by the fields of its QTensor, with
its axes: `NAME.codes.0`, `NAME.codes.1` (the planes, uint32), `NAME.scale` and `NAME.offset` (float32 or float16); for
doubly quantized scales `NAME.scale.codes`, `.absmax` and `.mean`.  qalora.json says which matrices these are, in which
form, by which formula, and where they come from.
"""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import functools
import pathlib
import re

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax import hf
from qalora_jax import layout
from qalora_jax import stacks
from qalora_jax import tensors
from qalora_jax.models import layers
from qalora_jax.models import linear
from qalora_jax.quant import codebooks
from qalora_jax.quant import qtensor

MANIFEST = 'qalora.json'
ADAPTER = 'adapter.safetensors'
# With these the base alone is not the model: a part of it stands in the adapter.
_RESIDUAL = ('pissa', 'loftq')
FORMAT = 'qalora_jax'
VERSION = 2
FORMULA = (
  'dense[i, o] = level(code[i, o]) * scale[i // group, o] + offset[i // group, o]. `bits` bits of a code are spread '
  'over planes, low bits first, of these widths: 8: [8], 4: [4], 3: [2, 1], 2: [2]. codes.p holds plane p: in column '
  'o, consecutive inputs fill each uint32 from its lowest bit up, 32 // width of them. levels "integer": level(code) '
  'is the code itself, a two\'s-complement number; levels "nf4" and "fp4": entry `code` of that table of 16 in '
  '`codebooks`. scale "double": scale = codebooks.dynamic[scale.codes] * scale.absmax[block] + scale.mean, a block '
  'being 256 scales counted along the groups of output 0, then of output 1, ... offset "none": 0.'
)
_ENTRY = {'bits': int, 'group': int, 'inputs': int, 'outputs': int, 'levels': str, 'scale': str, 'offset': str}
_CHOICES = {
  'bits': tuple(qtensor.PLANES),
  'levels': ('integer', *codebooks.CODEBOOKS),
  'scale': ('float32', 'float16', 'double'),
  'offset': ('float32', 'float16', 'none'),
}


def holds(directory) -> bool:
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
    raise ValueError(
      f'{file}: version {value.get("version")!r}; this program reads version {VERSION}: update it, or write the '
      'directory again from its source.'
    )
  weights = value.get('weights')
  if not isinstance(weights, dict):
    raise ValueError(f'{file}: has no "weights".')
  for name, entry in weights.items():
    if not isinstance(entry, dict) or any(not isinstance(entry.get(key), kind) for key, kind in _ENTRY.items()):
      wanted = ', '.join(f'{key} ({kind.__name__})' for key, kind in _ENTRY.items())
      raise ValueError(f'{file}: {name} needs {wanted}; it holds {entry!r}.')
    for key, words in _CHOICES.items():
      if entry[key] not in words:
        raise ValueError(f'{file}: {name} has {key} {entry[key]!r}; it is one of {", ".join(map(str, words))}.')
    if entry['group'] < 1 or entry['inputs'] % entry['group']:
      raise ValueError(f'{file}: {name} has {entry["inputs"]} inputs in groups of {entry["group"]}.')
  return value


def describe(directory) -> dict[str, qtensor.Form]:
  """{weight: form} of the quantized matrices, such as {'layers/0/mlp/down_proj': Form(bits=4, group=32)}.

  Raises ValueError where qalora.json does not fit config.json.
  """
  file = pathlib.Path(directory) / MANIFEST
  entries, config = dict(manifest(directory)['weights']), hf.read_config(directory)
  shapes, found = layout.matrix_shapes(config), {}
  for path, names in layout.names(config, layout.apart(config)).items():
    module, shape = layout.module(names[0]), shapes[layout.unstacked(path)]
    entry = entries.pop(module, None) if layout.is_matrix(path) else None
    if entry is None:
      continue
    if (entry['inputs'], entry['outputs']) != shape:
      raise ValueError(f'{file}: {module} is {entry["inputs"]} x {entry["outputs"]}, not {shape}.')
    form = {field.name: entry[field.name] for field in dataclasses.fields(qtensor.Form)}
    found[linear.weight_name(layout.module(path))] = qtensor.Form(**form)
  if entries:
    raise ValueError(f'{file}: names {", ".join(list(entries)[:8])}, which the model of {hf.CONFIG} does not have.')
  return found


def scheme_of(forms: dict[str, qtensor.Form], **choices) -> linear.Scheme:
  """The scheme of a model whose weights have these forms, as `describe` gives them; `choices` are its other fields."""
  quantizers = tuple((f'^{re.escape(name)}$', form) for name, form in forms.items())
  return linear.Scheme(quantizers=quantizers, **choices)


def load(
  directory,
  config: layers.Config,
  scheme: linear.Scheme | None = None,
  *,
  progress: Callable[[], None] | None = None,
  place: stacks.Place | None = None,
) -> dict:
  """The tree of the collection 'frozen', at `place` (default: on the host): load(write(tree)) == tree, bit for bit.

  Layers are stacked as `scheme` says (default: as the directory's own forms allow).  Dense weights become its
  frozen_dtype, or stay as stored without one; codes, scales and offsets always stay.  `progress()` is called after
  every layer.  Raises one ValueError for all that the headers show to be wrong, before anything is read, as `hf.load`
  does.
  """
  forms, shapes, stated = describe(directory), layout.matrix_shapes(config), scheme is not None
  scheme = scheme or scheme_of(forms)
  every = layout.names(config, scheme.starts(config))
  names = layout.beside(scheme.heads, every)
  form = {path: forms.get(linear.weight_name(layout.module(path))) for path in names}
  found, problems = tensors.headers(directory)
  fields = {
    name: _fields(path, name, shapes[layout.unstacked(path)], form[path]) for path in names for name in names[path]
  }
  wanted = {key: want for of_name in fields.values() for key, want in of_name.items()}
  of_heads = {name for path in every.keys() - names.keys() for name in every[path]}
  tensors.check(directory, found, wanted, problems, lambda name: name in of_heads)

  def blank(path):
    shape = shapes[layout.unstacked(path)]
    if form[path] is not None:
      return jax.eval_shape(form[path], jax.ShapeDtypeStruct(shape, jnp.float32))
    stored = [tensors.DTYPES[found[name].dtype] for name in names[path]]
    return jax.ShapeDtypeStruct(shape, scheme.frozen_dtype if stated else functools.reduce(jnp.promote_types, stored))

  def part(path, name):
    stored = [tensors.read(key, found[key]) for key in fields[name]]
    is_transposed = layout.is_matrix(path) and form[path] is None
    return [array.T for array in stored] if is_transposed else stored

  return layout.assemble(config, {path: blank(path) for path in names}, part, progress, place or stacks.OnHost())


def write(
  directory,
  config: layers.Config,
  tree: dict,
  *,
  provenance: dict,
  adapter: tuple[dict, dict] | None = None,
  tokenizer_from=None,
  bos=None,
  eos=None,
  shard_bytes: int = hf.SHARD_BYTES,
  progress: Callable[[], None] | None = None,
) -> None:
  """Writes a tree as it is, quantized and dense weights alike; `provenance` (JSON) says where it comes from.

  `adapter`: (choices, params) of an adapter for `train` to begin with, see `load_adapter`.
  Otherwise as `hf.write`: tokenizer, shards, `progress()` after every layer, a directory that appears when it is
  whole, ValueError for a target that is not empty or a tree that is not this model's.
  """
  flat = traverse_util.flatten_dict(tree, sep='/')
  quantized = {path: leaf for path, leaf in flat.items() if isinstance(leaf, qtensor.QTensor)}
  weights = {}
  for path, names in layout.names(config, linear.starts(tree)).items():
    if path in quantized:
      q = quantized[path]
      entry = dict(dataclasses.asdict(qtensor.form(q)), inputs=q.shape[-2], outputs=q.shape[-1])
      weights |= {layout.module(name): entry for name in names}
  choices, params = adapter or (None, {})
  document = {'format': FORMAT, 'version': VERSION, 'formula': FORMULA, 'provenance': provenance, 'weights': weights}
  used = {entry['levels'] for entry in weights.values()} & codebooks.CODEBOOKS.keys()
  tables = {name: codebooks.CODEBOOKS[name].tolist() for name in sorted(used)}
  if any(entry['scale'] == 'double' for entry in weights.values()):
    tables['dynamic'] = codebooks.DYNAMIC.tolist()
  if tables:
    document['codebooks'] = tables
  if choices is not None:
    document['adapter'] = choices

  hf.publish(
    directory,
    config,
    named(config, tree, progress),
    dtype=str(flat['embedding'].dtype) if 'embedding' in flat else 'float32',
    tokenizer_from=tokenizer_from,
    bos=bos,
    eos=eos,
    shard_bytes=shard_bytes,
    documents={MANIFEST: document},
    others={ADAPTER: _adapter_tensors(params)} if params else {},
  )


def named(
  config: layers.Config, tree: dict, progress: Callable[[], None] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
  """(name, tensor) of all that `write` puts into the files of a tree."""
  for path, name, leaf in layout.parts(config, tree, progress):
    if isinstance(leaf, qtensor.QTensor):
      yield from zip(_field_names(name, qtensor.form(leaf)), jax.tree.leaves(leaf), strict=True)
    else:
      yield name, leaf.T if layout.is_matrix(path) else leaf


def check_beginning(directory, choices: dict | None) -> None:
  """ValueError where an adapter of `choices` (None: beginning at zero) cannot begin on the base in `directory`."""
  made = manifest(directory).get('adapter')
  if choices is None:
    if made is not None and made['init'] in _RESIDUAL:
      raise ValueError(
        f'{directory} holds what adapter.init = {made["init"]!r} left of the weights, which is a model only with its '
        'adapter: train with the same adapter.init, or quantize the source again with adapter.init = "zero".'
      )
    return
  if made is None:
    raise ValueError(
      f'{directory} holds no adapter to begin with, and adapter.init = {choices["init"]!r} asks for one; make it by '
      '`qalora quantize` with this config from the dense source, or set adapter.init = "zero".'
    )
  if made != choices:
    changed = [key for key in choices if made.get(key) != choices[key]]
    shown = ', '.join(f'adapter.{key} = {made.get(key)!r}, not {choices[key]!r}' for key in changed)
    raise ValueError(f'{directory} begins with another adapter than the config asks for: {shown}.')


def load_adapter(directory, blank: dict) -> dict:
  """The adapter that `write` left in `directory`, on the host, in the structure of the abstract params `blank`.

  Raises FileNotFoundError or ValueError where the file is absent, damaged, or another model's.
  """
  file = pathlib.Path(directory) / ADAPTER
  found, named = tensors.load_file(file), jax.tree.leaves_with_path(blank)
  wanted = {name: leaf.shape[1:] for path, leaf in named for name in layout.layer_names(path, leaf)}
  wrong = sorted(name for name, _ in wanted.items() ^ {name: leaf.shape for name, leaf in found.items()}.items())
  if wrong:
    raise ValueError(f'{file} does not fit the model: {", ".join(wrong[:8])}; quantize the source again.')
  stacked = [np.stack([found[name] for name in layout.layer_names(path, leaf)]) for path, leaf in named]
  return jax.tree.unflatten(jax.tree.structure(blank), stacked)


def _adapter_tensors(params: dict) -> dict:
  """{layers/0/mlp/down_proj/adapter/a: leaf, ...} of every layer."""
  return {
    name: leaf[at]
    for path, leaf in jax.tree.leaves_with_path(params)
    for at, name in enumerate(layout.layer_names(path, leaf))
  }


def _field_names(name: str, form: qtensor.Form) -> list[str]:
  """The tensors of a quantized matrix, in the order of a QTensor's leaves."""
  codes = [f'codes.{plane}' for plane in range(len(qtensor.PLANES[form.bits]))]
  scale = ['scale.codes', 'scale.absmax', 'scale.mean'] if form.scale == 'double' else ['scale']
  offset = [] if form.offset == 'none' else ['offset']
  return [f'{layout.module(name)}.{field}' for field in (*codes, *scale, *offset)]


def _fields(path: str, name: str, shape: tuple[int, ...], form: qtensor.Form | None) -> dict[str, tensors.Wanted]:
  """{tensor name: what it has to be} of one leaf: one tensor where it is dense."""
  if form is None:
    return {name: hf.dense_wanted(path, shape)}
  wanted = [tensors.Wanted(leaf_shape, (dtype,)) for leaf_shape, dtype in _leaves(shape, form)]
  return dict(zip(_field_names(name, form), wanted, strict=True))


@functools.cache
def _leaves(shape: tuple[int, ...], form: qtensor.Form) -> tuple[tuple[tuple[int, ...], str], ...]:
  """Shape and safetensors' dtype of every leaf of a matrix of this shape and form."""
  names = {jnp.dtype(dtype): name for name, dtype in tensors.DTYPES.items()}
  blank = jax.eval_shape(form, jax.ShapeDtypeStruct(shape, jnp.float32))
  return tuple((leaf.shape, names[leaf.dtype]) for leaf in jax.tree.leaves(blank))
