"""Small LLaMAs with random weights, and what it means that two trees or two programs agree."""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy_llama

from qalora_jax.models import decoder
from qalora_jax.models import rotary

# Every size differs from every other, so that no two axes can be confused; heads are wider than D / H.
PLAIN = decoder.Config(50, 24, 40, 3, 4, 2, max_position_embeddings=64, head_dim=8)
STRETCHED = dataclasses.replace(
  PLAIN,
  # Wavelengths of 6, 63 (theta 100 would give 20) and more: one band kept, one blended, one stretched.
  rope_theta=1000.0,
  rope_scaling=rotary.Stretch(8.0, 1.0, 4.0, original_max_position_embeddings=64),
)
CONFIGS = {
  'untied': PLAIN,
  'tied': dataclasses.replace(PLAIN, tie_word_embeddings=True),
  'own keys': dataclasses.replace(PLAIN, num_key_value_heads=4, head_dim=6),
  'llama3': STRETCHED,
}


def draw(config, seed=0):
  """A model's weights, norms included, at random."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda w: rng.normal(0.02, 0.2, w.shape).astype(np.float32), shapes(config))


@functools.cache
def shapes(config):
  made = jax.eval_shape(decoder.Decoder(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
  return nn.unbox(made)['frozen']


def same(tree, other):
  """Equal in structure, dtypes and bits."""
  assert jax.tree.structure(tree) == jax.tree.structure(other)
  for (path, one), two in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(other), strict=True):
    assert one.dtype == two.dtype and one.shape == two.shape, path
    assert np.asarray(one).tobytes() == np.asarray(two).tobytes(), path


def agrees_elsewhere(directory, model, variables, vocab_size):
  """The model's logits are those of numpy_llama.

  The tolerance is measured: numpy_llama runs in float64 and again in float32, and their largest difference is what
  float32 rounding does to this model on these tokens.  Ours is another float32 evaluation with its sums in another
  order and with XLA's exp and rsqrt (some ulps each), so it may stray a few times as far.
  """
  tokens = np.random.default_rng(1).integers(0, vocab_size, (2, 48))
  exact = numpy_llama.logits(directory, tokens)
  rounding = np.abs(numpy_llama.logits(directory, tokens, np.float32) - exact).max()
  ours = np.asarray(jax.jit(model.apply)(variables, jnp.asarray(tokens)))
  assert np.abs(ours - exact).max() <= 8 * rounding
  assert 8 * rounding < 1e-3 * np.abs(exact).max()
