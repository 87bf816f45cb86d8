"""MLX, GGUF and GPTQ files: what others read in them is the merged model; what a format cannot hold is refused."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import numpy_llama
import pytest
from safetensors import numpy as safetensors_numpy

from qalora_jax import bitstream
from qalora_jax import build
from qalora_jax import config as config_lib
from qalora_jax import gptq_files
from qalora_jax import hf
from qalora_jax import layout
from qalora_jax import sharding
from qalora_jax import stored
from qalora_jax import tokenizer as tokenizer_lib
from qalora_jax.export import command
from qalora_jax.export import gguf
from qalora_jax.export import job as job_lib
from qalora_jax.export import merge
from qalora_jax.export import mlx
from qalora_jax.export import verify
from qalora_jax.quant import qtensor

TOKENS = np.random.default_rng(1).integers(3, 105, (2, 48))


@pytest.fixture(scope='module')
def babyllama(assets):
  """(config, model) of the real checkpoint, quantized, with a QA-LoRA adapter as large as training makes it."""

  @functools.cache
  def make(kind='qalora', **changes):
    config = config_lib.default().copy_and_resolve_references()
    config.model.source = str(assets / 'models' / 'babyllama_tok105')
    config.base.method = 'affine'
    config.adapter.update(kind=kind, rank=4)
    config.update_from_flattened_dict({key.replace('__', '.'): value for key, value in changes.items()})
    built = build.setup(config)
    drawn = build.variables(built, sharding.make_mesh(devices=jax.devices()[:1]), seed=0)
    draw = lambda leaf: leaf + 0.003 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)
    drawn['params'] = jax.tree.map(draw, drawn['params'])
    return config, build.Loaded(
      built.model, drawn, build.tokenizer(config, built), built.directory, {'source': config.model.source}
    )

  return make


def job(loaded, **choices):
  """What `command.export` hands to a format."""
  frozen, params = loaded.variables['frozen'], loaded.variables['params']
  tree = merge.merge(frozen, params) if params else frozen
  own = dict(tokenizer_from=loaded.tokenizer_from, bos=loaded.tokenizer.bos, eos=loaded.tokenizer.eos)
  return job_lib.Job(loaded.model.config, tree, **own, **choices)


def logits(loaded):
  return np.asarray(jax.jit(loaded.model.apply)(loaded.variables, TOKENS))


def elsewhere(loaded, read, tmp_path):
  """(logits that numpy_llama makes of read(path, name) in float64, what float32 does to them)."""
  named = {}
  for path, name, _ in layout.parts(loaded.model.config, jax.eval_shape(lambda: job(loaded).tree)):
    value = np.asarray(read(path, name), np.float32)
    named[name] = np.ascontiguousarray(value.T if layout.is_matrix(path) else value)
  dense = tmp_path / 'dense'
  hf.publish(
    dense, loaded.model.config, named.items(), dtype='float32', tokenizer_from=None, bos=1, eos=2, shard_bytes=10**9
  )
  exact = numpy_llama.logits(dense, TOKENS)
  return exact, np.abs(numpy_llama.logits(dense, TOKENS, np.float32) - exact).max()


def read_mlx(directory):
  """Every weight [inputs, outputs] as MLX computes with it: x @ quantized_matmul of the identity."""
  import mlx.core as mx

  mx.set_default_device(mx.cpu)
  weights, stated = mx.load(str(directory / 'model.safetensors')), json.loads((directory / 'config.json').read_text())

  def read(path, name):
    module = name.removesuffix('.weight')
    if f'{module}.scales' not in weights:
      value = np.array(weights[name])
      return value.T if layout.is_matrix(path) else value
    own = stated['quantization'].get(module, stated['quantization'])
    inputs = weights[f'{module}.scales'].shape[1] * own['group_size']
    parts = [weights[f'{module}.{part}'] for part in ('weight', 'scales', 'biases')]
    product = mx.quantized_matmul(
      mx.eye(inputs), *parts, transpose=True, group_size=own['group_size'], bits=own['bits']
    )
    return np.array(product)

  return read


@pytest.mark.parametrize(
  'changes',
  [
    {'base__bits': 8},
    {'base__bits': 4},
    {'base__bits': 3, 'base__group': 64, 'base__rules': 'down_proj: group=32'},
    {'base__bits': 2, 'base__symmetric': True},
    {'base__bits': 4, 'base__rules': 'layers/0/: bits=8; down_proj: bits=3, group=352; o_proj: method=dense'},
  ],
  ids=['8', '4', '3', '2 symmetric', 'mixed'],
)
def test_mlx_computes_with_the_merged_weights(babyllama, tmp_path, changes):
  targets = {'adapter__targets': '/(q|k|v|gate|up|down)_proj$'}
  config, loaded = babyllama(**changes, **targets)
  command.export(loaded, config, tmp_path / 'mlx', format='mlx')
  exact, rounding = elsewhere(loaded, read_mlx(tmp_path / 'mlx'), tmp_path)
  assert np.abs(logits(loaded) - exact).max() <= 8 * rounding < 1e-3 * np.abs(exact).max()


def test_mlx_in_half_precision_is_smaller_and_close(babyllama, tmp_path):
  config, loaded = babyllama(base__bits=4)
  sizes = []
  for dtype in mlx.DTYPES:
    command.export(loaded, config, tmp_path / dtype, format='mlx', dtype=dtype)
    sizes.append((tmp_path / dtype / 'model.safetensors').stat().st_size)
  # 4 bits and two constants for every 32 of them.
  assert sizes[0] / sizes[1] == pytest.approx((4 + 64 / 32) / (4 + 32 / 32), rel=0.05)


def read_gguf(directory, config):
  """Every weight [inputs, outputs] as the gguf package reads it, the rows of q and k put back by hand."""
  import gguf as library

  found = {tensor.name: tensor for tensor in library.GGUFReader(directory / gguf.FILE).tensors}
  short = {'self_attn': 'attn', 'mlp': 'ffn', 'o_proj': 'output', 'input_layernorm': 'attn_norm'}
  short |= {'post_attention_layernorm': 'ffn_norm'}

  def name_of(name):
    if name == 'model.embed_tokens.weight':
      return 'token_embd.weight'
    if name == 'model.norm.weight':
      return 'output_norm.weight'
    layer, *rest = name.removeprefix('model.layers.').removesuffix('.weight').split('.')
    return f'blk.{layer}.{"_".join(short.get(part, part.removesuffix("_proj")) for part in rest)}.weight'

  def read(path, name):
    tensor = found[name_of(name)]
    value = library.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
    heads = {'q': config.num_attention_heads, 'k': config.num_key_value_heads}.get(name.split('.')[-2][0])
    if 'self_attn' in name and heads and name.split('.')[-2][1] == '_':
      # Row 2 p + h of a head here is row h * C / 2 + p there.
      rows = np.arange(value.shape[0]).reshape(heads, -1, 2).transpose(0, 2, 1).reshape(-1)
      value = value[rows]
    return value.T if layout.is_matrix(path) else value

  return read


@pytest.mark.parametrize(
  'changes, blocks',
  [
    ({'base__bits': 4}, {'Q4_1': 35, 'F32': 12}),
    ({'base__bits': 4, 'base__group': 64, 'base__rules': 'down_proj: group=352'}, {'Q4_1': 35, 'F32': 12}),
    ({'base__bits': 4, 'base__symmetric': True, 'kind': 'none'}, {'Q4_0': 35, 'F32': 12}),
    ({'base__bits': 8, 'base__symmetric': True, 'kind': 'none'}, {'Q8_0': 35, 'F32': 12}),
  ],
  ids=['4', '4, larger groups', '4 symmetric', '8 symmetric'],
)
def test_a_gguf_file_holds_the_merged_weights(babyllama, tmp_path, changes, blocks):
  import gguf as library

  config, loaded = babyllama(**changes)
  command.export(loaded, config, tmp_path / 'gguf', format='gguf')
  reader = library.GGUFReader(tmp_path / 'gguf' / gguf.FILE)
  kinds = [tensor.tensor_type.name for tensor in reader.tensors]
  assert {kind: kinds.count(kind) for kind in kinds} == blocks
  read = read_gguf(tmp_path / 'gguf', loaded.model.config)
  for path, name, leaf in layout.parts(loaded.model.config, job(loaded).tree):
    found, wanted = read(path, name), verify.dense(leaf)
    if isinstance(leaf, qtensor.QTensor):
      # scale * u + m, both rounded to float16, u at most 2^bits.
      size = np.abs(leaf.scale) * 2**leaf.bits + np.abs(qtensor.offsets(leaf))
      assert (np.abs(found - wanted) <= np.repeat(size, leaf.group, axis=0) * 2.0**-10).all(), name
    else:
      np.testing.assert_array_equal(found, wanted)


def test_a_gguf_file_says_what_the_model_is(babyllama, tmp_path):
  import gguf as library

  config, loaded = babyllama(base__bits=4)
  command.export(loaded, config, tmp_path / 'gguf', format='gguf')
  fields = library.GGUFReader(tmp_path / 'gguf' / gguf.FILE).fields
  value = lambda name: fields[name].contents()
  assert value('general.architecture') == 'llama'
  assert value('llama.block_count') == 5 and value('llama.embedding_length') == 128
  assert value('llama.attention.head_count') == 8 and value('llama.attention.head_count_kv') == 4
  assert value('llama.context_length') == 256 and value('llama.feed_forward_length') == 352
  assert value('llama.rope.freq_base') == 10000.0 and value('llama.vocab_size') == 105
  assert value('llama.attention.layer_norm_rms_epsilon') == pytest.approx(1e-5)
  tokens, scores = value('tokenizer.ggml.tokens'), value('tokenizer.ggml.scores')
  processor = tokenizer_lib.load(loaded.tokenizer_from)
  assert len(tokens) == len(scores) == processor.vocab_size
  assert tokens[:4] == ['<unk>', '<s>', '</s>', '▁'] and value('tokenizer.ggml.token_type')[:4] == [2, 3, 3, 1]
  assert (value('tokenizer.ggml.bos_token_id'), value('tokenizer.ggml.eos_token_id')) == (1, 2)
  assert value('tokenizer.ggml.model') == 'llama' and value('tokenizer.ggml.add_space_prefix') is True


def test_inputs_that_do_not_fill_blocks_are_refused(assets, tmp_path):
  config = config_lib.default().copy_and_resolve_references()
  loaded = build.load_model(config, str(assets / 'models' / 'stories260K'))
  with pytest.raises(ValueError, match='--dtype=q8_0: the 172 inputs of .*down_proj.weight do not divide'):
    command.export(loaded, config, tmp_path / 'out', format='gguf', dtype='q8_0')
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('dtype, kind', [('float16', 'F16'), ('bfloat16', 'BF16'), ('q8_0', 'Q8_0')])
def test_what_is_dense_is_stored_as_asked(babyllama, tmp_path, dtype, kind):
  import gguf as library

  config, loaded = babyllama(base__bits=3)
  command.export(loaded, config, tmp_path / 'gguf', format='gguf', dtype=dtype, widen=True)
  kinds = [tensor.tensor_type.name for tensor in library.GGUFReader(tmp_path / 'gguf' / gguf.FILE).tensors]
  assert {name: kinds.count(name) for name in kinds} == {kind: 36, 'F32': 11}


def test_added_tokens_stand_in_a_gguf_vocabulary(assets, tmp_path):
  shutil.copy(assets / 'models' / 'babyllama_tok105' / 'tokenizer.model', tmp_path)
  (tmp_path / 'added_tokens.json').write_text('{"<|im_start|>": 106}')
  found = gguf.vocabulary(tmp_path)
  assert found.tokens[104:] == [found.tokens[104], '[PAD105]', '<|im_start|>']
  assert found.kinds[105:] == [5, 3] and len(found.scores) == 107


@pytest.fixture
def byte_pairs(tmp_path):
  """A directory with a byte-level tokenizer.json, its pre-tokenizer replaced where given."""

  def make(before=None, **more):
    tokenizer_lib.train_bpe(['the cat sat on the mat', 'the dog'], 270, tmp_path / 'bpe')
    file = tmp_path / 'bpe' / 'tokenizer.json'
    stated = json.loads(file.read_text()) | more
    if before:
      stated['pre_tokenizer'] = before
    file.write_text(json.dumps(stated))
    return tmp_path / 'bpe'

  return make


LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern):
  words = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
  letters = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
  return {'type': 'Sequence', 'pretokenizers': [words, letters]}


@pytest.mark.parametrize(
  'before, words',
  [(None, 'gpt-2'), (split(LLAMA3), 'llama-bpe'), (split(LLAMA3.replace('{1,3}', '')), 'qwen2')],
)
def test_byte_pairs_are_held(byte_pairs, before, words):
  directory = byte_pairs(before)
  found, own = gguf.vocabulary(directory), tokenizer_lib.load(directory)
  assert (found.model, found.words) == ('gpt2', words)
  assert len(found.tokens) == own.vocab_size and found.tokens[:2] == ['<s>', '</s>'] and found.kinds[:3] == [3, 3, 1]
  # Merged by hand, the pairs make of a word what the tokenizer makes of it.
  pieces = list('cat')
  for pair in found.merges:
    one, two = pair.split(' ')
    for at in range(len(pieces) - 1):
      if pieces[at : at + 2] == [one, two]:
        pieces[at : at + 2] = [one + two]
        break
  assert [found.tokens.index(piece) for piece in pieces] == own.encode('cat')


@pytest.mark.parametrize(
  'more', [{'before': split(r'\w+')}, {'normalizer': {'type': 'NFC'}}, {'before': {'type': 'Whitespace'}}]
)
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(byte_pairs, babyllama, tmp_path, more):
  config, loaded = babyllama(base__bits=4)
  other = build.Loaded(loaded.model, loaded.variables, loaded.tokenizer, byte_pairs(**more), loaded.origin)
  with pytest.raises(ValueError, match='tokenizer.json: llama.cpp knows byte-level BPE'):
    command.export(other, config, tmp_path / 'out', format='gguf')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  'changes, format, message',
  [
    ({'base__bits': 3}, 'gguf', r'q_proj.weight holds integer codes of 3 bits.*--dense.*--format=mlx'),
    ({'base__bits': 8}, 'gguf', r'8 bits in groups of 32 with offsets'),
    ({'base__bits': 4, 'base__group': 16}, 'gguf', 'groups of 16'),
    ({'base__bits': 4, 'base__group': 16}, 'mlx', 'groups of 16 inputs; MLX knows 32, 64, 128'),
    ({'base__method': 'nf4'}, 'mlx', 'holds nf4 codes, and MLX has no such table'),
    ({'base__method': 'nf4'}, 'gguf', 'holds nf4 codes'),
    ({'base__method': 'nf4'}, 'hf-gptq', r'one width and group of integer codes'),
    ({'base__bits': 4, 'base__rules': 'down_proj: bits=3'}, 'hf-gptq', '3 bits .* and|3 bits .*, 4 bits'),
    ({'base__bits': 4}, 'hf-gptq', r'steps from an integer zero-point.*change the weights by .*%.*--allow-lossy'),
    ({'base__method': 'stored', 'kind': 'none'}, 'hf-gptq', 'nothing in this model is quantized'),
    ({'kind': 'lora', 'base__bits': 4}, 'mlx', 'carry a LoRA adapter'),
  ],
)
def test_what_a_format_cannot_hold_is_refused(babyllama, tmp_path, changes, format, message):
  config, loaded = babyllama(**changes)
  with pytest.raises(ValueError, match=message):
    command.export(loaded, config, tmp_path / 'out', format=format)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('format', ['mlx', 'gguf', 'hf', 'qalora', 'hf-gptq'])
def test_a_directory_that_is_not_read_back_as_it_was_never_appears(babyllama, tmp_path, monkeypatch, format):
  integer = {'kind': 'none', 'base__zero': 'integer', 'base__scale_dtype': 'float16'}
  config, loaded = babyllama(base__bits=4, **(integer if format == 'hf-gptq' else {}))
  write = command.FORMATS[format].write

  def damage(directory, job, progress=None):
    write(directory, job, progress)
    file = next(directory.glob('model.*'))
    data = bytearray(file.read_bytes())
    data[-100] ^= 0x70
    file.write_bytes(data)

  monkeypatch.setattr(command.FORMATS[format], 'write', damage)
  with pytest.raises(ValueError, match='not written: '):
    command.export(loaded, config, tmp_path / 'out', format=format)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('format', ['mlx', 'gguf'])
def test_an_export_that_is_stopped_leaves_nothing(babyllama, tmp_path, monkeypatch, format):
  config, loaded = babyllama(base__bits=4)
  parts = layout.parts

  def stops(*arguments):
    for at, part in enumerate(parts(*arguments)):
      if at == 30 and not isinstance(jax.tree.leaves(part[2])[0], jax.ShapeDtypeStruct):
        raise KeyboardInterrupt
      yield part

  monkeypatch.setattr(layout, 'parts', stops)
  with pytest.raises(KeyboardInterrupt):
    command.export(loaded, config, tmp_path / 'out', format=format)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('bits', [8, 4, 3, 2])
def test_codes_in_a_stream_come_back(bits):
  codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 96), np.uint8)
  words = bitstream.pack(codes, bits)
  assert words.shape == (3, 96 * bits // 32)
  np.testing.assert_array_equal(bitstream.unpack(words, bits), codes)
  # Bit k of code n is bit n * bits + k of the stream.
  stream = sum(int(code) << (at * bits) for at, code in enumerate(codes[0]))
  assert [int(word) for word in words[0]] == [(stream >> (32 * at)) & (2**32 - 1) for at in range(words.shape[1])]


def test_three_bits_are_packed_as_in_autogptq():
  """Its loop, written out: ten codes, one that straddles, ten, one that straddles, ten."""
  codes = np.random.default_rng(0).integers(0, 8, 32).astype(np.uint32)
  words = np.zeros(3, np.uint32)
  for at in range(10):
    words[0] |= codes[at] << np.uint32(3 * at)
    words[1] |= codes[at + 11] << np.uint32(3 * at + 1)
    words[2] |= codes[at + 22] << np.uint32(3 * at + 2)
  words[0] |= codes[10] << np.uint32(30)
  words[1] |= (codes[10] >> np.uint32(2)) & np.uint32(1)
  words[1] |= codes[21] << np.uint32(31)
  words[2] |= (codes[21] >> np.uint32(1)) & np.uint32(3)
  np.testing.assert_array_equal(bitstream.pack(codes, 3), words)


@pytest.mark.parametrize(
  'changes', [{}, {'base__symmetric': True}, {'base__group': -1}], ids=['', 'symmetric', 'columns']
)
@pytest.mark.parametrize('bits', [8, 4, 3, 2])
def test_a_gptq_checkpoint_is_the_base_again(babyllama, tmp_path, bits, changes):
  """And an adapter trains and merges on it as on any other base."""
  own = {'base__bits': bits, 'base__zero': 'integer', 'base__scale_dtype': 'float16', 'kind': 'none'} | changes
  if changes.get('base__group') == -1:
    own['base__targets'] = 'attention'  # one group size for all
  config, loaded = babyllama(**own)
  command.export(loaded, config, tmp_path / 'gptq', format='hf-gptq')
  assert stored.form(tmp_path / 'gptq') is gptq_files
  again = build.load_model(config_lib.default(), str(tmp_path / 'gptq'))
  for before, after in zip(
    layout.parts(loaded.model.config, loaded.variables['frozen']),
    layout.parts(again.model.config, again.variables['frozen']),
    strict=True,
  ):
    if isinstance(before[2], qtensor.QTensor):
      np.testing.assert_array_equal(qtensor.codes(before[2]), qtensor.codes(after[2]))
      np.testing.assert_array_equal(before[2].scale, after[2].scale)
      # The offset was rounded to float16; the zero-point makes it again without.
      step = np.asarray(qtensor.scales(before[2])) * 2**bits * 2.0**-11
      assert (np.abs(qtensor.offsets(before[2]) - qtensor.offsets(after[2])) <= step).all()
    else:
      np.testing.assert_array_equal(before[2], after[2])


def gptq_files_by_hand(directory, target, zero, version):
  """A GPTQ checkpoint of 4-bit q_proj matrices, written without this package: v1 stores zero - 1."""
  weights = safetensors_numpy.load_file(directory / 'model.safetensors')
  rng, dense = np.random.default_rng(0), {}
  for name in [name for name in weights if 'q_proj' in name]:
    module = name.removesuffix('.weight')
    outputs, inputs = weights.pop(name).shape
    codes = rng.integers(0, 16, (inputs, outputs)).astype(np.uint64)
    scales = rng.uniform(0.01, 0.02, (inputs // 32, outputs)).astype(np.float16)
    shifts = 4 * np.arange(8, dtype=np.uint64)
    words = (codes.reshape(-1, 8, outputs) << shifts[:, None]).sum(1).astype(np.uint32)
    kept = np.full((inputs // 32, outputs), zero - (version == 'gptq'), np.uint64)
    zeros = (kept.reshape(kept.shape[0], -1, 8) << shifts).sum(-1).astype(np.uint32)
    weights |= {f'{module}.qweight': words.view(np.int32), f'{module}.qzeros': zeros.view(np.int32)}
    weights |= {f'{module}.scales': scales, f'{module}.g_idx': (np.arange(inputs) // 32).astype(np.int32)}
    dense[name] = (codes.astype(np.float32) - zero) * np.repeat(scales.astype(np.float32), 32, axis=0)
  target.mkdir()
  stated = json.loads((directory / 'config.json').read_text())
  stated['quantization_config'] = {'quant_method': 'gptq', 'bits': 4, 'group_size': 32, 'desc_act': False}
  if version != 'gptq':
    stated['quantization_config']['checkpoint_format'] = version
  (target / 'config.json').write_text(json.dumps(stated))
  safetensors_numpy.save_file(weights, target / 'model.safetensors')
  shutil.copy(directory / 'tokenizer.model', target)
  return dense


@pytest.mark.parametrize('zero, version', [(7, 'gptq'), (15, 'gptq'), (0, 'gptq_v2'), (8, 'gptq_v2')])
def test_gptq_checkpoints_of_others_are_read(babyllama, tmp_path, zero, version):
  source = babyllama(kind='none')[1].tokenizer_from
  dense = gptq_files_by_hand(source, tmp_path / 'in', zero, version)
  loaded = build.load_model(config_lib.default(), str(tmp_path / 'in'))
  for _, name, leaf in layout.parts(loaded.model.config, loaded.variables['frozen']):
    if name in dense:
      # The offset is a number of float32 steps apart from zero * scale: exactly so.
      np.testing.assert_allclose(verify.dense(leaf), dense[name], rtol=0, atol=16 * 0.02 * 2.0**-24)


def test_qalora_trains_on_a_gptq_checkpoint_and_merges(babyllama, tmp_path):
  source = babyllama(kind='none')[1].tokenizer_from
  gptq_files_by_hand(source, tmp_path / 'in', 8, 'gptq')
  config = config_lib.default().copy_and_resolve_references()
  config.model.source, config.adapter.targets, config.adapter.rank = str(tmp_path / 'in'), 'q_proj', 4
  built = build.setup(config)
  drawn = build.variables(built, sharding.make_mesh(devices=jax.devices()[:1]), seed=0)
  drawn['params'] = jax.tree.map(lambda leaf: leaf + 0.01, drawn['params'])
  merged = merge.merge(drawn['frozen'], drawn['params'])
  assert merge.check(built.model, drawn['frozen'], drawn['params'], merged).holds
  with pytest.raises(ValueError, match='holds no adapter to begin with'):
    stored.check_beginning(tmp_path / 'in', {'init': 'pissa'})


@pytest.mark.parametrize(
  'change, message',
  [
    ({'bits': 5}, 'bits = 5; supported: 8, 4, 3, 2'),
    ({'checkpoint_format': 'marlin'}, "checkpoint_format = 'marlin'"),
    ({'dynamic': {'a': {}}}, 'widths of its own'),
    ({'group_size': 48}, '128 inputs do not divide into groups of 48'),
    ({'group_size': 64}, 'has shape'),
    ({'quant_method': 'awq'}, "quant_method 'awq'; the weights have to be dense, or GPTQ's"),
    ('g_idx', 'scatters the inputs of a group .act-order'),
    ('bias', 'q_proj.bias is not zero, and the model of its config.json has no such bias'),
    ('qzeros', 'q_proj.qzeros is missing'),
  ],
)
def test_a_gptq_checkpoint_that_is_not_understood_is_refused(babyllama, tmp_path, change, message):
  gptq_files_by_hand(babyllama(kind='none')[1].tokenizer_from, tmp_path / 'in', 8, 'gptq')
  file, weights = tmp_path / 'in' / 'config.json', tmp_path / 'in' / 'model.safetensors'
  if isinstance(change, dict):
    stated = json.loads(file.read_text())
    stated['quantization_config'] |= change
    file.write_text(json.dumps(stated))
  else:
    tensors = safetensors_numpy.load_file(weights)
    name = f'model.layers.0.self_attn.q_proj.{change}'
    if change == 'g_idx':
      tensors[name] = tensors[name][::-1].copy()
    elif change == 'bias':
      tensors[name] = np.ones(128, np.float16)
    else:
      del tensors[name]
    safetensors_numpy.save_file(tensors, weights)
  with pytest.raises(ValueError, match=message):
    build.load_model(config_lib.default(), str(tmp_path / 'in'))


def test_rounding_zero_points_is_done_on_request(babyllama, tmp_path):
  config, loaded = babyllama(base__bits=4)
  command.export(loaded, config, tmp_path / 'out', format='hf-gptq', lossy=True)
  again = build.load_model(config_lib.default(), str(tmp_path / 'out'))
  zeros = [leaf for leaf in jax.tree.leaves(again.variables['frozen']) if leaf.dtype == jnp.float32 and leaf.ndim == 3]
  assert zeros
