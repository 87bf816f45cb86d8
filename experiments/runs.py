"""Runs of a sweep: named by what they override, done once, kept whether they succeed or fail.

A run's directory is PLACE/HASH, with

    overrides.json   the recipe and what is overridden
    result.json      `report.document` with one row, the metrics; written whole, when the run is done
    error.txt        of a run that failed: the reason in one line, then the traceback
    lock             held (flock) by the process that is at it; on a cluster the file system must have flock
    log.txt          what a run in a process of its own printed

Runs are done one after another in this process, side by side in processes of their own, or as jobs of submitit.
"""

from collections.abc import Callable
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import traceback

from experiments import grids
from qalora_jax import config as config_lib
from qalora_jax import launch
from qalora_jax import lock
from qalora_jax import progress
from qalora_jax import report

OVERRIDES, RESULT, ERROR, LOG = 'overrides.json', 'result.json', 'error.txt', 'log.txt'
DONE, FAILED, RUNNING, DUE = 'done', 'failed', 'running', 'due'
# Where the numbers of threads are read: by XLA on CPU, by NumPy's libraries and by the tokenizers.
_THREADS = ('NPROC', 'PJRT_NPROC', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'RAYON_NUM_THREADS')
# Exit codes of processes that the user stopped: their runs are still due.
_INTERRUPTED = (130, -signal.SIGINT, -signal.SIGTERM)

# (recipe, overrides, root) -> flat dict of metrics; a function of a module, so that other processes find it.
Measure = Callable[[str, grids.Overrides, pathlib.Path], dict]
Check = Callable[[str, grids.Overrides], object]


def measure(recipe: str, overrides: grids.Overrides, root: pathlib.Path) -> dict:
  """`pipeline.result`, with the compiled programs of all runs kept below `root`."""
  # Only where a run is done: JAX and all commands come with it.
  from experiments import pipeline
  from experiments import stages

  stages.remember_compilations(root / 'compiled')
  return pipeline.result(recipe, overrides, root)


def check(recipe: str, overrides: grids.Overrides) -> object:
  """`pipeline.checked`."""
  from experiments import pipeline

  return pipeline.checked(recipe, overrides)


@dataclasses.dataclass(frozen=True)
class Run:
  """One run: `recipe` with `overrides`, kept in `directory`."""

  recipe: str
  overrides: grids.Overrides
  directory: pathlib.Path

  @property
  def name(self) -> str:
    return self.directory.name

  def __str__(self) -> str:
    return f'{self.name}  {words(self.overrides)}'


@dataclasses.dataclass(frozen=True)
class Record:
  """What is known of a run that is done: its metrics, and where they come from."""

  run: str
  recipe: str
  overrides: grids.Overrides
  metrics: dict
  source: dict  # commit, date, machine


def words(overrides: grids.Overrides) -> str:
  """The overrides in one line."""
  return ' '.join(f'{key}={value}' for key, value in overrides.items()) or 'as the recipe says'


def name(recipe: str, overrides: grids.Overrides) -> str:
  """The first 12 hexadecimal digits of the SHA-256 of the recipe's path and the overrides as canonical JSON."""
  said = {'recipe': portable(recipe), 'overrides': overrides}
  return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(',', ':')).encode()).hexdigest()[:12]


def portable(path: str) -> str:
  """A path as seen from the checkout, so that it means the same on every machine; others as they are."""
  whole = (config_lib.ROOT / path).resolve()
  return whole.relative_to(config_lib.ROOT).as_posix() if whole.is_relative_to(config_lib.ROOT) else str(whole)


def plan(
  place: pathlib.Path,
  recipe: str,
  sweep: grids.Sweep,
  check: Check = check,
  known: grids.Overrides | None = None,
) -> list[Run]:
  """The runs of a sweep, in its order, each once.

  `check` raises ValueError for a run that cannot be, and returns its config; all that is wrong with any run
  is one ValueError.  Values take the type that the config gives them: 1 for a learning rate is 1.0.  `known` overrides
  every run.
  """
  recipe, runs, wrong = portable(recipe), {}, {}
  for overrides in sweep:
    overrides = overrides | (known or {})
    try:
      config = check(recipe, overrides)
    except ValueError as error:
      wrong.setdefault(str(error), []).append(words(overrides))
      continue
    overrides = {key: typed(config, key, value) for key, value in overrides.items()}
    hashed = name(recipe, overrides)
    runs.setdefault(hashed, Run(recipe, overrides, place / hashed))
  if wrong:
    count = sum(len(which) for which in wrong.values())
    lines = [f'{which[0]}{f" (and {len(which) - 1} more)" * (len(which) > 1)}: {why}' for why, which in wrong.items()]
    raise ValueError('\n  '.join([f'{count} of {len(sweep)} runs cannot be:', *lines]))
  return list(runs.values())


def typed(config, key: str, value):
  """What `config` holds under a dotted key, or `value` where it has no such key."""
  for part in key.split('.'):
    if config is None or part not in config:
      return value
    config = config[part]
  return config


def state(run: Run) -> str:
  """DONE, FAILED (a result that cannot be read, too), RUNNING (a process is at it) or DUE."""
  if (run.directory / RESULT).exists():
    return FAILED if reason(run) else DONE
  if (run.directory / lock.FILE).exists():
    with lock.taken(run.directory / lock.FILE, shared=True) as free:
      if not free:
        return RUNNING
  return FAILED if (run.directory / ERROR).exists() else DUE


def reason(run: Run) -> str | None:
  """Why a run failed, in one line."""
  if (run.directory / RESULT).exists():
    try:
      record(run)
    except ValueError as error:
      return str(error)
  elif (run.directory / ERROR).exists():
    return (run.directory / ERROR).read_text().partition('\n')[0]
  return None


def record(run: Run) -> Record | None:
  """The result of a run that is done, else None; ValueError for a file that is no result of this run."""
  path = run.directory / RESULT
  if not path.exists():
    return None
  try:
    content = json.loads(path.read_text())
    found = Record(
      run.name, content['recipe'], content['overrides'], content['rows'][0],
      {key: content[key] for key in ('commit', 'date', 'machine')},
    )  # fmt: skip
    _flat(found.metrics)
  except (ValueError, KeyError, TypeError, IndexError) as error:
    raise ValueError(f'{path}: no result ({type(error).__name__}: {error}); --retry measures it again') from None
  if name(found.recipe, found.overrides) != run.name:
    raise ValueError(f'{path}: the result of another run ({words(found.overrides)}); --retry measures this one')
  return found


def perform(run: Run, root: pathlib.Path, measure: Measure, retry: bool = False) -> str:
  """Does a run unless it is done, failed before (without `retry`), or another process is at it; returns its state.

  Whatever stops it but an interrupt is kept in error.txt and does not stop the caller.
  """
  run.directory.mkdir(parents=True, exist_ok=True)
  with lock.taken(run.directory / lock.FILE) as free:
    if not free:
      return RUNNING
    if (before := _settled(run)) and not (retry and before == FAILED):
      return before
    for stale in (RESULT, ERROR):
      (run.directory / stale).unlink(missing_ok=True)
    report.write(run.directory / OVERRIDES, {'recipe': run.recipe, 'overrides': run.overrides})
    try:
      row = _flat(measure(run.recipe, dict(run.overrides), root))
      said = dict(recipe=run.recipe, overrides=run.overrides)
      report.write(run.directory / RESULT, report.document('python -m experiments.sweep', [row], **said))
    except (Exception, SystemExit) as error:
      _fail(run, f'{type(error).__name__}: {error}', traceback.format_exc())
  return _settled(run)


def do(
  runs: list[Run], root: pathlib.Path, measure: Measure = measure, *,
  retry=False, limit: int | None = None, workers: int = 1, cluster: str | None = None, options: dict | None = None,
) -> None:  # fmt: skip
  """Does the runs that are due (with `retry` also those that failed), at most `limit` of them.

  One after another in this process; with `workers` that many at a time, each in a fresh process with its share of the
  threads; with `cluster` ('slurm' or 'local') as jobs of submitit with its `options`, `workers` at a time (Slurm: 0
  leaves that to the queue).  What each left is in its directory.
  """
  wanted = (DUE, FAILED) if retry else (DUE,)
  runs = [run for run in runs if state(run) in wanted][:limit]
  if cluster:
    _submit(runs, root, measure, retry, workers, cluster, options or {})
  elif workers > 1:
    with _threads(max(1, (os.cpu_count() or 1) // workers)):
      _side_by_side(lambda run: _alone(run, root, measure, retry), runs, workers)
  else:
    for number, run in enumerate(runs, 1):
      progress.console.print(f'\n[bold]{number}/{len(runs)}[/bold] {run}')
      perform(run, root, measure, retry)
      say(run)


def say(run: Run, number: str = '') -> None:
  """How a run ended, in one line; after its `number` and what it was, where that has not been said."""
  found = state(run)
  if number:
    progress.console.print(f'{number} {run}', markup=False)
  if found == DONE:
    metrics = record(run).metrics
    said = ', '.join(f'{key} {report.text(metrics[key])}' for key in list(metrics)[:4])
  else:
    said = reason(run) if found == FAILED else ''
  progress.console.print(f'  {found}: {said}' if said else f'  {found}', markup=False)


def _settled(run):
  """DONE or FAILED, from what lies in the directory; None where the run is not over."""
  if why := reason(run):
    return FAILED if why else None
  return DONE if (run.directory / RESULT).exists() else None


def _fail(run, why, more):
  """Writes error.txt whole."""
  text = ' '.join(why.split()) + '\n\n' + more
  report.whole(run.directory / ERROR, lambda partial: partial.write_text(text))


def _flat(row):
  if not isinstance(row, dict) or not row:
    raise ValueError(f'a result is a flat dict of metrics, not {row!r}')
  if nested := [key for key, value in row.items() if not isinstance(value, int | float | str | None)]:
    raise ValueError(f'a result is a flat dict of numbers and strings; {", ".join(map(str, nested))} is not')
  return row


@contextlib.contextmanager
def _threads(count):
  """Processes that start meanwhile use `count` threads each."""
  before = {key: os.environ.get(key) for key in _THREADS}
  os.environ.update({key: str(count) for key in _THREADS})
  try:
    yield
  finally:
    for key, value in before.items():
      if value is None:
        del os.environ[key]
      else:
        os.environ[key] = value


def _side_by_side(work, runs, workers):
  """work(run) for all runs in `workers` threads; says how each ended."""
  with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
    futures = {pool.submit(work, run): run for run in runs}
    try:
      for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
        future.result()
        say(futures[future], f'{number}/{len(runs)}')
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def _alone(run, root, measure, retry):
  """`perform` in a process of its own."""
  run.directory.mkdir(parents=True, exist_ok=True)
  # A fresh interpreter: JAX does not survive a fork, and every run begins with all memory free.
  process = multiprocessing.get_context('spawn').Process(
    target=_logged, args=(run, root, measure, retry), name=run.name
  )
  process.start()
  process.join()
  if process.exitcode and process.exitcode not in _INTERRUPTED and not _settled(run):
    _died(run, f'its process ended with exit code {process.exitcode} (-9: killed, as when memory is short)')


def _logged(run, root, measure, retry):
  """`perform`, all that is printed going to the run's log."""
  with (run.directory / LOG).open('a') as log:
    for stream in (sys.stdout, sys.stderr):
      stream.flush()
      os.dup2(log.fileno(), stream.fileno())
  try:
    perform(run, root, measure, retry)
  except KeyboardInterrupt:
    raise SystemExit(_INTERRUPTED[0]) from None


def _died(run, why):
  """Keeps that a run ended without a word of its own."""
  log = run.directory / LOG
  _fail(run, why, log.read_text(errors='replace')[-4000:] if log.exists() else '')


def _submit(runs, root, measure, retry, workers, cluster, options):
  """The runs as jobs of submitit; returns when all are over."""
  if not runs:
    return
  if cluster == 'slurm' and workers > 1:
    options = {'slurm_array_parallelism': workers} | options
  executor = launch.executor(cluster, runs[0].directory.parent / 'jobs', options)
  submit = lambda run: executor.submit(perform, run, root, measure, retry)
  if cluster == 'local':
    # Jobs on this machine would all begin at once.
    _side_by_side(lambda run: _await(run, submit(run)), runs, workers)
    return
  with executor.batch():
    jobs = [submit(run) for run in runs]
  progress.console.print(f'{len(jobs)} jobs: {jobs[0].job_id} to {jobs[-1].job_id}; the same command again finds them')
  for number, (run, job) in enumerate(zip(runs, jobs, strict=True), 1):
    _await(run, job)
    say(run, f'{number}/{len(runs)}')


def _await(run, job):
  """Waits for a job; one that ended without a word is a run that failed."""
  failure = job.exception()
  if failure and not _settled(run):
    _fail(run, f'job {job.job_id}: {type(failure).__name__}: {failure}', f'{job.stdout()}\n{job.stderr()}')
