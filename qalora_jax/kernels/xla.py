"""Quantized products left to XLA: dequantize one matrix, then one dense product.

In float32 the offset is part of that matrix.  In lower precisions it stays apart, in float32: a trained change
of an offset (about 1e-5) is below bfloat16's step at a weight of 0.02 (8e-5) and would be rounded away, whereas

    x @ dense = x @ (codes * scale) + pool(x) @ offset

keeps it.
"""

import jax
import jax.numpy as jnp

from qalora_jax.kernels import product as product_lib
from qalora_jax.kernels import reference
from qalora_jax.quant import qtensor

# Without it a float32 product is TF32 on GPUs and bfloat16 on TPUs, and the offset's small changes are lost again.
_EXACT = jax.lax.Precision.HIGHEST


def worthwhile(product: product_lib.Product, device: product_lib.Device) -> bool:
  """Always: it is what everything else is measured by."""
  return True


def plan(product: product_lib.Product, device: product_lib.Device) -> None:
  """It refuses nothing and plans nothing: XLA does."""


def forward(x, w: qtensor.QTensor, blocks=None, *, out_dtype=None, interpret=False):
  """x [..., I] @ dense(w) -> [..., O]."""
  return sums(*_within_loops(x, w)).astype(out_dtype or x.dtype)


def transpose(dy, w: qtensor.QTensor, blocks=None, *, out_dtype=None, interpret=False):
  """dy [..., O] @ dense(w).T -> [..., I]."""
  return transposed_sums(*_within_loops(dy, w)).astype(out_dtype or dy.dtype)


def _within_loops(x, w):
  """The operands, tied together off CPU.

  Else XLA moves the dequantization of weights that a loop leaves alone out of it and keeps all of them dense: on
  an accelerator they are then read at 16 bits a weight at every step.  On CPU that is the faster way.
  """
  return (x, w) if product_lib.device().platform == 'cpu' else jax.lax.optimization_barrier((x, w))


def sums(x, w: qtensor.QTensor) -> jax.Array:
  """x @ dense(w) in float32, before it is rounded to x's dtype."""
  if x.dtype == jnp.float32:
    return jnp.dot(x, qtensor.dequantize(w), precision=_EXACT)
  y = jnp.dot(x, qtensor.scaled(w, x.dtype), preferred_element_type=jnp.float32)
  if w.offset is None:
    return y
  return y + jnp.dot(reference.pool(x, w.groups), qtensor.offsets(w), precision=_EXACT)


def transposed_sums(dy, w: qtensor.QTensor) -> jax.Array:
  """dy @ dense(w).T in float32, before it is rounded to dy's dtype."""
  if dy.dtype == jnp.float32:
    return jnp.dot(dy, qtensor.dequantize(w).T, precision=_EXACT)
  dx = jnp.dot(dy, qtensor.scaled(w, dy.dtype).T, preferred_element_type=jnp.float32)
  if w.offset is None:
    return dx
  by_group = jnp.dot(dy.astype(jnp.float32), qtensor.offsets(w).T, precision=_EXACT)
  return dx + jnp.repeat(by_group, w.group, axis=-1)
