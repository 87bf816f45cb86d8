"""Codes of any width one after another in uint32 words, from the lowest bit up: how MLX and GPTQ files pack them."""

import numpy as np


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
  """[..., n] unsigned codes -> [..., n * bits / 32] uint32; n * bits has to divide into words."""
  spread = (codes.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
  packed = np.packbits(spread.reshape(*codes.shape[:-1], -1), axis=-1, bitorder='little')
  return np.ascontiguousarray(packed).view('<u4')


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
  """[..., w] uint32 -> [..., w * 32 / bits] uint8; the inverse of `pack`."""
  spread = np.unpackbits(np.ascontiguousarray(words, '<u4').view(np.uint8), axis=-1, bitorder='little')
  by_code = spread.reshape(*words.shape[:-1], -1, bits)
  return np.packbits(by_code, axis=-1, bitorder='little')[..., 0]
