"""What a head says of sentences."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qalora_jax import hosts
from qalora_jax import progress
from qalora_jax import sharding
from qalora_jax.data import batches

_WIDTH = 32


def outputs(model: nn.Module, variables: dict, *, examples: list, batch: int, mesh, label: str) -> np.ndarray:
  """The head's outputs [N, labels], float32, of each example's sentence, in the examples' order.

  Sentences of about the same length go through together: a batch is no wider than 32 tokens more than needed.
  """
  shares = mesh.shape['data'] * mesh.shape['fsdp']
  batch = -(-batch // shares) * shares
  program, found = _compiled(model, mesh), {}
  widths = np.array([-(-len(example['tokens']) // _WIDTH) * _WIDTH for example in examples])
  with progress.bar(label, len(examples)) as bar:
    for width in np.unique(widths):
      (own,) = np.nonzero(widths == width)
      chosen = [examples[index] for index in own]
      for rows in batches.scoring(chosen, window=int(width), batch=batch):
        index = rows.pop('rows')
        made = jax.device_get(program(variables, hosts.spread(rows, sharding.batch(mesh))))
        real = index >= 0
        found |= dict(zip(own[index[real]].tolist(), made[real], strict=True))
        bar.advance(int(real.sum()))
  return np.stack([found[index] for index in range(len(examples))])


@functools.lru_cache(maxsize=4)
def _compiled(model: nn.Module, mesh):
  def first(variables, batch):
    places_B1 = jnp.argmax(batch['loss_mask'], axis=-1, keepdims=True)
    inputs = (batch[name] for name in ('tokens', 'segments', 'positions', 'types'))
    return model.apply(variables, *inputs, only_BP=places_B1)[:, 0]

  return jax.jit(
    sharding.over(mesh, first),
    in_shardings=(None, sharding.batch(mesh)),
    out_shardings=sharding.replicated(mesh),
  )
