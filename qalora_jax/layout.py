"""Where every weight stands: its path in the model's tree and its name in a file, in one table read in both directions.

A path such as layers/mlp/down_proj/kernel names a leaf of the tree, where layers are stacked on a leading axis (layers
that differ are in several stacks: layers_0, layers_3, ...); a name such as model.layers.0.mlp.down_proj.weight a tensor
of one layer, as Hugging Face calls it.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax import stacks
from qalora_jax.models import linear
from qalora_jax.models import llama
from qalora_jax.quant import qtensor

# {path: name} of a model whose layers are one stack; {} stands for the layer.
NAMES = {
  'embedding': 'model.embed_tokens.weight',
  'norm/scale': 'model.norm.weight',
  'lm_head/kernel': 'lm_head.weight',
  'layers/attention_norm/scale': 'model.layers.{}.input_layernorm.weight',
  'layers/attention/q_proj/kernel': 'model.layers.{}.self_attn.q_proj.weight',
  'layers/attention/k_proj/kernel': 'model.layers.{}.self_attn.k_proj.weight',
  'layers/attention/v_proj/kernel': 'model.layers.{}.self_attn.v_proj.weight',
  'layers/attention/o_proj/kernel': 'model.layers.{}.self_attn.o_proj.weight',
  'layers/mlp_norm/scale': 'model.layers.{}.post_attention_layernorm.weight',
  'layers/mlp/gate_proj/kernel': 'model.layers.{}.mlp.gate_proj.weight',
  'layers/mlp/up_proj/kernel': 'model.layers.{}.mlp.up_proj.weight',
  'layers/mlp/down_proj/kernel': 'model.layers.{}.mlp.down_proj.weight',
}


def names(config: llama.ModelConfig, starts: Iterable[int] = (0,)) -> dict[str, list[str]]:
  """{path: names of its tensors}, one name a layer where layers are stacked.  `starts`: the stacks' first layers."""
  starts = list(starts)
  stops = [*starts[1:], config.num_hidden_layers]
  tied = {'lm_head/kernel'} if config.tie_word_embeddings else set()
  made = {path: [name] for path, name in NAMES.items() if path not in tied and not is_stacked(path)}
  for stack, start, stop in zip(linear.stacks(starts), starts, stops, strict=True):
    for path, name in NAMES.items():
      if is_stacked(path):
        made[path.replace(linear.STACK, stack, 1)] = [name.format(layer) for layer in range(start, stop)]
  return made


def weights(config: llama.ModelConfig) -> dict[str, str]:
  """{weight: name} of every matrix of every layer: {'layers/0/mlp/down_proj': 'model.layers.0.mlp.down_proj', ...}."""
  every = names(config, range(config.num_hidden_layers))
  return {linear.weight_name(module(path)): module(of_path[0]) for path, of_path in every.items() if is_matrix(path)}


def is_matrix(path: str) -> bool:
  """Whether the leaf is a projection: stored transposed, and open to quantization."""
  return path.endswith('/kernel')


def is_stacked(path: str) -> bool:
  """Whether the leaf has a leading axis of layers."""
  return bool(linear.starts([path.partition('/')[0]]))


def unstacked(path: str) -> str:
  """The path as it would be if all layers were one stack: layers_3/mlp/... -> layers/mlp/..."""
  return f'{linear.STACK}/{path.partition("/")[2]}' if is_stacked(path) else path


def layer_names(path, leaf) -> list[str]:
  """The names of the layers of a stacked leaf, whatever stack its key path is in: layers/3/mlp/down_proj/adapter/a, ...

  ValueError for a leaf that stands outside the stacks.
  """
  stack, _, rest = jax.tree_util.keystr(path, simple=True, separator='/').partition('/')
  if not is_stacked(stack):
    raise ValueError(f'{stack} has an adapter; those that are stored stand beside projections of the blocks.')
  start = linear.starts([stack])[0]
  return [f'{linear.STACK}/{layer}/{rest}' for layer in range(start, start + leaf.shape[0])]


def module(name: str) -> str:
  """What a path or a name belongs to: layers/mlp/down_proj, model.layers.0.mlp.down_proj."""
  return name.removesuffix('/kernel').removesuffix('.weight')


def matrix_shapes(config: llama.ModelConfig) -> dict[str, tuple[int, ...]]:
  """{path: shape} of the dense model, a single layer's where layers are stacked."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  made = jax.eval_shape(llama.Llama(config).init, jax.random.key(0), tokens)
  flat = traverse_util.flatten_dict(nn.unbox(made)['frozen'], sep='/')
  return {path: leaf.shape[1:] if is_stacked(path) else leaf.shape for path, leaf in flat.items()}


def assemble(
  config: llama.ModelConfig, blank: dict, part: Callable, progress: Callable[[], None] | None, place: stacks.Place
) -> dict:
  """The tree whose leaf at `path` is part(path, name), stacked over layers and cast to the dtypes of blank[path].

  `blank` holds the abstract leaf of a single layer for every path; part may return any pytree with its leaves.
  One part is read at a time, and goes where `place` gathers them.
  """
  starts = linear.starts({path.partition('/')[0] for path in blank})
  every = names(config, starts)

  def whole(path, a):
    return jax.ShapeDtypeStruct((len(every[path]), *a.shape) if is_stacked(path) else a.shape, a.dtype)

  made = place.begin({path: [whole(path, a) for a in jax.tree.leaves(leaf)] for path, leaf in blank.items()})
  for path, name, at in _visit(every, progress):
    made[path] = place.put(path, made[path], at, jax.tree.leaves(part(path, name)))
  flat = {path: jax.tree.unflatten(jax.tree.structure(leaf), made[path]) for path, leaf in blank.items()}
  return traverse_util.unflatten_dict(flat, sep='/')


def parts(config: llama.ModelConfig, tree: dict, progress: Callable[[], None] | None = None) -> Iterator[tuple]:
  """(path, name, leaf) of every tensor of `tree`, a single layer's on the host; the inverse of `assemble`.

  Of an abstract tree the leaves are abstract.  Raises ValueError, before the first, where the tree is not this model's.
  """
  flat, shapes = traverse_util.flatten_dict(tree, sep='/'), matrix_shapes(config)
  every = names(config, linear.starts(tree) or (0,))
  wrong = [f'{path} is missing' for path in every if path not in flat]
  wrong += [f'{path} is no weight of the model (an adapter is merged first)' for path in flat if path not in every]
  for path in every.keys() & flat.keys():
    shape = shapes[unstacked(path)]
    shape = (len(every[path]), *shape) if is_stacked(path) else shape
    if flat[path].shape != shape:
      wrong.append(f'{path} has shape {flat[path].shape}, not {shape}')
  if wrong:
    raise ValueError('the tree does not hold the weights of its config:\n  ' + '\n  '.join(sorted(wrong)))
  for path, name, at in _visit(every, progress):
    yield path, name, jax.tree.map(lambda a, at=at: _single(a, at), flat[path])


def _single(a, at):
  if isinstance(a, jax.ShapeDtypeStruct):
    return a if at is ... else jax.ShapeDtypeStruct(a.shape[1:], a.dtype)
  return np.asarray(a[at])


def matrices(config: llama.ModelConfig, tree: dict) -> Iterator[tuple]:
  """(path, name, matrix) of every quantized matrix of `tree`; of a stack the same whole leaf for each of its layers."""
  flat = traverse_util.flatten_dict(tree, sep='/')
  for path, of_path in names(config, linear.starts(tree) or (0,)).items():
    if isinstance(flat.get(path), qtensor.QTensor):
      for name in of_path:
        yield path, name, flat[path]


def _visit(every: dict[str, list[str]], progress: Callable[[], None] | None) -> Iterator[tuple]:
  """(path, name, index on the stack) in the order of files; `progress()` after every layer."""
  by_stack = {}
  for path, of_path in every.items():
    if is_stacked(path):
      by_stack.setdefault(path.partition('/')[0], {})[path] = of_path
    else:
      yield path, of_path[0], ...
  for stack in by_stack.values():
    for at in range(len(next(iter(stack.values())))):
      for path, of_path in stack.items():
        yield path, of_path[at], at
      if progress is not None:
        progress()
