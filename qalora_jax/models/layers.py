"""Stacks of blocks that are alike: born by one module, gone through by one program.

A block is a linen module called as block(x_BTD, layer, *context) -> (x_BTD, None), the signature of nn.scan: `layer` is
its number in its stack, for what differs between layers but is no weight; the context is the same for all of them.

    stack       'layers' (a decoder, or an encoder alone), 'encoder' and 'decoder' (of a model that has both)
    layers      the tree's name of a stack whose layers are all alike; else layers_0, layers_3, ... by first layers
"""

from typing import Protocol

from flax import linen as nn
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from qalora_jax.kernels import qmatmul
from qalora_jax.models import attention
from qalora_jax.models import linear
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


class Config(Protocol):
  """What every family's config says: a frozen dataclass of a model's shapes and constants.

  depths: {stack: layers}.  sequence: {stack: {method of its block: lines of matrices}}, the matrices in the order in
  which data flows, those of one line with the same input.
  """

  family: str
  vocab_size: int
  hidden_size: int
  max_position_embeddings: int
  dtype: jnp.dtype
  remat: str

  @property
  def depths(self) -> dict[str, int]: ...

  @property
  def sequence(self) -> dict[str, dict[str, tuple[tuple[str, ...], ...]]]: ...


def check_remat(remat: str) -> None:
  """ValueError for a word that REMAT has not."""
  if remat not in REMAT:
    raise ValueError(f'remat = {remat!r}; it is one of {sorted(REMAT)}.')


def in_order(x_BT) -> jax.Array:
  """The positions 0, 1, 2, ... [B, T] of rows [B, T, ...] that are one document each."""
  B, T = x_BT.shape[:2]
  return jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))


def logits(x_BPD, embedding_VD, lm_head: nn.Module | None) -> jax.Array:
  """[B, P, V] float32, by a head of the model's own, or (None) by the embedding that is tied to it."""
  if lm_head is not None:
    return lm_head(x_BPD).astype(jnp.float32)
  return jnp.dot(x_BPD, embedding_VD.T.astype(x_BPD.dtype), preferred_element_type=jnp.float32)


def newborn(block: type[nn.Module], config, scheme: linear.Scheme, stack: str) -> dict[str, nn.Module]:
  """{name: block(config, scheme), scanned} of a stack's parts as modules that draw their weights.

  The model's setup sets them as attributes of those names where it is initializing.
  """
  depth, starts = config.depths[stack], scheme.starts(config)[stack]
  made = {}
  for name, start, stop in zip(linear.stacks(starts, stack), starts, [*starts[1:], depth], strict=True):
    scanned = nn.scan(
      block,
      length=stop - start,
      variable_axes={'params': 0, 'frozen': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    made[name] = scanned(config, scheme)
  return made


def through(module: nn.Module, block: type[nn.Module], stack: str, x_BTD, *context):
  """x through all layers of a stack of the model `module`: those that draw their weights, or those of its variables."""
  if module.is_initializing():
    for name in linear.stacks(module.scheme.starts(module.config)[stack], stack):
      x_BTD, _ = getattr(module, name)(x_BTD, jnp.zeros((), jnp.int32), *context)
    return x_BTD
  starts = linear.starts({name for collection in module.variables.values() for name in collection})[stack]
  for name, start in zip(linear.stacks(starts, stack), starts, strict=True):
    own = {collection: tree[name] for collection, tree in module.variables.items() if name in tree}
    x_BTD = _loop(module, block, name, start, own, x_BTD, *context)
  return x_BTD


def _loop(module: nn.Module, block: type[nn.Module], name: str, start: int, own: dict, x_BTD, *context):
  """One program for all layers of a stack: a scan over them.

  Weights that train, dense ones, and keys and values are handed over layer by layer.  Quantized matrices stay
  outside, whole: a layer reads its own where it lies in the stack (`qtensor.in_stack`), for what a scan hands over to
  a kernel it copies first.
  """
  c = module.config
  drops = module.has_rng('dropout')
  kept = [name for name in (attention.PRESENT, attention.GIVEN) if module.is_mutable_collection(name)]
  number = len(jax.tree.leaves(own)[0])
  keys = jax.random.split(module.make_rng('dropout'), number) if drops else None
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
    (x_BTD, _), made = block(c, module.scheme, parent=None).apply(
      variables,
      linear.by_rows(x_BTD),
      start + index,
      *context,
      rngs=rngs,
      mutable=kept,
    )
    return x_BTD, made

  if c.remat != 'none':
    # prevent_cse guards against XLA undoing the recomputation; inside a scan it cannot, and the guard costs time.  A
    # scan of one layer is none for XLA.
    layer = jax.checkpoint(layer, prevent_cse=number == 1, policy=REMAT[c.remat])
  x_BTD, made = jax.lax.scan(layer, x_BTD, (jnp.arange(number), keys, own, rest))
  for collection, tree in made.items():
    module.put_variable(collection, name, tree)
  return x_BTD
