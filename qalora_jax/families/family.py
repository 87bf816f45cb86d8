"""What a family has to say, and how config.json is read without believing too much."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import math

from flax import linen as nn

from qalora_jax import objectives


@dataclasses.dataclass(frozen=True)
class View:
  """Where a tensor lies within one that is stored otherwise: its outputs `rows` of `outputs`.

  `name` is the stored tensor's, {} standing for the layer.  `outputs_first`: a matrix is stored as [outputs, inputs],
  as torch's Linear does; not so by GPT-2.
  """

  name: str
  rows: slice
  outputs: int
  outputs_first: bool = True


@dataclasses.dataclass(frozen=True)
class Headed:
  """A model with the head that is asked for, on a source.

  trains: the modules of the head that train beside adapters, whatever the rest does.  drawn: those of them that the
  source does not hold, and that are drawn.
  """

  config: object
  trains: tuple[str, ...] = ()
  drawn: tuple[str, ...] = ()


def _headless(config, labels: int, held: Callable, pooler: bool = False) -> Headed:
  if labels:
    raise ValueError(f'model.labels = {labels}: a model of type {config.family!r} has no classifier; set it to 0.')
  if pooler:
    raise ValueError(f'model.train_pooler = True: a model of type {config.family!r} has no pooler; set it to False.')
  return Headed(config)


@dataclasses.dataclass(frozen=True)
class Family:
  """A kind of model as Hugging Face keeps it.

  model_type: config.json's.  architecture: the class that transformers loads it by.
  module: module(config, scheme) is the model.
  read(raw, dtype, remat): the config of what config.json says; ValueError for what this family has no way to say.
  write(config): what config.json says beside model_type and architectures; read(write(config)) == config.
  names(config): {path in the tree: name of the tensor}, {} standing for the layer of a stacked one.
  views(config): {name: View} of the tensors that files hold otherwise than under their name.
  ignored(config, name): whether a tensor of a file says nothing.
  copies(config): {name: name of the tensor that it repeats} of those that say nothing only if they are alike.
  spelled(name): the name in `names` of a tensor that a file calls `name`.
  headed(config, labels, held, pooler): `Headed`, with a classifier of so many outputs (0: as the source has it), of a
    source whose tensors are held() = {name: shape}, and with a pooler that trains too; ValueError for what the family
    has not.
  objective(config): what training it makes small.
  task_type: what PEFT calls a model of this kind.
  """

  model_type: str
  architecture: str
  module: type[nn.Module]
  read: Callable
  write: Callable[..., dict]
  names: Callable[..., Mapping[str, str]]
  views: Callable[..., Mapping[str, View]] = lambda config: {}
  ignored: Callable[..., bool] = lambda config, name: False
  copies: Callable[..., Mapping[str, str]] = lambda config: {}
  spelled: Callable[[str], str] = lambda name: name
  headed: Callable[..., Headed] = _headless
  objective: Callable[..., objectives.Objective] = lambda config: objectives.TOKENS
  task_type: str = 'CAUSAL_LM'


def fused(stored: str, parts: Mapping[str, int], outputs_first: bool = True) -> Iterator[tuple[str, View]]:
  """(name, View) of tensors that lie one after another in the tensor `stored`; `parts`: {name: its outputs}."""
  begin, outputs = 0, sum(parts.values())
  for name, count in parts.items():
    yield name, View(stored, slice(begin, begin + count), outputs, outputs_first)
    begin += count


def check_counts(raw: Mapping, keys) -> None:
  """ValueError where one of these keys of config.json is missing or no count."""
  for key in keys:
    if key not in raw:
      raise ValueError(f'has no "{key}"; copy the config.json that was published with the weights.')
    _check_count(key, raw[key], least=1)


def check_fixed(raw: Mapping, fixed: Mapping) -> None:
  """ValueError where config.json says otherwise than `fixed`, {key: the only value}; absent, a key means the same.

  So does null where the value is False: transformers asks whether it is true.
  """
  for key, value in fixed.items():
    if raw.get(key, value) != value and not (raw[key] is None and value is False):
      raise ValueError(f'{key} = {raw[key]!r}; only {value!r} is supported.')


def value(raw: Mapping, key: str, default):
  """What config.json says, `default` where it is absent or null."""
  return default if raw.get(key) is None else raw[key]


def number(raw: Mapping, key: str, default: float) -> float:
  """`value`, a number above 0; ValueError for anything else."""
  found = value(raw, key, default)
  if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 < found < math.inf:
    raise ValueError(f'{key} = {found!r}; it is a number above 0.')
  return float(found)


def count(raw: Mapping, key: str, default: int, least: int = 1) -> int:
  """`value`, a whole number of at least `least`; ValueError for anything else."""
  found = value(raw, key, default)
  _check_count(key, found, least)
  return found


def _check_count(key: str, found, least: int) -> None:
  if isinstance(found, bool) or not isinstance(found, int) or found < least:
    raise ValueError(f'{key} = {found!r}; it is a count of at least {least}.')


def stated(raw: Mapping, keys) -> dict:
  """Those of `keys` that config.json says; absent or null, they are left to the default."""
  return {key: raw[key] for key in keys if raw.get(key) is not None}


def check_choice(key: str, value, words) -> None:
  """ValueError where config.json says something else than one of `words`."""
  if value not in tuple(words):
    raise ValueError(f'{key} = {value!r}; supported: {", ".join(words)}.')


def window(raw: Mapping, default: int | None) -> int:
  """sliding_window in places, `default` where it is not said; 0 for null, which is no window."""
  value = raw.get('sliding_window', default)
  if value is not None and (not isinstance(value, int) or value < 1):
    raise ValueError(f'sliding_window = {value!r}; it is a count of at least 1, or null.')
  return value or 0
