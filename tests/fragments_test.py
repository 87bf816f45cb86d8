"""Packed words as the fragments of a matrix unit: the programs over registers, run on arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qalora_jax.kernels import fragments
from qalora_jax.quant import qtensor

FORMS = [(8, 'integer'), (4, 'integer'), (3, 'integer'), (2, 'integer'), (4, 'nf4'), (4, 'fp4')]
OUTPUTS = 256


def drawn(bits, levels):
  """Codes [BLOCK, OUTPUTS], of which every input sees each, their words by word of a unit, and scales by unit."""
  rng = np.random.default_rng(bits)
  every = np.arange(2**bits) - (2 ** (bits - 1) if levels == 'integer' else 0)
  codes = rng.permuted(np.resize(every, (fragments.BLOCK, OUTPUTS)), axis=1)
  planes = qtensor.pack(jnp.asarray(codes, jnp.int32), bits)
  by_unit = [plane.reshape(fragments.UNITS, -1, OUTPUTS) for plane in planes]
  words = [plane[:, at].T for plane in by_unit for at in range(plane.shape[1])]
  scale = jnp.asarray(rng.lognormal(-4, 2, (OUTPUTS, fragments.UNITS)), jnp.float32)
  return codes, words, scale


def made(bits, levels, words, scale):
  """All chunks' fragments side by side, float32 [OUTPUTS, BLOCK]."""
  chunks = []
  for chunk in range(fragments.CHUNKS):
    held = [words[at] for at in fragments.words(bits, chunk)]
    chunks.append(fragments.weights_of(bits, levels, chunk, held, scale))
  return np.asarray(jnp.concatenate(chunks, axis=-1), np.float32)


@pytest.mark.parametrize(('bits', 'levels'), FORMS)
def test_every_input_has_one_place(bits, levels):
  np.testing.assert_array_equal(np.sort(fragments.order(bits, levels)), np.arange(fragments.BLOCK))


@pytest.mark.parametrize(('bits', 'levels'), FORMS)
def test_codes_are_exact(bits, levels):
  """Under a scale of one a fragment is the levels, in bfloat16."""
  codes, words, scale = drawn(bits, levels)
  level = qtensor.level(jnp.asarray(codes, jnp.int32), levels).astype(jnp.bfloat16)
  wanted = np.asarray(level, np.float32).T[:, fragments.order(bits, levels)]
  np.testing.assert_array_equal(made(bits, levels, words, jnp.ones_like(scale)), wanted)


@pytest.mark.parametrize(('bits', 'levels'), FORMS)
def test_scaled_as_if_in_float32(bits, levels):
  """level * scale is rounded once: 2^-8, half of bfloat16's last place; the rest is `scaled`'s, of two parts each.

  A level of a codebook is itself here, not its nearest bfloat16, which is up to 0.31 % away.
  """
  codes, words, scale = drawn(bits, levels)
  level = np.asarray(qtensor.level(jnp.asarray(codes, jnp.int32), levels), np.float64)
  exact = (level * np.repeat(np.asarray(scale, np.float64).T, fragments.UNIT, axis=0)).T
  exact = exact[:, fragments.order(bits, levels)]
  before, found = (1 if levels == 'integer' else 3) * 2**-15, made(bits, levels, words, scale)
  assert np.all(np.abs(found - exact) <= (before + 2**-8 * (1 + before)) * np.abs(exact))
  # What comes before the rounding seldom changes its result.
  assert np.mean(found == exact.astype(jnp.bfloat16).astype(np.float64)) > 0.98


def test_offsets_in_parts():
  """Eight products of the parts of two numbers are their product to float32's accuracy."""
  rng = np.random.default_rng(0)
  offset, other = (jnp.asarray(rng.normal(size=(OUTPUTS, fragments.UNITS)), jnp.float32) for _ in range(2))
  held = np.asarray(fragments.offsets_of(offset), np.float64).reshape(OUTPUTS, -1, fragments.UNITS)
  parts, rest = [], other
  for _ in range(3):
    parts.append(jax.lax.reduce_precision(rest, 8, 7))
    rest = rest - parts[-1]
  product = sum(held[:, tile] * np.asarray(parts[at], np.float64) for tile, (_, at) in enumerate(fragments.PARTS))
  exact = np.asarray(offset, np.float64) * np.asarray(other, np.float64)
  np.testing.assert_allclose(product, exact, rtol=2**-23)


@pytest.mark.parametrize('selector', [0x3210, 0x7654, 0x5140, 0x7362, 0x4140])
def test_permute(selector):
  """Bytes by the definition of PTX's prmt."""
  a, b = 0x33221100, 0x77665544
  together = b << 32 | a
  wanted = sum((together >> 8 * (selector >> 4 * at & 7) & 0xFF) << 8 * at for at in range(4))
  assert int(fragments.Arrays.permute(jnp.uint32(a), jnp.uint32(b), selector)) == wanted
