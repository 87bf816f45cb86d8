"""How one weight becomes codes: a quantizer, and what is done with calibration inputs around it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qalora_jax.quant import gptq
from qalora_jax.quant import latent
from qalora_jax.quant import qtensor
from qalora_jax.quant import quantizer as quantizer_lib
from qalora_jax.quant import refine


@dataclasses.dataclass(frozen=True)
class Method:
  """A quantizer, rounding to nearest or GPTQ's (where `solver` has its options), then offsets refined or not.

  refined: the damping of `refine.refine`, or None.
  """

  quantizer: quantizer_lib.Quantizer
  solver: gptq.GPTQ | None = None
  refined: float | None = None

  @property
  def calibrated(self) -> bool:
    """Whether it needs the second moments of the weight's inputs."""
    return self.solver is not None or self.refined is not None

  def __call__(self, w, name: str = 'a weight', hessian=None) -> qtensor.QTensor:
    """The QTensor of w [I, O]; `hessian` [I, I] is the mean of x x^T over calibration inputs x.

    Without it inputs count as uncorrelated and equally large (the identity): GPTQ is then rounding to nearest.
    Raises ValueError where the group does not divide, or the damped Hessian is singular.
    """
    qtensor.check_group(w.shape[-2], self.quantizer.group, name)
    if hessian is None or self.solver is None:
      rounded = _rounded(self.quantizer, w)
      hessian = jnp.eye(w.shape[-2]) if hessian is None else hessian
    else:
      rounded = gptq.quantize(w, hessian, self.quantizer, self.solver, name)
    return rounded if self.refined is None else refine.refine(rounded, w, hessian, self.refined)


@functools.partial(jax.jit, static_argnums=0)
def _rounded(quantizer: quantizer_lib.Quantizer, w) -> qtensor.QTensor:
  return quantizer(w)


@dataclasses.dataclass(frozen=True)
class QAT:
  """Quantization-aware training: the weight trains in float32 and is used rounded by `quantizer`.

  learned: whether scales and offsets train too, or are fitted anew to the weight at every step.
  """

  quantizer: quantizer_lib.Quantizer
  learned: bool

  def __call__(self, w, name: str = 'a weight') -> latent.Latent:
    """The start of training from w [..., I, O]; ValueError, calling it `name`, where the group does not divide."""
    qtensor.check_group(w.shape[-2], self.quantizer.group, name)
    return latent.latent(w, self.quantizer, self.learned)
