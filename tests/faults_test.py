"""What happens to long runs: damaged checkpoints, signals, full disks, other meshes, two runs in one workdir."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_llama
from tensorboardX.proto import event_pb2

from qalora_jax import build
from qalora_jax import checkpoint
from qalora_jax import cli
from qalora_jax import config as config_lib
from qalora_jax import lock
from qalora_jax import optim
from qalora_jax import preemption
from qalora_jax import sharding
from qalora_jax import step as step_lib
from qalora_jax import train
from qalora_jax.data import batches

# A restore that orbax gives up leaves coroutines behind, which complain when they are collected, some tests later.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


@pytest.fixture
def copied(trained, tmp_path):
  """A copy of a finished run with checkpoints of steps 6 and 8, free to be changed."""
  return shutil.copytree(trained, tmp_path / 'copied')


def state(step, width=4):
  """A state in which every number says its step."""
  params = {'a': jnp.full((2, width), step, jnp.float32), 'b': jnp.full(3, step, jnp.float32)}
  return step_lib.State(jnp.int32(step), params, optax.adam(0.1).init(params))


def positions():
  tokens = np.arange(5, dtype=np.int32)
  examples = [{'tokens': tokens + 5 * i, 'loss_mask': np.ones(5, np.int32)} for i in range(6)]
  return batches.training(examples, window=8, batch=2, packing=True, seed=0)


def abstract(width=4):
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state(0, width))


@pytest.fixture
def kept(tmp_path):
  """Checkpoints of steps 1 to 3; before step n the data gave n batches."""
  data = positions()
  with checkpoint.open_manager(tmp_path, keep=3) as manager:
    for step in (1, 2, 3):
      next(data)
      checkpoint.save(manager, state(step), data)
  return tmp_path


def restored(directory, width=4):
  """(step, the batch that follows), every number of the state being its step's."""
  data = positions()
  with checkpoint.open_manager(directory, keep=3) as manager:
    found = checkpoint.restore(manager, abstract(width), data)
  small_llama.same(found, state(int(found.step)))
  return int(found.step), next(data)


def follows(step):
  data = positions()
  for _ in range(step):
    next(data)
  return next(data)


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  """One bit in the middle, which leaves the length as it was."""
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def one(directory, pattern):
  """The largest file of a pattern."""
  return max((path for path in directory.glob(pattern) if path.is_file()), key=lambda path: path.stat().st_size)


def warnings(capsys):
  return [line for line in capsys.readouterr().out.splitlines() if line.startswith('warning')]


def curve(workdir):
  """The metrics without the clock."""
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{name: value for name, value in row.items() if name not in train.SPEEDS} for row in rows]


def params(workdir):
  return build.load_run(config_lib.load(workdir), workdir).variables['params']


def contents(directory):
  return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob('*') if path.is_file()}


HARM = [
  (cut, 'params/d/*', r'params/d/\w+ has \d+ bytes of \d+'),
  (flip, 'params/ocdbt.process_0/d/*', r'params/ocdbt.process_0/d/\w+ has other contents'),
  (lambda path: path.unlink(), 'optimizer/manifest.ocdbt', 'optimizer/manifest.ocdbt is missing'),
  (flip, 'data/metadata', 'data/metadata has other contents'),
  (cut, checkpoint.DIGESTS, 'digests.json is cut short'),
]


def test_what_is_saved_is_restored(kept, capsys):
  step, batch = restored(kept)
  assert step == 3
  small_llama.same(batch, follows(3))
  assert not warnings(capsys)


@pytest.mark.parametrize('harm, pattern, said', HARM)
def test_a_damaged_checkpoint_is_set_aside(kept, capsys, harm, pattern, said):
  """Named, moved as it is, and the one before it taken, data position and all."""
  harm(one(kept / '3', pattern))
  harmed = contents(kept / '3')
  step, batch = restored(kept)
  assert step == 2
  small_llama.same(batch, follows(2))
  (warning,) = warnings(capsys)
  assert re.search(f'of step 3 \\({said}\\).*going on from step 2', warning)
  assert contents(kept / checkpoint.DAMAGED / '3') == harmed
  assert checkpoint.steps(kept) == [2, 1]


def test_weights_are_read_past_damage_and_nothing_is_moved(kept, capsys):
  cut(one(kept / '3', 'params/d/*'))
  flip(one(kept / '2', 'optimizer/d/*'))  # which is not read
  before = contents(kept)
  step, found = checkpoint.restore_params(kept, abstract().params)
  assert step == 2
  small_llama.same(found, state(2).params)
  assert len(warnings(capsys)) == 1 and contents(kept) == before


def test_without_a_whole_checkpoint_nothing_begins_anew(kept):
  for step in (1, 2, 3):
    cut(one(kept / str(step), 'params/d/*'))
  before = contents(kept)
  with pytest.raises(ValueError, match=r'step 3 .*; of step 2 .*; of step 1 .*No whole checkpoint is left.*begin anew'):
    restored(kept)
  assert contents(kept) == before


def test_damage_twice_at_one_step_keeps_both(kept):
  """The number is free again: step 3 is written anew, harmed anew, and both are kept."""
  for _ in range(2):
    cut(one(kept / '3', 'params/d/*'))
    data = positions()
    with checkpoint.open_manager(kept, keep=3) as manager:
      checkpoint.restore(manager, abstract(), data)
      checkpoint.save(manager, state(3), data)
  assert sorted(path.name for path in (kept / checkpoint.DAMAGED).iterdir()) == ['3', '3-2']
  assert checkpoint.steps(kept) == [3, 2, 1]


def test_another_model_is_an_error_and_no_damage(kept):
  before = contents(kept)
  with pytest.raises(ValueError, match=r'a has the shape \(2, 4\) there and \(2, 5'):
    restored(kept, width=5)
  assert contents(kept) == before


def test_moments_that_are_held_otherwise_are_not_taken(kept):
  """The second moment and its root have the same shapes: only their names tell them apart."""
  tx = optim.scale_by_adam(0.9, 0.999, 1e-8, state='float32', offload=False)
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  held = step_lib.init_state(tx, state(0).params)
  other = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), held)
  with checkpoint.open_manager(kept, keep=3) as manager, pytest.raises(ValueError, match='other settings of optim'):
    checkpoint.restore(manager, other, positions())
  assert checkpoint.steps(kept)[0] == restored(kept)[0]


@pytest.mark.parametrize('harmed', [False, True])
def test_a_checkpoint_without_digests_is_taken_if_it_restores(kept, capsys, harmed):
  """As they were before there were digests; grain wrote the position."""
  (kept / '3' / checkpoint.DIGESTS).unlink()
  (kept / '3/data/metadata').rename(kept / '3/data/process_0-of-1.json')
  if harmed:
    one(kept / '3', 'optimizer/manifest.ocdbt').unlink()
  step, batch = restored(kept)
  assert step == (2 if harmed else 3)
  small_llama.same(batch, follows(step))
  assert len(warnings(capsys)) == harmed


def test_what_a_kill_leaves_unfinished_is_removed(kept):
  left = kept / '5.orbax-checkpoint-tmp'
  shutil.copytree(kept / '3', left)
  data = positions()
  with checkpoint.open_manager(kept, keep=3) as manager:
    assert int(checkpoint.restore(manager, abstract(), data).step) == 3
    checkpoint.save(manager, state(4), data)
  assert checkpoint.steps(kept) == [4, 3, 2] and not list(kept.glob('*tmp*'))


def test_a_run_goes_on_from_before_the_damage_as_if_there_were_none(copied, trained, qalora, capsys):
  """Bit for bit, so nothing is lost but time."""
  cut(one(copied / 'checkpoints/8', 'params/d/*'))
  qalora('train', copied)
  assert len(warnings(capsys)) == 1
  assert checkpoint.steps(copied / 'checkpoints') == [8, 6]
  assert curve(copied) == curve(trained)
  small_llama.same(params(copied), params(trained))


# The recipe of `trained` saves at 3, 6 and 8 and logs every step.
@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_after_its_step(trained, recipe, tmp_path, monkeypatch, capsys, number, status):
  """The command says so and exits; the same command ends as if nothing had been, bit for bit."""
  write, handlers = train.Log.write, [signal.getsignal(known) for known in (signal.SIGTERM, signal.SIGINT)]

  def told(self, step, **values):
    write(self, step, **values)
    if step == 4 and 'loss' in values:
      os.kill(os.getpid(), number)

  words = ['train', f'--config={recipe}', f'--workdir={tmp_path}']
  with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
    patch.setattr(train.Log, 'write', told)
    cli.main(words)
  assert stopped.value.code == status
  # The signal came after the look at step 4.
  said = (
    f'stopped by {number.name} after step 5 of 8, which is kept in {tmp_path}; the same command goes on from there.'
  )
  assert said in capsys.readouterr().out
  assert checkpoint.steps(tmp_path / 'checkpoints') == [5, 3]
  assert [signal.getsignal(known) for known in (signal.SIGTERM, signal.SIGINT)] == handlers
  cli.main(words)
  assert curve(tmp_path) == curve(trained)
  small_llama.same(params(tmp_path), params(trained))


def test_a_signal_before_the_first_step_ends_the_run_at_once():
  with pytest.raises(preemption.Stopped, match='SIGTERM before a step') as stopped, preemption.watched():
    os.kill(os.getpid(), signal.SIGTERM)
  assert stopped.value.status == 0


def test_a_second_interrupt_does_not_wait():
  with pytest.raises(KeyboardInterrupt) as stopped, preemption.watched() as watch, watch.steps():
    os.kill(os.getpid(), signal.SIGINT)
    assert watch.reached(1)
    os.kill(os.getpid(), signal.SIGINT)
  assert not isinstance(stopped.value, preemption.Stopped)


@pytest.mark.parametrize('verb', ['train', 'quantize'])
def test_the_second_run_in_a_workdir_is_refused(copied, qalora, verb):
  place = copied if verb == 'train' else copied / '.base.unfinished'
  with lock.alone(place):
    before = contents(copied)
    with pytest.raises(ValueError, match=f'{place} is in use by another run .*Wait for it, stop it, or use another'):
      qalora(verb, copied if verb == 'train' else copied / 'base')
    assert contents(copied) == before
  lock.refuse_held(place)


def test_the_processes_of_one_run_do_not_refuse_each_other(tmp_path, monkeypatch):
  with lock.alone(tmp_path):
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    lock.refuse_held(tmp_path)
    with lock.alone(tmp_path):
      pass


def test_a_signal_while_the_last_checkpoint_is_written_changes_nothing(copied, qalora, monkeypatch):
  """Told again, or told when all is done, a run still writes to the end."""
  wait = checkpoint.ocp.CheckpointManager.close

  def told(self):
    os.kill(os.getpid(), signal.SIGTERM)
    wait(self)

  monkeypatch.setattr(checkpoint.ocp.CheckpointManager, 'close', told)
  qalora('train', copied, 'train.steps=9', 'data.validation.path=', '--replace_config')
  assert checkpoint.steps(copied / 'checkpoints') == [9, 8]


def test_a_process_that_is_killed_lets_its_workdir_go(tmp_path):
  code = f'import pathlib, time\nfrom qalora_jax import lock\nwith lock.alone(pathlib.Path({str(tmp_path)!r})):'
  process = subprocess.Popen(
    [sys.executable, '-c', code + "\n  print('held', flush=True)\n  time.sleep(60)"], stdout=subprocess.PIPE
  )
  with process:
    assert process.stdout.readline() == b'held\n'
    with pytest.raises(ValueError, match='in use by another run'):
      lock.refuse_held(tmp_path)
    process.kill()
  with lock.alone(tmp_path):
    pass


def test_a_vanished_data_file_is_named_and_nothing_is_changed(copied, qalora, tmp_path, text):
  other = shutil.copy(text, tmp_path / 'lines.txt')
  moved = ('train.steps=9', f'data.train.path={other}', '--replace_config')
  (tmp_path / 'lines.txt').unlink()
  before = contents(copied)
  with pytest.raises(FileNotFoundError, match=f'{tmp_path}/lines.txt. is not a file'):
    qalora('train', copied, *moved)
  assert contents(copied) == before
  shutil.copy(text, tmp_path / 'lines.txt')
  qalora('train', copied, *moved)
  assert checkpoint.steps(copied / 'checkpoints') == [9, 8]


def test_other_meshes_go_on_with_the_same_losses(copied, trained, qalora, monkeypatch):
  """Six steps on 8 devices, one on 4 and one on 1, against eight on 8.

  A loss is a mean over at most 256 tokens, and the gradient a sum over them; in another order a float32 sum of n terms
  moves by at most n times its rounding, 2^-24, relative to the sum of the terms' sizes, which for losses is the sum
  itself.  Weights take that on by the rate, 0.01 of their size, so a step adds less than the loss's own rounding.
  """
  shutil.rmtree(copied / 'checkpoints/8')
  make = sharding.make_mesh
  for devices, steps in ((4, 7), (1, 8)):
    with monkeypatch.context() as patch:
      patch.setattr(sharding, 'make_mesh', lambda n=devices, **sizes: make(devices=jax.devices()[:n], **sizes))
      qalora('train', copied, f'train.steps={steps}', 'data.validation.path=', '--replace_config')
  told, expected = ([row for row in curve(place) if 'loss' in row] for place in (copied, trained))
  assert [row['step'] for row in told] == [row['step'] for row in expected] == list(range(1, 9))
  assert told[:6] == expected[:6]
  np.testing.assert_allclose(
    [row['loss'] for row in told[6:]], [row['loss'] for row in expected[6:]], rtol=2 * 256 * 2.0**-24
  )


@pytest.mark.parametrize('before, after', [(8, 4), (4, 1), (1, 8)])
def test_a_state_lies_on_another_mesh_bit_for_bit(tmp_path, before, after):
  """Split over the devices of one mesh, restored split over those of another."""

  def on(devices, tree):
    split = sharding.make_mesh(data=1, fsdp=devices, devices=jax.devices()[:devices])
    spec = lambda leaf: jax.sharding.PartitionSpec(*['fsdp'] * (leaf.ndim and leaf.shape[0] % devices == 0))
    return jax.tree.map(lambda leaf: jax.sharding.NamedSharding(split, spec(leaf)), tree)

  rng = np.random.default_rng(0)
  params = {'a': rng.normal(size=(16, 3)).astype(np.float32), 'b': rng.normal(size=(5,)).astype(np.float32)}
  whole = step_lib.State(jnp.int32(7), params, optax.adam(0.1).init(params))
  whole = whole.replace(opt_state=jax.tree.map(lambda leaf: leaf + 1, whole.opt_state))
  data = positions()
  with checkpoint.open_manager(tmp_path, keep=1) as manager:
    checkpoint.save(manager, jax.device_put(whole, on(before, whole)), data)
  at = on(after, whole)
  wanted = jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), whole, at)
  with checkpoint.open_manager(tmp_path, keep=1) as manager:
    found = checkpoint.restore(manager, wanted, data)
  assert jax.tree.map(lambda leaf: leaf.sharding, found) == at
  small_llama.same(found, jax.tree.map(jnp.asarray, whole))


_SMALL_DISK = """
  import pathlib, shutil, subprocess, sys

  from qalora_jax import cli

  recipe, trained, disk = sys.argv[1:]
  workdir = pathlib.Path(disk) / 'run'

  def mount(*words):
    subprocess.run(['mount', *words, disk], check=True)

  def goes_on(name):
    try:
      cli.main(['train', f'--config={recipe}', f'--workdir={workdir}'])
      print(name, 'done', flush=True)
    except SystemExit as stopped:
      print(name, 'ended', stopped.code, flush=True)

  def fill(free):
    with (workdir.parent / 'filler').open('wb', buffering=0) as file:
      try:
        while file.write(bytes(4096)):
          pass
      except OSError:
        file.truncate(file.tell() - free)

  mount('-t', 'tmpfs', '-o', 'size=4m', 'tmpfs')
  shutil.copytree(trained, workdir)
  shutil.rmtree(workdir / 'checkpoints/8')
  mount('-o', 'remount,ro')
  goes_on('read-only')
  mount('-o', 'remount,rw')
  fill(0)
  goes_on('full')
  fill(32768)
  goes_on('short')
  (workdir.parent / 'filler').unlink()
  goes_on('free')
  shutil.copytree(workdir, trained.replace('trained', 'after'))
"""


def test_a_full_disk_and_a_read_only_one(copied, trained, recipe, tmp_path):
  """Each ends in one line and status 2, the checkpoint of step 6 whole; when there is room, the run ends as it would.

  A file system in memory, in a namespace of its own.
  """
  disk = tmp_path / 'disk'
  disk.mkdir()
  if (
    shutil.which('unshare') is None
    or subprocess.run(
      ['unshare', '-m', 'mount', '-t', 'tmpfs', 'tmpfs', disk], capture_output=True, check=False
    ).returncode
  ):
    pytest.skip('a small file system cannot be mounted here')
  start = copied.rename(tmp_path / 'trained')
  done = subprocess.run(
    ['unshare', '-m', sys.executable, '-c', textwrap.dedent(_SMALL_DISK), recipe, start, disk],
    capture_output=True,
    text=True,
    check=True,
    env=os.environ | {'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir},
  )
  ends = re.findall('^(?:read-only|full|short|free) .*', done.stdout, re.M)
  assert ends == ['read-only ended 2', 'full ended 2', 'short ended 2', 'free done'], done.stdout + done.stderr
  errors = [line for line in done.stderr.splitlines() if line.startswith('qalora train: error')]
  assert len(errors) == 3 and 'Traceback' not in done.stderr
  assert re.search(f'Read-only file system: .{disk}/run/lock', errors[0])
  assert re.search(f'{disk}/run/.*: cannot be written \\(No space left on device\\). Make room', errors[1])
  assert re.search(
    f'{disk}/run/checkpoints: a checkpoint could not be written .No space left on device.; that of step 6', errors[2]
  )
  assert curve(tmp_path / 'after') == curve(trained)
  small_llama.same(params(tmp_path / 'after'), params(trained))


def test_tensorboard_hides_what_is_done_again(tmp_path):
  """Records as TFRecord has them; a file begins by purging what another file has of the steps to come."""
  with train.Log(tmp_path, 4, tensorboard=True) as log:
    log.write(5, loss=1.5, tokens=3)
  (file,) = (tmp_path / 'tensorboard').iterdir()
  data, found = file.read_bytes(), []
  while data:
    (length,) = struct.unpack('<Q', data[:8])
    found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
    data = data[16 + length :]
  assert found[0].file_version == 'brain.Event:2'
  assert (found[1].session_log.status, found[1].step) == (event_pb2.SessionLog.START, 5)
  assert [(e.step, v.tag, v.simple_value) for e in found[2:] for v in e.summary.value] == [
    (5, 'loss', 1.5),
    (5, 'tokens', 3),
  ]
