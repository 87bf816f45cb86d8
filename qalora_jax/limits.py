"""What every value of the config may be: choices, ranges and combinations.

Keys are those of configs/base.py, flattened: 'adapter.rank'.  A text or number that no table
names here is free (a path, an index).
"""

import difflib
import json
import math
import re

from qalora_jax import rules

_DTYPES = ('float32', 'bfloat16')
_DATASETS = (
  'data.train',
  'data.validation',
  'evaluate.text',
  'evaluate.choices',
  'evaluate.generation',
  'calibration.text',
)
_GLUE = ('sst2', 'mrpc', 'rte', 'cola', 'mnli', 'mnli-mismatched', 'qnli', 'qqp', 'stsb')
_DATASET_CHOICES = {
  'recipe': (
    '',
    'alpaca',
    'alpaca-clean',
    'flan-v2',
    'oasst1',
    'self-instruct',
    'longform',
    'chip2',
    'hh-rlhf',
    'unnatural-instructions',
    'commonsense',
    'e2e',
    *_GLUE,
  ),
  'format': ('alpaca', 'jsonl', 'instances', 'chip2', 'chosen', 'text', 'pairs', *_GLUE),
  'template': ('alpaca', 'plain'),
  'loss_on': ('completion', 'all'),
  'overflow': ('split', 'cut'),
  'part': ('train', 'validation', 'test'),
}

CHOICES = {
  'model.dtype': _DTYPES,
  'model.frozen_dtype': _DTYPES,
  'model.remat': ('none', 'dots', 'full', 'offload'),
  'base.method': ('stored', 'affine', 'gptq', 'nf4', 'fp4', 'qat'),
  'base.bits': (8, 4, 3, 2),
  'base.zero': ('real', 'integer'),
  'base.clip': ('none', 'percentile', 'mse'),
  'base.scale_dtype': ('float32', 'float16'),
  'base.scales': ('learned', 'minmax'),
  'adapter.init': ('zero', 'pissa', 'loftq', 'calibrated'),
  'adapter.kind': ('qalora', 'lora', 'head', 'full', 'none'),
  'adapter.pool': ('sum', 'mean'),
  'evaluate.split': ('', 'train', 'dev', 'validation', 'test'),
  'evaluate.overflow': ('error', 'cut'),
  'optim.schedule': ('constant', 'cosine', 'linear'),
  'optim.state': ('float32', 'int8'),
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
  'model.labels': _NATURAL,
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
  'base.percentile': ('above 50 and at most 100', lambda x: 50 < x <= 100),
  'base.norm': _ABOVE_ZERO,
  'base.refine_damping': _NATURAL,
  'base.budget': _NATURAL,
  'base.gptq.damping': _NATURAL,
  'base.gptq.block': _POSITIVE,
  'calibration.samples': _POSITIVE,
  'calibration.length': ('at least 2', lambda x: x >= 2),
  'calibration.batch': _POSITIVE,
  'adapter.init_iterations': _POSITIVE,
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
  'evaluate.limit': _NATURAL,
  'evaluate.stride': _NATURAL,
  'evaluate.batch': _POSITIVE,
  'generate.max_tokens': _POSITIVE,
  'generate.temperature': _NATURAL,
  'generate.top_k': _NATURAL,
  'generate.top_p': ('above 0 and at most 1', lambda x: 0 < x <= 1),
  'generate.min_p': _FRACTION,
  'generate.repetition_penalty': _ABOVE_ZERO,
  'generate.beams': _POSITIVE,
  'generate.length_penalty': ('a finite number', math.isfinite),
  'generate.batch': _POSITIVE,
  **{f'{name}.{key}': _NATURAL for name in _DATASETS for key in ('sample', 'sample_seed', 'per_task')},
}


def problems(values):
  """One line for everything that is wrong with the flattened config `values`; empty when nothing is."""
  wrong = [_not_a_choice(key, values[key], words) for key, words in CHOICES.items() if values[key] not in words]
  # An architecture with a model_type has the keys of its family, which looks at them itself.
  outside = [key for key, (_, holds) in RANGES.items() if key in values and not holds(values[key])]
  wrong += [f'{key} = {values[key]!r}: must be {RANGES[key][0]}' for key in outside]
  return (
    wrong + _bad_stops(values) + _bad_targets(values) + _bad_rules(values) + _bad_combinations(values, set(outside))
  )


def stops(value: str) -> tuple[str, ...]:
  """The strings that generate.stop names: none, one, or a JSON list, which begins with ["; ValueError for others."""
  if not value.startswith('["'):
    return (value,) if value else ()
  found = json.loads(value)
  if not all(isinstance(stop, str) and stop for stop in found):
    raise ValueError('a stop string is a string that is not empty')
  return tuple(found)


def _bad_stops(values):
  try:
    stops(values['generate.stop'])
  except ValueError as error:
    return [f'generate.stop = {values["generate.stop"]!r}: a string, or a JSON list of strings ({error})']
  return []


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


def _bad_rules(values):
  base = {key.removeprefix('base.'): value for key, value in values.items() if key.startswith('base.')}
  try:
    parsed = rules.parse(values['base.rules'], base)
  except ValueError as error:
    return [str(error)]
  wrong = []
  if parsed and base['method'] in ('stored', 'qat'):
    wrong.append(f'base.rules has nothing to act on: base.method = {base["method"]!r} quantizes nothing by rules')
  for pattern, chosen in parsed:
    where = f'base.rules, {pattern!r}: '
    words = {'base.method': ('affine', 'gptq', 'nf4', 'fp4', 'dense')}
    stated = {f'base.{key}': value for key, value in chosen.items()}
    wrong += [
      where + _not_a_choice(key, value, options)
      for key, value in stated.items()
      if (options := (CHOICES | words).get(key)) and value not in options
    ]
    wrong += [
      f'{where}{key} = {value!r}: must be {RANGES[key][0]}'
      for key, value in stated.items()
      if key in RANGES and not RANGES[key][1](value)
    ]
    if base['budget'] and 'bits' in chosen:
      wrong.append(f'{where}base.bits is chosen by base.budget = {base["budget"]}: leave one of them away')
    wrong += [where + problem for problem in _bad_method(base | chosen)]
  return wrong


def _bad_method(base):
  """What does not go together in how one weight is quantized; `base` is flattened, without its prefix."""
  wrong, method = [], base['method']
  if method in ('nf4', 'fp4') and base['bits'] != 4:
    wrong.append(f'base.bits = {base["bits"]}: base.method = {method!r} has 4 bits')
  if method not in ('nf4', 'fp4', 'dense') and base['double']:
    wrong.append(f"base.double = True: only the scales of 'nf4' and 'fp4' are quantized again, not those of {method!r}")
  if base['double'] and base['scale_dtype'] != 'float32':
    wrong.append("base.scale_dtype = 'float16' with base.double = True: those scales are in 8 bits")
  if method == 'gptq' and base['gptq.act_order'] and not base['gptq.static_groups']:
    wrong.append(
      'base.gptq.act_order = True needs base.gptq.static_groups = True: groups whose inputs are not neighbours cannot '
      'be pooled, and no QA-LoRA adapter could be merged'
    )
  if method == 'gptq' and base['gptq.stale_groups'] and base['gptq.static_groups']:
    wrong.append('base.gptq.stale_groups and base.gptq.static_groups are both True: static groups are never stale')
  if method == 'qat' and base['refine']:
    wrong.append("base.refine = True: base.method = 'qat' trains its weights instead; set base.refine = False")
  return wrong


def _looks_at_activations(values, base):
  """(key, value) of all that needs calibration text; rules are looked at as far as they can be read."""
  try:
    parsed = rules.parse(base['rules'], base)
  except ValueError:
    parsed = ()
  if base['method'] != 'stored':
    for where, flat in (('', base), *((f' (rule {pattern!r})', base | chosen) for pattern, chosen in parsed)):
      if flat['method'] == 'gptq':
        yield f'base.method{where}', 'gptq'
      if flat['refine'] and flat['method'] != 'dense':
        yield f'base.refine{where}', True
    # A source that is quantized already brings the adapter that it was calibrated with, under method 'stored'.
    if values['adapter.init'] == 'calibrated':
      yield 'adapter.init', 'calibrated'
  if base['budget']:
    yield 'base.budget', base['budget']


def _bad_combinations(values, outside):
  wrong = []
  base = {key.removeprefix('base.'): value for key, value in values.items() if key.startswith('base.')}
  wrong += _bad_method(base)
  batch, accumulation = values['train.batch'], values['train.accumulation']
  if not outside & {'train.batch', 'train.accumulation'} and batch % accumulation:
    wrong.append(f'train.accumulation = {accumulation} does not divide train.batch = {batch}')
  rest = [f'sharding.{axis}' for axis in ('data', 'fsdp', 'tensor') if values[f'sharding.{axis}'] == -1]
  if len(rest) > 1:
    wrong.append(f'{" and ".join(rest)} are all -1: only one axis can take the devices that are left')
  kind, method = values['adapter.kind'], values['base.method']
  drawn = {'generate.temperature': 0.0, 'generate.repetition_penalty': 1.0}
  if values['generate.beams'] > 1 and any(values[key] != plain for key, plain in drawn.items()):
    wrong.append(
      f'generate.beams = {values["generate.beams"]} looks for the likeliest text: set generate.temperature = 0 and '
      'generate.repetition_penalty = 1, or generate.beams = 1'
    )
  if values['adapter.source'] and values['model.source'] == 'scratch':
    wrong.append("adapter.source is an adapter of a trained model: name that as model.source, which is 'scratch'")
  if values['adapter.source'] and (kind not in ('lora', 'qalora') or values['adapter.init'] != 'zero'):
    wrong.append(
      f"adapter.source = {values['adapter.source']!r} is an adapter to begin with: set adapter.kind = 'lora' or "
      f"'qalora' (not {kind!r}) and adapter.init = 'zero' (not {values['adapter.init']!r})"
    )
  if kind == 'full' and method not in ('stored', 'qat'):
    wrong.append(
      f"adapter.kind = 'full' cannot train base.method = {method!r}, whose codes are integers: "
      "set adapter.kind = 'lora' or 'qalora', base.method = 'stored', or base.method = 'qat' to train them rounded"
    )
  if kind in ('lora', 'qalora') and method == 'qat':
    wrong.append(
      f"base.method = 'qat' trains the weights themselves, without an adapter: set adapter.kind = 'full', not {kind!r}"
    )
  if base['budget'] and method not in ('affine', 'gptq'):
    wrong.append(
      f"base.budget = {base['budget']}: bits are chosen for base.method = 'affine' or 'gptq', not {method!r}"
    )
  if values['adapter.init'] != 'zero' and kind not in ('lora', 'qalora'):
    wrong.append(f'adapter.init = {values["adapter.init"]!r}: adapter.kind = {kind!r} has no A and B to begin with')
  needs = [f'{key} = {value!r}' for key, value in _looks_at_activations(values, base)]
  if needs and not (values['calibration.text.path'] or values['calibration.text.recipe']):
    wrong.append(f'{" and ".join(needs)} looks at activations: name some text in calibration.text.path')
  if values['model.source'] == 'scratch' and kind in ('lora', 'qalora'):
    wrong.append(
      f"adapter.kind = {kind!r} would adapt random weights (model.source = 'scratch'): "
      "set adapter.kind = 'full', or name the model to adapt in model.source"
    )
  return wrong
