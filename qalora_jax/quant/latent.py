"""Quantization-aware training: a float32 matrix that trains and is used rounded.

I inputs, O outputs, G group size, L groups (I // G).
"""

import math

from flax import struct
import jax
import jax.numpy as jnp

from qalora_jax.quant import affine
from qalora_jax.quant import qtensor
from qalora_jax.quant import quantizer

# Half a step and a little more: clip = 'mse' likes ranges that leave the ends at exactly half a step, where float32
# would toss a coin.
_REACH = 0.51


class Latent(struct.PyTreeNode):
  """A trainable matrix w [..., I, O] that stands for dense(quantize()), its nearest levels.

  * Without scale: min-max.  `quantizer.fit` finds the scales of w anew at every use.
  * With scale [..., L, O], and offset [..., L, O] where the quantizer is asymmetric: they train too, as in LSQ (Esser
    et al., 2019) and LSQ+ (Bhalgat et al., 2020).  Both are float32; codes are fitted to them as `quantizer` stores
    them: rounded to its scale_dtype, and with zero = 'integer' the offset first to a whole number of steps that a
    packed zero-point can hold.  A negative scale is as good as a positive one and keeps its sign until training carries
    it through 0; at 0 a group is constant.

  `gradient` says how it learns.  Every field keeps the axes (inputs, outputs), as a QTensor's do.
  """

  w: jax.Array
  scale: jax.Array | None
  offset: jax.Array | None
  quantizer: affine.Affine = struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the matrix, leading axes included."""
    return self.w.shape

  @property
  def size(self) -> int:
    """The number of weights, scales and offsets not counted."""
    return math.prod(self.shape)

  def quantize(self) -> qtensor.QTensor:
    """The codes, scales and offsets that the forward pass uses."""
    if self.scale is None:
      return self.quantizer(self.w)
    scale = quantizer.stored_scale(self.scale, self.quantizer.scale_dtype)
    offset = None if self.offset is None else self._stored_offset(scale.astype(jnp.float32))
    codes = self.quantizer.encode(_grouped(self.w, scale), quantizer.spread(scale), quantizer.spread(offset))
    return self.quantizer.store(codes.reshape(self.shape), scale, offset)

  def _stored_offset(self, scale) -> jax.Array:
    offset = self.offset
    if self.quantizer.zero == 'integer':
      half = 2 ** (self.quantizer.bits - 1)
      steps = jnp.round(offset / jnp.where(scale == 0, 1.0, scale))
      offset = scale * jnp.clip(steps, 1 - half, half)
    return quantizer.stored_offset(offset, self.quantizer.scale_dtype)


def latent(w, quantizer: affine.Affine, learned: bool, name: str = 'a weight') -> Latent:
  """A Latent that starts at w [..., I, O].  `learned` scales start where `quantizer` fits them: both kinds start alike.

  Raises ValueError, calling the weight `name`, for another kind of quantizer and where the group does not divide I.
  """
  if not isinstance(quantizer, affine.Affine):
    raise ValueError(
      f'{name}: quantization-aware training needs evenly spaced levels, not {type(quantizer).__name__}; '
      'set base.method = "affine".'
    )
  w = w.astype(jnp.float32)
  fitted = quantizer(w, name)
  if not learned:
    return Latent(w, None, None, quantizer)
  return Latent(w, qtensor.scales(fitted), None if quantizer.symmetric else qtensor.offsets(fitted), quantizer)


@jax.custom_vjp
def fake_quantize(w: Latent) -> jax.Array:
  """The dense float32 matrix [..., I, O] that w stands for; its derivative is `gradient`."""
  return qtensor.dequantize(w.quantize())


def gradient(w: Latent, ddense) -> Latent:
  """The gradient of w from that of the dense matrix, ddense [..., I, O], in float32.

  With z = (w - offset) / scale, v its code, and h = 2^(bits-1), a weight is inside where -h < z < h - 1.  Learned
  scales (LSQ, section 2.1; LSQ+, whose offsets are those of activations), with sums over the G weights of a group:

      dw = ddense where inside, else 0
      dscale = g * sum(ddense * (v - z where inside, else -h or h - 1))
      doffset = g * sum(ddense where not inside)                g = 1 / sqrt(G * (h - 1))    (LSQ, section 2.2)

  The roundings of scale and offset to what is stored pass gradients straight through.  At scale = 0 these are the
  limits from above, so that a group can leave it: nothing is divided by 0.

  Min-max scales count as constants: dw = ddense, but 0 where a quantizer that clips cut off more than 0.51 steps.
  """
  half = 2 ** (w.quantizer.bits - 1)
  if w.scale is None and w.quantizer.clip == 'none':
    return w.replace(w=ddense.astype(jnp.float32))
  q = w.quantize()
  scale, offset = quantizer.spread(qtensor.scales(q)), quantizer.spread(qtensor.offsets(q))
  ddense = _grouped(ddense, q.scale)
  z = (_grouped(w.w, q.scale) - offset) / jnp.where(scale == 0, jnp.finfo(jnp.float32).tiny, scale)
  if w.scale is None:
    inside = (z > -half - _REACH) & (z < half - 1 + _REACH)
    return w.replace(w=jnp.where(inside, ddense, 0.0).reshape(w.shape))
  inside = (z > -half) & (z < half - 1)
  slope = jnp.where(inside, _grouped(qtensor.codes(q), q.scale) - z, jnp.clip(z, -half, half - 1))
  g = 1.0 / math.sqrt(q.group * (half - 1))
  return w.replace(
    w=jnp.where(inside, ddense, 0.0).reshape(w.shape),
    scale=g * jnp.sum(ddense * slope, axis=-2),
    offset=None if w.offset is None else g * jnp.sum(jnp.where(inside, 0.0, ddense), axis=-2),
  )


fake_quantize.defvjp(lambda w: (fake_quantize(w), w), lambda w, ddense: (gradient(w, ddense),))


def _grouped(matrix, scale) -> jax.Array:
  """[..., I, O] in float32 -> [..., L, G, O], the groups those of scale [..., L, O]."""
  *leading, groups, outputs = scale.shape
  return matrix.astype(jnp.float32).reshape(*leading, groups, matrix.shape[-2] // groups, outputs)
