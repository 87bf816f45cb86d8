"""LoRA (Hu et al., 2021): a low-rank update beside a frozen matrix, dense or quantized.

I inputs, O outputs, R rank.
"""

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from qalora_jax.kernels import qmatmul
from qalora_jax.quant import qtensor


class LoRA(struct.PyTreeNode):
  """y = x @ w + s * (dropout(x) @ A) @ B    A [I, R]   B [R, O]   s = alpha / R."""

  a: jax.Array
  b: jax.Array
  alpha: float = struct.field(pytree_node=False)
  dropout: float = struct.field(pytree_node=False, default=0.0)

  @property
  def scaling(self) -> float:
    """s = alpha / rank."""
    return self.alpha / self.a.shape[-1]

  def apply(self, x, w, rng=None) -> jax.Array:
    """x [..., I] -> [..., O]; dropout acts only where `rng` is given."""
    dropped = drop(x, self.dropout, rng)
    # The update is summed in float32: its early values are below the step of a bfloat16 product.
    down = jnp.dot(dropped, self.a.astype(x.dtype), preferred_element_type=jnp.float32)
    update = self.scaling * jnp.dot(down, self.b, precision=jax.lax.Precision.HIGHEST)
    return (qmatmul.qmatmul(x, w).astype(jnp.float32) + update).astype(x.dtype)

  def merge(self, w) -> jax.Array:
    """w + s * A @ B, dense: for every x, x @ merge(w) == apply(x, w).

    In float32 whatever w is stored in: bfloat16 would round small updates away.  A quantized matrix becomes dense: LoRA
    changes weights within a group, which codes and offsets cannot follow.
    """
    dense = qtensor.dequantize(w) if isinstance(w, qtensor.QTensor) else w
    update = self.scaling * jnp.matmul(self.a, self.b, precision=jax.lax.Precision.HIGHEST)
    return dense.astype(jnp.float32) + update


def init(key, w, axes, *, rank: int, alpha: float, dropout: float) -> LoRA:
  """A fresh adapter for `w` [I, O]: A Xavier-uniform, B zero (as the released QA-LoRA code), so it changes nothing."""
  inputs, outputs = w.shape[-2:]
  named = nn.with_logical_partitioning
  return LoRA(
    a=named(nn.initializers.xavier_uniform(), (axes[0], 'rank'))(key, (inputs, rank)),
    b=named(nn.initializers.zeros, ('rank', axes[1]))(key, (rank, outputs)),
    alpha=alpha,
    dropout=dropout,
  )


def drop(x, rate: float, rng) -> jax.Array:
  """Zeroes entries of x with probability `rate` and scales the rest by 1 / (1 - rate); x itself without `rng`."""
  if rng is None or rate == 0.0:
    return x
  return jnp.where(jax.random.bernoulli(rng, 1.0 - rate, x.shape), x / (1.0 - rate), 0).astype(x.dtype)
