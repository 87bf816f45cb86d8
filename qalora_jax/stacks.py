"""Where the stacks of a model's layers grow while its tensors are read one at a time: on the host, or on devices.

Either has

    begin(wholes) -> {path: leaves}                  room for all, from {path: abstract leaves}
    put(path, leaves, at, pieces) -> leaves          with one tensor's pieces at index `at` of the stacks; `...`: they
                                                     are all of it
"""

from collections.abc import Callable
import functools

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax import checksum
from qalora_jax.models import linear


class OnHost:
  """Stacks as numpy arrays."""

  def begin(self, wholes: dict[str, list]) -> dict[str, list]:
    """See above."""
    return {path: [np.empty(leaf.shape, leaf.dtype) for leaf in leaves] for path, leaves in wholes.items()}

  def put(self, path: str, leaves: list, at, pieces: list) -> list:
    """See above."""
    for whole, piece in zip(leaves, pieces, strict=True):
      whole[at] = piece
    return leaves


class OnDevices:
  """Stacks as arrays of the shardings `at`, a tree like the one that grows; nothing is ever whole on the host.

  Where devices belong to several processes, each of these reads every tensor and keeps its own devices' part.
  """

  def __init__(self, at: dict):
    self._at = {path: jax.tree.leaves(leaf) for path, leaf in traverse_util.flatten_dict(at, sep='/').items()}
    self._sums: dict[str, list[checksum.Checksum]] = {}
    self._wholes: dict[str, list] = {}

  def begin(self, wholes: dict[str, list]) -> dict[str, list]:
    """See above."""
    self._wholes = wholes
    self._sums = {path: [checksum.Checksum()] * len(leaves) for path, leaves in wholes.items()}
    stacked = {path: leaves for path, leaves in wholes.items() if linear.stack_of(path.partition('/')[0])}
    own = {path: self._at[path] for path in stacked}
    zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), stacked)
    # What stands outside the stacks arrives whole.
    return {path: [] for path in wholes} | jax.jit(zeros, out_shardings=own)()

  def put(self, path: str, leaves: list, at, pieces: list) -> list:
    """See above; what comes from a device goes through the host.  It returns when the pieces are where they belong."""
    wholes, shardings = self._wholes[path], self._at[path]
    pieces = [np.asarray(piece) for piece in pieces]
    parts = zip(pieces, wholes, strict=True)
    self._sums[path] = [before + checksum.of(*part) for before, part in zip(self._sums[path], parts, strict=True)]
    if at is ...:
      placed = zip(pieces, wholes, shardings, strict=True)
      return jax.block_until_ready([_divided(piece, whole.dtype, where) for piece, whole, where in placed])
    own = [jax.sharding.NamedSharding(s.mesh, jax.sharding.PartitionSpec(*s.spec[1:])) for s in shardings]
    placed = zip(pieces, wholes, own, strict=True)
    placed = [_divided(piece, whole.dtype, where) for piece, whole, where in placed]
    return jax.block_until_ready(_putting(tuple(shardings))(leaves, placed, np.int32(at)))

  def checksum(self) -> checksum.Checksum:
    """That of the whole tree, leaf after leaf in its order, as `checksum.of_tree` takes it."""
    return checksum.total(traverse_util.unflatten_dict(self._sums, sep='/'))


Place = OnHost | OnDevices


def _divided(piece: np.ndarray, dtype, sharding: jax.sharding.NamedSharding) -> jax.Array:
  """`piece` in `dtype` on this process's devices of `sharding`, each part converted by itself, once."""
  parts = {}

  def part(index):
    key = tuple((cut.start, cut.stop) for cut in index)
    if key not in parts:
      parts[key] = np.asarray(piece[index], dtype, order='C')
    return parts[key]

  return jax.make_array_from_callback(piece.shape, sharding, part)


@functools.cache
def _putting(shardings: tuple[jax.sharding.NamedSharding, ...]) -> Callable:
  """put(stacks, pieces, at) -> the stacks with their pieces at index `at`, in their own memory."""

  def put(stacks: list, pieces: list, at) -> list:
    return [stack.at[at].set(piece) for stack, piece in zip(stacks, pieces, strict=True)]

  return jax.jit(put, donate_argnums=0, out_shardings=list(shardings))
