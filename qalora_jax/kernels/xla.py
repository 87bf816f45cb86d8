"""Quantized products left to XLA: dequantize one matrix, then one dense product.

In float32 the offset is part of that matrix.  In lower precisions it stays apart, in float32: a trained change
of an offset (about 1e-5) is below bfloat16's step at a weight of 0.02 (8e-5) and would be rounded away, whereas

    x @ dense = x @ (codes * scale) + pool(x) @ offset

keeps it.
"""

import math

import jax
import jax.numpy as jnp

from qalora_jax.kernels import exact
from qalora_jax.kernels import product as product_lib
from qalora_jax.kernels import reference
from qalora_jax.quant import qtensor

# Without it a float32 product is TF32 on GPUs and bfloat16 on TPUs, and the offset's small changes are lost again.
_EXACT = jax.lax.Precision.HIGHEST
# Bytes of a dense matrix at once on CPU: they stay in the cache between dequantization and product, and the allocator
# keeps their pages.  Whole, 4096 x 11008 weights cost 0.2 s of page faults at every use, the product of a row 0.01 s.
_PART = 4 * 2**20
# Outputs in a cache line of a float32 matrix.
_LINE = 16


def worthwhile(product: product_lib.Product, device: product_lib.Device) -> bool:
  """Always: it is what everything else is measured by."""
  return True


def plan(product: product_lib.Product, device: product_lib.Device) -> int | None:
  """How many outputs (transposed: inputs) are dequantized at once: of a large matrix on CPU `_PART` bytes, else all.

  It refuses nothing.  None is all: on other devices, where a mesh divides the arrays, which XLA cannot cut along what
  it has divided, and where parts would cut through groups or words.
  """
  given, made = product.inputs, product.outputs
  unit = _LINE
  if product.transposed:
    given, made, unit = made, given, math.lcm(product.group, qtensor.WORD)
  parts = math.ceil(given * made * jnp.dtype(product.dtype).itemsize / _PART)
  divided = jax.sharding.get_abstract_mesh().size > 1
  if device.platform != 'cpu' or divided or parts == 1 or (product.transposed and made % unit):
    return None
  width = math.ceil(made / parts / unit) * unit
  return width if width < made else None


def forward(x, w: qtensor.QTensor, blocks: int | None = None, *, out_dtype, interpret=False):
  """x [..., I] @ dense(w) -> [..., O] in out_dtype, `blocks` outputs at once (None: all)."""
  x, w = _within_loops(x, w)
  one = lambda part: sums(x, part).astype(out_dtype)
  return one(w) if blocks is None else _in_parts(one, w, blocks, axis=-1)


def transpose(dy, w: qtensor.QTensor, blocks: int | None = None, *, out_dtype, interpret=False):
  """dy [..., O] @ dense(w).T -> [..., I] in out_dtype, `blocks` inputs at once (None: all)."""
  dy, w = _within_loops(dy, w)
  one = lambda part: transposed_sums(dy, part).astype(out_dtype)
  return one(w) if blocks is None else _in_parts(one, w, blocks, axis=-2)


def _in_parts(multiply, w, width, axis):
  """multiply(part) [..., width] of every part of w with `width` entries along `axis`, in one array.

  Where they do not divide the whole, the last part overlaps the one before it: a cut that would pass the end begins
  earlier, and so does the write.
  """
  length = w.shape[axis]
  own = qtensor.alone(w)
  # A few constants belong to scales of many groups: they are expanded before they are cut.
  own = own.replace(scale=qtensor.scales(own))

  def part(index):
    def cut(leaf):
      rows = width * leaf.shape[axis] // length
      return jax.lax.dynamic_slice_in_dim(leaf, index * rows, rows, axis)

    return jax.tree.map(cut, own)

  def write(index, y):
    return jax.lax.dynamic_update_slice_in_dim(y, multiply(part(index)), index * width, axis=-1)

  made = jax.eval_shape(lambda: multiply(part(0)))
  empty = jnp.zeros((*made.shape[:-1], length), made.dtype)
  return jax.lax.fori_loop(0, math.ceil(length / width), write, empty)


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
  pooled = reference.pool(x, w.groups)
  return y + exact.by_offset(pooled.reshape(-1, w.groups), qtensor.offsets(w)).reshape(y.shape)


def transposed_sums(dy, w: qtensor.QTensor) -> jax.Array:
  """dy @ dense(w).T in float32, before it is rounded to dy's dtype."""
  if dy.dtype == jnp.float32:
    return jnp.dot(dy, qtensor.dequantize(w).T, precision=_EXACT)
  dx = jnp.dot(dy, qtensor.scaled(w, dy.dtype).T, preferred_element_type=jnp.float32)
  if w.offset is None:
    return dx
  by_group = exact.dot(dy.reshape(-1, dy.shape[-1]), qtensor.offsets(w).T)
  return dx + jnp.repeat(by_group.reshape(*dy.shape[:-1], w.groups), w.group, axis=-1)
