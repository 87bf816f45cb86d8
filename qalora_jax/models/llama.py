"""LLaMA 1, 2 and 3 (Touvron et al., 2023; Dubey et al., 2024) as functional linen modules.

B batch, T time, P places in it, N pieces of it, S time of the past or of the keys, D model, F mlp, H heads, K key/value
heads, C head width, V vocabulary.

Generation keeps the keys and values of earlier tokens in a collection of their own, in the tree of the layers:

    past/layers/attention/k, v       [N, B, K, S, C] read where it is there: what the tokens also look at
    present/layers/attention/k, v    [N, B, K, T, C] written where it is mutable: those of the tokens at hand
"""

import dataclasses
import functools
import math

from flax import linen as nn
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from qalora_jax.kernels import qmatmul
from qalora_jax.models import linear
from qalora_jax.models import pieces
from qalora_jax.quant import qtensor

# The name of a layer's input for checkpoint policies.
INPUT = 'layer_input'
REMAT = {
  'none': None,
  'dots': jax.checkpoint_policies.save_only_these_names(qmatmul.PRODUCT),
  'full': jax.checkpoint_policies.nothing_saveable,
  'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=[INPUT], offload_src='device', offload_dst='pinned_host'
  ),
}

# The matrices of a block in the order in which data flows, by the method of Block that applies them; those of one line
# have the same input.
SEQUENCE = {
  'attend': (('attention/q_proj', 'attention/k_proj', 'attention/v_proj'), ('attention/o_proj',)),
  'feed': (('mlp/gate_proj', 'mlp/up_proj'), ('mlp/down_proj',)),
}
# Collections of keys and values: those of earlier tokens, those of the tokens at hand.
PAST, PRESENT = 'past', 'present'
# Bytes of float32 attention scores that a device makes at once.
SCORES = 2**26
MATRICES = tuple(matrix for steps in SEQUENCE.values() for alike in steps for matrix in alike)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """LLaMA-3's stretching of the rotary wavelengths (names as in Hugging Face's rope_scaling)."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int


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
  rope_scaling: RopeScaling | None = None
  rms_norm_eps: float = 1e-6
  tie_word_embeddings: bool = False
  head_dim: int = 0
  dtype: jnp.dtype = jnp.float32
  remat: str = 'none'

  def __post_init__(self):
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f'num_attention_heads = {self.num_attention_heads} is no multiple of '
        f'num_key_value_heads = {self.num_key_value_heads}.'
      )
    if self.remat not in REMAT:
      raise ValueError(f'remat = {self.remat!r}; it is one of {sorted(REMAT)}.')
    if not self.head_dim:
      object.__setattr__(self, 'head_dim', self.hidden_size // self.num_attention_heads)


def rope_frequencies(config: ModelConfig) -> jax.Array:
  """Radians per position of each of the C / 2 rotations: theta^(-2i / C), stretched as LLaMA-3 where configured.

  Stretching: wavelengths longer than original / low_freq_factor are divided in frequency by `factor`, those shorter
  than original / high_freq_factor stay, and between them the two are interpolated.
  """
  exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
  frequencies = config.rope_theta**-exponents
  scaling = config.rope_scaling
  if scaling is None:
    return frequencies
  turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
  keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
  keep = jnp.clip(keep, 0.0, 1.0)
  return frequencies * (keep + (1.0 - keep) / scaling.factor)


def rotate(x_BTHC, positions_BT, frequencies) -> jax.Array:
  """Rotary position embedding (Su et al., 2021), pairing entry i with i + C / 2 as Hugging Face's checkpoints do."""
  angles = positions_BT.astype(jnp.float32)[..., None, None] * frequencies.reshape(1, 1, 1, -1)
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x_BTHC.dtype)


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32 (Zhang and Sennrich, 2019)."""

  eps: float
  scheme: linear.Scheme

  @nn.compact
  def __call__(self, x):
    init = linear.dense_init(self.scheme, nn.initializers.ones, (x.shape[-1],), ('norm',))
    scale = linear.weight(self, self.scheme, 'scale', init).astype(jnp.float32)
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
    return (x32 * inverse * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


class Attention(nn.Module):
  """Causal attention with grouped queries, within segments, and to a past where the variables hold one."""

  config: ModelConfig
  scheme: linear.Scheme

  @nn.compact
  def __call__(self, x_BTD, positions_BT, segments_BT):
    c = self.config
    B, T, _ = x_BTD.shape

    def project(name, heads):
      y = linear.Linear(heads * c.head_dim, ('embed', 'heads'), self.scheme, name=name)(x_BTD)
      return y.reshape(B, T, heads, c.head_dim)

    frequencies = rope_frequencies(c)
    q_BTHC = rotate(project('q_proj', c.num_attention_heads), positions_BT, frequencies)
    k_BTKC = rotate(project('k_proj', c.num_key_value_heads), positions_BT, frequencies)
    v_BTKC = project('v_proj', c.num_key_value_heads)
    for name, value in (('k', k_BTKC), ('v', v_BTKC)):
      if self.is_mutable_collection(PRESENT) and not self.is_initializing():
        self.put_variable(PRESENT, name, value.swapaxes(1, 2))
    if self.has_variable(PAST, 'k'):
      past = self.get_variable(PAST, 'k'), self.get_variable(PAST, 'v')
      mask = visible(jnp.arange(T), jnp.arange(T), segments_BT, segments_BT)
      y_BTHC = attend_to_past(q_BTHC, k_BTKC, v_BTKC, mask, *past, positions_BT[:, 0])
    else:
      y_BTHC = attend(q_BTHC, k_BTKC, v_BTKC, segments_BT)
    y = y_BTHC.reshape(B, T, -1)
    return linear.Linear(c.hidden_size, ('heads', 'embed'), self.scheme, name='o_proj')(y)


def attend_to_past(q_BTHC, k_BTKC, v_BTKC, mask_B1TT, past_k_BKSC, past_v_BKSC, start_B) -> jax.Array:
  """Attention [B, T, H, C] of T tokens to themselves, as the mask says, and to the first start_B entries of the past.

  One softmax over both, in float32; the past is read where it lies, never copied beside the present.
  """
  B, T, H, C = q_BTHC.shape
  K, S = past_k_BKSC.shape[1:3]
  q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C)
  scores = lambda k: jnp.einsum('btkgc,bksc->bkgts', q_BTKGC, k, preferred_element_type=jnp.float32) / math.sqrt(C)
  seen_B111S = (jnp.arange(S)[None] < start_B[:, None])[:, None, None, None]
  masked = [
    jnp.where(seen_B111S, scores(past_k_BKSC), -jnp.inf),
    jnp.where(mask_B1TT[:, :, None], scores(k_BTKC.swapaxes(1, 2)), -jnp.inf),
  ]
  p = jax.nn.softmax(jnp.concatenate(masked, axis=-1), axis=-1).astype(v_BTKC.dtype)
  mix = lambda p, v: jnp.einsum('bkgts,bksc->btkgc', p, v, preferred_element_type=jnp.float32)
  y_BTKGC = mix(p[..., :S], past_v_BKSC) + mix(p[..., S:], v_BTKC.swapaxes(1, 2))
  return y_BTKGC.reshape(B, T, H, C).astype(q_BTHC.dtype)


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
    self.attention_norm = RMSNorm(self.config.rms_norm_eps, self.scheme)
    self.attention = Attention(self.config, self.scheme)
    self.mlp_norm = RMSNorm(self.config.rms_norm_eps, self.scheme)
    self.mlp = MLP(self.config, self.scheme)

  def attend(self, x_BTD, positions_BT, segments_BT):
    """x + attention(norm(x))."""
    return x_BTD + self.attention(self.attention_norm(x_BTD), positions_BT, segments_BT)

  def feed(self, x_BTD):
    """x + mlp(norm(x))."""
    return x_BTD + self.mlp(self.mlp_norm(x_BTD))

  def __call__(self, x_BTD, positions_BT, segments_BT):
    return self.feed(self.attend(x_BTD, positions_BT, segments_BT)), None


class Llama(nn.Module):
  """tokens [B, T] -> logits [B, T, V] float32.

  In bfloat16 an untied head's logits are rounded to bfloat16 first, as in transformers; a tied head's are not.
  `segments` [B, T] keeps documents that share a row apart (a token sees earlier tokens of its own segment only);
  `positions` [B, T] are counted within them.  Without either, a row is one document.  With `only_BP` the logits are
  those of P tokens of every row, [B, P, V], by their places in the row.  Apply needs no `scheme`.
  """

  config: ModelConfig
  scheme: linear.Scheme = linear.Scheme()

  def setup(self):
    c = self.config
    init = linear.dense_init(
      self.scheme, nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), ('vocab', 'embed')
    )
    self.embedding_VD = linear.weight(self, self.scheme, 'embedding', init)
    if self.is_initializing():
      for name, layers in self._newborn().items():
        setattr(self, name, layers)
    self.norm = RMSNorm(c.rms_norm_eps, self.scheme)
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
    x_BTD = linear.look_up(self.embedding_VD, tokens_BT).astype(self.config.dtype)
    run = self._born if self.is_initializing() else self._through
    return run(x_BTD, positions_BT, segments_BT)

  def head(self, x_BPD):
    """The last norm and the logits [B, P, V] of what `hidden` made of P tokens; each depends on its own token alone."""
    c = self.config
    x_BPD = self.norm(x_BPD)
    if c.tie_word_embeddings:
      logits = jnp.dot(x_BPD, self.embedding_VD.T.astype(c.dtype), preferred_element_type=jnp.float32)
    else:
      logits = self.lm_head(x_BPD)
    return logits.astype(jnp.float32)

  def _newborn(self) -> dict[str, nn.Module]:
    """The layers as modules that draw their weights: one scanned for every run of neighbours that are alike."""
    c = self.config
    starts = self.scheme.starts(c.num_hidden_layers, MATRICES)
    made = {}
    for name, start, stop in zip(linear.stacks(starts), starts, [*starts[1:], c.num_hidden_layers], strict=True):
      scanned = nn.scan(
        Block,
        length=stop - start,
        variable_axes={'params': 0, 'frozen': 0},
        split_rngs={'params': True},
        in_axes=nn.broadcast,
        metadata_params={nn.PARTITION_NAME: 'layers'},
      )
      made[name] = scanned(c, self.scheme)
    return made

  def _born(self, x_BTD, *context):
    """x through the layers that draw their weights."""
    for name in linear.stacks(self.scheme.starts(self.config.num_hidden_layers, MATRICES)):
      x_BTD, _ = getattr(self, name)(x_BTD, *context)
    return x_BTD

  def _through(self, x_BTD, *context):
    """x through the layers that the variables hold, stack by stack."""
    starts = linear.starts({name for collection in self.variables.values() for name in collection})
    for name in linear.stacks(starts):
      own = {collection: tree[name] for collection, tree in self.variables.items() if name in tree}
      x_BTD = self._loop(name, own, x_BTD, *context)
    return x_BTD

  def _loop(self, name: str, own: dict, x_BTD, *context):
    """One program for all layers of a stack: a scan over them.

    Weights that train, dense ones, and keys and values are handed over layer by layer.  Quantized matrices stay
    outside, whole: a layer reads its own where it lies in the stack (`qtensor.in_stack`), for what a scan hands over to
    a kernel it copies first.
    """
    c = self.config
    drops, remembers = self.has_rng('dropout'), self.is_mutable_collection(PRESENT)
    number = len(jax.tree.leaves(own)[0])
    keys = jax.random.split(self.make_rng('dropout'), number) if drops else None
    quantized = lambda node: isinstance(node, qtensor.QTensor)
    frozen = own.pop('frozen', {})
    whole = jax.tree.map(lambda node: node.replace(offset=None) if quantized(node) else None, frozen, is_leaf=quantized)
    # Offsets too: what a scan hands over is not kept for the backward pass, what a layer slices is.
    rest = jax.tree.map(lambda node: node.offset if quantized(node) else node, frozen, is_leaf=quantized)

    def layer(x_BTD, each):
      index, key, own, rest = each
      x_BTD = ad_checkpoint.checkpoint_name(x_BTD, INPUT)
      pick = lambda stack, leaf: leaf if stack is None else qtensor.in_stack(stack, index).replace(offset=leaf)
      blank = lambda node: node is None or quantized(node)
      variables = {**own, 'frozen': jax.tree.map(pick, whole, rest, is_leaf=blank)}
      rngs = {'dropout': key} if drops else {}
      block = Block(c, self.scheme, parent=None)
      (x_BTD, _), made = block.apply(
        variables, linear.by_rows(x_BTD), *context, rngs=rngs, mutable=[PRESENT] if remembers else []
      )
      return x_BTD, made.get(PRESENT)

    if c.remat != 'none':
      # prevent_cse guards against XLA undoing the recomputation; inside a scan it cannot, and the guard costs time.  A
      # scan of one layer is none for XLA.
      layer = jax.checkpoint(layer, prevent_cse=number == 1, policy=REMAT[c.remat])
    x_BTD, present = jax.lax.scan(layer, x_BTD, (jnp.arange(number), keys, own, rest))
    if remembers:
      self.put_variable(PRESENT, name, present)
    return x_BTD


def visible(query_T, key_S, segments_BT=None, segments_BS=None) -> jax.Array:
  """[B, 1, T, S] (B = 1 without segments), true where a query sees a key: one not after it, of its own segment.

  `query_T`, `key_S`: places in the row.
  """
  seen_11TS = (key_S[None, :] <= query_T[:, None])[None, None]
  if segments_BT is None:
    return seen_11TS
  return seen_11TS & (segments_BT[:, :, None] == segments_BS[:, None, :])[:, None]


def attend(q_BTHC, k_BTKC, v_BTKC, segments_BT=None) -> jax.Array:
  """Causal attention [B, T, H, C] within segments; never more than SCORES bytes of float32 scores on a device.

  Where scores [B, H, T, T] would take more, queries go through in blocks, each against all keys, and the backward pass
  makes the scores of a block again.  The gradients of keys and values are added over the blocks in float32.
  """
  B, T, H, _ = q_BTHC.shape
  places_T = jnp.arange(T)
  of_one = pieces.local(linear.ROWS, B) * pieces.local('heads', H) * T * 4
  size = pieces.length(T, of_one, SCORES)
  if size == T:
    mask = visible(places_T, places_T, segments_BT, segments_BT)
    return jax.nn.dot_product_attention(q_BTHC, k_BTKC, v_BTKC, mask=mask)
  # Read in their own dtype, so that only gradients, which are added block by block, are float32.
  wide = k_BTKC.astype(jnp.float32), v_BTKC.astype(jnp.float32)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def block(wide, q_BPHC, places_1P, segments_BP):
    k, v = (x.astype(k_BTKC.dtype) for x in wide)
    mask = visible(places_1P[0], places_T, segments_BP, segments_BT)
    return jax.nn.dot_product_attention(q_BPHC, k, v, mask=mask)

  queries = jax.tree.map(lambda x: pieces.cut(x, size), (q_BTHC, places_T[None], segments_BT))
  y_NBPHC = jax.lax.scan(lambda _, queries: (None, block(wide, *queries)), None, queries)[1]
  return pieces.joined(y_NBPHC, T)
