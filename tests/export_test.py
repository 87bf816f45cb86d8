"""`qalora export`: what is written is the adapted model, here and elsewhere, or is not written."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llama

from qalora_jax import adapters
from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import packed
from qalora_jax import quant
from qalora_jax import sharding
from qalora_jax.export import command
from qalora_jax.export import merge


@pytest.fixture(scope='module')
def adapted(recipe):
  """A model with an adapter of random numbers as training would leave them: large enough to change what is said."""

  def make(**changes):
    config = config_lib.recipe(recipe)
    config.update_from_flattened_dict({key.replace('__', '.'): value for key, value in changes.items()})
    built = build.setup(config)
    variables = build.variables(built, sharding.make_mesh(devices=jax.devices()[:1]), seed=0)
    draw = lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)
    variables['params'] = jax.tree.map(draw, variables['params'])
    tokenizer = build.tokenizer(config, built.directory)
    return config, build.Loaded(built.model, variables, tokenizer, built.directory, {'source': 'test'})

  return make


@pytest.fixture(scope='module')
def random_qalora(adapted):
  return adapted()


@pytest.fixture(scope='module')
def run(trained):
  return build.load_run(config_lib.load(trained), trained)


@pytest.fixture(scope='module')
def exported(trained, qalora, tmp_path_factory):
  directory = tmp_path_factory.mktemp('exported') / 'model'
  qalora('export', trained, f'--output={directory}')
  return directory


def wrong(change):
  """`adapters.merge` whose change of the offsets, d, is change(d)."""
  right = adapters.merge

  def merged(frozen, params):
    def bend(before, after):
      if not quant.is_quantized(before):
        return after
      return after.replace(offset=before.offset + change(after.offset - before.offset))

    return jax.tree.map(bend, frozen, right(frozen, params), is_leaf=quant.is_quantized)

  return merged


def test_a_written_run_is_the_merged_run(run, exported):
  """Bit for bit: codes, scales and dense weights are those of the base, offsets those of the merge."""
  frozen, params = run.variables['frozen'], run.variables['params']
  written = packed.load(exported, run.model.config)
  small_llama.same(written, jax.tree.map(np.asarray, merge.merge(frozen, params)))
  for before, after in zip(quant.matrices(frozen), quant.matrices(written), strict=True):
    for one, two in zip((*before.planes, before.scale), (*after.planes, after.scale), strict=True):
      np.testing.assert_array_equal(one, two)
    assert float(jnp.abs(before.offset - after.offset).max()) > 0


def test_a_written_run_scores_and_says_what_the_run_does(trained, exported, qalora, tmp_path):
  # The adapted model adds the offsets inside its program, where XLA may fuse a multiplication with an addition and
  # round once instead of twice; so scores agree within float32's rounding and not bit for bit.
  here = qalora('evaluate', tmp_path, f'--model={trained}')[0]
  there = qalora('evaluate', tmp_path, f'--model={exported}')[0]
  assert there['nats_per_token'] == pytest.approx(here['nats_per_token'], rel=1e-6)
  assert there['tokens'] == here['tokens']
  assert there['bits_per_weight'] == 8
  prompt = ('--prompt=the dog', 'generate.max_tokens=8')
  assert qalora('generate', tmp_path, f'--model={exported}', *prompt) == qalora(
    'generate', tmp_path, f'--model={trained}', *prompt
  )


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


@pytest.mark.parametrize('kind, bits', [('qalora', 2), ('lora', 3), ('lora', 0)])
def test_a_dense_directory_says_the_same_elsewhere(adapted, tmp_path, kind, bits):
  base = {'base__bits': bits} if bits else {'base__method': 'stored'}
  config, loaded = adapted(adapter__kind=kind, **base)
  command.export(loaded, config, tmp_path / 'hf', format='hf')
  small_llama.agrees_elsewhere(tmp_path / 'hf', loaded.model, loaded.variables, loaded.model.config.vocab_size)


def test_a_run_of_every_weight_is_written_as_it_is(adapted, tmp_path):
  config, loaded = adapted(adapter__kind='full', base__method='stored')
  with pytest.raises(ValueError, match='nothing in this model is quantized; write it with --format=hf'):
    command.export(loaded, config, tmp_path / 'out', format='qalora')
  command.export(loaded, config, tmp_path / 'out', format='hf')
  small_llama.agrees_elsewhere(tmp_path / 'out', loaded.model, loaded.variables, loaded.model.config.vocab_size)


def test_lora_on_codes_is_refused_where_it_would_be_lost(adapted, tmp_path):
  config, loaded = adapted(adapter__kind='lora', base__bits=3)
  with pytest.raises(ValueError, match='14 quantized weights carry a LoRA adapter|7 quantized weights carry a LoRA'):
    command.export(loaded, config, tmp_path / 'out', format='qalora')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  'change', [lambda d: -d, lambda d: 2 * d, lambda d: 0 * d, lambda d: d / 16, lambda d: 1.001 * d, lambda d: d + jnp.nan]
)
def test_a_wrong_merge_is_not_written(random_qalora, tmp_path, monkeypatch, change):
  """Sign, size, no merge, the mean for the sum, one part in a thousand, and NaN."""
  config, loaded = random_qalora
  monkeypatch.setattr(adapters, 'merge', wrong(change))
  with pytest.raises(ValueError, match='not written: merged against adapted logits'):
    command.export(loaded, config, tmp_path / 'out', format='qalora')
  assert list(tmp_path.iterdir()) == []


def test_the_tolerance_is_rounding_and_the_effect_is_not(random_qalora):
  frozen, params = (random_qalora[1].variables[name] for name in ('frozen', 'params'))
  found = merge.check(random_qalora[1].model, frozen, params, merge.merge(frozen, params))
  assert found.holds
  assert found.effect > 0.1 and found.tolerance < 1e-4 * found.effect


def test_a_bfloat16_run_is_written_without_loss(adapted, tmp_path):
  config, loaded = adapted(model__dtype='bfloat16', model__frozen_dtype='bfloat16')
  command.export(loaded, config, tmp_path / 'out', format='qalora')
  frozen, params = loaded.variables['frozen'], loaded.variables['params']
  written = packed.load(tmp_path / 'out', loaded.model.config)
  small_llama.same(written, jax.tree.map(np.asarray, merge.merge(frozen, params)))


@pytest.mark.parametrize(
  'words, message',
  [
    (['--format=gguff'], '--format=gguff: no such format; there are'),
    (['--output={source}'], 'exists and is not empty'),
    (['--model=/nowhere/model'], 'no directory and no hub id'),
  ],
)
def test_what_cannot_be_written_is_refused(trained, source, qalora, words, message):
  before = sorted(source.iterdir()), sorted(trained.iterdir())
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    qalora('export', trained, *(word.format(source=source) for word in words))
  assert (sorted(source.iterdir()), sorted(trained.iterdir())) == before
