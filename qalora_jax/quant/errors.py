"""How far a quantized matrix is from the one it stands for: in its weights, and in what it makes of its inputs."""

import jax
import jax.numpy as jnp


def output_error(dense, w, hessian) -> jax.Array:
  """tr((dense - w)^T hessian (dense - w)) of matrices [I, O].

  That is the mean of |x @ dense - x @ w|^2 over the tokens whose mean of x x^T is `hessian` [I, I].
  """
  return _energy(dense - w, hessian)


def relative_output_error(dense, w, hessian) -> jax.Array:
  """`output_error` over the mean |x @ w|^2: the share of the output's energy that is error."""
  return _energy(dense - w, hessian) / _energy(w, hessian)


def weight_error(dense, w) -> jax.Array:
  """|dense - w|^2 / |w|^2, whatever the inputs."""
  return jnp.sum(jnp.square(dense - w)) / jnp.sum(jnp.square(w))


def _energy(w, hessian) -> jax.Array:
  return jnp.sum(w * jnp.matmul(hessian, w, precision=jax.lax.Precision.HIGHEST))
