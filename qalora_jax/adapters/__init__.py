"""Adapters side by side: each kind has `init` and a container with `apply` and `merge`.  Here, what they share."""

import dataclasses

import jax

from qalora_jax.adapters import lora
from qalora_jax.adapters import qalora
from qalora_jax.adapters import several

KINDS = {'lora': lora, 'qalora': qalora}
TYPES = (lora.LoRA, qalora.QALoRA, several.Several)


@dataclasses.dataclass(frozen=True)
class Adapter:
  """The choices of an adapter: its kind, rank R, alpha (the update is scaled by alpha / R), dropout and pool."""

  kind: str
  rank: int
  alpha: float
  dropout: float = 0.0
  pool: str = 'sum'

  def init(self, key, w, axes):
    """A fresh adapter of this kind for the frozen matrix `w`, whose logical axes are `axes`."""
    own = {'pool': self.pool} if self.kind == 'qalora' else {}
    return KINDS[self.kind].init(key, w, axes, rank=self.rank, alpha=self.alpha, dropout=self.dropout, **own)


def is_adapter(node) -> bool:
  """Whether a node of a params tree is an adapter."""
  return isinstance(node, TYPES)


def merge(frozen: dict, params: dict) -> dict:
  """The frozen tree with every adapter of `params` folded into its matrix, and the modules that train as they are.

  model.apply({'frozen': merge(frozen, params)}, x) == model.apply({'frozen': frozen, 'params': params}, x).
  Layers stacked on a leading axis are merged together.  Raises ValueError where an adapter has no frozen matrix.
  """
  merged = dict(frozen)
  for name, node in params.items():
    if name == 'adapter':
      merged['kernel'] = node.merge(frozen['kernel'])
    elif isinstance(node, dict):
      if name not in frozen and not any(map(is_adapter, jax.tree.leaves(node, is_leaf=is_adapter))):
        merged[name] = node
        continue
      if name not in frozen:
        raise ValueError(f'{name} has adapters but no frozen weights; are these params from another model?')
      merged[name] = merge(frozen[name], node)
    else:
      raise ValueError(f'{name} is a trained weight, not an adapter: there is nothing to merge.')
  return merged


def count(params: dict) -> int:
  """The number of trainable numbers in a params tree."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
