"""Double quantization (Dettmers et al., 2023, section 3): the scales of a quantized matrix in 8 bits themselves.

L groups along the inputs, O outputs.
"""

from flax import struct
import jax
import jax.numpy as jnp

from qalora_jax.quant import codebooks

BLOCK = 256


class Doubled(struct.PyTreeNode):
  """Scales [..., L, O] as `map[codes] * absmax[block] + mean`, the map being `codebooks.DYNAMIC`.

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
  """Scales [..., L, O] in 8 bits: their mean removed, then the nearest of 256 dynamic levels in blocks of 256.

  As bitsandbytes' torch code, to the last bit given the same mean; that is within two units in the last place of its,
  which there depend on the processor and its threads.  Its CPU kernel first rounds to 2^-15 of absmax, and so takes a
  neighbour of the nearest level once in some hundred scales.
  """
  *leading, L, O = scale.shape
  flat = scale.astype(jnp.float32).swapaxes(-1, -2).reshape(*leading, L * O)
  mean = _mean(flat)
  blocks = _blocks(flat - mean[..., None])
  absmax = jnp.abs(blocks).max(-1)
  normal = blocks * (1.0 / jnp.where(absmax == 0, 1.0, absmax))[..., None]
  codes = codebooks.nearest(codebooks.DYNAMIC, normal).astype(jnp.uint8)
  codes = codes.reshape(*leading, -1)[..., : L * O].reshape(*leading, O, L).swapaxes(-1, -2)
  return Doubled(codes, absmax, mean)


def expand(doubled: Doubled) -> jax.Array:
  """The float32 scales [..., L, O]."""
  *leading, L, O = doubled.codes.shape
  # Constants go to their codes, not codes to their blocks: what is divided over devices stays where it is.
  absmax = jnp.broadcast_to(doubled.absmax[..., None], (*doubled.absmax.shape, BLOCK))
  absmax = absmax.reshape(*leading, -1)[..., : L * O].reshape(*leading, O, L).swapaxes(-1, -2)
  # Levels lie within [-1, 1], so the clip changes nothing; but it keeps a compiler from joining product and sum in one
  # multiply-add, whose result has other last bits than bitsandbytes' and than the same expression not compiled.
  values = jnp.clip(jnp.asarray(codebooks.DYNAMIC)[doubled.codes.astype(jnp.int32)] * absmax, -absmax, absmax)
  return values + doubled.mean[..., None, None]


def _mean(flat) -> jax.Array:
  """[..., N] -> [...], added in halves: the same bits whether compiled or not, stacked or not."""
  count = flat.shape[-1]
  total = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, 2 ** (count - 1).bit_length() - count)])
  while (half := total.shape[-1] // 2) > 0:
    total = total[..., :half] + total[..., half:]
  # Counted at run time: a division by a constant is compiled to a product with its rounded reciprocal.
  return total[..., 0] / jnp.sum(flat == flat, axis=-1)


def _blocks(flat) -> jax.Array:
  """[..., N] -> [..., ceil(N / 256), 256], zeros at the end."""
  *leading, count = flat.shape
  blocks = -(-count // BLOCK)
  padded = jnp.pad(flat, [(0, 0)] * len(leading) + [(0, blocks * BLOCK - count)])
  return padded.reshape(*leading, blocks, BLOCK)
