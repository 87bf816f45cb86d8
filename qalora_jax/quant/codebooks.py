"""The constants of 4-bit and 8-bit codes that stand for real levels, as bitsandbytes holds them, to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np

# NormalFloat4 (Dettmers et al., 2023, App. E): quantiles of a standard normal, one level exactly 0, scaled to [-1, 1].
NF4 = np.array(
  [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  ],
  np.float32,
)
# E2M1 over 12, but with 1/16 where E2M1 has 1.  Bit 3 is the sign; the order is that of the bits, not of the values.
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12)

# {QTensor.levels: the level of every code}.
CODEBOOKS = {'nf4': NF4, 'fp4': FP4}


def _dynamic(signed: bool) -> np.ndarray:
  """The 8-bit dynamic map (Dettmers, 2015): decades 10^-6 .. 10^0, each with twice the fractions of the last.

  Without a sign there are twice as many fractions in each.  In the arithmetic of torch.linspace in float32: edges are
  counted from the nearer end, and rounded once.
  """
  first, last = np.float32(0.1), np.float32(1)
  levels = [0.0, 1.0]
  for decade in range(7):
    count = 2 ** (decade + (not signed))
    step = (last - first) / np.float32(count)
    index = np.arange(count + 1, dtype=np.float64)
    edges = np.where(index < (count + 1) // 2, first + step * index, last - step * (count - index)).astype(np.float32)
    values = np.float32(10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
    levels += [*values, *-values] if signed else [*values]
  return np.sort(np.array(levels, np.float32))


# 256 levels in increasing order; double quantization's map of block constants, and Adam's of first moments.
DYNAMIC = _dynamic(signed=True)
# 256 levels from 0; Adam's of second moments.
DYNAMIC_UNSIGNED = _dynamic(signed=False)


def nearest(levels: np.ndarray, values) -> jax.Array:
  """The int32 index of the nearest of increasing levels; halfway between two (in float32), the lower."""
  midpoints = (levels[1:] + levels[:-1]) / 2
  return jnp.searchsorted(jnp.asarray(midpoints), values, side='left', method='compare_all').astype(jnp.int32)
