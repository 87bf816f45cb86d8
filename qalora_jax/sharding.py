"""The mesh, the one table from logical to mesh axes, and `place`."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import math

from flax import linen as nn
from flax.core import meta
import jax
import numpy as np

from qalora_jax.models import linear

# The kind of the host's memory that devices reach.
HOST = 'pinned_host'
AXES = ('data', 'fsdp', 'tensor')

# Rows are split over data and fsdp; weights over fsdp along the model's width and over tensor along heads, mlp and
# vocabulary.
RULES = {
  linear.ROWS: ('data', 'fsdp'),
  'embed': 'fsdp',
  'heads': 'tensor',
  'mlp': 'tensor',
  'vocab': 'tensor',
  'norm': None,
  'rank': None,
  'buckets': None,
  'layers': None,
}
_NAMED_AT_MOST = 8
BATCH = jax.sharding.PartitionSpec(RULES[linear.ROWS])


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> jax.sharding.Mesh:
  """A mesh of axes data, fsdp, tensor over `devices` (default: all); one size may be -1, whatever is left.

  Raises ValueError where the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp, tensor]
  known = math.prod(s for s in sizes if s != -1)
  if sizes.count(-1) > 1 or len(devices) % known or (-1 not in sizes and known != len(devices)):
    wanted = ', '.join(f'{axis}={size}' for axis, size in zip(AXES, sizes, strict=True))
    raise ValueError(
      f'sharding {wanted} does not fit {len(devices)} devices: the sizes must multiply to {len(devices)}, '
      'and one of them may be -1.'
    )
  sizes = [len(devices) // known if s == -1 else s for s in sizes]
  # Explicit axis types, jax.make_mesh's default, refuse the logical-axes recipe.
  auto = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.sharding.Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=auto)


def place(abstract, mesh: jax.sharding.Mesh, fallback: str = 'error'):
  """The NamedSharding of every leaf of an abstract tree of boxed (logically named) and plain leaves.

  Codes, scales and offsets of a quantized matrix share one spec, so a group never straddles devices; what has fewer
  axes than the matrix (the constants of doubly quantized scales) is held whole everywhere.  A dimension
  that its mesh axis does not divide is held whole on every device with fallback='replicate'; else one ValueError names
  all such weights and the sizes that would divide them.  Plain leaves are replicated.
  """
  boxed, misfits = lambda node: isinstance(node, meta.AxisMetadata), []

  def leaf(path, node):
    if not boxed(node):
      return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    name = '/'.join(str(getattr(key, 'key', getattr(key, 'name', key))) for key in path)
    spec, found = _spec(name, node, mesh)
    misfits.extend(found)
    whole = jax.sharding.PartitionSpec()
    return jax.tree.map(
      lambda part: jax.sharding.NamedSharding(mesh, spec if part.ndim == len(spec) else whole), node.value
    )

  placed = jax.tree_util.tree_map_with_path(leaf, abstract, is_leaf=boxed)
  if misfits and fallback != 'replicate':
    _refuse(misfits)
  return placed


def on_host(shardings):
  """`shardings`, a tree of them, with every leaf in the host's memory that its device reads and writes by itself."""
  return jax.tree.map(lambda at: at.with_memory_kind(HOST), shardings)


def check_host_memory(mesh: jax.sharding.Mesh, keys: Sequence[str]) -> None:
  """ValueError that names the settings `keys`, if any, where the mesh's devices reach no memory of the host."""
  device = mesh.local_devices[0]
  if keys and HOST not in {memory.kind for memory in device.addressable_memories()}:
    raise ValueError(
      f'{" and ".join(keys)}: {device.device_kind} does not reach the memory of its host ({HOST!r}) through this JAX; '
      'set model.remat = "full" and optim.offload = False.'
    )


def over(mesh: jax.sharding.Mesh | None, function: Callable) -> Callable:
  """`function`, traced for `mesh`: its products with quantized matrices run on that mesh's devices, divided by RULES.

  To be given to jit, beneath it: XLA divides everything else by itself, but what kernels compute it cannot.
  None: nobody knows where, and `function` as it is: XLA makes its products.
  """
  if mesh is None:
    return function

  @functools.wraps(function)
  def traced(*args, **kwargs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(tuple(RULES.items())):
      return function(*args, **kwargs)

  return traced


def mesh_of(tree) -> jax.sharding.Mesh | None:
  """The mesh over which a tree of arrays lies, that of a single device too; None where there is no array in it."""
  leaf = next((leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)), None)
  if leaf is None:
    return None
  if isinstance(leaf.sharding, jax.sharding.NamedSharding):
    return leaf.sharding.mesh
  return make_mesh(devices=sorted(leaf.sharding.device_set, key=lambda device: device.id)[:1])


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Held whole on every device."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def batch(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Rows split over data and fsdp."""
  return jax.sharding.NamedSharding(mesh, BATCH)


def check_rows(rows: int, accumulation: int, mesh: jax.sharding.Mesh) -> None:
  """ValueError unless every micro-batch divides over the devices that share the rows."""
  shares = mesh.shape['data'] * mesh.shape['fsdp']
  if (rows // accumulation) % shares:
    raise ValueError(
      f'train.batch = {rows} in train.accumulation = {accumulation} parts is {rows // accumulation} rows, which do '
      f'not divide over data x fsdp = {shares} devices; use a multiple of {accumulation * shares} rows, or a smaller '
      'train.accumulation.'
    )


@dataclasses.dataclass(frozen=True)
class _Misfit:
  """A dimension that its mesh axis does not divide; `fits` are the sizes of that axis that would."""

  text: str
  axis: str
  fits: tuple[int, ...]


def _spec(name: str, box: nn.LogicallyPartitioned, mesh) -> tuple[jax.sharding.PartitionSpec, list[_Misfit]]:
  """Where a leaf belongs, and the dimensions that are held whole because they do not divide."""
  axes, misfits = [RULES[axis] for axis in box.names], []
  for d, axis in enumerate(axes):
    if axis is None:
      continue
    sizes = [leaf.shape[d] for leaf in jax.tree.leaves(box.value) if leaf.ndim == len(axes)]
    shared = math.gcd(*sizes)
    if shared % mesh.shape[axis]:
      fits = tuple(n for n in range(1, shared + 1) if shared % n == 0)
      text = (
        f'{name}: its axis {box.names[d]!r} has {min(sizes)} parts, which do not divide over '
        f'sharding.{axis} = {mesh.shape[axis]}; use one of {list(fits)}'
      )
      misfits.append(_Misfit(text, axis, fits))
      axes[d] = None
  return jax.sharding.PartitionSpec(*axes), misfits


def _refuse(misfits: list[_Misfit]) -> None:
  """One ValueError for all, with the sizes of every mesh axis that would suit them all."""
  if len(misfits) == 1:
    raise ValueError(f'{misfits[0].text}, or sharding.fallback = "replicate".')
  lines = [misfit.text for misfit in misfits[:_NAMED_AT_MOST]]
  if len(misfits) > len(lines):
    lines.append(f'and {len(misfits) - len(lines)} more')
  common = []
  for axis in dict.fromkeys(misfit.axis for misfit in misfits):
    fits = [set(misfit.fits) for misfit in misfits if misfit.axis == axis]
    common.append(f'sharding.{axis} out of {sorted(set.intersection(*fits))}')
  raise ValueError(
    'the mesh does not divide the weights:\n  '
    + '\n  '.join(lines)
    + f'\nuse {" and ".join(common)}, which suits all, or sharding.fallback = "replicate".'
  )
