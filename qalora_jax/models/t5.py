"""T5 (Raffel et al., 2020) and T5 v1.1 (Shazeer, 2020), an encoder and a decoder, as functional linen modules.

B batch, T tokens of the decoder, S inputs of the encoder, P places in either, D model, F mlp, H heads, C head width,
R buckets, M the distance from which on all keys share a bucket, V vocabulary.

Generation keeps what the decoder takes from the encoder, which no later token changes, in a collection of its own:

    given/decoder/cross/k, v      [N, B, S, H, C] keys and values of the inputs, made once
    given/input_segments          [B, S]
"""

from collections.abc import Callable
import dataclasses
import functools
import math

from flax import linen as nn
import jax.numpy as jnp
import numpy as np

from qalora_jax.models import attention
from qalora_jax.models import layers
from qalora_jax.models import linear
from qalora_jax.models import norms

# feed_forward_proj of config.json: the nonlinearity, and whether a gate goes through it rather than the values.
FEED_FORWARDS = {'relu': (nn.relu, False), 'gated-gelu': (functools.partial(nn.gelu, approximate=True), True)}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A T5's shapes and constants; `dtype` is that of the arithmetic.

  `max_position_embeddings`: the inputs that it was trained on (n_positions); relative positions go on beyond it.
  `tie_word_embeddings`: the head is the embedding, its inputs scaled by D^(-1/2); else one of its own, unscaled (v1.1).
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_decoder_layers: int
  num_attention_heads: int
  head_dim: int
  max_position_embeddings: int = 512
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6
  feed_forward_proj: str = 'relu'
  tie_word_embeddings: bool = True
  decoder_start_token_id: int = 0
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  family: str = 't5'

  def __post_init__(self):
    if self.feed_forward_proj not in tuple(FEED_FORWARDS):
      raise ValueError(f'feed_forward_proj = {self.feed_forward_proj!r}; it is one of {", ".join(FEED_FORWARDS)}.')
    number, longest = self.relative_attention_num_buckets, self.relative_attention_max_distance
    if number < 4 or number % 2:
      raise ValueError(f'relative_attention_num_buckets = {number}; it is an even number of at least 4.')
    if longest <= number // 2:
      raise ValueError(
        f'relative_attention_max_distance = {longest}; it is beyond the {number // 2} distances that have a bucket of '
        'their own.'
      )
    if not 0 <= self.decoder_start_token_id < self.vocab_size:
      raise ValueError(
        f'decoder_start_token_id = {self.decoder_start_token_id} and the model embeds {self.vocab_size}.'
      )
    layers.check_remat(self.remat)

  @property
  def gated(self) -> bool:
    """Whether the feed-forward part has a gate."""
    return FEED_FORWARDS[self.feed_forward_proj][1]

  @property
  def depths(self) -> dict[str, int]:
    """{stack: layers}."""
    return {linear.ENCODER: self.num_hidden_layers, linear.DECODER: self.num_decoder_layers}

  @property
  def sequence(self) -> dict[str, dict]:
    """{stack: {method of its block: lines of matrices}}."""
    attend = (('attention/q_proj', 'attention/k_proj', 'attention/v_proj'), ('attention/o_proj',))
    consult = (('cross/q_proj',), ('cross/k_proj', 'cross/v_proj'), ('cross/o_proj',))
    wide = ('mlp/gate_proj', 'mlp/up_proj') if self.gated else ('mlp/up_proj',)
    feed = (wide, ('mlp/down_proj',))
    return {
      linear.ENCODER: {'attend': attend, 'feed': feed},
      linear.DECODER: {'attend': attend, 'consult': consult, 'feed': feed},
    }


def buckets(number: int, longest: int, *, both: bool) -> np.ndarray:
  """The bucket of every distance key - query from -M to M, [2M + 1]; nearer than -M or M counts what lies beyond.

  With n buckets of a direction, distances d < e = n / 2 have one each, and d >= e share bucket
  min(n - 1, e + floor((n - e) log(d / e) / log(M / e))).  `both`: keys after the query have the upper half of the
  `number` buckets (n = number / 2); else they are never seen and count as d = 0 (n = number).
  """
  distance = np.arange(-longest, longest + 1)
  own = number // 2 if both else number
  exact = own // 2
  d = np.abs(distance) if both else np.maximum(-distance, 0)
  # In float32 and in this order, as the published models were trained: whole results are rounded alike.
  ratio = np.log(np.maximum(d, exact).astype(np.float32) / np.float32(exact)) / np.float32(math.log(longest / exact))
  far = np.minimum(exact + (ratio * np.float32(own - exact)).astype(np.int32), own - 1)
  found = np.where(d < exact, d, far)
  return (found + own * (distance > 0) if both else found).astype(np.int32)


def bias(config: ModelConfig, table_RH, *, both: bool) -> Callable:
  """`bias` of `attention.attend`: the table's entries for the buckets of the distances between keys and queries."""
  longest = config.relative_attention_max_distance
  numbers = buckets(config.relative_attention_num_buckets, longest, both=both)

  def between(queries_P, keys_S):
    distance_PS = keys_S[..., None, :] - queries_P[..., :, None]
    found = jnp.asarray(table_RH, jnp.float32)[numbers][jnp.clip(distance_PS, -longest, longest) + longest]
    found = jnp.moveaxis(found, -1, -3)
    return found if found.ndim == 4 else found[None]

  return between


class Attention(nn.Module):
  """Attention without a scale; where a table of distances counts, `bias` says what it adds."""

  config: ModelConfig
  scheme: linear.Scheme

  def setup(self):
    c = self.config
    wide = lambda: linear.Linear(c.num_attention_heads * c.head_dim, ('embed', 'heads'), self.scheme)
    self.q_proj, self.k_proj, self.v_proj = wide(), wide(), wide()
    self.o_proj = linear.Linear(c.hidden_size, ('heads', 'embed'), self.scheme)

  def among(self, x_BSD, segments_BS, bias: Callable):
    """Of an encoder: to all inputs of the segment."""
    q, k, v = (self._heads(project, x_BSD) for project in (self.q_proj, self.k_proj, self.v_proj))
    how = dict(sees=attention.everything, scale=1.0, bias=bias)
    return self._out(attention.attend(q, k, v, segments_BS, **how))

  def earlier(self, x_BTD, positions_BT, segments_BT, bias: Callable):
    """Of a decoder: to earlier tokens of the row, and to the past where the variables hold one."""
    q, k, v = (self._heads(project, x_BTD) for project in (self.q_proj, self.k_proj, self.v_proj))
    how = dict(scale=1.0, bias=bias)
    return self._out(attention.attend_or_continue(self, q, k, v, positions_BT, segments_BT, **how))

  def across(self, x_BTD, encoded_BSD, segments_BT, segments_BS):
    """Of a decoder: to what the encoder made of all inputs of the segment; keys and values that are given are read."""
    q = self._heads(self.q_proj, x_BTD)
    if self.has_variable(attention.GIVEN, 'k'):
      k, v = (self.get_variable(attention.GIVEN, name) for name in ('k', 'v'))
    else:
      k, v = (self._heads(project, encoded_BSD) for project in (self.k_proj, self.v_proj))
      attention.give(self, k=k, v=v)
    how = dict(sees=attention.everything, scale=1.0)
    return self._out(attention.attend(q, k, v, segments_BT, segments_BS, **how))

  def _heads(self, project, x_BPD):
    return project(x_BPD).reshape(*x_BPD.shape[:2], self.config.num_attention_heads, self.config.head_dim)

  def _out(self, y_BPHC):
    return self.o_proj(y_BPHC.reshape(*y_BPHC.shape[:2], -1))


class MLP(nn.Module):
  """down(relu(up(x))), or down(gelu(gate(x)) * up(x)) with the tanh form of GELU (Shazeer, 2020)."""

  config: ModelConfig
  scheme: linear.Scheme

  @nn.compact
  def __call__(self, x):
    c = self.config
    act, gated = FEED_FORWARDS[c.feed_forward_proj]
    wide = lambda name: linear.Linear(c.intermediate_size, ('embed', 'mlp'), self.scheme, name=name)(x)
    h = act(wide('gate_proj')) * wide('up_proj') if gated else act(wide('up_proj'))
    return linear.Linear(c.hidden_size, ('mlp', 'embed'), self.scheme, name='down_proj')(h)


class EncoderBlock(nn.Module):
  """One pre-norm layer of the encoder: `attend`, then `feed`."""

  config: ModelConfig
  scheme: linear.Scheme

  def setup(self):
    norm = lambda: norms.RMSNorm(self.config.layer_norm_epsilon, self.scheme)
    self.attention_norm, self.mlp_norm = norm(), norm()
    self.attention = Attention(self.config, self.scheme)
    self.mlp = MLP(self.config, self.scheme)

  def attend(self, x_BSD, layer, table_RH, segments_BS):
    """x + attention(norm(x)), every input seeing all of its segment."""
    del layer
    return x_BSD + self.attention.among(self.attention_norm(x_BSD), segments_BS, bias(self.config, table_RH, both=True))

  def feed(self, x_BSD):
    """x + mlp(norm(x))."""
    return x_BSD + self.mlp(self.mlp_norm(x_BSD))

  def __call__(self, x_BSD, layer, *context):
    return self.feed(self.attend(x_BSD, layer, *context)), None


class DecoderBlock(nn.Module):
  """One pre-norm layer of the decoder: `attend`, `consult` the encoder's output, then `feed`."""

  config: ModelConfig
  scheme: linear.Scheme

  def setup(self):
    norm = lambda: norms.RMSNorm(self.config.layer_norm_epsilon, self.scheme)
    self.attention_norm, self.cross_norm, self.mlp_norm = norm(), norm(), norm()
    self.attention = Attention(self.config, self.scheme)
    self.cross = Attention(self.config, self.scheme)
    self.mlp = MLP(self.config, self.scheme)

  def attend(self, x_BTD, layer, table_RH, positions_BT, segments_BT, encoded_BSD, segments_BS):
    """x + attention(norm(x)), causal."""
    del layer, encoded_BSD, segments_BS
    between = bias(self.config, table_RH, both=False)
    return x_BTD + self.attention.earlier(self.attention_norm(x_BTD), positions_BT, segments_BT, between)

  def consult(self, x_BTD, layer, table_RH, positions_BT, segments_BT, encoded_BSD, segments_BS):
    """x + cross(norm(x), encoded)."""
    del layer, table_RH, positions_BT
    return x_BTD + self.cross.across(self.cross_norm(x_BTD), encoded_BSD, segments_BT, segments_BS)

  def feed(self, x_BTD):
    """x + mlp(norm(x))."""
    return x_BTD + self.mlp(self.mlp_norm(x_BTD))

  def __call__(self, x_BTD, layer, *context):
    x_BTD = self.attend(x_BTD, layer, *context)
    return self.feed(self.consult(x_BTD, layer, *context)), None


class T5(nn.Module):
  """tokens [B, T] of the decoder, inputs [B, S] of the encoder -> logits [B, T, V] float32.

  Logits t are of token t + 1; the first token is `decoder_start_token_id`.  Segments keep apart what shares a row: a
  token sees earlier tokens of its own segment and the inputs of the same segment, an input those of its own; 0 is
  padding.  Without segments a row is one pair.  `positions` [B, T] are read where the variables hold a past alone:
  distances within a row need none.  With `only_BP` the logits are those of P tokens of every row, by their places.

  Where no inputs are said, they are those that the variables hold ('given'), else the tokens themselves.
  """

  config: ModelConfig
  scheme: linear.Scheme = linear.Scheme()

  def setup(self):
    c = self.config
    born = lambda name, deviation, shape, axes: linear.weight(
      self, self.scheme, name, linear.dense_init(self.scheme, nn.initializers.normal(deviation), shape, axes)
    )
    self.embedding_VD = born('embedding', 1.0, (c.vocab_size, c.hidden_size), ('vocab', 'embed'))
    tables = (c.relative_attention_num_buckets, c.num_attention_heads)
    self.encoder_table_RH = born('encoder_table', 0.02, tables, ('buckets', 'heads'))
    self.decoder_table_RH = born('decoder_table', 0.02, tables, ('buckets', 'heads'))
    if self.is_initializing():
      for block, stack in ((EncoderBlock, linear.ENCODER), (DecoderBlock, linear.DECODER)):
        for name, part in layers.newborn(block, c, self.scheme, stack).items():
          setattr(self, name, part)
    self.encoder_norm = norms.RMSNorm(c.layer_norm_epsilon, self.scheme)
    self.decoder_norm = norms.RMSNorm(c.layer_norm_epsilon, self.scheme)
    if not c.tie_word_embeddings:
      self.lm_head = linear.Linear(c.vocab_size, ('embed', 'vocab'), self.scheme)

  def __call__(
    self, tokens_BT, segments_BT=None, positions_BT=None, inputs_BS=None, input_segments_BS=None, only_BP=None
  ):
    x_BTD = self.hidden(tokens_BT, segments_BT, positions_BT, inputs_BS, input_segments_BS)
    if only_BP is not None:
      x_BTD = jnp.take_along_axis(x_BTD, only_BP[:, :, None], axis=1)
    return self.head(x_BTD)

  def hidden(self, tokens_BT, segments_BT=None, positions_BT=None, inputs_BS=None, input_segments_BS=None):
    """What the decoder's layers make of tokens, [B, T, D]: all of the model but `head`."""
    if self.has_variable(attention.GIVEN, 'input_segments') and inputs_BS is None:
      encoded_BSD, input_segments_BS = None, self.get_variable(attention.GIVEN, 'input_segments')
    else:
      inputs_BS, input_segments_BS = (tokens_BT, segments_BT) if inputs_BS is None else (inputs_BS, input_segments_BS)
      if input_segments_BS is None:
        input_segments_BS = jnp.ones(inputs_BS.shape, jnp.int32)
      encoded_BSD = self.encode(inputs_BS, input_segments_BS)
      attention.give(self, input_segments=input_segments_BS)
    if segments_BT is None:
      segments_BT = jnp.ones(tokens_BT.shape, jnp.int32)
    context = (self.decoder_table_RH, positions_BT, segments_BT, encoded_BSD, input_segments_BS)
    return layers.through(self, DecoderBlock, linear.DECODER, self.embed(tokens_BT), *context)

  def encode(self, inputs_BS, segments_BS):
    """What the encoder makes of inputs, [B, S, D]."""
    context = (self.encoder_table_RH, segments_BS)
    return self.encoder_norm(layers.through(self, EncoderBlock, linear.ENCODER, self.embed(inputs_BS), *context))

  def embed(self, tokens_BP):
    """The first layer's input [B, P, D], of either stack."""
    return linear.look_up(self.embedding_VD, tokens_BP).astype(self.config.dtype)

  def normed(self, x_BPD):
    """The input of the head, of the last layer's output; a tied head's is scaled."""
    x_BPD = self.decoder_norm(x_BPD)
    return x_BPD * self.config.hidden_size**-0.5 if self.config.tie_word_embeddings else x_BPD

  def head(self, x_BPD):
    """The last norm and the logits [B, P, V] of what `hidden` made of P tokens; each depends on its own token alone."""
    own = None if self.config.tie_word_embeddings else self.lm_head
    return layers.logits(self.normed(x_BPD), self.embedding_VD, own)
