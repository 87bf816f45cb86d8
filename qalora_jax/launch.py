"""`qalora launch`: the same `qalora train` in every process of a job of submitit, on Slurm or on this machine."""

import ast
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

from qalora_jax import aborts
from qalora_jax import config as config_lib
from qalora_jax import progress

SUMMARY = (
  'Runs `qalora train` with these arguments in every process of a job: of Slurm, or several on this machine.\n'
  'A job of Slurm that is preempted or runs out of time is queued again, and goes on from its last checkpoint.'
)
_FLAGS = (
  config_lib.Flag('cluster', 'string', 'local', 'local or slurm.'),
  config_lib.Flag('nodes', 'integer', 1, 'How many hosts; on this machine they are processes.'),
  config_lib.Flag(
    'processes_per_node', 'integer', 1, 'Processes of a host: one has all its devices, several have one each.'
  ),
  config_lib.Flag(
    'option', 'many', [], 'KEY=VALUE for submitit, any number: gpus_per_node=8, timeout_min=600, slurm_partition=gpu.'
  ),
  config_lib.Flag('detach', 'bool', False, 'Do not wait for the job.'),
)
_JOBS = 'jobs'
# Minutes: a day on Slurm, where submitit asks for five, and no end on this machine, where it stops after two.
_TIMEOUT = {'slurm': 24 * 60, 'local': 10 * 365 * 24 * 60}
# What a process says of its error, up to submitit's next line.
_ERROR = re.compile(r'^qalora train: error: (.*?)(?=^submitit |\Z)', re.M | re.S)


def main(argv=None) -> None:
  """Runs the command with `argv`."""
  argv = list(sys.argv[1:] if argv is None else argv)
  arguments = config_lib.parse('launch', argv, summary=SUMMARY, extra_flags=(config_lib.REPLACE, *_FLAGS))
  values = {flag.name: arguments.values[flag.name] for flag in _FLAGS}
  launch(_of_train(argv), arguments.workdir, **values | {'option': dict(map(option, values['option']))})


def _of_train(argv: list[str]) -> list[str]:
  """The words that are not flags of `launch`, nor the values of these: --nodes=2 and --nodes 2 alike."""
  own, words, rest = {flag.name: flag.kind for flag in _FLAGS} | {'nodetach': 'bool'}, [], iter(argv)
  for word in rest:
    name, equals, _ = word.lstrip('-').partition('=')
    name = name.replace('-', '_')
    if not word.startswith('-') or name not in own:
      words.append(word)
    elif not equals and own[name] != 'bool':
      next(rest, None)
  return words


def launch(
  words: list[str],
  workdir: pathlib.Path,
  *,
  cluster: str = 'local',
  nodes: int = 1,
  processes_per_node: int = 1,
  option: dict | None = None,
  detach: bool = False,
) -> None:
  """`qalora train` with `words` as one job, whose logs are in workdir/jobs; what its first process prints is shown.

  Raises ValueError for options that submitit does not take, and, with the reason and the place of the logs, where the
  job fails.
  """
  if nodes < 1 or processes_per_node < 1:
    raise ValueError(f'--nodes={nodes} --processes-per-node={processes_per_node}: there is at least one of each.')
  count = nodes * processes_per_node
  shape = {'nodes': nodes, 'tasks_per_node': processes_per_node}
  task = Task(words)
  if cluster == 'local':
    shape = {'nodes': 1, 'tasks_per_node': count}
    task = Task(words, f'localhost:{_free_port()}' if count > 1 else '')
  standard = {'timeout_min': _TIMEOUT.get(cluster), 'stderr_to_stdout': True}
  submit = executor(cluster, workdir / _JOBS, standard | shape | (option or {}))
  job = submit.submit(task)
  logs = [job.task(process).paths.stdout for process in range(count)]
  progress.console.print(f'job {job.job_id}, {count} process(es); the log of the first: {logs[0]}')
  if not detach:
    _follow(job, logs[0])
    _check(job, logs)


class Task:
  """`qalora train` in one process of a job; submitit pickles it."""

  def __init__(self, words: list[str], coordinator: str = ''):
    self.words, self.coordinator = words, coordinator

  def __call__(self) -> int:
    """Runs to the end and returns the exit status."""
    import submitit

    place = submitit.JobEnvironment()
    environment, words = dict(os.environ), list(self.words)
    if place.cluster == 'local' and not environment.get('CUDA_VISIBLE_DEVICES'):
      # submitit's way to say that no GPU was asked for; on this machine all are at hand.
      environment.pop('CUDA_VISIBLE_DEVICES', None)
    if self.coordinator:
      words += [f'--coordinator={self.coordinator}', f'--processes={place.num_tasks}', f'--process={place.global_rank}']
      environment['JAX_LOCAL_DEVICE_IDS'] = str(place.local_rank)
    # A process of its own: submitit's handlers of signals stay here, train's there.
    warning = getattr(signal, f'SIG{place.USR_SIG}')
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'qalora_jax', 'train', *words],
      env=environment,
      # Slurm sends its warning to all processes of a job; one answers it, in `checkpoint`.
      preexec_fn=lambda: signal.signal(warning, signal.SIG_IGN),
    )
    return self._process.wait()

  def checkpoint(self):
    """What submitit queues again after a preemption or a timeout: the same command, which goes on where it is.

    Called in the first process of the job, by a handler of signals; the run stops as after any SIGTERM, kept.
    """
    import submitit

    os.kill(self._process.pid, signal.SIGTERM)
    # Popen's own wait is what the signal has interrupted, and holds its lock.
    os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
    return submitit.helpers.DelayedSubmission(Task(self.words, self.coordinator))


def executor(cluster: str, folder, options: dict):
  """submitit's executor of `cluster` ('slurm' or 'local') with these options; a folder for each job below `folder`.

  Raises ValueError where submitit is not installed, does not know the cluster, or does not take the options.
  """
  try:
    import submitit
  except ImportError as error:
    raise ValueError(f'submitit is needed, and does not load ({error}): pip install "qalora_jax[cluster]".') from None
  if cluster not in _TIMEOUT:
    raise ValueError(f'--cluster={cluster}: choose one of {", ".join(_TIMEOUT)}.')
  try:
    made = submitit.AutoExecutor(folder=pathlib.Path(folder) / '%j', cluster=cluster)
  except RuntimeError as error:
    raise ValueError(f'--cluster={cluster}: {error}') from None
  try:
    made.update_parameters(**{'name': 'qalora'} | options)
  except (NameError, TypeError, ValueError, AssertionError) as error:
    raise ValueError(f'--option: submitit does not take {options}: {error}') from None
  return made


def option(text: str) -> tuple[str, object]:
  """(key, value) of KEY=VALUE; a value that reads as Python's is that."""
  key, equals, value = text.partition('=')
  if not (key and equals):
    raise ValueError(f'--option={text}: write --option=KEY=VALUE')
  try:
    return key, ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return key, value


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('', 0))
    return probe.getsockname()[1]


def _follow(job, log: pathlib.Path) -> None:
  """Prints a job's log as it grows, to the job's end."""
  shown = 0
  while True:
    over = job.done()
    if log.exists():
      with log.open('rb') as file:
        file.seek(shown)
        new = file.read()
      shown += len(new)
      print(new.decode(errors='replace'), end='', flush=True)
    if over:
      return
    time.sleep(1)


def _check(job, logs: list[pathlib.Path]) -> None:
  """ValueError with the reason where not all processes of a job ended well."""
  try:
    if not any(job.results()):
      return
    state = 'failed'
  except Exception as error:  # submitit's own, or whatever its workers raised
    state = f'ended without a result ({type(error).__name__}, {job.state})'
  said = ''.join(log.read_text(errors='replace') for log in logs if log.exists())
  reasons = [reason.strip() for reason in _ERROR.findall(said)]
  # What one process found out by itself, rather than that it was left by another.
  own = [reason for reason in reasons if not reason.startswith(aborts.GONE)]
  raise ValueError(f'job {job.job_id} {state}: {(own or reasons or ["see the log"])[0]} (logs: {logs[0].parent})')
