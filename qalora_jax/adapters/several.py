"""Several adapters on one base: side by side in a batch, or added up.

B rows of a batch, T time, K adapters, I inputs, L groups, R rank, O outputs.
"""

from collections.abc import Sequence

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax.adapters import lora
from qalora_jax.adapters import qalora
from qalora_jax.kernels import qmatmul
from qalora_jax.kernels import reference

_KINDS = {lora.LoRA: 'lora', qalora.QALoRA: 'qalora'}


class Several(struct.PyTreeNode):
  """y[n] = x[n] @ w + (x[n] @ A[k]) @ B[k] for every row n and its k = rows[n]; pool(x[n]) for QA-LoRA.

  A [K, I, R] (QA-LoRA: [K, L, R]), B [K, R, O] with the adapter's scaling in it, rows [B] int32.  k = 0 is no adapter.
  """

  a: jax.Array
  b: jax.Array
  rows: jax.Array
  kind: str = struct.field(pytree_node=False)

  def apply(self, x, w, rng=None) -> jax.Array:
    """x [B, T, I] -> [B, T, O].  It is not trained: there is no dropout."""
    a, b = self.a[self.rows], self.b[self.rows]
    inputs = reference.pool(x, w.groups) if self.kind == 'qalora' else x.astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    update = jnp.einsum('bti,bir->btr', inputs, a, precision=exact)
    update = jnp.einsum('btr,bro->bto', update, b, precision=exact)
    return (qmatmul.qmatmul(x, w).astype(jnp.float32) + update).astype(x.dtype)

  def merge(self, w):
    """Raises ValueError: rows of a batch use different adapters, and a model has one."""
    raise ValueError('several adapters that rows choose from cannot be merged; add them up with weights instead.')


def stack(trees: Sequence[dict], frozen: dict) -> dict:
  """One tree of `Several` from the params of K adapters; row 0 of each is no adapter, row k the k-th tree.

  Smaller ranks are filled up with zeros.  Raises ValueError for adapters of several kinds, and for trees of other
  layers.
  """
  return _together(trees, frozen, _stacked)


def add(trees: Sequence[dict], weights: Sequence[float], frozen: dict) -> dict:
  """The params of one adapter that is sum_k weights[k] * adapter k, exactly: ranks stand side by side.

      [A_1 A_2 ...] @ [w_1 s_1 B_1; w_2 s_2 B_2; ...] = sum_k w_k s_k A_k @ B_k

  Raises ValueError as `stack`.
  """
  return _together(trees, frozen, lambda nodes, kernel: _added(nodes, weights, kernel))


def factors(params: dict, frozen: dict) -> list[tuple[jax.Array, jax.Array]]:
  """(A, scaling * B) of every adapter of `params`, in the tree's order."""
  found = []
  for name in sorted(params):
    if name == 'adapter':
      found.append((params[name].a, _scaled(params[name], frozen['kernel'])))
    else:
      found += factors(params[name], frozen[name])
  return found


def choose(params: dict, rows: Sequence[int]) -> dict:
  """`params` of `stack` with the adapter that every row of a batch uses."""
  is_leaf = lambda node: isinstance(node, Several)
  wanted = jnp.asarray(rows, jnp.int32)
  place = lambda node: node.replace(rows=jnp.broadcast_to(wanted, (*node.a.shape[:-3], len(rows))))
  return jax.tree.map(place, params, is_leaf=is_leaf)


def repeated(params: dict, times: int) -> dict:
  """`params` for a batch in which every row stands `times` times, one after the other."""
  is_leaf = lambda node: isinstance(node, Several)
  more = lambda node: node.replace(rows=jnp.repeat(node.rows, times, axis=-1)) if is_leaf(node) else node
  return jax.tree.map(more, params, is_leaf=is_leaf)


def _together(trees: Sequence[dict], frozen: dict, join) -> dict:
  """join([node of every tree, or None], kernel) wherever a tree has an adapter."""
  joined = {}
  names = dict.fromkeys(name for tree in trees if tree for name in tree)
  for name in names:
    own = [tree.get(name) if tree else None for tree in trees]
    if name == 'adapter':
      joined[name] = join(own, frozen['kernel'])
      continue
    if name not in frozen:
      raise ValueError(
        f'{name} has adapters but no frozen weights: adapters that are used together stand beside the same layers '
        '(adapter.targets that pick out layers differ).'
      )
    joined[name] = _together(own, frozen[name], join)
  return joined


def _scaled(node, kernel) -> np.ndarray:
  """B with the adapter's scaling in it."""
  return node.b * (node.scaling(kernel.group) if isinstance(node, qalora.QALoRA) else node.scaling)


def _kind(nodes) -> str:
  kinds = {_KINDS[type(node)] for node in nodes if node is not None}
  if len(kinds) > 1:
    raise ValueError('LoRA and QA-LoRA adapters cannot be used together: QA-LoRA merges, LoRA does not.')
  return kinds.pop()


def _stacked(nodes, kernel) -> Several:
  kind, rank = _kind(nodes), max(node.a.shape[-1] for node in nodes if node is not None)
  first = next(node for node in nodes if node is not None)
  none = (jnp.zeros((*first.a.shape[:-1], rank)), jnp.zeros((*first.b.shape[:-2], rank, first.b.shape[-1])))

  def parts(node):
    if node is None:
      return none
    grow = rank - node.a.shape[-1]
    pad = lambda leaf, axis: jnp.pad(leaf, [(0, grow if at == axis % leaf.ndim else 0) for at in range(leaf.ndim)])
    return pad(node.a, -1), pad(_scaled(node, kernel), -2)

  a, b = (jnp.stack(every, axis=-3) for every in zip(none, *map(parts, nodes), strict=True))
  return Several(a, b, jnp.zeros((*a.shape[:-3], 1), jnp.int32), kind=kind)


def _added(nodes, weights, kernel):
  _kind(nodes)
  found = [(node, weight) for node, weight in zip(nodes, weights, strict=True) if node is not None]
  a = jnp.concatenate([node.a for node, _ in found], axis=-1)
  b = jnp.concatenate([weight * _scaled(node, kernel) for node, weight in found], axis=-2)
  # With alpha = rank the scaling is 1: it stands in B.
  changes = {'a': a, 'b': b, 'alpha': float(a.shape[-1]), 'dropout': 0.0}
  return found[0][0].replace(**changes, **({'pool': 'sum'} if isinstance(found[0][0], qalora.QALoRA) else {}))
