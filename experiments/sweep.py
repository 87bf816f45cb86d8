"""Question: whatever a list of runs asks.  Does the runs of a sweep, each once, and renders what they amount to.

    python -m experiments.sweep NAME_OR_FILE [--workers=N] [--cluster=slurm|local] [--list] [--render]
                                [--retry] [--limit=N] [--config.KEY=VALUE ...]

NAME is a file of experiments/sweeps; `--list` alone lists them.  FILE is a Python file with

    RECIPE = 'configs/quickstart_questions.py'
    def runs(): return grids.grid({'adapter.rank': [4, 8], 'seed': [0, 1, 2]})        # see experiments/grids.py

and, if it likes, X, Y (keys and metrics to plot, or lists of them), LINES (keys that tell lines apart), NAME (of the
results) and prepare() (raises where something is missing).  Keys are those that experiments/pipeline.py explains; a
recipe's path is seen from the checkout.

Writes runs/sweeps/NAME/HASH (experiments/runs.py says what), runs/stages, and
experiments/results/sweeps/NAME.{md,csv,json,png}.  What is done is not done again; a run that fails is kept with its
traceback and does not stop the others.  With --config.KEY=VALUE, NAME is followed by a hash of what they say.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import os
import pathlib
import re
import shlex
import sys

from experiments import plots
from experiments import runs as runs_lib
from experiments import stages
from experiments import summary
from qalora_jax import config as config_lib
from qalora_jax import launch
from qalora_jax import progress
from qalora_jax import report

SWEEPS = pathlib.Path('experiments/sweeps')
PLACE, STAGES, RESULTS = (
  pathlib.Path('runs/sweeps'),
  pathlib.Path('runs/stages'),
  pathlib.Path('experiments/results/sweeps'),
)


@dataclasses.dataclass(frozen=True)
class Definition:
  """What the file of a sweep says."""

  name: str
  recipe: str
  sweep: list[dict]
  x: str | list[str] | None
  y: str | list[str] | None
  lines: list[str] | None
  prepare: object


def load(name_or_file: str) -> Definition:
  """A ready sweep or that of a file; FileNotFoundError or ValueError says what is missing."""
  module = find(name_or_file, SWEEPS, ('RECIPE', 'runs'))
  sweep = module.runs()
  if not (isinstance(sweep, list) and sweep and all(isinstance(run, dict) for run in sweep)):
    raise ValueError(f'{module.__file__}: runs() must return a list of dicts of overrides, at least one')
  optional = {key: getattr(module, key.upper(), None) for key in ('x', 'y', 'lines')}
  return Definition(module.NAME, module.RECIPE, sweep, **optional, prepare=module.prepare)


def find(name_or_file: str, folder: pathlib.Path, needs: tuple[str, ...]):
  """The module of a name in `folder` or of a file; it has what it `needs`, and a NAME and a prepare() in any case."""
  path = config_lib.ROOT / folder / f'{name_or_file}.py'
  if not path.is_file():
    path = pathlib.Path(name_or_file)
  if not path.is_file():
    close = difflib.get_close_matches(name_or_file, ready(folder), n=1)
    hint = f'did you mean {close[0]}?' if close else f'ready are {", ".join(ready(folder))}'
    raise FileNotFoundError(f'{name_or_file}: neither in {folder} nor a file; {hint}')
  module = execute(path)
  if lacking := [name for name in needs if not hasattr(module, name)]:
    raise ValueError(f'{path}: has no {" and no ".join(lacking)}; --help shows a whole file')
  module.NAME = getattr(module, 'NAME', path.stem)
  module.prepare = getattr(module, 'prepare', lambda: None)
  return module


def ready(folder: pathlib.Path = SWEEPS) -> list[str]:
  """The names that stand in `folder`."""
  return sorted(path.stem for path in (config_lib.ROOT / folder).glob('*.py'))


def execute(path: pathlib.Path):
  """The module of a Python file."""
  spec = importlib.util.spec_from_file_location(f'sweep_{path.stem}', path)
  if spec is None:
    raise ValueError(f'{path}: not a Python file')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def overrides(recipe: str, arguments: list[str]) -> dict:
  """{key: value} of every --config.KEY=VALUE; ValueError for anything else."""
  found = {}
  for argument in arguments:
    if not (match := re.fullmatch(r'--config\.([^=]+)=(.*)', argument, re.DOTALL)):
      raise ValueError(f'unexpected argument {argument!r}; write --config.KEY=VALUE, or see --help')
    found[match[1]] = None
  if not arguments:
    return {}
  # As every command reads them, with its words for what is wrong.
  config = config_lib.parse('train', [f'--config={recipe}', '--workdir=none', *arguments], summary='').config
  return {key: runs_lib.typed(config, key, None) for key in found}


def run(
  definition: Definition, *, known: dict | None = None, show=False, render=False, measure=runs_lib.measure,
  check=runs_lib.check, command='python -m experiments.sweep', **how,
) -> int:  # fmt: skip
  """Lists, renders or does a sweep (`how` is that of `runs.do`); 1 if runs have failed, else 0."""
  name = definition.name + (f'-{runs_lib.name("", known)}' if known else '')
  if not (show or render):
    definition.prepare()
  runs = runs_lib.plan(PLACE / name, definition.recipe, definition.sweep, check, known)
  if show:
    same = set.intersection(*({*map(repr, run.overrides.items())} for run in runs))
    own = lambda run, alike: {
      key: value for key, value in run.overrides.items() if (repr((key, value)) in same) == alike
    }
    row = lambda run: {'run': run.name, 'state': runs_lib.state(run), 'overrides': runs_lib.words(own(run, False))}
    report.show(f'{name}: {runs[0].recipe}, all runs {runs_lib.words(own(runs[0], True))}', [row(run) for run in runs])
    return 0
  # A wrong X is said before the runs.
  plots.axes(runs, definition.x)
  if not render:
    runs_lib.do(runs, STAGES, measure, **how)
  summary.render(RESULTS / name, name, command, runs, definition.x, definition.y, definition.lines)
  return complain(runs)


def complain(runs: list[runs_lib.Run]) -> int:
  """Lists the runs that failed and counts those that others are at; 1 if any failed, else 0."""
  states = [runs_lib.state(run) for run in runs]
  failed = [run for run, state in zip(runs, states, strict=True) if state == runs_lib.FAILED]
  if busy := states.count(runs_lib.RUNNING):
    progress.console.print(f'{busy} runs are under way in other processes; --render when they are over')
  if failed:
    progress.console.print(f'{len(failed)} of {len(runs)} runs failed (--retry does them again):')
  for run in failed:
    progress.console.print(f'  {run}\n    {runs_lib.reason(run)}\n    {run.directory}', markup=False)
  return int(bool(failed))


def add_flags(parser: argparse.ArgumentParser) -> None:
  """How runs are done."""
  parser.add_argument(
    '--workers', type=positive, default=1, metavar='N', help='runs at a time; each in its own process'
  )
  parser.add_argument('--cluster', choices=('slurm', 'local'), help='as jobs of submitit (needs the extra `cluster`)')
  parser.add_argument(
    '--option', action='append', default=[], metavar='KEY=VALUE', type=_option,
    help='a parameter of submitit, such as timeout_min=60, gpus_per_node=1, slurm_partition=gpu; may be repeated',
  )  # fmt: skip
  parser.add_argument('--retry', action='store_true', help='do the runs that failed again')


def positive(text: str) -> int:
  """A number of at least 1, for argparse."""
  if not re.fullmatch('[1-9][0-9]*', text):
    raise argparse.ArgumentTypeError(f'{text!r} is not a number of at least 1')
  return int(text)


def _option(text):
  try:
    return launch.option(text)
  except ValueError as error:
    raise argparse.ArgumentTypeError(str(error)) from None


def main() -> None:
  """Does what the command line says."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.sweep', allow_abbrev=False,
    description=__doc__.partition('\n\n')[0].partition('.  ')[2],
    epilog=__doc__.partition('\n\n')[2], formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  parser.add_argument('sweep', nargs='?', metavar='NAME_OR_FILE', help=f'one of {", ".join(ready())}, or a Python file')
  add_flags(parser)
  parser.add_argument('--list', action='store_true', help='only list the runs: hash, state, overrides')
  parser.add_argument('--render', action='store_true', help='only render the stored results')
  parser.add_argument('--limit', type=positive, metavar='N', help='do at most N runs now')
  arguments, rest = parser.parse_known_args()
  if arguments.sweep is None:
    if not arguments.list:
      parser.error('name a sweep, or --list them')
    questions = {name: execute(config_lib.ROOT / SWEEPS / f'{name}.py').__doc__ for name in ready()}
    report.show(
      'ready sweeps',
      [{'sweep': name, 'question': text.split('\n')[0].removeprefix('Question: ')} for name, text in questions.items()],
    )
    return
  definition = load(arguments.sweep)
  os.chdir(config_lib.ROOT)
  known = overrides(definition.recipe, rest)
  command = shlex.join(['python', '-m', 'experiments.sweep', *sys.argv[1:]])
  status = run(
    definition, known=known, show=arguments.list, render=arguments.render, command=command, retry=arguments.retry,
    limit=arguments.limit, workers=arguments.workers, cluster=arguments.cluster, options=dict(arguments.option),
  )  # fmt: skip
  raise SystemExit(status)


if __name__ == '__main__':
  stages.script(main)
