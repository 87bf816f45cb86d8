"""What every value of the config may be: choices, ranges and combinations.

Keys are those of configs/base.py, flattened: 'adapter.rank'.  A text or number that no table
names here is free (a path, an index).
"""

import difflib
import math
import re

_DTYPES = ('float32', 'bfloat16')
_DATASETS = ('data.train', 'data.validation', 'evaluate.text', 'evaluate.choices')
_DATASET_CHOICES = {
  'format': ('alpaca', 'jsonl', 'text', 'pairs'),
  'template': ('alpaca', 'plain'),
  'loss_on': ('completion', 'all'),
  'overflow': ('split', 'cut'),
}

CHOICES = {
  'model.dtype': _DTYPES,
  'model.frozen_dtype': _DTYPES,
  'model.remat': ('none', 'dots', 'full'),
  'base.method': ('stored', 'affine'),
  'base.bits': (8, 4, 3, 2),
  'adapter.kind': ('qalora', 'lora', 'full', 'none'),
  'adapter.pool': ('sum', 'mean'),
  'optim.schedule': ('constant', 'cosine', 'linear'),
  'sharding.fallback': ('error', 'replicate'),
  **{f'{name}.{key}': words for name in _DATASETS for key, words in _DATASET_CHOICES.items()},
}

# Said in words, and held: NaN and infinity are in no range.
_POSITIVE = ('at least 1', lambda x: x >= 1)
_NATURAL = ('at least 0', lambda x: 0 <= x < math.inf)
_ABOVE_ZERO = ('above 0', lambda x: 0 < x < math.inf)
_BELOW_ONE = ('at least 0 and below 1', lambda x: 0 <= x < 1)
_FRACTION = ('from 0 to 1', lambda x: 0 <= x <= 1)
_SIZE_OR_REST = ('-1 or at least 1', lambda x: x == -1 or x >= 1)

RANGES = {
  # NumPy and JAX both take it as 32 bits without a sign.
  'seed': ('from 0 to 4294967295', lambda x: 0 <= x < 2**32),
  'model.architecture.vocab_size': _NATURAL,
  'model.architecture.hidden_size': _POSITIVE,
  'model.architecture.intermediate_size': _POSITIVE,
  'model.architecture.num_hidden_layers': _POSITIVE,
  'model.architecture.num_attention_heads': _POSITIVE,
  'model.architecture.num_key_value_heads': _POSITIVE,
  'model.architecture.max_position_embeddings': ('at least 2', lambda x: x >= 2),
  'model.architecture.rope_theta': _ABOVE_ZERO,
  'model.architecture.rms_norm_eps': _ABOVE_ZERO,
  'base.group': _SIZE_OR_REST,
  'adapter.rank': _POSITIVE,
  'adapter.alpha': _ABOVE_ZERO,
  'adapter.dropout': _BELOW_ONE,
  'data.window': ('at least 2', lambda x: x >= 2),
  'data.max_prompt': _NATURAL,
  'data.max_completion': _NATURAL,
  'train.steps': _POSITIVE,
  'train.batch': _POSITIVE,
  'train.accumulation': _POSITIVE,
  'train.log_every': _POSITIVE,
  'train.validate_every': _NATURAL,
  'train.checkpoint_every': _POSITIVE,
  'train.keep': _POSITIVE,
  'optim.learning_rate': _ABOVE_ZERO,
  'optim.end_fraction': _FRACTION,
  'optim.warmup_steps': _NATURAL,
  'optim.clip': _NATURAL,
  'optim.beta1': _BELOW_ONE,
  'optim.beta2': _BELOW_ONE,
  'optim.eps': _ABOVE_ZERO,
  'optim.weight_decay': _NATURAL,
  'sharding.data': _SIZE_OR_REST,
  'sharding.fsdp': _SIZE_OR_REST,
  'sharding.tensor': _SIZE_OR_REST,
  'evaluate.batch': _POSITIVE,
  'generate.max_tokens': _POSITIVE,
  'generate.temperature': _NATURAL,
  'generate.top_k': _NATURAL,
  'generate.top_p': ('above 0 and at most 1', lambda x: 0 < x <= 1),
}


def problems(values):
  """One line for everything that is wrong with the flattened config `values`; empty when nothing is."""
  wrong = [_not_a_choice(key, values[key], words) for key, words in CHOICES.items() if values[key] not in words]
  outside = [key for key, (_, holds) in RANGES.items() if not holds(values[key])]
  wrong += [f'{key} = {values[key]!r}: must be {RANGES[key][0]}' for key in outside]
  return wrong + _bad_targets(values) + _bad_combinations(values, set(outside))


def _not_a_choice(key, value, words):
  close = difflib.get_close_matches(str(value), [str(word) for word in words], n=1)
  hint = f'; did you mean {close[0]!r}?' if close else ''
  return f'{key} = {value!r}: must be one of {", ".join(map(repr, words))}{hint}'


def _bad_targets(values):
  wrong = []
  for key in ('base.targets', 'adapter.targets'):
    if not values[key]:
      wrong.append(f"{key} is empty: write 'all', 'attention', 'mlp' or a regular expression")
    try:
      re.compile(values[key])
    except re.error as error:
      wrong.append(f'{key} = {values[key]!r}: not a regular expression: {error}')
  return wrong


def _bad_combinations(values, outside):
  wrong = []
  batch, accumulation = values['train.batch'], values['train.accumulation']
  if not outside & {'train.batch', 'train.accumulation'} and batch % accumulation:
    wrong.append(f'train.accumulation = {accumulation} does not divide train.batch = {batch}')
  rest = [f'sharding.{axis}' for axis in ('data', 'fsdp', 'tensor') if values[f'sharding.{axis}'] == -1]
  if len(rest) > 1:
    wrong.append(f'{" and ".join(rest)} are all -1: only one axis can take the devices that are left')
  kind = values['adapter.kind']
  if kind == 'full' and values['base.method'] == 'affine':
    wrong.append(
      "adapter.kind = 'full' cannot train base.method = 'affine', whose codes are integers: "
      "set adapter.kind = 'lora' or 'qalora', or base.method = 'stored'"
    )
  if values['model.source'] == 'scratch' and kind in ('lora', 'qalora'):
    wrong.append(
      f"adapter.kind = {kind!r} would adapt random weights (model.source = 'scratch'): "
      "set adapter.kind = 'full', or name the model to adapt in model.source"
    )
  return wrong
