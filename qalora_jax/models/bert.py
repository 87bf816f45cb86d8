"""BERT (Devlin et al., 2019) as functional linen modules: an encoder, and a head that says something of a sentence.

B batch, T time, P places in it, D model, F mlp, H heads, C head width, V vocabulary, S types, L labels.
"""

import dataclasses

from flax import linen as nn
import jax.numpy as jnp

from qalora_jax.adapters import lora
from qalora_jax.models import attention
from qalora_jax.models import layers
from qalora_jax.models import linear
from qalora_jax.models import norms

# The matrices of a block in the order in which data flows, by the method of Block that applies them.
SEQUENCE = {
  'attend': (('attention/q_proj', 'attention/k_proj', 'attention/v_proj'), ('attention/o_proj',)),
  'feed': (('mlp/up_proj',), ('mlp/down_proj',)),
}
# The modules of the head.
POOLER, CLASSIFIER = 'pooler', 'classifier'


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A BERT's shapes and constants, named as in Hugging Face's config.json; `dtype` is that of the arithmetic.

  labels: outputs of the classifier (1: a number); 0: there is none.  words: what its classes are called, if that is
  known.  pooler: whether there is one, as any classifier needs.  hidden_dropout_prob is that of embeddings and of what
  attention and mlp add, classifier_dropout that of the classifier's input; they act in training.  That of attention's
  weights (attention_probs_dropout_prob) is not computed.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  max_position_embeddings: int = 512
  type_vocab_size: int = 2
  layer_norm_eps: float = 1e-12
  hidden_dropout_prob: float = 0.1
  classifier_dropout: float = 0.1
  pad_token_id: int = 0
  labels: int = 0
  words: tuple[str, ...] = ()
  pooler: bool = True
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'
  family: str = 'bert'

  def __post_init__(self):
    if self.hidden_size % self.num_attention_heads:
      raise ValueError(
        f'hidden_size = {self.hidden_size} is no multiple of num_attention_heads = {self.num_attention_heads}.'
      )
    if self.labels and not self.pooler:
      raise ValueError(f'labels = {self.labels}: a classifier needs a pooler.')
    layers.check_remat(self.remat)

  @property
  def depths(self) -> dict[str, int]:
    """{stack: layers}."""
    return {linear.STACK: self.num_hidden_layers}

  @property
  def sequence(self) -> dict[str, dict]:
    """{stack: its SEQUENCE}."""
    return {linear.STACK: SEQUENCE}


class Attention(nn.Module):
  """Attention of every token to all of its segment."""

  config: ModelConfig
  scheme: linear.Scheme

  @nn.compact
  def __call__(self, x_BTD, segments_BT):
    H = self.config.num_attention_heads
    B, T, D = x_BTD.shape
    project = lambda name: linear.Linear(D, ('embed', 'heads'), self.scheme, biased=True, name=name)(x_BTD)
    q_BTHC, k_BTHC, v_BTHC = (project(name).reshape(B, T, H, D // H) for name in ('q_proj', 'k_proj', 'v_proj'))
    y_BTHC = attention.attend(q_BTHC, k_BTHC, v_BTHC, segments_BT, sees=attention.everything)
    return linear.Linear(D, ('heads', 'embed'), self.scheme, biased=True, name='o_proj')(y_BTHC.reshape(B, T, D))


class MLP(nn.Module):
  """down(gelu(up(x))), the exact GELU."""

  config: ModelConfig
  scheme: linear.Scheme

  @nn.compact
  def __call__(self, x):
    c = self.config
    wide = linear.Linear(c.intermediate_size, ('embed', 'mlp'), self.scheme, biased=True, name='up_proj')(x)
    h = nn.gelu(wide, approximate=False)
    return linear.Linear(c.hidden_size, ('mlp', 'embed'), self.scheme, biased=True, name='down_proj')(h)


class Block(nn.Module):
  """One post-norm layer: `attend`, then `feed`; the (carry, None) signature is nn.scan's."""

  config: ModelConfig
  scheme: linear.Scheme

  def setup(self):
    self.attention = Attention(self.config, self.scheme)
    self.attention_norm = norms.LayerNorm(self.config.layer_norm_eps, self.scheme)
    self.mlp = MLP(self.config, self.scheme)
    self.mlp_norm = norms.LayerNorm(self.config.layer_norm_eps, self.scheme)

  def attend(self, x_BTD, layer, positions_BT, segments_BT):
    """norm(x + attention(x))."""
    del layer, positions_BT
    return self.attention_norm(x_BTD + self._dropped(self.attention(x_BTD, segments_BT)))

  def feed(self, x_BTD):
    """norm(x + mlp(x))."""
    return self.mlp_norm(x_BTD + self._dropped(self.mlp(x_BTD)))

  def __call__(self, x_BTD, layer, *context):
    return self.feed(self.attend(x_BTD, layer, *context)), None

  def _dropped(self, x_BTD):
    return _drop(self, x_BTD, self.config.hidden_dropout_prob)


def _drop(module: nn.Module, x, rate: float):
  """Dropout, where a training step brings its random numbers."""
  return lora.drop(x, rate, module.make_rng('dropout') if module.has_rng('dropout') else None)


class Bert(nn.Module):
  """tokens [B, T] -> [B, T, L] float32, of every place what the classifier makes of it; a sentence's is its first's.

  Without labels it is what the pooler makes of every place, [B, T, D], or where there is none the last layer's output.
  `segments` [B, T] keeps sentences that share a row apart; `positions` [B, T] are counted within them, `types` [B, T]
  are those of a pair's first and second sentence (default: all 0).  With `only_BP` the outputs are those of P tokens of
  every row, [B, P, L], by their places in the row.  Apply needs no `scheme`.
  """

  block = Block

  config: ModelConfig
  scheme: linear.Scheme = linear.Scheme()

  def setup(self):
    c = self.config
    self.embedding_VD = self._table('embedding', c.vocab_size, 'vocab')
    self.position_embedding_TD = self._table('position_embedding', c.max_position_embeddings, 'norm')
    self.type_embedding_SD = self._table('type_embedding', c.type_vocab_size, 'norm')
    self.embedding_norm = norms.LayerNorm(c.layer_norm_eps, self.scheme)
    if self.is_initializing():
      for name, born in layers.newborn(Block, c, self.scheme, linear.STACK).items():
        setattr(self, name, born)
    if c.pooler:
      self.pooler = linear.Linear(c.hidden_size, ('embed', 'heads'), self.scheme.of(POOLER), biased=True)
    if c.labels:
      # A few labels are on every device.
      self.classifier = linear.Linear(c.labels, ('heads', 'norm'), self.scheme.of(CLASSIFIER), biased=True)

  def _table(self, name: str, rows: int, axis: str):
    init = linear.dense_init(
      self.scheme, nn.initializers.normal(0.02), (rows, self.config.hidden_size), (axis, 'embed')
    )
    return linear.weight(self, self.scheme, name, init)

  def __call__(self, tokens_BT, segments_BT=None, positions_BT=None, types_BT=None, only_BP=None):
    x_BTD = self.hidden(tokens_BT, segments_BT, positions_BT, types_BT)
    if only_BP is not None:
      x_BTD = jnp.take_along_axis(x_BTD, only_BP[:, :, None], axis=1)
    return self.head(x_BTD)

  def hidden(self, tokens_BT, segments_BT=None, positions_BT=None, types_BT=None):
    """What the layers make of tokens, [B, T, D]: all of the model but `head`."""
    x_BTD = self.embed(tokens_BT, positions_BT, types_BT)
    return layers.through(self, Block, linear.STACK, x_BTD, positions_BT, segments_BT)

  def embed(self, tokens_BT, positions_BT=None, types_BT=None):
    """The first layer's input [B, T, D].  ValueError where positions are counted beyond the table's."""
    c = self.config
    if positions_BT is None:
      T = tokens_BT.shape[1]
      if c.max_position_embeddings < T:
        raise ValueError(f'{T} tokens in a row: the model has {c.max_position_embeddings} positions.')
      positions_BT = layers.in_order(tokens_BT)
    types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
    x_BTD = linear.look_up(self.embedding_VD, tokens_BT) + linear.look_up(self.position_embedding_TD, positions_BT)
    x_BTD += linear.look_up(self.type_embedding_SD, types_BT)
    return _drop(self, self.embedding_norm(x_BTD.astype(c.dtype)), c.hidden_dropout_prob)

  def normed(self, x_BPD):
    """The input of the head, of the last layer's output."""
    return x_BPD

  def head(self, x_BPD):
    """Pooler and classifier, [B, P, L], of what `hidden` made of P tokens; each depends on its own token alone."""
    c = self.config
    if c.pooler:
      x_BPD = jnp.tanh(self.pooler(x_BPD))
    if c.labels:
      x_BPD = self.classifier(_drop(self, x_BPD, c.classifier_dropout))
    return x_BPD.astype(jnp.float32)
