"""The package's own directories: what was quantized comes back bit for bit."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
import small_llama

from qalora_jax import adapters
from qalora_jax import hf
from qalora_jax import packed
from qalora_jax import tensors
from qalora_jax.adapters import qalora
from qalora_jax.models import decoder
from qalora_jax.models import linear
from qalora_jax.quant import affine
from qalora_jax.quant import qtensor

CONFIG = small_llama.PLAIN
UP = 'model.layers.1.mlp.up_proj'


def quantized(bits, targets='all'):
  """A random tree with the matrices that `targets` names quantized in groups of 8; a fresh copy of its dicts."""
  return jax.tree.map(lambda w: w, _quantized(bits, targets))


@functools.cache
def _quantized(bits, targets):
  quantize = jax.jit(affine.Affine(bits, 8))

  def leaf(path, w):
    names = [key.key for key in path]
    chosen = names[-1] == 'kernel' and linear.selects(targets, linear.weight_name('/'.join(names[:-1])))
    return quantize(w) if chosen else w

  return jax.tree.map_with_path(leaf, small_llama.draw(CONFIG))


@pytest.fixture
def written(tmp_path):
  """A packed directory: 3 bits, the feed-forward matrices only."""
  tree = quantized(3, 'mlp')
  packed.write(tmp_path / 'model', CONFIG, tree, provenance={'source': 'random'}, bos=1, eos=2)
  return tmp_path / 'model'


@pytest.mark.parametrize('bits', [8, 4, 3, 2])
def test_what_is_written_comes_back_bit_for_bit(tmp_path, bits):
  tree = quantized(bits)
  packed.write(tmp_path / 'out', CONFIG, tree, provenance={})
  assert packed.holds(tmp_path / 'out')
  assert hf.read_config(tmp_path / 'out') == CONFIG
  small_llama.same(packed.load(tmp_path / 'out', CONFIG), tree)


def test_every_stored_dtype_comes_back(tmp_path):
  tree = quantized(4, 'mlp|lm_head')
  tree['embedding'] = tree['embedding'].astype(jnp.bfloat16)
  tree['norm']['scale'] = tree['norm']['scale'].astype(np.float16)
  # A merge makes float32 offsets beside scales that may have been stored in float16.
  up = tree['layers']['mlp']['up_proj']
  up['kernel'] = up['kernel'].replace(scale=up['kernel'].scale.astype(jnp.float16))
  packed.write(tmp_path / 'out', CONFIG, tree, provenance={}, shard_bytes=4000)
  assert len(list((tmp_path / 'out').glob('model-*.safetensors'))) > 3
  small_llama.same(packed.load(tmp_path / 'out', CONFIG), tree)
  assert packed.describe(tmp_path / 'out')['lm_head'] == qtensor.Form(4, 8)
  assert packed.describe(tmp_path / 'out')['layers/2/mlp/up_proj'] == qtensor.Form(4, 8, scale='float16')
  cast = packed.load(
    tmp_path / 'out', CONFIG, packed.scheme_of(packed.describe(tmp_path / 'out'), frozen_dtype=jnp.bfloat16)
  )
  assert cast['norm']['scale'].dtype == cast['layers']['attention']['q_proj']['kernel'].dtype == jnp.bfloat16
  small_llama.same(cast['layers']['mlp'], tree['layers']['mlp'])


def test_real_weights_quantized_while_read(assets, tmp_path):
  source = assets / 'models' / 'babyllama_tok105'
  config = hf.read_config(source)
  assert not packed.holds(source)
  tree = hf.load(source, config, linear.Scheme(quantizers=(('all', affine.Affine(3, 32)),)))
  packed.write(tmp_path / 'out', config, tree, provenance={'source': source.name}, tokenizer_from=source)
  small_llama.same(packed.load(tmp_path / 'out', config), tree)
  assert (tmp_path / 'out' / 'tokenizer.model').read_bytes() == (source / 'tokenizer.model').read_bytes()
  assert set(packed.describe(tmp_path / 'out').values()) == {qtensor.Form(3, 32)}


def test_a_merged_model_is_the_adapted_one(tmp_path):
  frozen = quantized(4)
  q = frozen['layers']['mlp']['down_proj']['kernel']
  rng = np.random.default_rng(0)
  a, b = (rng.normal(0, 0.1, shape).astype(np.float32) for shape in ((3, q.groups, 2), (3, 2, 24)))
  params = {'layers': {'mlp': {'down_proj': {'adapter': qalora.QALoRA(a, b, alpha=4.0)}}}}
  packed.write(tmp_path / 'out', CONFIG, adapters.merge(frozen, params), provenance={'merged': True})
  tokens, logits = jnp.arange(20)[None], jax.jit(decoder.Decoder(CONFIG).apply)
  adapted = logits({'frozen': frozen, 'params': params}, tokens)
  merged = logits({'frozen': packed.load(tmp_path / 'out', CONFIG)}, tokens)
  # Compiled together with the product or read from a file, the merged offset may round once differently; three layers
  # of sums of at most 40 products carry that on.
  atol = 3 * 40 * np.finfo(np.float32).eps * float(jnp.abs(adapted).max())
  np.testing.assert_allclose(merged, adapted, rtol=0, atol=atol)
  assert float(jnp.abs(adapted - logits({'frozen': frozen}, tokens)).max()) > 100 * atol


@pytest.mark.parametrize('bits', [8, 4, 3, 2])
def test_the_formula_in_the_directory_is_all_one_needs(tmp_path, bits):
  tree = quantized(bits)
  packed.write(tmp_path / 'out', CONFIG, tree, provenance={})
  held = safetensors_numpy.load_file(tmp_path / 'out' / tensors.SINGLE)
  entry = json.loads((tmp_path / 'out' / packed.MANIFEST).read_text())['weights'][UP]
  form = {'levels': 'integer', 'scale': 'float32', 'offset': 'float32'}
  assert entry == {'bits': bits, 'group': 8, 'inputs': 24, 'outputs': 40} | form
  dense = np.zeros((24, 40), np.float32)
  for i in range(24):
    code, low = np.zeros(40, np.int64), 0
    for plane, width in enumerate({8: [8], 4: [4], 3: [2, 1], 2: [2]}[bits]):
      word, place = divmod(i, 32 // width)
      field = (held[f'{UP}.codes.{plane}'][word] >> np.uint32(place * width)) % 2**width
      code, low = code + (field.astype(np.int64) << low), low + width
    code = np.where(code >= 2 ** (bits - 1), code - 2**bits, code)
    dense[i] = code * held[f'{UP}.scale'][i // 8] + held[f'{UP}.offset'][i // 8]
  want = np.asarray(qtensor.dequantize(tree['layers']['mlp']['up_proj']['kernel']))[1]
  # numpy works the formula out in float64 and rounds once; the package rounds the product and the sum.
  largest = np.abs(held[f'{UP}.scale']).max() * 2**bits
  np.testing.assert_allclose(dense, want, rtol=0, atol=2 * np.finfo(np.float32).eps * largest)


def test_the_manifest_says_what_is_quantized_and_where_it_comes_from(written):
  names = [f'layers/{layer}/mlp/{name}_proj' for layer in range(3) for name in ('gate', 'up', 'down')]
  assert packed.describe(written) == dict.fromkeys(names, qtensor.Form(3, 8))
  value = packed.manifest(written)
  assert value['provenance'] == {'source': 'random'} and value['version'] == 2
  assert len(value['weights']) == 3 * 3


def test_progress_is_told_of_every_layer(written, tmp_path):
  calls = []
  tree = packed.load(written, CONFIG, progress=lambda: calls.append('read'))
  packed.write(tmp_path / 'out', CONFIG, tree, provenance={}, progress=lambda: calls.append('write'))
  assert calls == ['read'] * 3 + ['write'] * 3


def change_manifest(directory, change):
  value = json.loads((directory / packed.MANIFEST).read_text())
  change(value)
  (directory / packed.MANIFEST).write_text(json.dumps(value))


def entry(**values):
  return lambda value: value['weights'][UP].update(values)


MANIFEST_FAULTS = [
  (lambda value: value.update(version=1), 'qalora.json: version 1; this program reads version 2'),
  (lambda value: value.update(format='other'), "qalora.json: format is 'other'"),
  (lambda value: value.pop('weights'), 'qalora.json: has no "weights"'),
  (entry(bits=5), f'{UP} has bits 5; it is one of 8, 4, 3, 2'),
  (entry(bits='3'), f'{UP} needs bits .int., group .int.'),
  (entry(group=7), f'{UP} has 24 inputs in groups of 7'),
  (entry(group=-1), f'{UP} has 24 inputs in groups of -1'),
  (entry(inputs=32), rf'{UP} is 32 x 40, not \(24, 40\)'),
  (entry(levels='nf5'), f"{UP} has levels 'nf5'; it is one of integer, nf4, fp4"),
  (entry(scale='bfloat16'), f"{UP} has scale 'bfloat16'; it is one of float32, float16, double"),
  (entry(bits=4), f'{UP}.codes.1 is unexpected'),
  (lambda value: value['weights'].pop(UP), f'{UP}.weight is missing'),
  (
    lambda value: value['weights'].update({'model.vision': value['weights'][UP]}),
    'names model.vision, which the model',
  ),
]


@pytest.mark.parametrize(('change', 'message'), MANIFEST_FAULTS)
def test_manifests_that_cannot_be_are_refused(written, change, message):
  change_manifest(written, change)
  with pytest.raises(ValueError, match=message):
    packed.load(written, CONFIG)


def test_a_directory_without_a_manifest_is_refused(written):
  (written / packed.MANIFEST).unlink()
  assert not packed.holds(written)
  with pytest.raises(FileNotFoundError, match='has no qalora.json'):
    packed.load(written, CONFIG)


TENSOR_FAULTS = [
  (f'{UP}.codes.1', None, f'{UP}.codes.1 is missing'),
  (f'{UP}.codes.2', np.zeros((1, 40), np.uint32), f'{UP}.codes.2 is unexpected'),
  (f'{UP}.weight', np.zeros((40, 24), np.float32), f'{UP}.weight is unexpected'),
  (f'{UP}.scale', np.zeros((4, 40), np.float32), rf'{UP}.scale has shape \[4, 40\], not \[3, 40\]'),
  (f'{UP}.offset', np.zeros((3, 40), jnp.bfloat16), f'{UP}.offset is stored as BF16, not as F32'),
  (f'{UP}.codes.0', np.zeros((2, 40), np.int32), f'{UP}.codes.0 is stored as I32, not as U32'),
  ('model.norm.weight', np.zeros(24, np.int32), 'model.norm.weight is stored as I32'),
]


@pytest.mark.parametrize(('name', 'value', 'message'), TENSOR_FAULTS)
def test_faults_are_found_in_the_headers(written, monkeypatch, name, value, message):
  held = safetensors_numpy.load_file(written / tensors.SINGLE)
  held[name] = value
  held = {key: array for key, array in held.items() if array is not None}
  safetensors_numpy.save_file(held, written / tensors.SINGLE)
  monkeypatch.setattr(tensors, 'read', lambda *_: pytest.fail('a tensor was read before the headers were checked'))
  with pytest.raises(ValueError, match=message):
    packed.load(written, CONFIG)


def test_a_write_that_fails_leaves_nothing(tmp_path):
  def stop():
    raise KeyboardInterrupt

  tree = quantized(3, 'mlp')
  with pytest.raises(KeyboardInterrupt):
    packed.write(tmp_path / 'out', CONFIG, tree, provenance={}, progress=stop)
  with pytest.raises(TypeError, match='JSON'):
    packed.write(tmp_path / 'out', CONFIG, tree, provenance={'adapter': object()})
  del tree['embedding']
  with pytest.raises(ValueError, match='embedding is missing'):
    packed.write(tmp_path / 'out', CONFIG, tree, provenance={})
  assert not list(tmp_path.iterdir())


def test_a_target_that_is_not_empty_is_refused(written):
  with pytest.raises(ValueError, match='exists and is not empty'):
    packed.write(written, CONFIG, small_llama.draw(CONFIG), provenance={})
