"""The constants of 4-bit and 8-bit codes that stand for real levels, as bitsandbytes holds them, to the last bit."""

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
# E2M1 over 12: bit 3 is the sign, and the order of the others is that of the bits, not of the values.
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12)

# {QTensor.levels: the level of every code}.
CODEBOOKS = {'nf4': NF4, 'fp4': FP4}


def _dynamic() -> np.ndarray:
  """The signed 8-bit dynamic map (Dettmers, 2015): decades 10^-6 .. 10^0, each with twice the fractions of the last."""
  levels = [0.0, 1.0]
  for decade in range(7):
    edges = np.linspace(0.1, 1, 2**decade + 1, dtype=np.float32)
    means = (edges[:-1] + edges[1:]) / np.float32(2)
    values = (np.float64(10.0 ** (decade - 6)) * means.astype(np.float32)).astype(np.float32)
    levels += [*values, *-values]
  return np.sort(np.array(levels, np.float32))


# 256 levels in increasing order; double quantization's map of block constants.
DYNAMIC = _dynamic()
