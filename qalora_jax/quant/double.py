"""Double quantization (Dettmers et al., 2023, section 3): the scales of a quantized matrix in 8 bits themselves.

L groups along the inputs, O outputs.
"""

from flax import struct
import jax
import jax.numpy as jnp

from qalora_jax.quant import codebooks

BLOCK = 256
# Between neighbours of the map: the nearest level of x is the number of these below it.
_MIDPOINTS = (codebooks.DYNAMIC[1:] + codebooks.DYNAMIC[:-1]) / 2


class Doubled(struct.PyTreeNode):
  """Scales [..., L, O] as `map[codes] * absmax[block] + mean`.

  codes [..., L, O] uint8; absmax [..., ceil(L * O / 256)] float32, one for 256 scales counted along the groups of
  output 0, then of output 1, ... (bitsandbytes' order); mean [...] float32.  8 + 32 / 256 bits a scale.
  """

  codes: jax.Array
  absmax: jax.Array
  mean: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the scales."""
    return self.codes.shape

  @property
  def dtype(self):
    """The dtype of the scales that `expand` makes."""
    return self.absmax.dtype


def compress(scale) -> Doubled:
  """Scales [..., L, O] in 8 bits: their mean removed, then the nearest of 256 dynamic levels in blocks of 256."""
  *leading, L, O = scale.shape
  flat = scale.astype(jnp.float32).swapaxes(-1, -2).reshape(*leading, L * O)
  mean = flat.mean(-1)
  blocks = _blocks(flat - mean[..., None])
  absmax = jnp.abs(blocks).max(-1)
  normal = blocks / jnp.where(absmax == 0, 1.0, absmax)[..., None]
  codes = jnp.searchsorted(jnp.asarray(_MIDPOINTS), normal, side='left').astype(jnp.uint8)
  codes = codes.reshape(*leading, -1)[..., : L * O].reshape(*leading, O, L).swapaxes(-1, -2)
  return Doubled(codes, absmax, mean)


def expand(doubled: Doubled) -> jax.Array:
  """The float32 scales [..., L, O]."""
  *leading, L, O = doubled.codes.shape
  flat = doubled.codes.swapaxes(-1, -2).reshape(*leading, L * O)
  blocks = jnp.asarray(codebooks.DYNAMIC)[_blocks(flat).astype(jnp.int32)] * doubled.absmax[..., None]
  values = blocks.reshape(*leading, -1)[..., : L * O] + doubled.mean[..., None]
  return values.reshape(*leading, O, L).swapaxes(-1, -2)


def _blocks(flat) -> jax.Array:
  """[..., N] -> [..., ceil(N / 256), 256], zeros at the end."""
  *leading, count = flat.shape
  blocks = -(-count // BLOCK)
  padded = jnp.pad(flat, [(0, 0)] * len(leading) + [(0, blocks * BLOCK - count)])
  return padded.reshape(*leading, blocks, BLOCK)
