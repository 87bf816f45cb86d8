"""What is to be multiplied and on what: the words in which kernels plan."""

import dataclasses

import jax

from qalora_jax.quant import qtensor

# How interpreted kernels are asked for: `impl` with this at its end.
INTERPRETED = '_interpreted'


class Refused(ValueError):
  """An implementation cannot make a product; the text names the reason and the way out."""


@dataclasses.dataclass(frozen=True)
class Device:
  """A chip: `platform` is 'cpu', 'tpu' or 'gpu', `kind` its name in jax ('TPU v5 lite', 'NVIDIA H100 80GB HBM3')."""

  platform: str
  kind: str = ''


@dataclasses.dataclass(frozen=True)
class Product:
  """x [rows, inputs] @ w [inputs, outputs], or, transposed, dy [rows, outputs] @ w.T; sizes are those of one device.

  `dtype` is x's, by name; `offset` says whether w has offsets; the other fields are w's.
  """

  rows: int
  inputs: int
  outputs: int
  bits: int
  group: int
  levels: str
  dtype: str
  offset: bool
  transposed: bool = False

  @classmethod
  def of(cls, x, w: qtensor.QTensor, transposed: bool = False) -> 'Product':
    """The product of x [..., I] (transposed: dy [..., O]) and w."""
    rows = 1
    for size in x.shape[:-1]:
      rows *= size
    inputs, outputs = w.shape[-2:]
    form = {'bits': w.bits, 'group': w.group, 'levels': w.levels, 'offset': w.offset is not None}
    return cls(rows, inputs, outputs, dtype=x.dtype.name, transposed=transposed, **form)

  def __str__(self):
    x, w = ('dy', 'w.T') if self.transposed else ('x', 'w')
    width = self.outputs if self.transposed else self.inputs
    return (
      f'{x} [{self.rows}, {width}] {self.dtype} @ {w} [{self.inputs}, {self.outputs}] '
      f'of {self.bits} bits ({self.levels}) in groups of {self.group}'
    )


def device() -> Device:
  """The device for which this is traced: that of the mesh in context, or the process's default."""
  of_mesh = jax.sharding.get_abstract_mesh().abstract_device
  if of_mesh is not None:
    return Device(_platform(of_mesh.platform), of_mesh.device_kind)
  chosen = jax.config.jax_default_device
  chosen = chosen if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)[0]
  return Device(_platform(chosen.platform), chosen.device_kind)


def result(shape: tuple[int, ...], dtype, *operands) -> jax.ShapeDtypeStruct:
  """What a kernel makes of `operands`: in a shard_map around it, an array that differs wherever one of them does."""
  kinds = [jax.typeof(leaf).manual_axis_type for leaf in jax.tree.leaves(operands)]
  kind = kinds[0].update(varying=frozenset().union(*(kind.varying for kind in kinds)))
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def _platform(name: str) -> str:
  return 'gpu' if name in ('cuda', 'rocm') else name
