"""A product divided over the mesh in context: every device runs the kernel on its own part, inside shard_map."""

import dataclasses
import math

import jax
import jax.numpy as jnp

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


def divide(x, w: qtensor.QTensor) -> Division:
  """How w.split divides x [B, ..., I] @ w (or dy [B, ..., O] @ w.T) over the mesh in context.

  Weights that lie over an axis of the rows (FSDP) are gathered, packed.  So is a dimension that its axis does not
  divide into whole groups and whole words, and one whose axis a shard_map around this one has taken already.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if w.split is None or mesh.empty:
    return Division()
  size = lambda axis: mesh.shape[axis] if axis in mesh.shape and axis not in mesh.manual_axes else 1
  rows = tuple(axis for axis in w.split.rows if size(axis) > 1)
  rows_parts = math.prod(map(size, rows))
  if x.ndim < 2 or x.shape[0] % rows_parts:
    rows, rows_parts = (), 1

  def axis_of(axis, fits):
    return (axis, size(axis)) if axis not in w.split.rows and size(axis) > 1 and fits(size(axis)) else (None, 1)

  width = math.gcd(*qtensor.PLANES[w.bits])
  whole = lambda parts: w.groups % parts == 0 and (w.shape[-2] // parts) * width % qtensor.WORD == 0
  inputs, inputs_parts = axis_of(w.split.inputs, whole)
  outputs, outputs_parts = axis_of(w.split.outputs, lambda parts: w.shape[-1] % parts == 0)
  return Division(rows, inputs, outputs, (rows_parts, inputs_parts, outputs_parts))


def run(multiply, x, w: qtensor.QTensor, division: Division, transposed: bool) -> jax.Array:
  """multiply(x, w, out_dtype) on every device's part, in x's dtype; partial sums are added in float32."""
  if division == Division():
    return multiply(x, w, x.dtype)
  if isinstance(w.scale, double.Doubled):
    # A few constants belong to scales of many groups: they are expanded before they are divided.
    own = qtensor.alone(w)
    w = own.replace(scale=qtensor.scales(own))
  given, made = division.inputs, division.outputs
  if transposed:
    given, made = made, given

  def local(x, w):
    y = multiply(x, w, x.dtype if given is None else jnp.float32)
    return y if given is None else jax.lax.psum(y, given).astype(x.dtype)

  between = (None,) * (x.ndim - 2)
  spec = lambda last: _P(division.rows or None, *between, last) if x.ndim > 1 else _P(last)
  divided = jax.shard_map(local, in_specs=(spec(given), _specs(w, division)), out_specs=spec(made), check_vma=False)
  return divided(x, w.replace(split=None))


def _specs(w: qtensor.QTensor, division: Division) -> qtensor.QTensor:
  """The PartitionSpec of every leaf of w: matrices by inputs and outputs, a stack's layers and its index whole."""
  matrix = (division.inputs, division.outputs)
  return jax.tree.map(
    lambda leaf: _P(*(None,) * (leaf.ndim - 2), *matrix) if leaf.ndim else _P(), w.replace(split=None)
  )
