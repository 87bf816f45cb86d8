"""From a ConfigDict or a directory to what the commands work on: model, weights, tokenizer."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import json
import pathlib
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from qalora_jax import adapters
from qalora_jax import bases
from qalora_jax import calibrate
from qalora_jax import checkpoint
from qalora_jax import checksum
from qalora_jax import config as config_lib
from qalora_jax import families
from qalora_jax import hf
from qalora_jax import hosts
from qalora_jax import layout
from qalora_jax import limits
from qalora_jax import objectives
from qalora_jax import packed
from qalora_jax import peft
from qalora_jax import progress
from qalora_jax import sharding
from qalora_jax import stacks
from qalora_jax import stored
from qalora_jax import tensors
from qalora_jax import tokenizer as tokenizer_lib
from qalora_jax.data import batches
from qalora_jax.data import examples
from qalora_jax.data import recipes
from qalora_jax.data import records
from qalora_jax.data import shares
from qalora_jax.generate import cache
from qalora_jax.generate import continuation
from qalora_jax.generate import sampling
from qalora_jax.models import layers
from qalora_jax.models import linear

CHECKPOINTS = 'checkpoints'
# Where `train` keeps a base that it had to calibrate.
BASE = 'base'
_BASE_FILE = 'base.json'


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a config means before any weight is read: the source's directory (None: from scratch), the model, its shapes.

  `abstract` holds the boxed abstract collections 'frozen' and 'params'; `drawn` names the modules of a head that the
  source lacks.
  """

  directory: pathlib.Path | None
  model: nn.Module
  abstract: dict
  drawn: tuple[str, ...] = ()

  @property
  def shapes(self) -> dict:
    """The abstract collections without their boxes."""
    return nn.unbox(self.abstract)


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model ready to run: `variables` holds 'frozen' and 'params', `tokenizer_from` the tokenizer's files."""

  model: nn.Module
  variables: dict
  tokenizer: tokenizer_lib.Tokenizer
  tokenizer_from: pathlib.Path
  origin: dict


# Raises ValueError for a model that a command cannot do its work with.
Check = Callable[[nn.Module], None]


def anything(model: nn.Module) -> None:
  """Every model will do."""


def names_data(spec) -> bool:
  """Whether a config's dataset is to be used: it names a path or a recipe."""
  return bool(spec.path or spec.recipe)


def source(spec) -> records.Source:
  """The data source that a config's dataset describes, its recipe looked up; raises as `recipes.resolve` does."""
  return recipes.resolve(records.Source(**spec))


def setup(config: ml_collections.ConfigDict) -> Setup:
  """Resolves the source, reads its config.json and works out every shape; nothing large is read.

  Raises ValueError or FileNotFoundError for what cannot be: an unknown source, a group that does not divide,
  a quantized source under another quantization, an adapter on the wrong base.
  """
  if config.model.source == 'scratch':
    return abstract_setup(config)
  directory = hf.resolve(config.model.source, config.model.revision)
  form = stored.form(directory)
  model_config = hf.read_config(
    directory, dtype=jnp.dtype(config.model.dtype), remat=config.model.remat, quantized=form is not None
  )
  return _setup(config, directory, model_config, form and form.describe(directory))


def abstract_setup(config: ml_collections.ConfigDict) -> Setup:
  """As `setup`, from config.model.architecture alone: nothing is downloaded or read (65B in seconds)."""
  said = config.model.architecture.to_dict()
  if not said.get('vocab_size'):
    said['vocab_size'] = tokenizer_lib.load(config.model.tokenizer).vocab_size
  try:
    family = families.find(said.get('model_type', 'llama'))
    model_config = family.read(said, dtype=jnp.dtype(config.model.dtype), remat=config.model.remat)
  except ValueError as error:
    raise ValueError(f'model.architecture: {error}') from error
  return _setup(config, None, model_config, None)


def _setup(config, directory, model_config: layers.Config, forms: dict | None) -> Setup:
  held = dict if directory is None else functools.partial(hf.held, directory, model_config)
  headed = families.of(model_config).headed(model_config, config.model.labels, held, config.model.train_pooler)
  model_config = headed.config
  model = families.of(model_config).module(model_config, bases.scheme(config, directory, forms, headed))
  _check_targets(config, model, directory)
  _check_adapted(config, model)
  _check_window(config, model)
  if asked := bases.looks_at_activations(config):
    calibrate.check_stacks(model_config, asked)
  return Setup(directory, model, layout.abstract(model_config, model.scheme), headed.drawn)


def prepared(config: ml_collections.ConfigDict, workdir) -> ml_collections.ConfigDict:
  """The config with the base that `train` made in the workdir, if it did, in place of its source.

  Raises ValueError where that base was made otherwise than the config says.
  """
  base = pathlib.Path(workdir) / BASE
  if not (bases.needs_quantize(config) and packed.holds(base)):
    return config
  # Through JSON, as the manifest went.
  now, then = json.loads(json.dumps(bases.settings(config))), packed.manifest(base)['provenance'].get('settings')
  if then:
    # A key that has come since is as if it had been at its default.
    then['calibration']['text'] = config_lib.default().calibration.text.to_dict() | then['calibration']['text']
  if now != then:
    changed = config_lib.differences(then or {}, now)
    raise ValueError(f'{base} was made otherwise: {"; ".join(changed)}. Remove it, or choose another --workdir.')
  config = config.copy_and_resolve_references()
  config.model.source = str(base)
  return config


def _check_targets(config, model: nn.Module, directory) -> None:
  """ValueError where a pattern of targets or rules selects nothing."""
  names = list(layout.weights(model.config))
  stated = []
  if directory is None or not stored.is_quantized(directory):
    stated = [('base.targets' if last else 'base.rules', pattern) for pattern, last in bases.patterns(config.base)]
  if config.adapter.kind in adapters.KINDS:
    stated.append(('adapter.targets', config.adapter.targets))
  for key, pattern in stated:
    if not any(linear.selects(pattern, name) for name in names):
      shown = ', '.join(dict.fromkeys(re.sub(r'/\d+/', '/N/', name) for name in names))
      raise ValueError(
        f'{key}: {pattern!r} selects no matrix; there are {shown}, N from 0 to {max(model.config.depths.values()) - 1}.'
      )


def _check_adapted(config, model: nn.Module) -> None:
  """ValueError where an adapter would stand beside a dense weight that it cannot work with."""
  scheme_, chosen = model.scheme, config.adapter
  dense = [name for name in layout.weights(model.config) if scheme_.adapts(name) and scheme_.quantizer(name) is None]
  if chosen.kind == 'qalora' and dense:
    raise ValueError(
      f'qalora needs quantized weights, and {dense[0]} is dense: set base.method = "affine" (or "gptq", or a quantized '
      'model.source), keep adapter.targets within what base.targets and base.rules quantize, or use '
      'adapter.kind = "lora".'
    )
  if chosen.init in ('loftq', 'calibrated') and dense:
    raise ValueError(
      f'adapter.init = {chosen.init!r} makes good what quantization lost, and {dense[0]} is dense: keep '
      'adapter.targets within what base.targets and base.rules quantize, or set adapter.init = "pissa" or "zero".'
    )


def _check_window(config, model: nn.Module) -> None:
  """ValueError where rows that train are longer than the table of a model that has learned its positions."""
  window, places = config.data.window, model.config.max_position_embeddings
  if config.adapter.kind != 'none' and getattr(model.config, 'learned_positions', False) and window > places:
    raise ValueError(f'data.window = {window}, and the model has learned {places} positions: set data.window to that.')


def tokenizer(config: ml_collections.ConfigDict, built: Setup) -> tokenizer_lib.Tokenizer:
  """The tokenizer of config.model.tokenizer, else of the source's directory; ValueError if the model lacks its ids."""
  place = tokenizer_directory(config, built.directory)
  loaded, rows = tokenizer_lib.load(place), built.model.config.vocab_size
  if loaded.vocab_size > rows:
    raise ValueError(
      f'the tokenizer of {place} has {loaded.vocab_size} tokens, the model embeds {rows}; name its own by '
      'model.tokenizer, or (from scratch) raise model.architecture.vocab_size.'
    )
  return loaded


def tokenizer_directory(config: ml_collections.ConfigDict, directory: pathlib.Path | None) -> pathlib.Path:
  """Where the tokenizer's files are."""
  if config.model.tokenizer:
    return pathlib.Path(config.model.tokenizer)
  if directory is None:
    raise ValueError('model.source = "scratch" has no tokenizer of its own: set model.tokenizer to a directory.')
  return directory


def widths(config, model: nn.Module) -> dict[str, int]:
  """The widths of rows, as `batches` takes them: window (of tokens), inputs (0 where the model has no encoder)."""
  own = families.objective(model.config).widths(config.data.window, config.data.max_completion)
  return {'window': own['tokens'], 'inputs': own.get('inputs', 0)}


def encode(config, spec, tokenizer, model: nn.Module) -> list[examples.Example]:
  """The examples of one of the config's datasets, all read and checked; of several processes each makes its part."""
  chosen, own = source(spec), examples.encode
  if families.objective(model.config) is objectives.ANSWERS:
    own = functools.partial(examples.encode_answer, begin=model.config.decoder_start_token_id)
  convert = functools.partial(
    own,
    tokenizer=tokenizer,
    window=config.data.window,
    loss_on=chosen.loss_on,
    append_eos=chosen.append_eos,
    overflow=chosen.overflow,
    max_prompt=config.data.max_prompt,
    max_completion=config.data.max_completion,
  )
  return shares.convert(lambda: records.read(chosen), convert)


def check_examples(config, key: str, encoded: list[examples.Example], model_config: layers.Config) -> None:
  """ValueError where the examples of the dataset `key` are not what the model's own objective learns from."""
  objective = families.objective(model_config)
  wanted, family = {name for name in objective.arrays if name not in batches.PLACES}, model_config.family
  if objective is objectives.LABELS and not model_config.labels:
    raise ValueError(
      f'the {family} of {config.model.source} has no classifier: set model.labels to the number of classes, or to 1 '
      'for a number.'
    )
  if objective is objectives.LABELS and config.data.window > model_config.max_position_embeddings:
    raise ValueError(
      f'data.window = {config.data.window}, and the model has {model_config.max_position_embeddings} positions, each '
      f'of them learned: set data.window={model_config.max_position_embeddings} or less.'
    )
  if set(encoded[0]) != wanted:
    found = 'sentences with labels' if 'labels' in encoded[0] else 'text'
    right = 'sentences with labels (recipe = "sst2")' if 'labels' in wanted else 'text, or prompts and completions'
    raise ValueError(f'{key} holds {found}, and a model of type {family!r} learns from {right}.')
  if 'labels' in wanted and model_config.labels > 1:
    labels = np.array([example['labels'][0] for example in encoded])
    bad = labels[(labels != np.round(labels)) | (labels < 0) | (labels >= model_config.labels)]
    if bad.size:
      raise ValueError(
        f'{key} holds the label {bad[0]:g}, and model.labels = {model_config.labels} stands for the classes 0 to '
        f'{model_config.labels - 1}; for numbers (STS-B) set it to 1.'
      )


def make_mesh(config: ml_collections.ConfigDict) -> jax.sharding.Mesh:
  """The mesh that config.sharding describes, over all devices."""
  return sharding.make_mesh(**{axis: config.sharding[axis] for axis in sharding.AXES})


def load_weights(built: Setup, place: stacks.Place | None = None) -> dict:
  """The source's weights at `place` (default: on the host), quantized as the scheme says while they are read."""
  config, scheme_ = built.model.config, built.model.scheme
  with progress.bar('reading weights', sum(config.depths.values())) as bar:
    form = stored.form(built.directory) or hf
    return form.load(built.directory, config, scheme_, progress=bar.advance, place=place)


def adopted(config: ml_collections.ConfigDict, workdir) -> ml_collections.ConfigDict:
  """The config with the kind, rank, alpha, ... of the adapter in config.adapter.source, where it names one.

  A workdir that began with it remembers them; the directory is not needed again.
  """
  if not config.adapter.source:
    return config
  config = config.copy_and_resolve_references()
  if workdir and (pathlib.Path(workdir) / config_lib.FILE).is_file():
    own = config_lib.load(workdir).adapter
    if own.source == config.adapter.source:
      config.adapter.update(own)
      return config
  directory = hf.resolve(config.model.source, config.model.revision)
  model_config = hf.read_config(directory, quantized=stored.is_quantized(directory))
  config.adapter.update(peft.describe(config.adapter.source, model_config))
  return config


def variables(
  built: Setup,
  mesh: jax.sharding.Mesh,
  seed: int,
  fallback: str = 'error',
  workdir=None,
  begins: dict | None = None,
  adapter_from: str = '',
) -> dict:
  """The model's collections on the mesh: weights from the source (or drawn, from scratch), adapters drawn from seed.

  The head is the source's, or drawn where that has none.
  With `workdir`, frozen weights must be those its run began with (`check_base`).  With `begins` (see
  `bases.beginning`) the adapters are those that `qalora quantize` left beside the weights, with `adapter_from` those in
  that directory of PEFT.
  """
  at = sharding.place(built.abstract, mesh, fallback)
  tokens = jnp.zeros((1, 8), jnp.int32)

  def draw(key):
    return nn.unbox({'params': {}, **built.model.init(key, tokens)})['params']

  if built.directory is None:
    params = jax.jit(draw, out_shardings=at['params'])(jax.random.key(seed))
    return {'frozen': {}, 'params': params}
  heads = _heads(built, at['params'], draw, seed)
  collection = 'params' if built.model.scheme.trains else 'frozen'
  place = stacks.OnDevices(at[collection])
  weights = load_weights(built, place)
  if collection == 'params':
    return {'frozen': {}, 'params': weights | heads}
  own = {name: blank for name, blank in built.shapes['params'].items() if name not in heads}
  at_own = {name: where for name, where in at['params'].items() if name not in heads}
  if workdir is not None:
    check_base(workdir, place.checksum().crc)
  if adapter_from:
    begun = peft.load(adapter_from, built.model.config, own)
    params = jax.device_put(begun, at_own)
  elif begins is None:
    # The compiler drops the frozen weights that init would draw, so only the adapters are made.
    params = jax.jit(lambda key: _without(draw(key), heads), out_shardings=at_own)(jax.random.key(seed))
  else:
    stored.check_beginning(built.directory, begins)
    begun = packed.load_adapter(built.directory, own)
    params = jax.device_put(begun, at_own)
  return {'frozen': weights, 'params': params | heads}


def _without(tree: dict, names) -> dict:
  return {name: node for name, node in tree.items() if name not in names}


def _heads(built: Setup, at: dict, draw: Callable, seed: int) -> dict:
  """{module: weights} of the scheme's heads on the mesh: the source's, else drawn; `at` are the shardings of params."""
  heads = built.model.scheme.heads
  held = [name for name in heads if name not in built.drawn]
  made = hf.read_heads(built.directory, built.model.config, held) if held else {}
  made = jax.device_put(made, {name: at[name] for name in held})
  if built.drawn:
    pick = lambda key: {name: draw(key)[name] for name in built.drawn}
    made |= jax.jit(pick, out_shardings={name: at[name] for name in built.drawn})(jax.random.key(seed))
  return made


def fingerprint(frozen: dict) -> int:
  """A CRC-32 of every frozen weight, in the tree's order: equal weights, equal numbers."""
  return checksum.of_tree(frozen).crc


def check_base(workdir, found: int) -> None:
  """Remembers in the workdir which base (its `fingerprint`) an adapter belongs to; ValueError if it is another now."""
  path = pathlib.Path(workdir) / _BASE_FILE

  def compare():
    if not path.exists():
      tensors.write_json(path, {'crc32': found})
    check_fingerprint(workdir, found)

  hosts.once(compare)


def check_fingerprint(workdir, found: int) -> None:
  """ValueError if the workdir remembers another base than the one of this fingerprint."""
  path = pathlib.Path(workdir) / _BASE_FILE
  if path.exists() and json.loads(path.read_text())['crc32'] != found:
    raise ValueError(
      f'{path}: the base weights are not those this adapter was trained on (fingerprint {found}). '
      'The source has changed since, or was quantized elsewhere with another rounding; restore it, or train anew.'
    )


def is_run(directory) -> bool:
  """Whether `directory` is a workdir with a trained checkpoint."""
  return checkpoint.exists(pathlib.Path(directory) / CHECKPOINTS)


def own_config(config: ml_collections.ConfigDict, run) -> ml_collections.ConfigDict:
  """The config of a workdir; where the model runs and in which precision is said by `config`, not by its training."""
  own = config_lib.load(run)
  own.sharding.update(config.sharding)
  own.model.update(dtype=config.model.dtype, remat=config.model.remat)
  return own


def load_base(config: ml_collections.ConfigDict, workdir, check: Check = anything) -> Loaded:
  """The base of a workdir, without what was trained; `config` is the workdir's.  ValueError if all was trained."""
  config = prepared(config, workdir).copy_and_resolve_references()
  if config.adapter.kind == 'full':
    raise ValueError(f'{workdir} trained every weight: it has no adapter to take elsewhere.')
  if setup(config).model.scheme.heads:
    raise ValueError(f'{workdir} trained a classifier beside its adapter: name it by --model, not by --adapters.')
  config.adapter.update(kind='none', init='zero', source='')
  built = setup(config)
  check(built.model)
  at = sharding.place(built.abstract, make_mesh(config), config.sharding.fallback)
  tokenizer_from = tokenizer_directory(config, built.directory)
  origin = {'source': config.model.source}
  weights = {'frozen': load_weights(built, stacks.OnDevices(at['frozen'])), 'params': {}}
  return Loaded(built.model, weights, tokenizer(config, built), tokenizer_from, origin)


def adapters_of(model: nn.Module, choices: dict) -> dict:
  """The abstract boxed params of `model` with an adapter of these choices of config.adapter."""
  scheme = dataclasses.replace(model.scheme, adapter=bases.adapter(choices), adapted=choices['targets'])
  return layout.abstract(model.config, scheme)['params']


def load_run(config: ml_collections.ConfigDict, workdir, check: Check = anything) -> Loaded:
  """The base and the trained weights of a workdir, on one replica over all devices."""
  config = prepared(config, workdir)
  built = setup(config)
  check(built.model)
  mesh = make_mesh(config)
  at = sharding.place(built.abstract, mesh, config.sharding.fallback)
  abstract = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), built.shapes['params'], at['params']
  )
  step, params = checkpoint.restore_params(pathlib.Path(workdir) / CHECKPOINTS, abstract)
  frozen = {}
  if not built.model.scheme.trains:
    place = stacks.OnDevices(at['frozen'])
    frozen = load_weights(built, place)
    check_base(workdir, place.checksum().crc)
  tokenizer_from = tokenizer_directory(config, built.directory)
  origin = {'workdir': str(workdir), 'step': step, 'source': config.model.source, 'adapter': config.adapter.kind}
  return Loaded(built.model, {'frozen': frozen, 'params': params}, tokenizer(config, built), tokenizer_from, origin)


def load_model(config: ml_collections.ConfigDict, name: str, check: Check = anything) -> Loaded:
  """An untrained model: the Hugging Face or quantized directory `name` (or hub id), quantized as the config says.

  Raises ValueError for a dense one where the config's base has to be made by `qalora quantize`.
  """
  config = config.copy_and_resolve_references()
  config.model.source = name
  config.adapter.update(kind='none', init='zero', source='')
  if config.base.method == 'qat':
    raise ValueError(
      f'{name} is not trained yet, and base.method = "qat" is a way to train; use base.method = "affine".'
    )
  directory = hf.resolve(name, config.model.revision)
  begins = None
  if packed.holds(directory):
    # With the adapter that makes good what the base lost, if it was quantized with one.
    if begins := packed.manifest(directory).get('adapter'):
      config.adapter.update(begins)
  elif bases.needs_quantize(config) and not stored.is_quantized(directory):
    raise ValueError(
      f'{name} is dense, and the base that the config asks for takes more than rounding: run `qalora quantize` with '
      'this config, then name its directory as model.source (or by --model).'
    )
  built = setup(config)
  if built.drawn:
    raise ValueError(bases.undrawn(name, built.drawn, built.model.config.labels))
  check(built.model)
  mesh = make_mesh(config)
  loaded = variables(built, mesh, config.seed, config.sharding.fallback, begins=begins)
  tokenizer_from = tokenizer_directory(config, built.directory)
  return Loaded(built.model, loaded, tokenizer(config, built), tokenizer_from, {'source': name})


def _check_same(config: ml_collections.ConfigDict, workdir) -> None:
  """Raises ValueError where the config's base or adapter is not the one that the run was trained with."""
  changes = config_lib.differences(config_lib.load(workdir), config)
  if wrong := [change for change in changes if change.startswith(('base.', 'adapter.', 'calibration.'))]:
    lines = '\n  '.join(wrong)
    raise ValueError(f'{workdir} was trained with another config:\n  {lines}\nleave --config away to take its own.')


def open_model(config: ml_collections.ConfigDict, workdir, name: str = '', check: Check = anything) -> Loaded:
  """The model a command is about: `name` if given (a workdir, or a directory or hub id taken as it stands), else
  the trained run in `workdir`, else the config's source quantized as the config says.

  `check` looks at it before its weights are read.
  """
  if name and is_run(name):
    return load_run(own_config(config, name), name, check)
  if name and (pathlib.Path(name) / CHECKPOINTS).is_dir():
    raise ValueError(f'{name} is a workdir without a finished checkpoint; train on, or wait for its first.')
  if name:
    as_it_stands = config.copy_and_resolve_references()
    as_it_stands.base.method = 'stored'
    directory = hf.resolve(name, config.model.revision)
    if any((directory / file).is_file() for file in tokenizer_lib.FILES):
      as_it_stands.model.tokenizer = ''
    return load_model(as_it_stands, name, check)
  if workdir and is_run(workdir):
    config = adopted(config, workdir)
    _check_same(config, workdir)
    return load_run(config, workdir, check)
  if not config.model.source or config.model.source == 'scratch':
    raise ValueError(
      f'there is no model to work on: {workdir or "no --workdir"} holds no trained run, and model.source is '
      f'{config.model.source!r}. Train first, or give --model=DIRECTORY.'
    )
  return load_model(config, config.model.source, check)


def prompt(loaded: Loaded, text: str, max_prompt: int = 0) -> list[int]:
  """The tokens of a prompt of at most `max_prompt` (0: no limit) as the model was taught with it.

  Raises ValueError where there is none to start from.
  """
  if not cache.continues(loaded.model):
    return examples.encode_input(text, loaded.tokenizer, max_prompt)
  tokens = examples.encode_prompt(text, loaded.tokenizer, max_prompt)
  if not tokens:
    raise ValueError('this tokenizer has no BOS to start from: give a --prompt.')
  return tokens


def write(
  loaded: Loaded, config, prompts: Sequence[list[int]], first: int = 0, show: Callable = lambda piece: None
) -> list[str]:
  """What continues each of a batch of prompts (tokens), numbered from `first`, as config.generate and the seed say."""
  settings = config.generate
  return continuation.write(
    loaded.model,
    loaded.variables,
    loaded.tokenizer,
    prompts,
    max_tokens=settings.max_tokens,
    key=jax.random.key(config.seed),
    settings=sampling.Sampling(
      temperature=settings.temperature,
      top_k=settings.top_k,
      top_p=settings.top_p,
      min_p=settings.min_p,
      penalty=settings.repetition_penalty,
    ),
    beams=settings.beams,
    penalty=settings.length_penalty,
    stops=limits.stops(settings.stop),
    first=first,
    show=show,
  )
