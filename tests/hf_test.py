"""Hugging Face directories: what is read, written and read again is the same, here and elsewhere."""

import dataclasses
import json
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import numpy_llama
import pytest
from safetensors import numpy as safetensors_numpy
import small_llama

from qalora_jax import families
from qalora_jax import hf
from qalora_jax import layout
from qalora_jax import tensors
from qalora_jax.models import decoder
from qalora_jax.models import linear
from qalora_jax.models import rotary
from qalora_jax.quant import affine
from qalora_jax.quant import qtensor

PLAIN, STRETCHED, CONFIGS = small_llama.PLAIN, small_llama.STRETCHED, small_llama.CONFIGS
DENSE = linear.Scheme()


@pytest.fixture
def written(tmp_path):
  hf.write(tmp_path / 'model', PLAIN, small_llama.draw(PLAIN))
  return tmp_path / 'model'


@pytest.mark.parametrize('name', ['babyllama_tok105', 'stories260K'])
def test_real_models_survive_import_and_export_bit_for_bit(assets, tmp_path, name):
  source, target = assets / 'models' / name, tmp_path / 'out'
  config = hf.read_config(source)
  tree = hf.load(source, config, DENSE)
  hf.write(target, config, tree, tokenizer_from=source, bos=1, eos=2)
  assert hf.read_config(target) == config
  small_llama.same(hf.load(target, config, DENSE), tree)
  small_llama.same(
    safetensors_numpy.load_file(target / tensors.SINGLE), safetensors_numpy.load_file(source / tensors.SINGLE)
  )
  assert (target / 'tokenizer.model').read_bytes() == (source / 'tokenizer.model').read_bytes()
  small_llama.agrees_elsewhere(target, decoder.Decoder(config), {'frozen': tree}, config.vocab_size)


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_a_written_model_reads_the_same_here_and_elsewhere(tmp_path, config):
  tree = small_llama.draw(config)
  hf.write(tmp_path / 'out', config, tree, bos=1, eos=2)
  assert hf.read_config(tmp_path / 'out') == config
  small_llama.same(hf.load(tmp_path / 'out', config, DENSE), tree)
  small_llama.agrees_elsewhere(tmp_path / 'out', decoder.Decoder(config), {'frozen': tree}, config.vocab_size)


def test_the_stretched_rope_has_all_three_bands():
  ratio = rotary.frequencies(1000.0, 6, STRETCHED.rope_scaling) / rotary.frequencies(1000.0, 6)
  assert ratio[0] == 1 and 1 / 8 < ratio[1] < 1 and ratio[-1] == 1 / 8


def test_the_written_config_makes_the_same_model_again(tmp_path):
  config = dataclasses.replace(STRETCHED, rms_norm_eps=3e-6, dtype=jnp.bfloat16, remat='dots')
  hf.write_config(tmp_path, config, bos=1, eos=[2, 3])
  assert hf.read_config(tmp_path, dtype=jnp.bfloat16, remat='dots') == config
  value = json.loads((tmp_path / hf.CONFIG).read_text())
  assert (value['bos_token_id'], value['eos_token_id']) == (1, [2, 3])


def test_newer_and_older_configs_are_read(written):
  file = written / hf.CONFIG
  value = json.loads(file.read_text())
  scaling = {'rope_type': 'llama3', **dataclasses.asdict(STRETCHED.rope_scaling)}
  newer = {key: value[key] for key in value if not key.startswith('rope_')}
  file.write_text(json.dumps(newer | {'rope_parameters': {'rope_theta': 1000.0, **scaling}}))
  assert hf.read_config(written) == STRETCHED
  file.write_text(json.dumps(newer | {'rope_parameters': {'rope_theta': 500.0, 'rope_type': 'default'}}))
  assert hf.read_config(written).rope_theta == 500.0
  del value['num_key_value_heads'], value['head_dim']
  file.write_text(json.dumps(value))
  assert hf.read_config(written).num_key_value_heads == 4
  assert hf.read_config(written).head_dim == 6


CONFIG_FAULTS = [
  ({'model_type': 'mamba'}, r'config.json: model_type is .mamba.; supported: llama, mistral, qwen2'),
  ({'hidden_size': None}, r'config.json: hidden_size = None'),
  ({'vocab_size': ...}, r'config.json: has no "vocab_size"'),
  ({'hidden_act': 'quick_gelu'}, r"hidden_act = 'quick_gelu'; supported: silu, relu"),
  ({'partial_rotary_factor': 0.5}, r'partial_rotary_factor = 0.5; only 1.0'),
  ({'quantization_config': {'quant_method': 'awq'}}, r"quantization_config is of quant_method 'awq'; the weights have"),
  ({'rope_scaling': {'type': 'yarn', 'factor': 2}}, r"'yarn'; supported: default, llama3, linear"),
  ({'rope_scaling': {'rope_type': 'llama3', 'factor': 2}}, r'has no low_freq_factor, high_freq_factor'),
  ({'num_key_value_heads': 3}, r'config.json: .*no multiple'),
]


@pytest.mark.parametrize(('change', 'message'), CONFIG_FAULTS)
def test_configs_that_cannot_be_are_refused(written, change, message):
  value = json.loads((written / hf.CONFIG).read_text()) | change
  (written / hf.CONFIG).write_text(json.dumps({key: v for key, v in value.items() if v is not ...}))
  with pytest.raises(ValueError, match=message):
    hf.read_config(written)


def test_a_config_that_is_absent_or_no_json_is_refused(written):
  (written / hf.CONFIG).write_text('{"hidden_size": ')
  with pytest.raises(ValueError, match='config.json: not JSON'):
    hf.read_config(written)
  (written / hf.CONFIG).write_text('[]')
  with pytest.raises(ValueError, match='config.json: holds a list'):
    hf.read_config(written)
  (written / hf.CONFIG).unlink()
  with pytest.raises(FileNotFoundError, match='has no config.json'):
    hf.read_config(written)


@pytest.mark.parametrize('bits', [8, 4, 3, 2])
def test_quantizing_while_reading_is_quantizing_what_was_read(written, bits):
  quantizer = affine.Affine(bits, 8, symmetric=bits == 4)
  scheme = linear.Scheme(quantizers=(('mlp', quantizer), ('lm_head', affine.Affine(8, -1))))
  tree, dense = hf.load(written, PLAIN, scheme), hf.load(written, PLAIN, DENSE)
  quantize = jax.jit(jax.vmap(quantizer))
  for name in ('gate_proj', 'up_proj', 'down_proj'):
    dense['layers']['mlp'][name]['kernel'] = quantize(dense['layers']['mlp'][name]['kernel'])
  dense['lm_head']['kernel'] = jax.jit(affine.Affine(8, -1))(dense['lm_head']['kernel'])
  small_llama.same(tree, dense)


def test_a_quantized_tree_is_written_dense(written, tmp_path):
  scheme = linear.Scheme(quantizers=(('all', affine.Affine(4, 8)),))
  tree = hf.load(written, PLAIN, scheme)
  hf.write(tmp_path / 'dense', PLAIN, tree)
  again = hf.load(tmp_path / 'dense', PLAIN, DENSE)
  is_q = lambda leaf: isinstance(leaf, qtensor.QTensor)
  dequantize = jax.jit(qtensor.dequantize)
  small_llama.same(again, jax.tree.map(lambda w: dequantize(w) if is_q(w) else w, tree, is_leaf=is_q))
  small_llama.agrees_elsewhere(tmp_path / 'dense', decoder.Decoder(PLAIN), {'frozen': tree}, PLAIN.vocab_size)


def test_the_quantizer_is_compiled_once_a_shape(written):
  traced = []

  @dataclasses.dataclass(frozen=True)
  class Counting(affine.Affine):
    def __call__(self, w, name='a weight'):
      traced.append(w.shape)
      return super().__call__(w, name)

  hf.load(written, PLAIN, linear.Scheme(quantizers=(('all', Counting(4, 8)),)))
  # Once for each of the seven projections to learn its shapes, then k and v, gate and up share a program.
  assert len(traced) == 7 + 5


def test_weights_that_train_are_dense_and_float32(written):
  scheme = linear.Scheme(trains=True, quantizers=(('all', affine.Affine(4, 8)),), frozen_dtype=jnp.bfloat16)
  small_llama.same(hf.load(written, PLAIN, scheme), small_llama.draw(PLAIN))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_sixteen_bit_checkpoints(tmp_path, dtype):
  tree = small_llama.draw(PLAIN)
  hf.write(tmp_path / 'out', PLAIN, tree, dtype=dtype)
  rounded = jax.tree.map(lambda w: w.astype(jnp.dtype(dtype)), tree)
  small_llama.same(hf.load(tmp_path / 'out', PLAIN, linear.Scheme(frozen_dtype=jnp.dtype(dtype))), rounded)
  small_llama.same(hf.load(tmp_path / 'out', PLAIN, DENSE), jax.tree.map(lambda w: w.astype(np.float32), rounded))
  quantizer = affine.Affine(4, 8)
  read = hf.load(tmp_path / 'out', PLAIN, linear.Scheme(quantizers=(('all', quantizer),)))
  small_llama.same(
    read['layers']['mlp']['up_proj']['kernel'], jax.jit(quantizer)(rounded['layers']['mlp']['up_proj']['kernel'])
  )


def test_what_float16_cannot_hold_is_not_written(tmp_path):
  tree = small_llama.draw(PLAIN)
  tree['norm']['scale'][3] = 1e5
  with pytest.raises(ValueError, match=r'model.norm.weight reaches 100000, beyond float16'):
    hf.write(tmp_path / 'out', PLAIN, tree, dtype='float16')
  with pytest.raises(ValueError, match="dtype = 'int8'"):
    hf.write(tmp_path / 'out', PLAIN, tree, dtype='int8')
  assert not list(tmp_path.iterdir())


def test_shards_and_their_index(tmp_path):
  tree, limit = small_llama.draw(PLAIN), 8000
  hf.write(tmp_path / 'out', PLAIN, tree, shard_bytes=limit)
  files = sorted(tmp_path.glob('out/*.safetensors'))
  assert files[0].name == f'model-00001-of-{len(files):05d}.safetensors' and len(files) > 3
  index = json.loads((tmp_path / 'out' / tensors.INDEX).read_text())
  assert index['metadata']['total_size'] == sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  for file in files:
    held = safetensors_numpy.load_file(file)
    assert sum(w.nbytes for w in held.values()) <= limit
    assert {index['weight_map'][name] for name in held} == {file.name}
  small_llama.same(hf.load(tmp_path / 'out', PLAIN, DENSE), tree)


def test_progress_is_told_of_every_layer(tmp_path):
  calls = []
  hf.write(tmp_path / 'out', PLAIN, small_llama.draw(PLAIN), progress=lambda: calls.append('write'))
  hf.load(tmp_path / 'out', PLAIN, DENSE, progress=lambda: calls.append('read'))
  assert calls == ['write'] * 3 + ['read'] * 3


def edit(directory, change):
  """Rewrites model.safetensors after change(tensors)."""
  held = safetensors_numpy.load_file(directory / tensors.SINGLE)
  change(held)
  safetensors_numpy.save_file(held, directory / tensors.SINGLE)


def put(name, value):
  return lambda held: held.update({name: value})


UP = 'model.layers.1.mlp.up_proj.weight'
TENSOR_FAULTS = [
  (lambda held: held.pop(UP), f'{UP} is missing'),
  (
    put('model.layers.3.mlp.up_proj.weight', np.ones((40, 24), np.float32)),
    'layers.3.mlp.up_proj.weight is unexpected',
  ),
  (put(UP, np.ones((24, 40), np.float32)), rf'{UP} has shape \[24, 40\], not \[40, 24\]'),
  (put(UP, np.ones((40, 24), np.int8)), f'{UP} is stored as I8, not as F32 or F16 or BF16'),
  (put(UP, np.ones((40, 24), np.float64)), f'{UP} is stored as F64'),
]


@pytest.mark.parametrize(('change', 'message'), TENSOR_FAULTS)
def test_faults_are_found_in_the_headers(written, monkeypatch, change, message):
  edit(written, change)
  monkeypatch.setattr(tensors, 'read', lambda *_: pytest.fail('a tensor was read before the headers were checked'))
  with pytest.raises(ValueError, match=message):
    hf.load(written, PLAIN, DENSE)


def test_one_error_names_them_all_up_to_eight(written):
  def change(held):
    held.pop(UP)
    held['model.extra'] = np.ones(1, np.float32)

  edit(written, change)
  scheme = linear.Scheme(quantizers=(('mlp', affine.Affine(4, 16)),))
  with pytest.raises(ValueError) as raised:
    hf.load(written, PLAIN, scheme)
  for part in (f'{UP} is missing', 'model.extra is unexpected', r'model.layers.*.mlp.down_proj.weight: 40 inputs'):
    assert part in str(raised.value)
  with pytest.raises(ValueError, match=r'(?s)(is missing.*){8}and 22 more'):
    edit(written, dict.clear)
    hf.load(written, PLAIN, DENSE)


def test_tensors_that_say_nothing_are_ignored(tmp_path):
  config, target = CONFIGS['tied'], tmp_path / 'out'
  hf.write(target, config, small_llama.draw(config))
  edit(target, put('model.layers.0.self_attn.rotary_emb.inv_freq', np.ones(4, np.float32)))
  embedding = safetensors_numpy.load_file(target / tensors.SINGLE)['model.embed_tokens.weight']
  edit(target, put('lm_head.weight', embedding))
  small_llama.same(hf.load(target, config, DENSE), small_llama.draw(config))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
  hf.write(tmp_path / 'out', PLAIN, small_llama.draw(PLAIN), shard_bytes=8000)
  one, two, *_ = sorted(tmp_path.glob('out/*.safetensors'))
  name, value = next(iter(safetensors_numpy.load_file(one).items()))
  safetensors_numpy.save_file(safetensors_numpy.load_file(two) | {name: value}, two)
  with pytest.raises(ValueError, match=f'{name} is in {one.name} and again in {two.name}'):
    hf.load(tmp_path / 'out', PLAIN, DENSE)


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path):
  target = tmp_path / 'out'
  hf.write(target, PLAIN, small_llama.draw(PLAIN), shard_bytes=8000)
  one, two, *_ = sorted(target.glob('*.safetensors'))
  index = json.loads((target / tensors.INDEX).read_text())
  name = next(iter(safetensors_numpy.load_file(one)))
  moved = index['weight_map'] | {name: two.name}
  (target / tensors.INDEX).write_text(json.dumps({'weight_map': moved}))
  with pytest.raises(ValueError, match=f'{name} is in {one.name}, but {tensors.INDEX} places it in {two.name}'):
    hf.load(target, PLAIN, DENSE)
  (target / tensors.INDEX).write_text(json.dumps({'weight_map': moved | {name: '../elsewhere.safetensors'}}))
  with pytest.raises(FileNotFoundError, match='names elsewhere.safetensors, which is not in'):
    hf.load(target, PLAIN, DENSE)
  (target / tensors.INDEX).write_text('{}')
  with pytest.raises(ValueError, match='has no "weight_map"'):
    hf.load(target, PLAIN, DENSE)
  shutil.copyfile(one, target / tensors.SINGLE)
  with pytest.raises(ValueError, match='holds both'):
    hf.load(target, PLAIN, DENSE)


@pytest.mark.parametrize('size', [3, 100, -5])
def test_a_file_cut_short_is_named(written, size):
  file = written / tensors.SINGLE
  file.write_bytes(file.read_bytes()[:size])
  with pytest.raises(ValueError, match=f'{tensors.SINGLE}: damaged or cut short'):
    hf.load(written, PLAIN, DENSE)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'consolidated.00.pth', 'model.pt'])
def test_pickles_are_refused(written, name):
  (written / tensors.SINGLE).rename(written / name)
  with pytest.raises(FileNotFoundError, match=f'{name} is a pickle.*any code.*safe_serialization=True'):
    hf.load(written, PLAIN, DENSE)
  (written / name).unlink()
  with pytest.raises(FileNotFoundError, match=r'holds no model.safetensors and no .*index.json\.$'):
    hf.load(written, PLAIN, DENSE)


def test_an_interrupted_write_leaves_nothing(tmp_path):
  calls = []

  def stop():
    calls.append(1)
    if len(calls) == 2:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    hf.write(tmp_path / 'out', PLAIN, small_llama.draw(PLAIN), shard_bytes=3000, progress=stop)
  assert not list(tmp_path.iterdir())


def test_only_an_absent_or_empty_target_is_written(tmp_path):
  target, tree = tmp_path / 'deep' / 'out', small_llama.draw(PLAIN)
  target.mkdir(parents=True)
  hf.write(target, PLAIN, tree)
  before = {file: file.read_bytes() for file in target.iterdir()}
  with pytest.raises(ValueError, match='exists and is not empty'):
    hf.write(target, PLAIN, tree)
  assert {file: file.read_bytes() for file in target.iterdir()} == before
  assert {file.stat().st_mode for file in before} == {(target / hf.CONFIG).stat().st_mode}


def test_a_tree_of_another_model_is_not_written(tmp_path):
  tree = small_llama.draw(PLAIN)
  tree['layers']['mlp']['up_proj']['adapter'] = np.ones(3)
  tree['norm']['scale'] = np.ones(23, np.float32)
  del tree['lm_head']
  with pytest.raises(ValueError) as raised:
    hf.write(tmp_path / 'out', PLAIN, tree)
  for part in ('up_proj/adapter is no weight', r'norm/scale has shape (23,), not (24,)', 'lm_head/kernel is missing'):
    assert part in str(raised.value)
  assert not list(tmp_path.iterdir())


def test_every_weight_of_the_model_has_a_name():
  assert layout.matrix_shapes(PLAIN).keys() == layout.names(PLAIN).keys() == families.of(PLAIN).names(PLAIN).keys()


def test_sources_are_directories_or_hub_ids(written, monkeypatch):
  assert hf.resolve(written) == written == hf.resolve(str(written), 'any')
  with pytest.raises(FileNotFoundError, match="'/no/such/place' is no directory and no hub id"):
    hf.resolve('/no/such/place')

  asked = []

  def download(name, *, revision, allow_patterns, ignore_patterns):
    asked.append((name, revision))
    if name == 'some/model':
      return str(written)
    raise OSError('no network')

  monkeypatch.setitem(sys.modules, 'huggingface_hub', types.SimpleNamespace(snapshot_download=download))
  assert hf.resolve('some/model', 'v2') == written
  with pytest.raises(
    FileNotFoundError, match=r"'no/such' is no directory here.*'main'.*no network.*name the directory"
  ):
    hf.resolve('no/such')
  assert asked == [('some/model', 'v2'), ('no/such', 'main')]


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_transformers_loads_what_was_written(tmp_path, config):
  torch = pytest.importorskip('torch', reason='the parity extra (torch, transformers) is not installed')
  transformers = pytest.importorskip('transformers', reason='the parity extra (torch, transformers) is not installed')
  tree, target = small_llama.draw(config), tmp_path / 'out'
  hf.write(target, config, tree, bos=1, eos=2, shard_bytes=8000)
  tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 48))
  model = transformers.LlamaForCausalLM.from_pretrained(target, torch_dtype=torch.float32)
  with torch.no_grad():
    theirs = model(torch.tensor(tokens)).logits.numpy()
  exact = numpy_llama.logits(target, tokens)
  rounding = np.abs(numpy_llama.logits(target, tokens, np.float32) - exact).max()
  ours = np.asarray(decoder.Decoder(config).apply({'frozen': tree}, jnp.asarray(tokens)))
  # Two float32 evaluations, each as far from the exact one as agrees_elsewhere allows.
  assert np.abs(ours - theirs).max() <= 16 * rounding
