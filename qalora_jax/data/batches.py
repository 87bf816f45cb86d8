"""Examples as rectangular batches, packed or padded, endless for training and in order for scoring.

A batch is a dict of arrays [B, T]: those of its examples (`tokens`, `loss_mask`, and what else they have), `segments`
(0 is padding, 1.. count the documents of a row) and `positions`, which restart at 0 in each document.  A model that
attends only within a segment and takes its positions from `positions` computes for a packed document what it computes
for that document alone.

Examples of a model with an encoder have `inputs` too, of a width S of their own: [B, S] and `input_segments`, which
count the same documents.
"""

import collections.abc

import grain
import numpy as np

from qalora_jax.data import examples as examples_lib

Batch = dict[str, np.ndarray]
# What a batch says beside the arrays of its examples.
PLACES = ('segments', 'positions', 'input_segments')


def training(
  examples: list[examples_lib.Example], *, window: int, batch: int, packing: bool, seed: int, inputs: int = 0
) -> grain.DatasetIterator:
  """Endless batches [batch, window] (and [batch, inputs]), each epoch in another order, all drawn from `seed`.

  With `packing`, documents are put by first fit into the rows of one batch until the next one fits nowhere; none is
  split or lost, and a batch may reach into the next epoch.  Without, each row is one document and padding.

  `get_state()` is a dict of ints and dicts, fit for JSON; after `set_state()` the iterator goes on exactly where the
  state was taken, mid-epoch and mid-pack, in any process with the same arguments.

  Raises ValueError if there are no examples, or one is longer than the window or empty.
  """
  _check(examples, window, batch, inputs)
  widths = _widths(examples, window, inputs)
  if not 0 <= seed < 2**32:
    raise ValueError(f'seed = {seed} is outside 0 to 2**32 - 1')
  # Elements are in memory already, so that reading threads would cost more than they hide.
  rows = (
    grain.MapDataset.source(examples)
    .seed(seed)
    .shuffle()
    .repeat()
    .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  )
  if packing:
    rows = grain.experimental.FirstFitPackIterDataset(
      rows, length_struct=widths, num_packing_bins=batch, seed=seed
    ).map(_rename)
  else:
    rows = rows.map(lambda example: _pad(example, widths))
  return iter(rows.batch(batch))


def scoring(
  examples: list[examples_lib.Example], *, window: int, batch: int, inputs: int = 0
) -> collections.abc.Iterator[Batch]:
  """Each example once, in order, one a row; with `rows` [B], the example's index, to put scores back.

  All batches have one shape: `batch` rows, of the longest example's length rounded up to a multiple of 32 but not
  beyond the window (and the longest inputs', not beyond `inputs`).  The last batch is filled up with rows of padding,
  whose index is -1.

  Raises ValueError if there are no examples, or one is longer than the window or empty.
  """
  _check(examples, window, batch, inputs)
  longest = {name: max(len(example[name]) for example in examples) for name in examples[0]}
  most = _widths(examples, window, inputs)
  widths = {name: min(-(-longest[name] // 32) * 32, most[name]) for name in most}
  return (_scoring_batch(examples, start, batch, widths) for start in range(0, len(examples), batch))


def _scoring_batch(examples: list[examples_lib.Example], start: int, batch: int, widths: dict) -> Batch:
  nothing = {name: column[:0] for name, column in examples[0].items()}
  chosen = examples[start : start + batch]
  padded = [_pad(example, widths) for example in chosen + [nothing] * (batch - len(chosen))]
  stacked = {name: np.stack([row[name] for row in padded]) for name in padded[0]}
  rows = start + np.arange(batch, dtype=np.int32)
  return stacked | {'rows': np.where(rows < len(examples), rows, -1).astype(np.int32)}


def _widths(examples: list[examples_lib.Example], window: int, inputs: int) -> dict[str, int]:
  return {name: inputs if name == 'inputs' else window for name in examples[0]}


def _check(examples: list[examples_lib.Example], window: int, batch: int, inputs: int) -> None:
  if batch < 1:
    raise ValueError(f'batch = {batch}; a batch has at least one row')
  if not examples:
    raise ValueError('no examples to make batches of; check path, start and stop of the data set')
  for index, example in enumerate(examples):
    if not 0 < len(example['tokens']) <= window:
      raise ValueError(
        f'example {index} has {len(example["tokens"])} tokens; encode it for window = {window}, which must hold it'
      )
    if 'inputs' in example and not 0 < len(example['inputs']) <= inputs:
      raise ValueError(
        f'example {index} has {len(example["inputs"])} inputs; encode it for {inputs} of them, which must hold it'
      )


def _pad(example: examples_lib.Example, widths: dict) -> Batch:
  fields = {name: np.pad(column, (0, widths[name] - len(column))) for name, column in example.items()}
  places = np.arange(widths['tokens'], dtype=np.int32)
  real = places < len(example['tokens'])
  fields |= {'segments': real.astype(np.int32), 'positions': np.where(real, places, 0).astype(np.int32)}
  if 'inputs' in example:
    fields['input_segments'] = (np.arange(widths['inputs']) < len(example['inputs'])).astype(np.int32)
  return fields


def _rename(row: Batch) -> Batch:
  """grain adds NAME_segment_ids and NAME_positions to every array; an example's are of one length but its inputs."""
  fields = {name: column for name, column in row.items() if not name.endswith(('_segment_ids', '_positions'))}
  fields |= {'segments': row['tokens_segment_ids'], 'positions': row['tokens_positions']}
  return fields | ({'input_segments': row['inputs_segment_ids']} if 'inputs' in row else {})
