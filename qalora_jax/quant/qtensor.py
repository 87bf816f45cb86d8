"""The frozen quantized matrix: its container, its invariants, its packing.

I inputs, O outputs, G group size, L groups (I // G).  Any axes may stand before them (scanned layers).
"""

import dataclasses
import math

from flax import struct
import jax
import jax.numpy as jnp

from qalora_jax.quant import codebooks
from qalora_jax.quant import double

# How the bits of a code are spread over planes: 3 bits are 2 + 1, so that no code straddles two words.
PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
WORD = 32


@dataclasses.dataclass(frozen=True)
class Split:
  """The axes of a mesh over which x [rows, ..., I] @ w [I, O] is divided: those of its rows, of I and of O.

  A mesh axis that divides rows as well as weights (FSDP) does not divide the product: weights are gathered over it.
  """

  rows: tuple[str, ...] = ()
  inputs: str | None = None
  outputs: str | None = None


class QTensor(struct.PyTreeNode):
  """A matrix [I, O] in codes of `bits` bits, in groups of `group` inputs.

      dense[i, o] = level(codes[i, o]) * scale[i // group, o] + offset[i // group, o]

  * codes are centred two's-complement integers in [-2^(bits-1), 2^(bits-1) - 1] and level(c) = c where `levels` is
    'integer'; for 'nf4' and 'fp4' they are indices 0..15 into `codebooks.CODEBOOKS[levels]`.
  * planes[p] [ceil(I * width_p / 32), O] uint32 holds `width_p` bits of every code, consecutive inputs in
    consecutive fields from the lowest bit up; PLANES gives the widths, low bits first.
  * scale and offset [L, O] are in weight units, float32 or float16.  Never bfloat16: at its 8 bits of
    mantissa 1-5 % of a merged adapter would be lost (a TypeError says so).  A scale may be `double.Doubled`.
    offset is None where there is none (it is 0 then, and takes no bytes).
  * every field keeps the axes (inputs, outputs) of the matrix, so one PartitionSpec is a valid prefix for all;
    only the few constants of a Doubled have fewer axes.

  Two more say where the matrix lies; they are set by a model while it runs and are never stored:

  * layer: with an int32 index, the matrix is that one of a stack: planes and scale have an axis of layers before the
    others, offset has not.  So a loop over layers reads the stack where it lies and copies none of it.
  * split: how the product with it is divided over a mesh.
  """

  planes: tuple[jax.Array, ...]
  scale: jax.Array | double.Doubled
  offset: jax.Array | None
  bits: int = struct.field(pytree_node=False)
  group: int = struct.field(pytree_node=False)
  levels: str = struct.field(pytree_node=False, default='integer')
  layer: jax.Array | None = None
  split: Split | None = struct.field(pytree_node=False, default=None)

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
    """The shape of the dense matrix, leading axes included (but never the axis that `layer` counts)."""
    leading = self.scale.shape[(0 if self.layer is None else 1) : -2]
    return (*leading, self.groups * self.group, self.scale.shape[-1])

  @property
  def size(self) -> int:
    """The number of weights."""
    return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Form:
  """All that is static about a QTensor: two matrices of one shape and one form can be stacked.

  scale: 'float32', 'float16' or 'double'; offset: 'float32', 'float16' or 'none'.
  """

  bits: int
  group: int
  levels: str = 'integer'
  scale: str = 'float32'
  offset: str = 'float32'

  def __call__(self, w, name: str = 'a weight') -> QTensor:
    """The zero matrix of this form in the shape of w [..., I, O]; ValueError where the group does not divide."""
    *leading, inputs, outputs = w.shape
    by_group = (*leading, inputs // check_group(inputs, self.group, name), outputs)
    planes = pack(jnp.zeros(w.shape, jnp.int32), self.bits)
    scale = jnp.zeros(by_group, jnp.float32 if self.scale == 'double' else self.scale)
    offset = None if self.offset == 'none' else jnp.zeros(by_group, self.offset)
    group = inputs // by_group[-2]
    scale = double.compress(scale) if self.scale == 'double' else scale
    return QTensor(planes, scale, offset, bits=self.bits, group=group, levels=self.levels)


def in_stack(stack: QTensor, layer) -> QTensor:
  """Matrix `layer` (an int32 index, which may be traced) of a stack [N, I, O], read where the stack lies."""
  offset = None if stack.offset is None else stack.offset[layer]
  return stack.replace(offset=offset, layer=jnp.asarray(layer, jnp.int32))


def alone(q: QTensor) -> QTensor:
  """`q` by itself: its part of the stack taken out, if it lies in one."""
  if q.layer is None:
    return q
  own = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, q.layer, axis=0, keepdims=False)
  return q.replace(planes=jax.tree.map(own, q.planes), scale=jax.tree.map(own, q.scale), layer=None)


def check(q: QTensor, name: str = 'a weight') -> None:
  """ValueError unless the planes of `q` are those of its bits and shape, and its offsets those of its groups."""
  *leading, inputs, outputs = q.scale.shape
  inputs = inputs * q.group
  if q.bits not in PLANES:
    raise ValueError(f'{name}: {q.bits} bits; there are {sorted(PLANES)}.')
  wanted = [(*leading, -(-inputs * width // WORD), outputs) for width in PLANES[q.bits]]
  found = [(plane.shape, str(plane.dtype)) for plane in q.planes]
  if found != [(shape, 'uint32') for shape in wanted]:
    raise ValueError(
      f'{name}: its codes lie in planes {found}; {inputs} inputs of {q.bits} bits are packed in uint32 planes '
      f'{wanted} (`qtensor.pack`).'
    )
  if q.offset is not None and q.offset.shape[-2:] != q.scale.shape[-2:]:
    raise ValueError(f'{name}: offsets {q.offset.shape} do not fit scales {q.scale.shape}.')


def form(q: QTensor) -> Form:
  """The form of `q`, which may be abstract."""
  scale = 'double' if isinstance(q.scale, double.Doubled) else str(q.scale.dtype)
  offset = 'none' if q.offset is None else str(q.offset.dtype)
  return Form(q.bits, q.group, q.levels, scale, offset)


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
  """The int32 codes [..., I, O]: centred where levels are integers, indices of the codebook elsewhere."""
  q = alone(q)
  found = unpack(q.planes, q.bits, q.shape[-2])
  return found if q.levels == 'integer' else found & (2**q.bits - 1)


def scales(q: QTensor) -> jax.Array:
  """The float32 scales [..., L, O]."""
  q = alone(q)
  return double.expand(q.scale) if isinstance(q.scale, double.Doubled) else q.scale.astype(jnp.float32)


def offsets(q: QTensor) -> jax.Array:
  """The float32 offsets [..., L, O]; zeros where there are none."""
  if q.offset is None:
    *leading, _, outputs = q.shape
    return jnp.zeros((*leading, q.groups, outputs), jnp.float32)
  return q.offset.astype(jnp.float32)


def level(codes, levels: str) -> jax.Array:
  """The float32 level that each code stands for."""
  if levels == 'integer':
    return codes.astype(jnp.float32)
  return jnp.asarray(codebooks.CODEBOOKS[levels])[codes]


def scaled(q: QTensor, dtype=jnp.float32) -> jax.Array:
  """level * scale [..., I, O]: the matrix without its offsets."""
  q = alone(q)
  by_group = level(codes(q), q.levels).reshape(*q.scale.shape[:-1], q.group, q.shape[-1])
  return (by_group * scales(q)[..., None, :]).reshape(q.shape).astype(dtype)


def dequantize(q: QTensor) -> jax.Array:
  """The dense float32 matrix [..., I, O] that `q` stands for."""
  if q.offset is None:
    return scaled(q)
  return scaled(q) + jnp.repeat(offsets(q), q.group, axis=-2)


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
