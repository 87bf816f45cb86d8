"""Not yet here."""

from qalora_jax.kernels.product import Device
from qalora_jax.kernels.product import Product
from qalora_jax.kernels.product import Refused


def worthwhile(product: Product, device: Device) -> bool:
  """Nowhere yet."""
  return False


def plan(product: Product, device: Device):
  """Refuses."""
  raise Refused('it is not written yet.')


def forward(x, w, blocks, *, out_dtype, interpret=False):
  """x @ dense(w)."""
  raise NotImplementedError


def transpose(dy, w, blocks, *, out_dtype, interpret=False):
  """dy @ dense(w).T."""
  raise NotImplementedError
