"""The frozen quantized matrix: its container, its invariants, its packing.

I inputs, O outputs, G group size, L groups (I // G).  Any axes may stand before them (scanned layers).
"""

import math

from flax import struct
import jax
import jax.numpy as jnp

# How the bits of a code are spread over planes: 3 bits are 2 + 1, so that no code straddles two words.
PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
WORD = 32


class QTensor(struct.PyTreeNode):
  """A matrix [I, O] in codes of `bits` bits, affine in groups of `group` inputs.

      dense[i, o] = codes[i, o] * scale[i // group, o] + offset[i // group, o]

  * codes are centred two's-complement integers in [-2^(bits-1), 2^(bits-1) - 1].
  * planes[p] [ceil(I * width_p / 32), O] uint32 holds `width_p` bits of every code, consecutive inputs in
    consecutive fields from the lowest bit up; PLANES gives the widths, low bits first.
  * scale and offset [L, O] are in weight units, float32 or float16.  Never bfloat16: at its 8 bits of
    mantissa 1-5 % of a merged adapter would be lost (a TypeError says so).
  * every field keeps the axes (inputs, outputs) of the matrix, so one PartitionSpec is a valid prefix for all.
  """

  planes: tuple[jax.Array, ...]
  scale: jax.Array
  offset: jax.Array
  bits: int = struct.field(pytree_node=False)
  group: int = struct.field(pytree_node=False)

  def __post_init__(self):
    for name in ('scale', 'offset'):
      if getattr(getattr(self, name), 'dtype', None) == jnp.bfloat16:
        raise TypeError(
          f'{name} of a QTensor in bfloat16: 1-5 % of a merged adapter would be rounded away; '
          'keep it in float32 or float16 (cast only the dense weights of the tree).'
        )

  @property
  def groups(self) -> int:
    """L, the number of groups along the inputs."""
    return self.scale.shape[-2]

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the dense matrix, leading axes included."""
    return (*self.scale.shape[:-2], self.groups * self.group, self.scale.shape[-1])

  @property
  def size(self) -> int:
    """The number of weights."""
    return math.prod(self.shape)


def pack(codes, bits: int) -> tuple[jax.Array, ...]:
  """Packs integer codes [..., I, O] of `bits` bits into planes of uint32; `unpack` is its inverse."""
  planes, taken = [], 0
  unsigned = codes.astype(jnp.uint32)
  for width in PLANES[bits]:
    fields = (unsigned >> taken) & (2**width - 1)
    planes.append(_pack_plane(fields, width))
    taken += width
  return tuple(planes)


def unpack(planes: tuple[jax.Array, ...], bits: int, inputs: int) -> jax.Array:
  """The int32 codes [..., inputs, O] that `pack` packed, signs restored."""
  unsigned, taken = 0, 0
  for width, words in zip(PLANES[bits], planes, strict=True):
    unsigned = unsigned | (_unpack_plane(words, width, inputs) << taken)
    taken += width
  # Shifting up and back arithmetically copies the sign bit of a `bits`-bit number into the bits above it.
  signed = jax.lax.bitcast_convert_type(unsigned << (WORD - bits), jnp.int32)
  return signed >> (WORD - bits)


def codes(q: QTensor) -> jax.Array:
  """The centred int32 codes [..., I, O]."""
  return unpack(q.planes, q.bits, q.shape[-2])


def scaled(q: QTensor, dtype=jnp.float32) -> jax.Array:
  """codes * scale [..., I, O]: the matrix without its offsets."""
  by_group = codes(q).reshape(*q.scale.shape[:-1], q.group, q.shape[-1])
  return (by_group * q.scale.astype(jnp.float32)[..., None, :]).reshape(q.shape).astype(dtype)


def dequantize(q: QTensor) -> jax.Array:
  """The dense float32 matrix [..., I, O] that `q` stands for."""
  return scaled(q) + jnp.repeat(q.offset.astype(jnp.float32), q.group, axis=-2)


def check_group(inputs: int, group: int, name: str = 'a weight') -> int:
  """The group size for a matrix of `inputs` inputs (-1: a whole column); ValueError if it does not divide."""
  if group == -1:
    return inputs
  if group < 1 or inputs % group:
    fits = [g for g in range(2, inputs + 1) if inputs % g == 0]
    raise ValueError(
      f'{name}: {inputs} inputs do not divide into groups of {group}; '
      f'use base.group in {fits} or -1 (a whole column), or leave this weight dense by base.targets.'
    )
  return group


def bits_per_weight(q: QTensor) -> float:
  """Stored bits over weights, scales and offsets included: bits + (scale and offset bits) / group."""
  stored = sum(leaf.size * leaf.dtype.itemsize * 8 for leaf in jax.tree.leaves(q))
  return stored / q.size


def _pack_plane(fields, width: int) -> jax.Array:
  """[..., I, O] fields of `width` bits -> [..., ceil(I * width / 32), O] words."""
  per_word = WORD // width
  *leading, inputs, outputs = fields.shape
  words = -(-inputs // per_word)
  padded = jnp.pad(fields, [(0, 0)] * len(leading) + [(0, words * per_word - inputs), (0, 0)])
  shifts = (width * jnp.arange(per_word, dtype=jnp.uint32)).reshape(per_word, 1)
  split = padded.reshape(*leading, words, per_word, outputs)
  return jnp.sum(split << shifts.reshape((1,) * (len(leading) + 1) + shifts.shape), axis=-2, dtype=jnp.uint32)


def _unpack_plane(words, width: int, inputs: int) -> jax.Array:
  per_word = WORD // width
  *leading, count, outputs = words.shape
  shifts = (width * jnp.arange(per_word, dtype=jnp.uint32)).reshape((1,) * (len(leading) + 1) + (per_word, 1))
  fields = (words[..., None, :] >> shifts) & jnp.uint32(2**width - 1)
  return fields.reshape(*leading, count * per_word, outputs)[..., :inputs, :]
