"""The hinge: one `Linear` for dense, quantized and adapted weights.  The variables decide which.

A model's weights live in two linen collections: 'params' trains, 'frozen' does not.  `Scheme` says what is born
where; afterwards nothing but the variables themselves is asked:

    params/.../kernel            a dense matrix that trains
    params/.../kernel            a Latent: a dense matrix that trains and is used rounded (QAT)
    frozen/.../kernel            an array or a QTensor
    params/.../adapter           a LoRA or QALoRA beside it, or absent
"""

from collections.abc import Callable
from collections.abc import Iterable
import dataclasses
import functools
import re

from flax import linen as nn
import jax
import jax.numpy as jnp

from qalora_jax import adapters
from qalora_jax.kernels import mesh
from qalora_jax.kernels import qmatmul
from qalora_jax.quant import method
from qalora_jax.quant import qtensor

# Words for `targets`; anything else is a regular expression searched in the weight's name.
TARGETS = {
  'all': r'^(layers|encoder|decoder)/.*_proj$',
  'attention': r'^(layers|encoder|decoder)/.*/(attention|cross)/.*_proj$',
  'mlp': r'^(layers|encoder|decoder)/.*/mlp/.*_proj$',
}
# What stacks of layers are called: of a model with one kind of layer, and of one that has an encoder and a decoder.
STACK, ENCODER, DECODER = STACKS = ('layers', 'encoder', 'decoder')
# The logical axis of the rows of a batch.
ROWS = 'rows'


def selects(targets: str, name: str) -> bool:
  """Whether `targets` (a word of TARGETS or a regular expression) names the weight, e.g. layers/0/mlp/down_proj."""
  return _compiled(TARGETS.get(targets, targets)).search(name) is not None


# A model of 80 layers has more weights than the cache of `re` has places.
_compiled = functools.lru_cache(maxsize=None)(re.compile)


def stacks(starts: Iterable[int], stack: str = STACK) -> list[str]:
  """The names of a stack's parts that begin at `starts`: `layers` alone, or `layers_0`, `layers_3`, ..."""
  starts = list(starts)
  return [stack] if len(starts) == 1 else [f'{stack}_{start}' for start in starts]


def starts(names: Iterable[str]) -> dict[str, list[int]]:
  """{stack: the first layers of its parts, in order} among the names in a tree; the inverse of `stacks`."""
  found = {}
  for name in names:
    if (part := stack_of(name)) is not None:
      found.setdefault(part[0], []).append(part[1])
  return {stack: sorted(firsts) for stack, firsts in found.items()}


def stack_of(name: str) -> tuple[str, int] | None:
  """(stack, first layer) of the name of a part of a stack, 'layers_3'; None for another name."""
  match = re.fullmatch(rf'({"|".join(STACKS)})(?:_(\d+))?', name)
  return match and (match[1], int(match[2] or 0))


def weight_name(path: str) -> str:
  """The name of a weight of a stack's first layer: layers_3/mlp/down_proj -> layers/3/mlp/down_proj.

  Outside the stacks a path is the name.
  """
  part, slash, rest = path.partition('/')
  found = stack_of(part)
  return f'{found[0]}/{found[1]}/{rest}' if slash and found else path


@dataclasses.dataclass(frozen=True)
class Scheme:
  """What stands in a model's weights at birth: trained or frozen, dense or quantized, with which adapter.

  `quantizers`: (pattern, quantizer) in order, the first whose pattern selects the weight's name counts; none, or a
  quantizer of None: dense.  A quantizer is called as quantizer(w, name).  Where weights train, only `method.QAT` acts.
  `frozen_dtype`: of the frozen weights that stay dense.  `heads`: the names of modules of the model that train whatever
  the rest does (PEFT's modules_to_save), each of which asks for its own scheme by `of`.
  """

  trains: bool = False
  quantizers: tuple[tuple[str, Callable | None], ...] = ()
  adapter: adapters.Adapter | None = None
  adapted: str = 'all'
  frozen_dtype: jnp.dtype = jnp.float32
  heads: tuple[str, ...] = ()

  def of(self, name: str) -> 'Scheme':
    """The scheme of the model's module `name`: one of `heads` trains, dense and without an adapter."""
    return dataclasses.replace(self, trains=True, quantizers=(), adapter=None) if name in self.heads else self

  def quantizer(self, name: str) -> Callable | None:
    """The quantizer of the weight called `name`, or None for a dense one."""
    found = next((q for targets, q in self.quantizers if selects(targets, name)), None)
    return None if self.trains and not isinstance(found, method.QAT) else found

  def adapts(self, name: str) -> bool:
    """Whether the weight called `name` has an adapter."""
    return self.adapter is not None and selects(self.adapted, name)

  def starts(self, config) -> dict[str, list[int]]:
    """{stack: the first layer of each of its parts}: neighbours whose matrices are all alike share one.

    `config`: a family's, which says `depths` and `sequence`.
    """
    return {stack: self._starts(stack, depth, config.sequence[stack]) for stack, depth in config.depths.items()}

  def _starts(self, stack: str, depth: int, sequence: dict) -> list[int]:
    names = [[f'{stack}/{layer}/{matrix}' for matrix in matrices(sequence)] for layer in range(depth)]
    kinds = [[(self.quantizer(name), self.adapts(name)) for name in own] for own in names]
    return [layer for layer in range(depth) if layer == 0 or kinds[layer] != kinds[layer - 1]]


def weight(module: nn.Module, scheme: Scheme, name: str, init: Callable) -> jax.Array:
  """A weight of `module`: in 'params' where it trains, else in 'frozen'.  `init(key)` makes it at birth."""
  born_trained = module.is_initializing() and scheme.trains
  if born_trained or module.has_variable('params', name):
    return module.param(name, init)
  return module.variable('frozen', name, lambda: init(module.make_rng('params'))).value


def dense_init(scheme: Scheme, initializer: Callable, shape: tuple[int, ...], axes: tuple[str, ...]) -> Callable:
  """`init(key)` of a dense weight with logical axes, in float32 where it trains and in frozen_dtype where not."""
  dtype = jnp.float32 if scheme.trains else scheme.frozen_dtype
  return lambda key: nn.with_logical_partitioning(initializer, axes)(key, shape, dtype)


def split(axes: tuple[str, str]) -> qtensor.Split | None:
  """How the rules in context divide a product with a matrix of these logical axes; None where there are no rules."""
  rules = dict(nn.get_logical_axis_rules())
  return qtensor.Split(_rules_of(ROWS), rules.get(axes[0]), rules.get(axes[1])) if rules else None


def by_rows(x) -> jax.Array:
  """Activations x [B, ..., D] where the rules in context want rows: each device has all of its rows.

  Left to itself XLA may divide D by the axis that divides weights for storage (FSDP), and add up partial products.
  """
  return mesh.lay(x, _rules_of(ROWS))


def look_up(embedding_VD, tokens_BT) -> jax.Array:
  """embedding[tokens] [B, T, D], as `by_rows`.

  Where D and rows are divided by the same axis, every device looks up its own part of D for the rows of all that share
  that axis, and then the two are exchanged.  So only activations travel; the embedding is never gathered.
  """
  rows, features = _rules_of(ROWS), next(iter(_rules_of('embed')), None)
  first = tuple(axis for axis in rows if axis != features)
  x_BTD = mesh.lay(embedding_VD[mesh.lay(tokens_BT, first)], first, features)
  return by_rows(x_BTD)


def _rules_of(axis: str) -> tuple[str, ...]:
  """The axes of a mesh over which the rules in context divide this logical axis."""
  found = dict(nn.get_logical_axis_rules()).get(axis) or ()
  return (found,) if isinstance(found, str) else tuple(found)


def matrices(sequence: dict) -> tuple[str, ...]:
  """All matrices of a block, in the order in which data flows: of `sequence`, {method: lines of alike matrices}."""
  return tuple(matrix for lines in sequence.values() for alike in lines for matrix in alike)


class Linear(nn.Module):
  """x [..., I] -> x @ dense(kernel) + the adapter's update [+ bias], [..., features].

  `axes` are the logical axes of (inputs, outputs) that sharding rules read.  The bias of one that is `biased` is dense,
  whatever the kernel is.
  """

  features: int
  axes: tuple[str, str]
  scheme: Scheme
  biased: bool = False

  @nn.compact
  def __call__(self, x):
    y = self._product(x)
    if not self.biased:
      return y
    init = dense_init(self.scheme, nn.initializers.zeros, (self.features,), self.axes[1:])
    bias = weight(self, self.scheme, 'bias', init).astype(y.dtype)
    return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)

  def _product(self, x):
    kernel = weight(self, self.scheme, 'kernel', self._kernel_init(x.shape[-1]))
    if isinstance(kernel, qtensor.QTensor):
      kernel = kernel.replace(split=split(self.axes))
    adapter = self._adapter(kernel)
    if adapter is None:
      return qmatmul.qmatmul(x, kernel)
    rng = self.make_rng('dropout') if self.has_rng('dropout') else None
    return adapter.apply(x, kernel, rng)

  def _name(self) -> str:
    return weight_name('/'.join(self.path))

  def _kernel_init(self, inputs: int) -> Callable:
    shape = (inputs, self.features)
    quantizer = self.scheme.quantizer(self._name())
    if quantizer is None:
      return dense_init(self.scheme, nn.initializers.normal(0.02), shape, self.axes)

    def init(key):
      blank = lambda key: quantizer(nn.initializers.normal(0.02)(key, shape), name=self._name())
      return nn.with_logical_partitioning(blank, self.axes)(key)

    return init

  def _adapter(self, kernel):
    if self.has_variable('params', 'adapter'):
      return self.get_variable('params', 'adapter')
    if self.is_initializing() and self.scheme.adapts(self._name()):
      return self.param('adapter', lambda key: self.scheme.adapter.init(key, kernel, self.axes))
    return None
