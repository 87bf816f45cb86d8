"""One run of an experiment, from a flat dict of config overrides to a flat dict of what was measured.

A run quantizes its base, trains, merges, quantizes again if it says so, and evaluates.  Every stage is a `qalora`
command in a directory named by the hash of all that decides its result, so that runs which share a stage (a base, or a
training that is afterwards quantized to three widths) share its directory, and nothing is done twice.

Keys are dotted config keys, and beside them:
    then.base.*   what the merged dense model is quantized again to: {'then.base.method': 'gptq', 'then.base.bits': 3}
    score         what is evaluated: 'base' (untrained), 'trained' (the adapter beside its base) or 'merged'.  Default:
                  'merged' where that is exact (qalora) or quantized again, else 'trained', 'base' if nothing is trained

Bases are quantized with seed 0, whatever the run's seed: a spread over seeds is that of adapter and data order.
"""

import contextlib
import fcntl
import hashlib
import json
import pathlib

import ml_collections

from experiments import stages
from qalora_jax import adapters
from qalora_jax import bases
from qalora_jax import build
from qalora_jax import config as config_lib

SCORE, THEN = 'score', 'then.'
SCORES = ('base', 'trained', 'merged')
# What a model depends on, and what it is looked at with.
_TRAINING = ('seed', 'model', 'base', 'adapter', 'data', 'train', 'optim')
_LOOKING = ('evaluate', 'generate')


def result(recipe: str, overrides: dict, root: pathlib.Path) -> dict:
  """What `qalora evaluate` measured at the end of the run, and `trained_parameters` where it trained.

  Stages are kept below `root`.  Raises ValueError or FileNotFoundError for what `checked` or a command refuses.
  """
  model, found = made(recipe, overrides, root)
  return _scored(recipe, _parts(recipe, overrides)[0], model, pathlib.Path(root) / 'scores') | found


def made(recipe: str, overrides: dict, root: pathlib.Path) -> tuple[pathlib.Path | str, dict]:
  """The model that a run ends with, before it is evaluated, and what its training said of itself."""
  checked(recipe, overrides)
  root, found = pathlib.Path(root), {}
  own, again, which = _parts(recipe, overrides)
  model = _base(recipe, own, root / 'bases')
  if which != 'base':
    model, found = _trained(recipe, own, model, root / 'trained')
  if which == 'merged':
    exact = not again and _config(recipe, own).adapter.kind == 'qalora'
    with alone(model):
      model = stages.exported(model, 'qalora' if exact else 'hf')
  if again:
    model = _base(recipe, _requantized(own, again) | {'model.source': str(model)}, root / 'bases')
  return model, found


def training(recipe: str, overrides: dict, root: pathlib.Path) -> pathlib.Path:
  """The workdir of a run's training, done if it is not yet."""
  own, root = _parts(recipe, overrides)[0], pathlib.Path(root)
  return _trained(recipe, own, _base(recipe, own, root / 'bases'), root / 'trained')[0]


def checked(recipe: str, overrides: dict) -> ml_collections.ConfigDict:
  """The config of the run's training; ValueError names every key and value of the run that cannot be."""
  own, again, which = _parts(recipe, overrides)
  config = _config(recipe, own)
  config_lib.check(config)
  if again:
    config_lib.check(_config(recipe, _requantized(own, again)))
  if which not in SCORES:
    raise ValueError(f'{SCORE} = {which!r}: must be one of {", ".join(map(repr, SCORES))}')
  if config.adapter.kind == 'none' and which != 'base':
    raise ValueError(f'{SCORE} = {which!r}: adapter.kind = "none" trains nothing that could be scored')
  return config


def _parts(recipe: str, overrides: dict) -> tuple[dict, dict, str]:
  """(overrides of the config, those of what the merged model is quantized to, what is scored)."""
  again = {key.removeprefix(THEN): value for key, value in overrides.items() if key.startswith(THEN)}
  if wrong := [key for key in again if not key.startswith('base.')]:
    raise ValueError(f'{THEN}{wrong[0]}: only base.* says how a merged model is quantized again')
  own = {key: value for key, value in overrides.items() if key != SCORE and not key.startswith(THEN)}
  kind = _config(recipe, own).adapter.kind
  default = 'base' if kind == 'none' else 'merged' if again or kind == 'qalora' else 'trained'
  return own, again, 'merged' if again else overrides.get(SCORE, default)


def _requantized(own: dict, again: dict) -> dict:
  """The overrides of the second quantization, in which nothing is said of the first or of the adapter."""
  kept = {key: value for key, value in own.items() if not key.startswith(('base.', 'adapter.'))}
  return kept | again | {'adapter.kind': 'none', 'adapter.init': 'zero'}


def _config(recipe: str, overrides: dict) -> ml_collections.ConfigDict:
  return config_lib.override(config_lib.recipe(recipe), overrides)


def _base(recipe: str, own: dict, place: pathlib.Path):
  """The directory (or hub id) of the run's frozen weights: the source, or what `qalora quantize` makes of it."""
  config = _config(recipe, own | {'seed': 0})
  if config.base.method in ('stored', 'qat'):
    return config.model.source
  place /= _name(bases.settings(config))
  kept = ('model.', 'base.', 'calibration.', 'adapter.')
  words = _words({key: value for key, value in own.items() if key.startswith(kept)})
  with alone(place):
    return stages.quantized(place, f'--config={recipe}', *words, '--config.seed=0', '--config.evaluate.text.path=')


def _trained(recipe: str, own: dict, base, place: pathlib.Path) -> tuple[pathlib.Path, dict]:
  """The workdir of the run's training, and what it says of it."""
  own = {key: value for key, value in own.items() if not key.startswith((*_LOOKING, 'calibration.'))}
  if str(base) != _config(recipe, own).model.source:
    own = {key: value for key, value in own.items() if not key.startswith('base.')}
    # The base says itself what it is.
    own |= {'model.source': str(base), 'base.method': 'stored', 'base.rules': '', 'base.budget': 0.0}
    own |= {'base.refine': False, 'base.double': False, 'calibration.text.path': ''}
  own['train.tensorboard'] = False
  config = _config(recipe, own)
  place /= _name({key: config.to_dict()[key] for key in _TRAINING})
  with alone(place):
    stages.trained(place, f'--config={recipe}', *_words(own))
  lines = [json.loads(line) for line in (place / 'metrics.jsonl').read_text().splitlines()]
  found = {'trained_parameters': adapters.count(build.setup(config).shapes['params'])}
  if scores := [line['validation_loss'] for line in lines if 'validation_loss' in line]:
    found['validation_nats'] = scores[-1]
  return place, found


def _scored(recipe: str, own: dict, model, place: pathlib.Path) -> dict:
  looking = {key: value for key, value in own.items() if key.startswith((*_LOOKING, 'data.'))}
  config = _config(recipe, looking).to_dict()
  place /= _name({'model': str(model), 'window': config['data'], **{key: config[key] for key in _LOOKING}})
  with alone(place):
    row = stages.scored(place, f'--config={recipe}', *_words(looking), f'--model={model}')
  return {key: value for key, value in row.items() if key != 'model'}


def _words(overrides: dict) -> list[str]:
  return [f'--config.{key}={value}' for key, value in sorted(overrides.items())]


def _name(decides: dict) -> str:
  return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


@contextlib.contextmanager
def alone(place):
  """Two processes never make the same file or directory at once."""
  place = pathlib.Path(place)
  place.parent.mkdir(parents=True, exist_ok=True)
  with place.with_name(f'.{place.name}.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield
