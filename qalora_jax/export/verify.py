"""Reading back what was written: every weight, by the format's own library, held against the model's."""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax import layout
from qalora_jax.models import layers
from qalora_jax.quant import qtensor


@dataclasses.dataclass(frozen=True)
class Verified:
  """What was compared and how close it is; differences are relative to the largest entry of a weight."""

  library: str
  weights: int
  equal: int
  largest: float
  furthest: str

  def __str__(self):
    said = f'read back by {self.library}: {self.equal} of {self.weights} weights equal bit for bit'
    if self.equal == self.weights:
      return said
    return f'{said}; the others differ by at most {self.largest:.1e} of their largest entry ({self.furthest})'


def verify(
  config: layers.Config,
  tree: dict,
  library: str,
  read: Callable[[str, str], np.ndarray],
  allowed: Callable[[str, object], np.ndarray | float],
  progress: Callable[[], None] | None = None,
) -> Verified:
  """Compares read(path, name), a matrix as [inputs, outputs], with every weight of `tree`, one at a time.

  `allowed(path, leaf)` is the rounding of the format, entry by entry.  Raises ValueError where a weight differs by
  more.
  """
  count, equal, largest, furthest = 0, 0, 0.0, ''
  for path, name, leaf in layout.parts(config, tree, progress):
    wanted, found = dense(leaf), np.asarray(read(path, name), np.float32)
    count += 1
    if found.shape == wanted.shape and np.array_equal(found, wanted):
      equal += 1
      continue
    if found.shape != wanted.shape:
      raise ValueError(f'not written: {library} reads {name} as {found.shape}, not {wanted.shape}; please report this.')
    distance = np.abs(found - wanted)
    # Not `distance > allowed`: a NaN is no rounding.
    if not (distance <= allowed(path, leaf)).all():
      raise ValueError(
        f'not written: {library} reads {name} back with a difference of {np.nanmax(distance):.2e}, which is more than '
        'the rounding of the format; please report this.'
      )
    relative = float(distance.max() / np.abs(wanted).max())
    if relative > largest:
      largest, furthest = relative, name
  return Verified(library, count, equal, largest, furthest)


def dense(leaf) -> np.ndarray:
  """A leaf as a dense float32 array on the host."""
  return np.asarray(_dequantize(leaf) if isinstance(leaf, qtensor.QTensor) else leaf, np.float32)


def rounding(leaf, eps: float) -> np.ndarray:
  """What two roundings of scale and offset, and those of the products with them, make of each entry of a leaf."""
  if not isinstance(leaf, qtensor.QTensor):
    return eps * np.abs(dense(leaf))
  return np.asarray(_magnitude(leaf)) * eps


_dequantize = jax.jit(qtensor.dequantize)


@jax.jit
def _magnitude(q: qtensor.QTensor):
  """|scale| * 2^bits + |offset| of every entry [I, O]: what bounds each term of its sum, whatever the zero of codes."""
  size = jnp.abs(qtensor.scales(q)) * 2.0**q.bits + jnp.abs(qtensor.offsets(q))
  return jnp.repeat(size, q.group, axis=-2)
