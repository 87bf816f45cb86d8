"""What happens to long runs: damaged checkpoints, signals, full disks, other meshes, two runs in one workdir."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_llama

from qalora_jax import build
from qalora_jax import checkpoint
from qalora_jax import config as config_lib
from qalora_jax import step as step_lib
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
  return [{name: value for name, value in row.items() if name != 'tokens_per_second'} for row in rows]


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
