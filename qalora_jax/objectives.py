"""What training makes small: the loss of a batch, and the arrays that a batch is made of.

A model's family says which objective is its own (`families.Family.objective`); the step, the program and the scoring of
held-out examples are the same for all.

B rows, T time, S inputs, N pieces of it of P tokens, D model, V vocabulary, L labels.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from qalora_jax.models import linear
from qalora_jax.models import pieces

# Bytes of float32 logits that a device makes at once.
LOGITS = 2**26


# Equal to itself alone, so that it may key a cache.
@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
  """A loss.

  losses(model, variables, batch, rngs=None) -> (losses [B, T], mask [B, T]): float32, the mask 1 where one counts.
  arrays: {name: dtype} of the arrays [B, T] of a batch.  unit: what is counted, in the plural.  inputs: those of the
  arrays that an encoder reads beside the targets' decoder, [B, S].
  """

  losses: Callable[..., tuple[jax.Array, jax.Array]]
  arrays: Mapping[str, type]
  unit: str
  inputs: tuple[str, ...] = ()

  def widths(self, window: int, completion: int = 0) -> dict[str, int]:
    """{name: T or S} of the arrays where a row has `window` tokens and a completion at most `completion` (0: any).

    Where there are inputs the window is theirs; T is that of the longest completion behind its beginning.
    """
    targets = 1 + completion if self.inputs and completion else window
    return {name: window if name in self.inputs else targets for name in self.arrays}


def token_nll(model: nn.Module, variables: dict, batch: dict, rngs: dict | None = None) -> tuple[jax.Array, jax.Array]:
  """-log p(token t + 1 | tokens up to t in its segment) [B, T] in nats, and the mask of the targets that count."""
  x_BTD = model.apply(variables, batch['tokens'], batch['segments'], batch['positions'], rngs=rngs, method='hidden')
  return _following_nll(model, variables, x_BTD, batch, rngs)


def answer_nll(model: nn.Module, variables: dict, batch: dict, rngs: dict | None = None) -> tuple[jax.Array, jax.Array]:
  """-log p(token t + 1 | tokens up to t, inputs of the segment) [B, T] in nats, and the mask of the targets that count.

  The first token of a segment is what the decoder begins with.
  """
  own = [batch[name] for name in ('tokens', 'segments', 'positions', 'inputs', 'input_segments')]
  x_BTD = model.apply(variables, *own, rngs=rngs, method='hidden')
  return _following_nll(model, variables, x_BTD, batch, rngs)


def _following_nll(model: nn.Module, variables: dict, x_BTD, batch: dict, rngs: dict | None):
  """-log p(token t + 1 | x[t]) [B, T] in nats, and the mask of the targets that count.

  A target counts where its loss_mask is 1 and its predecessor in the row belongs to the same segment; the last place
  of a row has no target.  Logits are made of one piece of the tokens after another, forward and backward, so that no
  more than LOGITS bytes of them stand on a device at once.  With several pieces each has its own dropout in the head.
  """
  tokens_BT, segments_BT = batch['tokens'], batch['segments']
  following = lambda x_BT: jnp.pad(x_BT[:, 1:], [(0, 0), (0, 1)])
  mask_BT = following(batch['loss_mask']) * (following(segments_BT) == segments_BT) * (following(segments_BT) > 0)

  def nll(x_BPD, targets_BP, rngs):
    logits_BPV = model.apply(variables, x_BPD, rngs=rngs, method='head')
    return _minus_log_p(logits_BPV, targets_BP)

  rows, count = tokens_BT.shape
  vocabulary = model.config.vocab_size
  of_one = pieces.local(linear.ROWS, rows) * pieces.local('vocab', vocabulary) * jnp.dtype(jnp.float32).itemsize
  size = pieces.length(count, of_one, LOGITS)
  targets_BT = following(tokens_BT)
  if size == count:
    return nll(x_BTD, targets_BT, rngs), mask_BT.astype(jnp.float32)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def piece(index, x_BPD, targets_BP):
    return nll(x_BPD, targets_BP, {name: jax.random.fold_in(key, index) for name, key in (rngs or {}).items()})

  cut = pieces.cut(x_BTD, size), pieces.cut(targets_BT, size)
  nll_NBP = jax.lax.scan(lambda _, each: (None, piece(*each)), None, (jnp.arange(len(cut[0])), *cut))[1]
  return pieces.joined(nll_NBP, count), mask_BT.astype(jnp.float32)


def label_losses(
  model: nn.Module, variables: dict, batch: dict, rngs: dict | None = None
) -> tuple[jax.Array, jax.Array]:
  """-log p(label) in nats, or (output - label)^2 of a head of one output, [B, T]; and the mask of what counts.

  A sentence (or a pair) is a segment of a row, and what is said of it is asked for where loss_mask is 1: at its first
  token.  So several share a row, and the mean is over sentences however they are packed.
  """
  x_BTD = model.apply(
    variables, batch['tokens'], batch['segments'], batch['positions'], batch['types'], rngs=rngs, method='hidden'
  )
  logits_BTL = model.apply(variables, x_BTD, rngs=rngs, method='head')
  labels_BT, mask_BT = batch['labels'], batch['loss_mask'].astype(jnp.float32)
  if logits_BTL.shape[-1] == 1:
    return jnp.square(logits_BTL[..., 0] - labels_BT), mask_BT
  return _minus_log_p(logits_BTL, labels_BT.astype(jnp.int32)), mask_BT


def _minus_log_p(logits, chosen) -> jax.Array:
  """-log softmax(logits)[chosen] [...], of logits [..., N]."""
  of_chosen = jnp.take_along_axis(logits, chosen[..., None], axis=-1)
  return jax.nn.logsumexp(logits, axis=-1) - of_chosen[..., 0]


_ROW = dict.fromkeys(('tokens', 'loss_mask', 'segments', 'positions'), jnp.int32)
_INPUTS = ('inputs', 'input_segments')
# The next token: of decoders.
TOKENS = Objective(token_nll, _ROW, 'tokens')
# The next token of an answer to what an encoder reads.
ANSWERS = Objective(answer_nll, {**_ROW, **dict.fromkeys(_INPUTS, jnp.int32)}, 'tokens', inputs=_INPUTS)
# A class or a number of a sentence: of an encoder with a head.
LABELS = Objective(label_losses, {**_ROW, 'types': jnp.int32, 'labels': jnp.float32}, 'examples')
