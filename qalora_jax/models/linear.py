"""The hinge: one `Linear` for dense, quantized and adapted weights.  The variables decide which.

A model's weights live in two linen collections: 'params' trains, 'frozen' does not.  `Scheme` says what is born
where; afterwards nothing but the variables themselves is asked:

    params/.../kernel            a dense matrix that trains
    frozen/.../kernel            an array or a QTensor
    params/.../adapter           a LoRA or QALoRA beside it, or absent
"""

from collections.abc import Callable
import dataclasses
import re

from flax import linen as nn
import jax
import jax.numpy as jnp

from qalora_jax import adapters
from qalora_jax.kernels import qmatmul
from qalora_jax.quant import affine

# Words for `targets`; anything else is a regular expression searched in the weight's name.
TARGETS = {
  'all': r'layers/.*_proj$',
  'attention': r'layers/attention/.*_proj$',
  'mlp': r'layers/mlp/.*_proj$',
}


def selects(targets: str, name: str) -> bool:
  """Whether `targets` (a word of TARGETS or a regular expression) names the weight, e.g. layers/mlp/down_proj."""
  return re.search(TARGETS.get(targets, targets), name) is not None


@dataclasses.dataclass(frozen=True)
class Scheme:
  """What stands in a model's weights at birth: trained or frozen, dense or quantized, with which adapter.

  `quantizers`: (pattern, quantizer) in order, the first whose pattern selects the weight's name counts; none: dense.
  `frozen_dtype`: of the frozen weights that stay dense.
  """

  trains: bool = False
  quantizers: tuple[tuple[str, affine.Affine], ...] = ()
  adapter: adapters.Adapter | None = None
  adapted: str = 'all'
  frozen_dtype: jnp.dtype = jnp.float32

  def quantizer(self, name: str) -> affine.Affine | None:
    """The quantizer of the weight called `name`, or None for a dense one."""
    return next((q for targets, q in self.quantizers if selects(targets, name)), None)


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


class Linear(nn.Module):
  """x [..., I] -> x @ dense(kernel) + the adapter's update [..., features]; no bias.

  `axes` are the logical axes of (inputs, outputs) that sharding rules read.
  """

  features: int
  axes: tuple[str, str]
  scheme: Scheme

  @nn.compact
  def __call__(self, x):
    kernel = weight(self, self.scheme, 'kernel', self._kernel_init(x.shape[-1]))
    adapter = self._adapter(kernel)
    if adapter is None:
      return qmatmul.qmatmul(x, kernel)
    rng = self.make_rng('dropout') if self.has_rng('dropout') else None
    return adapter.apply(x, kernel, rng)

  def _path(self) -> str:
    return '/'.join(self.path)

  def _kernel_init(self, inputs: int) -> Callable:
    shape = (inputs, self.features)
    quantizer = None if self.scheme.trains else self.scheme.quantizer(self._path())
    if quantizer is None:
      return dense_init(self.scheme, nn.initializers.normal(0.02), shape, self.axes)

    def init(key):
      blank = lambda key: quantizer(nn.initializers.normal(0.02)(key, shape), name=self._path())
      return nn.with_logical_partitioning(blank, self.axes)(key)

    return init

  def _adapter(self, kernel):
    if self.has_variable('params', 'adapter'):
      return self.get_variable('params', 'adapter')
    if self.is_initializing() and self.scheme.adapter and selects(self.scheme.adapted, self._path()):
      return self.param('adapter', lambda key: self.scheme.adapter.init(key, kernel, self.axes))
    return None
