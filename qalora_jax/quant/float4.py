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

  kind: 'nf4' or 'fp4'; on Gaussian weights NF4 errs less than symmetric integers in as many bits, FP4 more.  `double`:
  the scales in 8 bits (`double.compress`): at blocks of 64 on large matrices 4.127 bits per weight instead of 4.5.
  There is no offset, until QA-LoRA or a refinement adds one.

  On a CPU, codes, scales and dense values are those of bitsandbytes' torch code (`backends/default`) to the last bit.
  It cuts blocks from the flattened [outputs, inputs] matrix: the same ones where the block divides the inputs, as is
  required here.  Halfway between two levels the lower is taken.  Its CUDA kernels have a fast reciprocal, and for FP4
  thresholds of six digits, the smaller magnitude at a tie, and the second zero (code 8) just below 0 instead of above;
  a block of zeros gets NF4's code 0 there, here that of 0.

  Raises ValueError for another kind, and for `double` with a scale_dtype that it would not keep.
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
    if self.double and self.scale_dtype != 'float32':
      raise ValueError(f'scale_dtype = {self.scale_dtype!r} with double = True, which stores 8 bits; leave it float32.')

  @property
  def levels(self) -> str:
    return self.kind

  def fit(self, grouped) -> tuple[jax.Array, None]:
    return quantizer.stored_scale(jnp.abs(grouped).max(-2), self.scale_dtype), None

  def encode(self, w, scale, offset) -> jax.Array:
    shifted = w if offset is None else w - offset.astype(jnp.float32)
    scale = scale.astype(jnp.float32)
    # Its reciprocal would be infinite; such a block is 0 to within the smallest float.
    vanishes = jnp.abs(scale) < jnp.finfo(jnp.float32).tiny
    normal = shifted * (1.0 / jnp.where(vanishes, 1.0, scale))
    table = codebooks.CODEBOOKS[self.kind]
    order = np.argsort(table, kind='stable')
    return jnp.asarray(order, jnp.int32)[codebooks.nearest(table[order], normal)]

  def store(self, codes, scale, offset) -> qtensor.QTensor:
    return super().store(codes, double.compress(scale) if self.double else scale, offset)
