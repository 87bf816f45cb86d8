"""Going through an axis piece by piece, so that what is made of a piece fits in a bounded number of bytes.

How much of an array a device holds follows from the mesh and the logical rules in context (`sharding.over`); without
them a device holds all of it.

B rows, T entries of the axis, N pieces, P entries of a piece.
"""

import math

from flax import linen as nn
import jax
import jax.numpy as jnp


def local(axis: str, size: int) -> int:
  """The entries of a logical axis of `size` entries that one device holds."""
  mesh = jax.sharding.get_abstract_mesh()
  over = dict(nn.get_logical_axis_rules()).get(axis) or ()
  over = (over,) if isinstance(over, str) else over
  parts = math.prod(mesh.shape[name] for name in over if name in mesh.shape and name not in mesh.manual_axes)
  return size // parts if size % parts == 0 else size


def length(size: int, bytes_of_one: int, limit: int) -> int:
  """P: the fewest pieces of equal length, of at most `limit` bytes each (or of one entry); the last may be shorter."""
  most = max(1, limit // bytes_of_one)
  return math.ceil(size / math.ceil(size / most))


def cut(x_BT, size: int):
  """[B, T, ...] -> [N, B, P, ...], zeros at the end: rows sharded over devices stay where they are."""
  rows, count = x_BT.shape[:2]
  number = math.ceil(count / size)
  x_BT = jnp.pad(x_BT, [(0, 0), (0, number * size - count)] + [(0, 0)] * (x_BT.ndim - 2))
  return x_BT.reshape(rows, number, size, *x_BT.shape[2:]).swapaxes(0, 1)


def joined(x_NBP, count: int):
  """[N, B, P, ...] -> [B, T, ...], T = `count`; the inverse of `cut`."""
  number, rows, size = x_NBP.shape[:3]
  return x_NBP.swapaxes(0, 1).reshape(rows, number * size, *x_NBP.shape[3:])[:, :count]
