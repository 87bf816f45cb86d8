"""A product divided over the mesh in context: every device runs the kernel on its own part, inside shard_map."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from qalora_jax.kernels import exact
from qalora_jax.kernels import product as product_lib
from qalora_jax.quant import double
from qalora_jax.quant import qtensor

_P = jax.sharding.PartitionSpec


@dataclasses.dataclass(frozen=True)
class Division:
  """The mesh axes that divide rows, inputs and outputs of a product, each with the number of its parts."""

  rows: tuple[str, ...] = ()
  inputs: str | None = None
  outputs: str | None = None
  parts: tuple[int, int, int] = (1, 1, 1)

  def local(self, product: product_lib.Product) -> product_lib.Product:
    """One device's part of `product`."""
    rows, inputs, outputs = self.parts
    sizes = {'rows': product.rows // rows, 'inputs': product.inputs // inputs, 'outputs': product.outputs // outputs}
    return dataclasses.replace(product, **sizes)


def divide(x, w: qtensor.QTensor) -> Division | None:
  """How w.split divides x [B, ..., I] @ w (or dy [B, ..., O] @ w.T) over the mesh in context; None if nobody said how.

  Weights that lie over an axis of the rows (FSDP) are gathered, packed.  So is a dimension that its axis does not
  divide into whole groups and whole words.  Axes that a shard_map around this has taken already are left alone.
  """
  sizes = _free()
  if not sizes:
    # Without a mesh in context arrays may still lie over several devices.
    return Division() if jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty else None
  if w.split is None or _explicit(sizes):
    return None
  rows = tuple(axis for axis in w.split.rows if axis in sizes)
  if x.ndim < 2 or x.shape[0] % math.prod(sizes[axis] for axis in rows):
    rows = ()
  width = math.gcd(*qtensor.PLANES[w.bits])
  whole = lambda parts: w.groups % parts == 0 and (w.shape[-2] // parts) * width % qtensor.WORD == 0
  divides = lambda axis: axis in sizes and axis not in w.split.rows
  inputs = w.split.inputs if divides(w.split.inputs) and whole(sizes[w.split.inputs]) else None
  outputs = w.split.outputs if divides(w.split.outputs) and w.shape[-1] % sizes[w.split.outputs] == 0 else None
  parts = math.prod(sizes[axis] for axis in rows), sizes.get(inputs, 1), sizes.get(outputs, 1)
  return Division(rows, inputs, outputs, parts)


def run(multiply, x, w: qtensor.QTensor, division: Division, transposed: bool) -> jax.Array:
  """multiply(x, w, out_dtype) on every device's part, in x's dtype; partial sums are added in float32."""
  sizes = _free()
  if not sizes:
    return multiply(x, w, x.dtype)
  if _explicit(sizes):
    raise product_lib.Refused(
      f'kernels divide products over mesh axes of type Auto, and {sorted(_explicit(sizes))} are Explicit; '
      "make the mesh by `sharding.make_mesh`, or take impl='xla'."
    )
  if isinstance(w.scale, double.Doubled):
    # A few constants belong to scales of many groups: they are expanded before they are divided.
    own = qtensor.alone(w)
    w = own.replace(scale=qtensor.scales(own))
  held = {w.split.inputs, w.split.outputs} & set(sizes) if w.split is not None else set()
  if held - {division.inputs, division.outputs}:
    # What lies over an axis that does not divide the product is gathered: this layer of a stack, not all of it.
    w = qtensor.alone(w)
  given, made = division.inputs, division.outputs
  if transposed:
    given, made = made, given

  def local(x, w):
    if given is None:
      return multiply(x, w, x.dtype)
    return jax.lax.psum(multiply(x, w, jnp.float32), given).astype(x.dtype)

  mesh = jax.sharding.get_abstract_mesh()
  rows = (division.rows or None, *(None,) * (x.ndim - 2)) if x.ndim > 1 else ()
  w = w.replace(split=None)
  return jax.shard_map(
    local,
    in_specs=(_P(*rows, given), _specs(w, division)),
    out_specs=_P(*rows, made),
    axis_names={axis for axis in mesh.axis_names if axis not in mesh.manual_axes},
    check_vma=False,
  )(x, w)


def guide(multiply, x, w: qtensor.QTensor, division: Division, transposed: bool) -> jax.Array:
  """multiply(x, w) by XLA, which is told to divide it as `run` would.

  Left to itself it may shard activations by the axis that divides weights for storage alone (FSDP) and add up partial
  products, or gather dequantized weights: here what is gathered is packed, and of this layer of a stack alone.
  """
  sizes = _free()
  if not sizes or w.split is None or _explicit(sizes):
    return multiply(x, w)
  given, made = division.inputs, division.outputs
  if transposed:
    given, made = made, given
  between = (None,) * (x.ndim - 2)
  # Rows that their axes do not divide lie as XLA likes.
  rows = (division.rows or _P.UNCONSTRAINED, *between) if x.ndim > 1 else ()
  own = qtensor.alone(w.replace(split=None))
  own = jax.tree.map(jax.lax.with_sharding_constraint, own, _specs(own, division))
  y = multiply(jax.lax.with_sharding_constraint(x, _P(*rows, given)), own)
  return jax.lax.with_sharding_constraint(y, _P(*rows, made))


def lay(x, rows: tuple[str, ...], features: str | None = None) -> jax.Array:
  """x [B, ..., F], an activation, its B laid over the axes `rows` of the mesh in context and its F over `features`.

  As it is where there is no such mesh, or where an axis does not divide.
  """
  sizes = _free()
  rows = tuple(axis for axis in rows if axis in sizes)
  features = features if features in sizes else None
  divides = x.shape[0] % math.prod(sizes[axis] for axis in rows) == 0 and x.shape[-1] % sizes.get(features, 1) == 0
  if not sizes or _explicit(sizes) or not divides:
    return x
  return jax.lax.with_sharding_constraint(x, _P(rows or None, *(None,) * (x.ndim - 2), features))


def offset_gradient(pooled, dy, w: qtensor.QTensor) -> jax.Array:
  """pool(x).T @ dy [L, O] in float32 from pool(x) [B, ..., L] and dy [B, ..., O]: that of w's offsets.

  Every device multiplies its own rows, and those that share w add up.  Left to itself XLA may send the rows around.
  """

  def local(pooled, dy):
    rows = dy.reshape(-1, dy.shape[-1])
    return exact.dot(pooled.reshape(len(rows), -1).T, rows)

  sizes, division = _free(), divide(dy, w)
  if not sizes or division is None or _explicit(sizes):
    return local(pooled, dy)
  mesh = jax.sharding.get_abstract_mesh()
  rows = (division.rows or None, *(None,) * (dy.ndim - 2)) if dy.ndim > 1 else ()
  return jax.shard_map(
    lambda pooled, dy: jax.lax.psum(local(pooled, dy), division.rows),
    in_specs=(_P(*rows, division.inputs), _P(*rows, division.outputs)),
    out_specs=_P(division.inputs, division.outputs),
    axis_names={axis for axis in mesh.axis_names if axis not in mesh.manual_axes},
    check_vma=False,
  )(pooled, dy)


def _explicit(axes) -> set[str]:
  """Those of `axes` whose sharding is part of types."""
  mesh = jax.sharding.get_abstract_mesh()
  explicit = jax.sharding.AxisType.Explicit
  return {
    axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if axis in axes and kind == explicit
  }


def _free() -> dict[str, int]:
  """The axes of the mesh in context over which a product can be divided, and their sizes."""
  mesh = jax.sharding.get_abstract_mesh()
  return {axis: size for axis, size in mesh.shape.items() if size > 1 and axis not in mesh.manual_axes}


def _specs(w: qtensor.QTensor, division: Division) -> qtensor.QTensor:
  """The PartitionSpec of every leaf of w: matrices by inputs and outputs; layers, indices and constants whole."""
  matrix = (division.inputs, division.outputs)
  return jax.tree.map(lambda leaf: _P(*(None,) * (leaf.ndim - 2), *matrix) if leaf.ndim > 1 else _P(), w)
