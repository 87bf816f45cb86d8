"""`qalora plan`: what it counts is what a step takes, and what it proposes fits."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import pytest

from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import plan as plan_lib
from qalora_jax import program as program_lib
from qalora_jax import sharding
from qalora_jax import topologies

LAYERS, WIDTH, MLP, HEADS, VOCABULARY = 2, 64, 128, 4, 96
needs_libtpu = pytest.mark.skipif(
  not topologies.installed('tpu'), reason="libtpu is not installed (pip install 'qalora_jax[aot-tpu]')"
)


def config_of(**overrides):
  """QA-LoRA at 4 bits on a tiny LLaMA; dots in keys are written as two underscores."""
  config = config_lib.override(
    config_lib.recipe(config_lib.ROOT / 'configs' / 'qalora_llama_7b.py'),
    {
      'model.architecture.num_hidden_layers': LAYERS,
      'model.architecture.hidden_size': WIDTH,
      'model.architecture.intermediate_size': MLP,
      'model.architecture.num_attention_heads': HEADS,
      'model.architecture.num_key_value_heads': HEADS,
      'model.architecture.vocab_size': VOCABULARY,
      'model.dtype': 'float32',
      'adapter.rank': 4,
      'train.batch': 8,
      'train.accumulation': 1,
      'data.window': 32,
    },
  )
  return config_lib.override(config, {key.replace('__', '.'): value for key, value in overrides.items()})


def test_counted_flops_are_the_formula():
  """Every weight in a matrix takes 2 FLOPs a token forward, 2 for the gradient in x, 2 for its own where it trains;
  attention 4 T D a token and layer forward (all T keys) and twice that backward.
  """
  config = config_of(
    adapter__kind='full', base__method='stored', model__remat='none', model__source='scratch', data__window=32
  )
  found = plan_lib.plan(config, topologies.find('cpu'))
  tokens = 8 * 32
  matrices = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * MLP) + WIDTH * VOCABULARY
  attention = 12 * 32 * WIDTH * LAYERS
  # Nothing has a gradient in the embedded tokens but the embedding's own, which is no product.
  assert found.work.flops == tokens * (6 * matrices + attention)


@pytest.mark.parametrize(
  'function, count',
  [
    (lambda x: x @ x, 1),
    (lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=5)[0], 5),
    (lambda x: jax.lax.fori_loop(0, 7, lambda _, c: c @ x, x), 7),
    (lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x), 2),
    (lambda x: jax.jit(jax.checkpoint(lambda y: y @ y))(x), 1),
  ],
)
def test_products_are_counted_where_they_stand(function, count):
  """Within loops as often as they turn, in the dearest branch, behind jit and checkpoint."""
  program = jax.make_jaxpr(function)(jnp.ones((16, 16)))
  assert plan_lib._products(program.jaxpr) == count * 2 * 16**3


def test_memory_by_kind_is_that_of_the_arrays():
  """On a mesh of eight: what is planned for a device are the bytes of its shards, and the compiler adds the rest."""
  config = config_of(sharding__data=2, sharding__fsdp=2, sharding__tensor=2)
  found = plan_lib.plan(config, topologies.find('cpu:8'))
  mesh = build.make_mesh(config)
  program = program_lib.make(config, build.abstract_setup(config), mesh)
  real = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), program.arguments)
  of_first = lambda tree: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
  memory = found.memory
  assert memory.weights == of_first(real[1])
  assert memory.adapter == of_first(real[0].params)
  assert memory.optimizer == of_first((real[0].step, real[0].opt_state))
  assert memory.batch == of_first(real[2])
  stats = program.compiled('cpu').memory_analysis()
  held = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes
  assert memory.total == held - stats.alias_size_in_bytes + stats.generated_code_size_in_bytes
  assert min(dataclasses.astuple(memory)) >= 0
  assert found.sent and found.work.received == sum(found.sent.values())
  assert found.fits is None and found.largest == {}


def test_moments_on_the_host_are_no_devices():
  """What is offloaded is counted once, where it lies."""
  config = config_of(optim__offload=True)
  found, plain = (plan_lib.plan(each, topologies.find('cpu')) for each in (config, config_of()))
  assert found.memory.padding == plain.memory.padding == 0
  assert found.memory.host > 0 and found.memory.optimizer + found.memory.host == plain.memory.optimizer


def test_devices_share_the_products():
  """Those that stand within a shard_map too: eight devices make together what one makes."""
  one, eight = config_of(), config_of(sharding__data=2, sharding__fsdp=2, sharding__tensor=2)
  whole = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  counted = plan_lib._flops(program_lib.make(eight, build.abstract_setup(eight), whole))
  assert counted == plan_lib._flops(_program(one))


def test_a_step_has_all_its_micro_batches():
  """Accumulation repeats the products and keeps the rows that a device sees at a time."""
  once, twice = config_of(train__batch=8), config_of(train__batch=16, train__accumulation=2)
  found = [plan_lib.plan(config, topologies.find('cpu')) for config in (once, twice)]
  assert [plan.rows for plan in found] == [8, 8] and [plan.tokens for plan in found] == [8 * 32, 16 * 32]
  assert found[1].work.flops == 2 * found[0].work.flops


def test_shapes_that_are_not_known_yet_are_not_planned():
  with pytest.raises(ValueError, match='base.budget = 3.0: .* run `qalora quantize`'):
    plan_lib.plan(config_of(base__budget=3.0), topologies.find('cpu'))
  with pytest.raises(ValueError, match="adapter.source = 'somewhere': which adapter that is"):
    plan_lib.plan(config_of(adapter__source='somewhere'), topologies.find('cpu'))


def a_plan(total, capacity):
  """A plan of which only the sum and the capacity count."""
  chip = dataclasses.replace(topologies.CHIPS['v5e'], memory=capacity)
  memory = plan_lib.Memory(100, 0, 0, 0, 0, 0, total - 100, 0, 0)
  return plan_lib.Plan(topologies.Topology(chip, (1,)), {}, 1, 1, 1, 1, memory, plan_lib.Work(0, 0, 0), {})


@pytest.mark.parametrize('start, unit', [(1, 1), (16, 1), (640, 128), (60, 128), (100000, 128)])
@pytest.mark.parametrize(
  'held, near',
  [(lambda n: 100 + 7 * n, 1.0), (lambda n: 100 + n // 40, 0.999), (lambda n: 100 + n + n * n // 50, 0.25)],
)
def test_the_largest_size_is_one_that_fits(held, near, start, unit):
  """What is returned was tried and fits; where memory grows along a line, nothing larger would."""
  capacity, tried = 5000, {start: held(start)}

  def at(size):
    tried[size] = held(size)
    return a_plan(tried[size], capacity)

  found = plan_lib._largest(a_plan(held(start), capacity), start, unit, at, lambda: None)
  assert tried[found] <= capacity and len(tried) <= plan_lib._TRIES
  best = max(n for n in range(unit, 10**6, unit) if held(n) <= capacity)
  assert found >= near * best - unit


def test_a_topology_that_cannot_be_is_refused_by_name():
  for text, message in {
    'x9:4': "no chip 'x9'; it is one of v5e, v5p, v6e, h100, cpu",
    'v5e:': 'after the colon stand sizes',
    'v5e:axb': 'after the colon stand sizes',
    'cpu:2x2': 'cpu takes one number, of all its devices: cpu:4',
  }.items():
    with pytest.raises(ValueError, match=message):
      topologies.find(text)
  with pytest.raises(ValueError, match='this process has 8 CPU devices'):
    topologies.find('cpu:4096').devices()
  with pytest.raises(ValueError, match='no --topology; for example'):
    plan_lib.main([f'--config={config_lib.ROOT}/configs/qalora_llama_7b.py'])
  if not topologies.installed('cuda'):
    with pytest.raises(ValueError, match=r"h100:8: compiling .* pip install 'qalora_jax\[aot-gpu\]'"):
      topologies.find('h100:8').devices()


def test_a_model_that_nobody_described_is_not_planned():
  """A hub id alone would be planned with the default architecture, which is another model's."""
  words = ['--config.model.source=org/name', '--config.base.method=affine', '--topology=cpu']
  with pytest.raises(ValueError, match='org/name.* is no directory here, and config.model.architecture is the default'):
    plan_lib.main([f'--config={config_lib.ROOT}/configs/base.py', *words])


def test_the_command_prints_and_writes(tmp_path, source, recipe, capsys):
  """A directory that is here is planned as it is; what is printed is also JSON."""
  plan_lib.main([f'--config={recipe}', '--topology=cpu:8', f'--out={tmp_path}/plan.json'])
  printed = capsys.readouterr().out
  assert 'cpu:8: 8 device(s), data 8' in printed and 'frozen weights' in printed and 'all-reduce' in printed
  row = json.loads((tmp_path / 'plan.json').read_text())['rows'][0]
  assert row['mesh'] == 'data=8' and row['fits'] is None and row['total'] > row['weights'] > 0


@needs_libtpu
def test_a_chip_that_is_not_here():
  """Compiled for a v5e, kernels and all: it fits, its limits are stated, and the largest sizes fit too."""
  config = config_of(model__dtype='bfloat16')
  found = plan_lib.plan(config, topologies.find('v5e'))
  assert found.fits and found.memory.padding >= 0
  assert set(found.work.seconds(found.topology.chip)) == {plan_lib.FLOPS, plan_lib.MEMORY}
  quick = plan_lib.plan(config, topologies.find('v5e'), quick=True)
  assert quick.memory.weights == found.memory.weights and quick.work == found.work


@needs_libtpu
def test_what_a_chip_cannot_hold():
  """By the arguments alone, without a compilation; and as the compiler says, to the last 5 MiB that it prints."""
  config = config_lib.override(
    config_lib.recipe(config_lib.ROOT / 'configs' / 'qalora_llama_65b.py'), {'train.accumulation': 1, 'train.batch': 1}
  )
  found = plan_lib.plan(config, topologies.find('v5e'))
  assert not found.fits and found.memory.activations == 0
  wide = jax.ShapeDtypeStruct((65536, 65536), jnp.bfloat16)
  with jax.set_mesh(topologies.chip('v5e')), pytest.raises(topologies.Overfull) as refused:
    topologies.compiled(lambda x, y: jnp.sin(x @ y) @ y, wide, wide)
  # Two arguments, what is between them, the result: 8 GiB each, and the result may reuse nothing.
  assert 24 * 2**30 <= refused.value.needed <= 33 * 2**30


def test_the_floor_of_bytes_counts_every_pass():
  """Frozen weights are read once a pass: forward, backward, and again where the backward pass recomputes."""
  weights = lambda remat: plan_lib._moved(config := config_of(model__remat=remat), _model(config), _program(config), 0)
  frozen = {name: leaf for name, leaf in _program(config_of()).frozen.items() if name != 'embedding'}
  size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(frozen))
  trained = sum(leaf.size * 4 for leaf in jax.tree.leaves(_program(config_of()).state.params))
  assert weights('full') - weights('none') == size + trained
  assert weights('dots') == weights('none')


@functools.cache
def _cpu():
  return sharding.make_mesh(devices=jax.devices()[:1])


def _program(config):
  return program_lib.make(config, build.abstract_setup(config), _cpu())


def _model(config):
  return build.abstract_setup(config).model.config
