"""Named adapters on one base, for the commands: `--adapters='ann: runs/a; bob: runs/b*0.7 + runs/c*0.3'`."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import pathlib
import re

from flax import linen as nn
import jax

from qalora_jax import build
from qalora_jax import checkpoint
from qalora_jax import config as config_lib
from qalora_jax import peft
from qalora_jax import sharding
from qalora_jax.adapters import several

FLAG = config_lib.Flag(
  'adapters',
  'string',
  '',
  "Workdirs or PEFT directories on one base: 'runs/a', a sum 'runs/a*0.7 + runs/b*0.3', or named, "
  "'ann: runs/a; bob: runs/b'.",
)
_TERM = re.compile(r'\s*(?P<directory>[^*+;:]+?)\s*(?:\*\s*(?P<weight>-?[\d.]+(?:e-?\d+)?)\s*)?$')


@dataclasses.dataclass(frozen=True)
class Adapted:
  """A model, its params several adapters where there are names: `names[k]` is row index k + 1 of a batch."""

  loaded: build.Loaded
  names: tuple[str, ...] = ()

  def check(self, rows: Sequence[str]) -> None:
    """ValueError where a row asks for an adapter that is not there."""
    for name in rows:
      if name and name not in self.names:
        known = f'--adapters names {", ".join(self.names)}' if self.names else 'name some by --adapters'
        raise ValueError(f'there is no adapter {name!r}; {known}.')

  def variables(self, rows: Sequence[str]) -> dict:
    """The variables of a batch in which every row uses the adapter of its name ('' for none)."""
    self.check(rows)
    if not self.names:
      return self.loaded.variables
    indices = [self.names.index(name) + 1 if name else 0 for name in rows]
    found = self.loaded.variables
    return {**found, 'params': several.choose(found['params'], indices)}


def parse(text: str) -> dict[str, list[tuple[pathlib.Path, float]]]:
  """{name: [(directory, weight), ...]}; the name is '' where none is given.  ValueError for what cannot be read."""
  found = {}
  for entry in filter(None, (part.strip() for part in text.split(';'))):
    name, colon, terms = entry.rpartition(':')
    name = name.strip()
    if (colon and not name) or name in found:
      raise ValueError(f'--adapters: {entry!r} has no name, or one that is taken.')
    found[name] = [_term(term) for term in terms.split('+')]
  if not found:
    raise ValueError("--adapters names no directory; for instance 'runs/a' or 'ann: runs/a; bob: runs/b'.")
  if '' in found and len(found) > 1:
    raise ValueError("--adapters: several adapters need a name each: 'ann: runs/a; bob: runs/b'.")
  return found


def _term(text: str) -> tuple[pathlib.Path, float]:
  match = _TERM.match(text)
  if match is None:
    raise ValueError(f'--adapters: cannot read {text.strip()!r}; write DIRECTORY or DIRECTORY*WEIGHT.')
  directory = pathlib.Path(match['directory'])
  if not (build.is_run(directory) or peft.is_adapter(directory)):
    raise ValueError(f'--adapters: {directory} is no workdir with a checkpoint, and no directory of PEFT.')
  return directory, float(match['weight'] or 1.0)


def open_any(config, workdir, model: str, text: str, check: build.Check = build.anything) -> Adapted:
  """`build.open_model`, or what `text` of --adapters says: one adapter, a sum, or several by name."""
  if not text:
    return Adapted(build.open_model(config, workdir, model, check))
  if '' in parse(text):
    return Adapted(open_summed(config, model, text, check))
  return open_named(config, model, text, check)


def open_summed(config, model: str, text: str, check: build.Check = build.anything) -> build.Loaded:
  """The base with the sum of the adapters that `text` names, as one adapter.  ValueError for named ones."""
  ((name, terms), *others) = parse(text).items()
  if others or name:
    raise ValueError("named adapters are chosen from, not merged: write a sum, 'runs/a*0.7 + runs/b*0.3'.")
  base = _base(config, model, [directory for directory, _ in terms], check)
  params = _summed(config, base, _fingerprint(base), terms)
  origin = {'source': str(base.origin['source']), 'adapters': text}
  return dataclasses.replace(base, variables={**base.variables, 'params': params}, origin=origin)


def open_named(config, model: str, text: str, check: build.Check = build.anything) -> Adapted:
  """The base with all adapters that `text` names side by side."""
  wanted = parse(text)
  base = _base(config, model, [directory for terms in wanted.values() for directory, _ in terms], check)
  fingerprint = _fingerprint(base)
  trees = [_summed(config, base, fingerprint, terms) for terms in wanted.values()]
  params = several.stack(trees, base.variables['frozen'])
  return Adapted(dataclasses.replace(base, variables={**base.variables, 'params': params}), tuple(wanted))


def _base(config, model: str, directories, check: build.Check) -> build.Loaded:
  """The model without an adapter: `model`, or the base of the first workdir among `directories`."""
  if model:
    loaded = build.open_model(config, None, model, check)
  else:
    run = next((directory for directory in directories if build.is_run(directory)), None)
    if run is None:
      raise ValueError('an adapter of PEFT does not come with its base: name that by --model.')
    loaded = build.load_base(build.own_config(config, run), run, check)
  if loaded.variables['params']:
    raise ValueError(f'{model or run} has trained weights of its own; --model is the base that the adapters stand on.')
  return loaded


def _fingerprint(base: build.Loaded) -> Callable[[], int]:
  """The fingerprint of the base, taken once where a workdir asks for it: all of its bytes are read for that."""
  return functools.cache(lambda: build.fingerprint(base.variables['frozen']))


def _summed(config, base: build.Loaded, fingerprint: Callable[[], int], terms) -> dict:
  trees = [_params(config, base, fingerprint, directory) for directory, _ in terms]
  if len(trees) == 1 and terms[0][1] == 1.0:
    return trees[0]
  return several.add(trees, [weight for _, weight in terms], base.variables['frozen'])


def _params(config, base: build.Loaded, fingerprint: Callable[[], int], directory: pathlib.Path) -> dict:
  """The adapter in `directory`, on the device; ValueError where it belongs to another base."""
  if build.is_run(directory):
    choices = build.own_config(config, directory).adapter.to_dict()
  else:
    choices = peft.describe(directory, base.model.config)
  abstract = build.adapters_of(base.model, choices)
  if not set(abstract) <= set(base.variables['frozen']):
    raise ValueError(
      f'{directory} adapts some layers only (adapter.targets = {choices["targets"]!r}), and cannot stand beside others '
      'on one base: use it alone, by --model.'
    )
  if build.is_run(directory):
    build.check_fingerprint(directory, fingerprint())
  at, blank = sharding.place(abstract, build.make_mesh(config), config.sharding.fallback), nn.unbox(abstract)
  if build.is_run(directory):
    placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), blank, at)
    return checkpoint.restore_params(directory / build.CHECKPOINTS, placed)[1]
  return jax.device_put(peft.load(directory, base.model.config, blank), at)
