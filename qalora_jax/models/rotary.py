"""Rotary position embedding (Su et al., 2021).  B batch, T time, H heads, C head width."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Stretch:
  """LLaMA-3's stretching of the rotary wavelengths (names as in Hugging Face's rope_scaling, rope_type 'llama3')."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class Interpolation:
  """Positions divided by `factor` (Chen et al., 2023); rope_type 'linear'."""

  factor: float


SCALINGS = {'llama3': Stretch, 'linear': Interpolation}


def frequencies(theta: float, width: int, scaling: Stretch | Interpolation | None = None) -> jax.Array:
  """Radians per position of each of the C / 2 rotations: theta^(-2i / C), scaled where `scaling` says.

  Stretch: wavelengths longer than original / low_freq_factor are divided in frequency by `factor`, those shorter
  than original / high_freq_factor stay, and between them the two are interpolated.
  """
  exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / width
  plain = theta**-exponents
  if scaling is None:
    return plain
  if isinstance(scaling, Interpolation):
    return plain / scaling.factor
  turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
  keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
  keep = jnp.clip(keep, 0.0, 1.0)
  return plain * (keep + (1.0 - keep) / scaling.factor)


def rotate(x_BTHC, positions_BT, frequencies) -> jax.Array:
  """x turned by position * frequency, entry i paired with i + C / 2 as Hugging Face's checkpoints have them."""
  angles = positions_BT.astype(jnp.float32)[..., None, None] * frequencies.reshape(1, 1, 1, -1)
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x_BTHC.dtype)
