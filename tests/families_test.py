"""Every family of decoders: transformers' numbers, names and configs both ways, and all methods on each of them."""

import dataclasses
import functools
import json

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors import numpy as safetensors_numpy
import small_llama
import torch
import transformers

from qalora_jax import adapters
from qalora_jax import calibrate
from qalora_jax import families
from qalora_jax import gptq_files
from qalora_jax import hf
from qalora_jax import layout
from qalora_jax import packed
from qalora_jax import peft
from qalora_jax import sharding
from qalora_jax import step as step_lib
from qalora_jax import tensors
from qalora_jax.export import gguf
from qalora_jax.export import gptq as gptq_export
from qalora_jax.export import job as job_lib
from qalora_jax.export import merge
from qalora_jax.export import mlx
from qalora_jax.models import attention
from qalora_jax.models import decoder
from qalora_jax.models import linear
from qalora_jax.quant import affine
from qalora_jax.quant import gptq
from qalora_jax.quant import method
from qalora_jax.quant import qtensor

# Every size differs from every other; heads are wider than D / H where the family lets them; 5 places of 24 are seen.
SIZES = dict(
  vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
  num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
WIDE = dict(SIZES, head_dim=8)
STRETCH = dict(
  rope_type='llama3',
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=64,
)
LAST = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
GEMMA = dict(WIDE, sliding_window=5, query_pre_attn_scalar=20)
GPT2 = dict(
  vocab_size=50, n_positions=64, n_embd=24, n_layer=3, n_head=4, n_inner=40, bos_token_id=1, eos_token_id=2
)  # fmt: skip
# {name: (model_type, what its config.json says)}
MODELS = {
  'llama': ('llama', dict(WIDE, attention_bias=True, mlp_bias=True, rope_scaling=STRETCH, rope_theta=1000.0)),
  'mistral': ('mistral', dict(WIDE, sliding_window=5)),
  'qwen2': ('qwen2', dict(WIDE, **LAST, tie_word_embeddings=True)),
  'qwen3': ('qwen3', dict(WIDE, **LAST, attention_bias=True)),
  'gemma2': ('gemma2', dict(GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
  'gemma3': (
    'gemma3_text',
    dict(GEMMA, layer_types=['sliding_attention', 'sliding_attention', 'full_attention'], rope_theta=1000.0)
    | dict(rope_local_base_freq=100.0, rope_scaling=dict(rope_type='linear', factor=4.0)),
  ),
  'phi3': ('phi3', dict(SIZES, sliding_window=5)),
  'gpt2': ('gpt2', GPT2),
}
EVERY = pytest.mark.parametrize('name', MODELS)
TOKENS = np.random.default_rng(1).integers(0, SIZES['vocab_size'], (2, 24)).astype(np.int32)
DENSE = linear.Scheme()
# Queries and keys of heads of 8 or 6, so groups of 4 divide every matrix's inputs.
ROUND = affine.Affine(4, 4)
ALL = linear.Scheme(quantizers=(('all', ROUND),))
# One matrix of every line but the first of an mlp, which is as the last.
SOME = '(q|o|down)_proj$'
QALORA = linear.Scheme(quantizers=((SOME, ROUND),), adapter=adapters.Adapter('qalora', 2, 4.0), adapted=SOME)
EPS = float(jnp.finfo(jnp.float32).eps)


@pytest.fixture(scope='module', autouse=True)
def _quick():
  """Programs of these tests run once."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What transformers wrote, its logits in float32 and in float64."""

  directory: object
  config: decoder.Config
  single: np.ndarray
  exact: np.ndarray

  @property
  def allowed(self) -> float:
    """How far another float32 evaluation may stray, see small_llama.agrees_elsewhere."""
    rounding = np.abs(self.single - self.exact).max()
    assert 8 * rounding < 1e-3 * np.abs(self.exact).max()
    return 8 * rounding


def theirs(model, tokens=TOKENS):
  with torch.no_grad():
    return model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """checkpoint(name): a random model of MODELS."""

  @functools.cache
  def make(name):
    model_type, said = MODELS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **json.loads(json.dumps(said)))
    # Soft caps are left out by other implementations of attention.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval()
    with torch.no_grad():
      for key, weight in model.named_parameters():
        # Gemma's scales are stored less 1.
        is_scale = weight.ndim == 1 and key.endswith('weight') and 'gemma' not in model_type
        weight.normal_(1.0 if is_scale else 0.02, 0.2)
    place = tmp_path_factory.mktemp(name) / 'model'
    model.save_pretrained(place)
    single = theirs(model)
    return Checkpoint(place, hf.read_config(place), single, theirs(model.double()))

  return make


@pytest.fixture(scope='module')
def tree(checkpoint):
  """tree(name): its weights, as they are."""
  return functools.cache(lambda name: hf.load(checkpoint(name).directory, checkpoint(name).config, DENSE))


def logits(config, variables, tokens=TOKENS, **more):
  return np.asarray(_logits(config, variables, jnp.asarray(tokens), **more))


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, variables, tokens, **more):
  return families.of(config).module(config).apply(variables, tokens, **more)


@functools.cache
def born(config, scheme=QALORA):
  """Adapters that matter for a model of this config."""
  made = jax.eval_shape(decoder.Decoder(config, scheme).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype), nn.unbox(made)['params'])


@EVERY
def test_logits_are_those_of_transformers(checkpoint, tree, name):
  found = checkpoint(name)
  assert found.config.family == MODELS[name][0]
  assert np.abs(logits(found.config, {'frozen': tree(name)}) - found.exact).max() <= found.allowed


# What each config says beside sizes, and what would be computed without it.
FIELDS = [
  *(('llama', dict(rope_scaling=None)), ('llama', dict(rope_theta=500.0)), ('llama', dict(activation='relu'))),
  *(('mistral', dict(window=0)), ('mistral', dict(window=6)), ('qwen2', dict(window=6))),
  ('qwen2', dict(kinds=('sliding_attention',) * 3)),
  *(('gemma2', dict(attention_cap=0.0)), ('gemma2', dict(logit_cap=0.0)), ('gemma2', dict(norm_shift=0.0))),
  *(('gemma2', dict(attention_scale=0.0)), ('gemma2', dict(embedding_scale=1.0)), ('gemma2', dict(kinds=(), window=0))),
  *(('gemma3', dict(local_theta=0.0)), ('gemma3', dict(rope_scaling=None)), ('gemma3', dict(kinds=()))),
  *(('phi3', dict(window=4)), ('gpt2', dict(activation='gelu')), ('gpt2', dict(attention_scale=1.0))),
]


@pytest.mark.parametrize('name, change', FIELDS)
def test_the_comparison_sees_what_the_config_says(checkpoint, tree, name, change):
  found = checkpoint(name)
  other = logits(dataclasses.replace(found.config, **change), {'frozen': tree(name)})
  assert np.abs(other - found.exact).max() > 10 * found.allowed


@EVERY
def test_written_it_is_read_the_same_here_and_elsewhere(checkpoint, tree, tmp_path, name):
  found = checkpoint(name)
  hf.write(tmp_path / 'out', found.config, tree(name), bos=1, eos=2)
  assert hf.read_config(tmp_path / 'out') == found.config
  small_llama.same(hf.load(tmp_path / 'out', found.config, DENSE), tree(name))
  stored = [safetensors_numpy.load_file(place / tensors.SINGLE) for place in (tmp_path / 'out', found.directory)]
  small_llama.same(*stored)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', attn_implementation='eager').eval()
  np.testing.assert_array_equal(theirs(model), found.single)


@EVERY
def test_a_step_moves_the_adapter_alone_and_merging_changes_nothing(checkpoint, name):
  found = checkpoint(name)
  model = decoder.Decoder(found.config)
  frozen, params = hf.load(found.directory, found.config, QALORA), born(found.config)
  batch = {
    'tokens': jnp.asarray(TOKENS),
    'loss_mask': jnp.ones_like(TOKENS),
    'segments': jnp.ones_like(TOKENS),
    'positions': jnp.broadcast_to(jnp.arange(TOKENS.shape[1], dtype=jnp.int32)[None], TOKENS.shape),
  }
  tx = optax.sgd(0.1)
  step = jax.jit(functools.partial(step_lib.train_step, model, tx, 0, 1))
  state, metrics = step(step_lib.init_state(tx, params), frozen, batch)
  assert np.isfinite(metrics['loss'])
  moved = jax.tree.map(lambda new, old: bool((new != old).any()), state.params, params)
  assert all(jax.tree.leaves(moved))
  adapted = logits(found.config, {'frozen': frozen, 'params': state.params})
  merged = logits(found.config, {'frozen': merge.merge(frozen, state.params)})
  assert np.abs(adapted - merged).max() <= found.allowed
  # What the adapter does is no rounding: the same model without its update is far away.
  still = jax.tree.map(jnp.zeros_like, state.params)
  assert np.abs(adapted - logits(found.config, {'frozen': frozen, 'params': still})).max() > 100 * found.allowed


@EVERY
def test_logits_with_a_past_are_those_of_the_whole_text(checkpoint, tree, name):
  """Prompts shorter and longer than the window, side by side, then 9 tokens one at a time."""
  found, variables = checkpoint(name), {'frozen': tree(name)}
  model, lengths, rows = decoder.Decoder(found.config), np.array([3, 12]), np.arange(2)
  apply = jax.jit(functools.partial(model.apply, mutable=[attention.PRESENT]))
  padded = np.where(np.arange(12)[None] < lengths[:, None], TOKENS[:, :12], 7)
  logits, made = apply(variables, padded)
  past = jax.tree.map(lambda leaf: np.pad(leaf, [(0, 0)] * 3 + [(0, 12), (0, 0)]), made[attention.PRESENT])
  written = [logits[rows, lengths - 1]]
  for step in range(9):
    at = lengths + step
    logits, made = apply({**variables, attention.PAST: past}, TOKENS[rows, at][:, None], positions_BT=at[:, None])
    for old, new in zip(jax.tree.leaves(past), jax.tree.leaves(made[attention.PRESENT]), strict=True):
      old[:, rows, :, at] = np.asarray(new)[:, :, :, 0].swapaxes(0, 1)
    written.append(logits[:, 0])
  wanted = np.stack([found.exact[rows, lengths - 1 + step] for step in range(10)])
  assert np.abs(np.stack(written) - wanted).max() <= found.allowed


@pytest.mark.parametrize('name', ['gemma2', 'gemma3', 'gpt2'])
def test_documents_that_share_a_row_do_not_see_each_other(checkpoint, tree, name):
  found, variables = checkpoint(name), {'frozen': tree(name)}
  segments = np.where(np.arange(24)[None] < 9, 1, 2) * np.ones_like(TOKENS)
  positions = np.where(segments == 1, np.arange(24)[None], np.arange(24)[None] - 9)
  packed_ = logits(found.config, variables, segments_BT=segments, positions_BT=positions)
  alone = np.roll(TOKENS, -9, axis=1)
  assert np.abs(packed_[:, 9:] - logits(found.config, variables, alone)[:, :15]).max() <= found.allowed
  assert np.abs(packed_[:, :9] - found.exact[:, :9]).max() <= found.allowed


def test_attention_in_pieces_is_attention(checkpoint, tree, monkeypatch):
  """Windows that differ by layer and capped scores, forward and backward, when few scores may be made at once."""
  found, frozen = checkpoint('gemma2'), tree('gemma2')
  model = decoder.Decoder(dataclasses.replace(found.config, remat='full'))

  def loss(frozen):
    return jnp.sum(jnp.square(model.apply({'frozen': frozen}, jnp.asarray(TOKENS))))

  whole = jax.jit(jax.grad(loss))(frozen)
  # Scores of 5 of the 24 queries.
  monkeypatch.setattr(attention, 'SCORES', 5 * 2 * 4 * 24 * 4)
  pieces = jax.jit(jax.grad(lambda frozen: loss(frozen)))(frozen)
  for one, two in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
    # The same sums of some hundred products, through three layers, in another order.
    np.testing.assert_allclose(two, one, rtol=0, atol=3 * 7 * 40 * EPS * float(jnp.abs(one).max()))


@pytest.mark.parametrize('name', ['gemma2', 'gemma3', 'gpt2'])
def test_calibration_sees_the_model_it_quantizes(checkpoint, tree, name):
  """The blocks one after another, in parts, make what the model makes of the tokens, whatever a layer sees."""
  found, own = checkpoint(name), tree(name)
  outside = {path: leaf for path, leaf in own.items() if path != 'layers'}
  mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
  running = calibrate.Activations(found.config, outside, TOKENS, 2, mesh)
  for layer in range(3):
    block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], own['layers'])
    for part in found.config.sequence['layers']:
      running.advance(layer, block, part)
  hidden = decoder.Decoder(found.config).apply({'frozen': own}, jnp.asarray(TOKENS), method='hidden')
  (last,) = running._x
  np.testing.assert_allclose(last, hidden, rtol=0, atol=3 * 7 * 40 * EPS * float(jnp.abs(hidden).max()))


@pytest.mark.parametrize('name', ['gemma2', 'gpt2'])
def test_gptq_beats_rounding(checkpoint, tmp_path, name):
  found = checkpoint(name)
  samples = np.random.default_rng(2).integers(0, 50, (6, 24)).astype(np.int32)

  def rows(chosen):
    made = calibrate.quantize(
      hf.Source(found.directory, found.config),
      found.config,
      linear.Scheme(quantizers=(('(o|down)_proj$', chosen),)),
      samples,
      mesh=sharding.make_mesh(data=1, devices=jax.devices()[:1]),
      partial=tmp_path / str(chosen.solver is None),
      settings={},
    )
    return {row['weight']: row['output_error'] for row in made.rows}

  rounded = rows(method.Method(affine.Affine(3, 4)))
  better = rows(method.Method(affine.Affine(3, 4), gptq.GPTQ(damping=0.05)))
  assert len(rounded) == 3 * 2
  # Each in the mean over the layers: what stands before it is quantized otherwise, and so are its inputs.
  mean = lambda errors, matrix: np.mean([error for weight, error in errors.items() if weight.endswith(matrix)])
  for matrix in ('o_proj', 'down_proj'):
    assert mean(better, matrix) < mean(rounded, matrix)


def is_quantized(node):
  return isinstance(node, qtensor.QTensor)


@EVERY
def test_quantized_directories_are_read_bit_for_bit(checkpoint, tmp_path, name):
  found = checkpoint(name)
  frozen = hf.load(found.directory, found.config, ALL)
  matrices = [leaf for leaf in jax.tree.leaves(frozen, is_leaf=is_quantized) if is_quantized(leaf)]
  assert len(matrices) == len(linear.matrices(found.config.sequence['layers']))
  # Biases stay dense, and are there: as many as the config says, and the norms' own.
  biases = [path for path in layout.names(found.config) if path.endswith('/bias')]
  assert len(biases) == len(found.config.biased) + (3 if name == 'gpt2' else 0)
  packed.write(tmp_path / 'out', found.config, frozen, provenance={})
  assert hf.read_config(tmp_path / 'out') == found.config
  small_llama.same(packed.load(tmp_path / 'out', found.config), frozen)


@pytest.mark.parametrize('name', ['qwen2', 'gemma3'])
def test_adapters_are_written_and_read_in_pefts_names(checkpoint, tmp_path, name):
  found, params = checkpoint(name), born(checkpoint(name).config)
  peft.write(tmp_path / 'adapter', found.config, params, base='a model')
  chosen = peft.describe(tmp_path / 'adapter', found.config)
  assert (chosen['kind'], chosen['rank']) == ('qalora', 2)
  blank = jax.eval_shape(lambda: params)
  again = peft.load(tmp_path / 'adapter', found.config, blank)
  # B is scaled and scaled back.
  jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=4 * EPS), again, params)


@pytest.mark.parametrize('name', ['phi3', 'gpt2'])
def test_what_is_stored_otherwise_is_refused_where_names_are_modules(checkpoint, tmp_path, name):
  found = checkpoint(name)
  family = f"model_type '{MODELS[name][0]}'"
  with pytest.raises(ValueError, match=f'{family}: .* PEFT adapts modules'):
    peft.write(tmp_path / 'adapter', found.config, born(found.config), base='')
  job = job_lib.Job(found.config, {})
  for room in (gguf, mlx, gptq_export):
    with pytest.raises(ValueError, match=family):
      room.check(job)


@pytest.mark.parametrize(
  'room, name, said',
  [
    (gguf, 'gemma2', "model_type 'gemma2': the gguf files written here are of llama.cpp's `llama`"),
    (gguf, 'llama', 'a LLaMA with biases: the gguf files'),
    (gguf, 'mistral', 'sliding_window = 5: the gguf files'),
    (mlx, 'gemma3', "model_type 'gemma3_text': MLX directories are written of llama, mistral"),
    (mlx, 'mistral', 'sliding_window = 5: mlx_lm lets the tokens of a mistral see all'),
  ],
)
def test_exports_refuse_what_their_readers_compute_otherwise(checkpoint, room, name, said):
  with pytest.raises(ValueError, match=said):
    room.check(job_lib.Job(checkpoint(name).config, {}))


def test_a_mistral_that_sees_everything_is_a_llama_to_llama_cpp(assets, tmp_path):
  """512 tokens, as many as the tokenizer that goes along."""
  config = decoder.Config(512, 32, 64, 2, 4, 2, max_position_embeddings=64, family='mistral')
  frozen = hf_quantized(config, tmp_path, affine.Affine(4, 32))
  job = job_lib.Job(config, frozen, tokenizer_from=assets / 'models' / 'stories260K', bos=1, eos=2)
  gguf.check(job)
  gguf.write(tmp_path / 'gguf', job)
  gguf.verify(tmp_path / 'gguf', job)


def hf_quantized(config, tmp_path, quantizer):
  hf.write(tmp_path / 'dense', config, small_llama.draw(config))
  return hf.load(tmp_path / 'dense', config, linear.Scheme(quantizers=(('all', quantizer),)))


def test_gptq_files_keep_biases(checkpoint, tmp_path):
  """Of a model that has them; elsewhere a bias is none of the model's."""
  found = checkpoint('qwen3')
  scheme = linear.Scheme(quantizers=(('q_proj', affine.Affine(8, 4, zero='integer')),))
  job = job_lib.Job(found.config, hf.load(found.directory, found.config, scheme))
  gptq_export.check(job)
  gptq_export.write(tmp_path / 'out', job)
  gptq_export.verify(tmp_path / 'out', job)
  forms = packed.scheme_of(gptq_files.describe(tmp_path / 'out'))
  again = gptq_files.load(tmp_path / 'out', found.config, forms)
  assert np.abs(logits(found.config, {'frozen': again}) - logits(found.config, {'frozen': job.tree})).max() < 0.05
  small_llama.same(again['layers']['attention']['q_proj']['bias'], job.tree['layers']['attention']['q_proj']['bias'])


def test_the_published_gpt2_has_other_names_and_masks(checkpoint, tree, tmp_path):
  place = tmp_path / 'model'
  place.mkdir()
  held = safetensors_numpy.load_file(checkpoint('gpt2').directory / tensors.SINGLE)
  old = {name.removeprefix('transformer.'): tensor for name, tensor in held.items()}
  for layer in range(3):
    old[f'h.{layer}.attn.bias'] = np.tri(64, dtype=np.float32)[None, None]
    old[f'h.{layer}.attn.masked_bias'] = np.array(-1e4, np.float32)
  safetensors_numpy.save_file(old, place / tensors.SINGLE)
  small_llama.same(hf.load(place, checkpoint('gpt2').config, DENSE), tree('gpt2'))
  safetensors_numpy.save_file(old | {'transformer.wpe.weight': held['transformer.wpe.weight']}, place / tensors.SINGLE)
  with pytest.raises(ValueError, match=r'wpe\.weight and (transformer\.)?wpe\.weight are the same weight'):
    hf.load(place, checkpoint('gpt2').config, DENSE)


def test_a_gemma_3_that_sees_images_is_read_without_its_eyes(tmp_path):
  text = {**MODELS['gemma3'][1], 'pad_token_id': 0}
  vision = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
  config = transformers.Gemma3Config(
    text_config=text,
    vision_config=vision | dict(image_size=28, patch_size=7),
    mm_tokens_per_image=4,
    image_token_index=49,
    boi_token_index=48,
    eoi_token_index=47,
  )
  torch.manual_seed(0)
  model = transformers.Gemma3ForConditionalGeneration(config).eval()
  model.save_pretrained(tmp_path / 'model')
  tokens = TOKENS % 47
  single = theirs(model, tokens)
  exact = theirs(model.double(), tokens)
  ours = hf.read_config(tmp_path / 'model')
  assert ours.family == 'gemma3_text'
  frozen = hf.load(tmp_path / 'model', ours, DENSE)
  assert np.abs(logits(ours, {'frozen': frozen}, tokens) - exact).max() <= 8 * np.abs(single - exact).max()
  hf.write(tmp_path / 'text', ours, frozen)
  assert hf.read_config(tmp_path / 'text') == ours


# What transformers 4 wrote of the same models, where it says it otherwise.
OLDER = {
  'llama': dict(rope_theta=1000.0, rope_scaling=STRETCH),
  'mistral': dict(rope_theta=10000.0),
  'qwen2': dict(rope_theta=10000.0, layer_types=None),
  'gemma2': dict(rope_theta=10000.0, layer_types=None, hidden_act='gelu_pytorch_tanh'),
  'gemma3': dict(
    rope_theta=1000.0, rope_local_base_freq=100.0, rope_scaling=dict(rope_type='linear', factor=4.0),
    layer_types=None, sliding_window_pattern=3,
  ),
  'phi3': dict(rope_theta=10000.0, rope_scaling=None),
}  # fmt: skip


@pytest.mark.parametrize('name', OLDER)
def test_configs_of_transformers_4_say_the_same(checkpoint, tmp_path, name):
  raw = said(checkpoint, name)
  assert 'rope_parameters' in raw
  del raw['rope_parameters']
  assert read(tmp_path, raw | OLDER[name]) == checkpoint(name).config


def said(checkpoint, name):
  return json.loads((checkpoint(name).directory / hf.CONFIG).read_text())


def read(tmp_path, raw):
  (tmp_path / hf.CONFIG).write_text(json.dumps(raw))
  return hf.read_config(tmp_path)


def test_what_means_the_same_is_read(checkpoint, tmp_path):
  """Null for what is not there, layer_types that say what the window says, a theta within the scaling."""
  for name, change in (
    ('llama', dict(is_causal=True)),
    ('mistral', dict(attention_bias=None, layer_types=['sliding_attention'] * 3)),
    ('gpt2', dict(tie_word_embeddings=None, layer_norm_epsilon=None, is_causal=True)),
    ('gemma2', dict(query_pre_attn_scalar=20.0)),
  ):
    assert read(tmp_path, said(checkpoint, name) | change) == checkpoint(name).config
  raw = said(checkpoint, 'phi3')
  theta = raw.pop('rope_parameters')['rope_theta'] * 2
  assert read(tmp_path, raw | dict(rope_scaling=dict(type='default', rope_theta=theta))).rope_theta == theta


def test_a_head_that_is_not_the_embedding_is_not_tied(checkpoint, tmp_path):
  """It may stand in the file a second time; where it differs, transformers takes it, and config.json is wrong."""
  for name in ('qwen2', 'gpt2'):
    held = safetensors_numpy.load_file(checkpoint(name).directory / tensors.SINGLE)
    (embedding,) = (held[key] for key in held if key.endswith(('embed_tokens.weight', 'wte.weight')))
    place = tmp_path / name
    place.mkdir()
    safetensors_numpy.save_file(held | {'lm_head.weight': embedding.copy()}, place / tensors.SINGLE)
    hf.load(place, checkpoint(name).config, DENSE)
    safetensors_numpy.save_file(held | {'lm_head.weight': embedding * 2}, place / tensors.SINGLE)
    with pytest.raises(ValueError, match='lm_head.weight is not .*, and config.json says that they are one'):
      hf.load(place, checkpoint(name).config, DENSE)


def test_a_model_without_its_head_has_other_names(checkpoint, tree, tmp_path):
  """As transformers' Qwen2Model writes them: what is tied is all there."""
  held = safetensors_numpy.load_file(checkpoint('qwen2').directory / tensors.SINGLE)
  bare = {name.removeprefix('model.'): tensor for name, tensor in held.items()}
  assert set(bare).isdisjoint(held)
  safetensors_numpy.save_file(bare, tmp_path / tensors.SINGLE)
  small_llama.same(hf.load(tmp_path, checkpoint('qwen2').config, DENSE), tree('qwen2'))


def test_gemma_3_scales_either_kind_of_layer(checkpoint, tmp_path):
  raw = said(checkpoint, 'gemma3')
  raw['rope_parameters']['sliding_attention'] |= dict(rope_type='linear', factor=2.0)
  config = read(tmp_path, raw)
  assert config.local_scaling is not None and config.local_scaling != config.rope_scaling
  hf.write_config(tmp_path, config)
  assert hf.read_config(tmp_path) == config


REFUSED = [
  *(('llama', dict(hidden_act='swiglu'), "hidden_act = 'swiglu'; supported: silu, relu, gelu"),),
  *(('llama', dict(rope_parameters=dict(rope_type='yarn', factor=2.0)), "RoPE is scaled as 'yarn'; supported"),),
  *(('llama', dict(rope_parameters=dict(full_attention={})), 'rope_parameters differ by layer'),),
  *(
    (name, dict(is_causal=said), f'is_causal = {said}; only True') for name, said in (('qwen2', False), ('gpt2', None))
  ),
  (
    'llama',
    dict(rope_theta=None, rope_parameters=dict(rope_theta='1e6')),
    "rope_theta = '1e6'; it is a number above 0",
  ),
  ('llama', dict(rope_parameters=None, rope_scaling='linear'), "rope_scaling = 'linear'; it is an object"),
  (
    'llama',
    dict(rope_parameters=None, rope_scaling=dict(type='linear', factor=None)),
    'scaling "linear" has no factor',
  ),
  ('llama', dict(rope_parameters=None, rope_scaling=dict(type='linear', factor=-1.0)), 'factor = -1.0; it is a number'),
  ('llama', dict(rms_norm_eps='1e-5'), "rms_norm_eps = '1e-5'; it is a number above 0"),
  (
    'llama',
    dict(rope_parameters=None, rope_theta=1e4, rope_scaling=dict(rope_type='default', rope_theta=1e6)),
    'rope_scaling says rope_theta = 1000000.0, and rope_theta = 10000.0: leave one away',
  ),
  (
    'qwen3',
    dict(rope_scaling=dict(type='linear', factor=2.0)),
    'rope_parameters and rope_scaling say different things',
  ),
  ('gemma3', dict(rope_scaling=dict(type='linear', factor=2.0)), 'rope_parameters and rope_scaling say different'),
  ('qwen3', dict(layer_types=None, max_window_layers='1'), "max_window_layers = '1'; it is a count of at least 0"),
  ('gemma2', dict(query_pre_attn_scalar=0), 'query_pre_attn_scalar = 0; it is a number above 0'),
  (
    'gemma3',
    dict(layer_types=None, sliding_window_pattern=0),
    'sliding_window_pattern = 0; it is a count of at least 1',
  ),
  ('gemma3', dict(model_type='gemma3', text_config=dict(tie_word_embeddings=False), tie_word_embeddings=True), 'twice'),
  ('llama', dict(model_type=['llama']), "model_type is \\['llama'\\]; supported"),
  (
    'mistral',
    dict(layer_types=['full_attention'] * 3),
    "layer_types has 'full_attention'; with this sliding_window every",
  ),
  ('mistral', dict(sliding_window=0), 'sliding_window = 0; it is a count'),
  ('mistral', dict(attention_bias=True), 'attention_bias = True; only False'),
  ('mistral', dict(num_key_value_heads=...), 'has no "num_key_value_heads"'),
  ('qwen2', dict(layer_types=['sliding_attention'] * 2), r"layer_types = \['sliding_attention', 'sliding_attention'\]"),
  ('qwen2', dict(layer_types=['chunked_attention'] * 3), 'it has one of full_attention, sliding_attention for every'),
  ('qwen2', dict(use_sliding_window=False), 'sliding_window = 0, and layers of sliding_attention see at least 1'),
  ('qwen2', dict(use_mrope=True), 'use_mrope = True; only False'),
  ('qwen3', dict(head_dim=0), 'head_dim = 0; it is a count of at least 1'),
  ('gemma2', dict(use_bidirectional_attention=True), 'use_bidirectional_attention = True; only False'),
  ('gemma2', dict(hidden_act='relu'), "hidden_act = 'relu'; only 'gelu_pytorch_tanh'"),
  ('gemma2', dict(head_dim=...), 'has no "head_dim"'),
  ('gemma3', dict(attn_logit_softcapping=50.0), 'attn_logit_softcapping = 50.0; only None'),
  ('gemma3', dict(rope_parameters=dict(rope_type='default')), 'rope_parameters has none of full_attention'),
  ('gemma3', dict(model_type='gemma3'), 'has no "text_config"'),
  ('phi3', dict(rope_parameters=dict(rope_type='longrope')), "RoPE is scaled as 'longrope'"),
  ('phi3', dict(rope_parameters=dict(partial_rotary_factor=0.75)), 'partial_rotary_factor = 0.75; only 1.0'),
  ('phi3', dict(partial_rotary_factor=0.75), 'partial_rotary_factor = 0.75; only 1.0'),
  ('gpt2', dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx = True; only False'),
  ('gpt2', dict(add_cross_attention=True), 'add_cross_attention = True; only False'),
  ('gpt2', dict(activation_function='tanh'), "activation_function = 'tanh'; supported"),
  ('gpt2', dict(n_head=5), 'n_embd = 24 is no multiple of n_head = 5'),
  ('gpt2', dict(n_inner=0.5), 'n_inner = 0.5; it is a count'),
]


@pytest.mark.parametrize('name, change, message', REFUSED)
def test_what_would_be_misread_is_refused(checkpoint, tmp_path, name, change, message):
  raw = said(checkpoint, name) | change
  with pytest.raises(ValueError, match=message):
    read(tmp_path, {key: value for key, value in raw.items() if value is not ...})
