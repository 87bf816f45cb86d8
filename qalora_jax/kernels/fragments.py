"""Packed words -> the bfloat16 fragments that a matrix unit reads, as programs over 32-bit registers.

A unit is 32 consecutive inputs of one output: a whole number of words at every width.  A thread of Hopper's wgmma
holds, of every row of a fragment, the columns 2q and 2q + 1 of each tile of eight; here the columns of a tile are
eight units, so a register is made of two codes of one unit, and the codes of a word never leave their thread.  The
order in which inputs meet the unit is therefore `order`, and x is put into it beforehand.

No instruction converts an integer: the bits of a code are put where bfloat16 has its mantissa, beside the exponent
of 128, and what that adds is subtracted again.  Both steps are exact.

The programs are written once, over a machine with these operations, and run on arrays (`Arrays`: tests, interpreted
kernels) as well as on a GPU's registers (`mosaic_gpu.Registers`):

    both(a, bits), either(a, b), differ(a, b)   and, or, exclusive or
    left(a, n), right(a, n)                     shifts by a constant, zeros coming in
    permute(a, b, selector)                     byte i of the result is byte `selector >> 4 i & 7` of a | b << 32
    pack(low, high)                             two float32 as a pair of bfloat16, to the nearest, ties to even
    low(p), high(p)                             the float32 in a pair
    minus(a, b)                                 float32 a - b
    subtract(p, q), times(p, q), fused(p, q, r) pairs of bfloat16: p - q, p * q, p * q + r rounded once

where a constant may stand for b, q or a selector.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax.quant import codebooks

UNIT = 32
UNITS = 8
BLOCK = UNIT * UNITS
# A chunk is eight inputs of each of eight units: as many columns as fill a row of 128 bytes in bfloat16.
CHUNKS = 4
CHUNK = BLOCK // CHUNKS


def _twice(bits: int) -> int:
  return bits | bits << 16


# 128 in bfloat16, whose last place is 1 there.
_ONE28 = 0x4300


def words(bits: int, chunk: int) -> tuple[int, ...]:
  """Which words of a unit hold chunk's codes; they are counted through all planes, low bits first."""
  return {8: (2 * chunk, 2 * chunk + 1), 4: (chunk,), 3: (chunk // 2, 2), 2: (chunk // 2,)}[bits]


def pairs(bits: int, levels: str, chunk: int) -> list[tuple[int, int]]:
  """The two inputs of a unit, 0..31, in each of the four registers that `codes` makes of a chunk."""
  if bits == 8:
    return [(8 * chunk + at, 8 * chunk + at + 2) for at in (0, 1, 4, 5)]
  if bits == 4 and levels != 'integer':
    return [(8 * chunk + at, 8 * chunk + at + 1) for at in (0, 2, 4, 6)]
  if bits == 4:
    return [(8 * chunk + at, 8 * chunk + at + 4) for at in range(4)]
  first = 16 * (chunk // 2) + 4 * (chunk % 2)
  return [(first + at, first + at + 8) for at in range(4)]


def order(bits: int, levels: str) -> np.ndarray:
  """int32 [BLOCK]: the input of a block that stands at every place of its fragments."""
  of_chunk = np.array([pairs(bits, levels, chunk) for chunk in range(CHUNKS)])  # [chunk, register, half]
  unit = 2 * np.arange(UNITS // 2).reshape(1, 1, 1, -1, 1) + np.arange(2).reshape(1, 2, 1, 1, 1)
  return (UNIT * unit + of_chunk.reshape(CHUNKS, 1, 4, 1, 2)).astype(np.int32).reshape(-1)


def codes(machine, bits: int, levels: str, held, chunk: int) -> list:
  """The levels of eight codes of a unit, as four pairs, each pair alone in a tuple; `held` are its words by `words`.

  A level of a codebook is the sum of two bfloat16 numbers, to 16 bits: its tuple has two pairs, the greater first.
  """
  if levels != 'integer':
    return _looked_up(machine, codebooks.CODEBOOKS[levels], *held)
  return [(pair,) for pair in {8: _eight, 4: _four, 3: _three, 2: _two}[bits](machine, *held, chunk)]


def scale(machine, s) -> tuple:
  """A float32 scale as two pairs of bfloat16 whose sum it is to 16 bits, each with the same number twice."""
  near = machine.pack(s, s)
  rest = machine.minus(s, machine.low(near))
  return near, machine.pack(rest, rest)


def scaled(machine, level: tuple, factor: tuple):
  """level * scale, rounded to bfloat16 as if by one multiplication in float32.

  To within 2^-15 of it, of which the rest of the scale and the rounding of its product have half each; where a level
  has two parts to within 3 * 2^-15, for their rest, the product of the lesser parts and one more rounding.
  """
  near, rest = factor
  less = machine.times(level[0], rest)
  for part in level[1:]:
    less = machine.fused(part, near, less)
  return machine.fused(level[0], near, less)


def parts(machine, low, high) -> list:
  """Two float32 as three pairs of bfloat16 whose sum they are to 24 bits, the greatest first."""
  found = []
  for _ in range(3):
    pair = machine.pack(low, high)
    found.append(pair)
    low, high = machine.minus(low, machine.low(pair)), machine.minus(high, machine.high(pair))
  return found


def _four(machine, word, chunk):
  found = []
  for at in range(4):
    # Exclusive or flips the sign's bit: two's complement plus 8, unsigned.
    fields = machine.differ(machine.both(machine.right(word, 4 * at), _twice(0xF)), _twice(_ONE28 | 8))
    found.append(machine.subtract(fields, _twice(_ONE28 | 8)))
  return found


def _two(machine, word, chunk):
  found = []
  for at in range(4):
    shifted = machine.right(word, 2 * (4 * (chunk % 2) + at))
    fields = machine.differ(machine.both(shifted, _twice(0x3)), _twice(_ONE28 | 2))
    found.append(machine.subtract(fields, _twice(_ONE28 | 2)))
  return found


def _three(machine, word, signs, chunk):
  # Bytes 2f and 2f + 1 of the plane of high bits go with word f of the plane of low ones; byte 4 is zero.
  byte = 2 * (chunk // 2)
  signs = machine.permute(signs, 0, 0x4040 | (byte + 1) << 8 | byte)
  found = []
  for at in range(4):
    place = 4 * (chunk % 2) + at
    low = machine.both(machine.right(word, 2 * place), _twice(0x3))
    sign = machine.left(signs, 2 - place) if place < 2 else machine.right(signs, place - 2)
    fields = machine.differ(machine.either(low, machine.both(sign, _twice(0x4))), _twice(_ONE28 | 4))
    found.append(machine.subtract(fields, _twice(_ONE28 | 4)))
  return found


def _eight(machine, first, second, chunk):
  found = []
  for word in (first, second):
    for at in range(2):
      shifted = machine.right(word, 8 * at)
      low = machine.either(machine.both(shifted, _twice(0x7F)), _twice(_ONE28))
      # The sign's bit, -128, is where the exponent of 128 has its lowest: it makes 128 into 256.
      base = machine.either(machine.both(shifted, _twice(0x80)), _twice(_ONE28))
      found.append(machine.subtract(low, base))
  return found


def _looked_up(machine, book, word):
  near = book.astype(jnp.bfloat16)
  found = [_by_index(machine, part, word) for part in (near, (book - near.astype(np.float32)).astype(jnp.bfloat16))]
  return list(zip(*found, strict=True))


def _by_index(machine, part, word):
  bits = part.view(np.uint16)
  table = lambda shift: [int(word) for word in ((bits >> shift) & 0xFF).astype(np.uint8).view('<u4')]
  found = []
  for half in range(2):
    own = machine.right(word, 16 * half)
    # Three bits of each index choose among eight bytes, the fourth between the halves of the book.
    three, fourth = machine.both(own, 0x7777), machine.either(machine.both(machine.right(own, 1), 0x4444), 0x3210)
    low, high = (
      machine.permute(machine.permute(byte[0], byte[1], three), machine.permute(byte[2], byte[3], three), fourth)
      for byte in (table(0), table(8))
    )
    found += [machine.permute(low, high, 0x5140), machine.permute(low, high, 0x7362)]
  return found


# The parts of an offset and of a sum of x that meet in each tile of eight columns: all but the least of nine products.
PARTS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1))


def weights(machine, bits: int, levels: str, chunk: int, held, s) -> list:
  """The four pairs of a unit's codes in a chunk, times the unit's scale."""
  factor = scale(machine, s)
  return [scaled(machine, level, factor) for level in codes(machine, bits, levels, held, chunk)]


def weights_of(bits: int, levels: str, chunk: int, held, s) -> jax.Array:
  """Words and float32 scales [O, UNITS] -> the fragment [O, CHUNK] bfloat16, by `Arrays`."""
  by_thread = lambda array: array.reshape(array.shape[0], UNITS // 2, 2)
  made = weights(Arrays, bits, levels, chunk, [by_thread(array) for array in held], by_thread(s))
  columns = jnp.stack([Arrays.pair(tile) for tile in made])  # [register, O, thread, unit of two, half]
  return columns.transpose(1, 3, 0, 2, 4).reshape(s.shape[0], CHUNK)


def offsets_of(offset) -> jax.Array:
  """float32 offsets [O, UNITS] -> the fragment [O, CHUNK] of their parts that meet those of sums of x, by `Arrays`."""
  made = [Arrays.pair(part) for part in parts(Arrays, offset[:, 0::2], offset[:, 1::2])]
  return jnp.concatenate([made[at].reshape(offset.shape) for at, _ in PARTS], axis=-1)


class Arrays:
  """The machine whose registers are uint32 and float32 arrays."""

  @staticmethod
  def both(a, bits):
    return a & np.uint32(bits)

  @staticmethod
  def either(a, b):
    return a | _array(b)

  @staticmethod
  def differ(a, b):
    return a ^ _array(b)

  @staticmethod
  def left(a, n):
    return a << np.uint32(n)

  @staticmethod
  def right(a, n):
    return a >> np.uint32(n)

  @staticmethod
  def permute(a, b, selector):
    a, b, selector = _array(a), _array(b), _array(selector)
    result = np.uint32(0)
    for at in range(4):
      chosen = (selector >> np.uint32(4 * at)) & np.uint32(7)
      within = np.uint32(8) * (chosen & np.uint32(3))
      byte = jnp.where(chosen < np.uint32(4), a >> within, b >> within) & np.uint32(0xFF)
      result = result | byte << np.uint32(8 * at)
    return result

  @staticmethod
  def pack(low, high):
    # XLA would take a conversion to bfloat16 and back for none.
    low, high = (jax.lax.bitcast_convert_type(jax.lax.reduce_precision(v, 8, 7), jnp.uint32) for v in (low, high))
    return low >> np.uint32(16) | high

  @staticmethod
  def low(p):
    return jax.lax.bitcast_convert_type(p << np.uint32(16), jnp.float32)

  @staticmethod
  def high(p):
    return jax.lax.bitcast_convert_type(p & np.uint32(0xFFFF0000), jnp.float32)

  @staticmethod
  def minus(a, b):
    return a - b

  @staticmethod
  def pair(p):
    """bfloat16 [..., 2]: what a register holds."""
    return jax.lax.bitcast_convert_type(_array(p), jnp.bfloat16)

  @classmethod
  def subtract(cls, p, q):
    q = jnp.broadcast_to(cls.pair(q), (*p.shape, 2))
    return jax.lax.bitcast_convert_type(cls.pair(p) - q, jnp.uint32)

  @classmethod
  def times(cls, p, q):
    return jax.lax.bitcast_convert_type(cls.pair(p) * cls.pair(q), jnp.uint32)

  @classmethod
  def fused(cls, p, q, r):
    p, q, r = (cls.pair(value).astype(jnp.float32) for value in (p, q, r))
    return jax.lax.bitcast_convert_type((p * q + r).astype(jnp.bfloat16), jnp.uint32)


def _array(a):
  return np.uint32(a) if isinstance(a, int) else a
