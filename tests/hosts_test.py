"""Several processes, for real: two with two CPU devices each, over gloo, against one process with four."""

import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from qalora_jax import aborts
from qalora_jax import config as config_lib
from qalora_jax import hosts
from qalora_jax import launch
from qalora_jax.data import shares

STEPS = 6
# Seconds: what two slow cores need to compile a step twice.
LONG = 150
# Devices share rows and sums otherwise, so rounding differs: by at most n eps for a sum of n, the MLP's 64 being the
# model's longest.  Other data, or another order, moves these losses by a hundredth.
CLOSE = dict(rtol=64 * np.finfo(np.float32).eps, atol=0)


@dataclasses.dataclass(frozen=True)
class Machine:
  """`qalora` as processes, whose compiled programs are kept."""

  recipe: pathlib.Path
  compiled: pathlib.Path

  def start(self, *words: str, verb: str = 'train', devices: int = 2, recipe=None, **environment) -> subprocess.Popen:
    settings = {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
      'JAX_COMPILATION_CACHE_DIR': str(self.compiled),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    }
    return subprocess.Popen(
      [sys.executable, '-m', 'qalora_jax', verb, f'--config={recipe or self.recipe}', *words],
      env=os.environ | settings | environment,
      cwd=config_lib.ROOT,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )

  def pair(self, *words: str, **how) -> list[subprocess.Popen]:
    where = f'--coordinator=localhost:{free_port()}'
    return [self.start(where, '--processes=2', f'--process={process}', *words, **how) for process in range(2)]

  def one(self, *words: str, **how) -> str:
    return done(self.start(*words, **how))


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('', 0))
    return probe.getsockname()[1]


def done(process: subprocess.Popen, status: int | None = 0) -> str:
  """What a process printed, to its end, which it reaches with this exit status."""
  try:
    said, _ = process.communicate(timeout=LONG)
  except subprocess.TimeoutExpired:
    process.kill()
    raise
  assert status is None or process.returncode == status, said
  return said


def run(*words: str, **sizes: int) -> list[str]:
  """The flags of a short run over a mesh."""
  mesh = [f'--config.sharding.{axis}={size}' for axis, size in sizes.items()]
  return [f'--config.train.steps={STEPS}', '--config.train.validate_every=0', *mesh, *words]


def losses(workdir: pathlib.Path) -> list[tuple[int, str, float]]:
  """(step, name, value) of every loss in metrics.jsonl, in its order."""
  rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [(row['step'], name, row[name]) for row in rows for name in ('loss', 'validation_loss') if name in row]


def assert_same(found: list, expected: list) -> None:
  assert [row[:2] for row in found] == [row[:2] for row in expected]
  np.testing.assert_allclose([row[2] for row in found], [row[2] for row in expected], **CLOSE)


@pytest.fixture(scope='module')
def machine(recipe, tmp_path_factory) -> Machine:
  return Machine(recipe, tmp_path_factory.mktemp('compiled'))


@pytest.fixture(scope='module')
def alone(machine, tmp_path_factory) -> pathlib.Path:
  """The workdir of one process with four devices."""
  workdir = tmp_path_factory.mktemp('alone') / 'run'
  machine.one(f'--workdir={workdir}', *run(), devices=4)
  return workdir


@pytest.fixture(scope='module')
def together(machine, tmp_path_factory) -> pathlib.Path:
  """The workdir of two processes with two devices each."""
  workdir = tmp_path_factory.mktemp('together') / 'run'
  said = [done(process) for process in machine.pair(f'--workdir={workdir}', *run(data=4))]
  assert 'trained parameters' in said[0] and 'trained parameters' not in said[1]
  return workdir


def test_two_processes_train_as_one(alone, together):
  expected = losses(alone)
  assert [step for step, name, _ in expected if name == 'loss'] == [*range(1, STEPS + 1)]
  assert expected[-1][1] == 'validation_loss'
  assert_same(losses(together), expected)


def test_files_are_written_once(together):
  assert len(list((together / 'tensorboard').iterdir())) == 1
  assert sorted(path.name for path in (together / 'checkpoints').iterdir() if path.name.isdigit()) == ['3', '6']


def test_a_model_divided_between_processes_that_are_launched(machine, alone, tmp_path):
  pytest.importorskip('submitit')
  said = machine.one('--nodes=2', f'--workdir={tmp_path}', *run(data=2, tensor=2), verb='launch')
  assert said.count('trained parameters') == 1
  assert_same(losses(tmp_path), losses(alone))


@pytest.mark.parametrize('verb, devices', [('train', 1), ('launch', 4)])
def test_one_process_goes_on_where_two_stopped(machine, alone, together, tmp_path, verb, devices):
  if verb == 'launch':
    pytest.importorskip('submitit')
  workdir = tmp_path / 'run'
  shutil.copytree(together, workdir)
  shutil.rmtree(workdir / 'checkpoints' / '6')
  said = machine.one(f'--workdir={workdir}', *run(data=-1), '--replace_config', verb=verb, devices=devices)
  assert 'continuing from step 3' in said
  assert_same(losses(workdir), losses(alone))


@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_the_other(machine, tmp_path, victim):
  words = run(f'--workdir={tmp_path}', '--config.train.steps=1000000', '--heartbeat=10', data=4)
  processes = machine.pair(*words)
  try:
    await_steps(processes, tmp_path, 8)
    processes[victim].kill()
    killed = time.monotonic()
    said = done(processes[1 - victim], status=None)
    # The heartbeat, and what it takes to look for it and to end.
    assert time.monotonic() - killed < 30
  finally:
    for process in processes:
      process.kill()
      process.wait()
      process.stdout.close()
  assert processes[1 - victim].returncode
  errors = [line for line in said.splitlines() if 'error' in line.lower() or line.startswith(('Traceback', '  File'))]
  assert len(errors) == 1 and errors[0].startswith(f'qalora train: error: {aborts.GONE}'), said
  assert re.search(r'run the same command again on all hosts: it goes on from step [36]\.', errors[0])


def await_steps(processes, workdir: pathlib.Path, steps: int) -> None:
  """Returns when a run has logged so many steps."""
  metrics, began = workdir / 'metrics.jsonl', time.monotonic()
  while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
    assert time.monotonic() - began < LONG and all(process.poll() is None for process in processes)
    time.sleep(0.1)


def test_processes_that_do_not_meet(machine, tmp_path):
  address = f'localhost:{free_port()}'
  words = (f'--workdir={tmp_path}', f'--coordinator={address}', '--processes=2', '--process=1', '--meeting=3')
  said = done(machine.start(*words), status=-signal.SIGABRT)
  assert said.splitlines() == [line for line in said.splitlines() if line.startswith('qalora train: error: ')], said
  assert f'have not met at {address} within 3 s' in said and said.count('\n') == 1


@hypothesis.given(
  st.lists(st.lists(st.integers(1, 5), max_size=3), max_size=9), st.integers(1, 4), st.integers(0, 2**32 - 1)
)
def test_shares_join_to_the_whole(sizes, processes, seed):
  """Whatever the number of processes, the examples are those of one, bit for bit, in the documents' order."""
  rng = np.random.default_rng(seed)
  draw = lambda size: {name: rng.integers(0, 2**31, size, np.int32) for name in ('tokens', 'loss_mask')}
  groups = [[draw(size) for size in document] for document in sizes]
  joined = shares.join([shares.pack(len(groups), groups[process::processes]) for process in range(processes)])
  expected = [example for group in groups for example in group]
  assert len(joined) == len(expected)
  for found, example in zip(joined, expected, strict=True):
    for name in example:
      np.testing.assert_array_equal(found[name], example[name])
      assert found[name].dtype == example[name].dtype


def test_hosts_with_other_data_are_refused():
  with pytest.raises(ValueError, match=r'the processes read \[3, 4\] documents'):
    shares.join([shares.pack(3, [[], []]), shares.pack(4, [[], []])])


def test_what_one_process_cannot_read_ends_all(machine, tmp_path, recipe, text):
  """The 21st document is process 0's, and leaves nothing to learn."""
  bad = tmp_path / 'lines.jsonl'
  good = [json.dumps({'prompt': line, 'completion': 'x'}) for line in text.read_text(encoding='utf-8').splitlines()]
  bad.write_text('\n'.join([*good[:20], json.dumps({'prompt': 'the dog', 'completion': ''}), *good[20:]]) + '\n')
  data = (f'--config.data.train.path={bad}', '--config.data.train.format=jsonl', '--config.data.train.append_eos=false')
  said = [done(process, status=None) for process in machine.pair(f'--workdir={tmp_path / "run"}', *run(*data))]
  assert all('leaves no token that carries loss' in text for text in said), said
  assert 'process 0: ' in said[1]


_JOINED = """\
import jax
from qalora_jax import hosts
hosts.start(meeting=60)
print(jax.process_index(), jax.process_count(), jax.device_count(), hosts.gather(b'x' * jax.process_index()))
"""


@pytest.mark.parametrize('nodes', [1, 2])
def test_slurm_is_detected(nodes):
  """The environment of a step of srun, here both tasks on this machine."""
  common = {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
    'JAX_COORDINATOR_PORT': str(free_port()),
    'SLURM_JOB_ID': '1',
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_STEP_NUM_NODES': str(nodes),
    'SLURM_NTASKS': '2',
    'SLURM_STEP_NUM_TASKS': '2',
  }
  own = [{'SLURM_PROCID': str(task), 'SLURM_LOCALID': str(task)} for task in range(2)]
  how = dict(cwd=config_lib.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  tasks = [subprocess.Popen([sys.executable, '-c', _JOINED], env=os.environ | common | task, **how) for task in own]
  for number, task in enumerate(tasks):
    assert f"{number} 2 4 [b'', b'x']" in done(task)


def test_a_task_alone_joins_nothing(monkeypatch):
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
  hosts.start()
  assert hosts.first()


@pytest.mark.parametrize('verb', ['quantize', 'evaluate', 'export', 'generate'])
def test_the_work_of_one_process_refuses_several(qalora, tmp_path, monkeypatch, verb):
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '4')
  with pytest.raises(ValueError, match=f'`qalora {verb}` is the work of one process, and 4 were started'):
    qalora(verb, tmp_path)


@pytest.mark.parametrize(
  'flags, wrong',
  [
    (dict(coordinator='here:1'), 'give all three'),
    (dict(processes=2, process=0), 'give all three'),
    (dict(process=0), 'give all three'),
    (dict(coordinator='here', processes=2, process=0), 'HOST:PORT'),
    (dict(coordinator='here:1', processes=2, process=2), 'from 0 to 1'),
    (dict(coordinator='here:1', processes=-2, process=-3), 'from 0 to'),
    (dict(heartbeat=0), '--heartbeat=0'),
  ],
)
def test_flags_that_do_not_go_together(flags, wrong):
  with pytest.raises(ValueError, match=wrong):
    hosts.start(**flags)


ERROR = 'E1122 02:25:23.5 12 coordination_service.cc:15] slow\n'
FATAL = 'F1122 02:25:23.5 12 client.h:80] Terminating\n'
TRACE = '*** Check failure stack trace: ***\n'


@pytest.mark.parametrize(
  'lines, passed, kept',
  [
    (['one\n', ERROR, 'two\n'], ['one\n', ERROR, 'two\n'], []),
    (['one\n', ERROR, FATAL, TRACE, '@ 0x7f\n'], ['one\n', None], [ERROR, FATAL, TRACE, '@ 0x7f\n']),
    ([ERROR, FATAL], [None], [ERROR, FATAL]),
    ([f'{aborts.OWN}no room\n', ERROR, FATAL, TRACE], [f'{aborts.OWN}no room\n'], [ERROR, FATAL, TRACE]),
    ([ERROR, f'{aborts.OWN}no room\n', FATAL], [f'{aborts.OWN}no room\n'], [ERROR, FATAL]),
  ],
)
def test_an_abort_is_one_message(tmp_path, lines, passed, kept):
  """None stands for the message."""
  out, record = io.StringIO(), tmp_path / 'aborts' / 'one.txt'
  aborts.relay(lines, out, 'unmet', tmp_path, record)
  said = [None if line.startswith(aborts.OWN + aborts.GONE) else line for line in out.getvalue().splitlines(True)]
  assert said == passed
  assert (record.read_text() if kept else '') == ''.join(kept)


def test_launch_says_why_a_job_failed(machine, tmp_path):
  pytest.importorskip('submitit')
  process = machine.start(f'--workdir={tmp_path}', '--config.train.batch=3', verb='launch', devices=2)
  *_, last = done(process, status=2).splitlines()
  assert last.startswith('qalora launch: error: job ') and 'train.batch = 3' in last
  assert str(tmp_path / 'jobs') in last


def test_launch_refuses_what_submitit_does_not_know(tmp_path):
  pytest.importorskip('submitit')
  with pytest.raises(ValueError, match='--option: submitit does not take'):
    launch.launch([], tmp_path, option={'minutes': 5})
  with pytest.raises(ValueError, match='--cluster=here'):
    launch.launch([], tmp_path, cluster='here')
  with pytest.raises(ValueError, match='at least one'):
    launch.launch([], tmp_path, nodes=0)
  with pytest.raises(ValueError, match='KEY=VALUE'):
    launch.option('minutes')


def test_a_job_that_is_queued_again_goes_on():
  """On a warning the run is told to stop, and stops, before submitit is given the same command."""
  submitit = pytest.importorskip('submitit')
  program = 'import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print(flush=True);'
  task, again = launch.Task(['--workdir=here'], 'localhost:1'), []
  task._process = subprocess.Popen([sys.executable, '-c', f'{program} time.sleep(60)'], stdout=subprocess.PIPE)
  before = signal.signal(signal.SIGUSR2, lambda *_: again.append(task.checkpoint()))
  try:
    task._process.stdout.read(1)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR2)).start()
    assert task._process.wait() == 7
  finally:
    signal.signal(signal.SIGUSR2, before)
    task._process.stdout.close()
  assert isinstance(again[0], submitit.helpers.DelayedSubmission)
  assert (again[0].function.words, again[0].function.coordinator) == (['--workdir=here'], 'localhost:1')


@pytest.mark.parametrize('words', [['--nodes', '2', '--detach'], ['--nodes=2', '--nodetach'], ['--cluster', 'local']])
def test_train_gets_its_own_words_alone(words):
  """The value of a flag of launch is a word of its own, too; what only looks like a flag's name is none."""
  own = ['--config=a.py', '--workdir', 'nodes', '--config.train.steps=3']
  assert launch._of_train([*own[:1], *words, *own[1:]]) == own


def test_whoever_fails_says_why(monkeypatch):
  """Any error of one process reaches the meeting of all, and one without words is not taken for success."""
  met = []
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(hosts, 'gather', lambda mine: met.append(mine) or [mine, b''])

  def fail():
    raise KeyError

  with pytest.raises(KeyError):
    hosts.together(fail)
  assert met == [b'KeyError()']
