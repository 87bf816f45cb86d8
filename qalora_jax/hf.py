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

import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax import layout
from qalora_jax import stacks
from qalora_jax import tensors
from qalora_jax import tokenizer
from qalora_jax.models import linear
from qalora_jax.models import llama
from qalora_jax.quant import qtensor

CONFIG = 'config.json'
FLOATS = ('F32', 'F16', 'BF16')
DTYPES = ('float32', 'bfloat16', 'float16')
SHARD_BYTES = 5_000_000_000
_HUB_ID = r'[\w-][\w.-]*/[\w-][\w.-]*'

_MODEL_TYPES = ('llama',)
_REQUIRED = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')
# Absent or null, these mean the default of ModelConfig, which is that of transformers.
_OPTIONAL = ('max_position_embeddings', 'rms_norm_eps', 'tie_word_embeddings', 'head_dim')
# What a LLaMA may say only in one way here; absent, it means the same.
_FIXED = {
  'hidden_act': 'silu',
  'attention_bias': False,
  'mlp_bias': False,
  'partial_rotary_factor': 1.0,
}


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


def read_config(directory, *, dtype=jnp.float32, remat: str = 'none', quantized: bool = False) -> llama.ModelConfig:
  """The model that config.json describes, with this `dtype` of the arithmetic and this `remat`.

  `quantized`: its weights may be quantized in a form that another module reads.

  Raises FileNotFoundError without the file, ValueError for another family or a LLaMA that ModelConfig cannot say.
  """
  file = pathlib.Path(directory) / CONFIG
  if not file.is_file():
    raise FileNotFoundError(f'{directory} has no {CONFIG}; a model directory holds one beside its safetensors files.')
  raw = tensors.read_json(file)
  if raw.get('model_type') not in _MODEL_TYPES:
    raise ValueError(f'{file}: model_type is {raw.get("model_type")!r}; supported: {", ".join(_MODEL_TYPES)}.')
  for key in _REQUIRED:
    if key not in raw:
      raise ValueError(f'{file}: has no "{key}"; copy the {CONFIG} that was published with the weights.')
    if not isinstance(raw[key], int) or raw[key] < 1:
      raise ValueError(f'{file}: {key} = {raw[key]!r}; it is a count of at least 1.')
  for key, value in _FIXED.items():
    if raw.get(key, value) != value:
      raise ValueError(f'{file}: {key} = {raw[key]!r}; only {value!r} is supported.')
  if raw.get('quantization_config') and not quantized:
    method = raw['quantization_config'].get('quant_method', 'unknown')
    raise ValueError(
      f'{file}: quantization_config is of quant_method {method!r}; the weights have to be dense, or GPTQ\'s ("gptq").'
    )
  theta, scaling = _rope(file, raw)
  stated = {key: raw[key] for key in (*_REQUIRED, *_OPTIONAL) if raw.get(key) is not None}
  # Before LLaMA 2 the file did not say it: every head had its own keys and values.
  heads = raw.get('num_key_value_heads') or raw['num_attention_heads']
  try:
    return llama.ModelConfig(
      **stated, num_key_value_heads=heads, rope_theta=theta, rope_scaling=scaling, dtype=dtype, remat=remat
    )
  except ValueError as error:
    raise ValueError(f'{file}: {error}') from error


def write_config(
  directory, config: llama.ModelConfig, *, bos=None, eos=None, dtype: str = 'float32', more: dict | None = None
) -> None:
  """Writes config.json, from which `read_config` and transformers make the same model; `dtype` is the weights'.

  `more`: what a format adds to it.
  """
  keys = (*_REQUIRED, *_OPTIONAL, 'num_key_value_heads', 'rope_theta')
  scaling = config.rope_scaling
  fixed = {key: value for key, value in _FIXED.items() if key in ('hidden_act', 'attention_bias', 'mlp_bias')}
  value = {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    **{key: getattr(config, key) for key in keys},
    'rope_scaling': None if scaling is None else {'rope_type': 'llama3', **dataclasses.asdict(scaling)},
    **fixed,
    'bos_token_id': bos,
    'eos_token_id': eos,
    'torch_dtype': dtype,
    **(more or {}),
  }
  tensors.write_json(pathlib.Path(directory) / CONFIG, value)


def load(
  directory,
  config: llama.ModelConfig,
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
  source = Source(directory, config)
  starts = scheme.starts(config.num_hidden_layers, llama.MATRICES)
  dtype = jnp.float32 if scheme.trains else scheme.frozen_dtype
  blank, quantizers, problems = {}, {}, []
  for path, names in layout.names(config, starts).items():
    shape = source.shapes[layout.unstacked(path)]
    quantizers[path] = scheme.quantizer(linear.weight_name(layout.module(path))) if layout.is_matrix(path) else None
    try:
      blank[path] = _blank(
        quantizers[path],
        shape,
        dtype,
        names[0] if len(names) == 1 else layout.NAMES[layout.unstacked(path)].format('*'),
      )
    except ValueError as error:
      problems.append(str(error))
  source.check(problems)
  quantize = {q: jax.jit(lambda w, q=q: q(w)) for q in set(quantizers.values()) if q is not None}

  def part(path, name):
    dense = source.read(path, name)
    return dense if quantizers[path] is None else quantize[quantizers[path]](dense)

  return layout.assemble(config, blank, part, progress, place or stacks.OnHost())


class Source:
  """A dense directory whose tensors are read one at a time, as this package lays them out.

  `shapes`: {path: shape of a single layer's} under the paths of a model whose layers are one stack.
  """

  def __init__(self, directory, config: llama.ModelConfig):
    self._directory, self._config = directory, config
    self.shapes = layout.matrix_shapes(config)
    self._found, self._problems = tensors.headers(directory)

  def check(self, problems: Iterable[str] = ()) -> None:
    """One ValueError for `problems` and all that the headers show to be wrong."""
    wanted = {
      name: dense_wanted(path, self.shapes[path])
      for path, names in layout.names(self._config).items()
      for name in names
    }
    ignored = functools.partial(is_ignored, self._config)
    tensors.check(self._directory, self._found, wanted, [*self._problems, *problems], ignored)

  def read(self, path: str, name: str) -> np.ndarray:
    """The tensor `name`, a matrix as [inputs, outputs]; ValueError naming it where an entry is not finite."""
    stored = tensors.read(name, self._found[name])
    if not np.isfinite(stored).all():
      raise ValueError(
        f'{self._directory}: {name} holds NaN or infinite entries; the checkpoint is damaged, get it again.'
      )
    return stored.T if layout.is_matrix(path) else stored


def write(
  directory,
  config: llama.ModelConfig,
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
  every = named(config, tree, dtype, dense, progress)
  publish(
    directory, config, every, dtype=dtype, tokenizer_from=tokenizer_from, bos=bos, eos=eos, shard_bytes=shard_bytes
  )


def named(
  config: llama.ModelConfig,
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
  config: llama.ModelConfig,
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


_dequantize = jax.jit(qtensor.dequantize)


def _blank(quantizer, shape: tuple[int, ...], dtype, name: str):
  """The abstract leaf that a dense matrix becomes; `name` is for the quantizer's errors."""
  if quantizer is None:
    return jax.ShapeDtypeStruct(shape, dtype)
  return jax.eval_shape(functools.partial(quantizer, name=name), jax.ShapeDtypeStruct(shape, jnp.float32))


def is_ignored(config: llama.ModelConfig, name: str) -> bool:
  """Tensors that say nothing: old checkpoints' rotary frequencies, and the second copy of a tied head."""
  return name.endswith('.rotary_emb.inv_freq') or (
    config.tie_word_embeddings and name == layout.NAMES['lm_head/kernel']
  )


def cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
  """`array` in `dtype`; ValueError naming it where float16 cannot hold it."""
  with np.errstate(over='ignore'):
    cast = array.astype(jnp.dtype(dtype))
  if dtype == 'float16' and not np.isfinite(cast).all() and np.isfinite(array).all():
    raise ValueError(f'{name} reaches {np.abs(array).max():g}, beyond float16; write float32 or bfloat16.')
  return cast


def _rope(file: pathlib.Path, raw: dict) -> tuple[float, llama.RopeScaling | None]:
  """Theta and the scaling; transformers 5 keeps both in `rope_parameters`, earlier ones apart."""
  newer = raw.get('rope_parameters') or {}
  theta = float(newer.get('rope_theta', raw.get('rope_theta', 10000.0)))
  scaling = newer or raw.get('rope_scaling') or {}
  kind = scaling.get('rope_type', scaling.get('type', 'default'))
  if kind == 'default':
    return theta, None
  if kind != 'llama3':
    raise ValueError(f'{file}: RoPE is scaled as {kind!r}; supported: default, llama3.')
  fields = [field.name for field in dataclasses.fields(llama.RopeScaling)]
  missing = [name for name in fields if name not in scaling]
  if missing:
    raise ValueError(f'{file}: RoPE scaling "llama3" has no {", ".join(missing)}.')
  return theta, llama.RopeScaling(**{name: scaling[name] for name in fields})
