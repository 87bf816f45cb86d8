"""Who sees whom, and what of it: attention for every family.

B batch, T queries, P of them, S keys, H heads, K key/value heads, G = H / K, C head width.

Generation keeps the keys and values of earlier tokens in a collection of their own, in the tree of the layers:

    past/layers/attention/k, v       [N, B, K, S, C] read where it is there: what the tokens also look at
    present/layers/attention/k, v    [N, B, K, T, C] written where it is mutable: those of the tokens at hand
    given/...                        what no token changes, of a model with an encoder: written where it is mutable,
                                     read where it is there
"""

from collections.abc import Callable
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp

from qalora_jax.models import linear
from qalora_jax.models import pieces

# Collections of keys and values: those of earlier tokens, of the tokens at hand, and of what is read once.
PAST, PRESENT, GIVEN = 'past', 'present', 'given'
# Bytes of float32 attention scores that a device makes at once.
SCORES = 2**26


def causal(query, key):
  """True where a key is not after the query; both are places in a row."""
  return key <= query


def within(window, query, key):
  """`causal`, and the key less than `window` places before the query: Mistral's sliding window."""
  return causal(query, key) & (query - key < window)


def everything(query, key):
  """An encoder's: every query sees every key."""
  return jnp.broadcast_to(True, jnp.broadcast_shapes(query.shape, key.shape))


def visible(query_T, key_S, segments_BT=None, segments_BS=None, sees: Callable = causal) -> jax.Array:
  """[B, 1, T, S] (B = 1 without segments), true where a query sees a key: as `sees` says, of its own segment.

  `query_T`, `key_S`: places in the row.
  """
  seen_11TS = sees(query_T[:, None], key_S[None, :])[None, None]
  if segments_BT is None:
    return seen_11TS
  return seen_11TS & (segments_BT[:, :, None] == segments_BS[:, None, :])[:, None]


def give(module: nn.Module, **values) -> None:
  """Leaves `values` in 'given' where that is mutable."""
  if module.is_mutable_collection(GIVEN) and not module.is_initializing():
    for name, value in values.items():
      module.put_variable(GIVEN, name, value)


def attend_or_continue(module: nn.Module, q_BTHC, k_BTKC, v_BTKC, positions_BT, segments_BT, **how) -> jax.Array:
  """`attend` within the row, or `attend_to_past` where the module's variables hold one; `how` is theirs.

  Leaves the keys and values in 'present' where that is mutable.
  """
  for name, value in (('k', k_BTKC), ('v', v_BTKC)):
    if module.is_mutable_collection(PRESENT) and not module.is_initializing():
      module.put_variable(PRESENT, name, value.swapaxes(1, 2))
  if not module.has_variable(PAST, 'k'):
    return attend(q_BTHC, k_BTKC, v_BTKC, segments_BT, **how)
  past = module.get_variable(PAST, 'k'), module.get_variable(PAST, 'v')
  return attend_to_past(q_BTHC, k_BTKC, v_BTKC, past, positions_BT, segments_BT, **how)


def attend(
  q_BTHC,
  k_BSKC,
  v_BSKC,
  segments_BT=None,
  segments_BS=None,
  *,
  sees: Callable = causal,
  scale: float | None = None,
  cap: float = 0.0,
  bias: Callable | None = None,
) -> jax.Array:
  """softmax(cap * tanh((scale * q k^T + bias) / cap)) v, [B, T, H, C], over the keys that `visible` shows.

  `scale`: C^(-1/2) unless said.  `cap`: 0 for none (Gemma 2's soft-capping).  `bias(places of P queries, places of
  keys)` -> [1 or B, H, P, S] (T5's relative positions).  `segments_BS`: of the keys, those of the queries unless said.

  Never more than SCORES bytes of float32 scores on a device: where scores [B, H, T, S] would take more, queries go
  through in blocks, each against all keys, and the backward pass makes the scores of a block again.  The gradients of
  keys and values are added over the blocks in float32.
  """
  B, T, H, _ = q_BTHC.shape
  S = k_BSKC.shape[1]
  segments_BS = segments_BT if segments_BS is None else segments_BS
  queries_T, keys_S = jnp.arange(T), jnp.arange(S)
  look = functools.partial(_look, scale=scale, cap=cap)
  of_one = pieces.local(linear.ROWS, B) * pieces.local('heads', H) * S * 4
  size = pieces.length(T, of_one, SCORES)
  if size == T:
    mask = visible(queries_T, keys_S, segments_BT, segments_BS, sees)
    return look(q_BTHC, k_BSKC, v_BSKC, mask, bias and bias(queries_T, keys_S))
  # Read in their own dtype, so that only gradients, which are added block by block, are float32.
  wide = k_BSKC.astype(jnp.float32), v_BSKC.astype(jnp.float32)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def block(wide, q_BPHC, places_1P, segments_BP):
    k, v = (x.astype(k_BSKC.dtype) for x in wide)
    mask = visible(places_1P[0], keys_S, segments_BP, segments_BS, sees)
    return look(q_BPHC, k, v, mask, bias and bias(places_1P[0], keys_S))

  queries = jax.tree.map(lambda x: pieces.cut(x, size), (q_BTHC, queries_T[None], segments_BT))
  y_NBPHC = jax.lax.scan(lambda _, queries: (None, block(wide, *queries)), None, queries)[1]
  return pieces.joined(y_NBPHC, T)


def attend_to_past(
  q_BTHC,
  k_BTKC,
  v_BTKC,
  past: tuple,
  positions_BT,
  segments_BT=None,
  *,
  sees: Callable = causal,
  scale: float | None = None,
  cap: float = 0.0,
  bias: Callable | None = None,
) -> jax.Array:
  """As `attend`, of T tokens to themselves and to the first positions_BT[:, 0] entries of the past, k, v [B, K, S, C].

  Entry s of the past has place s, the tokens at hand have `positions_BT`.  One softmax over both, in float32; the past
  is read where it lies, never copied beside the present.  `bias(places of queries [B, T], places of keys [B or 1, S])`.
  """
  B, T, H, C = q_BTHC.shape
  past_k_BKSC, past_v_BKSC = past
  K, S = past_k_BKSC.shape[1:3]
  q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C)
  scale = 1 / math.sqrt(C) if scale is None else scale

  def scores(k_BKSC, places_BS):
    s = jnp.einsum('btkgc,bksc->bkgts', q_BTKGC, k_BKSC, preferred_element_type=jnp.float32) * scale
    if bias is not None:
      s += bias(positions_BT, places_BS).reshape(-1, K, H // K, T, places_BS.shape[-1])
    return capped(s, cap)

  past_1S, start_B111 = jnp.arange(S)[None], positions_BT[:, 0, None, None, None]
  past_111S = past_1S[:, None, None]
  seen_B1TS = sees(positions_BT[:, None, :, None], past_111S) & (past_111S < start_B111)
  mask_B1TT = visible(jnp.arange(T), jnp.arange(T), segments_BT, segments_BT, sees)
  masked = [
    jnp.where(seen_B1TS[:, :, None], scores(past_k_BKSC, past_1S), -jnp.inf),
    jnp.where(mask_B1TT[:, :, None], scores(k_BTKC.swapaxes(1, 2), positions_BT), -jnp.inf),
  ]
  p = jax.nn.softmax(jnp.concatenate(masked, axis=-1), axis=-1).astype(v_BTKC.dtype)
  mix = lambda p, v: jnp.einsum('bkgts,bksc->btkgc', p, v, preferred_element_type=jnp.float32)
  y_BTKGC = mix(p[..., :S], past_v_BKSC) + mix(p[..., S:], v_BTKC.swapaxes(1, 2))
  return y_BTKGC.reshape(B, T, H, C).astype(q_BTHC.dtype)


def _look(q_BPHC, k_BSKC, v_BSKC, mask, bias, *, scale, cap):
  """The softmax of `attend` over all keys at once."""
  if not cap:
    return jax.nn.dot_product_attention(q_BPHC, k_BSKC, v_BSKC, bias, mask, scale=scale)
  B, P, H, C = q_BPHC.shape
  K = k_BSKC.shape[2]
  scale = 1 / math.sqrt(C) if scale is None else scale
  q_BPKGC = q_BPHC.reshape(B, P, K, H // K, C)
  s = jnp.einsum('bpkgc,bskc->bkgps', q_BPKGC, k_BSKC, preferred_element_type=jnp.float32) * scale
  if bias is not None:
    s += bias.reshape(-1, K, H // K, *bias.shape[-2:])
  # What sees nothing (padding) has equal weights, as in jax.nn.
  p = jax.nn.softmax(jnp.where(mask[:, :, None], capped(s, cap), -0.7 * jnp.finfo(jnp.float32).max), axis=-1)
  y = jnp.einsum('bkgps,bskc->bpkgc', p.astype(v_BSKC.dtype), v_BSKC, preferred_element_type=jnp.float32)
  return y.reshape(B, P, H, C).astype(q_BPHC.dtype)


def capped(scores, cap: float):
  """cap * tanh(scores / cap): never beyond `cap` (Gemma 2's soft-capping); 0: as they are."""
  return cap * jnp.tanh(scores / cap) if cap else scores
