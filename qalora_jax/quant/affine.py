"""Affine quantization: integer codes with a scale and an offset in every group of inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax.quant import qtensor
from qalora_jax.quant import quantizer

ZEROS = ('real', 'integer')
CLIPS = ('none', 'percentile', 'mse')
# The search of GPTQ's released code: the range shrunk by 0, 1, ... 79 %.
_KEPT = np.array([1 - percent / 100 for percent in range(80)], np.float32)


@dataclasses.dataclass(frozen=True)
class Affine(quantizer.Quantizer):
  """Rounds to 2^bits equally spaced levels between a low and a high end of every group of `group` inputs.

  Asymmetric, zero = 'real' (QA-LoRA, section 3.1, with codes centred), h = 2^(bits-1):

      scale = (high - low) / (2h - 1)     offset = low + h * scale     codes = round((w - offset) / scale)

  zero = 'integer' (GPTQ's and AWQ's files): 0 is in every range, that of a group of zeros is [-1, 1], and offset =
  scale * (h - round(-low / scale)), a multiple of the scale, so that a packed zero-point can hold it.  symmetric: no
  offset.  With a real zero the entry of largest magnitude becomes code -h (GGUF's Q4_0), so scale may be negative; with
  an integer one scale = 2 max|w| / (2h - 1) (GPTQ's `sym`; but its code cuts a group without negative entries at half
  its range, and this does not).

  Low and high are the minimum and maximum; or with clip = 'percentile' those percentiles (100 - p and p) of the group;
  or with clip = 'mse' the ends, shrunk together by 0 to 79 %, that minimise sum |w - dense|^norm (GPTQ's code: norm
  2.4; 2.0 takes a fifth of its time).

  Unclipped in float32: where asymmetric with a real zero, an error is at most scale / 2, and a constant group has scale
  0 and is exact.  Quantizing `dense` again gives the same codes, unless symmetric with an integer zero: its levels end
  half a step within or beyond the range.

  scale_dtype: 'float32' or 'float16', of scale and offset; codes are fitted to the rounded values.  Those of weights up
  to 65504 in magnitude fit in float16; larger ones become the largest that do, and a scale below 6e-8 becomes 6e-8.
  Raises ValueError for values outside these.
  """

  symmetric: bool = False
  zero: str = 'real'
  clip: str = 'none'
  percentile: float = 99.9
  norm: float = 2.0
  scale_dtype: str = 'float32'

  def __post_init__(self):
    if self.bits not in qtensor.PLANES:
      raise ValueError(f'{self.bits} bits; a code has one of {sorted(qtensor.PLANES)} bits.')
    for key, words in (('zero', ZEROS), ('clip', CLIPS), ('scale_dtype', quantizer.SCALE_DTYPES)):
      if getattr(self, key) not in words:
        raise ValueError(f'{key} = {getattr(self, key)!r}; it is one of {words}.')
    if not 50 < self.percentile <= 100:
      raise ValueError(f'percentile = {self.percentile}; it is above 50 and at most 100.')
    if not self.norm > 0:
      raise ValueError(f'norm = {self.norm}; it is above 0.')

  @property
  def _half(self) -> int:
    return 2 ** (self.bits - 1)

  def fit(self, grouped) -> tuple[jax.Array, jax.Array | None]:
    low, high = self._ends(grouped)
    if self.clip != 'mse':
      return self._between(low, high)

    def attempt(index, best):
      keep = jnp.asarray(_KEPT)[index]
      # Towards 0 where 0 has to stay a level, towards the middle elsewhere.
      middle = jnp.zeros_like(low) if self.symmetric or self.zero == 'integer' else (low + high) / 2
      scale, offset = self._between(*(keep * end + (1 - keep) * middle for end in (low, high)))
      constants = quantizer.spread(scale), quantizer.spread(offset)
      dense = self.decode(self.encode(grouped, *constants), *constants)
      error = jnp.sum(jnp.abs(dense - grouped) ** self.norm, axis=-2)
      better = error < best[0]
      return jax.tree.map(lambda new, old: jnp.where(better, new, old), (error, scale, offset), best)

    return jax.lax.fori_loop(0, len(_KEPT), attempt, (jnp.full_like(low, jnp.inf), *self._between(low, high)))[1:]

  def encode(self, w, scale, offset) -> jax.Array:
    scale = scale.astype(jnp.float32)
    step = jnp.where(scale == 0, 1.0, scale)
    shift = 0.0 if offset is None else offset.astype(jnp.float32)
    if self.zero == 'integer':
      # As GPTQ rounds, ties included: the weight first, then the whole number of steps.
      levels = jnp.round(quantizer.divide(w, step)) - jnp.round(quantizer.divide(shift, step))
    else:
      levels = jnp.round(quantizer.divide(w - shift, step))
    levels = jnp.where(scale == 0, 0.0, levels)
    return jnp.clip(levels, -self._half, self._half - 1).astype(jnp.int32)

  def _ends(self, grouped) -> tuple[jax.Array, jax.Array]:
    if self.clip == 'percentile':
      tail = 1.0 - self.percentile / 100.0
      low, high = jnp.quantile(grouped, jnp.array([tail, 1.0 - tail]), axis=-2)
    else:
      low, high = grouped.min(-2), grouped.max(-2)
    if self.zero == 'integer':
      low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
      # As GPTQ, so that a zero-point can be told from the offset.
      empty = low == high
      low, high = jnp.where(empty, -1.0, low), jnp.where(empty, 1.0, high)
    return low, high

  def _between(self, low, high) -> tuple[jax.Array, jax.Array | None]:
    """Scale and offset of ranges from `low` to `high`."""
    if self.symmetric:
      largest = jnp.where(high > -low, high, low)
      scale = quantizer.divide(jnp.abs(largest), self._half - 0.5) if self.zero == 'integer' else largest / -self._half
      return quantizer.stored_scale(scale, self.scale_dtype), None
    # What the codes are fitted to is what is stored.
    scale = quantizer.stored_scale(quantizer.divide(high - low, 2 * self._half - 1), self.scale_dtype)
    wide = scale.astype(jnp.float32)
    if self.zero == 'real':
      return scale, quantizer.stored_offset(low + self._half * wide, self.scale_dtype)
    steps = jnp.round(-low / jnp.where(wide == 0, 1.0, wide))
    return scale, quantizer.stored_offset(wide * (self._half - steps), self.scale_dtype)


def quantize(w, *, bits: int, group: int, symmetric: bool = False, name: str = 'a weight') -> qtensor.QTensor:
  """`Affine(bits, group, symmetric)` of w [..., I, O]: round to nearest between minimum and maximum."""
  return Affine(bits, group, symmetric)(w, name)
