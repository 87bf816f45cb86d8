"""Quantizers: from a dense matrix to a `QTensor` and back.  Knows no model and no adapter."""

import jax

from qalora_jax.quant import latent
from qalora_jax.quant import qtensor


def is_quantized(node) -> bool:
  """Whether a node of a tree is a quantized matrix."""
  return isinstance(node, qtensor.QTensor)


def is_matrix(node) -> bool:
  """Whether a node of a tree is a matrix in a container of its own: quantized, or trained to be."""
  return isinstance(node, qtensor.QTensor | latent.Latent)


def settle(tree):
  """The tree with every matrix that trained to be rounded (QAT) in the codes that it was used in."""
  is_latent = lambda node: isinstance(node, latent.Latent)
  return jax.tree.map(lambda node: node.quantize() if is_latent(node) else node, tree, is_leaf=is_latent)


def matrices(tree) -> list[qtensor.QTensor]:
  """Every quantized matrix of a tree."""
  return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_quantized) if is_quantized(leaf)]


def effective_bits(tree) -> float | None:
  """Stored bits per weight over the quantized matrices of a tree, scales and offsets included; None without any."""
  found = matrices(tree)
  weights = sum(q.size for q in found)
  return sum(qtensor.bits_per_weight(q) * q.size for q in found) / weights if found else None


def stored_bytes(tree) -> int:
  """Bytes of every array of a tree."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def summary(tree) -> str:
  """One line: how many weights are frozen, in how many bits each, in how many bytes."""
  total = f'{stored_bytes(tree):,} bytes of frozen weights'
  found = matrices(tree)
  if not found:
    return f'{total}, all dense'
  return f'{total}, {sum(q.size for q in found):,} weights of them in {effective_bits(tree):.3f} bits each'
