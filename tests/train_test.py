"""`qalora train`: every kind learns, a stopped run goes on as if it had never stopped, what cannot be is refused."""

import gc
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import small_llama

from qalora_jax import build
from qalora_jax import cli
from qalora_jax import config as config_lib
from qalora_jax import hf
from qalora_jax import train

FULL = ('adapter.kind=full', 'base.method=stored', 'optim.schedule=cosine', 'optim.warmup_steps=4')
KINDS = {
  'qalora': (),
  'lora': ('adapter.kind=lora', 'adapter.targets=(o|down)_proj', 'adapter.dropout=0', 'data.packing=false'),
  'full': FULL,
  # The shapes of `source`, so that the compiled program is that of 'full'.
  'scratch': (
    *FULL,
    'model.source=scratch',
    'model.architecture.vocab_size=0',
    'model.architecture.hidden_size=32',
    'model.architecture.intermediate_size=64',
    'model.architecture.num_hidden_layers=2',
    'model.architecture.num_attention_heads=4',
    'model.architecture.num_key_value_heads=2',
    'model.architecture.rms_norm_eps=1e-6',
  ),
}


# A restore that orbax gives up leaves coroutines behind, which complain when they are collected, some tests later.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


@pytest.fixture(scope='module', autouse=True)
def _collected():
  yield
  gc.collect()


@pytest.fixture(scope='module')
def run(tmp_path_factory, qalora, source, trained):
  """The workdir of a whole run of one of KINDS, made once."""
  made = {'qalora': trained}

  def whole(kind):
    if kind not in made:
      made[kind] = tmp_path_factory.mktemp(kind)
      tokenizer = (f'model.tokenizer={source}',) if kind == 'scratch' else ()
      qalora('train', made[kind], *KINDS[kind], *tokenizer)
    return made[kind]

  return whole


@pytest.fixture
def copied(trained, tmp_path):
  """A copy of a finished run, free to be changed."""
  return shutil.copytree(trained, tmp_path / 'copied')


def rows(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def curve(workdir):
  """The metrics without the clock."""
  return [{name: value for name, value in row.items() if name not in train.SPEEDS} for row in rows(workdir)]


def losses(workdir):
  return [row['loss'] for row in rows(workdir) if 'loss' in row]


def params(workdir):
  return build.load_run(config_lib.load(workdir), workdir).variables['params']


def contents(directory):
  """Every file but TensorBoard's, which opens a new one at every start."""
  files = [path for path in directory.rglob('*') if path.is_file() and path.parent.name != 'tensorboard']
  return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_learns(run, kind):
  assert np.mean(losses(run(kind))[-2:]) < np.mean(losses(run(kind))[:2]) - 0.05


@pytest.mark.parametrize('kind', ['qalora', 'full'])
def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(run, qalora, tmp_path, monkeypatch, kind):
  """Losses and weights bit for bit: packing, dropout, schedule and moments all go on; the base stands still."""
  write, variables, seen = train.Log.write, build.variables, {}

  def dies(self, step, **values):
    write(self, step, **values)
    if step == 5:
      raise KeyboardInterrupt

  def remembers(*arguments):
    seen.update(variables(*arguments))
    seen['before'] = jax.tree.map(np.array, seen['frozen'])
    return dict(seen)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(train.Log, 'write', dies)
    qalora('train', tmp_path, *KINDS[kind])
  assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['3']
  assert losses(tmp_path) == losses(run(kind))[:5]
  # As a kill in the middle of a checkpoint would leave it.
  (tmp_path / 'checkpoints' / '4.orbax-checkpoint-tmp-1').mkdir()
  monkeypatch.setattr(build, 'variables', remembers)
  qalora('train', tmp_path, *KINDS[kind])
  assert curve(tmp_path) == curve(run(kind))
  small_llama.same(params(tmp_path), params(run(kind)))
  small_llama.same(jax.tree.map(np.asarray, seen['frozen']), seen['before'])


def test_a_finished_run_is_left_alone(copied, qalora):
  before = contents(copied)
  qalora('train', copied)
  assert contents(copied) == before


def test_metrics_and_tensorboard(run):
  workdir = run('qalora')
  assert [row['step'] for row in rows(workdir) if 'loss' in row] == list(range(1, 9))
  names = {'step', 'loss', 'grad_norm', 'learning_rate', 'tokens', *train.SPEEDS}
  assert all(set(row) == names for row in rows(workdir) if 'loss' in row)
  assert [row['step'] for row in rows(workdir) if 'validation_loss' in row] == [4, 8]
  assert [path.stat().st_size > 0 for path in (workdir / 'tensorboard').iterdir()] == [True]
  assert sorted(path.name for path in (workdir / 'checkpoints').iterdir()) == ['6', '8']


def test_validation_does_not_wait_for_a_log_line(qalora, tmp_path):
  words = ('train.checkpoint_every=4', 'train.tensorboard=false')
  qalora('train', tmp_path, 'train.steps=4', 'train.log_every=4', 'train.validate_every=2', *words)
  assert [row['step'] for row in rows(tmp_path) if 'validation_loss' in row] == [2, 4]
  assert not (tmp_path / 'tensorboard').exists()


def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
  with train.Log(tmp_path, 1, tensorboard=False) as log:
    log.write(2, loss=1.5)
  assert rows(tmp_path) == [{'step': 1, 'loss': 2.0}, {'step': 2, 'loss': 1.5}]


def test_another_config_is_refused_unless_it_may_replace(copied, trained, qalora):
  before = contents(copied)
  with pytest.raises(ValueError, match=r'train.steps: 8 -> 9\n.*--replace_config'):
    qalora('train', copied, 'train.steps=9')
  assert contents(copied) == before
  qalora('train', copied, 'train.steps=9', '--replace_config')
  assert config_lib.load(copied).train.steps == 9
  assert curve(copied)[: len(curve(trained))] == curve(trained)
  assert [row['step'] for row in rows(copied) if 'loss' in row] == list(range(1, 10))


def test_a_checkpoint_of_another_adapter_is_refused(copied, qalora):
  before = contents(copied)
  with pytest.raises(ValueError, match=r'step 8 is of another model or adapter: layers/.*/adapter/a has the shape'):
    qalora('train', copied, 'adapter.rank=2', '--replace_config')
  assert contents(copied) == before


@pytest.mark.parametrize('verb', ['train', 'evaluate'])
def test_another_base_is_refused(copied, qalora, source, tmp_path, verb):
  model = hf.read_config(source)
  hf.write(tmp_path / 'other', model, small_llama.draw(model, seed=1), tokenizer_from=source)
  replace = ('--replace_config', 'train.steps=9') if verb == 'train' else ()
  with pytest.raises(ValueError, match='base.json: the base weights are not those this adapter was trained on'):
    qalora(verb, copied, f'model.source={tmp_path / "other"}', *replace)


def test_a_loss_that_is_not_finite_stops_the_run(copied, trained, qalora):
  """From step 8 on, one step of 1e30: the loss of step 10 is the first to see it, the log of step 12 the first to look.

  The first loss after the resumed checkpoint, that of step 9, is still that of good weights.
  """
  wild = ('optim.learning_rate=1e30', 'adapter.dropout=0', 'train.steps=20', 'train.log_every=4')
  with pytest.raises(train.Diverged, match=r'loss of step 10 is (nan|inf).*optim.learning_rate'):
    qalora('train', copied, *wild, 'train.checkpoint_every=100', '--replace_config')
  assert max(int(path.name) for path in (copied / 'checkpoints').iterdir()) == 8
  for kept, good in zip(jax.tree.leaves(params(copied)), jax.tree.leaves(params(trained)), strict=True):
    np.testing.assert_array_equal(kept, good)


@pytest.mark.parametrize(
  'wrong, message',
  [
    (['adapter.kind=none'], 'trains nothing'),
    (['model.source=/nowhere/model'], 'no directory and no hub id'),
    (['model.tokenizer=/nowhere'], 'no tokenizer here'),
    (['data.train.path=/nowhere/lines.txt'], 'is not a file'),
    (['data.train.start=1000'], 'leave none of its 64 documents'),
    (['data.train.format=jsonl', 'data.train.separator='], r'lines.txt:1: invalid JSON'),
    (['data.train.sample=57'], 'sample = 57 is more than the 56 documents'),
    (['data.train.recipe=flan-v2', 'data.train.path='], 'no single file on the hub: fetch .*data.train.path'),
    (['data.validation.recipe=e2e', 'data.validation.path='], 'no single file on the hub'),
    (['data.validation.format=jsonl', 'data.validation.separator='], r'lines.txt:1: invalid JSON'),
    (['train.batch=12'], 'is 12 rows, which do not divide over data x fsdp = 8 devices'),
    (['sharding.tensor=3'], 'does not fit 8 devices'),
    (['base.group=48'], '32 inputs do not divide into groups of 48'),
    (['base.method=stored'], 'qalora needs quantized weights'),
    (['adapter.kind=full'], "'full' cannot train base.method = 'affine'"),
  ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(qalora, tmp_path, wrong, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    qalora('train', tmp_path / 'workdir', *wrong)
  assert not (tmp_path / 'workdir').exists()


def test_an_error_is_one_line_even_from_inside_a_trace(recipe, tmp_path, capsys):
  with pytest.raises(SystemExit) as stopped:
    cli.main(['train', f'--config={recipe}', f'--workdir={tmp_path / "workdir"}', '--config.base.group=48'])
  assert stopped.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith('qalora train: error: layers/') and error.count('\n') == 1


def test_help_is_there_as_a_module():
  done = subprocess.run(
    [sys.executable, '-m', 'qalora_jax.train', '--help'], capture_output=True, text=True, check=True
  )
  assert 'usage: qalora train --config=FILE --workdir=DIR' in done.stdout
  assert '--replace_config' in done.stdout
