"""The specification: what every other path must compute, written to be read."""

import jax
import jax.numpy as jnp

from qalora_jax.quant import qtensor


def qmatmul(x, w: qtensor.QTensor) -> jax.Array:
  """x [..., I] @ dequantize(w) [I, O] in float32, in x's dtype at the end."""
  dense = qtensor.dequantize(w)
  return jnp.dot(x.astype(jnp.float32), dense, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)


def pool(x, groups: int) -> jax.Array:
  """Sums x [..., I] over each of `groups` runs of consecutive inputs, in float32 (QA-LoRA, App. B, Eq. 3)."""
  return x.astype(jnp.float32).reshape(*x.shape[:-1], groups, x.shape[-1] // groups).sum(-1)
