"""LLaMA 1, 2 and 3 (Touvron et al., 2023; Dubey et al., 2024) as functional linen modules.

B batch, T time, P places in it, D model, F mlp, H heads, K key/value heads, C head width, V vocabulary.
"""

import dataclasses
import functools

from flax import linen as nn
import jax.numpy as jnp

from qalora_jax.models import attention
from qalora_jax.models import layers
from qalora_jax.models import linear
from qalora_jax.models import norms
from qalora_jax.models import rotary

# The matrices of a block in the order in which data flows, by the method of Block that applies them; those of one line
# have the same input.
SEQUENCE = {
  'attend': (('attention/q_proj', 'attention/k_proj', 'attention/v_proj'), ('attention/o_proj',)),
  'feed': (('mlp/gate_proj', 'mlp/up_proj'), ('mlp/down_proj',)),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A LLaMA's shapes and constants, named as in Hugging Face's config.json; `dtype` is that of the arithmetic."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  max_position_embeddings: int = 2048
  rope_theta: float = 10000.0
  rope_scaling: rotary.Stretch | rotary.Interpolation | None = None
  rms_norm_eps: float = 1e-6
  tie_word_embeddings: bool = False
  head_dim: int = 0
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  family: str = 'llama'

  def __post_init__(self):
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f'num_attention_heads = {self.num_attention_heads} is no multiple of '
        f'num_key_value_heads = {self.num_key_value_heads}.'
      )
    layers.check_remat(self.remat)
    if not self.head_dim:
      object.__setattr__(self, 'head_dim', self.hidden_size // self.num_attention_heads)

  @property
  def depths(self) -> dict[str, int]:
    """{stack: layers}."""
    return {linear.STACK: self.num_hidden_layers}

  @property
  def sequence(self) -> dict[str, dict]:
    """{stack: its SEQUENCE}."""
    return {linear.STACK: SEQUENCE}


class Attention(nn.Module):
  """Causal attention with grouped queries, within segments, and to a past where the variables hold one."""

  config: ModelConfig
  scheme: linear.Scheme

  @nn.compact
  def __call__(self, x_BTD, layer, positions_BT, segments_BT):
    del layer
    c = self.config
    B, T, _ = x_BTD.shape

    def project(name, heads):
      y = linear.Linear(heads * c.head_dim, ('embed', 'heads'), self.scheme, name=name)(x_BTD)
      return y.reshape(B, T, heads, c.head_dim)

    turn = functools.partial(
      rotary.rotate,
      positions_BT=positions_BT,
      frequencies=rotary.frequencies(c.rope_theta, c.head_dim, c.rope_scaling),
    )
    q_BTHC = turn(project('q_proj', c.num_attention_heads))
    k_BTKC = turn(project('k_proj', c.num_key_value_heads))
    v_BTKC = project('v_proj', c.num_key_value_heads)
    y_BTHC = attention.attend_or_continue(self, q_BTHC, k_BTKC, v_BTKC, positions_BT, segments_BT)
    return linear.Linear(c.hidden_size, ('heads', 'embed'), self.scheme, name='o_proj')(y_BTHC.reshape(B, T, -1))


class MLP(nn.Module):
  """SwiGLU (Shazeer, 2020): down(silu(gate(x)) * up(x))."""

  config: ModelConfig
  scheme: linear.Scheme

  @nn.compact
  def __call__(self, x):
    wide = lambda name: linear.Linear(self.config.intermediate_size, ('embed', 'mlp'), self.scheme, name=name)(x)
    h = nn.silu(wide('gate_proj')) * wide('up_proj')
    return linear.Linear(self.config.hidden_size, ('mlp', 'embed'), self.scheme, name='down_proj')(h)


class Block(nn.Module):
  """One pre-norm layer: `attend`, then `feed`; the (carry, None) signature is nn.scan's."""

  config: ModelConfig
  scheme: linear.Scheme

  def setup(self):
    self.attention_norm = norms.RMSNorm(self.config.rms_norm_eps, self.scheme)
    self.attention = Attention(self.config, self.scheme)
    self.mlp_norm = norms.RMSNorm(self.config.rms_norm_eps, self.scheme)
    self.mlp = MLP(self.config, self.scheme)

  def attend(self, x_BTD, layer, positions_BT, segments_BT):
    """x + attention(norm(x))."""
    return x_BTD + self.attention(self.attention_norm(x_BTD), layer, positions_BT, segments_BT)

  def feed(self, x_BTD):
    """x + mlp(norm(x))."""
    return x_BTD + self.mlp(self.mlp_norm(x_BTD))

  def __call__(self, x_BTD, layer, *context):
    return self.feed(self.attend(x_BTD, layer, *context)), None


class Llama(nn.Module):
  """tokens [B, T] -> logits [B, T, V] float32.

  In bfloat16 an untied head's logits are rounded to bfloat16 first, as in transformers; a tied head's are not.
  `segments` [B, T] keeps documents that share a row apart (a token sees earlier tokens of its own segment only);
  `positions` [B, T] are counted within them.  Without either, a row is one document.  With `only_BP` the logits are
  those of P tokens of every row, [B, P, V], by their places in the row.  Apply needs no `scheme`.
  """

  block = Block

  config: ModelConfig
  scheme: linear.Scheme = linear.Scheme()

  def setup(self):
    c = self.config
    init = linear.dense_init(
      self.scheme, nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), ('vocab', 'embed')
    )
    self.embedding_VD = linear.weight(self, self.scheme, 'embedding', init)
    if self.is_initializing():
      for name, born in layers.newborn(Block, c, self.scheme, linear.STACK).items():
        setattr(self, name, born)
    self.norm = norms.RMSNorm(c.rms_norm_eps, self.scheme)
    if not c.tie_word_embeddings:
      self.lm_head = linear.Linear(c.vocab_size, ('embed', 'vocab'), self.scheme)

  def __call__(self, tokens_BT, segments_BT=None, positions_BT=None, only_BP=None):
    x_BTD = self.hidden(tokens_BT, segments_BT, positions_BT)
    if only_BP is not None:
      x_BTD = jnp.take_along_axis(x_BTD, only_BP[:, :, None], axis=1)
    return self.head(x_BTD)

  def hidden(self, tokens_BT, segments_BT=None, positions_BT=None):
    """What the layers make of tokens, [B, T, D]: all of the model but `head`."""
    B, T = tokens_BT.shape
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    x_BTD = self.embed(tokens_BT)
    return layers.through(self, Block, linear.STACK, x_BTD, positions_BT, segments_BT)

  def embed(self, tokens_BT):
    """The first layer's input [B, T, D]."""
    return linear.look_up(self.embedding_VD, tokens_BT).astype(self.config.dtype)

  def normed(self, x_BPD):
    """The input of the head, of the last layer's output."""
    return self.norm(x_BPD)

  def head(self, x_BPD):
    """The last norm and the logits [B, P, V] of what `hidden` made of P tokens; each depends on its own token alone."""
    c = self.config
    x_BPD = self.normed(x_BPD)
    if c.tie_word_embeddings:
      logits = jnp.dot(x_BPD, self.embedding_VD.T.astype(c.dtype), preferred_element_type=jnp.float32)
    else:
      logits = self.lm_head(x_BPD)
    return logits.astype(jnp.float32)
