"""The door: recipes, flags and saved configs become one checked, locked ConfigDict.

Which config a command sees, the later wins:

  1. the recipe that --config names; without --config, the config.json of --workdir;
  2. every --config.KEY=VALUE.

Every error is a ValueError or a FileNotFoundError that names the key, the value and the way out.
"""

import dataclasses
import difflib
import importlib.util
import json
import pathlib
import re
import shlex
import sys

from absl import flags
import ml_collections
from ml_collections import config_flags

from qalora_jax import limits
from qalora_jax import report

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILE = 'config.json'
# What stands under it is held against configs/base.py only where it has no model_type; else a family reads it.
_ARCHITECTURE = 'model.architecture.'


@dataclasses.dataclass(frozen=True)
class Flag:
  """One flag of a verb.  kind: 'string', 'integer', 'float', 'bool', 'list' (split at commas) or 'many' (a list,
  one value each time the flag is given)."""

  name: str
  kind: str
  default: object
  help: str


@dataclasses.dataclass(frozen=True)
class Arguments:
  """What a command was asked to do: config, workdir, its own flags by name, and the command line as typed."""

  config: ml_collections.ConfigDict
  workdir: pathlib.Path | None
  values: dict
  command: str


REPLACE = Flag('replace_config', 'bool', False, 'Let this config replace a different config.json in the workdir.')

# What only a workdir holds; a model directory has a config.json too, Hugging Face's.
_RUN_MARK = 'checkpoints'
_EXAMPLES = {
  'plan': '--config=configs/qalora_llama_7b.py --topology=h100',
  'quantize': '--config=configs/quickstart_questions.py --workdir=runs/four --config.base.method=affine',
  'train': '--config=configs/quickstart_questions.py --workdir=runs/taught --config.model.source=runs/four',
  'launch': (
    '--nodes=2 --config=configs/quickstart_questions.py --workdir=runs/taught --config.model.source=runs/four'
  ),
  'evaluate': '--workdir=runs/taught',
  'export': '--workdir=runs/taught',
  'generate': "--workdir=runs/taught --prompt='Question: '",
}
_FLAGS = (
  Flag('config', 'string', None, 'A recipe: a Python file with get_config().  Default: config.json of the workdir.'),
  Flag('workdir', 'string', None, 'The directory of this run: config.json, checkpoints, metrics, results.'),
)
# What these verbs leave behind has no place but a workdir.
_WRITERS = ('train', 'quantize', 'launch')
_DEFINE = {
  'string': flags.DEFINE_string,
  'integer': flags.DEFINE_integer,
  'float': flags.DEFINE_float,
  'bool': flags.DEFINE_boolean,
  'list': flags.DEFINE_list,
  'many': flags.DEFINE_multi_string,
}


def parse(verb, argv, *, summary, extra_flags=()):
  """Turns the arguments of `qalora VERB` into Arguments; the config is checked and locked.

  `argv` holds what follows the verb; None means the command line's.  --help prints and raises SystemExit(0).
  A bad flag, key, type or value raises ValueError, a missing file FileNotFoundError.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  own_flags = (*_FLAGS, *extra_flags)
  if {'-h', '-help', '--help'} & set(argv):
    print(_help(verb, summary, own_flags))
    raise SystemExit(0)
  values, overrides = _own_values(own_flags, argv)
  recipe_path, workdir = (_path(values.pop(name)) for name in ('config', 'workdir'))
  example = f'for example: {_example(verb)}'
  if workdir is None and verb in _WRITERS:
    raise ValueError(f'no --workdir; {example}')
  if recipe_path is not None:
    config = recipe(recipe_path)
  elif workdir is not None and (workdir / FILE).is_file():
    config = load(workdir)
  elif (run := _first_run(values.get('adapters') or '')) is not None:
    config = load(run)
  elif values.get('adapters'):
    config = default()
  elif values.get('model'):
    # A model that is no run says nothing about data or sampling: the defaults and the overrides do.
    config = load(values['model']) if (pathlib.Path(values['model']) / _RUN_MARK).is_dir() else default()
  else:
    raise ValueError(f'no --config, and no {FILE} in --workdir={workdir or ""}; {example}')
  config = _override(config, overrides)
  check(config)
  return Arguments(config, workdir, values, shlex.join(['qalora', verb, *argv]))


def _first_run(adapters):
  """The first workdir that --adapters names."""
  words = (word.strip() for word in re.split(r'[;:+*]', adapters))
  return next((pathlib.Path(word) for word in words if word and (pathlib.Path(word) / _RUN_MARK).is_dir()), None)


def default():
  """The defaults: `get_config()` of configs/base.py, which stands beside the package in a checkout."""
  path = ROOT / 'configs' / 'base.py'
  if not path.is_file():
    raise FileNotFoundError(f'{path}: not found; install qalora_jax from its checkout with `pip install -e .`')
  return _execute(path).lock()


def recipe(path):
  """The config of a recipe file, locked, held against the keys and types of configs/base.py."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'--config={path}: no such file; the recipes are in {ROOT / "configs"}')
  # `from configs import base` works from every working directory, and beside a recipe's own `configs`.
  owner = path.resolve().parent
  for folder in (ROOT, owner.parent) if owner.name == 'configs' else (ROOT,):
    if str(folder) not in sys.path:
      sys.path.append(str(folder))
  try:
    config = _execute(path)
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(f'{path}: {_text(error)}') from error
  return _fit(config, path)


def override(config, values):
  """`config` with {dotted key: value} changed; ValueError names every key and type that does not fit."""
  return _fit(_flat(config) | values, 'overrides')


def check(config):
  """Raises ValueError that lists, one a line, every value outside its choices or range and every bad combination."""
  if problems := limits.problems(_flat(config)):
    raise ValueError('\n  '.join(['the config cannot be used:', *problems]))


def save(config, workdir, *, replace=False):
  """Writes workdir/config.json, in one piece or not at all.

  Raises ValueError that lists what differs if another config is there, unless `replace`.
  """
  path = pathlib.Path(workdir) / FILE
  if path.is_file() and not replace and (changes := differences(load(workdir), config)):
    lines = '\n  '.join(changes)
    raise ValueError(
      f'{path} holds another config:\n  {lines}\nchoose another --workdir, or pass --{REPLACE.name} to overwrite it'
    )
  report.write(path, config.to_dict())


def load(workdir):
  """The config that `save` wrote: locked, equal to the one saved, with the keys and types of configs/base.py."""
  path = pathlib.Path(workdir) / FILE
  if not path.is_file():
    raise FileNotFoundError(f'{path}: not found; `qalora train` writes it')
  try:
    tree = json.loads(path.read_text(encoding='utf-8'))
  except json.JSONDecodeError as error:
    raise ValueError(f'{path}: not JSON: {error}') from None
  # A model directory has a config.json too.
  if not isinstance(tree, dict) or not tree.keys() & default().keys():
    raise ValueError(f'{path}: not written by `qalora train`; name a recipe with --config')
  # A key that has come since is as if it had been at its default, which changes nothing.
  given = _flat(tree)
  known = {key: value for key, value in _flat(default()).items() if not (_is_own(given) and _of_architecture(key))}
  return _fit(known | given, path)


def differences(old, new):
  """The keys whose values differ between two configs, one `key: old -> new` each."""
  old, new = _flat(old), _flat(new)
  return [
    f'{key}: {old.get(key, "absent")!r} -> {new.get(key, "absent")!r}'
    for key in sorted({*old, *new})
    if key not in old or key not in new or old[key] != new[key]
  ]


def _own_values(own_flags, argv):
  """The values of `own_flags` by name, and the arguments that are none of them."""
  # --allow-lossy means --allow_lossy.
  dashed = {f'--{flag.name.replace("_", "-")}': f'--{flag.name}' for flag in own_flags}
  argv = [dashed.get(name, name) + equals + value for name, equals, value in (word.partition('=') for word in argv)]
  # Fresh at every call: absl's global flags can be defined and parsed only once in a process.
  parser = flags.FlagValues()
  parser.set_gnu_getopt(True)
  for flag in own_flags:
    _DEFINE[flag.kind](flag.name, flag.default, flag.help, flag_values=parser)
  try:
    rest = parser(['qalora', *argv], known_only=True)[1:]
  except flags.Error as error:
    raise ValueError(str(error)) from None
  for argument in rest:
    unknown = re.match(r'--?(?!(?:no)?config\.)([A-Za-z]\w*)', argument)
    if unknown:
      names = [flag.name for flag in own_flags]
      raise ValueError(f'no flag --{unknown[1]}{_nearest(unknown[1], names, "--")}')
  return {flag.name: parser[flag.name].value for flag in own_flags}, rest


def _override(config, arguments):
  """`config` after every --config.KEY=VALUE in `arguments`, which may hold nothing else."""
  keys = [*_flat(config), *_groups(config)]
  for argument in arguments:
    found = re.match(r'--?(?:no)?config\.([^=]*)', argument)
    if found and found[1] not in keys:
      raise ValueError(f'--config.{found[1]}: the config has no such key{_nearest(found[1], keys)}')
  parser = flags.FlagValues()
  parser.set_gnu_getopt(True)
  arguments = ['qalora', *arguments]
  try:
    config_flags.DEFINE_config_dict('config', config, flag_values=parser, sys_argv=arguments)
    stray = parser(arguments)[1:]
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(_text(error)) from None
  if stray:
    raise ValueError(f'unexpected argument {stray[0]!r}; write --config.KEY=VALUE or --FLAG=VALUE')
  return _fit(parser['config'].value, 'command line')


def _execute(path):
  spec = importlib.util.spec_from_file_location(f'qalora_recipe_{path.stem}', path)
  if spec is None:
    raise ValueError(f'--config={path}: not a Python file')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise ValueError(f'--config={path}: has no get_config()')
  return module.get_config()


def _fit(tree, source):
  """The values of `tree` in a locked copy of the defaults; ValueError names every key and type that does not fit."""
  config = default()
  expected, given = _flat(config), _flat(tree)
  if _is_own(given):
    own = {key.removeprefix(_ARCHITECTURE): given.pop(key) for key in [*filter(_of_architecture, given)]}
    expected = {key: value for key, value in expected.items() if not _of_architecture(key)}
    with config.unlocked():
      config.model.architecture = ml_collections.ConfigDict(_nested(own))
  problems = [f'no key {key!r} in configs/base.py{_nearest(key, expected)}' for key in given if key not in expected]
  problems += [f'key {key!r} is missing' for key in expected if key not in given]
  for key in [key for key in expected if key in given]:
    kind, value = type(expected[key]), given[key]
    if kind is float and type(value) is int:
      given[key] = float(value)
    elif type(value) is not kind:
      problems.append(f'{key} = {value!r}: must be {kind.__name__}')
  if problems:
    raise ValueError('\n  '.join([f'{source}:', *problems]))
  config.update_from_flattened_dict(given)
  return config


def _flat(tree):
  """{'adapter.rank': 64, ...}"""
  leaves = {}
  for key, value in tree.items():
    if isinstance(value, dict | ml_collections.ConfigDict):
      leaves |= {f'{key}.{tail}': leaf for tail, leaf in _flat(value).items()}
    else:
      leaves[key] = value
  return leaves


def _nested(flat):
  """The tree of a flattened one."""
  tree = {}
  for key, value in flat.items():
    *groups, last = key.split('.')
    node = tree
    for group in groups:
      node = node.setdefault(group, {})
    node[last] = value
  return tree


def _of_architecture(key):
  return key.startswith(_ARCHITECTURE)


def _is_own(flat):
  """Whether a flattened config states the architecture in the words of a family of its own."""
  return f'{_ARCHITECTURE}model_type' in flat


def _groups(tree):
  """['adapter', 'data', 'data.train', ...]"""
  return sorted({key[: dot.start()] for key in _flat(tree) for dot in re.finditer(r'\.', key)})


def _nearest(name, names, prefix=''):
  tails = [known for known in names if known.rpartition('.')[2] == name]
  close = tails or difflib.get_close_matches(name, list(names), n=1)
  return f'; did you mean {prefix}{" or ".join(close)}?' if close else ''


def _path(value):
  return None if not value else pathlib.Path(value).expanduser()


def _text(error):
  # str() of a KeyError is the repr of its message.
  return str(error.args[0] if error.args else error)


def _example(verb):
  """A command that works after `make quickstart`, and after the examples of the verbs before it."""
  return f'qalora {verb} {_EXAMPLES[verb]}'


def _help(verb, summary, own_flags):
  width = max(len(flag.name) for flag in own_flags) + 8
  lines = []
  for flag in own_flags:
    given = f'--{flag.name}' + ('' if flag.kind == 'bool' else '=...')
    note = '' if flag.default in (None, False, '', []) else f'  Default: {flag.default}.'
    lines.append(f'  {given:{width}}{flag.help}{note}')
  lines.append(f'  {"--config.KEY=...":{width}}Changes one value of the config.')
  workdir = '--workdir=DIR' if verb in _WRITERS else '[--workdir=DIR]'
  return '\n'.join(
    [
      summary,
      '',
      f'usage: qalora {verb} --config=FILE {workdir} [--config.KEY=VALUE ...] [flags]',
      '',
      *lines,
      '',
      f'example, after `make quickstart`: {_example(verb)}',
      'Every KEY, with its meaning and unit, is in configs/base.py.',
    ]
  )
