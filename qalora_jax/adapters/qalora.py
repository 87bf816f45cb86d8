"""QA-LoRA (Xu et al., 2023): a low-rank update of the offsets of a quantized matrix.

I inputs, O outputs, G group size, L groups (I // G), R rank.
"""

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from qalora_jax.adapters import lora
from qalora_jax.kernels import qmatmul
from qalora_jax.kernels import reference
from qalora_jax.quant import qtensor

POOLS = ('sum', 'mean')


class QALoRA(struct.PyTreeNode):
  """y = x @ dense(q) + s * (pool(x) @ A) @ B    A [L, R]   B [R, O]   s = alpha / R.

  `pool` sums (the paper's Algorithm 1) or averages (the released code) each group of inputs.  An average is a
  sum with s / G: with it alpha and the learning rate mean something else by a factor of G, so the convention is
  stored with the adapter.
  """

  a: jax.Array
  b: jax.Array
  alpha: float = struct.field(pytree_node=False)
  dropout: float = struct.field(pytree_node=False, default=0.0)
  pool: str = struct.field(pytree_node=False, default='sum')

  def scaling(self, group: int) -> float:
    """s, with the mean's 1 / G folded in: the update of the offsets is scaling * A @ B."""
    s = self.alpha / self.a.shape[-1]
    return s / group if self.pool == 'mean' else s

  def apply(self, x, q: qtensor.QTensor, rng=None) -> jax.Array:
    """x [..., I] -> [..., O].  Without dropout this is the merged forward itself: qmatmul(x, merge(q))."""
    if rng is None or self.dropout == 0.0:
      return qmatmul.qmatmul(x, self.merge(q))
    # Dropout acts on the pooled inputs, as in the released code; only this needs the unfolded form.
    pooled = lora.drop(reference.pool(x, q.groups), self.dropout, rng)
    update = self.scaling(q.group) * (pooled @ self.a @ self.b)
    return (qmatmul.qmatmul(x, q).astype(jnp.float32) + update).astype(x.dtype)

  def merge(self, q: qtensor.QTensor) -> qtensor.QTensor:
    """q with offset + s * A @ B (Xu et al., 2023, App. B, in weight units).

    For every x, x @ dense(merge(q)) == x @ dense(q) + s * pool(x) @ A @ B.  Codes and scales are the same arrays,
    so the result is as small as q; only a q without offsets (symmetric, NF4) is given some.  They are float32.
    """
    update = jnp.matmul(self.a, self.b, precision=jax.lax.Precision.HIGHEST)
    return q.replace(offset=qtensor.offsets(q) + self.scaling(q.group) * update)


def init(key, q, axes, *, rank: int, alpha: float, dropout: float, pool: str = 'sum') -> QALoRA:
  """A fresh adapter for `q`: A Xavier-uniform, B zero (as the released code), so it changes nothing.

  Raises ValueError for a dense matrix, which has no offsets to update, and for an unknown pool.
  """
  if not isinstance(q, qtensor.QTensor):
    raise ValueError(
      'qalora needs quantized weights: set base.method = "affine" (or a quantized model.source), '
      'keep adapter.targets within base.targets, or use adapter.kind = "lora".'
    )
  if pool not in POOLS:
    raise ValueError(f'adapter.pool = {pool!r}; it is one of {POOLS}.')
  named = nn.with_logical_partitioning
  return QALoRA(
    a=named(nn.initializers.xavier_uniform(), (axes[0], 'rank'))(key, (q.groups, rank)),
    b=named(nn.initializers.zeros, ('rank', axes[1]))(key, (rank, q.shape[-1])),
    alpha=alpha,
    dropout=dropout,
    pool=pool,
  )
