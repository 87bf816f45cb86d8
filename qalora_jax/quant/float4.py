"""NF4 and FP4: 4-bit codes for the levels of a table, scaled by the largest magnitude of each block of inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax.quant import codebooks
from qalora_jax.quant import double
from qalora_jax.quant import qtensor
from qalora_jax.quant import quantizer


@dataclasses.dataclass(frozen=True)
class Float4(quantizer.Quantizer):
  """The nearest of 16 levels times absmax (Dettmers et al., 2023, Eq. 4 and App. E):

      scale = max|w| of the block     codes = nearest(w / scale)     dense = table[codes] * scale

  kind: 'nf4' or 'fp4' (E2M1).  `double`: the scales in 8 bits (`double.compress`): at blocks of 64 on large matrices
  4.127 bits per weight instead of 4.5.  Tables, ties and blocks are those of bitsandbytes, which cuts blocks from the
  flattened [outputs, inputs] matrix: equal to it where the block divides the inputs, as is required here.
  There is no offset, until QA-LoRA or a refinement adds one.  Raises ValueError for another kind.
  """

  bits: int = dataclasses.field(default=4, init=False)
  group: int = 64
  kind: str = 'nf4'
  double: bool = False
  scale_dtype: str = 'float32'

  def __post_init__(self):
    if self.kind not in codebooks.CODEBOOKS:
      raise ValueError(f'kind = {self.kind!r}; it is one of {tuple(codebooks.CODEBOOKS)}.')
    if self.scale_dtype not in quantizer.SCALE_DTYPES:
      raise ValueError(f'scale_dtype = {self.scale_dtype!r}; it is one of {quantizer.SCALE_DTYPES}.')

  @property
  def levels(self) -> str:
    return self.kind

  def fit(self, grouped) -> tuple[jax.Array, None]:
    return jnp.abs(grouped).max(-2).astype(self.scale_dtype), None

  def encode(self, w, scale, offset) -> jax.Array:
    shifted = w if offset is None else w - offset.astype(jnp.float32)
    normal = shifted / jnp.where(scale == 0, 1.0, scale).astype(jnp.float32)
    if self.kind == 'nf4':
      return _nearest(codebooks.NF4, normal)
    # The sign is a bit of its own, so that there are two zeros.
    magnitudes = codebooks.FP4[:8]
    order = np.argsort(magnitudes)
    return jnp.asarray(order, jnp.int32)[_nearest(magnitudes[order], jnp.abs(normal))] + 8 * (normal < 0)

  def store(self, codes, scale, offset) -> qtensor.QTensor:
    return super().store(codes, double.compress(scale) if self.double else scale, offset)


def _nearest(levels: np.ndarray, values) -> jax.Array:
  """The int32 index of the nearest of increasing levels; halfway between two, the lower."""
  midpoints = jnp.asarray((levels[1:] + levels[:-1]) / 2)
  return jnp.searchsorted(midpoints, values, side='left', method='compare_all').astype(jnp.int32)
