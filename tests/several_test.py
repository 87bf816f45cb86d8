"""Several adapters: beside each other in a batch, and added up; the sum merges as exactly as one."""

import json
import shutil

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qalora_jax import adapted
from qalora_jax import adapters
from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import packed
from qalora_jax import peft
from qalora_jax import sharding
from qalora_jax.adapters import several
from qalora_jax.export import merge
from qalora_jax.quant import qtensor

TOKENS = jnp.tile(jnp.arange(6, dtype=jnp.int32)[None] + 2, (4, 1))
# Of several ranks, targets and conventions.
CHOICES = [
  {'adapter.rank': 4},
  {'adapter.rank': 2, 'adapter.targets': 'mlp', 'adapter.alpha': 4.0},
  {'adapter.rank': 3, 'adapter.pool': 'mean', 'adapter.targets': 'attention', 'adapter.alpha': 99.0},
]


@pytest.fixture(scope='module', params=['qalora', 'lora'])
def three(request, recipe):
  """(model, frozen, params of three adapters of one kind)."""
  trees = []
  for seed, choices in enumerate(CHOICES):
    config = config_lib.recipe(recipe)
    config.update_from_flattened_dict({**choices, 'adapter.kind': request.param, 'adapter.dropout': 0.0})
    built = build.setup(config)
    drawn = build.variables(built, sharding.make_mesh(devices=jax.devices()[:1]), seed)
    draw = lambda leaf, seed=seed: leaf + 0.05 * jax.random.normal(jax.random.key(leaf.size + seed), leaf.shape)
    trees.append(jax.tree.map(draw, drawn['params']))
  return built.model, drawn['frozen'], trees


def test_every_row_uses_its_own_adapter(three):
  model, frozen, trees = three
  logits = lambda params: jax.jit(model.apply)({'frozen': frozen, 'params': params}, TOKENS)
  alone = [logits({}), *map(logits, trees)]
  together = logits(several.choose(several.stack(trees, frozen), [2, 0, 3, 1]))
  scale = float(jnp.abs(alone[0]).max())
  for row, index in enumerate([2, 0, 3, 1]):
    # QA-LoRA alone is folded into the offsets, here it stands beside them: float32 sums in another order.
    np.testing.assert_allclose(together[row], alone[index][row], rtol=0, atol=1e-5 * scale)
    for other in {0, 1, 2, 3} - {index}:
      assert float(jnp.abs(together[row] - alone[other][row]).max()) > 1e-2 * scale


def test_a_sum_is_the_weighted_sum_of_the_changes(three):
  _, frozen, trees = three
  weights = (0.5, -2.0, 1.0)
  summed = merge.merge(frozen, several.add(trees, weights, frozen))
  singles = [merge.merge(frozen, tree) for tree in trees]

  def number(tree):
    leaf = tree['layers']['mlp']['up_proj']['kernel'], tree['layers']['attention']['q_proj']['kernel']
    of = lambda q: qtensor.dequantize(q) if isinstance(q, qtensor.QTensor) else q
    return [np.asarray(of(q), np.float64) for q in leaf]

  for at, base in enumerate(number(frozen)):
    changes = [number(single)[at] - base for single in singles]
    wanted = base + sum(weight * change for weight, change in zip(weights, changes, strict=True))
    size = np.abs(base) + sum(abs(weight) * np.abs(change) for weight, change in zip(weights, changes, strict=True))
    # Sums of at most 9 ranks and of the base, in float32.
    assert (np.abs(number(summed)[at] - wanted) <= 16 * np.finfo(np.float32).eps * size.max()).all()


def test_the_merged_sum_is_the_model_with_both(three):
  model, frozen, trees = three
  params = several.add(trees, (1.0, 0.5, -1.0), frozen)
  assert merge.check(model, frozen, params, merge.merge(frozen, params)).holds


def test_kinds_are_not_mixed_and_choices_are_not_merged(three):
  _, frozen, trees = three
  kind = 'LoRA' if isinstance(trees[0]['layers']['mlp']['up_proj']['adapter'], adapters.lora.LoRA) else 'QALoRA'
  other = adapters.qalora.QALoRA if kind == 'LoRA' else adapters.lora.LoRA
  is_leaf = adapters.is_adapter
  swapped = jax.tree.map(lambda node: other(a=node.a, b=node.b, alpha=1.0), trees[1], is_leaf=is_leaf)
  with pytest.raises(ValueError, match='LoRA and QA-LoRA adapters cannot be used together'):
    several.add([trees[0], swapped], [1.0, 1.0], frozen)
  with pytest.raises(ValueError, match='cannot be merged; add them up'):
    adapters.merge(frozen, several.stack(trees, frozen))
  with pytest.raises(ValueError, match='beside the same layers'):
    several.add([trees[0], {'layers_1': trees[1]['layers']}], [1.0, 1.0], frozen)


@pytest.fixture(scope='module')
def another(tmp_path_factory, qalora, trained):
  """A second run on the same base, with another seed and rank."""
  workdir = tmp_path_factory.mktemp('runs') / 'another'
  qalora('train', workdir, 'seed=1', 'adapter.rank=2', 'train.steps=4')
  return workdir


def test_requests_of_a_batch_name_their_adapter(trained, another, qalora, tmp_path):
  """What each says alone, from its own workdir."""
  asked = [
    {'prompt': 'the cat', 'adapter': 'ann'},
    {'prompt': 'the cat', 'adapter': 'bob'},
    {'prompt': 'the cat'},
    {'prompt': 'a bird', 'adapter': 'ann'},
  ]
  (tmp_path / 'asked.jsonl').write_text('\n'.join(map(json.dumps, asked)))
  words = (f'--adapters=ann: {trained}; bob: {another}', 'generate.max_tokens=8')
  made = qalora('generate', tmp_path, f'--prompts={tmp_path / "asked.jsonl"}', '--adapter=bob', *words)
  for record, run in zip(made, (trained, another, another, trained), strict=True):
    alone = qalora('generate', tmp_path, f'--model={run}', f'--prompt={record["prompt"]}', 'generate.max_tokens=8')
    assert record['text'] == alone
  assert qalora('generate', tmp_path, '--adapter=ann', '--prompt=the cat', *words) == made[0]['text']


def test_a_sum_of_runs_is_exported_as_one_model(trained, another, qalora, tmp_path):
  words = (f'--adapters={trained}*0.75 + {another}*0.5', f'--output={tmp_path / "model"}')
  qalora('export', tmp_path, *words)
  one, two = (build.load_run(config_lib.load(run), run) for run in (trained, another))
  frozen = one.variables['frozen']
  wanted = several.add([one.variables['params'], two.variables['params']], [0.75, 0.5], frozen)
  found = packed.load(tmp_path / 'model', one.model.config)
  jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.asarray, merge.merge(frozen, wanted)))
  row = qalora('evaluate', tmp_path / 'a', words[0])[0]
  again = qalora('evaluate', tmp_path / 'b', f'--model={tmp_path / "model"}')[0]
  assert row['nats_per_token'] == pytest.approx(again['nats_per_token'], rel=1e-6)


def test_a_sum_of_several_ranks_goes_to_peft(three, recipe, tmp_path):
  model, frozen, trees = three
  summed = several.add(trees, (1.0, 0.5, -1.0), frozen)
  peft.write(tmp_path / 'adapter', model.config, summed, base='base')
  choices = peft.describe(tmp_path / 'adapter', model.config)
  assert choices['rank'] == 7
  back = peft.load(tmp_path / 'adapter', model.config, nn.unbox(build.adapters_of(model, choices)))
  one, two = (jax.jit(model.apply)({'frozen': frozen, 'params': params}, TOKENS) for params in (summed, back))
  np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * float(jnp.abs(one).max()))


def test_an_adapter_of_some_layers_is_refused_beside_others(qalora, recipe, trained, tmp_path):
  qalora('train', tmp_path / 'some', 'adapter.targets=layers/1/', 'train.steps=1')
  with pytest.raises(ValueError, match='adapts some layers only'):
    qalora('generate', tmp_path, f'--adapters={trained} + {tmp_path / "some"}', '--prompt=the')


def test_an_adapter_of_peft_stands_beside_one_of_a_workdir(trained, another, qalora, tmp_path):
  qalora('export', tmp_path, f'--model={another}', '--format=peft', f'--output={tmp_path / "adapter"}')
  words = ('generate.max_tokens=8', '--prompt=the cat')
  text = qalora('generate', tmp_path, f'--adapters=a: {trained}; b: {tmp_path / "adapter"}', '--adapter=b', *words)
  assert text == qalora('generate', tmp_path, f'--model={another}', *words)


@pytest.mark.parametrize(
  'words, message',
  [
    (['--adapters= ;'], 'names no directory'),
    (['--adapters={run}; {run}'], 'has no name, or one that is taken'),
    (['--adapters=a: {run}; {run}'], 'several adapters need a name each'),
    (['--adapters=a: {run}; a: {run}'], 'has no name, or one that is taken'),
    (['--adapters={run}*x'], 'cannot read'),
    (['--adapters=/nowhere'], '/nowhere is no workdir with a checkpoint, and no directory of PEFT'),
    (['--adapters=a: {run}', '--adapter=c'], "there is no adapter 'c'; --adapters names a"),
    (['--adapter=c'], "there is no adapter 'c'; name some by --adapters"),
    (['--adapters={run}', '--model={run}'], 'has trained weights of its own'),
    (['--adapters={moved}'], 'the base weights are not those this adapter was trained on'),
  ],
)
def test_what_cannot_be_used_together_is_refused(trained, qalora, tmp_path, words, message):
  moved = tmp_path / 'moved'
  shutil.copytree(trained, moved)
  (moved / 'base.json').write_text('{"crc32": 1}\n')
  words = [word.format(run=trained, moved=moved) for word in words]
  with pytest.raises(ValueError, match=message):
    qalora('generate', tmp_path, '--prompt=the', *words)


def test_named_adapters_are_not_merged(trained, another, qalora, tmp_path):
  with pytest.raises(ValueError, match='named adapters are chosen from, not merged'):
    qalora('export', tmp_path, f'--adapters=a: {trained}; b: {another}', f'--output={tmp_path / "out"}')


def test_weights_are_read(trained):
  assert adapted.parse(f'{trained}') == {'': [(trained, 1.0)]}
  assert adapted.parse(f'a: {trained}*-0.5 + {trained}*2; b: {trained} ;') == {
    'a': [(trained, -0.5), (trained, 2.0)],
    'b': [(trained, 1.0)],
  }
