"""Normalizations over the last axis, in float32."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from qalora_jax.models import linear


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * (shift + scale) over the last axis, in float32 (Zhang and Sennrich, 2019).

  `shift`: 1 where a checkpoint stores the scale's distance from 1 (Gemma).
  """

  eps: float
  scheme: linear.Scheme
  shift: float = 0.0

  @nn.compact
  def __call__(self, x):
    begin = nn.initializers.constant(1.0 - self.shift)
    scale = _vector(self, 'scale', begin, x).astype(jnp.float32)
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
    return (x32 * inverse * (self.shift + scale.reshape((1,) * (x.ndim - 1) + scale.shape))).astype(x.dtype)


class LayerNorm(nn.Module):
  """(x - mean(x)) / sqrt(var(x) + eps) * scale + bias over the last axis, in float32 (Ba et al., 2016)."""

  eps: float
  scheme: linear.Scheme

  @nn.compact
  def __call__(self, x):
    scale = _vector(self, 'scale', nn.initializers.ones, x).astype(jnp.float32)
    bias = _vector(self, 'bias', nn.initializers.zeros, x).astype(jnp.float32)
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
    along = (1,) * (x.ndim - 1) + scale.shape
    return (centred * inverse * scale.reshape(along) + bias.reshape(along)).astype(x.dtype)


def _vector(module, name: str, initializer, x) -> jax.Array:
  init = linear.dense_init(module.scheme, initializer, (x.shape[-1],), ('norm',))
  return linear.weight(module, module.scheme, name, init)
