"""T5: transformers' logits, texts and files; two stacks wherever weights are named; training on answers."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('transformers', reason='transformers and torch are extras of the tests')

import small_llama
import small_t5
import torch
import transformers

from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import families
from qalora_jax import hf
from qalora_jax import objectives
from qalora_jax import packed
from qalora_jax import peft
from qalora_jax import program as program_lib
from qalora_jax import quant
from qalora_jax import quantize
from qalora_jax import sharding
from qalora_jax import tokenizer as tokenizer_lib
from qalora_jax import train
from qalora_jax.data import batches
from qalora_jax.data import examples
from qalora_jax.data import records
from qalora_jax.data import shares
from qalora_jax.evaluate import command as evaluate
from qalora_jax.export import command as export
from qalora_jax.generate import beams
from qalora_jax.generate import command as generate
from qalora_jax.generate import decode
from qalora_jax.models import attention
from qalora_jax.models import linear
from qalora_jax.models import t5

KINDS = {
  'relu, tied': dict(feed_forward_proj='relu'),
  'gated, untied': dict(feed_forward_proj='gated-gelu', untied=True),
}
_RECIPE = """\
from configs import base


def get_config():
  config = base.get_config()
  config.model.source = {source!r}
  config.base.update(method='affine', bits=4, group=8)
  config.adapter.update(kind='qalora', rank=4, alpha=8.0)
  config.data.train.update(path={pairs!r}, stop=-8)
  config.data.validation.update(path={pairs!r}, start=-8)
  config.data.update(window=16, max_completion=8)
  config.train.update(steps=6, batch=8, log_every=1, validate_every=3, checkpoint_every=2, tensorboard=False)
  config.optim.update(learning_rate=0.01, clip=1.0)
  config.generate.update(max_tokens=6, batch=1)
  return config
"""


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """{kind: (transformers' model, its directory)}."""
  found = {}
  for name, how in KINDS.items():
    directory = tmp_path_factory.mktemp('t5')
    found[name] = small_t5.write(directory, **how), directory
  return found


@pytest.fixture(scope='module')
def workshop(tmp_path_factory):
  """(a recipe, its source) of a T5 that can learn to reverse a few letters."""
  directory = tmp_path_factory.mktemp('workshop')
  source = small_t5.source(directory)
  path = directory / 'tiny.py'
  path.write_text(_RECIPE.format(source=str(source), pairs=str(small_t5.pairs(directory / 'pairs.jsonl'))))
  return path, source


def test_buckets_are_those_of_transformers():
  theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
  for both in (True, False):
    for number, longest in ((32, 128), (8, 20), (16, 64), (64, 256), (32, 100), (4, 128)):
      distance = np.arange(-2 * longest, 2 * longest + 1)
      ours = t5.buckets(number, longest, both=both)[np.clip(distance, -longest, longest) + longest]
      np.testing.assert_array_equal(ours, theirs(torch.tensor(distance), both, number, longest).numpy())


@pytest.mark.parametrize('kind', KINDS)
def test_logits_and_files_are_those_of_transformers(kind, made, tmp_path, monkeypatch):
  model, directory = made[kind]
  config = hf.read_config(directory)
  tree = hf.load(directory, config, linear.Scheme())
  inputs, real, tokens = small_t5.batch()
  wanted = small_t5.logits(model, inputs, real, tokens)
  run = lambda: jax.jit(
    lambda: t5.T5(config).apply({'frozen': tree}, tokens, inputs_BS=inputs, input_segments_BS=real)
  )()
  ours = run()
  # float32 with sums in another order: torch in float64 says what rounding is worth.
  exact = small_t5.logits(model.double(), inputs, real, tokens)
  model.float()
  rounding = np.abs(wanted - exact).max()
  assert np.abs(ours - exact).max() <= 8 * rounding < 1e-3 * np.abs(exact).max()
  # In blocks of queries, each with its own part of the bias.
  monkeypatch.setattr(attention, 'SCORES', 2 * 4 * 60 * 4 * 16)
  assert np.abs(run() - exact).max() <= 8 * rounding
  hf.write(tmp_path / 'back', config, tree)
  assert hf.read_config(tmp_path / 'back') == config
  theirs, report = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / 'back', output_loading_info=True)
  assert not any(report[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  np.testing.assert_array_equal(small_t5.logits(theirs.eval(), inputs, real, tokens), wanted)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'feed_forward_proj': 'gated-silu'}, "feed_forward_proj = 'gated-silu'; it is one of relu, gated-gelu"),
    ({'dense_act_fn': 'gelu'}, "dense_act_fn = 'gelu'; only 'relu'"),
    ({'scalable_attention': True}, 'scalable_attention = True'),
    ({'is_encoder_decoder': False}, 'is_encoder_decoder = False'),
    ({'d_kv': None}, 'd_kv = None; it is a count'),
    ({'relative_attention_num_buckets': 2}, 'relative_attention_num_buckets = 2'),
    ({'relative_attention_max_distance': 3}, 'relative_attention_max_distance = 3'),
    ({'tie_word_embeddings': False, 'scale_decoder_outputs': True}, 'a head of its own is not scaled'),
    ({'decoder_start_token_id': 50}, 'decoder_start_token_id = 50'),
    ({'model_type': 'umt5'}, "model_type is 'umt5'"),
  ],
)
def test_what_is_not_computed_is_refused(changes, message, made, tmp_path):
  raw = json.loads((made['relu, tied'][1] / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(raw | changes))
  with pytest.raises(ValueError, match=re.escape(message)):
    hf.read_config(tmp_path)


def test_a_head_of_its_own_is_not_taken_for_the_embedding(made, tmp_path):
  """What transformers 5 writes of an untied T5 says tie_word_embeddings = true."""
  assert json.loads((made['gated, untied'][1] / 'config.json').read_text())['tie_word_embeddings']
  assert not hf.read_config(made['gated, untied'][1]).tie_word_embeddings


@pytest.fixture(scope='module')
def quantized(made):
  """A T5 whose first encoder layer, decoder and cross attention have forms of their own, with a QA-LoRA."""
  directory = made['gated, untied'][1]
  config = config_lib.default()
  config.model.source = str(directory)
  config.base.update(method='affine', bits=4, group=8)
  config.base.rules = 'encoder/0/: bits=8; cross/: group=2; decoder/2/mlp/: bits=3'
  config.adapter.update(kind='qalora', rank=2, targets='attention')
  # Heads of 10 and a mlp of 40 divide into groups of 2 and 8.
  config.base.rules += '; o_proj: group=2'
  built = build.setup(config)
  return built, build.load_weights(built)


def test_targets_and_rules_name_both_stacks(quantized):
  built, tree = quantized
  assert sorted(tree) == sorted(
    ['embedding', 'encoder_table', 'decoder_table', 'encoder_norm', 'decoder_norm', 'lm_head']
    + ['encoder_0', 'encoder_1', 'decoder_0', 'decoder_2']
  )
  assert tree['encoder_0']['attention']['q_proj']['kernel'].bits == 8
  assert tree['encoder_1']['attention']['q_proj']['kernel'].bits == 4
  assert tree['decoder_0']['cross']['k_proj']['kernel'].group == 2
  assert tree['decoder_2']['mlp']['down_proj']['kernel'].bits == 3
  assert not quant.matrices({key: tree[key] for key in ('lm_head', 'embedding', 'encoder_table')})
  adapted = {name for name in families.t5.names(built.model.config) if 'proj' in name}
  assert len(adapted) == 7 + 11
  params = built.shapes['params']
  assert {key for block in params.values() for key in block} == {'attention', 'cross'}


def test_quantized_stacks_are_stored_bit_for_bit(quantized, tmp_path):
  built, tree = quantized
  config = built.model.config
  packed.write(tmp_path / 'packed', config, tree, provenance={})
  back = packed.load(tmp_path / 'packed', config, built.model.scheme)
  small_llama.same(back, tree)


def test_adapters_of_both_stacks_are_peft_s(quantized, tmp_path):
  built, _ = quantized
  config, drawn = built.model.config, lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape)
  params = jax.tree.map(lambda leaf: drawn(leaf).astype(np.float32), built.shapes['params'])
  peft.write(tmp_path / 'adapter', config, params, base='', convention='released')
  stated = json.loads((tmp_path / 'adapter' / peft.CONFIG).read_text())
  assert stated['task_type'] == 'SEQ_2_SEQ_LM' and stated['target_modules'] == ['k', 'o', 'q', 'v']
  described = peft.describe(tmp_path / 'adapter', config)
  assert described['targets'] == '/(k_proj|o_proj|q_proj|v_proj)$'
  back = peft.load(tmp_path / 'adapter', config, built.shapes['params'])
  for one, two in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
    # B is multiplied by the group and divided by it, a power of two.
    np.testing.assert_array_equal(one, two)


def test_quantize_goes_through_both_stacks(workshop, tmp_path):
  path, _ = workshop
  config = config_lib.recipe(path)
  built = build.setup(config)
  rows = quantize.quantize(config, tmp_path / 'base')
  assert {row['weight'].partition('/')[0] for row in rows} == {'encoder', 'decoder'} and len(rows) == 6 + 2 * 10
  config = config_lib.override(config, {'adapter.kind': 'none'})
  small_llama.same(
    packed.load(tmp_path / 'base', built.model.config, build.setup(config).model.scheme), build.load_weights(built)
  )
  text = {'calibration.text.path': 'any.txt', 'calibration.text.format': 'text'}
  for changes in ({'base.method': 'gptq'}, {'base.refine': True}, {'base.budget': 3.0}, {'adapter.init': 'calibrated'}):
    wrong = config_lib.override(config_lib.recipe(path), changes | text)
    config_lib.check(wrong)
    with pytest.raises(ValueError, match='one stack of layers, and a model of type .t5. has encoder and decoder'):
      build.setup(wrong)


def _data(directory, **changes):
  tokens = tokenizer_lib.load(directory)
  how = dict(begin=0, window=16, loss_on='completion', append_eos=True, overflow='split') | changes
  words = ('abc', 'd', 'dcba', 'ab')
  return tokens, [
    example for word in words for example in examples.encode_answer(records.Pair(word, word[::-1]), tokens, **how)
  ]


def test_an_answer_is_its_tokens_behind_the_beginning(workshop):
  tokens, (first, *_) = _data(workshop[1])
  a, b, c = tokens.encode('abc')
  assert first['inputs'].tolist() == [a, b, c, tokens.eos]
  assert first['tokens'].tolist() == [0, c, b, a, tokens.eos] and first['loss_mask'].tolist() == [0, 1, 1, 1, 1]
  _, (cut, *_) = _data(workshop[1], max_prompt=3, max_completion=2)
  assert cut['inputs'].tolist() == [a, b, tokens.eos] and cut['tokens'].tolist() == [0, c, b]
  _, (cut, *_) = _data(workshop[1], window=3)
  assert cut['inputs'].tolist() == [a, b, tokens.eos] and cut['tokens'].tolist() == [0, c, b]
  with pytest.raises(ValueError, match='is no pair'):
    examples.encode_answer(
      records.Text('a'), tokens, begin=0, window=8, loss_on='completion', append_eos=True, overflow='cut'
    )
  with pytest.raises(ValueError, match='nothing predicts it'):
    _data(workshop[1], loss_on='all')


def test_examples_of_two_lengths_go_from_process_to_process(workshop):
  made = _data(workshop[1])[1]
  dealt = [shares.pack(4, [[made[0]], [made[2]]]), shares.pack(4, [[made[1]], [made[3]]])]
  for one, two in zip(shares.join(dealt), made, strict=True):
    assert one.keys() == two.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], two[name])


def test_pairs_that_share_a_row_are_scored_as_if_alone(workshop):
  made = _data(workshop[1])[1]
  config = hf.read_config(workshop[1])
  variables = {'frozen': jax.tree.map(jnp.asarray, hf.load(workshop[1], config, linear.Scheme()))}
  score = jax.jit(lambda batch: objectives.answer_nll(t5.T5(config), variables, batch))
  widths = dict(window=24, inputs=20)
  together = next(batches.training(made, **widths, batch=2, packing=True, seed=0))
  apart = next(batches.training(made, **widths, batch=4, packing=False, seed=0))
  assert together.keys() == apart.keys() == objectives.ANSWERS.arrays.keys()
  assert together['segments'].max() > 1
  np.testing.assert_array_equal(together['segments'].max(1), together['input_segments'].max(1))
  (packed_nll, packed_mask), (nll, mask) = score(together), score(apart)
  ours, alone = packed_nll[packed_mask > 0], nll[mask > 0]
  # The same numbers, some of them twice, but for masked terms that take part in sums as zeros.
  apart_by = np.abs(np.asarray(ours)[:, None] - np.asarray(alone)[None])
  assert apart_by.min(0).max() < 1e-4 and apart_by.min(1).max() < 1e-4
  assert len(alone) == sum(int(example['loss_mask'].sum()) for example in made)


def test_batches_of_pairs_go_on_where_they_were(workshop):
  """Mid-epoch and mid-pack, on both sides."""
  made = _data(workshop[1])[1]
  begin = lambda: batches.training(made, window=12, inputs=10, batch=2, packing=True, seed=3)
  data = begin()
  for _ in range(3):
    next(data)
  following = data.get_state()
  wanted, again = [next(data) for _ in range(4)], begin()
  again.set_state(json.loads(json.dumps(following)))
  for batch in wanted:
    small_llama.same(next(again), batch)


KINDS_OF_TRAINING = {
  'qalora': {'adapter.kind': 'qalora'},
  'lora': {'adapter.kind': 'lora', 'base.method': 'stored'},
  'full': {'adapter.kind': 'full', 'base.method': 'stored'},
}


@pytest.mark.parametrize('kind', KINDS_OF_TRAINING)
def test_every_kind_of_training_learns(kind, workshop, tmp_path):
  """On one device; and a merged LoRA is the adapted model in transformers too."""
  config = config_lib.override(config_lib.recipe(workshop[0]), KINDS_OF_TRAINING[kind] | {'train.batch': 16})
  built, mesh = build.setup(config), sharding.make_mesh(devices=jax.devices()[:1])
  program, tokens = program_lib.make(config, built, mesh), build.tokenizer(config, built)
  drawn = build.variables(built, mesh, 0)
  state, losses, rows = program.begin(drawn.pop('params')), [], build.widths(config, built.model)
  data = batches.training(
    build.encode(config, config.data.train, tokens, built.model), **rows, batch=16, packing=True, seed=0
  )
  for _ in range(30):
    batch = next(data)
    assert {name: array.shape for name, array in batch.items()} == {
      name: blank.shape for name, blank in program.batch.items()
    }
    state, metrics = program.step(state, drawn['frozen'], batch)
    losses.append(float(metrics['loss']))
  assert rows == {'window': 9, 'inputs': 16}
  assert np.mean(losses[-3:]) < 0.7 * losses[0]
  if kind != 'lora':
    return
  loaded = build.Loaded(
    built.model, {'frozen': drawn['frozen'], 'params': state.params}, tokens, workshop[1], {'source': str(workshop[1])}
  )
  export.export(loaded, config, tmp_path / 'out', format='hf', dtype='float32', widen=False, lossy=False)
  inputs, real, targets = small_t5.batch(inputs=12, tokens=9)
  theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / 'out').eval()
  merged = small_t5.logits(theirs, inputs, real, targets)
  # `export` has measured what rounding allows on its own tokens; here a thousandth of the logits' range.
  assert np.abs(_logits(loaded, inputs, real, targets) - merged).max() < 1e-3 * np.abs(merged).max()


def _logits(loaded, inputs, real, tokens):
  run = lambda variables: loaded.model.apply(variables, tokens, inputs_BS=inputs, input_segments_BS=real)
  return np.asarray(jax.jit(run)(loaded.variables))


def test_a_run_is_validated_and_exported(workshop, tmp_path):
  """With accumulation, dropout and packed rows, on eight devices."""
  path, _ = workshop
  words = ['--config.train.accumulation=2', '--config.adapter.dropout=0.3', '--config.train.batch=16']
  train.main([f'--config={path}', f'--workdir={tmp_path / "run"}', *words, '--config.train.steps=3'])
  lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  config = config_lib.load(tmp_path / 'run')
  loaded = build.load_run(config, tmp_path / 'run')
  held = build.encode(config, config.data.validation, loaded.tokenizer, loaded.model)
  (batch,) = batches.scoring(held, window=16, inputs=16, batch=8)
  batch.pop('rows')
  nll, mask = jax.jit(lambda v: objectives.answer_nll(loaded.model, v, batch))(loaded.variables)
  # A mean of some dozens of numbers in float32, and the same in float64.
  np.testing.assert_allclose(lines[-1]['validation_loss'], float((nll * mask).sum() / mask.sum()), rtol=1e-5)
  export.main([f'--workdir={tmp_path / "run"}', f'--output={tmp_path / "out"}'])
  back = build.load_model(config_lib.default(), str(tmp_path / 'out'))
  assert quant.matrices(back.variables['frozen'])
  inputs, real, targets = small_t5.batch(inputs=12, tokens=9)
  merged = _logits(back, inputs, real, targets)
  assert np.abs(_logits(loaded, inputs, real, targets) - merged).max() < 1e-3 * np.abs(merged).max()


@pytest.fixture(scope='module')
def writers(tmp_path_factory):
  """A T5 that transformers generates with (it needs stacks of one depth), and ours."""
  directory = tmp_path_factory.mktemp('writers')
  theirs = small_t5.write(directory, **small_t5.ALIKE, feed_forward_proj='gated-gelu')
  config = hf.read_config(directory)
  variables = {'frozen': jax.tree.map(jnp.asarray, hf.load(directory, config, linear.Scheme()))}
  return theirs, t5.T5(config), variables


def test_greedy_and_beams_write_what_transformers_writes(writers):
  theirs, model, variables = writers
  rng = np.random.default_rng(0)
  prompts = [rng.integers(2, 50, length).tolist() for length in (5, 17, 30, 9, 12, 3)]
  padded, real = np.zeros((6, 30), np.int64), np.zeros((6, 30), np.int64)
  for row, prompt in enumerate(prompts):
    padded[row, : len(prompt)], real[row, : len(prompt)] = prompt, 1

  def wanted(**how):
    made = theirs.generate(torch.tensor(padded), attention_mask=torch.tensor(real), max_new_tokens=12, **how)
    rows = [row[1:] for row in made.tolist()]
    return [row[: row.index(1) + 1] if 1 in row else row[:12] for row in rows]

  how = dict(max_tokens=12, ends=(1,))
  stream = decode.stream(model, variables, prompts, key=jax.random.key(0), **how)
  greedy = [[token for token in row if token is not None] for row in zip(*stream, strict=True)]
  assert greedy == wanted(do_sample=False, num_beams=1)
  assert beams.search(model, variables, prompts, beams=1, **how) == greedy
  lengths = set()
  for penalty in (1.0, 0.0, -1.0, 2.0):
    ours = beams.search(model, variables, prompts, beams=3, penalty=penalty, **how)
    assert ours == wanted(do_sample=False, num_beams=3, length_penalty=penalty)
    lengths |= {len(text) for text in ours}
  # Some end by their own, some by the budget.
  assert min(lengths) < 12 and 12 in lengths


def test_generate_and_evaluate_know_answers(workshop, tmp_path, capsys):
  pytest.importorskip('sacrebleu')
  path, source = workshop
  how = [f'--config={path}', f'--model={source}']
  asked = tmp_path / 'asked.jsonl'
  asked.write_text('{"prompt": "abc"}')
  greedy = generate.main([*how, '--prompt=abc'])
  assert not capsys.readouterr().out.startswith('abc')
  (record,) = generate.main([*how, f'--prompts={asked}', '--config.generate.beams=1'])
  assert record == {'prompt': 'abc', 'text': greedy}
  assert isinstance(generate.main([*how, '--prompt=abc', '--config.generate.beams=3']), str)
  pairs = config_lib.recipe(path).data.train.path
  (row,) = evaluate.main(
    [*how, f'--config.evaluate.generation.path={pairs}', '--config.evaluate.limit=2', '--config.generate.beams=3']
  )
  assert row['prompts'] == 2 and 0 <= row['bleu'] <= 100
  with pytest.raises(ValueError, match='evaluate.text: scored by the probability of a text after its beginning'):
    evaluate.main([*how, f'--config.evaluate.text.path={pairs}', '--config.evaluate.text.format=text'])


def test_beams_that_draw_are_refused(workshop):
  for changes in ({'generate.temperature': 0.7}, {'generate.repetition_penalty': 1.2}):
    with pytest.raises(ValueError, match='generate.beams = 4 looks for the likeliest text'):
      config_lib.check(config_lib.override(config_lib.default(), {'generate.beams': 4, **changes}))
