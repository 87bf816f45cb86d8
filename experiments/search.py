"""Question: which values are best?  Lets Optuna choose the runs of a sweep, one after another.

    python -m experiments.search NAME_OR_FILE [--trials=N] [--render]

NAME is a file of experiments/searches.  FILE is a Python file with

    RECIPE = 'configs/quickstart_questions.py'
    SPACE = {'optim.learning_rate': (1e-5, 1e-2, 'log'), 'adapter.rank': (1, 64), 'adapter.pool': ['sum', 'mean']}
    METRIC, TRIALS = 'accuracy', 30

and, if it likes, DIRECTION ('minimize', unless METRIC is an accuracy: its name holds 'acc'), FIXED (overrides of all
runs), NAME and prepare().  A pair is a range, ends included, of whole numbers where the config has one; a list holds
choices.

A trial is a run as those of experiments/sweep.py, in runs/sweeps/NAME/HASH: the same values are never measured twice.
Trials are kept in runs/sweeps/NAME/trials.log (a journal of Optuna), so that the same command goes on where it
stopped; experiments/results/sweeps/NAME.{md,csv,json,png} show all of them.  Needs the extra `search`.
"""

import argparse
import dataclasses
import math
import os
import pathlib
import shlex
import sys

from experiments import runs as runs_lib
from experiments import stages
from experiments import summary
from experiments import sweep
from qalora_jax import config as config_lib
from qalora_jax import lock
from qalora_jax import progress

SEARCHES, JOURNAL = pathlib.Path('experiments/searches'), 'trials.log'
DIRECTIONS = ('minimize', 'maximize')
_PRUNED = 'TrialPruned:'


@dataclasses.dataclass(frozen=True)
class Search:
  """What is searched for: `metric` over `space`, whose entries are (low, high), (low, high, 'log') or [choices]."""

  name: str
  recipe: str
  space: dict
  metric: str
  direction: str = 'minimize'
  fixed: dict = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.direction not in DIRECTIONS:
      raise ValueError(f'DIRECTION = {self.direction!r}: must be one of {", ".join(map(repr, DIRECTIONS))}')
    if not self.space:
      raise ValueError('SPACE is empty: there is nothing to search')
    if twice := sorted({*self.space} & {*self.fixed}):
      raise ValueError(f'{", ".join(twice)}: in SPACE and in FIXED')
    for key, entry in self.space.items():
      fits = isinstance(entry, tuple) and len(entry) in (2, 3) and set(entry[2:]) <= {'log'}
      fits = fits and all(isinstance(end, int | float) for end in entry[:2]) and entry[0] < entry[1]
      if not (fits or isinstance(entry, list) and entry):
        raise ValueError(f"SPACE[{key!r}] = {entry!r}: must be (low, high), (low, high, 'log') or a list of choices")
      if fits and 'log' in entry and entry[0] <= 0:
        raise ValueError(f'SPACE[{key!r}] = {entry!r}: a logarithm needs ends above 0')


def load(name_or_file: str) -> tuple[Search, int, object]:
  """(the search of a ready name or a file, its number of trials, its prepare())."""
  module = sweep.find(name_or_file, SEARCHES, ('RECIPE', 'SPACE', 'METRIC', 'TRIALS'))
  usual = 'maximize' if 'acc' in module.METRIC else 'minimize'
  found = Search(
    module.NAME, module.RECIPE, module.SPACE, module.METRIC,
    getattr(module, 'DIRECTION', usual), getattr(module, 'FIXED', {}),
  )  # fmt: skip
  return found, module.TRIALS, module.prepare


def search(found: Search, trials: int, measure=runs_lib.measure, check=runs_lib.check) -> list[runs_lib.Run]:
  """Goes on until `trials` trials are over, failed and pruned ones counted; returns the runs of all, in order.

  A run that fails, or whose metric is no finite number, is a failed trial; one that raises optuna.TrialPruned a pruned
  one.  A trial that was cut short is finished first, and what is proposed depends on the trials before it alone: a
  search that was interrupted ends as one that was not.  Raises ValueError where Optuna is missing, where another
  process is at this search, for a value in the space that cannot be, and for a metric that the runs do not measure.
  """
  optuna = _optuna()
  place = sweep.PLACE / found.name
  runs_lib.plan(place, found.recipe, corners(found), check)
  place.mkdir(parents=True, exist_ok=True)
  with lock.taken(place / lock.FILE) as free:
    if not free:
      raise ValueError(f'{place}: another process is at this search')
    study, space = _study(optuna, found, place), _distributions(optuna, found, check)
    while True:
      cut = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
      if not cut and len(study.trials) >= trials:
        return _runs(study, found, place, check)
      if not cut:
        # One stream of random numbers a trial, whatever process asks.
        study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
        study.ask(space)
        continue
      _finish(optuna, study, cut[0], found, place, measure, check)


def known(found: Search, check=runs_lib.check) -> list[runs_lib.Run]:
  """The runs of all trials so far; where there is no journal, as in a fresh checkout, those of the stored results."""
  place = sweep.PLACE / found.name
  if (place / JOURNAL).exists():
    return _runs(_study(_optuna(), found, place), found, place, check)
  _, records = summary.collect(sweep.RESULTS / f'{found.name}.json', [])
  return [runs_lib.Run(record.recipe, record.overrides, place / record.run) for record in records]


def best(found: Search, runs: list[runs_lib.Run]) -> list[runs_lib.Run]:
  """The runs by their metric, the best one first, those without one last."""

  def order(run):
    value = _value(found, run) if runs_lib.state(run) == runs_lib.DONE else None
    return math.inf if value is None else value if found.direction == 'minimize' else -value

  return sorted(runs, key=order)


def show(found: Search, runs: list[runs_lib.Run], command: str) -> int:
  """Writes and prints table and plots, the best run first; 1 if runs have failed, else 0."""
  runs = best(found, runs)
  path = sweep.RESULTS / found.name
  summary.render(path, found.name, command, runs, x=list(found.space), y=found.metric)
  if runs and runs_lib.state(runs[0]) == runs_lib.DONE and (value := _value(found, runs[0])) is not None:
    progress.console.print(f'best: {found.metric} = {value:.6g} with {runs_lib.words(runs[0].overrides)}', markup=False)
  return sweep.complain(runs)


def _finish(optuna, study, trial, found, place, measure, check):
  """Does the run of a trial and tells the study how it ended."""
  states = optuna.trial.TrialState
  if trial.params.keys() != found.space.keys():
    # Cut short before all of its values were drawn.
    study.tell(trial.number, state=states.FAIL)
    return
  try:
    (run,) = runs_lib.plan(place, found.recipe, [found.fixed | trial.params], check)
  except ValueError as error:
    progress.console.print(f'trial {trial.number}: {error}', markup=False)
    study.tell(trial.number, state=states.FAIL)
    return
  progress.console.print(f'\n[bold]trial {trial.number}[/bold] {run}')
  ended = runs_lib.perform(run, sweep.STAGES, measure)
  if ended == runs_lib.RUNNING:
    raise ValueError(f'{run.directory}: another process is at this run; the same command goes on when it is over')
  runs_lib.say(run)
  if ended == runs_lib.DONE and (value := _value(found, run)) is not None:
    study.tell(trial.number, value)
  else:
    pruned = ended == runs_lib.FAILED and runs_lib.reason(run).startswith(_PRUNED)
    study.tell(trial.number, state=states.PRUNED if pruned else states.FAIL)


def _value(found, run) -> float | None:
  """The metric of a run that is done, None where it is not finite; ValueError where it was not measured."""
  metrics = runs_lib.record(run).metrics
  if not isinstance(metrics.get(found.metric), int | float):
    raise ValueError(f'METRIC = {found.metric!r}: not measured; there are {", ".join(metrics)}')
  return metrics[found.metric] if math.isfinite(metrics[found.metric]) else None


def _runs(study, found, place, check):
  """The runs of all trials that have one."""
  runs = {}
  for trial in study.trials:
    if trial.params.keys() == found.space.keys():
      try:
        (run,) = runs_lib.plan(place, found.recipe, [found.fixed | trial.params], check)
      except ValueError:
        # Said when it was tried.
        continue
      runs[run.name] = run
  return list(runs.values())


def corners(found):
  """A run for each end of each range and each choice, all other keys at their first."""
  first = {key: entry[0] for key, entry in found.space.items()}
  return [
    found.fixed | first | {key: value}
    for key, entry in found.space.items()
    for value in (entry if isinstance(entry, list) else entry[:2])
  ]


def _distributions(optuna, found, check):
  """The space as Optuna takes it; ValueError for a range of a key that holds no number."""
  config = check(found.recipe, corners(found)[0])
  space = {}
  for key, entry in found.space.items():
    if isinstance(entry, list):
      space[key] = optuna.distributions.CategoricalDistribution(entry)
      continue
    kind = type(runs_lib.typed(config, key, entry[0] + entry[1]))
    kinds = {int: optuna.distributions.IntDistribution, float: optuna.distributions.FloatDistribution}
    if kind not in kinds:
      raise ValueError(f'SPACE[{key!r}] = {entry!r}: the config holds a {kind.__name__} there; list the choices')
    space[key] = kinds[kind](*entry[:2], log='log' in entry)
  return space


def _study(optuna, found, place):
  """The study of this search in the journal; one of another space, metric or recipe is another study."""
  said = {'space': found.space, 'metric': found.metric, 'direction': found.direction, 'fixed': found.fixed}
  storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(place / JOURNAL)))
  title = f'{found.name} {runs_lib.name(found.recipe, said)}'
  return optuna.create_study(storage=storage, study_name=title, direction=found.direction, load_if_exists=True)


def _optuna():
  try:
    import optuna
  except ImportError as error:
    raise ValueError(f'Optuna is needed, and does not load ({error}): pip install "qalora_jax[search]".') from None
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  return optuna


def main() -> None:
  """Does what the command line says."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.search', allow_abbrev=False,
    description=__doc__.partition('\n\n')[0].partition('?  ')[2],
    epilog=__doc__.partition('\n\n')[2], formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  names = ', '.join(sweep.ready(SEARCHES))
  parser.add_argument('search', metavar='NAME_OR_FILE', help=f'one of {names}, or a Python file')
  parser.add_argument('--trials', type=sweep.positive, metavar='N', help='trials in all, instead of TRIALS')
  parser.add_argument('--render', action='store_true', help='only render the stored results')
  arguments = parser.parse_args()
  found, trials, prepare = load(arguments.search)
  os.chdir(config_lib.ROOT)
  if arguments.render:
    runs = known(found)
  else:
    prepare()
    runs = search(found, arguments.trials or trials)
  raise SystemExit(show(found, runs, shlex.join(['python', '-m', 'experiments.search', *sys.argv[1:]])))


if __name__ == '__main__':
  stages.script(main)
