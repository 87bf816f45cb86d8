"""Affine round-to-nearest quantization in groups along the inputs."""

import dataclasses

import jax
import jax.numpy as jnp

from qalora_jax.quant import qtensor


@dataclasses.dataclass(frozen=True)
class Affine:
  """The choices of the affine quantizer: bits 8, 4, 3 or 2; inputs per group (-1: a whole column)."""

  bits: int
  group: int
  symmetric: bool = False

  def __call__(self, w, name: str = 'a weight') -> qtensor.QTensor:
    """`quantize` with these choices."""
    return quantize(w, bits=self.bits, group=self.group, symmetric=self.symmetric, name=name)


def quantize(w, *, bits: int, group: int, symmetric: bool = False, name: str = 'a weight') -> qtensor.QTensor:
  """Rounds w [..., I, O] to the nearest of 2^bits levels in every group of `group` inputs.

  Asymmetric (QA-LoRA, section 3.1, with codes centred):

      scale = (max w - min w) / (2^bits - 1)     offset = min w + 2^(bits-1) * scale
      codes = round((w - min w) / scale) - 2^(bits-1)          |w - dense| <= scale / 2

  A constant group has scale 0 and is exact.  Symmetric (as GGUF's Q4_0): offset 0, and the entry of largest
  magnitude becomes code -2^(bits-1), so scale may be negative; |w - dense| <= |scale|, reached only by entries of
  the other sign that the missing code 2^(bits-1) would have held.  Both are idempotent: quantizing `dense` again
  gives the same codes.  Raises ValueError where the group does not divide the inputs or `bits` is unknown.
  """
  if bits not in qtensor.PLANES:
    raise ValueError(f'{name}: {bits} bits; a code has one of {sorted(qtensor.PLANES)} bits.')
  *leading, inputs, outputs = w.shape
  group = qtensor.check_group(inputs, group, name)
  grouped = w.astype(jnp.float32).reshape(*leading, inputs // group, group, outputs)
  half = 2 ** (bits - 1)
  fit = _symmetric if symmetric else _asymmetric
  scale, offset = fit(grouped, half)
  inverse = jnp.where(scale == 0, 0.0, 1.0 / jnp.where(scale == 0, 1.0, scale))
  levels = jnp.round((grouped - offset[..., None, :]) * inverse[..., None, :])
  codes = jnp.clip(levels, -half, half - 1).astype(jnp.int32).reshape(w.shape)
  return qtensor.QTensor(qtensor.pack(codes, bits), scale, offset, bits=bits, group=group)


def _asymmetric(grouped, half: int) -> tuple[jax.Array, jax.Array]:
  low, high = grouped.min(-2), grouped.max(-2)
  scale = (high - low) / (2 * half - 1)
  return scale, low + half * scale


def _symmetric(grouped, half: int) -> tuple[jax.Array, jax.Array]:
  low, high = grouped.min(-2), grouped.max(-2)
  scale = jnp.where(high > -low, high, low) / -half
  return scale, jnp.zeros_like(scale)
