"""float32 numbers as sums of bfloat16 ones, which matrix units multiply many times as fast."""

import jax
import jax.numpy as jnp

from qalora_jax.kernels import product as product_lib

_EXACT = jax.lax.Precision.HIGHEST


def pieces(value, count: int) -> list[jax.Array]:
  """float32 as a sum of `count` bfloat16, each 8 bits of what the ones before it leave: three are exact.

  Rounded in the bits: XLA takes a conversion to bfloat16 and back for nothing and would leave the others 0.  Of an
  infinity the sum is NaN.
  """
  found = []
  for _ in range(count):
    bits = jax.lax.bitcast_convert_type(value, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + jnp.uint32(2**15)) & jnp.uint32(0xFFFF0000), jnp.float32)
    found.append(rounded.astype(jnp.bfloat16))
    value = value - rounded
  return found


def dot(a, b) -> jax.Array:
  """a [M, K] @ b [K, N] with float32's accuracy, in float32.

  A bfloat16 operand and a float32 one are, off CPU, one bfloat16 product with three pieces: a float32 product takes a
  TPU twice as long, and a GPU's float32 units some four times.  The pieces lie beside each other along an axis of their
  own, and what they make is added: along K the bfloat16 operand would be held three times.
  """
  narrow = [operand.dtype == jnp.bfloat16 for operand in (a, b)]
  if sum(narrow) != 1 or product_lib.device().platform == 'cpu':
    return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision=_EXACT)
  beside = lambda operand: jnp.stack(pieces(operand.astype(jnp.float32), 3))
  multiply = lambda axes, *operands: jnp.einsum(axes, *operands, preferred_element_type=jnp.float32).sum(0)
  return multiply('pmk,kn->pmn', beside(a), b) if narrow[1] else multiply('mk,pkn->pmn', a, beside(b))


def by_offset(pooled, offset) -> jax.Array:
  """pool(x) [M, L] @ offset [L, O] in float32, to 2^-15 of |pooled| @ |offset|, for an x in bfloat16."""
  if product_lib.device().platform == 'cpu':
    return jnp.dot(pooled, offset, precision=_EXACT)
  return jnp.dot(of_pooled(pooled), of_offset(offset), preferred_element_type=jnp.float32)


def of_pooled(pooled) -> jax.Array:
  """The left factor [M, 4 L] of `of_offset`."""
  first, second = pieces(pooled, 2)
  return jnp.concatenate([first, first, first, second], axis=1)


def of_offset(offset) -> jax.Array:
  """[4 L, O], with which matrix units multiply float32 pooled @ offset in bfloat16.

  (p0 + p1) @ (b0 + b1 + b2) without p1 @ (b1 + b2): to 2^-15 of |pooled| @ |offset|, and to 2^-8 of itself for any
  change of an offset however small, since p0 meets every bit of it.  Of the six passes of a float32 product it is four.
  """
  first, second, third = pieces(offset, 3)
  return jnp.concatenate([first, second, third, first])
