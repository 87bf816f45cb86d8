"""Every recipe builds, holds and survives the disk; the paper's recipes hold the paper's numbers."""

import functools
import pathlib

import jax
import pytest

from configs import llama
from configs import relatives
from configs import t5
from qalora_jax import adapters
from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import families
from qalora_jax import optim
from qalora_jax import quant
from qalora_jax import step
from qalora_jax.models import decoder

FOLDER = pathlib.Path(__file__).resolve().parents[1] / 'configs'
RECIPES = sorted(path for path in FOLDER.glob('*.py') if 'def get_config(' in path.read_text())
RELATIVES = [path for path in RECIPES if path.stem.partition('_')[2] in relatives.MODELS]
ANSWERERS = [path for path in RECIPES if path.stem.partition('_')[2] in t5.MODELS]
PAPER = [path for path in RECIPES if path.stem.partition('_')[2] in llama.MODELS]


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_a_recipe_builds_and_survives(path, tmp_path):
  config = config_lib.recipe(path)
  config_lib.check(config)
  config_lib.save(config, tmp_path)
  assert config_lib.load(tmp_path) == config


@pytest.mark.parametrize('path', [path for path in RECIPES if path.stem != 'base'], ids=lambda path: path.stem)
def test_a_recipe_is_short_and_says_what_to_expect(path):
  text = path.read_text()
  assert len(text.splitlines()) <= 40
  assert f'{path.stem}.py' in text
  assert 'Expected' in text


def test_the_paper_has_its_recipes():
  kinds = ('qalora', 'qlora', 'lora', 'full')
  assert {path.stem for path in PAPER} == {f'{kind}_{model}' for kind in kinds for model in llama.MODELS}


@pytest.mark.parametrize('path', PAPER, ids=lambda path: path.stem)
def test_settings_of_the_paper(path):
  """Section 4.1, and the released code for rank, alpha, dropout and lengths."""
  config = config_lib.recipe(path)
  kind, _, model = path.stem.partition('_')
  large = model in ('llama_33b', 'llama_65b')
  assert config.adapter.kind == {'qlora': 'lora'}.get(kind, kind)
  assert (config.adapter.rank, config.adapter.alpha, config.adapter.dropout) == (64, 16.0, 0.0)
  assert (config.adapter.pool, config.adapter.targets) == ('sum', 'all')
  bases = {'qalora': ('gptq', 4, 32, False), 'qlora': ('nf4', 4, 64, True)}
  base = (config.base.method, config.base.bits, config.base.group, config.base.double)
  assert base == bases.get(kind, ('stored', 4, 32, False))
  if kind == 'qalora':
    assert not (config.base.symmetric or config.base.gptq.act_order) and config.calibration.true_sequential
    assert (config.base.gptq.damping, config.calibration.samples, config.calibration.length) == (0.01, 128, 2048)
  assert (config.train.steps, config.train.batch) == (10_000, 16)
  assert (config.optim.schedule, config.optim.clip, config.optim.weight_decay) == ('constant', 0.3, 0.0)
  assert (config.data.max_prompt, config.data.max_completion, config.data.packing) == (1024, 256, False)
  if kind != 'full':
    assert config.optim.learning_rate == (1e-5 if large else 2e-5)
    assert config.train.accumulation == 16


def test_relatives_have_their_recipes():
  assert {path.stem for path in RELATIVES} == {f'qalora_{model}' for model in relatives.MODELS}
  stated = {config_lib.recipe(path).model.architecture.model_type for path in RELATIVES}
  assert stated == {name for name in families.FAMILIES if families.FAMILIES[name].module is decoder.Decoder}


TABLE_2 = pytest.mark.parametrize(
  'model, qalora, lora',
  [
    ('llama_7b', 89_309_184, 159_907_840),
    ('llama_13b', 139_878_400, 250_347_520),
    ('llama_33b', 272_363_520, 487_587_840),
    ('llama_65b', 446_545_920, 799_539_200),
  ],
)


@TABLE_2
def test_shapes_give_the_parameters_of_table_2(model, qalora, lora):
  """Rank 64 on all seven projections of every block: R (I / G + O) for QA-LoRA, R (I + O) for LoRA."""
  shape = llama.architecture(model)
  hidden, mlp = shape['hidden_size'], shape['intermediate_size']
  projections = 4 * [(hidden, hidden)] + 2 * [(hidden, mlp)] + [(mlp, hidden)]
  for group, expected in ((32, qalora), (1, lora)):
    block = sum(64 * (inputs // group + outputs) for inputs, outputs in projections)
    assert shape['num_hidden_layers'] * block == expected


@TABLE_2
def test_recipes_build_the_parameters_of_table_2(model, qalora, lora):
  for kind, expected in (('qalora', qalora), ('qlora', lora), ('lora', lora)):
    shapes = build.abstract_setup(config_lib.recipe(FOLDER / f'{kind}_{model}.py')).shapes
    assert adapters.count(shapes['params']) == expected


@pytest.mark.parametrize('path', [*PAPER, *RELATIVES, *ANSWERERS, FOLDER / 'quickstart.py'], ids=lambda path: path.stem)
def test_a_recipe_with_an_architecture_builds_an_abstract_state(path):
  """The names and sizes of every weight, moments included, without one of them being made."""
  config = config_lib.recipe(path)
  # 0 asks the tokenizer, which the quickstart trains only when it runs.
  config.model.architecture.vocab_size = config.model.architecture.vocab_size or 512
  shapes = build.abstract_setup(config).shapes
  tx = optim.adamw(lambda step: 1e-3, **{k: config.optim[k] for k in ('clip', 'beta1', 'beta2', 'eps', 'weight_decay')})
  state = jax.eval_shape(functools.partial(step.init_state, tx), shapes['params'])
  # Two moments for every trained number, and the counts.
  assert adapters.count(state.opt_state) == 2 * adapters.count(state.params) + 2
  assert bool(quant.matrices(shapes['frozen'])) == (config.base.method != 'stored')


@pytest.mark.parametrize(
  'model, weights',
  [
    ('llama_7b', 6_738_415_616),
    ('llama_13b', 13_015_864_320),
    ('llama_33b', 32_528_943_616),
    ('llama_65b', 65_285_660_672),
    ('llama2_7b', 6_738_415_616),
    ('llama2_13b', 13_015_864_320),
  ],
)
def test_full_recipes_train_every_weight_of_the_published_models(model, weights):
  shapes = build.abstract_setup(config_lib.recipe(FOLDER / f'full_{model}.py')).shapes
  assert adapters.count(shapes['params']) == weights
  assert not shapes['frozen']


@pytest.mark.parametrize(
  'model, weights',
  [
    ('llama3_1_8b', 8_030_261_248),
    ('mistral_7b', 7_241_732_096),
    ('qwen2_5_7b', 7_615_616_512),
    ('qwen3_8b', 8_190_735_360),
    ('gemma2_9b', 9_241_705_984),
    # 4,300,079,472 with the vision tower (416,866,032) and the projection of what it sees (2,950,272).
    ('gemma3_4b', 3_880_263_168),
    ('phi3_mini', 3_821_079_552),
    ('gpt2', 124_439_808),
    ('t5_small', 76_961_152),
    ('t5_base', 247_577_856),
    ('t5_large', 783_150_080),
    ('t5_3b', 2_849_757_184),
  ],
)
def test_other_recipes_have_the_weights_of_the_published_models(model, weights):
  config = config_lib.recipe(FOLDER / f'qalora_{model}.py')
  every = config_lib.override(config, {'adapter.kind': 'full', 'base.method': 'stored', 'model.source': 'scratch'})
  assert adapters.count(build.abstract_setup(every).shapes['params']) == weights


def test_an_architecture_of_a_family_is_kept_whole(tmp_path):
  config = config_lib.recipe(FOLDER / 'qalora_gemma3_4b.py')
  changed = config_lib.parse(
    'plan',
    [f'--config={FOLDER / "qalora_gemma3_4b.py"}', '--config.model.architecture.num_hidden_layers=7'],
    summary='',
  ).config
  assert changed.model.architecture.num_hidden_layers == 7
  assert changed.model.architecture.rope_scaling == config.model.architecture.rope_scaling
  assert config_lib.differences(config, changed) == ['model.architecture.num_hidden_layers: 34 -> 7']
  config_lib.save(changed, tmp_path)
  assert config_lib.load(tmp_path) == changed
  shallow = config_lib.override(changed, {'model.architecture.num_hidden_layers': 'seven'})
  with pytest.raises(ValueError, match="model.architecture: num_hidden_layers = 'seven'"):
    build.abstract_setup(shallow)
