"""`qalora export`: what is written is the adapted model, here and elsewhere, or is not written."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llama

from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import packed
from qalora_jax import quant
from qalora_jax import sharding
from qalora_jax.export import command
from qalora_jax.export import merge

LORA = (('adapter.kind', 'lora'), ('adapter.targets', 'down_proj'), ('base.targets', 'mlp'))
FULL = (('adapter.kind', 'full'), ('base.method', 'stored'))


@pytest.fixture(scope='module')
def run(trained):
  return build.load_run(config_lib.load(trained), trained)


@pytest.fixture(scope='module')
def adapted(recipe, trained, run):
  """A config and a model: the trained run, or with changes, one whose adapter is random and large enough to matter."""

  @functools.cache
  def make(*changes):
    if not changes:
      return config_lib.load(trained), run
    config = config_lib.recipe(recipe)
    config.update_from_flattened_dict(dict(changes))
    built = build.setup(config)
    variables = build.variables(built, sharding.make_mesh(devices=jax.devices()[:1]), seed=0)
    draw = lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)
    variables['params'] = jax.tree.map(draw, variables['params'])
    tokenizer = build.tokenizer(config, built)
    return config, build.Loaded(built.model, variables, tokenizer, built.directory, {'source': 'test'})

  return make


@pytest.fixture(scope='module')
def exported(trained, qalora, tmp_path_factory):
  directory = tmp_path_factory.mktemp('exported') / 'model'
  qalora('export', trained, f'--output={directory}')
  return directory


def offsets(change):
  """The right merge with every change of an offset, d, replaced by change(d)."""
  right = merge.merge

  def bend(before, after):
    if not quant.is_quantized(before):
      return after
    bent = before.offset + change(after.offset - before.offset)
    return after.replace(offset=jax.device_put(bent, after.offset.sharding))

  return lambda frozen, params: jax.tree.map(bend, frozen, right(frozen, params), is_leaf=quant.is_quantized)


def test_a_written_run_is_the_merged_run(run, exported):
  """Bit for bit: codes, scales and dense weights are those of the base, offsets those of the merge."""
  frozen, params = run.variables['frozen'], run.variables['params']
  written = packed.load(exported, run.model.config)
  small_llama.same(written, jax.tree.map(np.asarray, merge.merge(frozen, params)))
  for before, after in zip(quant.matrices(frozen), quant.matrices(written), strict=True):
    for one, two in zip((*before.planes, before.scale), (*after.planes, after.scale), strict=True):
      np.testing.assert_array_equal(one, two)
    assert float(np.abs(before.offset - after.offset).max()) > 0


def test_a_written_run_scores_and_says_what_the_run_does(trained, exported, qalora, tmp_path):
  # The adapted model adds the offsets inside its program, where XLA may fuse a multiplication with an addition and
  # round once instead of twice; so scores agree within float32's rounding and not bit for bit.
  here = qalora('evaluate', tmp_path, f'--model={trained}')[0]
  there = qalora('evaluate', tmp_path, f'--model={exported}')[0]
  assert there['nats_per_token'] == pytest.approx(here['nats_per_token'], rel=1e-6)
  assert there['tokens'] == here['tokens']
  assert there['bits_per_weight'] == 8
  assert qalora('generate', tmp_path, f'--model={exported}', '--prompt=the dog', 'generate.max_tokens=8')


def test_a_written_run_can_be_trained_on(trained, exported, qalora, tmp_path):
  qalora('train', tmp_path, f'model.source={exported}', 'base.method=stored', 'train.steps=2')
  first = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[0])
  begun = json.loads((trained / 'metrics.jsonl').read_text().splitlines()[0])
  assert first['loss'] < begun['loss'] - 0.1


def test_the_manifest_says_where_it_comes_from(trained, exported):
  found = packed.manifest(exported)['provenance']
  assert (found['workdir'], found['step'], found['merged']) == (str(trained), 8, True)
  assert found['difference'] <= found['tolerance']
  assert found['adapter']['rank'] == 4


@pytest.mark.parametrize('changes', [(), LORA, FULL])
def test_a_dense_directory_says_the_same_elsewhere(adapted, tmp_path, changes):
  config, loaded = adapted(*changes)
  command.export(loaded, config, tmp_path / 'hf', format='hf')
  small_llama.agrees_elsewhere(tmp_path / 'hf', loaded.model, loaded.variables, loaded.model.config.vocab_size)


@pytest.mark.parametrize(
  'changes, message',
  [
    (LORA, '1 quantized weights carry a LoRA adapter.*--format=hf'),
    (FULL, 'nothing in this model is quantized; write it with --format=hf'),
  ],
)
def test_what_a_quantized_directory_cannot_hold_is_refused(adapted, tmp_path, changes, message):
  config, loaded = adapted(*changes)
  with pytest.raises(ValueError, match=message):
    command.export(loaded, config, tmp_path / 'out', format='qalora')
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  'change',
  [
    lambda d: -d,
    lambda d: 2 * d,
    lambda d: 0 * d,
    lambda d: d / 16,
    lambda d: 1.001 * d,
    lambda d: d + jnp.nan,
    lambda d: jnp.where(d == d.max(), jnp.nan, d),
  ],
  ids=['sign', 'doubled', 'forgotten', 'mean for sum', 'a thousandth', 'nan', 'one nan'],
)
def test_a_wrong_merge_is_not_written(adapted, tmp_path, monkeypatch, change):
  config, loaded = adapted()
  monkeypatch.setattr(merge, 'merge', offsets(change))
  with pytest.raises(ValueError, match='not written: merged against adapted logits'):
    command.export(loaded, config, tmp_path / 'out', format='qalora')
  assert list(tmp_path.iterdir()) == []


def test_the_tolerance_is_rounding_and_the_effect_is_not(run):
  frozen, params = run.variables['frozen'], run.variables['params']
  found = merge.check(run.model, frozen, params, merge.merge(frozen, params))
  assert found.holds
  assert found.effect > 0.1 and found.tolerance < 1e-4 * found.effect


def test_what_the_recipes_of_7b_say_runs_small(adapted, qalora, tmp_path):
  """bfloat16, full remat, accumulation, padded rows: trained, written, read, and the check as sharp as in float32."""
  half = ('model.dtype=bfloat16', 'model.frozen_dtype=bfloat16')
  rows = ('train.batch=16', 'train.accumulation=2', 'data.packing=false', 'train.steps=6', 'adapter.dropout=0')
  qalora('train', tmp_path / 'run', *half, *rows, 'model.remat=full', 'train.checkpoint_every=6')
  lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  losses = [line['loss'] for line in lines if 'loss' in line]
  assert losses[-1] < losses[0] - 0.05
  adapter = ('adapter.dropout=0',)
  qalora('export', tmp_path / 'run', f'--output={tmp_path / "model"}', *half, *adapter)
  here, there = (
    qalora('evaluate', tmp_path / 'scores', f'--model={tmp_path / name}', *half)[0]['nats_per_token']
    for name in ('run', 'model')
  )
  # One rounding to bfloat16 may fall the other way where the offsets differ by float32's last bit.
  assert there == pytest.approx(here, rel=2**-9)
  config, loaded = adapted(('model.frozen_dtype', 'bfloat16'))
  frozen, params = loaded.variables['frozen'], loaded.variables['params']
  found = merge.check(loaded.model, frozen, params, merge.merge(frozen, params))
  assert found.holds and found.tolerance < 1e-3 * found.effect


@pytest.mark.parametrize(
  'words, message',
  [
    (['--format=gguff'], '--format=gguff: no such format; there are'),
    (['--output={source}'], 'exists and is not empty'),
    (['--dense', '--format=mlx'], '--dense is for --format=gguf'),
    (['--dtype=bfloat16', '--format=mlx'], 'in a mlx directory is stored in float32 or float16'),
    (['--convention=other', '--format=peft'], '--convention=other: it is one of peft, released'),
    (['--model=/nowhere/model'], 'no directory and no hub id'),
  ],
)
def test_what_cannot_be_written_is_refused(trained, source, qalora, words, message):
  before = sorted(source.iterdir()), sorted(trained.iterdir())
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    qalora('export', trained, *(word.format(source=source) for word in words))
  assert (sorted(source.iterdir()), sorted(trained.iterdir())) == before
