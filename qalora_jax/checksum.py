"""CRC-32 of bytes that come in parts: that of the whole from those of the parts, in whatever order they were taken.

zlib's CRC-32 of a text A followed by B is, over polynomials with coefficients in GF(2) modulo

    P = x^32 + x^26 + x^23 + x^22 + x^16 + x^12 + x^11 + x^10 + x^8 + x^7 + x^5 + x^4 + x^2 + x + 1,

crc(A) x^(8 |B|) + crc(B): what is done to its bits before and after cancels.  Bit 31 of a number is the coefficient of
x^0, bit 0 that of x^31.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib

import jax
import numpy as np

_P, _ONE, _X = 0xEDB88320, 1 << 31, 1 << 30
# Bytes that are made contiguous, in the dtype asked for, at once.
_AT_ONCE = 2**24


@dataclasses.dataclass(frozen=True)
class Checksum:
  """The CRC-32 of `length` bytes; first + second is that of the first's followed by the second's."""

  crc: int = 0
  length: int = 0

  def __add__(self, other: Checksum) -> Checksum:
    return Checksum(_multiply(self.crc, _power(8 * other.length)) ^ other.crc, self.length + other.length)


def of(array, dtype=None) -> Checksum:
  """The checksum of an array's bytes in C order, in `dtype` (default: its own); a part is converted at a time."""
  array = np.asarray(array)
  dtype = np.dtype(dtype or array.dtype)
  crc, rows = 0, array.reshape(1) if array.ndim == 0 else array
  step = max(1, _AT_ONCE * len(rows) // max(1, rows.size * dtype.itemsize))
  for start in range(0, len(rows), step):
    crc = zlib.crc32(np.ascontiguousarray(rows[start : start + step], dtype).view(np.uint8), crc)
  return Checksum(crc, array.size * dtype.itemsize)


def of_tree(tree) -> Checksum:
  """The checksum of every leaf of a tree one after another; a leaf that is on devices is brought here by itself."""
  return total(jax.tree.map(of, tree))


def total(sums) -> Checksum:
  """The checksum of a tree from those of its leaves."""
  return sum(jax.tree.leaves(sums), Checksum())


def _multiply(a: int, b: int) -> int:
  """a b modulo P."""
  product = 0
  while a:
    if a & _ONE:
      product ^= b
    # The next coefficient of a stands for x times as much.
    a, b = (a << 1) & 0xFFFFFFFF, (b >> 1) ^ (_P if b & 1 else 0)
  return product


@functools.cache
def _power(n: int) -> int:
  """x^n modulo P, by repeated squaring."""
  power, square = _ONE, _X
  while n:
    if n & 1:
      power = _multiply(power, square)
    n, square = n >> 1, _multiply(square, square)
  return power
