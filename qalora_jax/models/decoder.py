"""Decoders as functional linen modules: LLaMA (Touvron et al., 2023), its relatives, and GPT-2, by configuration.

B batch, T time, P places in it, D model, F mlp, H heads, K key/value heads, C head width, V vocabulary.
"""

import dataclasses
import functools

from flax import linen as nn
import jax.numpy as jnp
import numpy as np

from qalora_jax.models import attention
from qalora_jax.models import layers
from qalora_jax.models import linear
from qalora_jax.models import norms
from qalora_jax.models import rotary

# By the names of Hugging Face's hidden_act; gelu_new and gelu_pytorch_tanh are one function.
ACTIVATIONS = {
  'silu': nn.silu,
  'relu': nn.relu,
  'gelu': functools.partial(nn.gelu, approximate=False),
  'gelu_new': functools.partial(nn.gelu, approximate=True),
  'gelu_pytorch_tanh': functools.partial(nn.gelu, approximate=True),
}
NORMS = ('rms', 'layer')
# What the attention of a layer sees: all that came before, or a window of it.
FULL, SLIDING = KINDS = ('full_attention', 'sliding_attention')
QUERY_KEY_VALUE = ('attention/q_proj', 'attention/k_proj', 'attention/v_proj')
ATTENTION = (*QUERY_KEY_VALUE, 'attention/o_proj')
MLP_IN = ('mlp/gate_proj', 'mlp/up_proj')


@dataclasses.dataclass(frozen=True)
class Config:
  """A decoder's shapes and constants; those that LLaMA has are named as in its config.json.

  rope_theta, rope_scaling: of the rotary positions of layers that see everything; theta 0: there are none.
  local_theta, local_scaling: of layers that see a window (Gemma 3); theta 0: as the others.
  learned_positions: whether a learned vector is added for each of max_position_embeddings places (GPT-2).
  rms_norm_eps: of every norm, whichever it is.
  dtype: of the arithmetic.  remat: a word of layers.REMAT.  family: the model_type of its config.json.
  activation: a name of ACTIVATIONS.  gated: down(act(gate(x)) * up(x)); else down(act(up(x))).
  norm: 'rms', or 'layer' (with a bias).  norm_shift: what is added to the scales of RMS norms (Gemma stores scale - 1).
  biased: the matrices of a block that have a bias, such as attention/q_proj.
  head_norms: RMS norms of each head's queries and keys before they are turned (Qwen 3, Gemma 3).
  post_norms: norms of what attention and mlp give, before it is added (Gemma 2 and 3).
  kinds: what each layer's attention sees, FULL or SLIDING; empty: SLIDING with a window, FULL without.
  window: the places that SLIDING sees, its own among them.
  attention_scale: what scores are multiplied by; 0: head_dim^(-1/2).
  attention_cap, logit_cap: c of c * tanh(x / c) on scores and on logits; 0: none.
  embedding_scale: what embeddings are multiplied by, rounded to dtype first (Gemma: D^(1/2)).
  """

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
  activation: str = 'silu'
  gated: bool = True
  norm: str = 'rms'
  norm_shift: float = 0.0
  biased: tuple[str, ...] = ()
  head_norms: bool = False
  post_norms: bool = False
  kinds: tuple[str, ...] = ()
  window: int = 0
  attention_scale: float = 0.0
  attention_cap: float = 0.0
  logit_cap: float = 0.0
  embedding_scale: float = 1.0
  learned_positions: bool = False
  local_theta: float = 0.0
  local_scaling: rotary.Stretch | rotary.Interpolation | None = None

  def __post_init__(self):
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f'num_attention_heads = {self.num_attention_heads} is no multiple of '
        f'num_key_value_heads = {self.num_key_value_heads}.'
      )
    layers.check_remat(self.remat)
    for field, words in (('activation', ACTIVATIONS), ('norm', NORMS)):
      if getattr(self, field) not in words:
        raise ValueError(f'{field} = {getattr(self, field)!r}; it is one of {", ".join(words)}.')
    if not self.head_dim:
      object.__setattr__(self, 'head_dim', self.hidden_size // self.num_attention_heads)
    if len(self.seen) != self.num_hidden_layers or not set(self.seen) <= set(KINDS):
      raise ValueError(f'layer_types = {list(self.kinds)}; it has one of {", ".join(KINDS)} for every layer.')
    if SLIDING in self.seen and self.window < 1:
      raise ValueError(f'sliding_window = {self.window!r}, and layers of {SLIDING} see at least 1 place.')

  @property
  def seen(self) -> tuple[str, ...]:
    """The kind of every layer."""
    return self.kinds or (SLIDING if self.window else FULL,) * self.num_hidden_layers

  @property
  def cut_short(self) -> bool:
    """Whether tokens of some layer see less than all that came before within the model's window."""
    return SLIDING in self.seen and self.window < self.max_position_embeddings

  @property
  def depths(self) -> dict[str, int]:
    """{stack: layers}."""
    return {linear.STACK: self.num_hidden_layers}

  @property
  def sequence(self) -> dict[str, dict]:
    """{stack: {method of Block: lines of matrices}}."""
    feed = (MLP_IN if self.gated else MLP_IN[1:], ('mlp/down_proj',))
    return {linear.STACK: {'attend': (QUERY_KEY_VALUE, ATTENTION[3:]), 'feed': feed}}


def _norm(config: Config, scheme: linear.Scheme, **name) -> nn.Module:
  """The norm that the model has between its blocks' parts."""
  if config.norm == 'layer':
    return norms.LayerNorm(config.rms_norm_eps, scheme, **name)
  return norms.RMSNorm(config.rms_norm_eps, scheme, config.norm_shift, **name)


def _linear(config: Config, scheme: linear.Scheme, part: str, name: str, features: int, axes) -> nn.Module:
  """The projection `part`/`name` of a block."""
  return linear.Linear(features, axes, scheme, biased=f'{part}/{name}' in config.biased, name=name)


def _sees(config: Config, layer):
  """Who sees whom in the layer of this number, which may be traced."""
  if SLIDING not in config.seen:
    return attention.causal
  if FULL not in config.seen:
    return functools.partial(attention.within, config.window)
  windows = [config.window if kind == SLIDING else np.iinfo(np.int32).max for kind in config.seen]
  return functools.partial(attention.within, jnp.asarray(windows, jnp.int32)[layer])


def _frequencies(config: Config, layer):
  """Radians per position of the rotations of the layer of this number, [C / 2]."""
  c = config
  whole = rotary.frequencies(c.rope_theta, c.head_dim, c.rope_scaling)
  if not c.local_theta or SLIDING not in c.seen:
    return whole
  local = rotary.frequencies(c.local_theta, c.head_dim, c.local_scaling)
  return jnp.where(jnp.asarray([kind == SLIDING for kind in c.seen])[layer], local, whole)


class Attention(nn.Module):
  """Causal attention with grouped queries, within segments, and to a past where the variables hold one."""

  config: Config
  scheme: linear.Scheme

  @nn.compact
  def __call__(self, x_BTD, layer, positions_BT, segments_BT):
    c = self.config
    B, T, _ = x_BTD.shape
    project = functools.partial(_linear, c, self.scheme, 'attention')

    def heads(name, number):
      y = project(name, number * c.head_dim, ('embed', 'heads'))(x_BTD)
      return y.reshape(B, T, number, c.head_dim)

    q_BTHC = heads('q_proj', c.num_attention_heads)
    k_BTKC = heads('k_proj', c.num_key_value_heads)
    v_BTKC = heads('v_proj', c.num_key_value_heads)
    if c.head_norms:
      q_BTHC = norms.RMSNorm(c.rms_norm_eps, self.scheme, c.norm_shift, name='q_norm')(q_BTHC)
      k_BTKC = norms.RMSNorm(c.rms_norm_eps, self.scheme, c.norm_shift, name='k_norm')(k_BTKC)
    if c.rope_theta:
      turn = functools.partial(rotary.rotate, positions_BT=positions_BT, frequencies=_frequencies(c, layer))
      q_BTHC, k_BTKC = turn(q_BTHC), turn(k_BTKC)
    how = dict(sees=_sees(c, layer), scale=c.attention_scale or None, cap=c.attention_cap)
    y_BTHC = attention.attend_or_continue(self, q_BTHC, k_BTKC, v_BTKC, positions_BT, segments_BT, **how)
    return project('o_proj', c.hidden_size, ('heads', 'embed'))(y_BTHC.reshape(B, T, -1))


class MLP(nn.Module):
  """down(act(gate(x)) * up(x)) (Shazeer, 2020), or down(act(up(x))) where it is not gated."""

  config: Config
  scheme: linear.Scheme

  @nn.compact
  def __call__(self, x):
    c, act = self.config, ACTIVATIONS[self.config.activation]
    project = functools.partial(_linear, c, self.scheme, 'mlp')
    wide = lambda name: project(name, c.intermediate_size, ('embed', 'mlp'))(x)
    h = act(wide('gate_proj')) * wide('up_proj') if c.gated else act(wide('up_proj'))
    return project('down_proj', c.hidden_size, ('mlp', 'embed'))(h)


class Block(nn.Module):
  """One pre-norm layer: `attend`, then `feed`; the (carry, None) signature is nn.scan's."""

  config: Config
  scheme: linear.Scheme

  def setup(self):
    c = self.config
    self.attention_norm = _norm(c, self.scheme)
    self.attention = Attention(c, self.scheme)
    self.mlp_norm = _norm(c, self.scheme)
    self.mlp = MLP(c, self.scheme)
    if c.post_norms:
      self.attention_post_norm = _norm(c, self.scheme)
      self.mlp_post_norm = _norm(c, self.scheme)

  def attend(self, x_BTD, layer, positions_BT, segments_BT):
    """x + attention(norm(x)), the latter normed again where there are post_norms."""
    y_BTD = self.attention(self.attention_norm(x_BTD), layer, positions_BT, segments_BT)
    return x_BTD + (self.attention_post_norm(y_BTD) if self.config.post_norms else y_BTD)

  def feed(self, x_BTD):
    """x + mlp(norm(x)), the latter normed again where there are post_norms."""
    y_BTD = self.mlp(self.mlp_norm(x_BTD))
    return x_BTD + (self.mlp_post_norm(y_BTD) if self.config.post_norms else y_BTD)

  def __call__(self, x_BTD, layer, *context):
    return self.feed(self.attend(x_BTD, layer, *context)), None


class Decoder(nn.Module):
  """tokens [B, T] -> logits [B, T, V] float32.

  In bfloat16 an untied head's logits are rounded to bfloat16 first, as in transformers; a tied head's are not.
  `segments` [B, T] keeps documents that share a row apart (a token sees earlier tokens of its own segment only);
  `positions` [B, T] are counted within them.  Without either, a row is one document.  With `only_BP` the logits are
  those of P tokens of every row, [B, P, V], by their places in the row.  Apply needs no `scheme`.
  """

  block = Block

  config: Config
  scheme: linear.Scheme = linear.Scheme()

  def setup(self):
    c = self.config
    normal = functools.partial(linear.dense_init, self.scheme, nn.initializers.normal(0.02))
    born = normal((c.vocab_size, c.hidden_size), ('vocab', 'embed'))
    self.embedding_VD = linear.weight(self, self.scheme, 'embedding', born)
    if c.learned_positions:
      born = normal((c.max_position_embeddings, c.hidden_size), ('norm', 'embed'))
      self.positions_SD = linear.weight(self, self.scheme, 'positions', born)
    if self.is_initializing():
      for name, born in layers.newborn(Block, c, self.scheme, linear.STACK).items():
        setattr(self, name, born)
    self.norm = _norm(c, self.scheme)
    if not c.tie_word_embeddings:
      self.lm_head = linear.Linear(c.vocab_size, ('embed', 'vocab'), self.scheme)

  def __call__(self, tokens_BT, segments_BT=None, positions_BT=None, only_BP=None):
    x_BTD = self.hidden(tokens_BT, segments_BT, positions_BT)
    if only_BP is not None:
      x_BTD = jnp.take_along_axis(x_BTD, only_BP[:, :, None], axis=1)
    return self.head(x_BTD)

  def hidden(self, tokens_BT, segments_BT=None, positions_BT=None):
    """What the layers make of tokens, [B, T, D]: all of the model but `head`."""
    if positions_BT is None:
      positions_BT = layers.in_order(tokens_BT)
    x_BTD = self.embed(tokens_BT, positions_BT)
    return layers.through(self, Block, linear.STACK, x_BTD, positions_BT, segments_BT)

  def embed(self, tokens_BT, positions_BT=None):
    """The first layer's input [B, T, D]; without positions every row is one document from its beginning."""
    c = self.config
    x_BTD = linear.look_up(self.embedding_VD, tokens_BT).astype(c.dtype)
    if c.embedding_scale != 1.0:
      x_BTD *= jnp.asarray(c.embedding_scale, c.dtype)
    if c.learned_positions:
      positions_BT = layers.in_order(tokens_BT) if positions_BT is None else positions_BT
      x_BTD += linear.look_up(self.positions_SD, positions_BT).astype(c.dtype)
    return x_BTD

  def normed(self, x_BPD):
    """The input of the head, of the last layer's output."""
    return self.norm(x_BPD)

  def head(self, x_BPD):
    """The last norm and the logits [B, P, V] of what `hidden` made of P tokens; each depends on its own token alone."""
    own = None if self.config.tie_word_embeddings else self.lm_head
    return attention.capped(layers.logits(self.normed(x_BPD), self.embedding_VD, own), self.config.logit_cap)
