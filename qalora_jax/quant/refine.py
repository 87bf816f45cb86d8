"""Offsets that make up for rounding: the best ones there are for given codes and scales, in closed form.

I inputs, O outputs, G group size, L groups (I // G).
"""

import jax
import jax.numpy as jnp

from qalora_jax.quant import qtensor


def refine(q: qtensor.QTensor, w, hessian, damping: float = 0.01) -> qtensor.QTensor:
  """q with the offsets that bring x @ q nearest to x @ w, w [I, O], over the calibration inputs x.

  hessian [I, I] is the mean of x x^T over the tokens and P [I, L] says which group an input is in, so that an offset
  changes by delta [L, O] where the matrix changes by P delta:

      delta = (P^T hessian P + damping * m)^-1 P^T hessian (w - q)     m = mean(diag(P^T hessian P)) * identity

  the minimum of  tr(E^T hessian E) + damping * m |delta|^2,  E = w - q - P delta.  So the output error on the same
  tokens (`errors.output_error`) is at most what it was.  It is what a QA-LoRA adapter of full rank could learn towards
  that end, and is merged as one.  Codes without an offset (symmetric ones, NF4, FP4) get one, in float32; a float16
  offset stays float16, and the promise then holds but for its rounding.  Offsets are no longer multiples of the
  scale: a format with integer zero-points cannot hold them.  Codes and scales stay, and so does everything where
  the Hessian is 0.  With damping = 0 the pooled Hessian has to be positive definite; offsets are NaN where it is not.
  """
  pooled, half = pool(hessian.astype(jnp.float32), q.group)
  mean = jnp.diagonal(pooled).mean()
  damped = pooled + jnp.where(mean == 0, 1.0, damping * mean) * jnp.eye(q.groups)
  missing = jnp.matmul(half, w.astype(jnp.float32) - qtensor.dequantize(q), precision=jax.lax.Precision.HIGHEST)
  delta = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(damped, lower=True), missing)
  dtype = jnp.float32 if q.offset is None else q.offset.dtype
  return q.replace(offset=(qtensor.offsets(q) + delta).astype(dtype))


def pool(hessian, group: int) -> tuple[jax.Array, jax.Array]:
  """P^T hessian P [L, L] and P^T hessian [L, I], of pooled inputs x P [L]: the sums over every `group` inputs of x [I].

  They are the means over the tokens of (x P)^T (x P) and (x P)^T x.  Raises ValueError where `group` does not divide
  the inputs; -1 is a group of them all.
  """
  I = hessian.shape[0]
  group = qtensor.check_group(I, group, 'a Hessian')
  half = hessian.reshape(I // group, group, I).sum(1)
  return half.reshape(I // group, I // group, group).sum(2), half
