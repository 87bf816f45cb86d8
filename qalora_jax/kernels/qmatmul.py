"""`qmatmul`: dispatch over implementations, and the gradient, written once above them all."""

import functools

import jax
import jax.numpy as jnp

from qalora_jax.kernels import reference
from qalora_jax.kernels import xla
from qalora_jax.quant import latent
from qalora_jax.quant import qtensor

_FORWARD = {'xla': xla.forward}
_TRANSPOSE = {'xla': xla.transpose}


def qmatmul(x, w, impl: str | None = None) -> jax.Array:
  """x [..., I] @ w [I, O] for a dense array, a `QTensor` or a `Latent`; float32 accumulation, result in x's dtype.

  For a QTensor the gradient reaches x and the offsets alone:

      dx = dy @ dense(w).T        doffset = pool(x).T @ dy

  so between forward and backward only pool(x) [..., I / group] is kept, never x and never a dense matrix
  (the dense matrix is made again); a matrix without offsets keeps none of it.

  For a Latent the result is that of w.quantize(), and so is dx; w learns by `latent.gradient` of x.T @ dy, summed in
  float32.  Between forward and backward x and w are kept.

  `impl`: 'xla'; 'reference' (the specification under plain autodiff); None chooses.  Raises ValueError for another
  name, or where shapes do not meet.
  """
  if x.shape[-1] != w.shape[-2]:
    raise ValueError(f'qmatmul: x has {x.shape[-1]} inputs, the weight {w.shape[-2]}.')
  trains = isinstance(w, latent.Latent)
  if not trains and not isinstance(w, qtensor.QTensor):
    return jnp.dot(x, w.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)
  if impl == 'reference':
    return _specified(x, w) if trains else reference.qmatmul(x, w)
  impl = impl or 'xla'
  if impl not in _FORWARD:
    raise ValueError(f'qmatmul: no implementation {impl!r}; there are {sorted([*_FORWARD, "reference"])}.')
  return _rounded(x, w, impl) if trains else _quantized(x, w, impl)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _quantized(x, w, impl):
  return _FORWARD[impl](x, w)


def _keep(x, w, impl):
  return _FORWARD[impl](x, w), (None if w.offset is None else reference.pool(x, w.groups), w)


def _gradients(impl, kept, dy):
  pooled, w = kept
  if w.offset is None:
    return _TRANSPOSE[impl](dy, w), None
  rows = dy.reshape(-1, dy.shape[-1]).astype(jnp.float32)
  doffset = jnp.dot(pooled.reshape(-1, w.groups).T, rows, precision=jax.lax.Precision.HIGHEST)
  dw = w.replace(planes=None, scale=None, offset=doffset.astype(w.offset.dtype))
  return _TRANSPOSE[impl](dy, w), dw


_quantized.defvjp(_keep, _gradients)


def _specified(x, w: latent.Latent):
  """`reference.qmatmul` of w.quantize(), differentiable in w."""
  dense = latent.fake_quantize(w)
  return jnp.dot(x.astype(jnp.float32), dense, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded(x, w, impl):
  return _FORWARD[impl](x, _used(w))


def _estimates(impl, kept, dy):
  x, w = kept
  rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  ddense = jnp.dot(rows.T, drows, precision=precision, preferred_element_type=jnp.float32)
  return _TRANSPOSE[impl](dy, _used(w)), latent.gradient(w, ddense)


_rounded.defvjp(lambda x, w, impl: (_rounded(x, w, impl), (x, w)), _estimates)


def _used(w: latent.Latent) -> qtensor.QTensor:
  """w.quantize(), with nothing of the rounding fused into the products: they are those of the exported QTensor."""
  return jax.lax.optimization_barrier(w.quantize())
