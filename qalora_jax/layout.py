"""Where every weight stands: its path in the model's tree and its name in a file, by a family's table read both ways.

A path such as layers/mlp/down_proj/kernel names a leaf of the tree, where layers are stacked on a leading axis (layers
that differ are in several stacks: layers_0, layers_3, ...); a name such as model.layers.0.mlp.down_proj.weight a tensor
of one layer, as Hugging Face calls it.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax import families
from qalora_jax import stacks
from qalora_jax.models import layers
from qalora_jax.models import linear
from qalora_jax.quant import qtensor


def names(config: layers.Config, starts: Mapping[str, Iterable[int]] | None = None) -> dict[str, list[str]]:
  """{path: names of its tensors}, one name a layer where layers are stacked.

  `starts`: {stack: the first layers of its parts}; unless said, every stack is one.
  """
  table = families.of(config).names(config)
  made = {path: [name] for path, name in table.items() if not is_stacked(path)}
  for stack, depth in config.depths.items():
    firsts = list((starts or {}).get(stack) or (0,))
    for part, start, stop in zip(linear.stacks(firsts, stack), firsts, [*firsts[1:], depth], strict=True):
      for path, name in table.items():
        if path.startswith(f'{stack}/'):
          made[path.replace(stack, part, 1)] = [name.format(layer) for layer in range(start, stop)]
  return made


def beside(heads: Iterable[str], every: Mapping[str, list[str]]) -> dict[str, list[str]]:
  """The entries of `names` that belong to no module of `heads`."""
  heads = set(heads)
  return {path: names for path, names in every.items() if path.partition('/')[0] not in heads}


def apart(config: layers.Config) -> dict[str, range]:
  """`starts` of a model whose every layer stands alone."""
  return {stack: range(depth) for stack, depth in config.depths.items()}


def weights(config: layers.Config) -> dict[str, str]:
  """{weight: name} of every matrix of the model: {'layers/0/mlp/down_proj': 'model.layers.0.mlp.down_proj', ...}."""
  every = names(config, apart(config))
  return {linear.weight_name(module(path)): module(of_path[0]) for path, of_path in every.items() if is_matrix(path)}


def is_matrix(path: str) -> bool:
  """Whether the leaf is a projection: stored transposed, and open to quantization."""
  return path.endswith('/kernel')


def is_stacked(path: str) -> bool:
  """Whether the leaf has a leading axis of layers."""
  return linear.stack_of(path.partition('/')[0]) is not None


def unstacked(path: str) -> str:
  """The path as it would be if all layers were one stack: layers_3/mlp/... -> layers/mlp/..."""
  part, slash, rest = path.partition('/')
  found = linear.stack_of(part)
  return f'{found[0]}{slash}{rest}' if found else path


def layer_names(path, leaf) -> list[str]:
  """The names of the layers of a stacked leaf, whatever stack its key path is in: layers/3/mlp/down_proj/adapter/a, ...

  ValueError for a leaf that stands outside the stacks.
  """
  part, _, rest = jax.tree_util.keystr(path, simple=True, separator='/').partition('/')
  if not is_stacked(part):
    raise ValueError(f'{part} has an adapter; those that are stored stand beside projections of the blocks.')
  stack, start = linear.stack_of(part)
  return [f'{stack}/{layer}/{rest}' for layer in range(start, start + leaf.shape[0])]


def module(name: str) -> str:
  """What a path or a name belongs to: layers/mlp/down_proj, model.layers.0.mlp.down_proj."""
  return name.removesuffix('/kernel').removesuffix('.weight')


def abstract(config: layers.Config, scheme: linear.Scheme) -> dict:
  """The boxed abstract collections 'frozen' and 'params' of the model."""
  tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  made = jax.eval_shape(families.of(config).module(config, scheme).init, jax.random.key(0), tokens)
  return {'frozen': {}, 'params': {}, **made}


def matrix_shapes(config: layers.Config) -> dict[str, tuple[int, ...]]:
  """{path: shape} of the dense model, a single layer's where layers are stacked."""
  flat = traverse_util.flatten_dict(nn.unbox(abstract(config, linear.Scheme()))['frozen'], sep='/')
  return {path: leaf.shape[1:] if is_stacked(path) else leaf.shape for path, leaf in flat.items()}


def assemble(
  config: layers.Config, blank: dict, part: Callable, progress: Callable[[], None] | None, place: stacks.Place
) -> dict:
  """The tree whose leaf at `path` is part(path, name), stacked over layers and cast to the dtypes of blank[path].

  `blank` holds the abstract leaf of a single layer for every path; part may return any pytree with its leaves.
  One part is read at a time, and goes where `place` gathers them.
  """
  every = names(config, linear.starts({path.partition('/')[0] for path in blank}))
  every = {path: of_path for path, of_path in every.items() if path in blank}

  def whole(path, a):
    return jax.ShapeDtypeStruct((len(every[path]), *a.shape) if is_stacked(path) else a.shape, a.dtype)

  made = place.begin({path: [whole(path, a) for a in jax.tree.leaves(leaf)] for path, leaf in blank.items()})
  for path, name, at in _visit(every, progress):
    made[path] = place.put(path, made[path], at, jax.tree.leaves(part(path, name)))
  flat = {path: jax.tree.unflatten(jax.tree.structure(leaf), made[path]) for path, leaf in blank.items()}
  return traverse_util.unflatten_dict(flat, sep='/')


def parts(config: layers.Config, tree: dict, progress: Callable[[], None] | None = None) -> Iterator[tuple]:
  """(path, name, leaf) of every tensor of `tree`, a single layer's on the host; the inverse of `assemble`.

  Of an abstract tree the leaves are abstract.  Raises ValueError, before the first, where the tree is not this model's.
  """
  flat, shapes = traverse_util.flatten_dict(tree, sep='/'), matrix_shapes(config)
  every = names(config, linear.starts(tree))
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


def matrices(config: layers.Config, tree: dict) -> Iterator[tuple]:
  """(path, name, matrix) of every quantized matrix of `tree`; of a stack the same whole leaf for each of its layers."""
  flat = traverse_util.flatten_dict(tree, sep='/')
  for path, of_path in names(config, linear.starts(tree)).items():
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
