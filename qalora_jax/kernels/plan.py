"""The one plan: a product and a device -> who makes it, in which blocks.

An implementation is a module with

    worthwhile(product, device) -> bool                               whether it is asked where nobody names it
    plan(product, device) -> blocks                                   Refused where it cannot, saying why
    forward(x, w, blocks, *, out_dtype, interpret=False) -> y         x [..., I] @ dense(w) in out_dtype
    transpose(dy, w, blocks, *, out_dtype, interpret=False) -> dx     dy [..., O] @ dense(w).T in out_dtype

`blocks` is whatever it planned, hashable.  Both directions are planned apart.
"""

import dataclasses
import os
import types
from typing import Any

import jax

from qalora_jax.kernels import mosaic_gpu
from qalora_jax.kernels import tpu
from qalora_jax.kernels import triton
from qalora_jax.kernels import xla
from qalora_jax.kernels.product import INTERPRETED
from qalora_jax.kernels.product import Device
from qalora_jax.kernels.product import Product
from qalora_jax.kernels.product import Refused

IMPLEMENTATIONS = {'xla': xla, 'tpu': tpu, 'mosaic_gpu': mosaic_gpu, 'triton': triton}
# Who is asked first, by platform; on a GPU only where few rows make a fused kernel worth it (see `mosaic_gpu.FUSED`).
_PREFERRED = {'tpu': ('tpu', 'xla'), 'gpu': ('mosaic_gpu', 'triton', 'xla')}

# Part of jit's cache key: `with using('xla'): ...` makes every `qmatmul` that names no implementation take this one.
# It begins as the environment says, which is about a machine and not about an experiment.
using = jax.make_user_context(os.environ.get('QALORA_QMATMUL') or None)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Who makes a product, and how."""

  name: str
  blocks: Any
  interpret: bool = False

  @property
  def module(self) -> types.ModuleType:
    """The implementation."""
    return IMPLEMENTATIONS[self.name]


def choose(product: Product, device: Device, impl: str | None = None) -> Plan:
  """The plan for `product` on `device` by `impl`, or, for None, by the first of those that suit the device.

  `impl` with '_interpreted' at its end runs that kernel interpreted, on any device: slow, for tests and for looking.
  Raises Refused (a ValueError) for an unknown `impl` and for one that cannot make this product there.
  """
  if impl is not None:
    name = impl.removesuffix(INTERPRETED)
    if name not in IMPLEMENTATIONS:
      raise Refused(f'qmatmul: no implementation {impl!r}; there are {sorted([*IMPLEMENTATIONS, "reference"])}.')
    interpret = impl != name
    try:
      blocks = IMPLEMENTATIONS[name].plan(product, _model(name) if interpret else device)
    except Refused as error:
      raise Refused(f'impl={impl!r} cannot make {product}: {error}') from None
    return Plan(name, blocks, interpret)
  for name in _PREFERRED.get(device.platform, ('xla',)):
    module = IMPLEMENTATIONS[name]
    if not module.worthwhile(product, device):
      continue
    try:
      return Plan(name, module.plan(product, device))
    except Refused:
      continue
  raise AssertionError('xla refuses nothing')


def _model(name: str) -> Device:
  """The device that an interpreted kernel is planned for."""
  return Device('tpu', 'TPU v5 lite') if name == 'tpu' else Device('gpu', 'NVIDIA H100 80GB HBM3')
