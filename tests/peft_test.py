"""PEFT's directories: an adapter that is written, read and trained on is the same; three conventions of QA-LoRA."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import peft
from qalora_jax import sharding
from qalora_jax.export import command
from qalora_jax.quant import qtensor

TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6) + 2


def opened(recipe, **changes):
  """(config, model) of the recipe with an adapter that matters."""
  config = config_lib.recipe(recipe)
  config.adapter.dropout = 0.0
  config.update_from_flattened_dict({key.replace('__', '.'): value for key, value in changes.items()})
  config = build.adopted(config, None)
  built = build.setup(config)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  drawn = build.variables(built, mesh, seed=0, adapter_from=config.adapter.source)
  if not config.adapter.source:
    draw = lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)
    drawn['params'] = jax.tree.map(draw, drawn['params'])
  return config, build.Loaded(
    built.model, drawn, build.tokenizer(config, built), built.directory, {'source': config.model.source}
  )


def logits(loaded):
  return jax.jit(loaded.model.apply)(loaded.variables, TOKENS)


CASES = [
  dict(kind='lora', targets='all'),
  dict(kind='lora', targets='layers/1/.*/(q|v)_proj'),
  dict(kind='qalora', targets='all'),
  dict(kind='qalora', targets='mlp', pool='mean'),
]


@pytest.mark.parametrize('convention', peft.CONVENTIONS)
@pytest.mark.parametrize('case', CASES)
def test_a_written_adapter_is_read_again(recipe, tmp_path, case, convention):
  keys = {f'adapter__{key}': value for key, value in case.items()}
  _, loaded = opened(recipe, **keys)
  command.export_adapter(loaded, tmp_path / 'adapter', convention)
  config, again = opened(recipe, adapter__source=str(tmp_path / 'adapter'), adapter__kind='lora')
  assert (config.adapter.kind, config.adapter.rank) == (case['kind'], 4)
  one, two = logits(loaded), logits(again)
  # B was scaled once: each of its entries by one rounding, as each float32 sum that they enter.
  tolerance = 1e-5 * float(jnp.abs(one).max())
  without = jax.jit(loaded.model.apply)({'frozen': loaded.variables['frozen']}, TOKENS)
  assert float(jnp.abs(one - without).max()) > 100 * tolerance
  np.testing.assert_allclose(one, two, rtol=0, atol=tolerance)


@pytest.mark.parametrize('convention', peft.CONVENTIONS)
@pytest.mark.parametrize('pool', ['sum', 'mean'])
def test_conventions_of_qalora_are_what_their_authors_compute(recipe, tmp_path, pool, convention):
  """y of one projection by the formula of each, from the file alone, on a random x."""
  _, loaded = opened(recipe, adapter__targets='down_proj', adapter__pool=pool, adapter__alpha=8.0)
  command.export_adapter(loaded, tmp_path / 'adapter', convention)
  stated = json.loads((tmp_path / 'adapter' / peft.CONFIG).read_text())
  weights = safetensors_numpy.load_file(tmp_path / 'adapter' / peft.WEIGHTS)
  prefix = 'base_model.model.model.layers.1.mlp.down_proj'
  a, b = weights[f'{prefix}.lora_A.weight'], weights[f'{prefix}.lora_B.weight']
  x = np.random.default_rng(0).normal(size=(3, 64))
  pooled = x.reshape(3, 4, 16).mean(-1) * (4 if stated.get('use_qalora') else 1)
  theirs = stated['lora_alpha'] / stated['r'] * pooled @ a.T @ b.T
  assert (convention == 'peft') == bool(stated.get('use_qalora'))
  assert stated.get('qalora_group_size') == (16 if convention == 'peft' else None)

  single = lambda tree: jax.tree.map(lambda leaf: leaf[1], tree)
  frozen, params = (loaded.variables[name]['layers']['mlp']['down_proj'] for name in ('frozen', 'params'))
  q = single(frozen['kernel'])
  ours = x @ np.asarray(qtensor.offsets(single(params['adapter']).merge(q)) - qtensor.offsets(q)).repeat(16, 0)
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_lora_is_what_peft_computes(recipe, tmp_path):
  _, loaded = opened(recipe, adapter__kind='lora', adapter__targets='q_proj')
  command.export_adapter(loaded, tmp_path / 'adapter', 'peft')
  weights = safetensors_numpy.load_file(tmp_path / 'adapter' / peft.WEIGHTS)
  node = loaded.variables['params']['layers']['attention']['q_proj']['adapter']
  name = 'base_model.model.model.layers.0.self_attn.q_proj'
  np.testing.assert_array_equal(weights[f'{name}.lora_A.weight'].T, node.a[0])
  np.testing.assert_array_equal(weights[f'{name}.lora_B.weight'].T, node.b[0])


def test_rank_stabilized_scaling_is_read(recipe, tmp_path):
  config, loaded = opened(recipe, adapter__kind='lora')
  command.export_adapter(loaded, tmp_path / 'adapter', 'peft')
  file = tmp_path / 'adapter' / peft.CONFIG
  file.write_text(json.dumps(json.loads(file.read_text()) | {'use_rslora': True}))
  # alpha / sqrt(r) of it is alpha * sqrt(r) / r of ours.
  assert peft.describe(tmp_path / 'adapter', loaded.model.config)['alpha'] == config.adapter.alpha * 4**0.5


def test_training_goes_on_from_a_peft_adapter(recipe, qalora, trained, tmp_path):
  qalora('export', trained, '--format=peft', f'--output={tmp_path / "adapter"}')
  words = (f'adapter.source={tmp_path / "adapter"}', 'adapter.dropout=0.0', 'train.steps=2')
  qalora('train', tmp_path / 'run', *words)
  first = json.loads((tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[0])
  begun = json.loads((trained / 'metrics.jsonl').read_text().splitlines()[0])
  assert first['loss'] < begun['loss'] - 0.1
  # The same words go on in the same workdir, whose config holds what the adapter said of itself; it is needed no more.
  shutil.rmtree(tmp_path / 'adapter')
  qalora('train', tmp_path / 'run', *words)
  assert config_lib.load(tmp_path / 'run').adapter.pool == 'mean'


def damage(directory, change):
  file = directory / peft.CONFIG
  if isinstance(change, dict):
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return
  weights = safetensors_numpy.load_file(directory / peft.WEIGHTS)
  name = next(name for name in weights if 'lora_B' in name)
  if change == 'missing':
    del weights[name]
  elif change == 'nan':
    weights[name] = weights[name] * np.nan
  elif change == 'other':
    weights['base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector'] = weights[name]
  elif change == 'shape':
    weights[name] = weights[name][:-1]
  elif change == 'module':
    weights = {key.replace('q_proj', 'qkv_proj'): value for key, value in weights.items()}
  safetensors_numpy.save_file(weights, directory / peft.WEIGHTS)


@pytest.mark.parametrize(
  'change, message',
  [
    ({'use_dora': True}, 'use_dora = True; only False'),
    ({'peft_type': 'IA3'}, "peft_type = 'IA3'"),
    ({'modules_to_save': ['lm_head']}, 'modules_to_save'),
    ({'rank_pattern': {'q_proj': 2}}, 'rank_pattern'),
    ({'r': 8}, 'has rank 4, adapter_config.json says r = 8'),
    ({'lora_alpha': None}, 'lora_alpha = None'),
    ({'r': 4.0}, 'r = 4.0'),
    ('missing', 'has no lora_A or no lora_B'),
    ('nan', 'NaN or infinite'),
    ('other', 'lora_magnitude_vector is no weight of a LoRA'),
    ('shape', 'and the base has place for'),
    ('module', 'adapts model.layers.0.self_attn.qkv_proj'),
  ],
)
def test_an_adapter_that_is_not_understood_is_refused(recipe, tmp_path, change, message):
  _, loaded = opened(recipe, adapter__kind='lora', adapter__targets='q_proj')
  command.export_adapter(loaded, tmp_path / 'adapter', 'peft')
  damage(tmp_path / 'adapter', change)
  with pytest.raises(ValueError, match=message):
    opened(recipe, adapter__source=str(tmp_path / 'adapter'))


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(base__group=32), 'QA-LoRA needs the groups that it was trained on'),
    (dict(model__source='scratch'), 'adapter.source is an adapter of a trained model'),
    (dict(adapter__init='pissa'), 'adapter.source = .* is an adapter to begin with'),
  ],
)
def test_an_adapter_of_another_base_is_refused(recipe, qalora, tmp_path, changes, message):
  _, loaded = opened(recipe, adapter__targets='mlp')
  command.export_adapter(loaded, tmp_path / 'adapter', 'peft')
  words = [f'{key.replace("__", ".")}={value}' for key, value in changes.items()]
  with pytest.raises(ValueError, match=message):
    qalora('train', tmp_path / 'run', f'adapter.source={tmp_path / "adapter"}', *words)


def test_what_peft_cannot_say_is_refused(recipe, tmp_path):
  _, loaded = opened(recipe, base__rules='down_proj: group=32')
  with pytest.raises(ValueError, match='QA-LoRA on groups of 16, 32: PEFT has one'):
    command.export_adapter(loaded, tmp_path / 'adapter', 'peft')
  assert not (tmp_path / 'adapter').exists()
  command.export_adapter(loaded, tmp_path / 'adapter', 'released')
  _, full = opened(recipe, adapter__kind='none')
  with pytest.raises(ValueError, match='there is no adapter to write'):
    command.export_adapter(full, tmp_path / 'none', 'peft')


def test_a_pickled_adapter_is_not_read(tmp_path, recipe):
  _, loaded = opened(recipe, adapter__kind='lora', adapter__targets='q_proj')
  command.export_adapter(loaded, tmp_path / 'adapter', 'peft')
  (tmp_path / 'adapter' / peft.WEIGHTS).rename(tmp_path / 'adapter' / 'adapter_model.bin')
  with pytest.raises(FileNotFoundError, match='a pickled adapter_model.bin is not read'):
    peft.describe(tmp_path / 'adapter', loaded.model.config)
