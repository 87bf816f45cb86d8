"""Hugging Face directories: the config and the dense weights, read and written.

Hugging Face stores the matrix of a projection as [outputs, inputs], this package as [inputs, outputs]; `layout`'s table
of names and that transposition are all that stands between the two.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import dataclasses
import functools
import pathlib
import re

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax import families
from qalora_jax import layout
from qalora_jax import stacks
from qalora_jax import tensors
from qalora_jax import tokenizer
from qalora_jax.models import layers
from qalora_jax.models import linear
from qalora_jax.quant import qtensor

CONFIG = 'config.json'
FLOATS = ('F32', 'F16', 'BF16')
DTYPES = ('float32', 'bfloat16', 'float16')
SHARD_BYTES = 5_000_000_000
_HUB_ID = r'[\w-][\w.-]*/[\w-][\w.-]*'


def resolve(source, revision: str = 'main') -> pathlib.Path:
  """The directory of a model: `source` itself, or where the hub's `org/name` at `revision` was downloaded to.

  Only safetensors, config and tokenizer files are downloaded.  Raises FileNotFoundError where there is none.
  """
  path = pathlib.Path(source)
  if path.is_dir():
    return path
  if not re.fullmatch(_HUB_ID, str(source)):
    raise FileNotFoundError(f'{str(source)!r} is no directory and no hub id (`org/name`); check the path.')
  # The hub's client is slow to import and of no use to whoever works from directories.
  import huggingface_hub

  wanted = [CONFIG, 'qalora.json', '*.safetensors', tensors.INDEX, *tokenizer.FILES]
  try:
    found = huggingface_hub.snapshot_download(
      str(source), revision=revision, allow_patterns=wanted, ignore_patterns='*/*'
    )
  except Exception as error:  # The client raises its own errors and those of two HTTP libraries.
    raise FileNotFoundError(
      f'{str(source)!r} is no directory here, and the hub did not give it at revision {revision!r} '
      f'({type(error).__name__}: {error}). Check the name and the network, log in if the model is gated, '
      'or download it elsewhere and name the directory.'
    ) from error
  return pathlib.Path(found)


def read_config(directory, *, dtype=jnp.float32, remat: str = 'none', quantized: bool = False) -> layers.Config:
  """The model that config.json describes, with this `dtype` of the arithmetic and this `remat`.

  `quantized`: its weights may be quantized in a form that another module reads.

  Raises FileNotFoundError without the file, ValueError for an unknown family, or a model that its family cannot say.
  """
  file = pathlib.Path(directory) / CONFIG
  if not file.is_file():
    raise FileNotFoundError(f'{directory} has no {CONFIG}; a model directory holds one beside its safetensors files.')
  raw = tensors.read_json(file)
  if raw.get('quantization_config') and not quantized:
    method = raw['quantization_config'].get('quant_method', 'unknown')
    raise ValueError(
      f'{file}: quantization_config is of quant_method {method!r}; the weights have to be dense, or GPTQ\'s ("gptq").'
    )
  try:
    return families.find(raw.get('model_type')).read(raw, dtype=dtype, remat=remat)
  except ValueError as error:
    raise ValueError(f'{file}: {error}') from error


def write_config(
  directory, config: layers.Config, *, bos=None, eos=None, dtype: str = 'float32', more: dict | None = None
) -> None:
  """Writes config.json, from which `read_config` and transformers make the same model; `dtype` is the weights'.

  `more`: what a format adds to it.
  """
  family = families.of(config)
  value = {
    'architectures': [family.architecture],
    'model_type': family.model_type,
    **family.write(config),
    'bos_token_id': bos,
    'eos_token_id': eos,
    'torch_dtype': dtype,
    **(more or {}),
  }
  tensors.write_json(pathlib.Path(directory) / CONFIG, value)


def load(
  directory,
  config: layers.Config,
  scheme: linear.Scheme,
  *,
  progress: Callable[[], None] | None = None,
  place: stacks.Place | None = None,
) -> dict:
  """The weights as the tree of the collection that `scheme` puts them in, at `place` (default: on the host).

  A weight that the scheme quantizes is quantized as it is read, so that one dense matrix stands in memory at a time;
  a dense one becomes frozen_dtype (float32 where it trains).  `progress()` is called after every layer.  Raises one
  ValueError for all that the headers show to be wrong (missing, unexpected, duplicate, misshapen, not a float, inputs
  that do not divide into groups), before anything is read.
  """
  source = Source(directory, config, scheme.heads)
  dtype = jnp.float32 if scheme.trains else scheme.frozen_dtype
  blank, quantizers, problems = {}, {}, []
  for path, names in layout.beside(scheme.heads, layout.names(config, scheme.starts(config))).items():
    shape = source.shapes[layout.unstacked(path)]
    quantizers[path] = scheme.quantizer(linear.weight_name(layout.module(path))) if layout.is_matrix(path) else None
    try:
      blank[path] = _blank(
        quantizers[path],
        shape,
        dtype,
        names[0] if len(names) == 1 else families.of(config).names(config)[layout.unstacked(path)].format('*'),
      )
    except ValueError as error:
      problems.append(str(error))
  source.check(problems)
  source.check_copies()
  quantize = {q: jax.jit(lambda w, q=q: q(w)) for q in set(quantizers.values()) if q is not None}

  def part(path, name):
    dense = source.read(path, name)
    return dense if quantizers[path] is None else quantize[quantizers[path]](dense)

  return layout.assemble(config, blank, part, progress, place or stacks.OnHost())


class Source:
  """A dense directory whose tensors are read one at a time, as this package lays them out.

  `shapes`: {path: shape of a single layer's} under the paths of a model whose layers are one stack.  `heads`: modules
  that it need not hold.
  """

  def __init__(self, directory, config: layers.Config, heads: Iterable[str] = ()):
    self._directory, self._config, self._heads = directory, config, tuple(heads)
    self.shapes = layout.matrix_shapes(config)
    self._found, self._stored, self._problems = spelled(directory, config)
    self._views = views(config)

  def check(self, problems: Iterable[str] = ()) -> None:
    """One ValueError for `problems` and all that the headers show to be wrong."""
    wanted = {}
    every = layout.names(self._config)
    others = layout.beside(self._heads, every)
    for path, names in others.items():
      for name in names:
        view = self._views.get(name)
        wanted[view.name if view else name] = _wanted(path, self.shapes[path], view)
    of_heads = {name for path in every.keys() - others.keys() for name in every[path]}
    ignored = lambda name: name in of_heads or families.of(self._config).ignored(self._config, name)
    tensors.check(self._directory, self._found, wanted, [*self._problems, *problems], ignored)

  def check_copies(self) -> None:
    """ValueError where a tensor that repeats another (a tied head) is there, and does not."""
    for copy, name in families.of(self._config).copies(self._config).items():
      if copy in self._found and not np.array_equal(self._raw(copy), self._raw(name)):
        raise ValueError(
          f'{self._directory}: {copy} is not {name}, and config.json says that they are one (tie_word_embeddings = '
          'true): set that to false, or take the tensor away.'
        )

  def _raw(self, name: str) -> np.ndarray:
    return tensors.read(self._stored[name], self._found[name])

  def read(self, path: str, name: str) -> np.ndarray:
    """The tensor `name`, a matrix as [inputs, outputs]; ValueError naming it where an entry is not finite."""
    view = self._views.get(name)
    place = view.name if view else name
    stored = self._raw(place)
    if not np.isfinite(stored).all():
      raise ValueError(
        f'{self._directory}: {place} holds NaN or infinite entries; the checkpoint is damaged, get it again.'
      )
    if view is None:
      return stored.T if layout.is_matrix(path) else stored
    if not layout.is_matrix(path):
      return stored[view.rows]
    return stored[view.rows].T if view.outputs_first else stored[:, view.rows]


def spelled(directory, config: layers.Config) -> tuple[dict, dict[str, str], list[str]]:
  """`tensors.headers` under the names of the family's table; {that name: name in the file}; what is wrong with them."""
  headers, problems = tensors.headers(directory)
  stored = {}
  for name in headers:
    own = families.of(config).spelled(name)
    if own in stored:
      problems.append(f'{name} and {stored[own]} are the same weight')
    stored[own] = name
  return {own: headers[name] for own, name in stored.items()}, stored, problems


def held(directory, config: layers.Config) -> dict[str, tuple[int, ...]]:
  """{name in the family's table, if it is there: shape} of every tensor of a directory."""
  return {name: header.shape for name, header in spelled(directory, config)[0].items()}


def read_heads(directory, config: layers.Config, heads: Iterable[str]) -> dict:
  """The weights of these modules outside the stacks as a tree, float32 and on the host.

  Raises ValueError where one is missing or of another shape.
  """
  source, flat, every = Source(directory, config), {}, layout.names(config)
  for path in every.keys() - layout.beside(heads, every).keys():
    (name,) = every[path]
    flat[path] = np.asarray(source.read(path, name), np.float32)
    if flat[path].shape != source.shapes[path]:
      raise ValueError(f'{directory}: {name} has shape {flat[path].shape[::-1]}, not {source.shapes[path][::-1]}.')
  return traverse_util.unflatten_dict(flat, sep='/')


def write(
  directory,
  config: layers.Config,
  tree: dict,
  *,
  dtype: str = 'float32',
  tokenizer_from=None,
  bos=None,
  eos=None,
  shard_bytes: int = SHARD_BYTES,
  progress: Callable[[], None] | None = None,
) -> None:
  """Writes a tree as a dense Hugging Face directory: load(write(tree)) == tree where it was dense in `dtype`.

  Quantized weights are dequantized a layer at a time, and one shard stands in memory.  `tokenizer_from`: a directory
  whose tokenizer goes along; `bos` and `eos`: its ids.  `progress()` is called after every layer.  The directory
  appears when it is whole.  Raises ValueError for a target that is not empty, a tree that is not this model's,
  an unknown `dtype` and a weight that overflows it.
  """
  if dtype not in DTYPES:
    raise ValueError(f'dtype = {dtype!r}; weights are written in one of {", ".join(DTYPES)}.')

  dense = lambda name, q: [(name, cast(np.asarray(_dequantize(q)).T, dtype, name))]
  every = _as_stored(config, named(config, tree, dtype, dense, progress))
  publish(
    directory, config, every, dtype=dtype, tokenizer_from=tokenizer_from, bos=bos, eos=eos, shard_bytes=shard_bytes
  )


def named(
  config: layers.Config,
  tree: dict,
  dtype: str,
  quantized: Callable[[str, qtensor.QTensor], Iterable[tuple[str, np.ndarray]]],
  progress: Callable[[], None] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
  """(name, tensor) of every weight: a dense one in `dtype`, a quantized one as quantized(name, matrix) says."""
  for path, name, leaf in layout.parts(config, tree, progress):
    if isinstance(leaf, qtensor.QTensor):
      yield from quantized(name, leaf)
    else:
      yield name, cast(leaf.T if layout.is_matrix(path) else leaf, dtype, name)


def publish(
  directory,
  config: layers.Config,
  named: Iterable[tuple[str, np.ndarray]],
  *,
  dtype: str,
  tokenizer_from,
  bos,
  eos,
  shard_bytes: int,
  documents: dict[str, dict] | None = None,
  others: dict[str, dict] | None = None,
  more: dict | None = None,
) -> None:
  """Writes named tensors, config.json, a tokenizer, further JSON `documents` and files of `others` ({file: {name:
  tensor}}) as a directory that appears whole.  `more` goes into config.json.
  """
  with tensors.fresh(directory) as temporary:
    write_config(temporary, config, bos=bos, eos=eos, dtype=dtype, more=more)
    for name, value in (documents or {}).items():
      tensors.write_json(temporary / name, value)
    for name, value in (others or {}).items():
      tensors.save_file(temporary / name, value)
    if tokenizer_from is not None:
      tokenizer.copy(tokenizer_from, temporary)
    tensors.write(temporary, named, shard_bytes)


def dense_wanted(path: str, shape: tuple[int, ...]) -> tensors.Wanted:
  """What the tensor of a dense leaf has to be."""
  return tensors.Wanted(shape[::-1] if layout.is_matrix(path) else shape, FLOATS)


def views(config: layers.Config) -> dict[str, families.View]:
  """{name: View} of every tensor of every layer that files hold otherwise."""
  family = families.of(config)
  found, templates = {}, family.views(config)
  for path, names in layout.names(config).items():
    view = templates.get(family.names(config)[path])
    if view is not None:
      found |= {name: dataclasses.replace(view, name=view.name.format(layer)) for layer, name in enumerate(names)}
  return found


def _wanted(path: str, shape: tuple[int, ...], view: families.View | None) -> tensors.Wanted:
  """What the tensor that a dense leaf, or more than one, is stored in has to be."""
  if view is None:
    return dense_wanted(path, shape)
  if not layout.is_matrix(path):
    return tensors.Wanted((view.outputs,), FLOATS)
  stored = (view.outputs, shape[0]) if view.outputs_first else (shape[0], view.outputs)
  return tensors.Wanted(stored, FLOATS)


def _as_stored(config: layers.Config, every: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
  """Tensors under their names as files hold them: those of one stored tensor together, when the last is there."""
  found, waiting = views(config), {}
  for name, tensor in every:
    view = found.get(name)
    if view is None:
      yield name, tensor
      continue
    parts = waiting.setdefault(view.name, [])
    parts.append((view.rows.start or 0, tensor))
    if sum(len(part) for _, part in parts) == view.outputs:
      whole = np.concatenate([part for _, part in sorted(waiting.pop(view.name), key=lambda part: part[0])])
      yield view.name, whole if view.outputs_first else np.ascontiguousarray(whole.T)


_dequantize = jax.jit(qtensor.dequantize)


def _blank(quantizer, shape: tuple[int, ...], dtype, name: str):
  """The abstract leaf that a dense matrix becomes; `name` is for the quantizer's errors."""
  if quantizer is None:
    return jax.ShapeDtypeStruct(shape, dtype)
  return jax.eval_shape(functools.partial(quantizer, name=name), jax.ShapeDtypeStruct(shape, jnp.float32))


def cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
  """`array` in `dtype`; ValueError naming it where float16 cannot hold it."""
  with np.errstate(over='ignore'):
    cast = array.astype(jnp.dtype(dtype))
  if dtype == 'float16' and not np.isfinite(cast).all() and np.isfinite(array).all():
    raise ValueError(f'{name} reaches {np.abs(array).max():g}, beyond float16; write float32 or bfloat16.')
  return cast
