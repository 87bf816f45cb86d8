"""`qalora quantize`: a quantized directory is the model that quantizing on load gives."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_llama

from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import hf
from qalora_jax import inspection
from qalora_jax import packed
from qalora_jax import quant
from qalora_jax import quantize
from qalora_jax import train
from qalora_jax.evaluate import command as evaluate
from qalora_jax.models import linear
from qalora_jax.quant import qtensor


@pytest.fixture(scope='module')
def quantized(qalora, tmp_path_factory):
  directory = tmp_path_factory.mktemp('quantized') / 'model'
  qalora('quantize', directory)
  return directory


@pytest.fixture(scope='module')
def calibrated(text):
  """Words that name calibration text that is not scored."""
  named = dict(path=text, format='text', separator='\n', stop=-8)
  words = [f'calibration.text.{key}={value}' for key, value in named.items()]
  return [*words, 'calibration.length=32', 'calibration.samples=6', 'calibration.batch=8']


def rows(workdir):
  found = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{name: value for name, value in row.items() if name not in train.SPEEDS} for row in found]


def test_the_directory_is_what_quantizing_on_load_gives(quantized, recipe):
  built = build.setup(config_lib.recipe(recipe))
  small_llama.same(packed.load(quantized, built.model.config), build.load_weights(built))


def test_training_from_either_is_the_same_bit_for_bit(quantized, trained, qalora, tmp_path):
  qalora('train', tmp_path, f'model.source={quantized}', 'base.method=stored')
  assert rows(tmp_path) == rows(trained)
  assert (tmp_path / 'base.json').read_bytes() == (trained / 'base.json').read_bytes()


def test_the_manifest_says_where_it_comes_from(quantized, source):
  found = packed.manifest(quantized)['provenance']
  assert (found['source'], found['merged']) == (str(source), False)
  assert (found['base']['bits'], found['base']['group']) == (4, 16)


@pytest.mark.parametrize(
  'words, message',
  [
    (['base.method=stored'], 'leaves the weights as they are; choose "affine"'),
    (['model.source={quantized}'], 'is already quantized; start from its dense source'),
    (['model.source=scratch', 'adapter.kind=none'], 'has no weights to quantize'),
    (['model.source=/nowhere/model'], 'no directory and no hub id'),
    (['base.group=48'], '32 inputs do not divide into groups of 48'),
    (['base.method=qat', 'adapter.kind=full'], 'is trained: use `qalora train`'),
    (['base.rules=down: bits=8; dwn_proj: bits=4'], "base.rules: 'dwn_proj' selects no matrix; there are layers/N/att"),
    (
      ['base.rules=layers/1/: method=dense', 'adapter.init=loftq'],
      'qalora needs quantized weights, and layers/1/attention/q_proj is dense',
    ),
    (
      ['base.rules=layers/1/mlp: method=dense', 'adapter.init=loftq', 'adapter.kind=lora'],
      'makes good what quantization lost, and layers/1/mlp/gate_proj is dense',
    ),
    (['evaluate.text.path=/nowhere.txt'], '/nowhere.txt'),
    (['data.window=65'], 'data.window = 65, and the model has a window of 64'),
    (['base.targets=(q|z)_prj'], r"base.targets: '\(q\|z\)_prj' selects no matrix"),
    (['CALIBRATED', 'base.method=gptq', 'calibration.length=65'], 'calibration.length = 65 is beyond the 64 positions'),
    (['CALIBRATED', 'base.method=gptq', 'calibration.text.stop=1', 'calibration.length=60'], 'do not fill one window'),
    (['CALIBRATED', 'base.method=gptq', 'calibration.text.path=/nowhere'], '/nowhere'),
    (['CALIBRATED', 'base.budget=2.5'], 'budget = 2.5 bits per weight: the choices take from'),
  ],
)
def test_what_cannot_be_quantized_is_refused(qalora, quantized, calibrated, tmp_path, words, message):
  if words[0] == 'CALIBRATED':
    words = [*calibrated, *words[1:]]
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    qalora('quantize', tmp_path / 'out', *(word.format(quantized=quantized) for word in words))
  assert not (tmp_path / 'out').exists()


_RULES = (
  'layers/0/: bits=8, method=gptq; down_proj: method=nf4, bits=4, double=True; '
  'up_proj: symmetric=True, scale_dtype=float16, clip=mse; o_proj: method=dense'
)
METHODS = {
  'gptq': ['base.method=gptq', 'base.bits=3', 'base.refine=True'],
  'mixed': ['base.bits=3', f'base.rules={_RULES}'],
  'budget': ['base.method=gptq', 'base.budget=7.0'],
}


@pytest.fixture(scope='module')
def base(qalora, calibrated, tmp_path_factory):
  """base(name): the directory that one of METHODS makes."""

  @functools.cache
  def make(name):
    directory = tmp_path_factory.mktemp('bases') / 'base'
    qalora('quantize', directory, *calibrated, *METHODS[name])
    return directory

  return make


@pytest.mark.parametrize('name', METHODS)
def test_every_method_is_written_and_reported(base, tmp_path, name):
  """quantize -> save -> load -> equal, with a row a matrix, perplexity before and after, and both plots."""
  config = hf.read_config(base(name))
  read = packed.load(base(name), config)
  packed.write(tmp_path / 'again', config, read, provenance={})
  small_llama.same(packed.load(tmp_path / 'again', config), read)
  content = json.loads((base(name) / quantize.REPORT).read_text())
  assert len(content['rows']) == sum(q.scale.shape[0] for q in quant.matrices(read))
  assert [score['model'] for score in content['perplexity']] == ['before', 'after']
  assert all(0 < row['output_error'] < 0.5 and row['weight_error'] > 0 for row in content['rows'])
  assert (base(name) / quantize.ERRORS).stat().st_size > 5000 and (base(name) / quantize.CODES).stat().st_size > 5000
  assert not list(base(name).parent.glob('.*'))


def test_qalora_trains_on_every_form_and_merges_exactly(base, qalora, tmp_path):
  words = [f'model.source={base("mixed")}', 'base.method=stored', 'adapter.targets=(q|k|v|gate|up|down)_proj']
  qalora('train', tmp_path / 'run', *words, 'train.steps=2', 'adapter.dropout=0.0')
  run = build.load_run(config_lib.load(tmp_path / 'run'), tmp_path / 'run')
  qalora('export', tmp_path / 'run', f'--output={tmp_path / "merged"}', *words, 'adapter.dropout=0.0')
  merged = packed.load(tmp_path / 'merged', run.model.config)
  tokens, logits = jnp.arange(32)[None], jax.jit(run.model.apply)
  adapted = logits(run.variables, tokens)
  again = logits({'frozen': jax.device_put(merged)}, tokens)
  # Compiled together with the product or read from a file, a merged offset may round once differently; two layers of
  # sums of at most 64 products carry that on.
  atol = 2 * 7 * 64 * float(jnp.finfo(jnp.float32).eps) * float(jnp.abs(adapted).max())
  np.testing.assert_allclose(again, adapted, rtol=0, atol=atol)
  assert float(jnp.abs(adapted - logits({'frozen': run.variables['frozen']}, tokens)).max()) > 10 * atol
  before = packed.load(base('mixed'), run.model.config)
  for one, other in zip(quant.matrices(before), quant.matrices(merged), strict=True):
    small_llama.same((one.planes, one.scale), (other.planes, other.scale))


def test_train_calibrates_its_base_once_and_evaluates_on_it(qalora, calibrated, tmp_path):
  """One config with a calibrated base and an adapter that begins with its error: `train` makes what it needs."""
  words = [*calibrated, 'base.method=gptq', 'base.bits=2', 'adapter.init=calibrated', 'adapter.dropout=0.0']
  words += ['train.steps=2', 'optim.learning_rate=1e-9']
  qalora('train', tmp_path / 'run', *words)
  base = tmp_path / 'run' / build.BASE
  # As it would have been written before the config had these keys.
  old = json.loads((base / packed.MANIFEST).read_text())
  for key in ('recipe', 'sample'):
    del old['provenance']['settings']['calibration']['text'][key]
  (base / packed.MANIFEST).write_text(json.dumps(old))
  made = {path.name: path.stat().st_mtime_ns for path in base.iterdir()}
  started = qalora('evaluate', tmp_path / 'run', *words)[0]['nats_per_token']
  # The base is looked at with its adapter, which makes good some of the error of two bits.
  assert qalora('evaluate', tmp_path / 'base', f'--model={base}')[0]['nats_per_token'] == pytest.approx(
    started, rel=1e-4
  )
  config = config_lib.load(tmp_path / 'run')
  run = build.load_run(config, tmp_path / 'run')
  bare = dataclasses.replace(run, variables={'frozen': run.variables['frozen'], 'params': {}})
  assert evaluate.evaluate(bare, config)['nats_per_token'] > started
  qalora(
    'train', tmp_path / 'run', *[word for word in words if 'steps' not in word], 'train.steps=3', '--replace_config'
  )
  assert {path.name: path.stat().st_mtime_ns for path in base.iterdir()} == made
  with pytest.raises(ValueError, match='adapter.rank = 4, not 3'):
    qalora('train', tmp_path / 'other', f'model.source={base}', *words, 'adapter.rank=3')
  with pytest.raises(ValueError, match='base was made otherwise: seed: 0 -> 1'):
    qalora('train', tmp_path / 'run', *words, 'seed=1', '--replace_config')
  with pytest.raises(ValueError, match='takes more than rounding'):
    qalora('evaluate', tmp_path / 'none', *words[:-2], 'adapter.kind=none', 'adapter.init=zero')


@pytest.mark.parametrize('kind, init', [('lora', 'loftq'), ('qalora', 'pissa')])
def test_adapters_begin_with_what_the_base_lost(qalora, tmp_path, kind, init):
  """Without calibration text; LoRA on NF4 as QLoRA's users do it, QA-LoRA on its own."""
  method = ['base.method=nf4', 'base.group=32'] if kind == 'lora' else ['base.bits=2']
  # A rule that changes no form: layers that were quantized apart are one stack again when they are read.
  method.append('base.rules=layers/0/: ' + ('scale_dtype=float32' if kind == 'lora' else 'clip=mse'))
  words = [*method, f'adapter.kind={kind}', f'adapter.init={init}', 'adapter.dropout=0.0']
  qalora('quantize', tmp_path / 'base', *words)
  with pytest.raises(ValueError, match=f"holds what adapter.init = '{init}' left"):
    qalora('train', tmp_path / 'bare', f'model.source={tmp_path / "base"}', *words[:-2], 'adapter.init=zero')
  assert not (tmp_path / 'bare').exists()
  params = packed.manifest(tmp_path / 'base')['adapter']
  assert (params['kind'], params['init'], params['rank']) == (kind, init, 4)
  qalora(
    'train', tmp_path / 'run', f'model.source={tmp_path / "base"}', *words, 'train.steps=1', 'optim.learning_rate=1e-9'
  )
  run = build.load_run(config_lib.load(tmp_path / 'run'), tmp_path / 'run')
  leaves = jax.tree.leaves(run.variables['params'])
  assert all(float(np.abs(leaf).max()) > 0 for leaf in leaves)


def test_pissa_on_a_dense_base_leaves_the_model_as_it_was(qalora, source, tmp_path):
  words = ['base.method=stored', 'adapter.kind=lora', 'adapter.init=pissa', 'adapter.dropout=0.0']
  qalora('train', tmp_path / 'run', *words, 'train.steps=1', 'optim.learning_rate=1e-9')
  begun = qalora('evaluate', tmp_path / 'run', *words)[0]['nats_per_token']
  dense = qalora('evaluate', tmp_path / 'dense', f'--model={source}', 'base.method=stored')[0]['nats_per_token']
  assert begun == pytest.approx(dense, rel=1e-5)
  run = build.load_run(config_lib.load(tmp_path / 'run'), tmp_path / 'run')
  assert not quant.matrices(run.variables['frozen'])
  down = run.variables['frozen']['layers']['mlp']['down_proj']['kernel'][0]
  original = hf.load(source, run.model.config, linear.Scheme())['layers']['mlp']['down_proj']['kernel'][0]
  assert np.linalg.norm(down, 2) < np.linalg.norm(original, 2)


def test_a_quantization_cut_short_goes_on(qalora, calibrated, tmp_path, monkeypatch):
  words = [*calibrated, 'base.method=gptq']
  whole, cut = tmp_path / 'whole', tmp_path / 'cut'
  qalora('quantize', whole, *words)
  keep = quantize.calibrate._keep
  calls = []

  def once(file, made, found):
    keep(file, made, found)
    calls.append(file)
    raise KeyboardInterrupt

  monkeypatch.setattr(quantize.calibrate, '_keep', once)
  with pytest.raises(KeyboardInterrupt):
    qalora('quantize', cut, *words)
  assert not cut.exists() and calls[0].exists()
  with pytest.raises(ValueError, match='unfinished quantization of other settings'):
    qalora('quantize', cut, *words, 'base.bits=3')
  monkeypatch.setattr(quantize.calibrate, '_keep', keep)
  qalora('quantize', cut, *words)
  config = hf.read_config(whole)
  small_llama.same(packed.load(cut, config), packed.load(whole, config))
  assert not calls[0].exists()


def test_inspection_orders_by_error_and_counts_codes():
  found = [{'weight': f'layers/{n}/mlp/up_proj', 'weight_error': n / 10} for n in range(7)]
  assert [row['weight_error'] for row in inspection.worst(found, 2)] == [0.6, 0.5]
  assert inspection.measure([row | {'output_error': 1.0} for row in found]) == 'output_error'
  q = qtensor.QTensor(
    qtensor.pack(np.array([[-2, 1], [-2, 0], [-2, 1], [1, 1]]), 2), np.ones((1, 2)), None, bits=2, group=4
  )
  codes, shares = inspection.histogram(q)
  np.testing.assert_array_equal(codes, [-2, -1, 0, 1])
  np.testing.assert_array_equal(shares, [3 / 8, 0, 1 / 8, 4 / 8])


def test_nothing_is_overwritten(qalora, quantized):
  before = {path: path.read_bytes() for path in quantized.iterdir()}
  with pytest.raises(ValueError, match='exists and is not empty'):
    qalora('quantize', quantized, 'base.bits=2')
  assert {path: path.read_bytes() for path in quantized.iterdir()} == before
