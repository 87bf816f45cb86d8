"""What every quantizer of groups has in common: fit each group, encode, decode, pack.

I inputs, O outputs, G group size, L groups (I // G).
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp

from qalora_jax.quant import qtensor

SCALE_DTYPES = ('float32', 'float16')


def stored_scale(scale, dtype: str) -> jax.Array:
  """Scales as they are kept: in float16 of magnitude 6e-8 (the smallest; but 0 stays 0) to 65504, never infinite."""
  limits = jnp.finfo(dtype)
  magnitude = jnp.clip(jnp.abs(scale), limits.smallest_subnormal, limits.max)
  return jnp.where(scale == 0, 0.0, jnp.copysign(magnitude, scale)).astype(dtype)


def stored_offset(offset, dtype: str) -> jax.Array:
  """Offsets as they are kept: in float16 at most 65504 in magnitude, never infinite."""
  limits = jnp.finfo(dtype)
  return jnp.clip(offset, limits.min, limits.max).astype(dtype)


def divide(values, divisor) -> jax.Array:
  """values / divisor, as a division.

  Left to itself XLA multiplies by the rounded reciprocal of a divisor that it sees to be constant or broadcast, which
  near a tie gives another code than the same expression column by column, or another program.
  """
  return values / jnp.where(jnp.isnan(values), 1.0, divisor)


def spread(constants) -> jax.Array | None:
  """Scales or offsets [..., O] (None: none) as they broadcast against their groups [..., G, O]."""
  return None if constants is None else constants[..., None, :]


@dataclasses.dataclass(frozen=True)
class Quantizer(abc.ABC):
  """A family of codes with its choices; hashable, so that weights of one quantizer share one compiled program.

  `group`: inputs that share a scale and an offset; -1: a whole column.
  """

  bits: int
  group: int

  @property
  def levels(self) -> str:
    """What the codes stand for, as in QTensor.levels."""
    return 'integer'

  @abc.abstractmethod
  def fit(self, grouped) -> tuple[jax.Array, jax.Array | None]:
    """Scale and offset [..., O] (None: no offset) of groups [..., G, O], in the dtype in which they are stored."""

  @abc.abstractmethod
  def encode(self, w, scale, offset) -> jax.Array:
    """The int32 codes of w; scale and offset (or None) broadcast against it."""

  def decode(self, codes, scale, offset) -> jax.Array:
    """level(codes) * scale + offset in float32, broadcast as in `encode`."""
    dense = qtensor.level(codes, self.levels) * scale.astype(jnp.float32)
    return dense if offset is None else dense + offset.astype(jnp.float32)

  def store(self, codes, scale, offset) -> qtensor.QTensor:
    """The QTensor of codes [..., I, O] with scale and offset [..., L, O]."""
    group = codes.shape[-2] // scale.shape[-2]
    planes = qtensor.pack(codes, self.bits)
    return qtensor.QTensor(planes, scale, offset, bits=self.bits, group=group, levels=self.levels)

  def __call__(self, w, name: str = 'a weight') -> qtensor.QTensor:
    """Rounds w [..., I, O] to the nearest level, group by group.

    Raises ValueError, calling the weight `name`, where the group does not divide the inputs.
    """
    *leading, inputs, outputs = w.shape
    group = qtensor.check_group(inputs, self.group, name)
    grouped = w.astype(jnp.float32).reshape(*leading, inputs // group, group, outputs)
    scale, offset = self.fit(grouped)
    codes = self.encode(grouped, spread(scale), spread(offset))
    return self.store(codes.reshape(w.shape), scale, offset)
